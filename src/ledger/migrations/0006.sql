-- A key's row names the entries that it comes from. Rows of before get theirs when the file is migrated (agent_keys/held.rs); an earlier
-- keyward would write rows without, and is told so by the schema.

-- How many keys an agent has is counted without the destroyed ones, whose names stay taken.
CREATE INDEX agent_key_there ON agent_key (agent, epoch) WHERE state <> 3;

-- Agents' keys that are objects in the token, from the entry that puts one to use until its object is gone.
CREATE TABLE resident_key (
    key_id  BLOB PRIMARY KEY,
    agent   TEXT NOT NULL,
    epoch   INTEGER NOT NULL,
    name    TEXT NOT NULL,
    expires INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE INDEX resident_key_of ON resident_key (agent);

-- Rows of agents' resident keys go with their objects from now on.
DELETE FROM hsm_key WHERE purpose = 7 AND state IN ('destroyed', 'abandoned');
CREATE INDEX hsm_key_ending ON hsm_key (id) WHERE state = 'destroying';

-- Nothing verifies by a destroyed key: its names in signatures are forgotten with it, from now on at once.
DELETE FROM agent_kid WHERE NOT EXISTS (
    SELECT 1 FROM agent_key AS key
    WHERE key.agent = agent_kid.agent AND key.epoch = agent_kid.epoch AND key.name = agent_kid.name AND key.state <> 3
);

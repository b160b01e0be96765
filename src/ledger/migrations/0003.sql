-- Agents' signing keys. row: terms and versions, wrapped keys among them; used: signatures that count against the budget.
-- state: 1 active, 2 disabled, 3 destroyed.
CREATE TABLE agent_key (
    agent TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    name  TEXT NOT NULL,
    state INTEGER NOT NULL,
    used  INTEGER NOT NULL,
    row   BLOB NOT NULL,
    PRIMARY KEY (agent, epoch, name)
) STRICT, WITHOUT ROWID;

-- Which key a signature names, for those whose signatures name one: purposes jws, http-message-signature and dpop.
CREATE TABLE agent_kid (
    kid   TEXT PRIMARY KEY,
    agent TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    name  TEXT NOT NULL
) STRICT, WITHOUT ROWID;

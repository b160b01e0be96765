-- Generations of the authorities, one row each; those in force until now were all there were. Which was made when is not asked: their age
-- counts from here. An outside root is called by the last 16 bytes of its certificate.
CREATE TABLE generation (
    key_id       BLOB PRIMARY KEY,
    purpose      INTEGER NOT NULL,
    state        INTEGER NOT NULL,
    since_micros INTEGER NOT NULL,
    certificate  BLOB NOT NULL,
    issuer       BLOB,
    checkpoint   TEXT NOT NULL,
    tainted      INTEGER NOT NULL,
    now          INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

INSERT INTO generation
SELECT CASE WHEN length(key_id) = 16 THEN key_id ELSE substr(certificate, -16) END,
       purpose, 3, unixepoch() * 1000000, certificate, NULL, '', 0, 0
FROM authority;

UPDATE generation SET issuer = (SELECT key_id FROM generation WHERE purpose = 1) WHERE purpose = 2;

INSERT INTO generation
SELECT id, purpose, 3, unixepoch() * 1000000, x'', NULL, '', 0, 0
FROM hsm_key WHERE purpose = 3 AND state = 'active';

DROP TABLE authority;

-- hsm_key.state may now be 'destroyed' as well.

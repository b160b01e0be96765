-- Schema 1. Forward only; a change is a new numbered file.
CREATE TABLE entry (
    idx   INTEGER PRIMARY KEY,
    bytes BLOB NOT NULL
) STRICT;

-- Complete RFC 6962 tiles of 256 hashes.
CREATE TABLE tile (
    level  INTEGER NOT NULL,
    idx    INTEGER NOT NULL,
    hashes BLOB NOT NULL,
    PRIMARY KEY (level, idx)
) STRICT, WITHOUT ROWID;

-- Agents as of some entry; the tail of the ledger is replayed over them.
CREATE TABLE agent (
    id  TEXT PRIMARY KEY,
    row BLOB NOT NULL
) STRICT, WITHOUT ROWID;

-- HSM keys. state: intended, active, abandoned.
CREATE TABLE hsm_key (
    id        BLOB PRIMARY KEY,
    purpose   INTEGER NOT NULL,
    algorithm INTEGER NOT NULL,
    token     INTEGER NOT NULL,
    state     TEXT NOT NULL,
    spki      BLOB
) STRICT, WITHOUT ROWID;

-- Root and issuing certificates in force.
CREATE TABLE authority (
    purpose     INTEGER PRIMARY KEY,
    key_id      BLOB NOT NULL,
    certificate BLOB NOT NULL,
    intent      INTEGER NOT NULL
) STRICT;

-- One row each: snapshot (entries below it are in the agents' rows), checkpoint (newest signed note).
CREATE TABLE fact (
    name  TEXT PRIMARY KEY,
    value BLOB NOT NULL
) STRICT, WITHOUT ROWID;

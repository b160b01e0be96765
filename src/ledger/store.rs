//! The SQLite file. One writer connection; readers page over immutable entries.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use prost::Message as _;
use rusqlite::{Connection, OpenFlags, OptionalExtension, params};

use crate::model::{Digest, KeyId, PublicKey};
use crate::proto;

use super::agent::Agent;
use super::agent_keys::KeyOf;
use super::agent_keys::rows::{self, AgentKeyRow};
use super::agent_keys::{held, resident};
use super::generation::{self, Generation, Generations};
use super::merkle::{Tile, Tree, leaf_hash};
use super::row::AgentRow;

/// Forward only: the Nth makes schema N of schema N - 1. Once landed, none changes.
const MIGRATIONS: [&str; 6] = [
    include_str!("migrations/0001.sql"),
    include_str!("migrations/0002.sql"),
    include_str!("migrations/0003.sql"),
    include_str!("migrations/0004.sql"),
    include_str!("migrations/0005.sql"),
    ENTRIES_NAMED,
];
/// The one that has a part that is not SQL: the rows of agents' keys get the names of their entries.
const ENTRIES_NAMED: &str = include_str!("migrations/0006.sql");
/// The schema this binary writes.
const SCHEMA: i64 = MIGRATIONS.len() as i64;
/// Entries read in one go, at most.
pub(super) const PAGE_ENTRIES_MAX: u32 = 1000;
/// A page that has as many bytes is full.
const PAGE_BYTES: usize = 8 << 20;

/// What the file cannot do.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// SQLite said no.
    #[error("the ledger file: {0}")]
    Sqlite(#[from] rusqlite::Error),
    /// The file system said no.
    #[error("the ledger file: {0}")]
    Io(#[from] std::io::Error),
    /// Written by a newer keyward.
    #[error(
        "the ledger file has schema {found}; this keyward knows {SCHEMA}: start the newer one, or restore a backup made before"
    )]
    Newer {
        /// Its schema.
        found: i64,
    },
    /// There is none yet.
    #[error("there is no ledger at {0}: run `keyward init`")]
    Missing(PathBuf),
    /// It exists already.
    #[error("there is a ledger at {0} already")]
    Exists(PathBuf),
    /// The tree does not hang together.
    #[error("the ledger file is damaged: {0}")]
    Tree(#[from] super::merkle::MerkleError),
    /// What is stored breaks a rule.
    #[error("the ledger file is damaged: {0}")]
    Damaged(String),
    /// A row is not what the entries say that it comes from.
    #[error("the ledger file was tampered with, or is damaged: {0}")]
    NotAsRecorded(String),
}

/// An HSM key as the ledger knows it.
#[derive(Debug, Clone)]
pub struct KeyRow {
    /// CKA_ID.
    pub id: KeyId,
    /// What it is for.
    pub purpose: proto::Purpose,
    /// What it signs with.
    pub algorithm: proto::KeyAlgorithm,
    /// Where it lives.
    pub token: proto::TokenRole,
    /// Whether it is in use; else it was intended and nothing more.
    pub active: bool,
    /// Pinned public key once active; a wrapping key has none.
    pub public: Option<PublicKey>,
}

/// A row that goes with an entry, in the same transaction.
#[derive(Debug, Clone)]
pub(super) enum Row {
    Agent(Box<AgentRow>, String),
    KeyIntended(proto::KeyIntended),
    KeyActivated(proto::KeyActivated),
    KeyAbandoned(Vec<u8>),
    Generation(Box<Generation>),
    /// A resident key of an agent is being destroyed, or has been.
    KeyEnding(KeyId, &'static str),
    AgentKey(Box<(KeyOf, proto::KeyState, AgentKeyRow)>),
    /// The versions of a key that is there: what was forgotten meanwhile does not come back.
    AgentKeyVersions(Box<(KeyOf, AgentKeyRow)>),
    AgentKeyUsed(Box<(KeyOf, u64)>),
    /// No signature that counts names them any more.
    AgentKidsGone(Box<(KeyOf, Vec<Arc<str>>)>),
    /// A key of an epoch that is over.
    AgentKeyForgotten(Box<KeyOf>),
    Fact(&'static str, Vec<u8>),
}

/// The writer's connection.
pub(super) struct Store {
    connection: Connection,
}

impl Store {
    /// A new file with the schema, and nothing in it.
    pub(super) fn create(path: &Path) -> Result<Self, StoreError> {
        if path.exists() {
            return Err(StoreError::Exists(path.to_owned()));
        }
        let mut store = Self { connection: connect(path, OpenFlags::SQLITE_OPEN_CREATE)? };
        store.migrate(path, &MIGRATIONS)?;
        Ok(store)
    }

    /// A file as an earlier keyward left it.
    #[cfg(test)]
    pub(super) fn create_of_schema(path: &Path, schema: usize) -> Self {
        let mut store = Self { connection: connect(path, OpenFlags::SQLITE_OPEN_CREATE).unwrap() };
        store.migrate(path, &MIGRATIONS[..schema]).unwrap();
        store
    }

    /// Opens and, where needed, migrates. Before a migration the file is copied to `<name>.schemaN.db`, N being the schema it had.
    pub(super) fn open(path: &Path) -> Result<Self, StoreError> {
        if !path.exists() {
            return Err(StoreError::Missing(path.to_owned()));
        }
        let mut store = Self { connection: connect(path, OpenFlags::empty())? };
        store.migrate(path, &MIGRATIONS)?;
        Ok(store)
    }

    fn migrate(&mut self, path: &Path, migrations: &[&str]) -> Result<(), StoreError> {
        let found: i64 = self.connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
        let Some(missing) = usize::try_from(found).ok().and_then(|found| migrations.get(found..)) else {
            return Err(StoreError::Newer { found });
        };
        if found > 0 && !missing.is_empty() {
            self.copy_before_migrating(&path.with_extension(format!("schema{found}.db")))?;
        }
        for (version, migration) in (found + 1..).zip(missing) {
            // A crash between two of them leaves a whole schema; the next start goes on from it.
            let transaction = self.connection.transaction()?;
            transaction.execute_batch(migration)?;
            if *migration == ENTRIES_NAMED {
                held::name_entries(&transaction)?;
            }
            transaction.pragma_update(None, "user_version", version)?;
            transaction.commit()?;
        }
        Ok(())
    }

    /// `VACUUM INTO` syncs nothing and leaves a torn file when it is interrupted: what bears the final name is whole and durable.
    fn copy_before_migrating(&self, copy: &Path) -> Result<(), StoreError> {
        if copy.exists() {
            return Ok(());
        }
        let beside = copy.with_extension("partial");
        match std::fs::remove_file(&beside) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error.into()),
            _ => {}
        }
        self.connection.execute("VACUUM INTO ?1", [beside.to_string_lossy()])?;
        File::open(&beside)?.sync_all()?;
        // A crash before this leaves the partial copy, which the next start makes again.
        std::fs::rename(&beside, copy)?;
        if let Some(directory) = copy.parent() {
            File::open(directory)?.sync_all()?;
        }
        Ok(())
    }

    /// One transaction: all entries, the tiles they complete, the rows that go with them. When this returns, they are durable.
    pub(super) fn commit(&mut self, first: u64, entries: &[Vec<u8>], tiles: &[Tile], rows: &[Row]) -> Result<(), StoreError> {
        let transaction = self.connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        {
            let mut insert = transaction.prepare_cached("INSERT INTO entry (idx, bytes) VALUES (?1, ?2)")?;
            for (at, bytes) in (first..).zip(entries) {
                insert.execute(params![at.cast_signed(), bytes])?;
            }
        }
        if !tiles.is_empty() {
            let mut insert = transaction.prepare_cached("INSERT INTO tile (level, idx, hashes) VALUES (?1, ?2, ?3)")?;
            for tile in tiles {
                insert.execute(params![tile.level, tile.index.cast_signed(), tile.hashes])?;
            }
        }
        for row in rows {
            write_row(&transaction, row)?;
        }
        transaction.commit()?;
        Ok(())
    }

    /// All agents' rows.
    pub(super) fn agents(&self, mut each: impl FnMut(Agent)) -> Result<(), StoreError> {
        let mut select = self.connection.prepare("SELECT id, row FROM agent")?;
        let mut rows = select.query([])?;
        while let Some(row) = rows.next()? {
            let id: String = row.get(0)?;
            let damaged = || StoreError::Damaged(format!("the row of agent {id}"));
            let decoded = AgentRow::decode(row.get_ref(1)?.as_blob().map_err(|_| damaged())?).map_err(|_| damaged())?;
            each(decoded.restore().ok_or_else(damaged)?);
        }
        Ok(())
    }

    pub(super) fn generations(&self) -> Result<Generations, StoreError> {
        Generations::load(&self.connection, |name| self.fact(name))
    }

    /// Holds the rows of the authorities against the entries, and keeps the list of these where it was missing or was not all of them.
    pub(super) fn hold(&mut self, generations: &mut Generations) -> Result<(), StoreError> {
        let listed = self.fact(generation::held::LIST)?;
        if let Some(list) = generation::held::hold(&self.connection, generations, listed)?
            && let Err(error) = self.commit(0, &[], &[], &[list])
        {
            // A full disk is no reason not to serve quarantines: the next start looks through all entries again.
            tracing::warn!(%error, "the list of the authorities' entries was not kept");
        }
        Ok(())
    }

    pub(super) fn fact(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.connection.query_row("SELECT value FROM fact WHERE name = ?1", [name], |row| row.get(0)).optional()?)
    }

    pub(super) fn size(&self) -> Result<u64, StoreError> {
        let last: Option<i64> = self.connection.query_row("SELECT max(idx) FROM entry", [], |row| row.get(0))?;
        Ok(last.map_or(0, |last| last.cast_unsigned() + 1))
    }

    /// Entries from `from` on, in order.
    pub(super) fn replay(&self, from: u64, mut each: impl FnMut(u64, &[u8]) -> Result<(), StoreError>) -> Result<(), StoreError> {
        let mut select = self.connection.prepare("SELECT idx, bytes FROM entry WHERE idx >= ?1 ORDER BY idx")?;
        let mut rows = select.query([from.cast_signed()])?;
        while let Some(row) = rows.next()? {
            let index: i64 = row.get(0)?;
            let bytes = row.get_ref(1)?.as_blob().map_err(|_| StoreError::Damaged(format!("entry {index}")))?;
            each(index.cast_unsigned(), bytes)?;
        }
        Ok(())
    }

    /// The first entry's bytes.
    pub(super) fn first(&self) -> Result<Vec<u8>, StoreError> {
        Ok(self.connection.query_row("SELECT bytes FROM entry WHERE idx = 0", [], |row| row.get(0))?)
    }

    /// The tree's right edge, from complete tiles and the newest entries.
    pub(super) fn tree(&self) -> Result<Tree, StoreError> {
        let tile = |level: u8, index: u64| -> Result<Vec<u8>, StoreError> {
            Ok(self.connection.query_row(
                "SELECT hashes FROM tile WHERE level = ?1 AND idx = ?2",
                params![level, index.cast_signed()],
                |row| row.get(0),
            )?)
        };
        let leaf = |index: u64| -> Result<Digest, StoreError> {
            let bytes: Vec<u8> =
                self.connection.query_row("SELECT bytes FROM entry WHERE idx = ?1", [index.cast_signed()], |row| row.get(0))?;
            Ok(leaf_hash(&bytes))
        };
        Tree::load(self.size()?, tile, leaf)
    }
}

fn connect(path: &Path, also: OpenFlags) -> Result<Connection, StoreError> {
    let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX | also;
    let connection = Connection::open_with_flags(path, flags)?;
    connection.busy_timeout(std::time::Duration::from_secs(2))?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    connection.pragma_update(None, "synchronous", "FULL")?;
    connection.pragma_update(None, "foreign_keys", "ON")?;
    connection.pragma_update(None, "trusted_schema", "OFF")?;
    connection.pragma_update(None, "temp_store", "MEMORY")?;
    // 2 MiB of pages: the ledger only appends, and agents' rows are read once.
    connection.pragma_update(None, "cache_size", -2048)?;
    Ok(connection)
}

fn write_row(transaction: &Connection, row: &Row) -> Result<(), StoreError> {
    match row {
        Row::Agent(row, id) => {
            transaction
                .prepare_cached("INSERT INTO agent (id, row) VALUES (?1, ?2) ON CONFLICT (id) DO UPDATE SET row = excluded.row")?
                .execute(params![id, row.encode_to_vec()])?;
        }
        Row::KeyIntended(key) => {
            transaction
                .prepare_cached("INSERT INTO hsm_key (id, purpose, algorithm, token, state) VALUES (?1, ?2, ?3, ?4, 'intended')")?
                .execute(params![key.key_id, key.purpose, key.algorithm, key.token])?;
        }
        Row::KeyActivated(key) => {
            transaction
                .prepare_cached("UPDATE hsm_key SET state = 'active', spki = ?2 WHERE id = ?1 AND state = 'intended'")?
                .execute(params![key.key_id, key.spki])?;
        }
        Row::KeyAbandoned(id) => {
            transaction.prepare_cached("UPDATE hsm_key SET state = 'abandoned' WHERE id = ?1")?.execute([id])?;
            resident::given_up(transaction, id)?;
        }
        Row::Generation(generation) => generation::write(transaction, generation)?,
        Row::KeyEnding(id, state) => {
            resident::ending(transaction, id, state)?;
        }
        Row::AgentKidsGone(gone) => rows::forget_kids(transaction, &gone.0, &gone.1)?,
        Row::AgentKeyForgotten(of) => rows::forget(transaction, of)?,
        Row::AgentKey(key) => rows::write(transaction, &key.0, key.1, &key.2)?,
        Row::AgentKeyVersions(key) => rows::write_versions(transaction, &key.0, &key.1)?,
        Row::AgentKeyUsed(used) => rows::write_used(transaction, &used.0, used.1)?,
        Row::Fact(name, value) => {
            transaction
                .prepare_cached("INSERT OR REPLACE INTO fact (name, value) VALUES (?1, ?2)")?
                .execute(params![name, value])?;
        }
    }
    Ok(())
}

/// A read-only look at a ledger file, of a running daemon or of a copy.
pub struct Reader {
    connection: Mutex<Connection>,
}

impl Reader {
    /// Opens `path` for reading alone.
    ///
    /// # Errors
    /// When it is no ledger, or one of a newer keyward.
    pub fn open(path: &Path) -> Result<Self, StoreError> {
        if !path.exists() {
            return Err(StoreError::Missing(path.to_owned()));
        }
        let connection = Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_ONLY | OpenFlags::SQLITE_OPEN_NO_MUTEX)?;
        connection.busy_timeout(std::time::Duration::from_secs(2))?;
        let found: i64 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
        if found > SCHEMA {
            return Err(StoreError::Newer { found });
        }
        Ok(Self { connection: Mutex::new(connection) })
    }

    pub(super) fn locked(&self) -> std::sync::MutexGuard<'_, Connection> {
        self.connection.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// One entry's bytes.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn entry(&self, index: u64) -> Result<Option<Vec<u8>>, StoreError> {
        let connection = self.locked();
        let mut select = connection.prepare_cached("SELECT bytes FROM entry WHERE idx = ?1")?;
        Ok(select.query_row([index.cast_signed()], |row| row.get(0)).optional()?)
    }

    /// At most `limit` (and 1,000) entries' bytes from `from` on; fewer where they are large, none only at the end.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn entries(&self, from: u64, limit: u32) -> Result<Vec<Vec<u8>>, StoreError> {
        let connection = self.locked();
        let mut select = connection.prepare_cached("SELECT bytes FROM entry WHERE idx >= ?1 ORDER BY idx LIMIT ?2")?;
        let mut rows = select.query(params![from.cast_signed(), limit.min(PAGE_ENTRIES_MAX)])?;
        let (mut page, mut bytes) = (Vec::new(), 0);
        // The intent of a CRL that lists a fleet has megabytes.
        while let Some(row) = rows.next()?.filter(|_| bytes < PAGE_BYTES) {
            let entry: Vec<u8> = row.get(0)?;
            bytes += entry.len();
            page.push(entry);
        }
        Ok(page)
    }

    /// A fact by name (`checkpoint`: the newest signed note).
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn fact(&self, name: &str) -> Result<Option<Vec<u8>>, StoreError> {
        let connection = self.locked();
        Ok(connection.query_row("SELECT value FROM fact WHERE name = ?1", [name], |row| row.get(0)).optional()?)
    }

    /// HSM keys that are intended or active.
    ///
    /// # Errors
    /// When the file cannot be read or a row breaks a rule.
    pub fn keys(&self) -> Result<Vec<KeyRow>, StoreError> {
        let connection = self.locked();
        let mut select = connection.prepare_cached(
            "SELECT id, purpose, algorithm, token, spki, state = 'active' FROM hsm_key WHERE state IN ('intended', 'active') ORDER BY id",
        )?;
        let mut rows = select.query([])?;
        let mut keys = Vec::new();
        while let Some(row) = rows.next()? {
            let id: Vec<u8> = row.get(0)?;
            let spki: Option<Vec<u8>> = row.get(4)?;
            let damaged = || StoreError::Damaged("a row of hsm_key".to_owned());
            keys.push(KeyRow {
                id: KeyId::from_slice(&id).ok_or_else(damaged)?,
                purpose: row.get::<_, i32>(1)?.try_into().map_err(|_| damaged())?,
                algorithm: row.get::<_, i32>(2)?.try_into().map_err(|_| damaged())?,
                token: row.get::<_, i32>(3)?.try_into().map_err(|_| damaged())?,
                active: row.get(5)?,
                public: match spki {
                    Some(spki) if !spki.is_empty() => Some(PublicKey::from_spki(&spki).map_err(|_| damaged())?),
                    _ => None,
                },
            });
        }
        Ok(keys)
    }

    /// The public key under a CKA_ID, in use or not.
    ///
    /// # Errors
    /// When the file cannot be read or a row breaks a rule.
    pub fn public_key(&self, id: &KeyId) -> Result<Option<PublicKey>, StoreError> {
        let connection = self.locked();
        let mut select = connection.prepare_cached("SELECT spki FROM hsm_key WHERE id = ?1 AND spki IS NOT NULL")?;
        let spki: Option<Vec<u8>> = select.query_row([id.0], |row| row.get(0)).optional()?;
        let damaged = |_| StoreError::Damaged("a row of hsm_key".to_owned());
        spki.map(|spki| PublicKey::from_spki(&spki).map_err(damaged)).transpose()
    }

    /// Every generation of a purpose that there ever was, the oldest first.
    ///
    /// # Errors
    /// When the file cannot be read or a row breaks a rule.
    pub fn generations(&self, purpose: proto::Purpose) -> Result<Vec<Generation>, StoreError> {
        let connection = self.locked();
        // A copy of an earlier keyward's file has none: nothing was rotated.
        if !connection.table_exists(None, "generation")? {
            return Ok(Vec::new());
        }
        let mut select = connection.prepare_cached("SELECT * FROM generation WHERE purpose = ?1 ORDER BY since_micros")?;
        let mut rows = select.query([purpose as i32])?;
        let mut generations = Vec::new();
        while let Some(row) = rows.next()? {
            generations.push(generation::read(row)?);
        }
        Ok(generations)
    }

    /// The rows of all generations, and how many entries there were when they were read; `None` in a file that has none yet.
    ///
    /// # Errors
    /// When the file cannot be read or a row breaks a rule.
    pub fn authority_rows(&self) -> Result<Option<(u64, Vec<Generation>)>, StoreError> {
        let connection = self.locked();
        // One look: a daemon may be writing.
        let look = connection.unchecked_transaction()?;
        if !look.table_exists(None, "generation")? {
            return Ok(None);
        }
        let last: Option<i64> = look.query_row("SELECT max(idx) FROM entry", [], |row| row.get(0))?;
        Ok(Some((last.map_or(0, |last| last.cast_unsigned() + 1), generation::held::rows(&look)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::UnixTime;

    const NEXT: &str = "CREATE TABLE colour (name TEXT PRIMARY KEY) STRICT;";

    /// A ledger file of schema 1 with one entry.
    fn older(directory: &Path) -> PathBuf {
        let path = directory.join("keyward.db");
        let mut store = Store { connection: connect(&path, OpenFlags::SQLITE_OPEN_CREATE).unwrap() };
        store.migrate(&path, &MIGRATIONS[..1]).unwrap();
        store.commit(0, &[b"the first entry".to_vec()], &[], &[]).unwrap();
        path
    }

    fn schema(connection: &Connection) -> i64 {
        connection.pragma_query_value(None, "user_version", |row| row.get(0)).unwrap()
    }

    fn opened(path: &Path) -> Store {
        Store { connection: connect(path, OpenFlags::empty()).unwrap() }
    }

    #[test]
    fn a_file_of_an_older_schema_is_copied_and_then_migrated_with_all_its_entries() {
        let directory = tempfile::tempdir().unwrap();
        let path = older(directory.path());
        let mut store = opened(&path);
        store.migrate(&path, &[MIGRATIONS[0], NEXT]).unwrap();
        assert_eq!(schema(&store.connection), 2);
        assert_eq!(store.first().unwrap(), b"the first entry");
        store.connection.execute("INSERT INTO colour VALUES ('red')", []).unwrap();
        let copy = Reader::open(&directory.path().join("keyward.schema1.db")).unwrap();
        assert_eq!(schema(&copy.locked()), 1);
        assert_eq!(copy.entry(0).unwrap().unwrap(), b"the first entry");
    }

    #[test]
    fn a_migration_that_fails_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let path = older(directory.path());
        let mut store = opened(&path);
        assert!(store.migrate(&path, &[MIGRATIONS[0], "CREATE TABLE half (a INTEGER) STRICT; CREATE TABLE entry (x);"]).is_err());
        assert_eq!(schema(&store.connection), 1);
        assert!(store.connection.prepare("SELECT a FROM half").is_err());
        assert_eq!(store.first().unwrap(), b"the first entry");
    }

    #[test]
    fn a_copy_that_a_crash_tore_is_made_again() {
        let directory = tempfile::tempdir().unwrap();
        let path = older(directory.path());
        std::fs::write(directory.path().join("keyward.schema1.partial"), b"half of a ledger").unwrap();
        opened(&path).migrate(&path, &[MIGRATIONS[0], NEXT]).unwrap();
        let copy = Reader::open(&directory.path().join("keyward.schema1.db")).unwrap();
        assert_eq!(copy.entry(0).unwrap().unwrap(), b"the first entry");
        assert!(!directory.path().join("keyward.schema1.partial").exists());
    }

    #[test]
    fn the_copy_of_an_interrupted_migration_is_kept() {
        let directory = tempfile::tempdir().unwrap();
        let path = older(directory.path());
        let copy = directory.path().join("keyward.schema1.db");
        opened(&path).migrate(&path, &[MIGRATIONS[0], "nonsense"]).unwrap_err();
        let before = std::fs::read(&copy).unwrap();
        let mut store = opened(&path);
        store.commit(1, &[b"a second entry".to_vec()], &[], &[]).unwrap();
        store.migrate(&path, &[MIGRATIONS[0], NEXT]).unwrap();
        assert_eq!(std::fs::read(&copy).unwrap(), before);
        assert_eq!(store.size().unwrap(), 2);
    }

    #[test]
    fn the_authorities_of_an_older_file_are_generations_in_force() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keyward.db");
        let mut store = Store { connection: connect(&path, OpenFlags::SQLITE_OPEN_CREATE).unwrap() };
        store.migrate(&path, &MIGRATIONS[..2]).unwrap();
        let rows = "INSERT INTO authority VALUES (1, x'', randomblob(40), 0), (2, randomblob(16), randomblob(40), 0);
                    INSERT INTO hsm_key VALUES (randomblob(16), 3, 2, 1, 'active', NULL), (randomblob(16), 3, 2, 1, 'abandoned', NULL);";
        store.connection.execute_batch(rows).unwrap();
        drop(store);
        let all = Store::open(&path).unwrap().generations().unwrap().all();
        let of = |purpose| all.iter().find(|found| found.purpose == purpose).unwrap();
        let (root, issuing) = (of(proto::Purpose::Root), of(proto::Purpose::Issuing));
        assert!(root.is_outside() && root.key_id.0[..] == root.certificate[24..]);
        assert_eq!((issuing.issuer, issuing.state), (Some(root.key_id), proto::AuthorityState::Active));
        assert!(issuing.since > UnixTime::from_seconds(1_700_000_000), "its age counts from now");
        assert_eq!(all.len(), 3, "and the ledger key: {all:?}");
    }

    #[test]
    fn a_file_of_a_newer_schema_is_not_opened() {
        let directory = tempfile::tempdir().unwrap();
        let path = older(directory.path());
        opened(&path).connection.pragma_update(None, "user_version", SCHEMA + 1).unwrap();
        assert!(matches!(Store::open(&path), Err(StoreError::Newer { found }) if found == SCHEMA + 1));
        assert!(matches!(Reader::open(&path), Err(StoreError::Newer { .. })));
    }
}

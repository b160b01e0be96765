//! The table of agents' keys: what a key's entries amount to, and the wrapped keys that no entry holds.

use std::sync::Arc;

use prost::Message as _;
use rusqlite::{Connection, OptionalExtension as _, params};

use crate::model::{AgentId, KeyId, KeyName, PublicKey, UnixTime};
use crate::proto::{self, KeyAccounting, KeyAlgorithm, KeyPurpose, KeyState, KeyStorage};

use super::super::store::{Reader, StoreError};
use super::{KeyOf, KeyTerms, KeyVersion, held, resident};

#[derive(Clone, PartialEq, prost::Message)]
pub(in crate::ledger) struct AgentKeyRow {
    #[prost(enumeration = "KeyPurpose", tag = "1")]
    purpose: i32,
    #[prost(enumeration = "KeyAlgorithm", tag = "2")]
    algorithm: i32,
    #[prost(enumeration = "KeyStorage", tag = "3")]
    storage_asked: i32,
    #[prost(enumeration = "KeyAccounting", tag = "4")]
    accounting: i32,
    #[prost(uint64, tag = "5")]
    signatures_max: u64,
    #[prost(uint32, tag = "6")]
    ttl_seconds: u32,
    #[prost(message, repeated, tag = "7")]
    versions: Vec<VersionRow>,
    /// The entry that made it: what the terms are held against.
    #[prost(uint64, optional, tag = "8")]
    created: Option<u64>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct VersionRow {
    #[prost(message, optional, tag = "1")]
    version: Option<proto::AgentKeyVersion>,
    #[prost(bytes = "vec", tag = "2")]
    wrapped: Vec<u8>,
    #[prost(bytes = "vec", repeated, tag = "3")]
    wrapped_before: Vec<Vec<u8>>,
    /// The entry that tells of it: what all of this is held against.
    #[prost(uint64, optional, tag = "5")]
    entry: Option<u64>,
    /// The last entry that changed how it is wrapped.
    #[prost(uint64, optional, tag = "6")]
    rewrapped: Option<u64>,
}

impl AgentKeyRow {
    pub(super) fn new(terms: &KeyTerms, created: Option<u64>, versions: &[KeyVersion]) -> Self {
        let version = |version: &KeyVersion| VersionRow {
            version: Some(version.entry()),
            wrapped: version.wrapped.as_ref().map(|(wrapped, _)| wrapped.to_vec()).unwrap_or_default(),
            wrapped_before: version.wrapped_before.iter().map(|id| id.0.to_vec()).collect(),
            entry: version.told_by,
            rewrapped: version.rewrapped_by,
        };
        Self {
            purpose: terms.purpose.into(),
            algorithm: terms.algorithm.into(),
            storage_asked: terms.storage_asked.into(),
            accounting: terms.accounting.into(),
            signatures_max: terms.signatures_max,
            ttl_seconds: terms.ttl_seconds,
            versions: versions.iter().map(version).collect(),
            created,
        }
    }

    /// What names no entry yet is of the one that goes to the disk with it.
    pub(in crate::ledger) fn told_by(&mut self, index: u64) {
        self.created.get_or_insert(index);
        for version in &mut self.versions {
            version.entry.get_or_insert(index);
        }
    }

    /// The entry `index` changed how these versions are wrapped.
    pub(in crate::ledger) fn rewrapped_by(&mut self, index: u64, rewrapped: &[proto::RewrappedVersion]) {
        for row in &mut self.versions {
            let Some(version) = &row.version else { continue };
            if rewrapped.iter().any(|one| one.key_id == version.key_id) {
                row.rewrapped = Some(index);
            }
        }
    }

    /// The entry `index` tells of the version with this id, and may have made the key.
    pub(super) fn told_of(&mut self, index: u64, made: bool, key_id: &[u8]) {
        if made {
            self.created = Some(index);
        }
        let is_it = |row: &&mut VersionRow| row.version.as_ref().is_some_and(|version| version.key_id == key_id);
        if let Some(row) = self.versions.iter_mut().find(is_it) {
            row.entry = Some(index);
        }
    }

    /// Whether its signatures say by which key they are.
    fn names_its_key(&self) -> bool {
        matches!(self.purpose(), KeyPurpose::Jws | KeyPurpose::HttpMessageSignature | KeyPurpose::Dpop)
    }

    fn terms(&self) -> KeyTerms {
        KeyTerms {
            purpose: self.purpose(),
            algorithm: self.algorithm(),
            storage_asked: self.storage_asked(),
            accounting: self.accounting(),
            signatures_max: self.signatures_max,
            ttl_seconds: self.ttl_seconds,
        }
    }
}

impl VersionRow {
    fn restore(self) -> Option<KeyVersion> {
        let version = self.version?;
        let wrapped = match KeyId::from_slice(&version.wrapping_key_id) {
            Some(wrapping) => Some((Arc::from(self.wrapped), wrapping)),
            None => None,
        };
        Some(KeyVersion {
            number: version.number,
            key_id: KeyId::from_slice(&version.key_id)?,
            // Checked to be on its curve when it was written.
            public: PublicKey::from_spki_unchecked(&version.spki).ok()?,
            storage: version.storage(),
            kid: version.kid.into(),
            wrapped,
            wrapped_before: self.wrapped_before.iter().map(|id| KeyId::from_slice(id)).collect::<Option<_>>()?,
            expires: UnixTime::from_seconds(version.expires_unix_seconds),
            told_by: self.entry,
            rewrapped_by: self.rewrapped,
        })
    }
}

/// A page that has as many bytes of rows is full: sixteen versions make a long row.
const PAGE_BYTES: usize = 256 << 10;

/// Some keys, in their order.
#[derive(Debug, Default)]
pub struct KeyPage {
    /// Not held against their entries: [`Reader::hold`].
    pub keys: Vec<StoredKey>,
    /// There may be more after the last.
    pub more: bool,
}

/// A key as its row has it.
#[derive(Debug, Clone)]
pub struct StoredKey {
    /// Which.
    pub of: KeyOf,
    /// What it was made for.
    pub terms: KeyTerms,
    /// Where it stands.
    pub state: KeyState,
    /// Signatures that count against the budget.
    pub used: u64,
    /// Its versions, the newest last; none of a destroyed one.
    pub versions: Vec<KeyVersion>,
    /// The entry that made it, once there is one.
    pub created: Option<u64>,
}

impl StoredKey {
    /// Whether its row could not be read: nobody knows what of it is wrapped under which key.
    #[must_use]
    pub fn is_unreadable(&self) -> bool {
        self.created.is_none() && self.versions.is_empty()
    }
}

pub(in crate::ledger) fn write(
    transaction: &Connection,
    of: &KeyOf,
    state: KeyState,
    row: &AgentKeyRow,
) -> Result<(), rusqlite::Error> {
    if state == KeyState::Active
        && row.names_its_key()
        && let Some(newest) = row.versions.last().and_then(|newest| newest.version.as_ref())
    {
        // The same public key twice is a token's fault: the first stays who is named.
        transaction
            .prepare_cached("INSERT OR IGNORE INTO agent_kid (kid, agent, epoch, name) VALUES (?1, ?2, ?3, ?4)")?
            .execute(params![newest.kid, of.agent.as_str(), of.epoch, of.name.as_str()])?;
    }
    if state == KeyState::Destroyed {
        // Also where the key came without versions, because its row is not as recorded.
        forget_kids(transaction, of, &kids(transaction, of)?)?;
    }
    if state != KeyState::Active {
        // What was forgotten meanwhile does not come back.
        return transaction
            .prepare_cached("UPDATE agent_key SET state = ?4, row = ?5 WHERE agent = ?1 AND epoch = ?2 AND name = ?3")?
            .execute(params![of.agent.as_str(), of.epoch, of.name.as_str(), i32::from(state), row.encode_to_vec()])
            .map(drop);
    }
    resident::puts_to_use(transaction, of, row.versions.last().and_then(|newest| newest.version.as_ref()))?;
    transaction
        .prepare_cached(
            "INSERT INTO agent_key (agent, epoch, name, state, used, row) VALUES (?1, ?2, ?3, ?4, 0, ?5) \
             ON CONFLICT (agent, epoch, name) DO UPDATE SET state = excluded.state, row = excluded.row",
        )?
        .execute(params![of.agent.as_str(), of.epoch, of.name.as_str(), i32::from(state), row.encode_to_vec()])
        .map(drop)
}

/// By which a row says that its key is named.
fn kids(transaction: &Connection, of: &KeyOf) -> Result<Vec<Arc<str>>, rusqlite::Error> {
    let mut select = transaction.prepare_cached("SELECT row FROM agent_key WHERE agent = ?1 AND epoch = ?2 AND name = ?3")?;
    let found: Option<Vec<u8>> =
        select.query_row(params![of.agent.as_str(), of.epoch, of.name.as_str()], |row| row.get(0)).optional()?;
    let row = found.and_then(|row| AgentKeyRow::decode(row.as_slice()).ok()).unwrap_or_default();
    Ok(row.versions.into_iter().filter_map(|row| row.version).map(|version| version.kid.into()).collect())
}

/// A row that is there, as it is from now on; where it stands and what names it stays.
pub(in crate::ledger) fn write_versions(transaction: &Connection, of: &KeyOf, row: &AgentKeyRow) -> Result<(), rusqlite::Error> {
    transaction
        .prepare_cached("UPDATE agent_key SET row = ?4 WHERE agent = ?1 AND epoch = ?2 AND name = ?3")?
        .execute(params![of.agent.as_str(), of.epoch, of.name.as_str(), row.encode_to_vec()])
        .map(drop)
}

pub(in crate::ledger) fn write_used(transaction: &Connection, of: &KeyOf, used: u64) -> Result<(), rusqlite::Error> {
    transaction
        .prepare_cached("UPDATE agent_key SET used = ?4 WHERE agent = ?1 AND epoch = ?2 AND name = ?3")?
        .execute(params![of.agent.as_str(), of.epoch, of.name.as_str(), used.cast_signed()])
        .map(drop)
}

pub(in crate::ledger) fn forget_kids(transaction: &Connection, of: &KeyOf, kids: &[Arc<str>]) -> Result<(), rusqlite::Error> {
    let mut delete =
        transaction.prepare_cached("DELETE FROM agent_kid WHERE kid = ?1 AND agent = ?2 AND epoch = ?3 AND name = ?4")?;
    for kid in kids {
        delete.execute(params![&**kid, of.agent.as_str(), of.epoch, of.name.as_str()])?;
    }
    Ok(())
}

pub(in crate::ledger) fn forget(transaction: &Connection, of: &KeyOf) -> Result<(), rusqlite::Error> {
    transaction
        .prepare_cached("DELETE FROM agent_key WHERE agent = ?1 AND epoch = ?2 AND name = ?3")?
        .execute(params![of.agent.as_str(), of.epoch, of.name.as_str()])
        .map(drop)
}

pub(super) const COLUMNS: &str = "SELECT agent, epoch, name, state, used, row FROM agent_key";

/// A row that cannot be read is one that is not as recorded. `None`: one that nobody can name.
pub(super) fn stored(row: &rusqlite::Row<'_>) -> Option<StoredKey> {
    let (agent, name): (String, String) = (row.get(0).ok()?, row.get(2).ok()?);
    let of = KeyOf { agent: AgentId::parse(&agent).ok()?, epoch: row.get(1).ok()?, name: KeyName::parse(&name).ok()? };
    let state = row.get::<_, i32>(3).ok().and_then(|state| KeyState::try_from(state).ok()).unwrap_or_default();
    let used = row.get::<_, i64>(4).map_or(0, i64::cast_unsigned);
    let decoded = row.get_ref(5).ok().and_then(|bytes| AgentKeyRow::decode(bytes.as_blob().ok()?).ok());
    let read = decoded.and_then(|decoded| {
        let (terms, created) = (decoded.terms(), decoded.created);
        let versions = decoded.versions.into_iter().map(VersionRow::restore).collect::<Option<_>>()?;
        Some((terms, created, versions))
    });
    let (terms, created, versions) = read.unwrap_or_else(|| (AgentKeyRow::default().terms(), None, Vec::new()));
    Some(StoredKey { of, terms, state, used, versions, created })
}

fn page(mut rows: rusqlite::Rows<'_>, limit: u32) -> Result<KeyPage, StoreError> {
    let (mut page, mut bytes) = (KeyPage::default(), 0);
    while page.keys.len() < limit as usize
        && let Some(row) = rows.next()?
    {
        let Some(key) = stored(row) else { continue };
        bytes += row.get_ref(5)?.as_blob().map_or(0, <[u8]>::len);
        page.keys.push(key);
        if bytes >= PAGE_BYTES {
            page.more = true;
            return Ok(page);
        }
    }
    page.more = page.keys.len() == limit as usize;
    Ok(page)
}

impl Reader {
    /// One key, held against its entries.
    ///
    /// # Errors
    /// When the file cannot be read, a row breaks a rule, or is not as recorded.
    pub fn agent_key(&self, of: &KeyOf) -> Result<Option<StoredKey>, StoreError> {
        let connection = self.locked();
        let mut select = connection.prepare_cached(&format!("{COLUMNS} WHERE agent = ?1 AND epoch = ?2 AND name = ?3"))?;
        let found = select.query_row(params![of.agent.as_str(), of.epoch, of.name.as_str()], |row| Ok(stored(row)));
        let found = found.optional()?.flatten();
        found.as_ref().map_or(Ok(()), |found| held::hold(&connection, found)).map(|()| found)
    }

    /// The key that signatures name by `kid`, held against its entries.
    ///
    /// # Errors
    /// When the file cannot be read, a row breaks a rule, or is not as recorded.
    pub fn agent_key_by_kid(&self, kid: &str) -> Result<Option<StoredKey>, StoreError> {
        let connection = self.locked();
        let mut select = connection.prepare_cached(&format!(
            "{COLUMNS} WHERE (agent, epoch, name) = (SELECT agent, epoch, name FROM agent_kid WHERE kid = ?1)"
        ))?;
        let found = select.query_row([kid], |row| Ok(stored(row))).optional()?.flatten();
        found.as_ref().map_or(Ok(()), |found| held::hold(&connection, found)).map(|()| found)
    }

    /// What there is of a key that is not as recorded: it has no versions, whatever its row says.
    ///
    /// # Errors
    /// When the file cannot be read or a row breaks a rule.
    pub fn bare_agent_key(&self, of: &KeyOf) -> Result<Option<StoredKey>, StoreError> {
        let connection = self.locked();
        let mut select = connection.prepare_cached(&format!("{COLUMNS} WHERE agent = ?1 AND epoch = ?2 AND name = ?3"))?;
        let found = select.query_row(params![of.agent.as_str(), of.epoch, of.name.as_str()], |row| Ok(stored(row)));
        Ok(found.optional()?.flatten().map(|found| StoredKey { versions: Vec::new(), ..found }))
    }

    /// Holds a key of a page against its entries.
    ///
    /// # Errors
    /// [`StoreError::NotAsRecorded`]; when the file cannot be read.
    pub fn hold(&self, key: &StoredKey) -> Result<(), StoreError> {
        held::hold(&self.locked(), key)
    }

    /// At most `limit` keys of an agent's epoch, by name, after `after`.
    ///
    /// # Errors
    /// When the file cannot be read or a row breaks a rule.
    pub fn agent_keys(&self, agent: &AgentId, epoch: u32, after: &str, limit: u32) -> Result<KeyPage, StoreError> {
        let connection = self.locked();
        let mut select =
            connection.prepare_cached(&format!("{COLUMNS} WHERE agent = ?1 AND epoch = ?2 AND name > ?3 ORDER BY name"))?;
        page(select.query(params![agent.as_str(), epoch, after])?, limit)
    }

    /// At most `limit` keys of all agents of a class that are not destroyed, in the order of agent, epoch and name, after `after`.
    ///
    /// # Errors
    /// When the file cannot be read or a row breaks a rule.
    pub fn agent_keys_of_class(&self, class: &str, after: (&str, u32, &str), limit: u32) -> Result<KeyPage, StoreError> {
        let connection = self.locked();
        let mut select = connection.prepare_cached(&format!("{COLUMNS} {OF_CLASS}"))?;
        // '0' follows '/': all agents of the class and no others lie between.
        let (first, end) = (format!("{class}/"), format!("{class}0"));
        let after = if after.0 > first.as_str() { after } else { (first.as_str(), 0, "") };
        page(select.query(params![end, after.0, after.1, after.2])?, limit)
    }

    /// At most `limit` keys that are not destroyed, of all agents and epochs, after `after`.
    ///
    /// # Errors
    /// When the file cannot be read or a row breaks a rule.
    pub fn all_agent_keys(&self, after: Option<&KeyOf>, limit: u32) -> Result<Vec<StoredKey>, StoreError> {
        let connection = self.locked();
        let mut select = connection.prepare_cached(&format!(
            "{COLUMNS} WHERE (agent, epoch, name) > (?1, ?2, ?3) AND state <> 3 ORDER BY agent, epoch, name"
        ))?;
        let (agent, epoch, name) = after.map_or(("", 0, ""), |of| (of.agent.as_str(), of.epoch, of.name.as_str()));
        let mut rows = select.query(params![agent, epoch, name])?;
        let mut keys = Vec::new();
        while keys.len() < limit as usize
            && let Some(row) = rows.next()?
        {
            keys.extend(stored(row));
        }
        Ok(keys)
    }

    /// How many keys of an agent's epoch are not destroyed.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn agent_key_count(&self, agent: &AgentId, epoch: u32) -> Result<u64, StoreError> {
        let connection = self.locked();
        let mut select =
            connection.prepare_cached("SELECT count(*) FROM agent_key WHERE agent = ?1 AND epoch = ?2 AND state <> 3")?;
        let count: i64 = select.query_row(params![agent.as_str(), epoch], |row| row.get(0))?;
        Ok(count.cast_unsigned())
    }
}

/// One lower bound, and an index without the destroyed keys: a page is the same work however deep it is, and however many of them lie between.
const OF_CLASS: &str = "WHERE agent < ?1 AND (agent, epoch, name) > (?2, ?3, ?4) AND state <> 3 ORDER BY agent, epoch, name";

const _: () = assert!(KeyState::Destroyed as i32 == 3, "the queries above say so");

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::super::store::{Row, Store};
    use super::*;
    use crate::model::{Algorithm, Digest};
    use crate::proto::entry::Body;

    const AGENT: &str = "builder/1";

    fn version(number: u32, wrapped: usize) -> KeyVersion {
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let public = PublicKey::from_raw(Algorithm::P256, rcgen::PublicKeyData::der_bytes(&pair)).unwrap();
        KeyVersion {
            number,
            key_id: KeyId::random(),
            kid: crate::formats::Jwk::thumbprint(&public).into(),
            public,
            storage: KeyStorage::Wrapped,
            wrapped: Some((vec![7; wrapped].into(), KeyId([1; 16]))),
            expires: UnixTime::from_seconds(2_000_000_000),
            wrapped_before: Vec::new(),
            told_by: None,
            rewrapped_by: None,
        }
    }

    fn terms() -> KeyTerms {
        KeyTerms {
            purpose: KeyPurpose::Jws,
            algorithm: KeyAlgorithm::P256,
            storage_asked: KeyStorage::Wrapped,
            accounting: KeyAccounting::Recorded,
            signatures_max: 0,
            ttl_seconds: 600,
        }
    }

    fn of(name: &str) -> KeyOf {
        KeyOf { agent: AgentId::parse(AGENT).unwrap(), epoch: 1, name: KeyName::parse(name).unwrap() }
    }

    /// A file with `count` keys, each of a version with so many bytes.
    fn filled(path: &Path, count: usize, bytes: usize, state: KeyState) {
        let mut store = Store::create(path).unwrap();
        let row = |number: usize, state| {
            let row = AgentKeyRow::new(&terms(), Some(0), &[version(1, bytes)]);
            Row::AgentKey(Box::new((of(&format!("k{number:03}")), state, row)))
        };
        let rows: Vec<Row> = (0..count).flat_map(|number| [row(number, KeyState::Active), row(number, state)]).collect();
        store.commit(0, &[], &[], &rows).unwrap();
    }

    #[test]
    fn a_page_is_full_at_so_many_bytes_and_the_pages_together_are_all_keys() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keyward.db");
        filled(&path, 20, 50_000, KeyState::Active);
        let reader = Reader::open(&path).unwrap();
        let (mut after, mut names, mut pages) = (String::new(), Vec::new(), 0);
        loop {
            let page = reader.agent_keys(&of("a").agent, 1, &after, 1000).unwrap();
            assert!(page.keys.len() <= 6, "{} keys", page.keys.len());
            pages += 1;
            names.extend(page.keys.iter().map(|key| key.of.name.to_string()));
            after = names.last().unwrap().clone();
            if !page.more {
                break;
            }
        }
        assert_eq!((names.len(), pages), (20, 4));
        assert!(names.is_sorted());
        let page = reader.agent_keys_of_class("builder", ("", 0, ""), 3).unwrap();
        assert_eq!((page.keys.len(), page.more), (3, true));
    }

    #[test]
    fn a_page_of_a_class_is_no_more_work_for_the_destroyed_keys_between() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keyward.db");
        filled(&path, 20, 10, KeyState::Destroyed);
        let reader = Reader::open(&path).unwrap();
        assert!(reader.agent_keys_of_class("builder", ("", 0, ""), 5).unwrap().keys.is_empty());
        // All three columns are sought, in an index of what is there, and nothing is sorted.
        let connection = reader.locked();
        let mut explained = connection.prepare(&format!("EXPLAIN QUERY PLAN {COLUMNS} {OF_CLASS}")).unwrap();
        let steps = explained.query_map(params!["builder0", "builder/1", 1, "k"], |row| row.get::<_, String>(3)).unwrap();
        let steps: Vec<_> = steps.map(Result::unwrap).collect();
        assert_eq!(steps, ["SEARCH agent_key USING INDEX agent_key_there ((agent,epoch,name)>(?,?,?) AND agent<?)"]);
    }

    #[test]
    fn the_pages_of_a_class_are_its_keys_and_no_others() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keyward.db");
        let mut store = Store::create(&path).unwrap();
        let agents = ["builder/1", "builder/2", "builder-2/1", "buildes/1", "a/1"];
        let key = |agent: &str, name: &str| {
            let of = KeyOf { agent: AgentId::parse(agent).unwrap(), ..of(name) };
            Row::AgentKey(Box::new((of, KeyState::Active, AgentKeyRow::new(&terms(), Some(0), &[version(1, 10)]))))
        };
        let rows: Vec<Row> = agents.iter().flat_map(|agent| ["a", "b"].map(|name| key(agent, name))).collect();
        store.commit(0, &[], &[], &rows).unwrap();
        let reader = Reader::open(&path).unwrap();
        let (mut after, mut found) = ((String::new(), 0, String::new()), Vec::new());
        loop {
            let page = reader.agent_keys_of_class("builder", (&after.0, after.1, &after.2), 1).unwrap();
            let Some(last) = page.keys.last() else { break };
            after = (last.of.agent.to_string(), last.of.epoch, last.of.name.to_string());
            found.push(format!("{} {}", after.0, after.2));
        }
        assert_eq!(found, ["builder/1 a", "builder/1 b", "builder/2 a", "builder/2 b"]);
    }

    #[test]
    fn what_was_forgotten_does_not_come_back_by_being_rewrapped() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keyward.db");
        let mut store = Store::create(&path).unwrap();
        let row = |versions: &[KeyVersion]| AgentKeyRow::new(&terms(), Some(0), versions);
        let object = KeyVersion { storage: KeyStorage::Resident, wrapped: None, ..version(2, 0) };
        let there = Row::AgentKey(Box::new((of("there"), KeyState::Active, row(&[version(1, 10), object.clone()]))));
        let gone = Row::AgentKey(Box::new((of("gone"), KeyState::Active, row(&[version(1, 10)]))));
        store.commit(0, &[], &[], &[there, gone, Row::KeyEnding(object.key_id, "destroyed")]).unwrap();
        store.commit(0, &[], &[], &[Row::AgentKeyForgotten(Box::new(of("gone")))]).unwrap();
        let again = |name, versions: &[KeyVersion]| Row::AgentKeyVersions(Box::new((of(name), row(versions))));
        let rewrapped = KeyVersion { rewrapped_by: Some(3), ..version(1, 20) };
        let rows = [again("gone", std::slice::from_ref(&rewrapped)), again("there", &[rewrapped, object])];
        store.commit(0, &[], &[], &rows).unwrap();
        let reader = Reader::open(&path).unwrap();
        let keys = reader.all_agent_keys(None, 10).unwrap();
        assert_eq!(keys.iter().map(|key| key.of.name.to_string()).collect::<Vec<_>>(), ["there"]);
        assert_eq!(keys[0].versions[0].rewrapped_by, Some(3));
        assert_eq!(reader.resident_key_counts(&of("there").agent).unwrap(), (0, 0), "an object that has ended");
    }

    #[test]
    fn a_destroyed_key_is_named_by_nobody_and_keeps_its_name_also_where_its_row_was_not_as_recorded() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keyward.db");
        let mut store = Store::create(&path).unwrap();
        let row = |created, versions: &[KeyVersion]| AgentKeyRow::new(&terms(), created, versions);
        let good = version(1, 10);
        let there = Row::AgentKey(Box::new((of("a"), KeyState::Active, row(None, std::slice::from_ref(&good)))));
        store.commit(0, &[], &[], &[there]).unwrap();
        let reader = Reader::open(&path).unwrap();
        let is_odd = |found: Result<_, StoreError>| matches!(found, Err(StoreError::NotAsRecorded(_)));
        assert!(is_odd(reader.agent_key(&of("a"))) && is_odd(reader.agent_key_by_kid(&good.kid)));
        let bare = reader.bare_agent_key(&of("a")).unwrap().unwrap();
        let destroyed = Row::AgentKey(Box::new((of("a"), KeyState::Destroyed, row(bare.created, &bare.versions))));
        store.commit(0, &[], &[], &[destroyed]).unwrap();
        assert!(reader.agent_key_by_kid(&good.kid).unwrap().is_none());
        assert_eq!(reader.bare_agent_key(&of("a")).unwrap().unwrap().state, KeyState::Destroyed);
    }

    #[test]
    fn the_keys_of_an_older_file_are_held_against_their_entries_too() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keyward.db");
        let resident = KeyVersion { storage: KeyStorage::Resident, wrapped: None, ..version(1, 0) };
        let next = KeyVersion { storage: KeyStorage::Resident, wrapped: None, ..version(2, 0) };
        let (agent, name) = (AGENT.to_owned(), "a".to_owned());
        let created = proto::AgentKeyCreated {
            agent: agent.clone(),
            epoch: 1,
            name: name.clone(),
            purpose: KeyPurpose::Jws.into(),
            algorithm: KeyAlgorithm::P256.into(),
            storage_asked: KeyStorage::Wrapped.into(),
            accounting: KeyAccounting::Recorded.into(),
            ttl_seconds: 600,
            version: Some(resident.entry()),
            ..Default::default()
        };
        let rotated = proto::AgentKeyRotated { agent, epoch: 1, name, version: Some(next.entry()) };
        let entries = [Body::AgentKeyCreated(created), Body::AgentKeyRotated(rotated)];
        let entries: Vec<Vec<u8>> = (0..)
            .zip(entries)
            .map(|(index, body)| proto::Entry { index, time_unix_micros: 1, body: Some(body) }.encode_to_vec())
            .collect();
        Store::create_of_schema(&path, 4).commit(0, &entries, &[], &[]).unwrap();
        let row = AgentKeyRow::new(&terms(), None, &[resident.clone(), next.clone()]);
        let db = Connection::open(&path).unwrap();
        let key = "INSERT INTO agent_key VALUES ('builder/1', 1, ?1, ?2, 0, ?3)";
        db.execute(key, params!["a", 1, row.encode_to_vec()]).unwrap();
        db.execute(key, params!["b", 3, AgentKeyRow::new(&terms(), None, &[]).encode_to_vec()]).unwrap();
        db.execute("INSERT INTO agent_kid VALUES (?1, 'builder/1', 1, 'a'), ('old', 'builder/1', 1, 'b')", [&*next.kid]).unwrap();
        let object = "INSERT INTO hsm_key VALUES (?1, 7, 2, 2, ?2, NULL)";
        db.execute(object, params![resident.key_id.0, "destroyed"]).unwrap();
        db.execute(object, params![next.key_id.0, "active"]).unwrap();
        drop(db);
        drop(Store::open(&path).unwrap());
        let reader = Reader::open(&path).unwrap();
        let found = reader.agent_key_by_kid(&next.kid).unwrap().unwrap();
        assert_eq!((found.created, found.versions[0].told_by, found.versions[1].told_by), (Some(0), Some(0), Some(1)));
        assert_eq!(reader.resident_key_counts(&found.of.agent).unwrap(), (1, 1), "what is in the token still");
        assert!(reader.agent_key_by_kid("old").unwrap().is_none());
        assert_eq!(Digest::of(&entries[0]), Digest::of(&reader.entry(0).unwrap().unwrap()), "no entry is touched");
        // One that no entry tells of is nobody's.
        assert!(matches!(reader.agent_key(&of("b")), Err(StoreError::NotAsRecorded(_))));
    }
}

//! The table of agents' keys: what a key's entries amount to, and the wrapped keys that no entry holds.

use std::sync::Arc;

use prost::Message as _;
use rusqlite::{Connection, OptionalExtension as _, params};

use crate::model::{AgentId, KeyId, KeyName, PublicKey, UnixTime};
use crate::proto::{self, KeyAccounting, KeyAlgorithm, KeyPurpose, KeyState, KeyStorage};

use super::super::store::{Reader, StoreError};
use super::{KeyOf, KeyTerms, KeyVersion};

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
}

#[derive(Clone, PartialEq, prost::Message)]
struct VersionRow {
    #[prost(message, optional, tag = "1")]
    version: Option<proto::AgentKeyVersion>,
    #[prost(bytes = "vec", tag = "2")]
    wrapped: Vec<u8>,
    #[prost(bytes = "vec", repeated, tag = "3")]
    wrapped_before: Vec<Vec<u8>>,
}

impl AgentKeyRow {
    pub(super) fn new(terms: &KeyTerms, versions: &[KeyVersion]) -> Self {
        let version = |version: &KeyVersion| VersionRow {
            version: Some(version.entry()),
            wrapped: version.wrapped.as_ref().map(|(wrapped, _)| wrapped.to_vec()).unwrap_or_default(),
            wrapped_before: version.wrapped_before.iter().map(|id| id.0.to_vec()).collect(),
        };
        Self {
            purpose: terms.purpose.into(),
            algorithm: terms.algorithm.into(),
            storage_asked: terms.storage_asked.into(),
            accounting: terms.accounting.into(),
            signatures_max: terms.signatures_max,
            ttl_seconds: terms.ttl_seconds,
            versions: versions.iter().map(version).collect(),
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
        })
    }
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
    transaction
        .prepare_cached(
            "INSERT INTO agent_key (agent, epoch, name, state, used, row) VALUES (?1, ?2, ?3, ?4, 0, ?5) \
             ON CONFLICT (agent, epoch, name) DO UPDATE SET state = excluded.state, row = excluded.row",
        )?
        .execute(params![of.agent.as_str(), of.epoch, of.name.as_str(), i32::from(state), row.encode_to_vec()])
        .map(drop)
}

pub(in crate::ledger) fn write_used(transaction: &Connection, of: &KeyOf, used: u64) -> Result<(), rusqlite::Error> {
    transaction
        .prepare_cached("UPDATE agent_key SET used = ?4 WHERE agent = ?1 AND epoch = ?2 AND name = ?3")?
        .execute(params![of.agent.as_str(), of.epoch, of.name.as_str(), used.cast_signed()])
        .map(drop)
}

const COLUMNS: &str = "SELECT agent, epoch, name, state, used, row FROM agent_key";

fn stored(row: &rusqlite::Row<'_>) -> Result<StoredKey, StoreError> {
    let damaged = || StoreError::Damaged("a row of agent_key".to_owned());
    let (agent, name): (String, String) = (row.get(0)?, row.get(2)?);
    let decoded = AgentKeyRow::decode(row.get_ref(5)?.as_blob().map_err(|_| damaged())?).map_err(|_| damaged())?;
    Ok(StoredKey {
        of: KeyOf {
            agent: AgentId::parse(&agent).map_err(|_| damaged())?,
            epoch: row.get(1)?,
            name: KeyName::parse(&name).map_err(|_| damaged())?,
        },
        terms: decoded.terms(),
        state: KeyState::try_from(row.get::<_, i32>(3)?).map_err(|_| damaged())?,
        used: row.get::<_, i64>(4)?.cast_unsigned(),
        versions: decoded.versions.into_iter().map(VersionRow::restore).collect::<Option<_>>().ok_or_else(damaged)?,
    })
}

impl Reader {
    /// One key.
    ///
    /// # Errors
    /// When the file cannot be read or a row breaks a rule.
    pub fn agent_key(&self, of: &KeyOf) -> Result<Option<StoredKey>, StoreError> {
        let connection = self.locked();
        let mut select = connection.prepare_cached(&format!("{COLUMNS} WHERE agent = ?1 AND epoch = ?2 AND name = ?3"))?;
        let found = select.query_row(params![of.agent.as_str(), of.epoch, of.name.as_str()], |row| Ok(stored(row)));
        found.optional()?.transpose()
    }

    /// The key that signatures name by `kid`.
    ///
    /// # Errors
    /// When the file cannot be read or a row breaks a rule.
    pub fn agent_key_by_kid(&self, kid: &str) -> Result<Option<StoredKey>, StoreError> {
        let connection = self.locked();
        let mut select = connection.prepare_cached(&format!(
            "{COLUMNS} WHERE (agent, epoch, name) = (SELECT agent, epoch, name FROM agent_kid WHERE kid = ?1)"
        ))?;
        select.query_row([kid], |row| Ok(stored(row))).optional()?.transpose()
    }

    /// At most `limit` keys of an agent's epoch, by name, after `after`.
    ///
    /// # Errors
    /// When the file cannot be read or a row breaks a rule.
    pub fn agent_keys(&self, agent: &AgentId, epoch: u32, after: &str, limit: u32) -> Result<Vec<StoredKey>, StoreError> {
        let connection = self.locked();
        let mut select = connection
            .prepare_cached(&format!("{COLUMNS} WHERE agent = ?1 AND epoch = ?2 AND name > ?3 ORDER BY name LIMIT ?4"))?;
        let mut rows = select.query(params![agent.as_str(), epoch, after, limit])?;
        let mut keys = Vec::new();
        while let Some(row) = rows.next()? {
            keys.push(stored(row)?);
        }
        Ok(keys)
    }

    /// At most `limit` keys that are not destroyed, of all agents of a class, in the order of agent, epoch and name, after `after`.
    ///
    /// # Errors
    /// When the file cannot be read or a row breaks a rule.
    pub fn agent_keys_of_class(&self, class: &str, after: (&str, u32, &str), limit: u32) -> Result<Vec<StoredKey>, StoreError> {
        let connection = self.locked();
        // '0' follows '/': all agents of the class and no others lie between.
        let mut select = connection.prepare_cached(&format!(
            "{COLUMNS} WHERE agent > ?1 || '/' AND agent < ?1 || '0' AND (agent, epoch, name) > (?2, ?3, ?4) AND state <> 3 \
             ORDER BY agent, epoch, name LIMIT ?5"
        ))?;
        let mut rows = select.query(params![class, after.0, after.1, after.2, limit])?;
        let mut keys = Vec::new();
        while let Some(row) = rows.next()? {
            keys.push(stored(row)?);
        }
        Ok(keys)
    }

    /// At most `limit` keys that are not destroyed, of all agents and epochs, after `after`.
    ///
    /// # Errors
    /// When the file cannot be read or a row breaks a rule.
    pub fn all_agent_keys(&self, after: Option<&KeyOf>, limit: u32) -> Result<Vec<StoredKey>, StoreError> {
        let connection = self.locked();
        let mut select = connection.prepare_cached(&format!(
            "{COLUMNS} WHERE (agent, epoch, name) > (?1, ?2, ?3) AND state <> 3 ORDER BY agent, epoch, name LIMIT ?4"
        ))?;
        let (agent, epoch, name) = after.map_or(("", 0, ""), |of| (of.agent.as_str(), of.epoch, of.name.as_str()));
        let mut rows = select.query(params![agent, epoch, name, limit])?;
        let mut keys = Vec::new();
        while let Some(row) = rows.next()? {
            keys.push(stored(row)?);
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

    /// Resident keys that were destroyed, and whose objects may be in the token still.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn keys_being_destroyed(&self) -> Result<Vec<KeyId>, StoreError> {
        let connection = self.locked();
        let mut select = connection.prepare_cached("SELECT id FROM hsm_key WHERE state = 'destroying'")?;
        let ids = select.query_map([], |row| row.get::<_, Vec<u8>>(0))?;
        let mut found = Vec::new();
        for id in ids {
            found.push(KeyId::from_slice(&id?).ok_or_else(|| StoreError::Damaged("a row of hsm_key".to_owned()))?);
        }
        Ok(found)
    }
}

const _: () = assert!(KeyState::Destroyed as i32 == 3, "the queries above say so");

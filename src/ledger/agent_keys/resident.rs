//! Agents' keys that are objects in the token: few, and each is accounted for from the entry that puts it to use until the object is gone.
//! And what is over: epochs in which nothing is signed any more.

use std::sync::Arc;

use rusqlite::{Connection, OptionalExtension as _, params};

use crate::model::{AgentId, KeyId, KeyName, Refusal, UnixTime};
use crate::proto::{self, KeyOver, KeyState, KeyStorage, Purpose, entry::Body};

use super::super::store::{Reader, Row, StoreError};
use super::super::views::last_not_after;
use super::super::{COMMIT_DEADLINE, Command, Ledger, answered};
use super::rows::{COLUMNS, stored};
use super::{AgentKey, KeyOf, StoredKey};

/// A key that is an object in the token.
#[derive(Debug, Clone)]
pub struct ResidentKey {
    /// CKA_ID.
    pub id: KeyId,
    /// Which version's it is, of this key.
    pub of: KeyOf,
    /// It signs until then.
    pub expires: UnixTime,
    /// By a row it has ended, and the object is being destroyed.
    pub ending: bool,
}

/// The version that an entry puts to use has an object, if it is resident.
pub(super) fn puts_to_use(
    transaction: &Connection,
    of: &KeyOf,
    newest: Option<&proto::AgentKeyVersion>,
) -> Result<(), rusqlite::Error> {
    let Some(newest) = newest.filter(|newest| newest.storage() == KeyStorage::Resident) else { return Ok(()) };
    transaction
        .prepare_cached("INSERT OR IGNORE INTO resident_key (key_id, agent, epoch, name, expires) VALUES (?1, ?2, ?3, ?4, ?5)")?
        .execute(params![newest.key_id, of.agent.as_str(), of.epoch, of.name.as_str(), newest.expires_unix_seconds.cast_signed()])
        .map(drop)
}

/// An object is being destroyed, or has been: then nothing is kept of it.
pub(in crate::ledger) fn ending(transaction: &Connection, id: &KeyId, state: &str) -> Result<(), rusqlite::Error> {
    if state != "destroyed" {
        let mut update = transaction.prepare_cached("UPDATE hsm_key SET state = ?2 WHERE id = ?1")?;
        return update.execute(params![id.0, state]).map(drop);
    }
    transaction.prepare_cached("DELETE FROM resident_key WHERE key_id = ?1")?.execute([id.0])?;
    given_up(transaction, &id.0)
}

/// Of an agent's key that has no object any more, and of one that never was put to use, nothing is kept.
pub(in crate::ledger) fn given_up(transaction: &Connection, id: &[u8]) -> Result<(), rusqlite::Error> {
    let mut delete = transaction.prepare_cached("DELETE FROM hsm_key WHERE id = ?1 AND purpose = ?2")?;
    delete.execute(params![id, Purpose::Agent as i32]).map(drop)
}

fn damaged() -> StoreError {
    StoreError::Damaged("a row of resident_key".to_owned())
}

fn key_of(agent: &str, epoch: u32, name: &str) -> Result<KeyOf, StoreError> {
    let agent = AgentId::parse(agent).map_err(|_| damaged())?;
    Ok(KeyOf { agent, epoch, name: KeyName::parse(name).map_err(|_| damaged())? })
}

impl Reader {
    /// How many objects an agent's keys of all epochs have in the token, and those of all agents.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn resident_key_counts(&self, agent: &AgentId) -> Result<(usize, usize), StoreError> {
        let connection = self.locked();
        let mut select = connection
            .prepare_cached("SELECT (SELECT count(*) FROM resident_key WHERE agent = ?1), (SELECT count(*) FROM resident_key)")?;
        let number = |count: i64| usize::try_from(count).unwrap_or(usize::MAX);
        Ok(select.query_row([agent.as_str()], |row| Ok((number(row.get(0)?), number(row.get(1)?))))?)
    }

    /// Whether a key is an object in the token, or is being destroyed there.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn has_object(&self, id: KeyId) -> Result<bool, StoreError> {
        let connection = self.locked();
        Ok(connection.prepare_cached("SELECT 1 FROM resident_key WHERE key_id = ?1")?.exists([id.0])?)
    }

    /// Whose object a key in the token is, or was until it ended, as a row has it.
    ///
    /// # Errors
    /// When the file cannot be read or the row breaks a rule.
    pub fn owner_of_object(&self, id: KeyId) -> Result<Option<KeyOf>, StoreError> {
        let connection = self.locked();
        let mut select = connection.prepare_cached("SELECT agent, epoch, name FROM resident_key WHERE key_id = ?1")?;
        let found = select.query_row([id.0], |row| Ok((row.get::<_, String>(0)?, row.get(1)?, row.get::<_, String>(2)?)));
        found.optional()?.map(|(agent, epoch, name)| key_of(&agent, epoch, &name)).transpose()
    }

    /// At most `limit` keys that are objects in the token, by id, after `after`.
    ///
    /// # Errors
    /// When the file cannot be read or a row breaks a rule.
    pub fn resident_keys(&self, after: Option<KeyId>, limit: u32) -> Result<Vec<ResidentKey>, StoreError> {
        let connection = self.locked();
        let mut select = connection.prepare_cached(
            "SELECT key_id, agent, epoch, name, expires, EXISTS (SELECT 1 FROM hsm_key WHERE id = key_id AND state = 'destroying') \
             FROM resident_key WHERE key_id > ?1 ORDER BY key_id LIMIT ?2",
        )?;
        let mut rows = select.query(params![after.map_or_else(Vec::new, |id| id.0.to_vec()), limit])?;
        let mut keys = Vec::new();
        while let Some(row) = rows.next()? {
            let (id, agent, name): (Vec<u8>, String, String) = (row.get(0)?, row.get(1)?, row.get(3)?);
            keys.push(ResidentKey {
                id: KeyId::from_slice(&id).ok_or_else(damaged)?,
                of: key_of(&agent, row.get(2)?, &name)?,
                expires: UnixTime::from_seconds(row.get::<_, i64>(4)?.cast_unsigned()),
                ending: row.get(5)?,
            });
        }
        Ok(keys)
    }

    /// Resident keys that were destroyed, and whose objects may be in the token still.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn keys_being_destroyed(&self) -> Result<Vec<KeyId>, StoreError> {
        self.key_ids("SELECT id FROM hsm_key WHERE state = 'destroying' ORDER BY id LIMIT 1000")
    }

    /// Resident keys that were intended and neither put to use nor given up, at most 1,000 of them.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn keys_intended(&self) -> Result<Vec<KeyId>, StoreError> {
        self.key_ids("SELECT id FROM hsm_key WHERE state = 'intended' AND purpose = 7 ORDER BY id LIMIT 1000")
    }

    fn key_ids(&self, select: &str) -> Result<Vec<KeyId>, StoreError> {
        let connection = self.locked();
        let mut select = connection.prepare_cached(select)?;
        let ids = select.query_map([], |row| row.get::<_, Vec<u8>>(0))?;
        let mut found = Vec::new();
        for id in ids {
            found.push(KeyId::from_slice(&id?).ok_or_else(|| StoreError::Damaged("a row of hsm_key".to_owned()))?);
        }
        Ok(found)
    }

    /// At most `limit` agents and epochs with keys, in order, after `after`. As many looks, however many keys there are.
    ///
    /// # Errors
    /// When the file cannot be read or a row breaks a rule.
    pub fn key_epochs(&self, after: Option<&(AgentId, u32)>, limit: usize) -> Result<Vec<(AgentId, u32)>, StoreError> {
        let connection = self.locked();
        let mut next = connection
            .prepare_cached("SELECT agent, epoch FROM agent_key WHERE (agent, epoch) > (?1, ?2) ORDER BY agent, epoch LIMIT 1")?;
        let mut found = Vec::<(AgentId, u32)>::new();
        while found.len() < limit {
            let (agent, epoch) = found.last().or(after).map_or(("", 0), |(agent, epoch)| (agent.as_str(), *epoch));
            let mut rows = next.query(params![agent, epoch])?;
            let Some(row) = rows.next()? else { break };
            let agent: String = row.get(0)?;
            let agent = AgentId::parse(&agent).map_err(|_| StoreError::Damaged("a row of agent_key".to_owned()))?;
            found.push((agent, row.get(1)?));
        }
        Ok(found)
    }

    /// At most `limit` keys of an agent's epoch without an object in the token.
    ///
    /// # Errors
    /// When the file cannot be read or a row breaks a rule.
    pub fn keys_without_object(&self, agent: &AgentId, epoch: u32, limit: u32) -> Result<Vec<StoredKey>, StoreError> {
        let connection = self.locked();
        let mut select = connection.prepare_cached(&format!(
            "{COLUMNS} AS key WHERE agent = ?1 AND epoch = ?2 AND NOT EXISTS (SELECT 1 FROM resident_key \
             WHERE resident_key.agent = ?1 AND resident_key.epoch = ?2 AND resident_key.name = key.name) ORDER BY name LIMIT ?3"
        ))?;
        let mut rows = select.query(params![agent.as_str(), epoch, limit])?;
        let mut keys = Vec::new();
        while let Some(row) = rows.next()? {
            keys.extend(stored(row));
        }
        Ok(keys)
    }
}

impl Ledger {
    /// Of these agents and epochs, whether nothing is signed in them any more, and why: a later epoch has begun; or the agent's last
    /// certificate has ended and the time to come back by it, `grace_seconds` ago.
    #[must_use]
    pub fn over<'a>(
        &self,
        all: impl Iterator<Item = (&'a AgentId, u32)>,
        now: UnixTime,
        grace_seconds: u64,
    ) -> Vec<Option<KeyOver>> {
        let gate = self.gate();
        let over = |agent: &AgentId, epoch: u32| {
            let found = gate.book.named(agent).ok()?.1;
            if epoch < found.epoch {
                return Some(KeyOver::Epoch);
            }
            let token = found.token.as_ref().is_some_and(|token| token.spent_for.is_none() && token.expires > now);
            let back = last_not_after(found)?.plus_seconds(u64::from(found.rejoin_seconds).saturating_add(grace_seconds));
            (epoch == found.epoch && !token && back < now).then_some(KeyOver::Agent)
        };
        all.map(|(agent, epoch)| over(agent, epoch)).collect()
    }

    /// The object of a key's newest version is to be destroyed: durable when this answers. A crash after it leaves the object to the next
    /// look.
    ///
    /// # Errors
    /// `LEDGER_UNAVAILABLE`.
    pub async fn end_key_object(&self, key: &AgentKey, id: KeyId, cause: KeyOver) -> Result<u64, Refusal> {
        let KeyOf { agent, epoch, name } = key.of();
        let body = proto::AgentKeyObjectEnded {
            agent: agent.to_string(),
            epoch: *epoch,
            name: name.to_string(),
            key_id: id.0.to_vec(),
            cause: cause.into(),
        };
        let rows = vec![Row::KeyEnding(id, "destroying")];
        self.key_entry(Body::AgentKeyObjectEnded(body), rows, None, Box::new(drop)).await
    }

    /// Removes what is kept of keys of one epoch beside the entries. Those of them that are `in_use` are destroyed when it is durable, for
    /// whoever holds them: a clock that is set back brings none of them back.
    ///
    /// # Errors
    /// `LEDGER_UNAVAILABLE`.
    pub async fn forget_keys(
        &self,
        agent: &AgentId,
        epoch: u32,
        keys: &[StoredKey],
        cause: KeyOver,
        in_use: Vec<Arc<AgentKey>>,
    ) -> Result<u64, Refusal> {
        let body = proto::AgentKeysForgotten {
            agent: agent.to_string(),
            epoch,
            names: keys.iter().map(|key| key.of.name.to_string()).collect(),
            cause: cause.into(),
        };
        let rows = keys.iter().flat_map(|key| {
            let kids = key.versions.iter().map(|version| version.kid.clone()).collect();
            [Row::AgentKidsGone(Box::new((key.of.clone(), kids))), Row::AgentKeyForgotten(Box::new(key.of.clone()))]
        });
        let then = Box::new(move |_| in_use.iter().for_each(|key| key.take_state(KeyState::Destroyed)));
        self.key_entry(Body::AgentKeysForgotten(body), rows.collect(), None, then).await
    }

    /// The object of a destroyed resident key is gone from the token.
    ///
    /// # Errors
    /// `LEDGER_UNAVAILABLE`; the object is looked for again.
    pub async fn key_object_destroyed(&self, id: KeyId) -> Result<(), Refusal> {
        let receiver = self.ask(|answer| Command::Keep { row: Row::KeyEnding(id, "destroyed"), answer })?;
        answered(receiver, COMMIT_DEADLINE).await
    }
}

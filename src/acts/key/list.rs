//! What there is of keys, for their owners, for operators, and for those who verify.

use std::collections::BTreeSet;
use std::sync::Arc;

use crate::authn::Connection;
use crate::formats::{Jwk, jwks};
use crate::ledger::{KeyPage, Reader, StoreError, StoredKey};
use crate::model::{AgentId, Reason, Refusal, UnixTime};
use crate::proto::KeyState;

use super::{Acts, PAGE_COSTS, profile_of, stored};

/// Keys of one page, at most.
const PAGE_MAX: u32 = 1000;

/// A key, for people.
#[derive(Debug, Clone)]
pub struct KeyShown {
    /// What the row says.
    pub key: StoredKey,
    /// Its agent is in quarantine, or past its epoch.
    pub denied: bool,
}

/// Whose keys.
#[derive(Debug, Clone)]
pub enum JwksOf {
    /// One agent's.
    Agent(AgentId),
    /// Those of all agents of a class.
    Class(String),
}

impl Acts {
    /// A key of the caller's own.
    ///
    /// # Errors
    /// `KEY_NOT_FOUND`; as the agent's standing; `RATE_LIMITED`.
    pub async fn show_key(&self, source: &Arc<Connection>, name: &str) -> Result<KeyShown, Refusal> {
        let found = async {
            let caller = source.agent(&self.ledger)?;
            self.keys.rates.look(caller.agent(), 1, self.ledger.clock().reckoned().seconds())?;
            let loaded = self.load_key(&Self::own_key(caller, name)?).await?;
            Ok(self.shown(stored(&loaded.key)))
        };
        let found = found.await;
        self.refused_key_call("GetPublicKey", source, found).await
    }

    /// A page of the caller's own keys, and whether there may be more. It may name itself.
    ///
    /// # Errors
    /// `KEY_NOT_FOUND` for another agent; as the agent's standing; `RATE_LIMITED`.
    pub async fn list_own_keys(
        &self,
        source: &Arc<Connection>,
        agent: &str,
        after: String,
        limit: u32,
    ) -> Result<(Vec<KeyShown>, bool), Refusal> {
        let caller = self.may_look("ListKeys", source, agent, PAGE_COSTS).await?;
        self.page(caller.agent().clone(), caller.epoch(), after, limit).await
    }

    /// The same of any agent's, for an operator; epoch 0 is the current one.
    ///
    /// # Errors
    /// `AGENT_UNKNOWN`.
    pub async fn list_keys(
        &self,
        agent: AgentId,
        epoch: u32,
        after: String,
        limit: u32,
    ) -> Result<(Vec<KeyShown>, bool), Refusal> {
        let epoch = self.epoch_or_current(&agent, epoch)?;
        self.page(agent, epoch, after, limit).await
    }

    async fn page(&self, agent: AgentId, epoch: u32, after: String, limit: u32) -> Result<(Vec<KeyShown>, bool), Refusal> {
        let page = self.read(move |reader| reader.agent_keys(&agent, epoch, &after, limit.min(PAGE_MAX))).await?;
        Ok((page.keys.into_iter().map(|key| self.shown(key)).collect(), page.more))
    }

    /// As [`Acts::jwks`], for an agent.
    ///
    /// # Errors
    /// As the caller's standing; `RATE_LIMITED`; `MALFORMED_REQUEST`.
    pub async fn jwks_for_agent(
        &self,
        source: &Arc<Connection>,
        of: JwksOf,
        after: &str,
    ) -> Result<(String, Option<String>), Refusal> {
        self.may_look("GetJwks", source, "", PAGE_COSTS).await?;
        self.jwks(of, after).await
    }

    /// The keys by which messages of an agent, or of a class, verify now, and where the next page starts (for this daemon alone to read, as
    /// long as it runs: it names a key). Nothing is kept: an agent that is denied has no keys from that moment on.
    ///
    /// # Errors
    /// `MALFORMED_REQUEST`.
    pub async fn jwks(&self, of: JwksOf, after: &str) -> Result<(String, Option<String>), Refusal> {
        let now = self.ledger.clock().reckoned();
        let after = self.keys.places.open(after)?;
        let (KeyPage { keys, more }, odd) = match of {
            JwksOf::Agent(agent) => match self.ledger.agent(&agent) {
                Ok(found) => self.held(move |reader| reader.agent_keys(&agent, found.epoch, &after.2, PAGE_MAX)).await?,
                // Nobody's keys are none.
                Err(_) => Default::default(),
            },
            JwksOf::Class(class) => {
                let page = move |reader: &Reader| reader.agent_keys_of_class(&class, (&after.0, after.1, &after.2), PAGE_MAX);
                self.held(page).await?
            }
        };
        for _ in &odd {
            self.ledger.refused_stranger(Reason::KeyNotAsRecorded, None);
        }
        let next = keys.last().filter(|_| more).map(|last| self.keys.places.seal(&last.of)).transpose()?;
        let admitted = self.ledger.admitted(keys.iter().map(|key| (&key.of.agent, key.of.epoch)));
        let good = keys
            .iter()
            .zip(admitted)
            .enumerate()
            .filter(|(at, (key, admitted))| *admitted && key.state != KeyState::Destroyed && !odd.contains(at));
        Ok((jwks(good.flat_map(|(_, (key, _))| published(key, now))), next))
    }

    pub(super) fn shown(&self, key: StoredKey) -> KeyShown {
        let denied = self.ledger.admits(&key.of.agent, key.of.epoch).is_err();
        KeyShown { key, denied }
    }

    pub(super) fn epoch_or_current(&self, agent: &AgentId, epoch: u32) -> Result<u32, Refusal> {
        let current = self.ledger.agent(agent)?.epoch;
        Ok(if epoch == 0 { current } else { epoch })
    }

    /// A page of keys, and which of them, by their place, are not as recorded.
    async fn held(
        &self,
        page: impl FnOnce(&Reader) -> Result<KeyPage, StoreError> + Send + 'static,
    ) -> Result<(KeyPage, BTreeSet<usize>), Refusal> {
        let ledger = self.ledger.clone();
        let held = move |reader: &Reader| {
            let page = page(reader)?;
            let odd = ledger.odd_keys(&page.keys)?;
            Ok((page, odd))
        };
        self.read(held).await
    }

    pub(super) async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Reader) -> Result<T, StoreError> + Send + 'static,
    ) -> Result<T, Refusal> {
        let ledger = self.ledger.clone();
        let read = tokio::task::spawn_blocking(move || read(ledger.reader())).await;
        read.map_err(Refusal::internal)?.map_err(|error| self.ledger.unread(error))
    }
}

/// The versions of a key that have not expired, where its purpose is one that is published.
fn published(key: &StoredKey, now: UnixTime) -> Vec<Jwk> {
    let Some(profile) = profile_of(key.terms.purpose) else { return Vec::new() };
    let good = key.versions.iter().filter(|version| version.expires > now);
    good.filter_map(|version| Jwk::published(profile, &version.public)).collect()
}

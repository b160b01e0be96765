//! Agents' signing keys as the book knows them.
//!
//! A key's row is durable with the entry that tells of it; in memory are those in use. Whether a key may sign now is decided from memory
//! under the gate, as an agent's standing is, and looked at again when a signature is released. What a row says is believed only as far as
//! the entries that it names say the same (`held.rs`).

pub(super) mod commands;
mod counted;
pub(super) mod held;
pub(super) mod resident;
mod rewrap;
pub(super) mod rows;

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};

use arc_swap::{ArcSwap, Guard};
use tokio::sync::oneshot;

use crate::model::{AgentId, Algorithm, Digest, KeyId, KeyName, PublicKey, Reason, Refusal, UnixTime};
use crate::proto::entry::Body;
use crate::proto::{self, KeyAccounting, KeyAlgorithm, KeyPurpose, KeyState, KeyStorage};

use super::intent::Intent;
use super::sequencer::Command;
use super::store::Row;
use super::{COMMIT_DEADLINE, Ledger, answered, draining, unavailable};
use commands::KeyCommand;
pub use counted::Reserved;
pub use resident::ResidentKey;
pub use rewrap::Rewrapped;
use rows::AgentKeyRow;
pub use rows::{KeyPage, StoredKey};

/// Versions of one key that have not expired, at most.
pub const VERSIONS_MAX: usize = 16;

/// Which key: of one agent and epoch, by the agent's own name for it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyOf {
    /// Whose.
    pub agent: AgentId,
    /// Of which epoch; denied with it.
    pub epoch: u32,
    /// What it is called.
    pub name: KeyName,
}

/// What a key was made for, and never changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct KeyTerms {
    /// The one thing that it signs.
    pub purpose: KeyPurpose,
    /// What it signs with.
    pub algorithm: KeyAlgorithm,
    /// Where it was wished to live.
    pub storage_asked: KeyStorage,
    /// How its signatures are accounted for.
    pub accounting: KeyAccounting,
    /// Signatures it may make; 0: no budget.
    pub signatures_max: u64,
    /// Life of a version.
    pub ttl_seconds: u32,
}

/// One generation of a key.
#[derive(Debug, Clone)]
pub struct KeyVersion {
    /// From 1.
    pub number: u32,
    /// CKA_ID.
    pub key_id: KeyId,
    /// Pinned.
    pub public: PublicKey,
    /// RFC 7638 thumbprint.
    pub kid: Arc<str>,
    /// Where it lives.
    pub storage: KeyStorage,
    /// The wrapped key, and under which key it is.
    pub wrapped: Option<(Arc<[u8]>, KeyId)>,
    /// Which wrapping keys it was under before, the newest last: who has one of those and an old copy of its row has the key.
    pub wrapped_before: Vec<KeyId>,
    /// It signs, and verifies, until then.
    pub expires: UnixTime,
    /// The entry that tells of it, once there is one.
    pub told_by: Option<u64>,
    /// The last of those that changed how it is wrapped.
    pub rewrapped_by: Option<u64>,
}

impl KeyVersion {
    /// As entries tell of it: of a wrapped key the digest alone.
    #[must_use]
    pub fn entry(&self) -> proto::AgentKeyVersion {
        let (wrapped_sha256, wrapping_key_id) = match &self.wrapped {
            Some((wrapped, wrapping)) => (Digest::of(wrapped).0.to_vec(), wrapping.0.to_vec()),
            None => (Vec::new(), Vec::new()),
        };
        proto::AgentKeyVersion {
            number: self.number,
            key_id: self.key_id.0.to_vec(),
            spki: self.public.spki().to_vec(),
            kid: self.kid.to_string(),
            storage: self.storage.into(),
            wrapped_sha256,
            wrapping_key_id,
            expires_unix_seconds: self.expires.seconds(),
        }
    }
}

/// A key in use. There is one of these for a key at a time, so that what is decided about it holds for all who use it.
pub struct AgentKey {
    of: KeyOf,
    slot: u32,
    terms: KeyTerms,
    state: AtomicU8,
    /// Signatures that count against the budget. Changed by the sequencer alone.
    used: AtomicU64,
    /// The newest last.
    versions: ArcSwap<Vec<KeyVersion>>,
    /// The entry that made it, once there is one.
    created: Option<u64>,
    blocks: counted::Blocks,
}

impl std::fmt::Debug for AgentKey {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "AgentKey({} {} {})", self.of.agent, self.of.epoch, self.of.name)
    }
}

impl AgentKey {
    fn new(slot: u32, stored: StoredKey) -> Self {
        Self {
            of: stored.of,
            slot,
            terms: stored.terms,
            state: AtomicU8::new(state_number(stored.state)),
            used: AtomicU64::new(stored.used),
            versions: ArcSwap::from_pointee(stored.versions),
            created: stored.created,
            blocks: counted::Blocks::default(),
        }
    }

    /// Which.
    #[must_use]
    pub fn of(&self) -> &KeyOf {
        &self.of
    }

    /// What it was made for.
    #[must_use]
    pub fn terms(&self) -> &KeyTerms {
        &self.terms
    }

    /// Where it stands.
    #[must_use]
    pub fn state(&self) -> KeyState {
        KeyState::try_from(i32::from(self.state.load(Ordering::Acquire))).unwrap_or(KeyState::Destroyed)
    }

    /// Signatures that count against the budget.
    #[must_use]
    pub fn used(&self) -> u64 {
        self.used.load(Ordering::Acquire)
    }

    /// Its versions, the newest last; never none.
    #[must_use]
    pub fn versions(&self) -> Guard<Arc<Vec<KeyVersion>>> {
        self.versions.load()
    }

    /// The entry that made it, once there is one.
    #[must_use]
    pub fn created(&self) -> Option<u64> {
        self.created
    }

    /// The version that signs.
    ///
    /// # Errors
    /// `KEY_DESTROYED`.
    pub fn newest(&self) -> Result<KeyVersion, Refusal> {
        self.versions.load().last().cloned().ok_or_else(destroyed)
    }

    /// Whether it may still sign, as far as the key itself is concerned.
    pub(super) fn admits(&self) -> Result<(), Refusal> {
        match self.state() {
            KeyState::Active => Ok(()),
            KeyState::Disabled => Err(Refusal::new(Reason::KeyDisabled, "this key signs no more; use another")),
            KeyState::Destroyed | KeyState::Unspecified => Err(destroyed()),
        }
    }

    fn admits_at(&self, now: UnixTime) -> Result<(), Refusal> {
        self.admits()?;
        match self.versions.load().last() {
            Some(newest) if newest.expires > now => Ok(()),
            _ => Err(Refusal::new(Reason::KeyExpired, "this key has expired; rotate it, better before it expires")),
        }
    }

    fn has_budget(&self, more: u64) -> Result<(), Refusal> {
        if self.terms.signatures_max > 0 && more > self.terms.signatures_max.saturating_sub(self.used()) {
            return Err(Refusal::new(Reason::KeyBudgetSpent, "this key has made as many signatures as it may; make a new one"));
        }
        Ok(())
    }

    fn row(&self, state: KeyState, versions: &[KeyVersion]) -> Row {
        Row::AgentKey(Box::new((self.of.clone(), state, AgentKeyRow::new(&self.terms, self.created, versions))))
    }

    /// The row that is there, with these versions.
    fn versions_row(&self, versions: &[KeyVersion]) -> Row {
        Row::AgentKeyVersions(Box::new((self.of.clone(), AgentKeyRow::new(&self.terms, self.created, versions))))
    }

    fn disabling(&self, by: Option<proto::Operator>) -> (KeyState, Body, Vec<Row>) {
        let (agent, epoch, name) = (self.of.agent.to_string(), self.of.epoch, self.of.name.to_string());
        let body = Body::AgentKeyDisabled(proto::AgentKeyDisabled { by, agent, epoch, name });
        (KeyState::Disabled, body, vec![self.row(KeyState::Disabled, &self.versions())])
    }

    fn destroying(&self, by: Option<proto::Operator>) -> (KeyState, Body, Vec<Row>) {
        let (agent, epoch, name) = (self.of.agent.to_string(), self.of.epoch, self.of.name.to_string());
        let body = Body::AgentKeyDestroyed(proto::AgentKeyDestroyed { by, agent, epoch, name });
        let versions = self.versions();
        let resident = versions.iter().filter(|version| version.storage == KeyStorage::Resident);
        let mut rows: Vec<Row> = resident.map(|version| Row::KeyEnding(version.key_id, "destroying")).collect();
        rows.push(self.row(KeyState::Destroyed, &[]));
        rows.push(self.kids_gone(versions.iter()));
        (KeyState::Destroyed, body, rows)
    }

    /// Nothing verifies by these versions any more.
    fn kids_gone<'a>(&self, versions: impl Iterator<Item = &'a KeyVersion>) -> Row {
        Row::AgentKidsGone(Box::new((self.of.clone(), versions.map(|version| version.kid.clone()).collect())))
    }

    fn take_state(&self, state: KeyState) {
        self.state.store(state_number(state), Ordering::Release);
    }
}

fn state_number(state: KeyState) -> u8 {
    u8::try_from(i32::from(state)).unwrap_or_default()
}

fn destroyed() -> Refusal {
    Refusal::new(Reason::KeyDestroyed, "this key is gone; make a new one under another name")
}

/// None of that name, or none of the caller's: never told apart.
#[must_use]
pub fn key_not_found() -> Refusal {
    Refusal::new(Reason::KeyNotFound, "there is no key of that name; list them")
}

/// Runs when an entry is durable.
pub type Then = Box<dyn FnOnce(u64) + Send>;

/// How a key ends.
#[derive(Debug, Clone)]
pub enum Ends {
    /// Signs no more.
    Disabled,
    /// Signs no more, verifies no more.
    Destroyed,
}

impl Ledger {
    /// A key by its name, from its row. Blocking. The caller sees to it that there is one of it at a time.
    ///
    /// # Errors
    /// `KEY_NOT_AS_RECORDED`, `INTERNAL` when the row cannot be read; `AGENT_UNKNOWN`.
    pub fn load_key(&self, of: &KeyOf) -> Result<Option<AgentKey>, Refusal> {
        let slot = self.gate().book.named(&of.agent)?.0;
        let found = self.0.reader.agent_key(of).map_err(|error| self.unread(error))?;
        Ok(found.map(|found| AgentKey::new(slot, found)))
    }

    /// Whether a key may sign now: its agent's standing and epoch, its own state, its expiry. Memory alone, one short lock.
    ///
    /// # Errors
    /// `AGENT_QUARANTINED`, `EPOCH_STALE`, `KEY_DISABLED`, `KEY_DESTROYED`, `KEY_EXPIRED`.
    pub fn admits_key(&self, key: &AgentKey) -> Result<(), Refusal> {
        let now = self.0.clock.reckoned();
        self.gate().book.agent(key.slot).admits(key.of.epoch)?;
        key.admits_at(now)
    }

    /// Whether a key may have a new version now: as [`Ledger::admits_key`], but for its expiry.
    ///
    /// # Errors
    /// `AGENT_QUARANTINED`, `EPOCH_STALE`, `KEY_DISABLED`, `KEY_DESTROYED`.
    pub fn may_rotate(&self, key: &AgentKey) -> Result<(), Refusal> {
        self.gate().book.agent(key.slot).admits(key.of.epoch)?;
        key.admits()
    }

    /// Of these agents and epochs, whether each is admitted: one look for all.
    #[must_use]
    pub fn admitted<'a>(&self, all: impl Iterator<Item = (&'a AgentId, u32)>) -> Vec<bool> {
        let gate = self.gate();
        all.map(|(agent, epoch)| gate.book.named(agent).is_ok_and(|(_, found)| found.admits(epoch).is_ok())).collect()
    }

    /// Makes the wish to sign durable, if agent, key and budget admit it: all of `digests` in one entry. From the answer on the intent
    /// has to end.
    ///
    /// # Errors
    /// As [`Ledger::admits_key`]; `KEY_BUDGET_SPENT`, `OVERLOADED`, `LEDGER_UNAVAILABLE`.
    pub async fn intend_signatures(
        &self,
        key: &Arc<AgentKey>,
        version: &KeyVersion,
        digests: Vec<Vec<u8>>,
    ) -> Result<Intent, Refusal> {
        let (key, key_id) = (Arc::clone(key), version.key_id);
        self.queue_intent(|answer| Command::Key(Box::new(KeyCommand::Sign { key, key_id, digests, answer }))).await
    }

    /// A new key, if its agent is admitted: `then` runs with the key when it is durable.
    ///
    /// # Errors
    /// As the agent's standing; `LEDGER_UNAVAILABLE`.
    pub async fn create_key(
        &self,
        of: KeyOf,
        terms: KeyTerms,
        version: KeyVersion,
        keep: impl Send + 'static,
    ) -> Result<(u64, AgentKey), Refusal> {
        let slot = self.gate().book.named(&of.agent)?.0;
        let body = proto::AgentKeyCreated {
            agent: of.agent.to_string(),
            epoch: of.epoch,
            name: of.name.to_string(),
            purpose: terms.purpose.into(),
            algorithm: terms.algorithm.into(),
            storage_asked: terms.storage_asked.into(),
            accounting: terms.accounting.into(),
            signatures_max: terms.signatures_max,
            ttl_seconds: terms.ttl_seconds,
            version: Some(version.entry()),
        };
        let versions = vec![version.clone()];
        let key = AgentKey::new(slot, StoredKey { of, terms, state: KeyState::Active, used: 0, versions, created: None });
        let mut rows = vec![key.row(KeyState::Active, std::slice::from_ref(&version))];
        rows.extend(settles(&version));
        let admitted = Some((slot, key.of.epoch));
        let then = Box::new(move |_| drop(keep));
        let index = self.key_entry(Body::AgentKeyCreated(body), rows, admitted, then).await?;
        Ok((index, key))
    }

    /// A new version signs from its entry on. Versions that have expired at `now` are forgotten.
    ///
    /// # Errors
    /// As [`Ledger::create_key`], and as the key itself is admitted.
    pub async fn rotate_key(
        &self,
        key: &Arc<AgentKey>,
        version: KeyVersion,
        now: UnixTime,
        keep: impl Send + 'static,
    ) -> Result<u64, Refusal> {
        // No block is reserved for a version that signs no more.
        let reserving = Arc::clone(&key.blocks.reserving).lock_owned().await;
        key.admits()?;
        let body = proto::AgentKeyRotated {
            agent: key.of.agent.to_string(),
            epoch: key.of.epoch,
            name: key.of.name.to_string(),
            version: Some(version.entry()),
        };
        let mut versions: Vec<KeyVersion> = key.versions().iter().filter(|version| version.expires > now).cloned().collect();
        let settled = settles(&version);
        versions.push(version);
        let mut rows = vec![key.row(KeyState::Active, &versions)];
        rows.extend(settled);
        rows.push(key.kids_gone(key.versions().iter().filter(|version| version.expires <= now)));
        // The object that signed until now never signs again.
        let before = key.versions();
        let before = before.last().filter(|before| before.storage == KeyStorage::Resident);
        rows.extend(before.map(|before| Row::KeyEnding(before.key_id, "destroying")));
        let (admitted, key) = (Some((key.slot, key.of.epoch)), Arc::clone(key));
        let then = Box::new(move |index| {
            if let Some(newest) = versions.last_mut() {
                newest.told_by = Some(index);
            }
            key.versions.store(Arc::new(versions));
            drop((reserving, keep));
        });
        self.key_entry(Body::AgentKeyRotated(body), rows, admitted, then).await
    }

    /// Disables or destroys a key: in force in memory when this has taken the gate, acknowledged when durable. `by` is none for the agent
    /// itself, which has to be admitted. `None`: it was so before.
    ///
    /// # Errors
    /// As the agent's standing; `KEY_DESTROYED` where it is to be disabled; `LEDGER_UNAVAILABLE`.
    pub async fn end_key(
        &self,
        key: &Arc<AgentKey>,
        how: Ends,
        by: Option<proto::Operator>,
        keep: impl Send + 'static,
    ) -> Result<Option<u64>, Refusal> {
        let (answer, receiver) = oneshot::channel();
        {
            let mut gate = self.gate();
            if by.is_none() {
                gate.book.agent(key.slot).admits(key.of.epoch)?;
            }
            if gate.closing {
                return Err(draining());
            }
            let (state, body, rows) = match (how, key.state()) {
                (Ends::Disabled, KeyState::Destroyed | KeyState::Unspecified) => return Err(destroyed()),
                (Ends::Disabled, KeyState::Disabled) | (Ends::Destroyed, KeyState::Destroyed | KeyState::Unspecified) => {
                    return Ok(None);
                }
                (Ends::Disabled, KeyState::Active) => key.disabling(by),
                (Ends::Destroyed, KeyState::Active | KeyState::Disabled) => key.destroying(by),
            };
            key.take_state(state);
            let then: Then = Box::new(move |_| drop(keep));
            gate.push(Command::Key(Box::new(KeyCommand::Record { body: Box::new(body), rows, admitted: None, then, answer })));
        }
        self.wake();
        answered(receiver, COMMIT_DEADLINE).await.map(Some)
    }

    async fn key_entry(&self, body: Body, rows: Vec<Row>, admitted: Option<(u32, u32)>, then: Then) -> Result<u64, Refusal> {
        if !self.is_writable() {
            return Err(unavailable());
        }
        let command = |answer| Command::Key(Box::new(KeyCommand::Record { body: Box::new(body), rows, admitted, then, answer }));
        let receiver = self.ask(command)?;
        answered(receiver, COMMIT_DEADLINE).await
    }
}

/// A resident key's own two-phase intent is settled with the entry that puts it to use.
fn settles(version: &KeyVersion) -> Option<Row> {
    (version.storage == KeyStorage::Resident).then(|| {
        Row::KeyActivated(proto::KeyActivated { key_id: version.key_id.0.to_vec(), spki: version.public.spki().to_vec() })
    })
}

impl From<Algorithm> for KeyAlgorithm {
    fn from(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::P256 => Self::P256,
            Algorithm::P384 => Self::P384,
            Algorithm::Ed25519 => Self::Ed25519,
            Algorithm::Ps256 => Self::Ps256,
        }
    }
}

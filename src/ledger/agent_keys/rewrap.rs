//! Agents' wrapped keys come from under one wrapping key under another: rows and the one entry that tells of them are durable together.

use std::sync::Arc;

use crate::model::{Digest, KeyId, Refusal};
use crate::proto::{self, entry::Body};

use super::super::Ledger;
use super::super::store::Row;
use super::{AgentKey, KeyVersion, StoredKey};

/// What becomes of one key.
pub struct Rewrapped {
    key: Arc<AgentKey>,
    versions: Vec<KeyVersion>,
    told: Vec<proto::RewrappedVersion>,
}

impl Rewrapped {
    /// A key as it is now. Whoever has this changes it alone.
    #[must_use]
    pub fn new(key: Arc<AgentKey>) -> Self {
        let versions = key.versions().to_vec();
        Self { key, versions, told: Vec::new() }
    }

    /// The version is wrapped so, from here on.
    pub fn rewrap(&mut self, key_id: KeyId, wrapped: Arc<[u8]>, wrapping: KeyId) {
        let Some(version) = self.versions.iter_mut().find(|version| version.key_id == key_id) else { return };
        self.told.push(told(key_id, Digest::of(&wrapped).0.to_vec(), false));
        let before = version.wrapped.replace((wrapped, wrapping)).map(|(_, before)| before);
        version.wrapped_before.extend(before);
    }

    /// The version never signs again: its wrapped key is kept no longer.
    pub fn forget(&mut self, key_id: KeyId) {
        let Some(version) = self.versions.iter_mut().find(|version| version.key_id == key_id) else { return };
        self.told.push(told(key_id, Vec::new(), false));
        let before = version.wrapped.take().map(|(_, before)| before);
        version.wrapped_before.extend(before);
    }

    /// The version may be in other hands: it neither signs nor verifies from here on. Its number is `kept` where another follows upon it.
    pub fn end(&mut self, key_id: KeyId, kept: bool) {
        for version in self.versions.iter_mut().filter(|version| version.key_id == key_id) {
            (version.wrapped, version.wrapped_before) = (None, Vec::new());
        }
        self.versions.retain(|version| kept || version.key_id != key_id);
        self.told.push(told(key_id, Vec::new(), true));
    }

    /// What verifies no more is named by nobody.
    fn kids_gone(&self) -> Row {
        let exposed = |version: &&KeyVersion| self.told.iter().any(|told| told.exposed && told.key_id == version.key_id.0);
        self.key.kids_gone(self.key.versions().iter().filter(exposed))
    }

    /// Whether nothing becomes of it.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.told.is_empty()
    }
}

fn told(key_id: KeyId, wrapped_sha256: Vec<u8>, exposed: bool) -> proto::RewrappedVersion {
    proto::RewrappedVersion { key_id: key_id.0.to_vec(), wrapped_sha256, exposed }
}

impl Ledger {
    /// Many keys at once, in one entry. `wrapping` has to be active when it is decided. `keep` is dropped when all of it is in force.
    ///
    /// # Errors
    /// `AUTHORITY_SUPERSEDED`: another wrapping key is active by now; `LEDGER_UNAVAILABLE`.
    pub async fn rewrap_keys(&self, wrapping: KeyId, keys: Vec<Rewrapped>, keep: impl Send + 'static) -> Result<u64, Refusal> {
        let versions = keys.iter().flat_map(|one| one.told.clone()).collect();
        let body = proto::AgentKeysRewrapped { wrapping_key_id: wrapping.0.to_vec(), versions };
        let rows = keys.iter().flat_map(|one| [one.key.versions_row(&one.versions), one.kids_gone()]).collect();
        let then = Box::new(move |index| {
            for mut one in keys {
                for version in &mut one.versions {
                    if one.told.iter().any(|told| told.key_id == version.key_id.0) {
                        version.rewrapped_by = Some(index);
                    }
                }
                one.key.versions.store(Arc::new(one.versions));
            }
            drop(keep);
        });
        self.key_entry(Body::AgentKeysRewrapped(body), rows, None, then).await
    }

    /// Whether a key never signs again, as the book has it: a denial counts when it is an entry, and not before.
    #[must_use]
    pub fn never_signs(&self, key: &AgentKey) -> bool {
        if key.admits_at(self.0.clock.reckoned()).is_err() {
            return true;
        }
        let gate = self.gate();
        let agent = gate.book.agent(key.slot);
        key.of.epoch < agent.epoch || agent.quarantine.as_deref().is_some_and(|quarantine| quarantine.index.is_some())
    }

    /// A key of a row that was just read. As with [`Ledger::load_key`] the caller sees to it that there is one of it at a time.
    ///
    /// # Errors
    /// `AGENT_UNKNOWN`.
    pub fn restore_key(&self, row: StoredKey) -> Result<AgentKey, Refusal> {
        let slot = self.gate().book.named(&row.of.agent)?.0;
        Ok(AgentKey::new(slot, row))
    }
}

//! Agents' signing keys: who may sign with which, and how often.

use std::collections::HashMap;

use super::At;
use super::agents::{Agents, Slot};
use super::keys::Keys;
use crate::formats::Jwk;
use crate::model::{KeyId, KeyName, PublicKey};
use crate::proto::{
    AgentKeyCreated, AgentKeyRotated, AgentKeyVersion, KeyAlgorithm, KeyPurpose, KeyState, KeyStorage, SignIntended,
    SignaturesReserved, SignaturesSealed,
};

/// Digests of one intent, at most.
const BATCH_MAX: usize = 1000;

struct Key {
    slot: Slot,
    epoch: u32,
    state: KeyState,
    purpose: KeyPurpose,
    digest_bytes: usize,
    signatures_max: u64,
    /// Intended, sealed, and reserved but not sealed.
    used: u64,
    newest: AgentKeyVersion,
}

/// Who signs under an intent, and how much.
pub(super) struct Signer {
    key: usize,
    count: u64,
}

struct Reservation {
    key: usize,
    count: u64,
}

#[derive(Default)]
pub(super) struct AgentKeys {
    by_name: HashMap<(Slot, u32, Box<str>), usize>,
    keys: Vec<Key>,
    open: HashMap<u64, Reservation>,
    released: u64,
    counted: u64,
}

impl AgentKeys {
    pub(super) fn created(&mut self, created: &AgentKeyCreated, keys: &mut Keys, agents: &Agents, at: &mut At<'_>) {
        let Some(slot) = agents.find(&created.agent) else {
            return at.violates("agent-key", format_args!("{:.80} is not enrolled", created.agent));
        };
        if !agents.admits(slot, created.epoch) {
            at.violates("agent-key", format_args!("{} may not have keys in epoch {}", created.agent, created.epoch));
        }
        if let Err(error) = KeyName::parse(&created.name) {
            at.violates("agent-key", format_args!("{error}"));
        }
        let newest = created.version.clone().unwrap_or_default();
        version(&newest, created.algorithm(), keys, at);
        let key = Key {
            slot,
            epoch: created.epoch,
            state: KeyState::Active,
            purpose: created.purpose(),
            digest_bytes: if created.algorithm() == KeyAlgorithm::P384 { 48 } else { 32 },
            signatures_max: created.signatures_max,
            used: 0,
            newest,
        };
        let name = (slot, created.epoch, created.name.as_str().into());
        if self.by_name.insert(name, self.keys.len()).is_some() {
            at.violates("agent-key", format_args!("{} of {} is made again", created.name, created.agent));
        }
        self.keys.push(key);
    }

    pub(super) fn rotated(&mut self, rotated: &AgentKeyRotated, keys: &mut Keys, agents: &Agents, at: &mut At<'_>) {
        let Some(found) = self.named(&rotated.agent, rotated.epoch, &rotated.name, agents) else {
            return at.violates("agent-key", format_args!("no key {:.64} of {:.80}", rotated.name, rotated.agent));
        };
        let key = &mut self.keys[found];
        let newest = rotated.version.clone().unwrap_or_default();
        if !agents.admits(key.slot, key.epoch) || key.state != KeyState::Active || newest.number != key.newest.number + 1 {
            at.violates("agent-key", format_args!("{} of {} cannot be rotated now", rotated.name, rotated.agent));
        }
        let algorithm = PublicKey::from_spki(&key.newest.spki).map_or(KeyAlgorithm::Unspecified, |key| key.algorithm().into());
        version(&newest, algorithm, keys, at);
        key.newest = newest;
    }

    pub(super) fn disabled(&mut self, agent: &str, epoch: u32, name: &str, agents: &Agents, at: &mut At<'_>) {
        self.ended(agent, epoch, name, KeyState::Disabled, agents, at);
    }

    pub(super) fn destroyed(&mut self, agent: &str, epoch: u32, name: &str, agents: &Agents, at: &mut At<'_>) {
        self.ended(agent, epoch, name, KeyState::Destroyed, agents, at);
    }

    fn ended(&mut self, agent: &str, epoch: u32, name: &str, state: KeyState, agents: &Agents, at: &mut At<'_>) {
        let Some(found) = self.named(agent, epoch, name, agents) else {
            return at.violates("agent-key", format_args!("no key {name:.64} of {agent:.80}"));
        };
        let key = &mut self.keys[found];
        if key.state == KeyState::Destroyed || key.state == state {
            at.violates("agent-key", format_args!("{name} of {agent} has ended before"));
        }
        key.state = state;
    }

    fn named(&self, agent: &str, epoch: u32, name: &str, agents: &Agents) -> Option<usize> {
        self.by_name.get(&(agents.find(agent)?, epoch, name.into())).copied()
    }

    /// The key of a wish to sign, if it may.
    fn signing(
        &self,
        (agent, epoch, name): (&str, u32, &str),
        key_id: &[u8],
        rule: &'static str,
        agents: &Agents,
        at: &mut At<'_>,
    ) -> Option<usize> {
        let Some(found) = self.named(agent, epoch, name, agents) else {
            at.violates(rule, format_args!("no key {name:.64} of {agent:.80}"));
            return None;
        };
        let key = &self.keys[found];
        if !agents.admits(key.slot, epoch) {
            at.violates(rule, format_args!("{agent} is denied, or past epoch {epoch}"));
        }
        if key.state != KeyState::Active || key.newest.key_id != key_id {
            at.violates(rule, format_args!("{name} of {agent} signs no more, or not with this version"));
        }
        // A key may expire while its wish waits for the disk.
        if key.newest.expires_unix_seconds.saturating_add(60) < at.time.seconds() {
            at.violates(rule, format_args!("{name} of {agent} has expired"));
        }
        Some(found)
    }

    pub(super) fn sign_intended(&mut self, intent: &SignIntended, agents: &Agents, at: &mut At<'_>) -> Option<Signer> {
        let of = (intent.agent.as_str(), intent.epoch, intent.name.as_str());
        let found = self.signing(of, &intent.key_id, "sign-key", agents, at)?;
        let key = &mut self.keys[found];
        if intent.profile() != key.purpose {
            at.violates("sign-key", format_args!("{} signs {}", intent.name, key.purpose.as_str_name()));
        }
        let sound = intent.digests.iter().all(|digest| digest.len() == key.digest_bytes);
        if !sound || intent.digests.is_empty() || intent.digests.len() > BATCH_MAX {
            at.violates("sign-digest", format_args!("{} digests, or one of another length", intent.digests.len()));
        }
        let count = intent.digests.len() as u64;
        spend(key, count, "sign-budget", at);
        Some(Signer { key: found, count })
    }

    pub(super) fn released(&mut self, signer: &Signer, agents: &Agents, at: &mut At<'_>) {
        let key = &self.keys[signer.key];
        agents.released_to(key.slot, key.epoch, at);
        self.released += signer.count;
    }

    pub(super) fn reserved(&mut self, reserved: &SignaturesReserved, agents: &Agents, at: &mut At<'_>) {
        let of = (reserved.agent.as_str(), reserved.epoch, reserved.name.as_str());
        let Some(found) = self.signing(of, &reserved.key_id, "reserved", agents, at) else { return };
        spend(&mut self.keys[found], reserved.count, "reserved", at);
        self.counted += reserved.count;
        self.open.insert(at.index, Reservation { key: found, count: reserved.count });
    }

    pub(super) fn sealed(&mut self, sealed: &SignaturesSealed, at: &mut At<'_>) {
        match self.open.remove(&sealed.reservation) {
            Some(open) if sealed.used <= open.count => {
                let key = &mut self.keys[open.key];
                let unused = open.count - sealed.used;
                key.used = key.used.saturating_sub(unused);
                self.counted -= unused;
            }
            Some(open) => at.violates("sealed", format_args!("{} of {} signatures", sealed.used, open.count)),
            None => at.violates("sealed", format_args!("entry {} is no open reservation", sealed.reservation)),
        }
    }

    pub(super) fn count(&self) -> u64 {
        self.keys.len() as u64
    }

    pub(super) fn released_count(&self) -> u64 {
        self.released
    }

    /// What is sealed, and what is reserved and not sealed: that counts as made.
    pub(super) fn counted(&self) -> u64 {
        self.counted
    }
}

fn spend(key: &mut Key, count: u64, rule: &'static str, at: &mut At<'_>) {
    key.used = key.used.saturating_add(count);
    if key.signatures_max > 0 && key.used > key.signatures_max {
        at.violates(rule, format_args!("{} signatures of at most {}", key.used, key.signatures_max));
    }
}

fn version(version: &AgentKeyVersion, algorithm: KeyAlgorithm, keys: &mut Keys, at: &mut At<'_>) {
    if KeyId::from_slice(&version.key_id).is_none() {
        at.violates("agent-key", format_args!("a key id has 16 bytes"));
    }
    match PublicKey::from_spki(&version.spki) {
        Ok(public) => {
            if KeyAlgorithm::from(public.algorithm()) != algorithm {
                at.violates("agent-key", format_args!("not a key of its algorithm"));
            }
            if Jwk::thumbprint(&public) != version.kid {
                at.violates("agent-key", format_args!("{:.64} is not the thumbprint of its key", version.kid));
            }
        }
        Err(error) => at.violates("agent-key", format_args!("{error}")),
    }
    if version.storage() == KeyStorage::Resident {
        keys.settled_by_agent(&version.key_id, at);
    }
}

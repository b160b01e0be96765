//! Agents' signing keys: who may sign with which, and how often.

use std::collections::HashMap;

use super::At;
use super::agents::{Agents, Slot};
use super::authorities::Authorities;
use super::keys::Keys;
use crate::formats::Jwk;
use crate::model::{KeyId, KeyName, PublicKey};
use crate::proto::{
    AgentKeyCreated, AgentKeyObjectEnded, AgentKeyRotated, AgentKeyVersion, AgentKeysForgotten, AgentKeysRewrapped, KeyAlgorithm,
    KeyOver, KeyPurpose, KeyState, KeyStorage, SignIntended, SignaturesReserved, SignaturesSealed,
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
    /// Neither signs nor is wrapped any more.
    forgotten: bool,
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
    /// Whose each wrapped version is.
    wrapped: HashMap<KeyId, usize>,
    released: u64,
    counted: u64,
}

impl AgentKeys {
    pub(super) fn created(
        &mut self,
        created: &AgentKeyCreated,
        keys: &mut Keys,
        authorities: &Authorities,
        agents: &Agents,
        at: &mut At<'_>,
    ) {
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
        version(&newest, created.algorithm(), keys, authorities, at);
        self.wraps(&newest, self.keys.len());
        let key = Key {
            slot,
            epoch: created.epoch,
            state: KeyState::Active,
            purpose: created.purpose(),
            digest_bytes: if created.algorithm() == KeyAlgorithm::P384 { 48 } else { 32 },
            signatures_max: created.signatures_max,
            used: 0,
            newest,
            forgotten: false,
        };
        let name = (slot, created.epoch, created.name.as_str().into());
        if self.by_name.insert(name, self.keys.len()).is_some() {
            at.violates("agent-key", format_args!("{} of {} is made again", created.name, created.agent));
        }
        self.keys.push(key);
    }

    pub(super) fn rotated(
        &mut self,
        rotated: &AgentKeyRotated,
        keys: &mut Keys,
        authorities: &Authorities,
        agents: &Agents,
        at: &mut At<'_>,
    ) {
        let Some(found) = self.named(&rotated.agent, rotated.epoch, &rotated.name, agents) else {
            return at.violates("agent-key", format_args!("no key {:.64} of {:.80}", rotated.name, rotated.agent));
        };
        let key = &mut self.keys[found];
        let newest = rotated.version.clone().unwrap_or_default();
        if !agents.admits(key.slot, key.epoch) || key.state != KeyState::Active || newest.number != key.newest.number + 1 {
            at.violates("agent-key", format_args!("{} of {} cannot be rotated now", rotated.name, rotated.agent));
        }
        let algorithm = PublicKey::from_spki(&key.newest.spki).map_or(KeyAlgorithm::Unspecified, |key| key.algorithm().into());
        version(&newest, algorithm, keys, authorities, at);
        (key.newest, key.forgotten) = (newest.clone(), false);
        self.wraps(&newest, found);
    }

    fn wraps(&mut self, version: &AgentKeyVersion, key: usize) {
        if version.storage() == KeyStorage::Wrapped
            && let Some(id) = KeyId::from_slice(&version.key_id)
        {
            self.wrapped.insert(id, key);
        }
    }

    /// Versions come from under one wrapping key under another, or are wrapped no more.
    pub(super) fn rewrapped(
        &mut self,
        rewrapped: &AgentKeysRewrapped,
        authorities: &Authorities,
        agents: &Agents,
        at: &mut At<'_>,
    ) {
        if !authorities.wraps(&rewrapped.wrapping_key_id) {
            at.violates("wrapping", format_args!("keys come under a wrapping key that is not active"));
        }
        for version in &rewrapped.versions {
            let Some(found) = KeyId::from_slice(&version.key_id).and_then(|id| self.wrapped.get(&id)) else {
                at.violates("rewrapped", format_args!("no wrapped key was made under this id"));
                continue;
            };
            let key = &mut self.keys[*found];
            if key.newest.key_id != version.key_id {
                if !version.wrapped_sha256.is_empty() {
                    at.violates("rewrapped", format_args!("a version that signs no more is wrapped anew"));
                }
                continue;
            }
            if version.wrapped_sha256.is_empty() {
                let signs = key.state == KeyState::Active && agents.admits(key.slot, key.epoch);
                if signs && key.newest.expires_unix_seconds > at.time.seconds() {
                    at.violates("rewrapped", format_args!("what may sign is kept no longer"));
                }
                key.forgotten = true;
                if version.exposed {
                    // It verifies no more, either.
                    key.newest.expires_unix_seconds = 0;
                }
            } else if version.exposed || key.forgotten {
                at.violates("rewrapped", format_args!("what was in other hands, or kept no longer, is wrapped anew"));
            } else {
                key.newest.wrapping_key_id.clone_from(&rewrapped.wrapping_key_id);
                key.newest.wrapped_sha256.clone_from(&version.wrapped_sha256);
            }
        }
    }

    /// A wrapping key retires: what may sign is under another one by now.
    pub(super) fn unwraps_no_more(&self, wrapping: &[u8], agents: &Agents, at: &mut At<'_>) {
        let under = self.keys.iter().filter(|key| {
            let signs = key.state == KeyState::Active && !key.forgotten && agents.admits(key.slot, key.epoch);
            signs && key.newest.wrapping_key_id == wrapping && key.newest.expires_unix_seconds > at.time.seconds()
        });
        let count = under.count();
        if count > 0 {
            at.violates("wrapping-retired", format_args!("{count} keys that may sign are under it"));
        }
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

    /// Nothing signs with the object that is destroyed: its key's next version may.
    pub(super) fn object_ended(&mut self, ended: &AgentKeyObjectEnded, agents: &Agents, at: &mut At<'_>) {
        let Some(found) = self.named(&ended.agent, ended.epoch, &ended.name, agents) else {
            return at.violates("agent-key", format_args!("no key {:.64} of {:.80}", ended.name, ended.agent));
        };
        let key = &mut self.keys[found];
        if key.state == KeyState::Destroyed || key.newest.key_id != ended.key_id || key.newest.storage() != KeyStorage::Resident {
            at.violates("agent-key", format_args!("{} of {} has no such object", ended.name, ended.agent));
        }
        let is_over = match ended.cause() {
            KeyOver::Epoch => agents.epoch(key.slot) > key.epoch,
            KeyOver::Expired => key.newest.expires_unix_seconds < at.time.seconds(),
            // How long an agent may take to come back is between it and its enrolment.
            KeyOver::Agent => true,
            KeyOver::Unspecified => false,
        };
        if !is_over {
            at.violates("agent-key", format_args!("{} of {} is not over", ended.name, ended.agent));
        }
        key.newest.key_id.clear();
    }

    /// Nothing signs with these: of a past epoch, or of an agent that does not come back.
    pub(super) fn forgotten(&mut self, gone: &AgentKeysForgotten, agents: &Agents, at: &mut At<'_>) {
        for name in &gone.names {
            let Some(found) = self.named(&gone.agent, gone.epoch, name, agents) else {
                at.violates("agent-key", format_args!("no key {name:.64} of {:.80}", gone.agent));
                continue;
            };
            let key = &mut self.keys[found];
            let is_over = match gone.cause() {
                KeyOver::Epoch => agents.epoch(key.slot) > key.epoch,
                KeyOver::Agent => key.newest.expires_unix_seconds <= at.time.seconds() || !agents.admits(key.slot, key.epoch),
                KeyOver::Expired | KeyOver::Unspecified => false,
            };
            if !is_over && key.state != KeyState::Destroyed {
                at.violates("agent-key", format_args!("{name} of {} is not over", gone.agent));
            }
            key.state = KeyState::Destroyed;
        }
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
        if key.state != KeyState::Active || key.newest.key_id != key_id || key.forgotten {
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
        if key.state != KeyState::Active {
            at.violates("released-ended", format_args!("the key signed no more by then"));
        }
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

fn version(version: &AgentKeyVersion, algorithm: KeyAlgorithm, keys: &mut Keys, authorities: &Authorities, at: &mut At<'_>) {
    if version.storage() == KeyStorage::Wrapped
        && authorities.wrapping_has_begun()
        && !authorities.wraps(&version.wrapping_key_id)
    {
        at.violates("wrapping", format_args!("a key comes under a wrapping key that is not active"));
    }
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

#[cfg(test)]
mod tests {
    use super::super::book::{AGENT, Book};
    use super::*;
    use crate::proto::entry::Body;
    use crate::proto::{self, AgentKeyDisabled, Released};

    const KEY_ID: [u8; 16] = [9; 16];

    fn version(number: u32, key_id: [u8; 16]) -> AgentKeyVersion {
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let spki = rcgen::PublicKeyData::subject_public_key_info(&pair);
        let kid = Jwk::thumbprint(&PublicKey::from_spki(&spki).unwrap());
        let (key_id, storage) = (key_id.to_vec(), KeyStorage::Session.into());
        AgentKeyVersion { number, key_id, spki, kid, storage, expires_unix_seconds: 2_000_000_000, ..Default::default() }
    }

    fn creation() -> AgentKeyCreated {
        AgentKeyCreated {
            agent: AGENT.into(),
            epoch: 1,
            name: "a".into(),
            purpose: KeyPurpose::RawDigest.into(),
            algorithm: KeyAlgorithm::P256.into(),
            signatures_max: 10,
            version: Some(version(1, KEY_ID)),
            ..Default::default()
        }
    }

    fn wish() -> SignIntended {
        let digests = vec![vec![1; 32]];
        let (key_id, profile) = (KEY_ID.to_vec(), KeyPurpose::RawDigest.into());
        SignIntended { agent: AGENT.into(), epoch: 1, name: "a".into(), key_id, profile, digests }
    }

    fn reservation(count: u64) -> Body {
        let (agent, name, key_id) = (AGENT.to_owned(), "a".to_owned(), KEY_ID.to_vec());
        Body::SignaturesReserved(SignaturesReserved { agent, epoch: 1, name, key_id, count })
    }

    fn seal(reservation: u64, used: u64) -> Body {
        Body::SignaturesSealed(SignaturesSealed { reservation, used })
    }

    /// With a key that may make ten signatures.
    fn book() -> Book {
        let mut book = Book::new();
        book.add(Body::AgentKeyCreated(creation()));
        book
    }

    fn released(book: &mut Book, intent: u64) {
        book.add(Body::Released(Released { intent, signature: Vec::new() }));
    }

    fn disabled(book: &mut Book) {
        let ended = AgentKeyDisabled { agent: AGENT.into(), epoch: 1, name: "a".into(), by: None };
        book.add(Body::AgentKeyDisabled(ended));
    }

    #[test]
    fn signatures_are_counted_and_what_is_not_sealed_counts_as_made() {
        let mut book = book();
        let one = book.add(Body::SignIntended(SignIntended { digests: vec![vec![1; 32]; 3], ..wish() }));
        released(&mut book, one);
        let sealed = book.add(reservation(4));
        book.add(seal(sealed, 1));
        book.add(reservation(6));
        let report = book.report(&[]);
        assert_eq!(report.violations, []);
        assert_eq!((report.keys, report.signatures, report.signatures_counted), (1, 3, 7));
        book.add(Body::SignIntended(wish()));
        assert_eq!(book.broken(), ["sign-budget"]);
    }

    #[test]
    fn a_key_is_of_an_agent_that_is_admitted_and_is_made_once_under_a_name() {
        let mut twice = book();
        twice.add(Body::AgentKeyCreated(AgentKeyCreated { version: Some(version(1, [8; 16])), ..creation() }));
        assert_eq!(twice.broken(), ["agent-key"]);
        let mut nobodys = Book::new();
        nobodys.add(Body::AgentKeyCreated(AgentKeyCreated { agent: "builder/99".into(), ..creation() }));
        assert_eq!(nobodys.broken(), ["agent-key"]);
        let mut denied = Book::new();
        denied.quarantine(AGENT, 1);
        denied.add(Body::AgentKeyCreated(creation()));
        assert_eq!(denied.broken(), ["agent-key"]);
        let mut misnamed = Book::new();
        let other = AgentKeyVersion { kid: version(1, KEY_ID).kid, ..version(1, KEY_ID) };
        misnamed.add(Body::AgentKeyCreated(AgentKeyCreated { version: Some(other), ..creation() }));
        assert_eq!(misnamed.broken(), ["agent-key"]);
    }

    #[test]
    fn only_the_newest_version_of_an_active_key_signs_digests_of_its_purpose() {
        for (wrong, rule) in [
            (SignIntended { name: "b".into(), ..wish() }, "sign-key"),
            (SignIntended { key_id: vec![8; 16], ..wish() }, "sign-key"),
            (SignIntended { profile: KeyPurpose::Jws.into(), ..wish() }, "sign-key"),
            (SignIntended { digests: vec![vec![1; 31]], ..wish() }, "sign-digest"),
            (SignIntended { digests: Vec::new(), ..wish() }, "sign-digest"),
            (SignIntended { digests: vec![vec![1; 32]; 11], ..wish() }, "sign-budget"),
        ] {
            let mut book = book();
            book.add(Body::SignIntended(wrong));
            assert_eq!(book.broken(), [rule]);
        }
        let mut rotated = book();
        let (agent, name) = (AGENT.to_owned(), "a".to_owned());
        rotated.add(Body::AgentKeyRotated(AgentKeyRotated { agent, epoch: 1, name, version: Some(version(2, [8; 16])) }));
        assert!(rotated.report(&[]).holds());
        rotated.add(Body::SignIntended(wish()));
        assert_eq!(rotated.broken(), ["sign-key"]);
        let mut ended = book();
        disabled(&mut ended);
        ended.add(Body::SignIntended(wish()));
        assert_eq!(ended.broken(), ["sign-key"]);
    }

    #[test]
    fn nothing_is_released_or_reserved_for_who_is_denied() {
        let mut denied = book();
        let intent = denied.add(Body::SignIntended(wish()));
        denied.quarantine(AGENT, 1);
        released(&mut denied, intent);
        assert_eq!(denied.broken(), ["released-quarantined", "released-denied"]);
        let mut denied = book();
        denied.quarantine(AGENT, 1);
        denied.add(reservation(1));
        assert_eq!(denied.broken(), ["reserved"]);
        let mut ended = book();
        let intent = ended.add(Body::SignIntended(wish()));
        disabled(&mut ended);
        released(&mut ended, intent);
        assert_eq!(ended.broken(), ["released-ended"]);
    }

    #[test]
    fn an_intent_to_sign_ends_once() {
        let mut book = book();
        let intent = book.add(Body::SignIntended(wish()));
        assert_eq!(book.report(&[]).open_intents, [intent]);
        released(&mut book, intent);
        book.add(Body::Unknown(proto::Unknown { intent, cause: "again".into() }));
        assert_eq!(book.broken(), ["outcome-twice"]);
    }

    #[test]
    fn a_reservation_is_sealed_once_with_no_more_than_it_had() {
        let mut twice = book();
        let index = twice.add(reservation(4));
        twice.add(seal(index, 4));
        twice.add(seal(index, 4));
        assert_eq!(twice.broken(), ["sealed"]);
        let mut more = book();
        let index = more.add(reservation(4));
        more.add(seal(index, 5));
        assert_eq!(more.broken(), ["sealed"]);
    }
}

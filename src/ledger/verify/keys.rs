//! The keys of the ledger: intended, then active or abandoned (design §4).

use std::collections::HashMap;

use aws_lc_rs::signature::ParsedPublicKey;

use super::At;
use crate::model::{Algorithm, KeyId, PublicKey};
use crate::proto::{KeyAbandoned, KeyActivated, KeyAlgorithm, KeyIntended, Purpose};

enum State {
    Intended,
    Active(Box<ParsedPublicKey>, PublicKey),
    /// In use, and signs nothing that the ledger has a signature of: a wrapping key, an agent's.
    InUse,
    Abandoned,
}

struct Key {
    purpose: Purpose,
    algorithm: KeyAlgorithm,
    state: State,
}

#[derive(Default)]
pub(super) struct Keys {
    by_id: HashMap<KeyId, Key>,
}

impl Keys {
    pub(super) fn intended(&mut self, intended: &KeyIntended, at: &mut At<'_>) {
        let Some(id) = KeyId::from_slice(&intended.key_id) else {
            return at.violates("key-intent", format_args!("a key id has 16 bytes"));
        };
        let key = Key { purpose: intended.purpose(), algorithm: intended.algorithm(), state: State::Intended };
        if self.by_id.contains_key(&id) {
            return at.violates("key-intent", format_args!("key {id} is intended again"));
        }
        self.by_id.insert(id, key);
    }

    pub(super) fn activated(&mut self, activated: &KeyActivated, at: &mut At<'_>) {
        let Some(key) = self.settling(&activated.key_id, at) else { return };
        if key.purpose == Purpose::Wrapping && activated.spki.is_empty() {
            key.state = State::InUse;
            return;
        }
        key.state = State::Abandoned;
        let expected = match key.algorithm {
            KeyAlgorithm::P256 => Some(Algorithm::P256),
            KeyAlgorithm::Ed25519 => Some(Algorithm::Ed25519),
            KeyAlgorithm::P384 => Some(Algorithm::P384),
            // Agents' keys alone: no entry of theirs comes here.
            KeyAlgorithm::Ps256 | KeyAlgorithm::Unspecified => None,
        };
        match PublicKey::from_spki(&activated.spki) {
            Ok(public) if Some(public.algorithm()) == expected => {
                if let Some(verifier) = public.verifier() {
                    key.state = State::Active(Box::new(verifier), public);
                }
            }
            Ok(_) => at.violates("key-spki", format_args!("not a key of the intended algorithm")),
            Err(error) => at.violates("key-spki", format_args!("{error}")),
        }
    }

    /// An agent's resident key is in use: what the entry that tells of it settles.
    pub(super) fn settled_by_agent(&mut self, id: &[u8], at: &mut At<'_>) {
        if let Some(key) = self.settling(id, at) {
            key.state = State::InUse;
        }
    }

    pub(super) fn abandoned(&mut self, abandoned: &KeyAbandoned, at: &mut At<'_>) {
        if let Some(key) = self.settling(&abandoned.key_id, at) {
            key.state = State::Abandoned;
        }
    }

    /// The key that is now settled, if it can be.
    fn settling(&mut self, id: &[u8], at: &mut At<'_>) -> Option<&mut Key> {
        let Some(key) = KeyId::from_slice(id).and_then(|id| self.by_id.get_mut(&id)) else {
            at.violates("key-settled", format_args!("the key was never intended"));
            return None;
        };
        if !matches!(key.state, State::Intended) {
            at.violates("key-settled", format_args!("the key was activated or abandoned before"));
            return None;
        }
        Some(key)
    }

    /// Whether `id` is an active key of `purpose`.
    pub(super) fn is_active(&self, id: &[u8], purpose: Purpose) -> bool {
        let key = KeyId::from_slice(id).and_then(|id| self.by_id.get(&id));
        key.is_some_and(|key| key.purpose == purpose && matches!(key.state, State::Active(..)))
    }

    /// Whether `id` is a wrapping key that is there.
    pub(super) fn wraps(&self, id: &[u8]) -> bool {
        let key = KeyId::from_slice(id).and_then(|id| self.by_id.get(&id));
        key.is_some_and(|key| key.purpose == Purpose::Wrapping && matches!(key.state, State::InUse))
    }

    /// The public key of the active key `id` of `purpose`.
    pub(super) fn public(&self, id: &KeyId, purpose: Purpose) -> Option<&PublicKey> {
        match self.by_id.get(id).filter(|key| key.purpose == purpose).map(|key| &key.state) {
            Some(State::Active(_, public)) => Some(public),
            _ => None,
        }
    }

    /// Whether `signature` is that of the active key `id` over `message`.
    pub(super) fn verifies(&self, id: &KeyId, message: &[u8], signature: &[u8]) -> bool {
        match self.by_id.get(id).map(|key| &key.state) {
            Some(State::Active(key, _)) => key.verify_sig(message, signature).is_ok(),
            _ => false,
        }
    }
}

//! The generations of the authorities: which arrows there are, and which generation signs what.

use std::collections::HashMap;

use super::At;
use super::keys::Keys;
use crate::ledger::note::{self, VerifierKey, ledger_name};
use crate::model::{KeyId, PublicKey, TrustDomain, UnixTime};
use crate::proto::{AuthorityActivated, AuthorityState as State, AuthorityStepped, AuthorityTainted, IntentKind, Purpose};

/// A new root is in the bundle at least so long before it signs, in seconds: the refresh hint.
const OVERLAP_SECONDS: u64 = 300;
/// An entry that says that the clock is set back comes at most so long before that takes effect, in seconds.
const ACCEPTED_WITHIN_SECONDS: u64 = 10;

struct Generation {
    purpose: Purpose,
    state: State,
    since: UnixTime,
    issuer: Option<KeyId>,
    tainted: bool,
    /// Since which entry it is trusted.
    prepublished: Option<u64>,
    /// notAfter of the last agent's certificate under it.
    leaf_until_seconds: u64,
}

#[derive(Default)]
pub(super) struct Authorities {
    by_id: HashMap<KeyId, Generation>,
    /// Ledger keys that followed another, and when they came into service: that has to be in the tree by which the other vouches for them.
    followers: Vec<(PublicKey, u64)>,
    /// The clock was set back; entries' times stand still until it is there again, and do not tell how much time has passed.
    still_until: Option<UnixTime>,
}

/// What an outside root is called.
fn outside(certificate: &[u8]) -> Option<KeyId> {
    certificate.last_chunk().map(|bytes: &[u8; 16]| KeyId(*bytes))
}

fn is_trusted(state: State) -> bool {
    matches!(state, State::Prepublished | State::Active | State::Retiring)
}

impl Authorities {
    fn active(&self, purpose: Purpose) -> Option<KeyId> {
        self.by_id.iter().find(|(_, found)| found.purpose == purpose && found.state == State::Active).map(|(id, _)| *id)
    }

    /// An operator took the wall clock for true, so far from the daemon's own.
    pub(super) fn clock_accepted(&mut self, deviation_micros: i64, at: &At<'_>) {
        if deviation_micros < 0 {
            self.still_until = Some(at.time.plus_seconds(ACCEPTED_WITHIN_SECONDS));
        }
    }

    fn times_tell(&self, at: &At<'_>) -> bool {
        self.still_until.is_none_or(|until| until < at.time)
    }

    /// Whether keys are to be wrapped under this one.
    pub(super) fn wraps(&self, id: &[u8]) -> bool {
        self.active(Purpose::Wrapping).is_some_and(|active| active.0 == id)
    }

    /// Whether there is any wrapping key that is a generation: what came under one before was not told of as such.
    pub(super) fn wrapping_has_begun(&self) -> bool {
        self.by_id.values().any(|found| found.purpose == Purpose::Wrapping)
    }

    /// Whether this is an arrow from wherever that generation is.
    fn check_arrow(&self, id: KeyId, step: &AuthorityStepped, at: &mut At<'_>) {
        let (purpose, to) = (step.purpose(), step.to());
        let from = self.by_id.get(&id);
        let right = match (from.map(|found| found.state), to) {
            (None, State::Planned)
            | (Some(State::Planned), State::Prepublished | State::Destroyed)
            | (Some(State::Prepublished), State::Active | State::Retired)
            | (Some(State::Retiring), State::Retired)
            | (Some(State::Retired), State::Destroyed) => true,
            (None, State::Prepublished) => purpose == Purpose::Root && outside(&step.certificate) == Some(id),
            // Told again that it is not to wait.
            (Some(State::Planned), State::Planned) | (Some(State::Prepublished), State::Prepublished) => step.now,
            _ => false,
        };
        if !right || from.is_some_and(|found| found.purpose != purpose) {
            at.violates("authority-step", format_args!("no arrow leads to {} for {id}", to.as_str_name()));
        }
    }

    /// The first of its purpose, made by `init`.
    pub(super) fn activated(&mut self, activated: &AuthorityActivated, at: &mut At<'_>) {
        let purpose = activated.purpose();
        let Some(id) = KeyId::from_slice(&activated.key_id).or_else(|| outside(&activated.certificate)) else { return };
        if self.active(purpose).is_some() {
            at.violates("authority-step", format_args!("another one is active: it would have to be replaced"));
        }
        let issuer = if purpose == Purpose::Issuing { self.active(Purpose::Root) } else { None };
        self.by_id.insert(id, Generation::new(purpose, State::Active, at.time, issuer));
    }

    pub(super) fn stepped(&mut self, step: &AuthorityStepped, domain: Option<&TrustDomain>, keys: &Keys, at: &mut At<'_>) {
        let Some(id) = KeyId::from_slice(&step.key_id) else {
            return at.violates("authority-step", format_args!("a key id has 16 bytes"));
        };
        self.check_arrow(id, step, at);
        let (purpose, to) = (step.purpose(), step.to());
        match to {
            State::Active => {
                self.check_activation(id, step, at);
                if purpose == Purpose::Ledger && !step.replaces.is_empty() {
                    self.follow(id, step, domain, keys, at);
                }
            }
            State::Retired => self.check_retirement(id, at),
            State::Prepublished if purpose == Purpose::Issuing => self.check_issuer(step, at),
            _ => {}
        }
        if to == State::Active
            && let Some(before) = KeyId::from_slice(&step.replaces).and_then(|before| self.by_id.get_mut(&before))
        {
            (before.state, before.since) = (State::Retiring, at.time);
        }
        if to == State::Destroyed {
            self.by_id.remove(&id);
            return;
        }
        let found = self.by_id.entry(id).or_insert_with(|| Generation::new(purpose, to, at.time, None));
        if found.state != to {
            (found.state, found.since) = (to, at.time);
        }
        if to == State::Prepublished && found.prepublished.is_none() {
            found.prepublished = Some(at.index);
            found.issuer = KeyId::from_slice(&step.issuer);
        }
    }

    /// A ledger key after another: by the other's signature over a tree that has it.
    fn follow(&mut self, id: KeyId, step: &AuthorityStepped, domain: Option<&TrustDomain>, keys: &Keys, at: &mut At<'_>) {
        let since = self.by_id.get(&id).and_then(|found| found.prepublished).unwrap_or(at.index);
        let key = |id: &KeyId| keys.public(id, Purpose::Ledger).cloned();
        let (before, after) = (KeyId::from_slice(&step.replaces).and_then(|before| key(&before)), key(&id));
        let pinned = domain.zip(before).and_then(|(domain, before)| VerifierKey::new(&ledger_name(domain), before).ok());
        let vouched = pinned.map(|pinned| note::verify(&step.checkpoint, &pinned));
        if !vouched.is_some_and(|note| note.is_ok_and(|note| (since + 1..=at.index).contains(&note.size))) {
            at.violates("ledger-key", format_args!("the ledger key before it does not vouch for {id}"));
        }
        self.followers.extend(after.map(|after| (after, since)));
    }

    /// Whether a key came into service within the first `size` entries.
    pub(super) fn has_follower(&self, key: &PublicKey, size: u64) -> bool {
        self.followers.iter().any(|(follower, since)| follower == key && *since < size)
    }

    fn check_issuer(&self, step: &AuthorityStepped, at: &mut At<'_>) {
        let issuer = KeyId::from_slice(&step.issuer).and_then(|issuer| self.by_id.get(&issuer));
        if !step.certificate.is_empty() && !issuer.is_some_and(|root| root.purpose == Purpose::Root && is_trusted(root.state)) {
            at.violates("authority-step", format_args!("the root over it is not trusted"));
        }
    }

    fn check_activation(&self, id: KeyId, step: &AuthorityStepped, at: &mut At<'_>) {
        let before = self.active(step.purpose());
        if before != KeyId::from_slice(&step.replaces) {
            at.violates("authority-step", format_args!("another one is active than the one that is replaced"));
        }
        let tainted = before.and_then(|before| self.by_id.get(&before)).is_some_and(|before| before.tainted);
        let since = self.by_id.get(&id).map_or(at.time, |found| found.since);
        let tell = self.times_tell(at);
        if tell && step.purpose() == Purpose::Root && !tainted && since.plus_seconds(OVERLAP_SECONDS) > at.time {
            at.violates("authority-overlap", format_args!("a root is to be in the bundle {OVERLAP_SECONDS} s before it signs"));
        }
    }

    fn check_retirement(&self, id: KeyId, at: &mut At<'_>) {
        let Some(found) = self.by_id.get(&id) else { return };
        if !found.tainted && self.times_tell(at) && found.leaf_until_seconds > at.time.seconds() {
            at.violates(
                "authority-retired",
                format_args!("a certificate under it is in force until {}", found.leaf_until_seconds),
            );
        }
        if self.by_id.values().any(|under| under.issuer == Some(id) && is_trusted(under.state)) {
            at.violates("authority-retired", format_args!("an issuing authority under it is trusted"));
        }
    }

    pub(super) fn tainted(&mut self, tainted: &AuthorityTainted, at: &mut At<'_>) {
        let Some((id, found)) = KeyId::from_slice(&tainted.key_id).and_then(|id| self.by_id.get(&id).map(|found| (id, found)))
        else {
            return at.violates("authority-tainted", format_args!("no authority has this key"));
        };
        let root = if found.purpose == Purpose::Root { Some(id) } else { found.issuer };
        for (other, generation) in &mut self.by_id {
            let of_the_root = root.is_some() && (Some(*other) == root || generation.issuer == root);
            generation.tainted |= *other == id || of_the_root;
        }
    }

    /// A key that was planned for was given up.
    pub(super) fn abandoned(&mut self, id: &[u8]) {
        if let Some(id) = KeyId::from_slice(id) {
            self.by_id.remove(&id);
        }
    }

    /// Whether a generation, where it is now, signs this. A key that is no generation is one that `init` has made.
    pub(super) fn may_sign(&self, kind: IntentKind, id: &[u8], keys: &Keys) -> bool {
        let purpose = match kind {
            IntentKind::Attest | IntentKind::Renew | IntentKind::Server | IntentKind::Crl | IntentKind::Csr => Purpose::Issuing,
            IntentKind::Root | IntentKind::Issuing => Purpose::Root,
            IntentKind::Unspecified => return false,
        };
        let found = KeyId::from_slice(id).and_then(|id| self.by_id.get(&id)).map(|found| found.state);
        keys.is_active(id, purpose)
            && match kind {
                IntentKind::Attest | IntentKind::Renew | IntentKind::Issuing => found == Some(State::Active),
                IntentKind::Server => matches!(found, Some(State::Active | State::Retiring)),
                IntentKind::Crl => found.is_some_and(is_trusted),
                IntentKind::Root | IntentKind::Csr => matches!(found, None | Some(State::Planned)),
                IntentKind::Unspecified => false,
            }
    }

    /// An agent's certificate under it may be in force until then.
    pub(super) fn leaf_until(&mut self, id: &[u8], seconds: u64) {
        if let Some(found) = KeyId::from_slice(id).and_then(|id| self.by_id.get_mut(&id)) {
            found.leaf_until_seconds = found.leaf_until_seconds.max(seconds);
        }
    }
}

impl Generation {
    fn new(purpose: Purpose, state: State, since: UnixTime, issuer: Option<KeyId>) -> Self {
        Self { purpose, state, since, issuer, tainted: false, prepublished: None, leaf_until_seconds: 0 }
    }
}

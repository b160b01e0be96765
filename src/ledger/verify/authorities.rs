//! The generations of the authorities: which arrows there are, and which generation signs what.

use std::collections::HashMap;

use super::At;
use super::keys::Keys;
use super::tbs::Authority;
use crate::ledger::note::{self, VerifierKey, ledger_name};
use crate::model::{KeyId, PublicKey, TrustDomain, UnixTime};
use crate::proto::{AuthorityActivated, AuthorityState as State, AuthorityStepped, AuthorityTainted, IntentKind, Purpose};

/// A new root is in the bundle at least so long before it signs, in seconds: the refresh hint.
const OVERLAP_SECONDS: u64 = 300;
/// An entry that says that the clock is set back comes at most so long before that takes effect, in seconds.
const ACCEPTED_WITHIN_SECONDS: u64 = 10;

pub(super) struct Generation {
    pub(super) purpose: Purpose,
    pub(super) state: State,
    since: UnixTime,
    /// When it got there at the earliest, where the clock was set back: entries' times are not.
    pub(super) since_earliest: UnixTime,
    /// The entry that changed it last.
    pub(super) told_by: u64,
    pub(super) certificate: Vec<u8>,
    pub(super) checkpoint: String,
    /// It was told to wait for no maintenance window.
    pub(super) now: bool,
    pub(super) issuer: Option<KeyId>,
    /// Of an outside root: its key.
    outside: Option<PublicKey>,
    pub(super) tainted: bool,
    /// Since which entry it is trusted.
    prepublished: Option<u64>,
    /// notAfter of the last agent's certificate under it.
    leaf_until_seconds: u64,
}

#[derive(Default)]
pub(super) struct Authorities {
    pub(super) by_id: HashMap<KeyId, Generation>,
    /// There is an entry by which the first ledger key is a generation: a house from before there were any has none.
    pub(super) ledger_begun: bool,
    /// Ledger keys that followed another, and when they came into service: that has to be in the tree by which the other vouches for them.
    followers: Vec<(PublicKey, u64)>,
    /// Ledger keys that are out of service, and since which entry.
    retired: Vec<(PublicKey, u64)>,
    /// The clock was set back; entries' times stand still until it is there again, and do not tell how much time has passed.
    still_until: Option<UnixTime>,
    /// How far it was set back since then, and is behind entries' times at most.
    behind_micros: i64,
}

/// What an outside root is called.
fn outside(certificate: &[u8]) -> Option<KeyId> {
    certificate.last_chunk().map(|bytes: &[u8; 16]| KeyId(*bytes))
}

/// The key that a certificate is for.
fn key_of(certificate: &[u8]) -> Option<PublicKey> {
    Authority::parse(certificate).map(|parsed| parsed.key)
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
            self.behind_micros = if self.times_tell(at) { 0 } else { self.behind_micros }.saturating_add(deviation_micros);
            self.still_until = Some(at.time.plus_seconds(ACCEPTED_WITHIN_SECONDS));
            // What has happened by the time that it ran ahead has happened just now.
            let earliest = self.earliest(at);
            self.by_id.values_mut().for_each(|found| found.since_earliest = found.since_earliest.min(earliest));
        }
    }

    /// When an entry was decided, at the earliest.
    fn earliest(&self, at: &At<'_>) -> UnixTime {
        UnixTime(at.time.0.saturating_add_signed(if self.times_tell(at) { 0 } else { self.behind_micros }))
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
        let outside = if activated.key_id.is_empty() { key_of(&activated.certificate) } else { None };
        self.ledger_begun |= purpose == Purpose::Ledger;
        let mut first = Generation::new(purpose, State::Active, at.time, issuer);
        first.comes_to(State::Active, self.earliest(at), at);
        first.certificate.clone_from(&activated.certificate);
        self.by_id.insert(id, Generation { outside, ..first });
    }

    /// `signer` is whose key the intent of its certificate was signed with, where it has one.
    pub(super) fn stepped(
        &mut self,
        step: &AuthorityStepped,
        signer: Option<KeyId>,
        domain: Option<&TrustDomain>,
        keys: &Keys,
        at: &mut At<'_>,
    ) {
        let Some(id) = KeyId::from_slice(&step.key_id) else {
            return at.violates("authority-step", format_args!("a key id has 16 bytes"));
        };
        self.check_arrow(id, step, at);
        let (purpose, to) = (step.purpose(), step.to());
        let earliest = self.earliest(at);
        match to {
            State::Active => {
                self.check_activation(id, step, at);
                if purpose == Purpose::Ledger && !step.replaces.is_empty() {
                    self.follow(id, step, domain, keys, at);
                }
            }
            State::Retired => {
                self.check_retirement(id, at);
                let key = keys.public(&id, Purpose::Ledger).filter(|_| purpose == Purpose::Ledger);
                self.retired.extend(key.map(|key| (key.clone(), at.index)));
            }
            State::Prepublished if matches!(purpose, Purpose::Root | Purpose::Issuing) => {
                self.check_certificate(id, step, signer, keys, at);
            }
            _ => {}
        }
        if to == State::Active
            && let Some(before) = KeyId::from_slice(&step.replaces).and_then(|before| self.by_id.get_mut(&before))
        {
            before.comes_to(State::Retiring, earliest, at);
        }
        let is_new = !self.by_id.contains_key(&id);
        let found = self.by_id.entry(id).or_insert_with(|| Generation::new(purpose, to, at.time, None));
        // Told again, it is where it was.
        if is_new || found.state != to {
            found.comes_to(to, earliest, at);
            found.now |= is_new && step.now;
        } else {
            found.now |= step.now;
        }
        if to == State::Active {
            found.checkpoint.clone_from(&step.checkpoint);
        }
        if to == State::Prepublished && found.prepublished.is_none() {
            found.prepublished = Some(at.index);
            found.issuer = KeyId::from_slice(&step.issuer);
            found.certificate.clone_from(&step.certificate);
            if outside(&step.certificate) == Some(id) {
                found.outside = key_of(&step.certificate);
            }
        }
    }

    /// A ledger key after another: by the signatures of both over a tree that has it.
    fn follow(&mut self, id: KeyId, step: &AuthorityStepped, domain: Option<&TrustDomain>, keys: &Keys, at: &mut At<'_>) {
        let since = self.by_id.get(&id).and_then(|found| found.prepublished).unwrap_or(at.index);
        let key = |id: &KeyId| keys.public(id, Purpose::Ledger).cloned();
        let (before, after) = (KeyId::from_slice(&step.replaces).and_then(|before| key(&before)), key(&id));
        let sizes = since + 1..=at.index;
        let signed_by = |key: Option<&PublicKey>| {
            let pinned = domain.zip(key).and_then(|(domain, key)| VerifierKey::new(&ledger_name(domain), key.clone()).ok());
            let note = pinned.and_then(|pinned| note::verify(&step.checkpoint, &pinned).ok());
            note.is_some_and(|note| sizes.contains(&note.size))
        };
        if !signed_by(before.as_ref()) {
            at.violates("ledger-key", format_args!("the ledger key before it does not vouch for {id}"));
        }
        if !signed_by(after.as_ref()) {
            at.violates("ledger-key", format_args!("{id} has not signed the checkpoint that it comes into service with"));
        }
        self.followers.extend(after.map(|after| (after, since)));
    }

    /// Whether a key came into service within the first `size` entries.
    pub(super) fn has_follower(&self, key: &PublicKey, size: u64) -> bool {
        self.followers.iter().any(|(follower, since)| follower == key && *since < size)
    }

    /// What becomes trusted is the certificate of that key, by the root over it: our own has signed an intent, an outside one is believed
    /// for nothing but its signature.
    fn check_certificate(&self, id: KeyId, step: &AuthorityStepped, signer: Option<KeyId>, keys: &Keys, at: &mut At<'_>) {
        if self.by_id.get(&id).is_some_and(|found| found.state == State::Prepublished) {
            return;
        }
        let purpose = step.purpose();
        let from_outside = purpose == Purpose::Root && outside(&step.certificate) == Some(id);
        let Some(certificate) = Authority::parse(&step.certificate) else {
            return at.violates("authority", format_args!("{id} has no certificate that parses"));
        };
        if !from_outside && keys.public(&id, purpose) != Some(&certificate.key) {
            at.violates("authority", format_args!("the certificate of {id} is another key's"));
        }
        let by_issuer = if purpose == Purpose::Root {
            if from_outside { certificate.is_signed_by(&certificate.key) } else { signer == Some(id) }
        } else {
            let issuer = KeyId::from_slice(&step.issuer).and_then(|id| self.by_id.get(&id).map(|found| (id, found)));
            let Some((root, found)) = issuer.filter(|(_, root)| root.purpose == Purpose::Root && is_trusted(root.state)) else {
                return at.violates("authority-step", format_args!("the root over it is not trusted"));
            };
            if found.tainted {
                at.violates("authority-tainted", format_args!("the root over {id} is tainted"));
            }
            found.outside.as_ref().map_or(signer == Some(root), |root| certificate.is_signed_by(root))
        };
        if !by_issuer {
            at.violates("authority", format_args!("the certificate of {id} is not signed by the root over it"));
        }
    }

    fn check_activation(&self, id: KeyId, step: &AuthorityStepped, at: &mut At<'_>) {
        let before = self.active(step.purpose());
        if before != KeyId::from_slice(&step.replaces) {
            at.violates("authority-step", format_args!("another one is active than the one that is replaced"));
        }
        let tainted = before.and_then(|before| self.by_id.get(&before)).is_some_and(|before| before.tainted);
        if self.by_id.get(&id).is_some_and(|found| found.tainted) {
            at.violates("authority-tainted", format_args!("{id} is tainted, and comes to sign"));
        }
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
        let Some((id, found)) = KeyId::from_slice(&tainted.key_id)
            .and_then(|id| self.by_id.get(&id).map(|found| (id, found)))
            .filter(|(_, found)| found.state != State::Destroyed)
        else {
            return at.violates("authority-tainted", format_args!("no authority has this key"));
        };
        let root = if found.purpose == Purpose::Root { Some(id) } else { found.issuer };
        let earliest = self.earliest(at);
        for (other, generation) in self.by_id.iter_mut().filter(|(_, found)| found.state != State::Destroyed) {
            let of_the_root = root.is_some() && (Some(*other) == root || generation.issuer == root);
            if *other == id || of_the_root {
                (generation.tainted, generation.told_by) = (true, at.index);
                generation.since_earliest = generation.since_earliest.min(earliest);
            }
        }
    }

    /// A key that was planned for was given up. Nothing comes back from there, as from what is destroyed.
    pub(super) fn abandoned(&mut self, id: &[u8], at: &At<'_>) {
        let earliest = self.earliest(at);
        if let Some(found) = KeyId::from_slice(id).and_then(|id| self.by_id.get_mut(&id)) {
            found.comes_to(State::Destroyed, earliest, at);
        }
    }

    /// Since which entry a ledger key is out of service.
    pub(super) fn ledger_key_retired(&self, key: &PublicKey) -> Option<u64> {
        self.retired.iter().find(|(retired, _)| retired == key).map(|(_, since)| *since)
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
        Self {
            purpose,
            state,
            since,
            since_earliest: since,
            told_by: 0,
            certificate: Vec::new(),
            checkpoint: String::new(),
            now: false,
            issuer,
            outside: None,
            tainted: false,
            prepublished: None,
            leaf_until_seconds: 0,
        }
    }

    fn comes_to(&mut self, state: State, earliest: UnixTime, at: &At<'_>) {
        (self.state, self.since, self.since_earliest, self.told_by) = (state, at.time, earliest, at.index);
    }

    /// When it got there by the entry's time, which is the latest.
    pub(super) fn since_latest(&self) -> UnixTime {
        self.since
    }
}

//! Offline verification: what the ledger says, held against what keyward promises.
//!
//! Owns: [`Verifier`], which is fed the stored entries in order, and its [`Report`]. Promises: every entry is hashed and
//! decoded once; memory grows with agents, their keys and live certificates, not with entries; a finding has a rule with a stable name.
//! It shares no code with what writes the ledger but the wire types and the tree, and believes nothing but the pinned key.
//! Never: a database, a clock.
//!
//! | rule | what was found |
//! |---|---|
//! | `entry-malformed` | bytes that are no entry, or an entry of a kind this version does not know |
//! | `index`, `time` | an index that is not the position; a time before the previous one |
//! | `genesis` | no genesis first, another one later, or one of another ledger than the checkpoint's |
//! | `root`, `truncated` | another root than the checkpoint's; fewer entries than the checkpoint says |
//! | `key-intent`, `key-settled`, `key-spki` | a key intended twice; settled without an intent or twice; not a key of its algorithm |
//! | `authority` | a certificate in force that is not the one a released intent signed, of another key, or not by the root over it |
//! | `authority-step`, `authority-overlap` | an arrow that does not lead there; a root that signs before its bundle can be everywhere |
//! | `authority-retired` | one retired over a certificate in force |
//! | `authority-tainted` | a taint of nobody's key; one that comes to sign all the same, or has a certificate by a root that is |
//! | `authority-row` | a row of an authority, by which the daemon goes, that is not what the entries make of it |
//! | `ledger-key` | a ledger key that the one before it did not vouch for; a checkpoint by one that was out of service |
//! | `intent-key` | an intent for a key whose generation does not sign that, or which has another purpose |
//! | `intent-agent`, `intent-epoch` | an intent for an agent that is not enrolled, or of an epoch that has not begun |
//! | `intent-tbs`, `intent-identity`, `intent-freshness` | bytes that are no certificate or CRL; another identity; a life beyond the appraisal |
//! | `serial` | a serial of a certificate that has not expired, again |
//! | `crl-number`, `crl-incomplete` | a CRL number that does not grow; a denied certificate that a CRL does not list |
//! | `outcome-intent`, `outcome-twice` | an outcome of no intent; a second one |
//! | `outcome-restart` | a release of an intent from before a restart |
//! | `intents-open` | more open intents than a daemon can have |
//! | `released-quarantined`, `released-denied` | a release to an agent in quarantine; of an epoch that is denied (promise 5) |
//! | `sequence` | a release that does not follow the one before it |
//! | `signature` | a signature that is not the named key's over the intent's bytes |
//! | `agent-key` | a key of an agent that is denied, of a name that is taken, or changed after its end; a name that is not its thumbprint |
//! | `sign-key`, `sign-digest`, `sign-budget` | an intent to sign with a key that may not, of bytes that are no digests, beyond the budget |
//! | `wrapping`, `wrapping-retired` | a key that comes under a wrapping key that is not active; one retired over a key that may sign |
//! | `rewrapped` | a wrapped key of nobody's that is wrapped anew; one that may not sign any more, or that may and is kept no longer |
//! | `released-ended` | signatures released by a key that was disabled or destroyed by then |
//! | `reserved`, `sealed` | signatures reserved for who is denied or beyond the budget; a seal of no open reservation, or of more than it had |
//! | `enrolled`, `quarantined`, `reinstated` | an agent enrolled twice; a quarantine or release of the wrong agent or epoch |

mod agent_keys;
mod agents;
mod authorities;
mod authority_rows;
#[cfg(test)]
mod authority_tests;
#[cfg(test)]
mod book;
mod intents;
mod keys;
mod tbs;
#[cfg(test)]
mod tests;
#[cfg(test)]
mod wrapping_tests;

use std::fmt;

use prost::Message as _;

use super::generation::Generation;
use super::merkle::{Tree, empty_root, leaf_hash};
use super::note::{Checkpoint, ledger_name};
use crate::model::{Digest, PublicKey, TrustDomain, UnixTime};
use crate::proto::entry::Body;
use crate::proto::{AuthorityState, Entry, Genesis, Purpose, Released};

/// Findings that are kept; the rest are counted.
pub const VIOLATIONS_KEPT: usize = 1000;
/// Intents a daemon can have open at once: the longest ledger queue that can be configured.
pub const OPEN_INTENTS_MAX: usize = 65_536;

/// Something that must not be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Violation {
    /// Position of the entry that shows it.
    pub index: u64,
    /// What was broken: a stable name, see the module's table.
    pub rule: &'static str,
    /// For people.
    pub detail: String,
}

/// What was read, and what was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// From the genesis.
    pub trust_domain: Option<TrustDomain>,
    /// Entries read.
    pub entries: u64,
    /// Entries below the newest checkpoint; the others are not yet sealed.
    pub size_sealed: u64,
    /// Computed over all entries read.
    pub root: Digest,
    /// Of the first entry and the last.
    pub time: Option<(UnixTime, UnixTime)>,
    /// Agents enrolled.
    pub agents: u64,
    /// Intents.
    pub intents: u64,
    /// Certificates released, authorities' and the server's included.
    pub certificates: u64,
    /// Intents that ended released: certificates and CRLs.
    pub released: u64,
    /// Intents that ended withheld.
    pub withheld: u64,
    /// Intents that ended failed.
    pub failed: u64,
    /// Intents that ended unknown.
    pub unknown: u64,
    /// Intents without an outcome, by index.
    pub open_intents: Vec<u64>,
    /// Agents' signing keys created.
    pub keys: u64,
    /// Signatures of agents' keys released, one by one or in batches.
    pub signatures: u64,
    /// Signatures of counted keys: sealed, or reserved and not sealed.
    pub signatures_counted: u64,
    /// Quarantines.
    pub quarantines: u64,
    /// Quarantines lifted.
    pub reinstatements: u64,
    /// The first [`VIOLATIONS_KEPT`].
    pub violations: Vec<Violation>,
    /// All of them.
    pub violations_total: u64,
}

impl Report {
    /// Whether nothing was found that must not be. Open intents and entries that are not yet sealed are no violations.
    #[must_use]
    pub fn holds(&self) -> bool {
        self.violations_total == 0
    }

    /// Entries that no checkpoint covers yet.
    #[must_use]
    pub fn not_yet_sealed(&self) -> u64 {
        self.entries.saturating_sub(self.size_sealed)
    }
}

/// The entry being looked at, and where what is found goes.
struct At<'v> {
    index: u64,
    time: UnixTime,
    kept: &'v mut Vec<Violation>,
    total: &'v mut u64,
}

impl At<'_> {
    fn violates(&mut self, rule: &'static str, detail: fmt::Arguments<'_>) {
        *self.total += 1;
        if self.kept.len() < VIOLATIONS_KEPT {
            self.kept.push(Violation { index: self.index, rule, detail: detail.to_string() });
        }
    }
}

/// Reads a ledger, entry by entry.
pub struct Verifier {
    /// To come, the smallest last.
    checkpoints: Vec<Checkpoint>,
    size_sealed: u64,
    tree: Tree,
    trust_domain: Option<TrustDomain>,
    time: Option<(UnixTime, UnixTime)>,
    started: u64,
    keys: keys::Keys,
    authorities: authorities::Authorities,
    agents: agents::Agents,
    agent_keys: agent_keys::AgentKeys,
    intents: intents::Intents,
    expected: Vec<(PublicKey, u64)>,
    seals: Vec<(PublicKey, u64)>,
    authority_rows: Option<(u64, Vec<Generation>)>,
    violations: Vec<Violation>,
    violations_total: u64,
}

impl Verifier {
    /// For a ledger that `checkpoints` were made of; each comes out of [`verify`](super::note::verify) with the pinned key.
    /// With `signatures` every released signature is verified, some 50 µs each.
    #[must_use]
    pub fn new(checkpoints: impl IntoIterator<Item = Checkpoint>, signatures: bool) -> Self {
        let mut checkpoints: Vec<_> = checkpoints.into_iter().collect();
        checkpoints.sort_by_key(|checkpoint| std::cmp::Reverse(checkpoint.size));
        let mut verifier = Self {
            size_sealed: checkpoints.first().map_or(0, |newest| newest.size),
            checkpoints,
            tree: Tree::new(),
            trust_domain: None,
            time: None,
            started: 0,
            keys: keys::Keys::default(),
            authorities: authorities::Authorities::default(),
            agents: agents::Agents::default(),
            agent_keys: agent_keys::AgentKeys::default(),
            intents: intents::Intents::new(signatures),
            expected: Vec::new(),
            seals: Vec::new(),
            authority_rows: None,
            violations: Vec::new(),
            violations_total: 0,
        };
        verifier.compare_roots();
        verifier
    }

    /// A key that is trusted because the one before it signed a checkpoint of `size` entries: these have to tell of it.
    pub fn expect_follower(&mut self, key: PublicKey, size: u64) {
        self.expected.push((key, size));
    }

    /// A checkpoint of `size` entries counts because this key has signed it: it has to have been in service then.
    pub fn expect_in_service(&mut self, key: PublicKey, size: u64) {
        self.seals.push((key, size));
    }

    /// The rows of the authorities that the file had when it had `size` entries. To be told before the first of them is taken.
    pub fn expect_authorities(&mut self, size: u64, rows: Vec<Generation>) {
        self.authority_rows = Some((size, rows));
    }

    /// Takes the next entry, as stored.
    pub fn entry(&mut self, stored: &[u8]) {
        let index = self.tree.size();
        self.tree.push(leaf_hash(stored), &mut Vec::new());
        match Entry::decode(stored) {
            Ok(Entry { index: own, time_unix_micros, body: Some(body) }) => {
                let time = UnixTime(time_unix_micros);
                let (first, last) = self.time.unwrap_or((time, time));
                self.time = Some((first, last.max(time)));
                let mut at = At { index, time, kept: &mut self.violations, total: &mut self.violations_total };
                if own != index {
                    at.violates("index", format_args!("the entry at {index} says it is {own}"));
                }
                if time < last {
                    at.violates("time", format_args!("{time} comes after {last}"));
                }
                self.body(index, time, &body);
            }
            Ok(_) => self.at(index).violates("entry-malformed", format_args!("an entry of an unknown kind")),
            Err(error) => self.at(index).violates("entry-malformed", format_args!("{error}")),
        }
        self.compare_roots();
        if self.authority_rows.as_ref().is_some_and(|(size, _)| *size == self.tree.size()) {
            self.hold_authorities();
        }
    }

    fn hold_authorities(&mut self) {
        let Some((size, rows)) = self.authority_rows.take() else { return };
        let time = self.time.map_or(UnixTime(0), |(_, last)| last);
        let (kept, total) = (&mut self.violations, &mut self.violations_total);
        self.authorities.hold(&rows, &self.keys, &mut At { index: size.saturating_sub(1), time, kept, total });
    }

    fn at(&mut self, index: u64) -> At<'_> {
        let time = self.time.map_or(UnixTime(0), |(_, last)| last);
        At { index, time, kept: &mut self.violations, total: &mut self.violations_total }
    }

    fn body(&mut self, index: u64, time: UnixTime, body: &Body) {
        let at = &mut At { index, time, kept: &mut self.violations, total: &mut self.violations_total };
        if (index == 0) != matches!(body, Body::Genesis(_)) {
            at.violates("genesis", format_args!("the genesis is the first entry and the only one"));
        }
        match body {
            Body::Genesis(genesis) => {
                self.trust_domain = self.trust_domain.take().or_else(|| domain(genesis, &self.checkpoints, at))
            }
            Body::Started(_) => self.started = index,
            Body::KeyIntended(key) => self.keys.intended(key, at),
            Body::KeyActivated(key) => self.keys.activated(key, at),
            Body::KeyAbandoned(key) => {
                self.keys.abandoned(key, at);
                self.authorities.abandoned(&key.key_id, at);
            }
            Body::AuthorityActivated(authority) => {
                self.intents.authority(authority, &self.keys, at);
                self.authorities.activated(authority, at);
            }
            Body::AuthorityStepped(step) => {
                self.intents.authority_stepped(step, &self.keys, at);
                let signer = self.intents.signer_of_authority(step.intent);
                self.authorities.stepped(step, signer, self.trust_domain.as_ref(), &self.keys, at);
                if step.purpose() == Purpose::Wrapping && step.to() == AuthorityState::Retired {
                    self.agent_keys.unwraps_no_more(&step.key_id, &self.agents, at);
                }
            }
            Body::AuthorityTainted(tainted) => self.authorities.tainted(tainted, at),
            Body::Intended(intent) => {
                let right = self.authorities.may_sign(intent.kind(), &intent.key_id, &self.keys);
                let until = self.intents.intended(intent, right, self.trust_domain.as_ref(), &mut self.agents, at);
                self.authorities.leaf_until(&intent.key_id, until);
            }
            Body::Released(released) => self.released(released, index, time),
            Body::AgentKeyCreated(created) => {
                self.agent_keys.created(created, &mut self.keys, &self.authorities, &self.agents, at)
            }
            Body::AgentKeyRotated(rotated) => {
                self.agent_keys.rotated(rotated, &mut self.keys, &self.authorities, &self.agents, at)
            }
            Body::AgentKeysRewrapped(rewrapped) => self.agent_keys.rewrapped(rewrapped, &self.authorities, &self.agents, at),
            Body::AgentKeyDisabled(ended) => self.agent_keys.disabled(&ended.agent, ended.epoch, &ended.name, &self.agents, at),
            Body::AgentKeyObjectEnded(ended) => self.agent_keys.object_ended(ended, &self.agents, at),
            Body::AgentKeysForgotten(gone) => self.agent_keys.forgotten(gone, &self.agents, at),
            Body::AgentKeyDestroyed(ended) => self.agent_keys.destroyed(&ended.agent, ended.epoch, &ended.name, &self.agents, at),
            Body::SignIntended(intent) => {
                let signer = self.agent_keys.sign_intended(intent, &self.agents, at);
                self.intents.sign_intended(signer, at);
            }
            Body::SignaturesReserved(reserved) => self.agent_keys.reserved(reserved, &self.agents, at),
            Body::SignaturesSealed(sealed) => self.agent_keys.sealed(sealed, at),
            Body::Withheld(withheld) => self.intents.withheld(withheld.intent, at),
            Body::Failed(failed) => self.intents.failed(failed.intent, at),
            Body::Unknown(unknown) => self.intents.unknown(unknown.intent, &mut self.agents, at),
            Body::Enrolled(enrolled) => self.agents.enrolled(enrolled, at),
            Body::Quarantined(quarantined) => self.agents.quarantined(quarantined, at),
            Body::Reinstated(reinstated) => self.agents.reinstated(reinstated, at),
            Body::ClockAccepted(accepted) => self.authorities.clock_accepted(accepted.deviation_micros, at),
            Body::Stopped(_)
            | Body::HsmUnlocked(_)
            | Body::RotationPaused(_)
            | Body::RotationResumed(_)
            | Body::OrphansDestroyed(_)
            | Body::Refused(_)
            | Body::RefusalsCounted(_) => {}
        }
    }

    fn released(&mut self, released: &Released, index: u64, time: UnixTime) {
        let at = &mut At { index, time, kept: &mut self.violations, total: &mut self.violations_total };
        if let Some(signer) = self.intents.released(released, self.started, &self.keys, &mut self.agents, at) {
            self.agent_keys.released(&signer, &self.agents, at);
        }
    }

    fn compare_roots(&mut self) {
        let size = self.tree.size();
        while let Some(checkpoint) = self.checkpoints.pop_if(|next| next.size == size) {
            let root = self.tree.root();
            if root != checkpoint.root {
                let detail = format_args!("the first {size} entries have root {root}, the checkpoint says {}", checkpoint.root);
                self.at(size.saturating_sub(1)).violates("root", detail);
            }
        }
    }

    /// What follows from all entries taken.
    #[must_use]
    pub fn finish(mut self) -> Report {
        let entries = self.tree.size();
        self.hold_authorities();
        for beyond in std::mem::take(&mut self.checkpoints) {
            let detail = format_args!("the checkpoint is of {} entries, there are {entries}", beyond.size);
            self.at(entries.saturating_sub(1)).violates("truncated", detail);
        }
        for (key, size) in std::mem::take(&mut self.expected) {
            if !self.authorities.has_follower(&key, size) {
                let detail = format_args!("the first {size} entries do not tell of the ledger key {}", key.digest());
                self.at(size.saturating_sub(1)).violates("ledger-key", detail);
            }
        }
        for (key, size) in std::mem::take(&mut self.seals) {
            if let Some(retired) = self.authorities.ledger_key_retired(&key).filter(|retired| *retired < size) {
                let detail = format_args!("the checkpoint of {size} entries is by a ledger key that was retired at {retired}");
                self.at(retired).violates("ledger-key", detail);
            }
        }
        let counts = self.intents.counts();
        Report {
            trust_domain: self.trust_domain,
            entries,
            size_sealed: self.size_sealed.min(entries),
            root: if entries == 0 { empty_root() } else { self.tree.root() },
            time: self.time,
            agents: self.agents.count(),
            intents: counts.intents,
            certificates: counts.certificates,
            released: counts.released,
            withheld: counts.withheld,
            failed: counts.failed,
            unknown: counts.unknown,
            open_intents: self.intents.open(),
            keys: self.agent_keys.count(),
            signatures: self.agent_keys.released_count(),
            signatures_counted: self.agent_keys.counted(),
            quarantines: self.agents.quarantines(),
            reinstatements: self.agents.reinstatements(),
            violations: self.violations,
            violations_total: self.violations_total,
        }
    }
}

fn domain(genesis: &Genesis, checkpoints: &[Checkpoint], at: &mut At<'_>) -> Option<TrustDomain> {
    let domain = match TrustDomain::parse(&genesis.trust_domain) {
        Ok(domain) => domain,
        Err(error) => {
            at.violates("genesis", format_args!("{error}"));
            return None;
        }
    };
    if let Some(other) = checkpoints.iter().find(|checkpoint| checkpoint.origin != ledger_name(&domain)) {
        at.violates("genesis", format_args!("this is the ledger of {domain}, the checkpoint is of {}", other.origin));
    }
    Some(domain)
}

/// Reads all `entries`, in order, and reports. See [`Verifier::new`].
///
/// # Errors
/// Those of `entries`. What is wrong with the ledger itself is in the report.
pub fn verify<B: AsRef<[u8]>, E>(
    entries: impl IntoIterator<Item = Result<B, E>>,
    checkpoints: impl IntoIterator<Item = Checkpoint>,
    signatures: bool,
) -> Result<Report, E> {
    let mut verifier = Verifier::new(checkpoints, signatures);
    for entry in entries {
        verifier.entry(entry?.as_ref());
    }
    Ok(verifier.finish())
}

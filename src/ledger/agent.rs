//! One agent as the book knows it, and what a claim of its means.

use std::num::NonZeroU64;

use crate::model::{AgentId, Digest, KeyTag, PublicKey, Reason, Refusal, Serial, TokenId, UnixTime};
use crate::proto::QuarantineCause;

/// What proves that the asker is the agent it says. Made by the attest room; decided upon here, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Evidence {
    /// A signature by the key of a join token.
    JoinToken(TokenId),
    /// The newest certified key, or an earlier one, has been proved.
    BoundKey {
        /// Which key was proved.
        prover: Digest,
        /// The sequence claimed.
        sequence: u64,
        /// Proved by the connection rather than by a signature of its own.
        channel_proved: bool,
    },
}

/// A certificate that has not expired (or has, less than one CRL period ago).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Live {
    /// Its serial.
    pub serial: Serial,
    /// Its key.
    pub key: KeyTag,
    /// Its notAfter.
    pub not_after: UnixTime,
    /// Its epoch.
    pub epoch: u32,
    /// The intent that it was signed under.
    pub intent: u64,
    /// Since when it is denied: the time of the quarantine's entry, in microseconds since the Unix epoch. Eight bytes, not sixteen: there is
    /// one of these for each certificate that lives.
    pub denied: Option<NonZeroU64>,
}

/// A join token, known by its public key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// Its id.
    pub id: TokenId,
    /// Ed25519.
    pub public_key: [u8; 32],
    /// When it stops being good.
    pub expires: UnixTime,
    /// The one key it was spent for.
    pub spent_for: Option<Digest>,
}

/// How the newest intent of an agent ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ending {
    Pending,
    Released,
    /// The signature may exist: its key may be certified.
    Unknown,
    /// Failed or withheld: nothing was handed out.
    Nothing,
}

/// The newest request of an agent that became an intent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Asked {
    pub sequence: u64,
    pub key: PublicKey,
    pub not_after: UnixTime,
    pub request_hash: Digest,
    pub idempotency_hash: [u8; 16],
    pub intent: u64,
    pub ending: Ending,
}

/// Why an agent is denied.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Quarantine {
    /// Its ledger entry; `None` until that is durable.
    pub index: Option<u64>,
    /// Who wanted it.
    pub cause: QuarantineCause,
    /// In whose words.
    pub detail: String,
}

/// A certified key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Certified {
    /// The key.
    pub key: PublicKey,
    /// notAfter of its certificate.
    pub not_after: UnixTime,
}

/// What an agent has once it has asked for a certificate. Apart, because most of a large fleet sleeps.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(super) struct Bound {
    pub newest: Option<Certified>,
    pub previous: Option<PublicKey>,
    pub asked: Option<Asked>,
    pub live: Vec<Live>,
}

/// An agent's state: a fold of the ledger's entries up to `as_of`.
#[derive(Debug, Clone)]
pub(super) struct Agent {
    pub id: AgentId,
    pub epoch: u32,
    pub ttl_seconds_max: u32,
    pub rejoin_seconds: u32,
    /// What the newest certified key's next renewal has to claim.
    pub sequence: u64,
    pub token: Option<Box<Token>>,
    pub quarantine: Option<Box<Quarantine>>,
    pub bound: Option<Box<Bound>>,
    /// Released, not attested again yet.
    pub reattest: bool,
    /// Index of the newest entry folded in.
    pub as_of: u64,
    /// Counts quarantine requests, so that a release decided later than a new request is void. Not kept.
    pub denials: u32,
    /// Changed since its row was written. Not kept.
    pub dirty: bool,
    /// Refusals recorded in the second `.0`. Not kept.
    pub refusals: (u64, u8),
}

/// What the book says to a wish to sign for an agent.
#[derive(Debug)]
pub(super) enum Verdict {
    /// Go on, under this sequence.
    Accept { sequence: u64 },
    /// The same request again: its answer stands under this intent.
    Repeat { intent: u64 },
    /// No.
    Refuse(Refusal),
    /// Two copies of the agent are about: quarantine it.
    Clone { detail: String },
}

impl Agent {
    pub(super) fn new(id: AgentId, epoch: u32, ttl_seconds_max: u32, rejoin_seconds: u32, token: Token) -> Self {
        Self {
            id,
            epoch,
            ttl_seconds_max,
            rejoin_seconds,
            sequence: 0,
            token: Some(Box::new(token)),
            quarantine: None,
            bound: None,
            reattest: false,
            as_of: 0,
            denials: 0,
            dirty: false,
            refusals: (0, 0),
        }
    }

    /// Refuses a quarantined agent and a certificate or grant of an epoch that has passed.
    pub(super) fn admits(&self, epoch: u32) -> Result<(), Refusal> {
        if let Some(quarantine) = &self.quarantine {
            let refusal = Refusal::new(Reason::AgentQuarantined, "this agent is quarantined; an operator has to release it");
            return Err(match quarantine.index {
                Some(index) => refusal.recorded_at(index),
                None => refusal,
            });
        }
        if epoch != self.epoch {
            return Err(Refusal::new(Reason::EpochStale, "this credential was taken back; attest again with a new join token"));
        }
        Ok(())
    }

    pub(super) fn live(&self) -> &[Live] {
        self.bound.as_ref().map_or(&[], |bound| &bound.live)
    }

    /// Whether a certificate for this key was asked for and may have been handed out, as far back as that is of interest.
    fn has_certified(&self, key: &KeyTag) -> bool {
        self.live().iter().any(|live| live.key == *key) || self.bound_keys().any(|bound| bound.digest().tag() == *key)
    }

    /// Certificates of the current epoch that have not expired.
    pub(super) fn live_at(&self, now: UnixTime) -> impl Iterator<Item = &Live> {
        self.live().iter().filter(move |live| live.not_after > now && live.epoch == self.epoch)
    }

    /// Keys with a certificate of the current epoch that has not expired. Keys, not certificates: a key that is asked for again because
    /// nobody knows whether it was signed counts once.
    pub(super) fn live_keys(&self, now: UnixTime) -> usize {
        let mut keys: Vec<&KeyTag> = self.live_at(now).map(|live| &live.key).collect();
        keys.sort_unstable();
        keys.dedup();
        keys.len()
    }

    /// Whether `live` is denied: of a past epoch, or of a quarantined agent.
    pub(super) fn denies(&self, live: &Live) -> bool {
        self.quarantine.is_some() || live.epoch < self.epoch
    }

    /// The key whose certificate the agent was last handed, or may have been: an answer is on its way before its outcome is folded in.
    pub(super) fn bound_keys(&self) -> impl Iterator<Item = &PublicKey> {
        let bound = self.bound.as_deref();
        let maybe = |asked: &&Asked| matches!(asked.ending, Ending::Unknown | Ending::Pending);
        let unknown = bound.and_then(|b| b.asked.as_ref()).filter(maybe).map(|asked| &asked.key);
        let newest = bound.and_then(|b| b.newest.as_ref()).map(|certified| &certified.key);
        let previous = bound.and_then(|b| b.previous.as_ref());
        unknown.into_iter().chain(newest).chain(previous)
    }

    /// Decides on a claim. `key` is the new key, `now` trusted. Pure: what follows is applied from the entry.
    pub(super) fn weigh(
        &self,
        evidence: &Evidence,
        key: &Digest,
        request_hash: &Digest,
        idempotency_hash: &[u8; 16],
        now: UnixTime,
        live_max: usize,
    ) -> Verdict {
        let asked = self.bound.as_ref().and_then(|bound| bound.asked.as_ref());
        let repeated = |asked: &Asked| self.weigh_repeat(asked, key, request_hash, idempotency_hash);
        let verdict = match evidence {
            Evidence::JoinToken(id) => match self.weigh_token(*id, key, now) {
                Err(refusal) => return Verdict::Refuse(refusal),
                Ok(()) => match asked.filter(|asked| asked.key.digest() == *key) {
                    Some(asked) => repeated(asked),
                    None => Verdict::Accept { sequence: self.sequence },
                },
            },
            Evidence::BoundKey { prover, sequence, .. } => self.weigh_bound_key(prover, *sequence, key, asked, &repeated),
        };
        if !matches!(verdict, Verdict::Accept { .. }) {
            return verdict;
        }
        if self.live().iter().any(|live| live.key == key.tag()) && asked.is_none_or(|asked| asked.key.digest() != *key) {
            return Verdict::Refuse(Refusal::new(Reason::KeyInUse, "make a new key for every certificate"));
        }
        let again = self.live_at(now).any(|live| live.key == key.tag());
        if !again && self.live_keys(now) >= live_max {
            let wait = self
                .live_at(now)
                .map(|live| live.not_after)
                .min()
                .map_or(0, |first| first.seconds().saturating_sub(now.seconds()));
            return Verdict::Refuse(
                Refusal::new(
                    Reason::RateLimited,
                    "this agent has as many unexpired certificates as it may; wait for one to expire",
                )
                .retry_after(std::time::Duration::from_secs(wait.max(1))),
            );
        }
        verdict
    }

    fn weigh_token(&self, id: TokenId, key: &Digest, now: UnixTime) -> Result<(), Refusal> {
        let Some(token) = self.token.as_ref().filter(|token| token.id == id) else {
            return Err(Refusal::new(Reason::TokenUnknown, "ask the operator for a new join file"));
        };
        if token.expires <= now {
            return Err(Refusal::new(Reason::TokenExpired, "ask the operator for a new join file"));
        }
        match token.spent_for {
            Some(spent_for) if spent_for != *key => Err(spent()),
            // Spent for this key, and the agent has moved on since: the token has done its work.
            Some(_) if self.bound.as_ref().and_then(|b| b.asked.as_ref()).is_none_or(|asked| asked.key.digest() != *key) => {
                Err(spent())
            }
            _ => Ok(()),
        }
    }

    fn weigh_bound_key(
        &self,
        prover: &Digest,
        sequence: u64,
        key: &Digest,
        asked: Option<&Asked>,
        repeated: &dyn Fn(&Asked) -> Verdict,
    ) -> Verdict {
        let newest = self.bound.as_ref().and_then(|bound| bound.newest.as_ref()).map(|certified| certified.key.digest());
        // An answer that was on its way when the daemon died: who proves its key has received it.
        let delivered = asked.filter(|asked| asked.ending == Ending::Unknown && asked.key.digest() == *prover);
        let (expected, newest) = match delivered {
            Some(asked) if sequence > asked.sequence => (asked.sequence + 1, Some(*prover)),
            _ => (self.sequence, newest),
        };
        if sequence > expected {
            return Verdict::Refuse(Refusal::new(
                Reason::SequenceAhead,
                "this daemon has not issued what the claim builds on; an operator has to look (was a backup restored?)",
            ));
        }
        if sequence == expected {
            if newest != Some(*prover) {
                return Verdict::Refuse(Refusal::new(Reason::ProofInvalid, "prove the newest certified key"));
            }
            if newest == Some(*key) {
                return Verdict::Refuse(Refusal::new(Reason::KeyInUse, "make a new key for every certificate"));
            }
            return match asked.filter(|asked| asked.sequence == sequence) {
                Some(asked) => repeated(asked),
                None => Verdict::Accept { sequence },
            };
        }
        // Whoever has stolen an issuing key proves whatever key they like; a copy proves one that was certified.
        if !self.has_certified(&prover.tag()) {
            return Verdict::Refuse(Refusal::new(Reason::ProofInvalid, "prove the newest certified key"));
        }
        // A claim behind: the newest answer was lost, or a second copy of the agent is about.
        match asked.filter(|asked| asked.sequence == sequence && sequence + 1 == expected) {
            Some(asked) => repeated(asked),
            None => Verdict::Clone { detail: format!("sequence {sequence} was claimed where {expected} is due") },
        }
    }

    /// A claim to a sequence that has been asked for already.
    fn weigh_repeat(&self, asked: &Asked, key: &Digest, request_hash: &Digest, idempotency_hash: &[u8; 16]) -> Verdict {
        if asked.idempotency_hash == *idempotency_hash && asked.request_hash != *request_hash {
            return Verdict::Refuse(Refusal::new(
                Reason::IdempotencyMismatch,
                "repeat a request with the same bytes, or send a new one with a new idempotency key",
            ));
        }
        if asked.key.digest() != *key {
            return Verdict::Clone { detail: format!("sequence {} was claimed for two keys", asked.sequence) };
        }
        match asked.ending {
            Ending::Released => Verdict::Repeat { intent: asked.intent },
            Ending::Pending => Verdict::Refuse(
                Refusal::new(Reason::RequestInProgress, "the same request is being worked on; repeat it in a moment")
                    .retry_after(std::time::Duration::from_millis(200)),
            ),
            // Never signed twice: a new intent with a new serial.
            Ending::Unknown | Ending::Nothing => Verdict::Accept { sequence: asked.sequence },
        }
    }
}

fn spent() -> Refusal {
    Refusal::new(Reason::TokenSpent, "this token was spent for another key; if that was not you, quarantine the agent")
}

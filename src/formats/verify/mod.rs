//! Whether a received signature is what it says, for whom and when it says.
//!
//! In two steps: `parse` reads no more than is needed to find the key (`kid`); the caller looks it up among the keys it knows, and
//! says no for an agent in quarantine; `check` verifies first and reads claims after. A key is never taken from the message.

pub mod dpop;
pub mod http_signature;
pub mod jws;
mod replay;

pub use replay::{Bounds, Memory, ReplayCache};
use replay::{Ends, Over};

use super::http_signature::without_a_name;
use super::jwk::Jwk;
use super::signing::Profile;
use super::{algorithm, malformed};
use crate::model::{Algorithm, PublicKey, Reason, Refusal, UnixTime};

/// A key that may verify, with the one profile it is for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VerifyingKey {
    profile: Profile,
    kid: String,
    public: PublicKey,
}

impl VerifyingKey {
    /// A key named by its thumbprint, as every key of keyward is.
    #[must_use]
    pub fn new(profile: Profile, public: PublicKey) -> Self {
        Self { profile, kid: Jwk::thumbprint(&public), public }
    }

    /// A key that its owner named otherwise.
    #[must_use]
    pub fn named(profile: Profile, kid: impl Into<String>, public: PublicKey) -> Self {
        Self { profile, kid: kid.into(), public }
    }

    /// Whether `signed` is a message of `profile` by this key. Everything is refused before a signature is computed that
    /// is not this key's own to begin with.
    fn check(&self, profile: Profile, signed: &SignedBytes) -> Result<(), Refusal> {
        if self.profile != profile {
            return Err(Refusal::new(Reason::ProfileMismatch, "this key is for another purpose than this message"));
        }
        if profile == Profile::HttpMessageSignature && algorithm::http_name(self.public.algorithm()).is_none() {
            return Err(without_a_name());
        }
        if self.kid != signed.kid {
            return Err(unknown_kid());
        }
        if signed.algorithm.is_some_and(|named| named != self.public.algorithm()) {
            return Err(refused_algorithm());
        }
        if !algorithm::verifies(&self.public, &signed.message, &signed.signature) {
            return Err(Refusal::new(Reason::SignatureInvalid, "the signature does not fit the message and the key it names"));
        }
        Ok(())
    }
}

/// A message taken apart as far as its key can be found.
struct SignedBytes {
    kid: String,
    algorithm: Option<Algorithm>,
    message: Vec<u8>,
    signature: Vec<u8>,
}

/// When a message counts.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// The verifier's time.
    pub now: UnixTime,
    /// How far the signer's clock may be off.
    pub skew_seconds: u64,
    /// A message that would count for longer than this from now is refused; it would have to be remembered for as long.
    pub lifetime_seconds_max: u64,
}

impl Window {
    /// `made` does not lie ahead.
    fn check_made(&self, made: u64) -> Result<(), Refusal> {
        if made > self.now.seconds().saturating_add(self.skew_seconds) {
            return Err(Refusal::new(Reason::OutsideTimeWindow, "the message is from the future; compare the clocks"));
        }
        Ok(())
    }

    /// `end` has not come, and comes soon enough.
    fn check_end(&self, end: u64) -> Result<(), Refusal> {
        let now = self.now.seconds();
        if self.last_second(end) <= now {
            return Err(Refusal::new(Reason::MessageExpired, "the message has expired; make a new one"));
        }
        if end > now.saturating_add(self.skew_seconds).saturating_add(self.lifetime_seconds_max) {
            let advice = format!("make a message that counts for at most {} seconds", self.lifetime_seconds_max);
            return Err(Refusal::new(Reason::OutsideTimeWindow, advice));
        }
        Ok(())
    }

    /// When a message that ends at `end` can no longer be accepted.
    fn last_second(&self, end: u64) -> u64 {
        end.saturating_add(self.skew_seconds)
    }
}

/// `none`, an HMAC, and everything else that is not one of keyward's.
fn named_algorithm(name: &str, known_as: fn(Algorithm) -> Option<&'static str>) -> Result<Algorithm, Refusal> {
    algorithm::ALL.into_iter().find(|known| known_as(*known) == Some(name)).ok_or_else(refused_algorithm)
}

fn refused_algorithm() -> Refusal {
    Refusal::new(Reason::AlgorithmRefused, "sign with the algorithm of the key; none and HMACs are never accepted")
}

fn unknown_kid() -> Refusal {
    Refusal::new(Reason::KidUnknown, "sign with a key that this verifier knows, and name it by its kid")
}

fn elsewhere(what: &str) -> Refusal {
    Refusal::new(Reason::BindingMismatch, format!("the message is for another request: {what}"))
}

fn missing(what: &str) -> Refusal {
    malformed(format!("the message has no {what}"))
}

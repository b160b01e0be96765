//! Whether a received signature is what it says, for whom and when it says.
//!
//! In two steps: `parse` reads no more than is needed to find the key (`kid`); the caller looks it up, and says no for an agent in
//! quarantine; `check` verifies first and reads claims after.

mod replay;

pub use replay::ReplayCache;

use super::jwk::Jwk;
use super::signing::Profile;
use crate::model::{PublicKey, UnixTime};

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
}

/// When a message counts.
#[derive(Debug, Clone, Copy)]
pub struct Window {
    /// The verifier's time.
    pub now: UnixTime,
    /// How far the signer's clock may be off.
    pub skew_seconds: u64,
    /// A message that is valid for longer than this is refused.
    pub lifetime_seconds_max: u64,
}

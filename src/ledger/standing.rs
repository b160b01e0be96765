//! Where an agent stands at one point of the ledger.

use crate::model::{AgentId, UnixTime};

/// What the ledger says of an agent that is neither unknown nor quarantined, as a decision needs it. A copy: the gate
/// looks again before anything is released.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Standing {
    /// Whose.
    pub agent: AgentId,
    /// In force; everything of an earlier epoch is denied.
    pub epoch: u32,
    /// Longest lifetime its enrolment grants.
    pub ttl_seconds_max: u32,
    /// Keys with a certificate that has not expired, those with an unknown outcome included.
    pub live_certificates: usize,
    /// When the first of them expires; `None` if there are none.
    pub oldest_live_not_after: Option<UnixTime>,
}

//! Evidence becomes an appraisal.
//!
//! Owns: [`Ask`] (a request, hashed as received and parsed after), [`Challenge`], [`Appraisal`]. Promises: evidence is bound to the
//! key being certified, to the request's bytes and to the moment; an appraisal names the identity, nothing else does. Never:
//! decides what is granted, keeps a secret, reaches out to a network.

mod ask;
mod bound_key;
mod join_token;

pub use ask::{Ask, Challenge};

use crate::authn::AgentConnection;
use crate::ledger::{Evidence, Ledger};
use crate::model::{AgentId, Csr, Refusal, TrustDomain, UnixTime};

/// How long evidence that was verified just now is fresh, in seconds: the longest lifetime any certificate resting on it can have.
const FRESH_SECONDS: u64 = 86_400;

/// How the asker is reached.
pub enum Contact<'a> {
    /// An `Attest` stream, with its nonce.
    Stream(&'a Challenge),
    /// A connection whose handshake proved an agent's certificate.
    Connection(&'a AgentConnection),
}

/// Who the asker is, by verified evidence. Made only here.
#[derive(Debug, Clone)]
pub struct Appraisal {
    agent: AgentId,
    epoch: u32,
    evidence: Evidence,
    fresh_until: UnixTime,
}

impl Appraisal {
    /// The identity.
    #[must_use]
    pub fn agent(&self) -> &AgentId {
        &self.agent
    }

    /// The epoch the evidence belongs to.
    #[must_use]
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// What it rests on.
    #[must_use]
    pub fn evidence(&self) -> &Evidence {
        &self.evidence
    }

    /// When it stops being good: no certificate outlives it.
    #[must_use]
    pub fn fresh_until(&self) -> UnixTime {
        self.fresh_until
    }
}

/// A refusal, and whose it is if the evidence said that much.
#[derive(Debug)]
pub struct Rejected {
    /// Known only once a proof verified.
    pub agent: Option<AgentId>,
    /// Why.
    pub refusal: Refusal,
}

impl From<Refusal> for Rejected {
    fn from(refusal: Refusal) -> Self {
        Self { agent: None, refusal }
    }
}

/// Appraises the evidence of `ask` for the key of `csr`. `now` is trusted.
///
/// # Errors
/// `PROOF_INVALID`, `TOKEN_UNKNOWN`, `AGENT_UNKNOWN`, `REJOIN_EXPIRED`, `CALLER_NOT_ALLOWED`, … What a verified proof cannot settle (a spent
/// token, a sequence) is decided by the ledger, in order.
pub fn appraise(
    ledger: &Ledger,
    domain: &TrustDomain,
    contact: &Contact<'_>,
    csr: &Csr,
    ask: &Ask,
    now: UnixTime,
) -> Result<Appraisal, Rejected> {
    let (agent, epoch, evidence) = match ask.claim() {
        ask::Claim::Join(token) => join_token::appraise(ledger, domain, contact, csr, ask, token)?,
        ask::Claim::BoundKey { agent, sequence } => {
            bound_key::appraise(ledger, domain, contact, csr, ask, agent, *sequence, now)?
        }
    };
    Ok(Appraisal { agent, epoch, evidence, fresh_until: now.plus_seconds(FRESH_SECONDS) })
}

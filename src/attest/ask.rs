//! A request, and the challenge it answers.

use std::time::{Duration, Instant};

use prost::Message as _;

use crate::ledger::Ledger;
use crate::model::{AgentId, Digest, Reason, Refusal, SecretBytes, TokenId};
use crate::proto;

/// Largest request, in bytes.
const ASK_BYTES_MAX: usize = 6144;
/// Largest proof: an Ed25519 signature has 64 bytes, a P-256 one in DER at most 72.
const PROOF_BYTES_MAX: usize = 80;

/// 32 random bytes, good for one answer within ten seconds. Lives in its stream's task and nowhere else.
pub struct Challenge {
    nonce: [u8; 32],
    expires: Instant,
}

impl Challenge {
    /// How long it is good.
    pub const LIFETIME: Duration = Duration::from_secs(10);

    /// A new one.
    #[must_use]
    pub fn new() -> Self {
        let mut nonce = [0; 32];
        nonce.copy_from_slice(SecretBytes::random::<32>().reveal());
        Self { nonce, expires: Instant::now() + Self::LIFETIME }
    }

    /// What the client has to bind into its proof.
    #[must_use]
    pub fn nonce(&self) -> &[u8; 32] {
        &self.nonce
    }

    pub(super) fn is_expired(&self) -> bool {
        Instant::now() >= self.expires
    }
}

impl Default for Challenge {
    fn default() -> Self {
        Self::new()
    }
}

/// What the asker says it has.
#[derive(Debug, Clone)]
pub(super) enum Claim {
    Join(TokenId),
    BoundKey { agent: AgentId, sequence: u64 },
}

/// A request as received, with its proof: hashed first, parsed after.
#[derive(Debug, Clone)]
pub struct Ask {
    hash: Digest,
    csr: Vec<u8>,
    idempotency_hash: [u8; 16],
    ttl_seconds: Option<u32>,
    claim: Claim,
    proof: Vec<u8>,
}

impl Ask {
    /// Parses `bytes`.
    ///
    /// # Errors
    /// `REQUEST_TOO_LARGE`, `MALFORMED_REQUEST`.
    pub fn parse(bytes: &[u8], proof: Vec<u8>) -> Result<Self, Refusal> {
        if bytes.len() > ASK_BYTES_MAX || proof.len() > PROOF_BYTES_MAX {
            return Err(Refusal::new(Reason::RequestTooLarge, "send an ask of at most 6,144 bytes and a proof of at most 80"));
        }
        let malformed = |what: &str| Refusal::new(Reason::MalformedRequest, format!("send a well-formed Ask ({what})"));
        let hash = Digest::of(bytes);
        let ask = proto::Ask::decode(bytes).map_err(|error| malformed("it does not parse").because(error))?;
        let key = ask.idempotency_key.as_bytes();
        if key.is_empty() || key.len() > 64 || !key.iter().all(u8::is_ascii_graphic) {
            return Err(malformed("the idempotency key has 1 to 64 printable ASCII characters"));
        }
        let claim = match ask.claim {
            Some(proto::ask::Claim::Join(join)) => {
                Claim::Join(TokenId::from_slice(&join.token_id).ok_or_else(|| malformed("a token id has 16 bytes"))?)
            }
            Some(proto::ask::Claim::BoundKey(bound)) => Claim::BoundKey {
                agent: AgentId::parse(&bound.agent).map_err(|error| malformed("the agent's name").because(error))?,
                sequence: bound.sequence,
            },
            None => return Err(malformed("it claims nothing")),
        };
        let mut idempotency_hash = [0; 16];
        idempotency_hash.copy_from_slice(&Digest::of(key).0[..16]);
        Ok(Self {
            hash,
            csr: ask.csr,
            idempotency_hash,
            ttl_seconds: (ask.ttl_seconds != 0).then_some(ask.ttl_seconds),
            claim,
            proof,
        })
    }

    /// SHA-256 of the bytes as received.
    #[must_use]
    pub fn hash(&self) -> &Digest {
        &self.hash
    }

    /// The signing request inside, not looked at yet.
    #[must_use]
    pub fn csr(&self) -> &[u8] {
        &self.csr
    }

    /// First 16 bytes of SHA-256 of the idempotency key.
    #[must_use]
    pub fn idempotency_hash(&self) -> [u8; 16] {
        self.idempotency_hash
    }

    /// Wished lifetime.
    #[must_use]
    pub fn ttl_seconds(&self) -> Option<u32> {
        self.ttl_seconds
    }

    /// The agent it says it is from. Not proved: good for nothing but looking things up.
    #[must_use]
    pub fn claimant(&self, ledger: &Ledger) -> Option<AgentId> {
        match &self.claim {
            Claim::Join(token) => ledger.token(token).map(|(agent, ..)| agent),
            Claim::BoundKey { agent, .. } => Some(agent.clone()),
        }
    }

    pub(super) fn claim(&self) -> &Claim {
        &self.claim
    }

    pub(super) fn proof(&self) -> &[u8] {
        &self.proof
    }
}

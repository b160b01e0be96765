//! Evidence: a signature by the key of a join token. Proves that somebody gave the asker this token; good once, for one key.

use crate::ledger::{Evidence, Ledger};
use crate::model::{AgentId, Algorithm, Csr, PublicKey, Reason, Refusal, TokenId, TrustDomain, attest_binder};

use super::{Ask, Contact, Rejected};

pub(super) fn appraise(
    ledger: &Ledger,
    domain: &TrustDomain,
    contact: &Contact<'_>,
    csr: &Csr,
    ask: &Ask,
    id: &TokenId,
) -> Result<(AgentId, u32, Evidence), Rejected> {
    let Contact::Stream(challenge) = contact else {
        return Err(Refusal::new(Reason::CallerNotAllowed, "spend a join token over Attest").into());
    };
    if challenge.is_expired() {
        return Err(
            Refusal::new(Reason::ChallengeExpired, "open a new stream and answer its challenge within ten seconds").into()
        );
    }
    // One refusal for a token that never was, one that was replaced, and one of another trust domain.
    let unknown = || Refusal::new(Reason::TokenUnknown, "ask the operator for a new join file");
    let (agent, epoch, token) = ledger.token(id).ok_or_else(unknown)?;
    let key = PublicKey::from_raw(Algorithm::Ed25519, &token.public_key).map_err(Refusal::internal)?;
    let binder = attest_binder(challenge.nonce(), &csr.key().digest(), ask.hash(), domain);
    if !ledger.meter().proof.measure(|| key.verifies(&binder.0, ask.proof())) {
        return Err(Refusal::new(Reason::ProofInvalid, "sign the binder of this stream with the token's key").into());
    }
    Ok((agent, epoch, Evidence::JoinToken(*id)))
}

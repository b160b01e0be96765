//! Evidence: the newest key certified for the agent. Proves that the asker is whom the last certificate was given to.

use crate::ledger::{Evidence, Ledger};
use crate::model::{AgentId, Csr, Digest, Reason, Refusal, TrustDomain, UnixTime, attest_binder, renew_binder};

use super::{Ask, Contact, Rejected};

#[expect(clippy::too_many_arguments, reason = "an appraisal looks at everything")]
pub(super) fn appraise(
    ledger: &Ledger,
    domain: &TrustDomain,
    contact: &Contact<'_>,
    csr: &Csr,
    ask: &Ask,
    agent: &AgentId,
    sequence: u64,
    now: UnixTime,
) -> Result<(AgentId, u32, Evidence), Rejected> {
    // A stranger is not told which agents there are.
    let unproved = || Refusal::new(Reason::ProofInvalid, "sign the binder with the newest certified key");
    let bound = ledger.bound_keys(agent).map_err(|refusal| match contact {
        Contact::Stream(_) => unproved(),
        Contact::Connection(_) => refusal,
    })?;
    let spki = csr.key().digest();
    let binder = match contact {
        Contact::Stream(challenge) => {
            if challenge.is_expired() {
                return Err(Refusal::new(
                    Reason::ChallengeExpired,
                    "open a new stream and answer its challenge within ten seconds",
                )
                .into());
            }
            attest_binder(challenge.nonce(), &spki, ask.hash(), domain)
        }
        Contact::Connection(connection) => {
            if connection.agent() != agent {
                let refusal = Refusal::new(Reason::CallerNotAllowed, "claim the agent that your certificate names");
                return Err(Rejected { agent: Some(connection.agent().clone()), refusal });
            }
            if ask.proof().is_empty() {
                // The channel is the proof: its handshake, or every renewal since, proved this key.
                let evidence = Evidence::BoundKey { prover: connection.proved(), sequence, channel_proved: true };
                return Ok((agent.clone(), connection.epoch(), evidence));
            }
            renew_binder(sequence, &spki, ask.hash(), domain)
        }
    };
    let prover = ledger
        .meter()
        .proof
        .measure(|| bound.keys.iter().find(|key| key.verifies(&binder.0, ask.proof())).map(crate::model::PublicKey::digest));
    let known = match contact {
        Contact::Connection(connection) => Some(connection.agent().clone()),
        Contact::Stream(_) => None,
    };
    if let (None, Contact::Connection(connection)) = (prover, contact)
        && bound.keys.iter().all(|key| key.digest() != connection.proved())
    {
        // A copy that fell behind: its handshake proved a key that was certified once. The ledger weighs the sequence.
        let evidence = Evidence::BoundKey { prover: connection.proved(), sequence, channel_proved: true };
        return Ok((agent.clone(), connection.epoch(), evidence));
    }
    let prover: Digest = prover.ok_or_else(|| Rejected { agent: known, refusal: unproved() })?;
    if matches!(contact, Contact::Stream(_)) {
        let until = bound.not_after.map(|not_after| not_after.plus_seconds(bound.rejoin_seconds.into()));
        if until.is_none_or(|until| until < now) {
            let refusal = Refusal::new(
                Reason::RejoinExpired,
                "the bound key was not used for too long; ask the operator for a new join file",
            );
            return Err(Rejected { agent: Some(agent.clone()), refusal });
        }
    }
    Ok((agent.clone(), bound.epoch, Evidence::BoundKey { prover, sequence, channel_proved: false }))
}

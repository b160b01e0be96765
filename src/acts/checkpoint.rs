//! The ledger's size and root, signed (C2SP tlog-checkpoint).

use std::sync::{Arc, PoisonError};

use crate::hsm::{SignError, SigningKey};
use crate::ledger::note::{Checkpoint, VerifierKey, ledger_name};
use crate::model::{KeyId, PublicKey, Reason, Refusal, TrustDomain};

use super::{Acts, hsm_refusal};

/// The pinned key for `ledger verify`.
///
/// # Errors
/// When the key is of no kind that signs notes.
pub fn verifier_key(domain: &TrustDomain, key: PublicKey) -> Result<VerifierKey, Refusal> {
    VerifierKey::new(&ledger_name(domain), key).map_err(Refusal::internal)
}

impl Acts {
    /// Signs the tree as it is now, if it has grown since the last checkpoint. Gives the size.
    ///
    /// # Errors
    /// `HSM_UNAVAILABLE`, `LEDGER_UNAVAILABLE`.
    pub async fn checkpoint(&self, last: u64) -> Result<u64, Refusal> {
        if self.ledger.edge().await?.0 == last {
            return Ok(last);
        }
        let (size, note) = self.sign_checkpoint(None).await?;
        self.ledger.keep_checkpoint(note).await?;
        Ok(size)
    }

    /// The tree as it is now, signed by the active ledger key and those that it follows: while one follows another, whoever trusts either
    /// is served. With `successor`, which is about to follow the active one, by that one, too. The active one and `successor` have to; any
    /// other that cannot is left out. What is signed starts with the origin in ASCII; a certificate's bytes of that first byte would be
    /// shorter than any certificate.
    pub(super) async fn sign_checkpoint(&self, successor: Option<&KeyId>) -> Result<(u64, String), Refusal> {
        let authorities = self.authorities()?;
        let unbound = || Refusal::new(Reason::HsmUnavailable, "the token cannot find the key of the next ledger authority now");
        let successor = successor.map(|id| authorities.key(id).ok_or_else(unbound)).transpose()?;
        let (size, root) = self.ledger.edge().await?;
        // Looked at after the edge: what the book has retired by then seals nothing of it.
        let (generations, _) = self.ledger.generations();
        let in_service = |key: &SigningKey| generations.iter().any(|found| found.key_id == key.id() && found.is_trusted());
        if !in_service(authorities.ledger_key()) {
            return Err(Refusal::new(Reason::AuthoritySuperseded, "another ledger key signs by now; ask again"));
        }
        let name = ledger_name(&self.domain);
        let checkpoint = Checkpoint { origin: name.clone(), size, root };
        let body: Arc<[u8]> = checkpoint.body().into_bytes().into();
        let (mut signatures, mut left_out) = (Vec::new(), None);
        let active = authorities.ledger_key().id();
        for key in authorities.ledger_keys().iter().filter(|key| in_service(key)).chain(successor) {
            match key.sign(Arc::clone(&body)).await {
                Ok(signature) => signatures.push((key.public(), signature)),
                Err(SignError::NotSigned(error) | SignError::Unknown(error)) => {
                    let refusal = hsm_refusal(error);
                    if key.id() == active || successor.is_some_and(|successor| successor.id() == key.id()) {
                        return Err(refusal);
                    }
                    left_out = Some((key.id(), refusal));
                }
            }
        }
        self.tell_left_out(left_out);
        Ok((size, checkpoint.signed(&name, &signatures)))
    }

    /// One line when checkpoints begin to go without a signature, and one when they have all again.
    fn tell_left_out(&self, left_out: Option<(KeyId, Refusal)>) {
        let mut outage = self.unsigned.lock().unwrap_or_else(PoisonError::into_inner);
        match left_out {
            Some((key, refusal)) => {
                if outage.goes_on(&format!("{key} {}", refusal.reason.as_str_name())) {
                    tracing::warn!(%key, ?refusal, "checkpoints go without the signature of a key that is not active");
                }
            }
            None => {
                if let Some(lasted) = outage.ends() {
                    tracing::info!("checkpoints have all signatures again after {:.1} s", lasted.as_secs_f64());
                }
            }
        }
    }
}

//! The ledger's size and root, signed (C2SP tlog-checkpoint).

use std::sync::Arc;

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

    /// The tree as it is now, signed by every ledger key in service: while one follows another, whoever trusts either is served. The active
    /// one and `successor` have to; any other that cannot is left out. What is signed starts with the origin in ASCII; a certificate's bytes of that first byte would be shorter than any certificate.
    pub(super) async fn sign_checkpoint(&self, successor: Option<&KeyId>) -> Result<(u64, String), Refusal> {
        let authorities = self.authorities()?;
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
        let mut signatures = Vec::new();
        for key in authorities.ledger_keys().iter().filter(|key| in_service(key)) {
            match key.sign(Arc::clone(&body)).await {
                Ok(signature) => signatures.push((key.public(), signature)),
                Err(SignError::NotSigned(error) | SignError::Unknown(error)) => {
                    let refusal = hsm_refusal(error);
                    if key.id() == authorities.ledger_key().id() || Some(&key.id()) == successor {
                        return Err(refusal);
                    }
                    tracing::warn!(key = %key.id(), ?refusal, "a checkpoint goes without the signature of a key that is not active");
                }
            }
        }
        Ok((size, checkpoint.signed(&name, &signatures)))
    }
}

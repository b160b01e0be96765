//! The ledger's size and root, signed (C2SP tlog-checkpoint).

use std::sync::Arc;

use crate::hsm::SignError;
use crate::ledger::note::{Checkpoint, VerifierKey, ledger_name};
use crate::model::{PublicKey, Refusal, TrustDomain};

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
        let (size, note) = self.sign_checkpoint().await?;
        self.ledger.keep_checkpoint(note).await?;
        Ok(size)
    }

    /// The tree as it is now, signed by every ledger key in service: while one follows another, whoever trusts either is served. What is
    /// signed starts with the origin in ASCII; a certificate's bytes of that first byte would be shorter than any certificate.
    pub(super) async fn sign_checkpoint(&self) -> Result<(u64, String), Refusal> {
        let authorities = self.authorities()?;
        let (size, root) = self.ledger.edge().await?;
        let name = ledger_name(&self.domain);
        let checkpoint = Checkpoint { origin: name.clone(), size, root };
        let body: Arc<[u8]> = checkpoint.body().into_bytes().into();
        let mut signatures = Vec::new();
        for key in authorities.ledger_keys() {
            let signature = key.sign(Arc::clone(&body)).await.map_err(|error| match error {
                SignError::NotSigned(error) | SignError::Unknown(error) => hsm_refusal(error),
            })?;
            signatures.push((key.public(), signature));
        }
        Ok((size, checkpoint.signed(&name, &signatures)))
    }
}

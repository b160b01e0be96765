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
    /// Signs the tree as it is now, if it has grown since the last checkpoint. What is signed starts with the origin in ASCII; a
    /// certificate's bytes of that first byte would be shorter than any certificate. Gives the size.
    ///
    /// # Errors
    /// `HSM_UNAVAILABLE`, `LEDGER_UNAVAILABLE`.
    pub async fn checkpoint(&self, last: u64) -> Result<u64, Refusal> {
        let (size, root) = self.ledger.edge().await?;
        if size == last {
            return Ok(size);
        }
        let authorities = self.authorities()?;
        let key = authorities.ledger_key();
        let name = ledger_name(&self.domain);
        let checkpoint = Checkpoint { origin: name.clone(), size, root };
        let body: Arc<[u8]> = checkpoint.body().into_bytes().into();
        let signature = key.sign(body).await.map_err(|error| match error {
            SignError::NotSigned(error) | SignError::Unknown(error) => hsm_refusal(error),
        })?;
        self.ledger.keep_checkpoint(checkpoint.signed(&name, key.public(), &signature)).await?;
        Ok(size)
    }
}

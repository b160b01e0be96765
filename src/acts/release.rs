//! A quarantine is lifted: a new epoch, a new token, nothing of before comes back.

use crate::authn::Operator;
use crate::model::{AgentId, Refusal};

use super::{Acts, JoinTerms};

impl Acts {
    /// Epoch + 1 and a new join token for the same id; what was live before stays denied.
    ///
    /// # Errors
    /// `AGENT_UNKNOWN`, `NOT_QUARANTINED`, `HSM_UNAVAILABLE` (there is no bundle to hand out), `CLOCK_UNTRUSTED`.
    pub async fn release(
        &self,
        operator: &Operator,
        agent: AgentId,
        reason: &str,
        token_ttl_seconds: u32,
    ) -> Result<JoinTerms, Refusal> {
        let bundle = self.bundle()?;
        let (token, seed) = self.new_token(token_ttl_seconds)?;
        let (token_id, expires) = (token.id, token.expires);
        let (ledger_index, epoch) = self.ledger.reinstate(&agent, operator.signs(reason), token).await?;
        tracing::warn!(%agent, ledger_index, epoch, "released from quarantine; it has to attest again");
        Ok(JoinTerms {
            agent,
            token_id,
            seed,
            expires_unix_seconds: expires.seconds(),
            ledger_index,
            epoch,
            addresses: self.addresses.load().to_vec(),
            bundle,
        })
    }
}

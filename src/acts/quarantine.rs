//! Everything is taken away from an agent, at once.

use crate::authn::Operator;
use crate::ledger::Denied;
use crate::model::{AgentId, Refusal};
use crate::proto::QuarantineCause;

use super::Acts;

impl Acts {
    /// In force in memory before this waits for anything; acknowledged when durable. Needs neither the token nor the clock.
    ///
    /// # Errors
    /// `AGENT_UNKNOWN`; `ENFORCED_NOT_DURABLE`: in force, repeat the call.
    pub async fn quarantine(&self, operator: &Operator, agent: &AgentId, reason: &str) -> Result<Denied, Refusal> {
        let denied = self.ledger.quarantine(agent, Some(operator.signs(reason)), QuarantineCause::Operator, reason).await?;
        tracing::warn!(%agent, index = denied.index, already = denied.already, "quarantined");
        Ok(denied)
    }
}

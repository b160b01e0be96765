//! An operator takes the wall clock for true.

use crate::authn::Operator;
use crate::model::Refusal;
use crate::proto::{self, entry::Body};

use super::Acts;

impl Acts {
    /// Records the deviation, then follows the wall clock. Gives the entry and the deviation in microseconds.
    ///
    /// # Errors
    /// `LEDGER_UNAVAILABLE`: then the clock is not accepted.
    pub async fn accept_clock(&self, operator: &Operator, reason: &str) -> Result<(u64, i64), Refusal> {
        let _ = self.clock().now();
        let deviation_micros = self.clock().deviation_micros();
        let entry = proto::ClockAccepted { by: Some(operator.signs(reason)), deviation_micros };
        let index = self.ledger.record(Body::ClockAccepted(entry)).await?;
        self.clock().accept();
        tracing::warn!(deviation_micros, index, "the wall clock was accepted");
        Ok((index, deviation_micros))
    }
}

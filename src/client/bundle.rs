//! The bundle as it changes.

use std::time::Duration;

use tokio::time::{Instant, timeout_at};
use tonic::Streaming;

use super::{Error, Place, tls};
use crate::proto::{Bundle, WatchBundleResponse};

/// Until the daemon has said its refresh hint.
const PATIENCE_FIRST: Duration = Duration::from_secs(10);
/// A hint beyond this is taken for this, in seconds.
const REFRESH_HINT_SECONDS_MAX: u32 = 3600;

/// A `WatchBundle` stream. Ends with an error, always: the daemon speaks for as long as the connection's certificate lasts.
pub struct BundleWatch {
    answers: Streaming<WatchBundleResponse>,
    place: Place,
    sequence: u64,
    silent_until: Instant,
}

impl BundleWatch {
    /// `sequence`: of the bundle that is known already.
    pub(super) fn new(answers: Streaming<WatchBundleResponse>, place: Place, sequence: u64) -> Self {
        Self { answers, place, sequence, silent_until: Instant::now() + PATIENCE_FIRST }
    }

    /// Waits for a bundle with a higher sequence than any before. May be dropped and called again: nothing is lost.
    ///
    /// # Errors
    /// `Refused`: this agent may not follow any more, or the daemon stops. `Unreachable`: the connection ended, or nothing was said for
    /// twice the refresh hint. `Answer`: against the protocol, or authorities that could not be used.
    pub async fn newer(&mut self) -> Result<Bundle, Error> {
        loop {
            let unreachable = |cause: &str| Error::Unreachable { place: self.place.address().to_owned(), cause: cause.into() };
            let said = timeout_at(self.silent_until, self.answers.message()).await;
            let said = said.map_err(|_| unreachable("it fell silent about the bundle"))?;
            let said = said.map_err(|status| self.place.failed(&status))?;
            let Some(said) = said else { return Err(unreachable("it says nothing more about the bundle")) };
            let bundle = said.bundle.ok_or_else(|| Error::Answer("no bundle".into()))?;
            let hint = bundle.refresh_hint_seconds.clamp(1, REFRESH_HINT_SECONDS_MAX);
            self.silent_until = Instant::now() + 2 * Duration::from_secs(hint.into());
            if bundle.sequence > self.sequence {
                tls::anchors(&bundle.authorities).map_err(|error| Error::Answer(error.to_string()))?;
                self.sequence = bundle.sequence;
                return Ok(bundle);
            }
        }
    }
}

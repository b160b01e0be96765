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

/// What is new in one message; often nothing.
#[derive(Debug)]
pub struct News {
    /// With a higher sequence than any before.
    pub bundle: Option<Bundle>,
    /// The authority of the stream's certificate is not trusted after this time. Said again as long as it is so.
    pub renew_within: Option<Duration>,
}

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

    /// Waits for the daemon's next word; the first comes at once, whatever is known already. May be dropped and called again: nothing is lost.
    ///
    /// # Errors
    /// `Refused`: this agent may not follow any more, or the daemon stops. `Unreachable`: the connection ended, or nothing was said for
    /// twice the refresh hint. `Answer`: against the protocol, or authorities that could not be used.
    pub async fn next(&mut self) -> Result<News, Error> {
        let unreachable = |cause: &str| Error::Unreachable { place: self.place.address().to_owned(), cause: cause.into() };
        let said = timeout_at(self.silent_until, self.answers.message()).await;
        let said = said.map_err(|_| unreachable("it fell silent about the bundle"))?;
        let said = said.map_err(|status| self.place.failed(&status))?;
        let Some(said) = said else { return Err(unreachable("it says nothing more about the bundle")) };
        let bundle = said.bundle.ok_or_else(|| Error::Answer("no bundle".into()))?;
        let hint = bundle.refresh_hint_seconds.clamp(1, REFRESH_HINT_SECONDS_MAX);
        self.silent_until = Instant::now() + 2 * Duration::from_secs(hint.into());
        let newer = bundle.sequence > self.sequence;
        if newer {
            tls::anchors(&bundle.authorities).map_err(|error| Error::Answer(error.to_string()))?;
            self.sequence = bundle.sequence;
        }
        let within = Some(said.renew_within_seconds).filter(|seconds| *seconds > 0);
        let renew_within = within.map(|seconds| Duration::from_secs(seconds.into()));
        Ok(News { bundle: newer.then_some(bundle), renew_within })
    }
}

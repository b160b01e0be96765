//! The bundle that peers trust, told to whoever follows it.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};

use crate::attest::Rejected;
use crate::authn::Connection;
use crate::ledger::Ledger;
use crate::model::{Refusal, UnixTime};
use crate::proto::{self, WatchBundleResponse};

use super::Acts;

/// The first of many denials is looked at once, the rest together after this: where thousands are quarantined in one go, each
/// stream would otherwise wake as many times.
const DENIALS_COALESCE: Duration = Duration::from_millis(100);

/// The newest bundle, and whose certificates are to be renewed.
#[derive(PartialEq)]
struct Told {
    bundle: proto::Bundle,
    /// Names of tainted issuing authorities, DER, each with the moment from which it is not trusted.
    leaving: Vec<(Vec<u8>, UnixTime)>,
}

impl Told {
    /// To whom a certificate of `issuer` is held, at `now`: 0 where it need not be renewed, else seconds.
    fn renew_within_seconds(&self, issuer: Option<&[u8]>, now: UnixTime) -> u32 {
        let until = self.leaving.iter().find(|(name, _)| Some(name.as_slice()) == issuer);
        until.map_or(0, |(_, until)| u32::try_from(until.seconds().saturating_sub(now.seconds()).max(1)).unwrap_or(u32::MAX))
    }
}

/// Nothing before the token was there for the first time.
pub(super) struct Bundles(watch::Sender<Option<Told>>);

impl Default for Bundles {
    fn default() -> Self {
        Self(watch::Sender::new(None))
    }
}

impl Bundles {
    /// Whoever follows hears of it, if anything is new in it.
    pub(super) fn publish(&self, bundle: proto::Bundle, leaving: Vec<(Vec<u8>, UnixTime)>) {
        let next = Some(Told { bundle, leaving });
        self.0.send_if_modified(|told| {
            let new = *told != next;
            if new {
                *told = next;
            }
            new
        });
    }

    fn follow(&self, source: &Arc<Connection>, ledger: &Ledger) -> BundleWatch {
        let mut bundles = self.0.subscribe();
        // What there is now is the first that is told.
        bundles.mark_changed();
        BundleWatch {
            source: Arc::clone(source),
            ledger: ledger.clone(),
            bundles,
            denials: ledger.denials(),
            look_again: Instant::now(),
            say_again: None,
        }
    }
}

impl Acts {
    /// The bundle in force.
    ///
    /// # Errors
    /// `HSM_UNAVAILABLE`: before the token is there nothing says what is to be trusted.
    pub fn bundle(&self) -> Result<proto::Bundle, Refusal> {
        Ok(self.authorities()?.bundle())
    }

    /// The bundle as it changes, for an agent.
    ///
    /// # Errors
    /// Of the caller itself: `UNAUTHENTICATED`, `AGENT_QUARANTINED`, `EPOCH_STALE`.
    pub async fn watch_bundle(&self, source: &Arc<Connection>) -> Result<BundleWatch, Refusal> {
        match source.agent(&self.ledger) {
            Ok(_) => Ok(self.bundles.follow(source, &self.ledger)),
            Err(refusal) => {
                let rejected = Rejected { agent: source.named().cloned(), refusal };
                Err(self.record_refusal("WatchBundle", source, rejected).await)
            }
        }
    }
}

/// One agent that follows the bundle.
pub struct BundleWatch {
    source: Arc<Connection>,
    ledger: Ledger,
    bundles: watch::Receiver<Option<Told>>,
    denials: watch::Receiver<u64>,
    /// Denials are not looked at before.
    look_again: Instant,
    /// When the same bundle is said again: who follows it knows by that that somebody speaks.
    say_again: Option<Instant>,
}

impl BundleWatch {
    /// At first the bundle as it is; then waits for one that differs, for the taint of an authority, or until the refresh hint of the last has
    /// passed. May be dropped and called again: nothing is lost.
    ///
    /// # Errors
    /// As [`Acts::watch_bundle`], the moment it comes to be so.
    pub async fn next(&mut self) -> Result<WatchBundleResponse, Refusal> {
        loop {
            // Before the standing is looked at: a denial after the look wakes this again.
            self.denials.mark_unchanged();
            self.source.agent(&self.ledger)?;
            let due = self.say_again.is_some_and(|again| again <= Instant::now());
            if (due || self.bundles.has_changed().unwrap_or(false))
                && let Some(told) = &*self.bundles.borrow_and_update()
            {
                let hint = Duration::from_secs(told.bundle.refresh_hint_seconds.max(1).into());
                self.say_again = Some(Instant::now() + hint);
                let now = self.ledger.clock().reckoned();
                let renew_within_seconds = told.renew_within_seconds(self.source.issuer(), now);
                return Ok(WatchBundleResponse { bundle: Some(told.bundle.clone()), renew_within_seconds });
            }
            let (look_again, say_again) = (self.look_again, self.say_again);
            let denied = async {
                sleep_until(look_again).await;
                self.denials.changed().await
            };
            let changed = tokio::select! {
                denied = denied => {
                    self.look_again = Instant::now() + DENIALS_COALESCE;
                    denied
                }
                changed = self.bundles.changed() => {
                    // Seen above, not here.
                    self.bundles.mark_changed();
                    changed
                }
                () = at(say_again) => Ok(()),
            };
            changed.map_err(Refusal::internal)?;
        }
    }
}

async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

#[cfg(test)]
#[path = "bundle_tests.rs"]
mod tests;

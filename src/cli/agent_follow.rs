//! The bundle beside the credentials of `keyward agent run`: followed, so that a new authority is known before it signs.

use std::path::{Path, PathBuf};

use tokio::sync::mpsc::Sender;
use tokio::time::sleep;

use super::agent_run::{BackOff, is_contained};
use crate::client::{AgentDir, Client, Error};

/// In a row, of which the last is worth a word: a stream ends with each certificate, and with each restart of the daemon.
const FAILURES_TOLD: u32 = 3;

/// What came of it.
pub(super) enum Heard {
    /// A newer bundle is in the directory, durable; its sequence.
    Bundle(u64),
    /// The same, and its authorities are those of before.
    Sequence(u64),
    /// Everything was taken back from this agent.
    Contained(Error),
    /// The bundle has not been heard of for a while; renewals bring it as well.
    Silence(Error),
}

/// Follows the bundle until the agent is contained or nobody listens.
pub(super) async fn follow(out: PathBuf, heard: Sender<Heard>) {
    let mut back_off = BackOff::default();
    loop {
        let Err(error) = follow_once(&out, &heard, &mut back_off).await else { return };
        if is_contained(&error) {
            let _ = heard.send(Heard::Contained(error)).await;
            return;
        }
        let wait = back_off.next(error.refused().and_then(|refused| refused.retry_after));
        if back_off.failures() == FAILURES_TOLD && heard.send(Heard::Silence(error)).await.is_err() {
            return;
        }
        sleep(wait).await;
    }
}

/// One stream, to its end. `Ok`: nobody listens.
async fn follow_once(out: &Path, heard: &Sender<Heard>, back_off: &mut BackOff) -> Result<(), Error> {
    // The directory is free again at once: renewals need it.
    let holding = AgentDir::open(out, false)?.holding()?;
    let mut watch = Client::watch_bundle(&holding).await?;
    *back_off = BackOff::default();
    loop {
        let bundle = watch.newer().await?;
        // Where a renewal has the directory this fails, and the next stream begins with the same bundle.
        let directory = AgentDir::open(out, false)?;
        let same = directory.holding()?.authorities == bundle.authorities;
        let kept = directory.keep_bundle(&bundle)?;
        drop(directory);
        let told = if same { Heard::Sequence(bundle.sequence) } else { Heard::Bundle(bundle.sequence) };
        if kept && heard.send(told).await.is_err() {
            return Ok(());
        }
    }
}

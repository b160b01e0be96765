//! The bundle beside the credentials of `keyward agent run`: followed, so that a new authority is known before it signs.

use std::path::{Path, PathBuf};
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio::sync::mpsc::Sender;
use tokio::time::timeout;

use super::agent_run::{BackOff, is_contained};
use crate::client::store::holding_in;
use crate::client::{AgentDir, Client, Error};

/// In a row, of which the last is worth a word: a stream ends with each certificate, and with each restart of the daemon.
const FAILURES_TOLD: u32 = 3;
/// With a rejected certificate it is not tried again sooner, unless there is another.
const REJECTED_WAIT: Duration = Duration::from_secs(300);

/// What came of it.
pub(super) enum Heard {
    /// A newer bundle is in the directory, durable; its sequence.
    Bundle(u64),
    /// The same, and its authorities are those of before; or, as the first word of all, that it is the one that is held.
    Sequence(u64),
    /// The authority of the certificate of this ledger entry is tainted, and not trusted after this time.
    Leaving(u64, Duration),
    /// Everything was taken back from this agent.
    Contained(Error),
    /// The certificate of this ledger entry is not taken any more.
    Rejected(Error, u64),
    /// The bundle has not been heard of for a while; renewals bring it as well.
    Silence(Error),
}

/// Follows the bundle until the agent is contained or nobody listens. With each certificate that is `renewed` it is tried again at once.
pub(super) async fn follow(out: PathBuf, heard: Sender<Heard>, renewed: Arc<Notify>) {
    let (mut back_off, mut silent) = (BackOff::default(), true);
    loop {
        let mut certificate = None;
        let Err(error) = follow_once(&out, &heard, (&mut back_off, &mut silent), &mut certificate).await else { return };
        // From here on none is missed.
        let mut another = pin!(renewed.notified());
        another.as_mut().enable();
        if is_contained(&error) {
            let _ = heard.send(Heard::Contained(error)).await;
            return;
        }
        let mut wait = back_off.next(error.refused().and_then(|refused| refused.retry_after));
        let told = match certificate {
            // Thousands are rejected in the same moment: what they do next is spread, where renewals are.
            Some(certificate) if error.is_of_the_certificate() => {
                wait = if is_held(&out, certificate) { REJECTED_WAIT } else { wait };
                Some(Heard::Rejected(error, certificate))
            }
            _ => (back_off.failures() == FAILURES_TOLD).then_some(Heard::Silence(error)),
        };
        if let Some(told) = told
            && heard.send(told).await.is_err()
        {
            return;
        }
        let _ = timeout(wait, another).await;
    }
}

fn is_held(out: &Path, certificate: u64) -> bool {
    holding_in(out).is_ok_and(|holding| holding.card.ledger_index == certificate)
}

/// One stream, to its end, by the `certificate` that is held. `silent`: nothing has been said of any bundle yet. `Ok`: nobody listens.
async fn follow_once(
    out: &Path,
    heard: &Sender<Heard>,
    (back_off, silent): (&mut BackOff, &mut bool),
    certificate: &mut Option<u64>,
) -> Result<(), Error> {
    let holding = holding_in(out)?;
    let (held, known) = (holding.card.ledger_index, holding.card.bundle_sequence);
    *certificate = Some(held);
    let mut watch = Client::watch_bundle(&holding).await?;
    drop(holding);
    loop {
        let news = watch.next().await?;
        if let Some(within) = news.renew_within
            && heard.send(Heard::Leaving(held, within)).await.is_err()
        {
            return Ok(());
        }
        if let Some(bundle) = news.bundle {
            // Where a renewal has the directory this fails, and the next stream begins with the same bundle.
            let directory = AgentDir::open(out, false)?;
            let same = directory.holding()?.authorities == bundle.authorities;
            let kept = directory.keep_bundle(&bundle)?;
            drop(directory);
            let told = if same { Heard::Sequence(bundle.sequence) } else { Heard::Bundle(bundle.sequence) };
            if kept {
                *silent = false;
                if heard.send(told).await.is_err() {
                    return Ok(());
                }
            }
        }
        if std::mem::take(silent) && heard.send(Heard::Sequence(known)).await.is_err() {
            return Ok(());
        }
        // Not before: a stream whose first word comes to nothing is a failure like one that never began.
        *back_off = BackOff::default();
    }
}

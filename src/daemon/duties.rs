//! Timed acts. Each waits for an event or a time, does one thing, and never gives up.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{MissedTickBehavior, interval, sleep};

use crate::hsm::Health as TokenHealth;

use super::Cause;
use super::rooms::Rooms;

/// After a failed try: 1 s, 2 s, 4 s … at most this.
const BACK_OFF_MAX: Duration = Duration::from_secs(30);
/// Denials within this time share a CRL.
const CRL_COALESCE: Duration = Duration::from_secs(1);
/// Between two looks at what is due.
const ROTATION_LOOK: Duration = Duration::from_secs(1);
/// Between two checkpoints.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(1);

fn back_off(tries: u32) -> Duration {
    Duration::from_secs(1 << tries.min(5)).min(BACK_OFF_MAX)
}

/// The server's certificate, renewed at a third of its life.
pub(super) async fn server_certificate(rooms: Rooms) {
    let mut wait = Duration::from_secs(8 * 3600);
    let mut tries = 0;
    loop {
        sleep(wait).await;
        wait = match rooms.acts.serve_certificate().await {
            Ok(next) => {
                tries = 0;
                next
            }
            Err(refusal) => {
                tracing::warn!(?refusal, "the server's certificate could not be renewed; the old one stays");
                tries += 1;
                back_off(tries)
            }
        };
    }
}

/// The CRL: at start, on change (coalesced), and at half of its period.
pub(super) async fn crl(rooms: Rooms) {
    let mut denials = rooms.acts.ledger().denials();
    denials.mark_unchanged();
    let mut wait = Duration::ZERO;
    let mut tries = 0;
    loop {
        tokio::select! {
            () = sleep(wait) => {}
            changed = denials.changed() => {
                if changed.is_err() {
                    return;
                }
                sleep(CRL_COALESCE).await;
            }
        }
        denials.mark_unchanged();
        wait = match rooms.acts.publish_crl().await {
            Ok(next) => {
                tries = 0;
                next
            }
            Err(refusal) => {
                tracing::warn!(?refusal, "no new CRL could be signed; the old one stays");
                tries += 1;
                back_off(tries)
            }
        };
    }
}

/// The authorities, once a second: what is due moves on. What failed is due again.
pub(super) async fn rotation(rooms: Rooms) {
    let mut tries = 0;
    loop {
        let wait = match rooms.acts.rotate_due().await {
            Ok(_) => {
                tries = 0;
                ROTATION_LOOK
            }
            Err(refusal) => {
                tracing::warn!(?refusal, "the rotation of the authorities has to wait");
                tries += 1;
                back_off(tries)
            }
        };
        sleep(wait).await;
    }
}

/// At most one checkpoint a second, while there is something new.
pub(super) async fn checkpoints(rooms: Rooms) {
    let mut progress = rooms.acts.ledger().progress();
    let mut sealed = 0;
    loop {
        match rooms.acts.checkpoint(sealed).await {
            Ok(size) => sealed = size,
            Err(refusal) => tracing::warn!(?refusal, "no checkpoint could be signed"),
        }
        sleep(CHECKPOINT_EVERY).await;
        if progress.wait_for(|progress| progress.size != sealed).await.is_err() {
            return;
        }
    }
}

/// Once a second: counted refusals are sealed, a full disk is looked at again, the clock is compared.
pub(super) async fn ledger(rooms: Rooms) {
    let ledger = rooms.acts.ledger();
    let mut seconds = interval(Duration::from_secs(1));
    seconds.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        seconds.tick().await;
        let _ = ledger.clock().now();
        ledger.try_resume();
        if let Err(refusal) = ledger.seal_refusals().await {
            tracing::debug!(?refusal, "refusals could not be sealed");
        }
    }
}

/// Health as the tokens, the ledger and the clock have it, told the moment it changes. A disk or a token that cannot be trusted any more stops
/// the daemon.
pub(super) async fn health(rooms: Rooms, stop: Arc<watch::Sender<Option<Cause>>>) {
    let mut tokens = rooms.tokens.subscribe();
    let mut failure = rooms.acts.ledger().failure();
    let mut ticks = interval(Duration::from_millis(250));
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        let mut watched: Vec<watch::Receiver<TokenHealth>> = match &*tokens.borrow_and_update() {
            Some(tokens) if tokens.shared => vec![tokens.authority.health()],
            Some(tokens) => vec![tokens.authority.health(), tokens.agents.health()],
            None => Vec::new(),
        };
        let faults: Vec<TokenHealth> = watched.iter_mut().map(|health| health.borrow_and_update().clone()).collect();
        if report(&rooms, &faults).await {
            stop.send_replace(Some(Cause::TokenStuck));
        }
        if failure.borrow_and_update().is_some() {
            stop.send_replace(Some(Cause::LedgerFailed));
            return;
        }
        tokio::select! {
            _ = tokens.changed() => {}
            _ = failure.changed() => {}
            () = any_changed(&mut watched) => {}
            _ = ticks.tick() => {}
        }
    }
}

async fn any_changed(watched: &mut [watch::Receiver<TokenHealth>]) {
    match watched {
        [] => std::future::pending().await,
        [one] => drop(one.changed().await),
        [one, other, ..] => tokio::select! {
            _ = one.changed() => {}
            _ = other.changed() => {}
        },
    }
}

/// Tells readiness and health; answers whether a token is stuck for good.
async fn report(rooms: &Rooms, tokens: &[TokenHealth]) -> bool {
    let ledger = rooms.acts.ledger();
    let mut missing = Vec::new();
    let waiting = rooms.waiting_for.lock().unwrap_or_else(PoisonError::into_inner).clone();
    missing.extend(waiting);
    let hsm = !tokens.is_empty() && tokens.iter().all(|token| token.usable && token.key.is_none());
    for token in tokens.iter().filter(|token| !token.usable) {
        missing.push(format!("hsm: {}", token.fault.as_deref().unwrap_or("not usable")));
    }
    missing.extend(tokens.iter().filter_map(|token| token.key.as_ref()).map(|key| format!("hsm: {key}")));
    let written = ledger.is_writable();
    if !written {
        missing.push("ledger: it cannot be written".to_owned());
    }
    let trusted = ledger.clock().now().is_ok();
    if !trusted {
        missing.push("clock: it jumped; see `keyward clock accept`".to_owned());
    }
    let rest = missing.is_empty();
    if rooms.readiness.set_missing(missing.clone()) && !missing.is_empty() {
        tracing::warn!(?missing, "not ready");
    }
    rooms.health.report(hsm, written, rest).await;
    tokens.iter().any(|token| token.stuck)
}

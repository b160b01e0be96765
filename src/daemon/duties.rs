//! Timed acts. Each waits for an event or a time, does one thing, and never gives up.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep};

use crate::acts::{self, Rewrap};
use crate::config::section;
use crate::hsm::Health as TokenHealth;
use crate::model::Outage;
use crate::proto::TokenRole;

use super::Cause;
use super::rooms::{Rooms, out_of_service};

/// After a failed try: 1 s, 2 s, 4 s … at most this.
const BACK_OFF_MAX: Duration = Duration::from_secs(30);
/// Denials within this time share a CRL.
const CRL_COALESCE: Duration = Duration::from_secs(1);
/// Between two looks at what is due.
const ROTATION_LOOK: Duration = Duration::from_secs(1);
/// Between two words of an end that waits for an operator.
const END_TOLD_EVERY: Duration = Duration::from_secs(86_400);
/// Between two checkpoints.
const CHECKPOINT_EVERY: Duration = Duration::from_secs(1);

/// Between two looks for session keys that have expired.
const SESSION_KEYS_EVERY: Duration = Duration::from_secs(2);
/// Between two looks for an operator who unlocks a login.
const UNLOCK_EVERY: Duration = Duration::from_millis(200);

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

/// The CRL: at start, on change (coalesced), and at half of its period. What an outage kept from being signed is signed when the token is
/// back, and not only when the next try would be due.
pub(super) async fn crl(rooms: Rooms) {
    let mut denials = rooms.acts.ledger().denials();
    denials.mark_unchanged();
    let mut token = match &*rooms.tokens.borrow() {
        Some(tokens) => tokens.authority.health(),
        // They are open before this duty begins.
        None => return,
    };
    let mut wait = Duration::ZERO;
    let mut tries = 0;
    loop {
        tokio::select! {
            () = sleep(wait) => {}
            () = back_in_service(&mut token), if tries > 0 => {}
            changed = denials.changed() => {
                if changed.is_err() {
                    return;
                }
                sleep(CRL_COALESCE).await;
            }
        }
        denials.mark_unchanged();
        // Before the try: what changes during it is heard after it.
        token.mark_unchanged();
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

/// What denied agents have reserved for their counted keys is sealed; session keys that have ended make room, those of denied agents
/// at once.
pub(super) async fn ended_keys(rooms: Rooms) {
    let mut denials = rooms.acts.ledger().denials();
    loop {
        match tokio::time::timeout(SESSION_KEYS_EVERY, denials.changed()).await {
            Ok(Ok(())) => rooms.acts.seal_signatures(false),
            Ok(Err(_)) => return,
            Err(_) => {}
        }
        rooms.acts.end_session_keys().await;
    }
}

/// Keys that are over leave the token and the file, a few at each look.
pub(super) async fn keys_over(rooms: Rooms) {
    let mut round = acts::Round::default();
    loop {
        sleep(SESSION_KEYS_EVERY).await;
        if let Err(refusal) = rooms.acts.end_what_is_over(&mut round).await {
            tracing::debug!(?refusal, "keys that are over have to wait");
        }
    }
}

/// The authorities, once a second: what is due moves on. What failed is due again; what an operator has to do is told each day.
pub(super) async fn rotation(rooms: Rooms) {
    let mut tries = 0;
    let mut end_told: Option<Instant> = None;
    loop {
        if end_told.is_none_or(|told| told.elapsed() >= END_TOLD_EVERY)
            && let Some(end) = rooms.acts.end_waits_for_an_operator()
        {
            tracing::warn!("{end}");
            end_told = Some(Instant::now());
        }
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

/// Agents' keys come under the wrapping key that is active. What could not now is tried again, later each time; a taint waits for none of
/// that.
pub(super) async fn rewrapping(rooms: Rooms) {
    let (mut tries, mut outage) = (0, Outage::default());
    loop {
        let before = rooms.acts.wrapping_keys();
        let wait = match rooms.acts.rewrap_due().await {
            Ok(Rewrap::Idle) => {
                (tries, outage) = (0, Outage::default());
                ROTATION_LOOK
            }
            // The next may be due.
            Ok(Rewrap::Done) => Duration::ZERO,
            // It may last until an agent rotates its key: `keyward status` tells how many are left.
            Ok(Rewrap::Left(left)) => {
                if outage.goes_on("left") {
                    tracing::warn!(left, "agents' keys are still under a wrapping key before");
                }
                tries += 1;
                back_off(tries)
            }
            Err(refusal) => {
                if outage.goes_on(refusal.reason.as_str_name()) {
                    tracing::warn!(?refusal, "agents' keys stay under a wrapping key before for a while");
                }
                tries += 1;
                back_off(tries)
            }
        };
        let until = Instant::now() + wait;
        while Instant::now() < until {
            sleep(ROTATION_LOOK.min(wait)).await;
            if rooms.acts.wrapping_keys() != before {
                (tries, outage) = (0, Outage::default());
                break;
            }
        }
    }
}

/// Until the token serves, and something has changed with it since the last look.
async fn back_in_service(token: &mut watch::Receiver<TokenHealth>) {
    loop {
        if token.changed().await.is_err() {
            return std::future::pending().await;
        }
        if token.borrow_and_update().usable {
            return;
        }
    }
}

/// At most one checkpoint a second, while there is something new.
pub(super) async fn checkpoints(rooms: Rooms) {
    let mut progress = rooms.acts.ledger().progress();
    let (mut sealed, mut outage) = (0, Outage::default());
    loop {
        match rooms.acts.checkpoint(sealed).await {
            Ok(size) => {
                sealed = size;
                if let Some(lasted) = outage.ends() {
                    tracing::info!(size, "a checkpoint was signed again after {:.1} s", lasted.as_secs_f64());
                }
            }
            Err(refusal) if outage.goes_on(refusal.reason.as_str_name()) => {
                tracing::warn!(?refusal, "no checkpoint could be signed");
            }
            Err(_) => {}
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

/// What an operator wishes becomes an entry, and then the daemon logs in again.
pub(super) async fn unlock(rooms: Rooms) {
    let mut outage = Outage::default();
    loop {
        sleep(UNLOCK_EVERY).await;
        match acts::unlock(rooms.acts.ledger(), &rooms.config).await {
            Ok(()) => drop(outage.ends()),
            Err(refusal) if outage.goes_on(refusal.reason.as_str_name()) => {
                tracing::warn!(?refusal, "an unlock could not be recorded; the login stays locked");
            }
            Err(_) => {}
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
        let roles = [TokenRole::Authority, TokenRole::Agents].into_iter();
        let faults: Vec<_> = roles.zip(watched.iter_mut().map(|health| health.borrow_and_update().clone())).collect();
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
async fn report(rooms: &Rooms, tokens: &[(TokenRole, TokenHealth)]) -> bool {
    let ledger = rooms.acts.ledger();
    let hsm = !tokens.is_empty() && tokens.iter().all(|(_, token)| token.usable && token.key.is_none());
    let (written, trusted) = (ledger.is_writable(), ledger.clock().now().is_ok());
    let rest = {
        // Held to the end: what the daemon waited for a moment ago is no news after it was ready.
        let mut waiting = rooms.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        // What is missing, in full; and by the names that it keeps while it is missing.
        let mut missing: Vec<(String, String)> = waiting.what.iter().map(|what| (what.clone(), what.clone())).collect();
        let mut locked: Vec<&str> = waiting.locked.into_iter().collect();
        for (role, token) in tokens {
            match (&token.key, token.usable) {
                // Where no key can be had, it is no news that one of them cannot.
                (_, false) => {
                    let fault = token.fault.as_deref().unwrap_or("it is being connected");
                    missing.push((out_of_service(*role, fault, token.locked), section(*role).to_owned()));
                    locked.extend(token.locked.then(|| section(*role)));
                }
                (Some(key), true) => {
                    let told = format!("{}: {key}; it is looked for again by itself", section(*role));
                    missing.push((told.clone(), told));
                }
                (None, true) => {}
            }
        }
        let rest = [
            (written, "ledger: it cannot be written; is its disk full or gone?"),
            (trusted, "clock: it jumped; see `keyward clock accept`"),
        ];
        missing.extend(rest.iter().filter(|(well, _)| !well).map(|(_, what)| ((*what).to_owned(), (*what).to_owned())));
        missing.extend(rooms.acts.authority_ends().map(|ends| (ends.clone(), ends)));
        let (missing, names): (Vec<_>, Vec<_>) = missing.into_iter().unzip();
        waiting.tell(&missing, &names, &locked);
        let ready = missing.is_empty();
        rooms.readiness.set_missing(missing);
        ready
    };
    rooms.health.report(hsm, written, rest).await;
    tokens.iter().any(|(_, token)| token.stuck)
}

//! The watch over one token: a canary signature while it is idle, spare lanes, recovery.

use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use super::ADMIN_DEADLINE;
use super::faults::{Error, SignError};
use super::keyring::Bound;
use super::lanes;
use super::queue::Mark;
use super::token::{Token, reconnect};
use crate::model::KeyId;

/// How often the watch looks, and how long a token may be idle before it is asked for a canary signature.
const LOOK: Duration = Duration::from_millis(500);
/// Longest a canary may take: nothing else was signed for half a second when it was asked for.
const CANARY_DEADLINE: Duration = Duration::from_secs(2);
/// First pause between two attempts to recover.
const BACK_OFF: Duration = Duration::from_millis(50);
/// Longest pause between two attempts.
const BACK_OFF_MAX: Duration = Duration::from_secs(5);
/// Pause where every attempt restarts the module under another token that is in service.
const BACK_OFF_SHARED: Duration = Duration::from_secs(30);
/// A call may take this much longer than a signature's deadline before its lane is given up.
const GRACE: Duration = Duration::from_secs(1);
/// What a canary signs starts with this and ends with 16 random bytes. No certificate, CRL or checkpoint starts so.
const CANARY_TAG: &[u8] = b"keyward/hsm/canary/v1\0";

/// Starts the watch's thread.
pub(super) fn start(token: &Arc<Token>) -> Result<(), Error> {
    let watched = Arc::clone(token);
    let work = move |_: &Mark| match tokio::runtime::Builder::new_current_thread().enable_time().build() {
        Ok(runtime) => runtime.block_on(watch(&watched)),
        Err(error) => watched.suspend(&format!("nobody watches the token: {error}")),
    };
    token.watchman.hire("hsm-watch", false, work).map_err(Error::Thread)
}

async fn watch(token: &Arc<Token>) {
    while !token.is_stopping() {
        pause(token, LOOK).await;
        if !token.is_usable() {
            recover(token).await;
            continue;
        }
        token.crew.give_up(token.settings.sign_deadline + GRACE);
        if token.crew.admin_inside_for().is_some_and(|time| time > ADMIN_DEADLINE + GRACE) {
            token.suspend("the admin lane hangs inside the PKCS#11 module");
            continue;
        }
        if let Err(error) = token.top_up() {
            tracing::warn!(%error, "a lane is missing");
        }
        if token.idle_for() >= LOOK {
            look(token).await;
        }
    }
}

/// Until `time` has passed or something happened.
async fn pause(token: &Token, time: Duration) {
    let _ = tokio::time::timeout(time, token.alarm.notified()).await;
}

/// A canary that is late once or fails twice in a row is a lost token: neither the serial nor the session's state tells that a token was removed or
/// replaced.
async fn look(token: &Arc<Token>) {
    let Some(canary) = token.canary.lock().unwrap_or_else(PoisonError::into_inner).clone() else { return };
    let mut failure = None;
    for _ in 0..2 {
        match sing(token, &canary).await {
            Ok(()) => return,
            // A full queue is no sign of silence, as long as it moves.
            Err(SignError::NotSigned(Error::QueueFull)) if token.idle_for() < LOOK + CANARY_DEADLINE => return,
            Err(error) => {
                let silent = matches!(error, SignError::NotSigned(Error::Deadline) | SignError::Unknown(Error::Deadline));
                failure = Some(error);
                if silent {
                    break;
                }
            }
        }
        if !token.is_usable() {
            return;
        }
    }
    if let Some(error) = failure {
        token.suspend(&format!("the canary is silent: {error}"));
    }
}

/// One canary signature through a lane, verified against the pinned key.
async fn sing(token: &Arc<Token>, canary: &Arc<Bound>) -> Result<(), SignError> {
    let message: Arc<[u8]> = [CANARY_TAG, &KeyId::random().0].concat().into();
    let deadline = Instant::now() + token.settings.sign_deadline.min(CANARY_DEADLINE);
    lanes::sign(token, canary, &message, deadline).await.map(drop)
}

/// Tries until the token is back or the daemon stops.
async fn recover(token: &Arc<Token>) {
    let mut back_off = BACK_OFF;
    let mut seen = token.generation();
    let mut told = None;
    while !token.is_stopping() {
        let error = match attempt(token, seen).await {
            Ok(()) => return,
            Err(error) => error,
        };
        if token.is_stopping() {
            return;
        }
        // Half an attempt may have left threads behind.
        token.suspend(&error.to_string());
        token.note_fault(&error.to_string(), matches!(error, Error::Stuck));
        if told.as_ref() != Some(&error.to_string()) {
            tracing::warn!(token = %token.settings.token.label, %error, "the token is not back yet");
            told = Some(error.to_string());
        }
        seen = token.generation();
        let longest = if token.module.serves_besides(Arc::as_ptr(token)) { BACK_OFF_SHARED } else { BACK_OFF_MAX };
        back_off = if longest == BACK_OFF_SHARED || error.needs_operator() { longest } else { (back_off * 2).min(longest) };
        rest(token, jittered(back_off)).await;
    }
}

/// A pause that only the stop cuts short: alarms during recovery are echoes of what is being recovered from.
async fn rest(token: &Token, time: Duration) {
    let until = tokio::time::Instant::now() + time;
    while !token.is_stopping() && tokio::time::timeout_at(until, token.alarm.notified()).await.is_ok() {}
}

/// Between a half and the whole of it, so that several daemons at one HSM do not come at once.
fn jittered(time: Duration) -> Duration {
    time / 2 + time.mul_f64(f64::from(KeyId::random().0[0]) / 512.0)
}

/// Restart the module (once for all its tokens), connect, log in, look every key up anew, sing, serve.
async fn attempt(token: &Arc<Token>, seen: u64) -> Result<(), Error> {
    reconnect(token, seen)?;
    token.epoch_ends(token.epoch());
    for key in token.keyring.all() {
        match token.handle_of(&key, Instant::now() + token.settings.sign_deadline).await {
            Ok(_) => {}
            // Of no concern to the other keys; asking for this one says so.
            Err(error @ (Error::KeyLost(_) | Error::KeyMismatch(_) | Error::KeyAmbiguous { .. } | Error::Attribute { .. })) => {
                tracing::error!(token = %token.settings.token.label, key = %key.id, %error, "a key did not come back");
            }
            Err(error) => return Err(error),
        }
    }
    let canary = token.canary.lock().unwrap_or_else(PoisonError::into_inner).clone();
    if let Some(canary) = canary {
        sing(token, &canary).await.map_err(|error| match error {
            SignError::NotSigned(error) | SignError::Unknown(error) => error,
        })?;
    }
    token.resume(&token.module.lifecycle())?;
    token.reconnects.fetch_add(1, Ordering::Relaxed);
    tracing::info!(token = %token.settings.token.label, "the token is back in service");
    Ok(())
}

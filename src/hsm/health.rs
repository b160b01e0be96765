//! The watch over one token: a canary signature while it is idle, spare lanes, recovery.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::ADMIN_DEADLINE;
use super::error::{Error, SignError};
use super::faults::Remedy;
use super::keyring::{Bound, Location};
use super::lanes;
use super::modules::RESTART_SHARED;
use super::objects;
use super::queue::{Mark, Post};
use super::token::{Token, reconnect};
use crate::model::{KeyId, Outage};

/// How often the watch looks, and how long a token may be idle before it is asked for a canary signature.
const LOOK: Duration = Duration::from_millis(200);
/// A slow token may be idle for as many signatures' time: canaries are not what it is there for.
const LOOK_PACES: u32 = 4;
/// Shortest and longest time that a canary is given: nothing else was signed since the last look when it was asked for. With the look
/// and a second canary through a spare lane it makes 0.8 s from a silent token to an unready daemon: some are left for a busy machine.
const CANARY_DEADLINE: (Duration, Duration) = (Duration::from_millis(300), Duration::from_secs(2));
/// First pause between two attempts to recover.
const BACK_OFF: Duration = Duration::from_millis(50);
/// Longest pause between two attempts: a token that is back is in service within a second.
const BACK_OFF_MAX: Duration = Duration::from_millis(500);
/// A call may take this much longer than a signature's deadline before its lane is given up.
const GRACE: Duration = Duration::from_secs(1);
/// Longest time for C_Finalize, C_Initialize, C_GetSlotList, C_OpenSession and C_Login together.
const CONNECT_DEADLINE: Duration = Duration::from_secs(20);
/// How often a key that was not there is looked for.
const KEYS_AGAIN: Duration = Duration::from_secs(1);
/// What a canary signs starts with this and ends with 16 random bytes. No certificate, CRL or checkpoint starts so.
const CANARY_TAG: &[u8] = b"keyward/hsm/canary/v1\0";

/// Starts the watch's thread.
pub(super) fn start(token: &Arc<Token>) -> Result<(), Error> {
    let watched = Arc::clone(token);
    let work = move |_: &Mark| match tokio::runtime::Builder::new_current_thread().enable_time().build() {
        Ok(runtime) => runtime.block_on(watch(&watched)),
        Err(error) => watched.suspend(&format!("nobody watches the token: {error}"), Remedy::Restart),
    };
    token.watchman.hire("hsm-watch", Post::Single, work).map_err(Error::Thread)
}

async fn watch(token: &Arc<Token>) {
    let mut looked = Instant::now();
    let mut narrow = Outage::default();
    while !token.is_stopping() {
        pause(token, LOOK).await;
        if looked.elapsed() > KEYS_AGAIN {
            looked = Instant::now();
            look_for_keys(token).await;
        }
        if token.has_news_of_keys() {
            // It may be the token that is away, and not a key.
            look(token).await;
        }
        if !token.is_usable() {
            recover(token).await;
            continue;
        }
        token.tell_of_keys();
        token.crew.give_up(token.settings.sign_deadline + GRACE);
        if token.crew.other_inside_for().is_some_and(|time| time > ADMIN_DEADLINE + GRACE) {
            token.suspend("the admin lane or an owner hangs inside the PKCS#11 module", Remedy::Restart);
            continue;
        }
        match token.top_up() {
            Ok(()) => {
                if let Some(lasted) = narrow.ends() {
                    tracing::info!(token = %token.settings.token.label, "all lanes are there again after {:.1} s", lasted.as_secs_f64());
                }
            }
            Err(Error::Stuck) => {
                token.suspend("too many lanes hang inside the PKCS#11 module", Remedy::Restart);
                continue;
            }
            Err(error) if narrow.goes_on(&error.to_string()) => {
                tracing::warn!(token = %token.settings.token.label, %error, "a lane is missing");
            }
            Err(_) => {}
        }
        if token.idle_for() >= LOOK.max(token.admission.pace() * LOOK_PACES) {
            look(token).await;
        }
    }
}

/// Keys that were not there may be back: restored, or never gone.
async fn look_for_keys(token: &Arc<Token>) {
    for key in token.keyring.all().into_iter().filter(|key| token.is_usable() && key.trouble().is_some()) {
        key.set_location(Location::Unknown);
        let _ = token.handle_of(&key, Instant::now() + CANARY_DEADLINE.0).await;
    }
}

/// Until `time` has passed or something happened.
async fn pause(token: &Token, time: Duration) {
    let _ = tokio::time::timeout(time, token.alarm.notified()).await;
}

/// A canary that fails or is late twice in a row is a lost token: neither the serial nor the session's state tells that a token was
/// removed or replaced. After silence the second one goes through a spare lane: what hangs may be no more than a lane.
async fn look(token: &Arc<Token>) {
    let Some(canary) = token.canary() else { return };
    let patience = canary_deadline(token);
    let mut failure = None;
    for _ in 0..2 {
        match sing(token, &canary, patience).await {
            Ok(()) => return,
            // A queue is no sign of silence, as long as it moves.
            Err(SignError::NotSigned(Error::QueueFull | Error::Deadline)) if token.idle_for() < LOOK + patience => return,
            Err(error) => {
                if matches!(error, SignError::NotSigned(Error::Deadline) | SignError::Unknown(Error::Deadline)) {
                    token.crew.give_up(patience.mul_f64(0.9));
                    if token.top_up().is_err() {
                        failure = Some(error);
                        break;
                    }
                }
                failure = Some(error);
            }
        }
        if !token.is_usable() {
            return;
        }
    }
    let fault = match failure {
        None => return,
        Some(SignError::NotSigned(lost @ Error::KeyLost(_))) => key_or_token(token, lost).await.to_string(),
        Some(error) => format!("the canary is silent: {error}"),
    };
    token.suspend(&fault, Remedy::Restart);
}

/// A key that is lost is told by its name if others are there; where none is, it is the token that is away or was emptied.
async fn key_or_token(token: &Arc<Token>, lost: Error) -> Error {
    for key in token.keyring.all() {
        let id = key.id;
        let deadline = Instant::now() + canary_deadline(token);
        match token.errand(deadline, move |session| objects::find(session, id)).await {
            Ok(found) if found.iter().any(|object| object.private) => return lost,
            Ok(_) => {}
            // Nothing is known of the others.
            Err(_) => return lost,
        }
    }
    Error::KeysLost
}

/// As long as every lane before it needs, where the device serves one at a time: those of its other tokens, too.
fn canary_deadline(token: &Token) -> Duration {
    let lanes = u32::try_from(token.module.lanes()).unwrap_or(u32::MAX);
    let turn = token.admission.pace().saturating_mul(lanes.saturating_add(1));
    turn.clamp(CANARY_DEADLINE.0, CANARY_DEADLINE.1).min(token.settings.sign_deadline)
}

/// One canary signature through a lane, verified against the pinned key.
pub(super) async fn sing(token: &Arc<Token>, canary: &Arc<Bound>, patience: Duration) -> Result<(), SignError> {
    let message: Arc<[u8]> = [CANARY_TAG, &KeyId::random().0].concat().into();
    lanes::sign(token, canary, &message, Instant::now() + patience).await.map(drop)
}

/// Tries until the token is back or the daemon stops.
async fn recover(token: &Arc<Token>) {
    let mut back_off = BACK_OFF;
    let mut outage = Outage::default();
    // Told when it was suspended.
    outage.goes_on(&token.health().borrow().fault.clone().unwrap_or_default());
    let (lost, mut restarted, mut patience) = (Instant::now(), None::<Instant>, RESTART_SHARED.0);
    while !token.is_stopping() {
        let shared = token.module.serves_besides(Arc::as_ptr(token));
        let early = restarted.is_some_and(|at| at.elapsed() < patience);
        let remedy = if shared && early { Remedy::LogIn } else { token.remedy() };
        if remedy == Remedy::Restart {
            restarted = Some(Instant::now());
            patience = lost.elapsed().clamp(RESTART_SHARED.0, RESTART_SHARED.1);
        }
        let error = match attempt(token, remedy).await {
            Ok(()) => {
                let lasted = outage.ends().unwrap_or_default();
                tracing::info!(token = %token.settings.token.label, ?remedy, "the token is back in service after {:.1} s", lasted.as_secs_f64());
                return;
            }
            Err(error) => error,
        };
        if token.is_stopping() {
            return;
        }
        // Half an attempt may have left threads behind. What a login did not mend a restart may.
        token.suspend(&error.to_string(), Remedy::Restart);
        // In this order: who sees that it is locked finds in the history what it was locked by.
        token.history.note(&error);
        token.note_fault(&error);
        if error.awaits_unlock() {
            // The PIN that is tried when the operator says so is tried on what is there then, not on what the module remembers.
            restarted = None;
        }
        if outage.goes_on(&error.to_string()) {
            tracing::warn!(token = %token.settings.token.label, %error, "the token is not back yet");
        }
        rest(token, jittered(back_off)).await;
        back_off = (back_off * 2).min(BACK_OFF_MAX);
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

/// Connect (after a restart of the module, once for all its tokens), log in, look every key up anew, sing, serve.
async fn attempt(token: &Arc<Token>, remedy: Remedy) -> Result<(), Error> {
    let seen = token.generation();
    on_a_thread(token, move |token| reconnect(token, seen, remedy)).await?;
    let looked_up = |key: Arc<Bound>| async move { token.handle_of(&key, Instant::now() + token.settings.sign_deadline).await };
    let canary = token.canary();
    if let Some(canary) = &canary {
        // Without it this is not our token: nothing else is asked of it.
        if let Err(error) = looked_up(Arc::clone(canary)).await {
            return Err(if matches!(error, Error::KeyLost(_)) { key_or_token(token, error).await } else { error });
        }
    }
    for key in token.keyring.all() {
        match looked_up(key).await {
            Ok(_) => {}
            // Of no concern to the other keys; asking for this one says so, and readiness does.
            Err(error) if error.is_of_the_key() => {}
            Err(error) => return Err(error),
        }
    }
    if let Some(canary) = canary {
        sing(token, &canary, CANARY_DEADLINE.1.min(token.settings.sign_deadline)).await.map_err(|error| match error {
            SignError::NotSigned(error) | SignError::Unknown(error) => error,
        })?;
    }
    on_a_thread(token, |token| token.resume(&token.module.lifecycle())).await
}

/// Runs what may hang inside the module, or wait for one who does, on a thread that the watch need not wait for.
async fn on_a_thread(
    token: &Arc<Token>,
    work: impl FnOnce(&Arc<Token>) -> Result<(), Error> + Send + 'static,
) -> Result<(), Error> {
    let (reply, answer) = oneshot::channel();
    let connecting = Arc::clone(token);
    token.watchman.hire("hsm-connect", Post::Single, move |_| drop(reply.send(work(&connecting)))).map_err(Error::Thread)?;
    match tokio::time::timeout(CONNECT_DEADLINE, answer).await {
        Ok(Ok(done)) => done,
        // It died of a panic.
        Ok(Err(_)) => Err(token.unusable()),
        Err(_) => Err(Error::Stuck),
    }
}

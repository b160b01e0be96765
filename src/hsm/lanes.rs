//! Sign lanes: threads with one session each. The hot path opens no session, searches nothing and holds no lock across C_Sign. A lane
//! does nothing but sign: whoever asked verifies, here in [`ask`], while the lane has the device busy with the next.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::time::{Duration, Instant};

use cryptoki::object::ObjectHandle;
use cryptoki::session::Session;
use tokio::sync::oneshot;

use super::error::{Error, SignError};
use super::faults::{Condition, Outcome, Remedy};
use super::keyring::{Bound, Location};
use super::objects;
use super::queue::{Mark, Refused};
use super::token::Token;

/// Nobody has begun.
const WAITING: u8 = 0;
/// A lane is about to call C_SignInit, or has.
const STARTED: u8 = 1;
/// The asker has gone; no lane will begin.
const WITHDRAWN: u8 = 2;

/// One signature to be made.
pub(super) struct Job {
    key: Arc<Bound>,
    handle: ObjectHandle,
    message: Arc<[u8]>,
    deadline: Instant,
    claim: Arc<AtomicU8>,
    reply: oneshot::Sender<Result<Unverified, Failed>>,
}

/// What a lane hands to its asker, and nobody beyond [`ask`] sees.
struct Unverified {
    signature: Vec<u8>,
    took: Duration,
    /// Set if it does not verify: the lane closes its session.
    spoilt: Arc<AtomicBool>,
}

/// What became of an attempt, and what may follow.
pub(super) struct Failed {
    error: Error,
    outcome: Outcome,
}

impl Failed {
    fn not_signed(error: Error) -> Self {
        Self { error, outcome: Outcome::NotSigned }
    }
}

impl Job {
    /// Whether this lane may begin: not withdrawn, not too late, somebody still listening.
    fn claim(self) -> Option<Self> {
        if Instant::now() >= self.deadline {
            self.answer(Err(Failed::not_signed(Error::Deadline)));
            return None;
        }
        let free = self.claim.compare_exchange(WAITING, STARTED, Ordering::AcqRel, Ordering::Acquire).is_ok();
        (free && !self.reply.is_closed()).then_some(self)
    }

    /// An asker that has gone meanwhile has counted this as unknown.
    fn answer(self, result: Result<Unverified, Failed>) {
        let _ = self.reply.send(result);
    }

    /// The token went away before a lane began.
    pub(super) fn turn_away(self, reason: &str) {
        self.answer(Err(Failed::not_signed(Error::Unusable(reason.into()))));
    }
}

/// A lane's working life: one term of the queue.
pub(super) fn serve(token: &Token, term: u64, mark: &Mark) {
    let mut session: Option<Session> = None;
    let spoilt = Arc::new(AtomicBool::new(false));
    while let Some(job) = token.jobs.next(term) {
        let Some(job) = job.claim() else { continue };
        let mut result = mark.inside(|| with_session(token, &mut session, &job, &spoilt));
        if result.as_ref().is_err_and(|failed| failed.outcome == Outcome::Again) {
            // Certain that nothing was signed, and that session is gone: once more with another.
            result = mark.inside(|| with_session(token, &mut session, &job, &spoilt));
        }
        job.answer(result);
        if mark.is_given_up() {
            if let Some(left) = session.take() {
                Token::discard(left);
            }
            return; // another lane has taken its place
        }
    }
    token.leave(mark, session);
}

/// One attempt with the lane's session, opened if there is none; kept only if it may be used again.
fn with_session(token: &Token, session: &mut Option<Session>, job: &Job, spoilt: &Arc<AtomicBool>) -> Result<Unverified, Failed> {
    if spoilt.swap(false, Ordering::AcqRel)
        && let Some(session) = session.take()
    {
        Token::discard(session);
    }
    let open = match session.take() {
        Some(open) => open,
        None => token.open_session(false).map_err(|error| {
            token.report(&error);
            let outcome = error.verdict().outcome;
            Failed { error, outcome }
        })?,
    };
    let result = attempt(token, &open, job, spoilt);
    if result.as_ref().map_or_else(|failed| failed.error.verdict().keep_session, |_| true) {
        *session = Some(open);
    } else {
        // An operation may still be active in it: the next C_SignInit would meet CKR_OPERATION_ACTIVE.
        Token::discard(open);
    }
    result
}

fn attempt(token: &Token, session: &Session, job: &Job, spoilt: &Arc<AtomicBool>) -> Result<Unverified, Failed> {
    let key = &job.key;
    let from = Instant::now();
    let sign = || objects::sign(session, job.handle, key.public.algorithm(), &job.message, key.id);
    match token.meter.sign.measure(sign) {
        Ok(signature) => Ok(Unverified { signature, took: from.elapsed(), spoilt: Arc::clone(spoilt) }),
        Err(error) => Err(failed(token, key, job.handle, error)),
    }
}

/// A signature that verifies, or none.
fn verified(token: &Token, key: &Bound, handle: ObjectHandle, message: &[u8], made: Unverified) -> Result<Vec<u8>, Failed> {
    if token.meter.verify_own.measure(|| key.verifies(message, &made.signature)) {
        token.report_signature(made.took);
        return Ok(made.signature);
    }
    made.spoilt.store(true, Ordering::Release);
    Err(failed(token, key, handle, Error::Corrupt(key.id)))
}

/// Counts the error, and says what may follow.
fn failed(token: &Token, key: &Bound, handle: ObjectHandle, error: Error) -> Failed {
    token.report(&error);
    if matches!(error, Error::Corrupt(_)) {
        tracing::error!(key = %key.id, "the token's signature does not verify; thrown away, all handles are looked up anew");
        token.epoch_ends_if_handle(key, handle);
    }
    let outcome = error.verdict().outcome;
    Failed { error, outcome }
}

/// Withdraws the job when its asker stops waiting, so that no lane begins what nobody will record.
struct Withdraw(Arc<AtomicU8>);

impl Withdraw {
    /// Whether it is now certain that no lane will begin.
    fn now(&self) -> bool {
        self.0.compare_exchange(WAITING, WITHDRAWN, Ordering::AcqRel, Ordering::Acquire) != Err(STARTED)
    }
}

impl Drop for Withdraw {
    fn drop(&mut self) {
        self.now();
    }
}

/// One attempt, until `deadline`. The signature is verified here.
async fn ask(
    token: &Token,
    key: &Arc<Bound>,
    handle: ObjectHandle,
    message: &Arc<[u8]>,
    deadline: Instant,
) -> Result<Vec<u8>, Failed> {
    let (reply, answer) = oneshot::channel();
    let claim = Arc::new(AtomicU8::new(WAITING));
    let withdraw = Withdraw(Arc::clone(&claim));
    let job = Job { key: Arc::clone(key), handle, message: Arc::clone(message), deadline, claim, reply };
    token.jobs.push(job).map_err(|refused| {
        Failed::not_signed(match refused {
            Refused::Full => Error::QueueFull,
            Refused::Shut => token.unusable(),
        })
    })?;
    match tokio::time::timeout_at(deadline.into(), answer).await {
        Ok(Ok(result)) => result.and_then(|made| verified(token, key, handle, message, made)),
        // The lane died, or its term ended, without a word; or it has not come back in time.
        ended => {
            let error = if ended.is_err() { Error::Deadline } else { token.unusable() };
            let outcome = if withdraw.now() { Outcome::NotSigned } else { Outcome::Unknown };
            Err(Failed { error, outcome })
        }
    }
}

/// A verified signature. The key is looked up anew at most once, and only where C_Sign was certainly not reached.
pub(super) async fn sign(
    token: &Arc<Token>,
    key: &Arc<Bound>,
    message: &Arc<[u8]>,
    deadline: Instant,
) -> Result<Vec<u8>, SignError> {
    let mut last = false;
    loop {
        let (epoch, handle) = token.handle_of(key, deadline).await.map_err(SignError::NotSigned)?;
        match ask(token, key, handle, message, deadline).await {
            Ok(signature) => return Ok(signature),
            Err(Failed { error, outcome: Outcome::Unknown }) => return Err(SignError::Unknown(error)),
            Err(Failed { outcome: Outcome::Resolve, .. }) if !last => token.epoch_ends(epoch),
            Err(Failed { error, .. }) => return Err(SignError::NotSigned(error)),
        }
        last = true;
    }
}

impl Token {
    /// The key's handle of the current epoch; looked up on the admin lane if there is none.
    pub(super) async fn handle_of(self: &Arc<Self>, key: &Arc<Bound>, deadline: Instant) -> Result<(u64, ObjectHandle), Error> {
        let known = |epoch| match key.location() {
            Location::At { epoch: at, handle } if at == epoch => Some(Ok((epoch, handle))),
            Location::Lost { epoch: at } if at == epoch => Some(Err(Error::KeyLost(key.id))),
            _ => None,
        };
        if let Some(answer) = known(self.epoch()) {
            return answer;
        }
        let _only = tokio::time::timeout_at(deadline.into(), key.lookup.lock()).await.map_err(|_| Error::Deadline)?;
        let epoch = self.epoch();
        if let Some(answer) = known(epoch) {
            return answer;
        }
        let from = Instant::now();
        let look = || {
            let wanted = Arc::clone(key);
            self.errand(deadline, move |session| objects::resolve(session, &wanted))
        };
        let mut found = look().await;
        // The admin lane's session may be what was lost: it has a new one now.
        if found.as_ref().is_err_and(|error| error.verdict().outcome == Outcome::Again) {
            found = look().await;
        }
        match found {
            Ok(handle) => {
                if self.admission.pace().is_zero() {
                    // A test signature was part of it: the first idea of what a signature takes, corrected by the next.
                    self.admission.note(from.elapsed());
                }
                key.set_location(Location::At { epoch, handle });
                key.set_trouble(None);
                Ok((epoch, handle))
            }
            Err(error) => {
                if matches!(error, Error::KeyLost(_)) {
                    key.set_location(Location::Lost { epoch });
                }
                if error.is_of_the_key() {
                    key.set_trouble(Some(error.to_string()));
                }
                Err(error)
            }
        }
    }

    fn epoch_ends_if_handle(&self, key: &Bound, handle: ObjectHandle) {
        if let Location::At { epoch, handle: current } = key.location()
            && current == handle
        {
            self.epoch_ends(epoch);
        }
    }

    /// Counts an error for the token's health, as the table says.
    pub(super) fn report(&self, error: &Error) {
        let served = self.is_usable();
        match error.verdict().token {
            Condition::Fine => {}
            Condition::Suspect if !self.suspect_again() => {}
            Condition::Suspect | Condition::Lost => self.suspend(&error.to_string(), Remedy::Restart),
            // What took this login took those of its neighbours.
            Condition::LoggedOut => self.module.suspend_all(self, &error.to_string()),
        }
        // What took it out of service was noted there.
        if !served || self.is_usable() {
            self.history.note(error);
        }
    }
}

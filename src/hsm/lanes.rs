//! Sign lanes: threads with one session each. The hot path opens no session, searches nothing and holds no lock across C_Sign. A lane
//! does nothing but sign: whoever asked verifies, here in [`ask`], while the lane has the device busy with the next.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use cryptoki::object::ObjectHandle;
use cryptoki::session::Session;
use tokio::sync::oneshot;

use super::error::{Error, SignError};
use super::faults::{Condition, Outcome, Remedy};
use super::keyring::{Bound, Location};
use super::objects;
use super::owners::Object;
use super::queue::{Mark, Refused};
use super::token::Token;

/// A lane is kept from others for no longer, but for one signature: the rest of a job goes back to the end of the queue.
pub(super) const CHUNK_TIME: Duration = Duration::from_millis(5);
/// The asker has gone: no lane will begin another signature.
const WITHDRAWN: usize = 1 << (usize::BITS - 1);

/// Signatures to be made by one key, one after the other.
pub(super) struct Job {
    key: Arc<Bound>,
    hold: Hold,
    inputs: Vec<Arc<[u8]>>,
    deadline: Instant,
    progress: Arc<Progress>,
    reply: oneshot::Sender<Result<(), Failed>>,
}

/// What a lane signs with. A session object is not destroyed while somebody holds it.
#[derive(Clone)]
pub(super) struct Hold {
    handle: ObjectHandle,
    epoch: u64,
    object: Option<Arc<Object>>,
}

impl Hold {
    /// Of a session object.
    pub(super) fn of(object: Arc<Object>) -> Self {
        Self { handle: object.handle, epoch: object.epoch(), object: Some(object) }
    }
}

/// How far a job has come.
#[derive(Default)]
struct Progress {
    /// For how many inputs a lane is about to call C_SignInit, or has; with [`WITHDRAWN`] there will be no more.
    begun: AtomicUsize,
    made: Mutex<Vec<Unverified>>,
}

impl Progress {
    /// Whether the lane may begin with this input.
    fn begin(&self, index: usize) -> bool {
        self.begun.compare_exchange(index, index + 1, Ordering::AcqRel, Ordering::Acquire).is_ok()
    }

    /// No other is begun from now on. With how many were.
    fn withdraw(&self) -> usize {
        self.begun.fetch_or(WITHDRAWN, Ordering::AcqRel) & !WITHDRAWN
    }

    fn made(&self) -> MutexGuard<'_, Vec<Unverified>> {
        self.made.lock().unwrap_or_else(PoisonError::into_inner)
    }
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
    pub(super) error: Error,
    outcome: Outcome,
}

impl Failed {
    fn not_signed(error: Error) -> Self {
        Self { error, outcome: Outcome::NotSigned }
    }
}

impl Job {
    /// An asker that has gone meanwhile has counted what was begun as unknown.
    fn answer(self, result: Result<(), Failed>) {
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
        let result = work_off(token, &mut session, &job, &spoilt, mark);
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

/// One input after the other, until one fails, or it is too late, or nobody listens any more. A device may be slower by now than when
/// the job was cut: what does not fit into [`CHUNK_TIME`] is left to the asker.
fn work_off(
    token: &Token,
    session: &mut Option<Session>,
    job: &Job,
    spoilt: &Arc<AtomicBool>,
    mark: &Mark,
) -> Result<(), Failed> {
    let from = Instant::now();
    for (index, input) in job.inputs.iter().enumerate() {
        let now = Instant::now();
        if now >= job.deadline || mark.is_given_up() {
            return Err(Failed::not_signed(Error::Deadline));
        }
        if index > 0 && now.duration_since(from) >= CHUNK_TIME {
            return Ok(());
        }
        if !job.progress.begin(index) || job.reply.is_closed() {
            return Err(Failed::not_signed(Error::Deadline)); // nobody hears it
        }
        let mut result = mark.inside(|| with_session(token, session, job, input, spoilt));
        if result.as_ref().is_err_and(|failed| failed.outcome == Outcome::Again) {
            // Certain that nothing was signed, and that session is gone: once more with another.
            result = mark.inside(|| with_session(token, session, job, input, spoilt));
        }
        job.progress.made().push(result?);
    }
    Ok(())
}

/// One attempt with the lane's session, opened if there is none; kept only if it may be used again.
fn with_session(
    token: &Token,
    session: &mut Option<Session>,
    job: &Job,
    input: &[u8],
    spoilt: &Arc<AtomicBool>,
) -> Result<Unverified, Failed> {
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
    let result = attempt(token, &open, job, input, spoilt);
    if result.as_ref().map_or_else(|failed| failed.error.verdict().keep_session, |_| true) {
        *session = Some(open);
    } else {
        // An operation may still be active in it: the next C_SignInit would meet CKR_OPERATION_ACTIVE.
        Token::discard(open);
    }
    result
}

fn attempt(token: &Token, session: &Session, job: &Job, input: &[u8], spoilt: &Arc<AtomicBool>) -> Result<Unverified, Failed> {
    let from = Instant::now();
    match token.meter.sign.measure(|| objects::sign(session, job.hold.handle, &job.key, input)) {
        Ok(signature) => Ok(Unverified { signature, took: from.elapsed(), spoilt: Arc::clone(spoilt) }),
        Err(error) => Err(failed(token, &job.key, &job.hold, error)),
    }
}

/// A signature that verifies, or none.
fn verified(token: &Token, key: &Bound, hold: &Hold, input: &[u8], made: Unverified) -> Result<Vec<u8>, Failed> {
    if token.meter.verify_own.measure(|| key.verifies(input, &made.signature)) {
        token.report_signature(made.took);
        if let Some(object) = &hold.object {
            object.prove();
        }
        return Ok(made.signature);
    }
    if hold.object.as_ref().is_some_and(|object| object.is_another_key()) {
        tracing::error!(key = %key.id, "another key came out of the blob of this one; its signature is thrown away");
        return Err(Failed { error: Error::KeyMismatch(key.id), outcome: Outcome::Unknown });
    }
    made.spoilt.store(true, Ordering::Release);
    Err(failed(token, key, hold, Error::Corrupt(key.id)))
}

/// Counts the error, and says what may follow.
fn failed(token: &Token, key: &Bound, hold: &Hold, error: Error) -> Failed {
    token.report(&error);
    if matches!(error, Error::Corrupt(_)) {
        tracing::error!(key = %key.id, "the token's signature does not verify; thrown away, all handles are looked up anew");
        token.epoch_ends(hold.epoch);
    }
    let outcome = error.verdict().outcome;
    Failed { error, outcome }
}

/// Withdraws the job when its asker stops waiting, so that no lane begins what nobody will record.
struct Withdraw(Arc<Progress>);

impl Drop for Withdraw {
    fn drop(&mut self) {
        self.0.withdraw();
    }
}

/// One attempt, until `deadline`. Each signature is verified here. An answer for each input that a lane has begun, in their order, and one
/// for the next if it cannot be signed; no more than that where the lane gave the rest back.
pub(super) async fn ask(
    token: &Token,
    key: &Arc<Bound>,
    hold: &Hold,
    inputs: Vec<Arc<[u8]>>,
    deadline: Instant,
) -> Vec<Result<Vec<u8>, Failed>> {
    let (reply, answer) = oneshot::channel();
    let progress = Arc::new(Progress::default());
    let withdraw = Withdraw(Arc::clone(&progress));
    let wanted = inputs.clone();
    let job = Job { key: Arc::clone(key), hold: hold.clone(), inputs, deadline, progress: Arc::clone(&progress), reply };
    if let Err(refused) = token.jobs.push(job) {
        let error = match refused {
            Refused::Full => Error::QueueFull,
            Refused::Shut => token.unusable(),
        };
        return vec![Err(Failed::not_signed(error))];
    }
    let ended = tokio::time::timeout_at(deadline.into(), answer).await;
    let begun = withdraw.0.withdraw();
    let made = std::mem::take(&mut *progress.made());
    let failed = match ended {
        Ok(Ok(result)) => result.err(),
        // The lane died, or its term ended, without a word; or it has not come back in time.
        ended => {
            let error = if ended.is_err() { Error::Deadline } else { token.unusable() };
            let outcome = if begun > made.len() { Outcome::Unknown } else { Outcome::NotSigned };
            Some(Failed { error, outcome })
        }
    };
    let complete = made.len() == wanted.len();
    let mut answers: Vec<_> = wanted.iter().zip(made).map(|(input, made)| verified(token, key, hold, input, made)).collect();
    answers.extend(failed.filter(|_| !complete).map(Err));
    answers
}

/// Verified signatures, one for each input. The key is looked up anew at most once, and only where C_Sign was certainly not reached. What
/// a lane gave back is asked for again, behind whoever has come meanwhile.
pub(super) async fn sign_all(
    token: &Arc<Token>,
    key: &Arc<Bound>,
    inputs: Vec<Arc<[u8]>>,
    deadline: Instant,
) -> Vec<Result<Vec<u8>, SignError>> {
    let mut signed = Vec::with_capacity(inputs.len());
    let mut last = false;
    loop {
        let hold = match token.hold_of(key, deadline).await {
            Ok(hold) => hold,
            Err(error) => {
                signed.push(Err(SignError::NotSigned(error)));
                break;
            }
        };
        let (mut again, mut ended) = (false, false);
        for answer in ask(token, key, &hold, inputs[signed.len()..].to_vec(), deadline).await {
            match answer {
                Ok(signature) => {
                    signed.push(Ok(signature));
                    continue;
                }
                Err(Failed { error, outcome: Outcome::Unknown }) => signed.push(Err(SignError::Unknown(error))),
                Err(Failed { outcome: Outcome::Resolve, .. }) if !last => again = true,
                Err(Failed { error, .. }) => signed.push(Err(SignError::NotSigned(error))),
            }
            ended = !again;
        }
        if ended || signed.len() == inputs.len() {
            break;
        }
        if again {
            match &hold.object {
                None => token.epoch_ends(hold.epoch),
                Some(object) => object.doubt(),
            }
            last = true;
        }
    }
    signed.resize_with(inputs.len(), || Err(SignError::NotSigned(Error::BatchEnded)));
    signed
}

/// One verified signature.
pub(super) async fn sign(
    token: &Arc<Token>,
    key: &Arc<Bound>,
    message: &Arc<[u8]>,
    deadline: Instant,
) -> Result<Vec<u8>, SignError> {
    let signed = sign_all(token, key, vec![Arc::clone(message)], deadline).await.pop();
    signed.unwrap_or_else(|| Err(SignError::Unknown(token.unusable())))
}

impl Token {
    /// What a key signs with, known to be its own in this epoch.
    async fn hold_of(self: &Arc<Self>, key: &Arc<Bound>, deadline: Instant) -> Result<Hold, Error> {
        match &key.owned {
            None => self.handle_of(key, deadline).await.map(|(epoch, handle)| Hold { handle, epoch, object: None }),
            Some(owned) => self.object_of(key, owned, deadline).await.map(Hold::of),
        }
    }

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

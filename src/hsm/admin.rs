//! The admin lane: one thread, one read-write session, token objects only, one errand at a time.

use std::sync::Arc;
use std::time::Instant;

use cryptoki::session::Session;
use tokio::sync::oneshot;

use super::error::Error;
use super::queue::{Mark, Queue, Refused};
use super::token::Token;

/// Something to do with token objects. Says whether the session is still good afterwards.
pub(super) type Errand = Box<dyn FnOnce(&Token, Result<&Session, Error>) -> bool + Send>;

/// The admin lane's working life: one term of the queue.
pub(super) fn serve(token: &Token, term: u64, mark: &Mark) {
    let mut session: Option<Session> = None;
    while let Some(errand) = token.errands.next(term) {
        if session.is_none() {
            match mark.inside(|| token.open_session(true)) {
                Ok(opened) => session = Some(opened),
                Err(error) => {
                    token.report(&error);
                    errand(token, Err(error));
                    continue;
                }
            }
        }
        let Some(open) = session.as_ref() else { continue };
        let good = mark.inside(|| {
            let _objects = token.module.objects();
            errand(token, Ok(open))
        });
        if !good && let Some(spoilt) = session.take() {
            mark.inside(|| Token::discard(spoilt));
        }
    }
    token.leave(mark, session);
}

impl Token {
    /// Runs `work` on the admin lane. One that is not begun by `deadline` never is; one that was begun runs to its end, even if nobody
    /// waits any more: what C_GenerateKeyPair made is then found by its CKA_ID.
    pub(super) async fn errand<R: Send + 'static>(
        self: &Arc<Self>,
        deadline: Instant,
        work: impl FnOnce(&Session) -> Result<R, Error> + Send + 'static,
    ) -> Result<R, Error> {
        self.errand_on(&self.errands, deadline, |error| error.verdict().keep_session, work).await
    }

    /// The same for another thread's queue, with what lets its session live on.
    pub(super) async fn errand_on<R: Send + 'static>(
        self: &Arc<Self>,
        queue: &Queue<Errand>,
        deadline: Instant,
        keeps_session: fn(&Error) -> bool,
        work: impl FnOnce(&Session) -> Result<R, Error> + Send + 'static,
    ) -> Result<R, Error> {
        let (reply, answer) = oneshot::channel();
        let errand: Errand = Box::new(move |token, session| {
            if reply.is_closed() || Instant::now() >= deadline {
                return true;
            }
            let result = session.and_then(work);
            let good = match &result {
                Ok(_) => true,
                Err(error) => {
                    token.report(error);
                    keeps_session(error)
                }
            };
            let _ = reply.send(result);
            good
        });
        queue.push(errand).map_err(|refused| match refused {
            Refused::Full => Error::QueueFull,
            Refused::Shut => self.unusable(),
        })?;
        match tokio::time::timeout_at(deadline.into(), answer).await {
            Ok(Ok(result)) => result,
            Ok(Err(_)) if Instant::now() < deadline => Err(self.unusable()),
            Ok(Err(_)) | Err(_) => Err(Error::Deadline),
        }
    }
}

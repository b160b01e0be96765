//! An act ends whether its caller waits or not.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::runtime::Handle;

use crate::model::Refusal;

/// An act in the task of whoever waits for it: no other thread is woken, no task made. Dropped before its end, because nobody waits any
/// more, it goes on in a task of its own. A crash, or the end of the runtime, ends it anywhere: what it leaves then is what it is built
/// for.
pub(super) struct ToItsEnd<T: Send + 'static>(Option<Act<T>>);

type Act<T> = Pin<Box<dyn Future<Output = Result<T, Refusal>> + Send>>;

impl<T: Send + 'static> ToItsEnd<T> {
    pub(super) fn of(act: impl Future<Output = Result<T, Refusal>> + Send + 'static) -> Self {
        Self(Some(Box::pin(act)))
    }
}

impl<T: Send + 'static> Future for ToItsEnd<T> {
    type Output = Result<T, Refusal>;

    /// An act that panics is refused, as a task that does would be.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Some(act) = &mut self.0 else { return Poll::Ready(Err(Refusal::internal("an act was awaited after its end"))) };
        let polled = catch_unwind(AssertUnwindSafe(|| act.as_mut().poll(context)));
        let polled = polled.unwrap_or_else(|_| Poll::Ready(Err(Refusal::internal("an act has panicked"))));
        if polled.is_ready() {
            self.0 = None;
        }
        polled
    }
}

impl<T: Send + 'static> Drop for ToItsEnd<T> {
    fn drop(&mut self) {
        if let Some(act) = self.0.take()
            && let Ok(runtime) = Handle::try_current()
        {
            runtime.spawn(act);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::oneshot;
    use tokio::time::timeout;

    use super::*;
    use crate::model::Reason;

    #[tokio::test]
    async fn an_act_that_nobody_waits_for_goes_on_from_where_it_was() {
        let (begun, has_begun) = oneshot::channel();
        let (go_on, may_go_on) = oneshot::channel::<()>();
        let (done, is_done) = oneshot::channel();
        let act = ToItsEnd::of(async move {
            begun.send(()).unwrap();
            may_go_on.await.unwrap();
            done.send(7).unwrap();
            Ok(())
        });
        let waits = tokio::spawn(act);
        has_begun.await.unwrap();
        waits.abort();
        assert!(waits.await.unwrap_err().is_cancelled());
        go_on.send(()).unwrap();
        assert_eq!(timeout(Duration::from_secs(5), is_done).await.unwrap().unwrap(), 7);
    }

    #[tokio::test]
    async fn an_act_that_panics_is_refused_and_not_polled_again() {
        let refused = ToItsEnd::<()>::of(async { panic!("as no act should") }).await.unwrap_err();
        assert_eq!(refused.reason, Reason::Internal);
    }
}

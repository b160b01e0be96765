//! An act ends whether its caller waits or not.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::pin::Pin;
use std::task::{Context, Poll};

use tokio::runtime::Handle;

use crate::model::Refusal;

use super::gatekeeper::KeyShare;

/// An act in the task of whoever waits for it: no other thread is woken, no task made. Dropped before its end, because nobody waits any
/// more, it goes on in a task of its own. A crash, or the end of the runtime, ends it anywhere: what it leaves then is what it is built
/// for. Until its end it is one of those that its agent may have under way.
pub(super) struct ToItsEnd<T: Send + 'static>(Option<(Act<T>, KeyShare)>);

type Act<T> = Pin<Box<dyn Future<Output = Result<T, Refusal>> + Send>>;

impl<T: Send + 'static> ToItsEnd<T> {
    pub(super) fn of(act: impl Future<Output = Result<T, Refusal>> + Send + 'static, share: KeyShare) -> Self {
        Self(Some((Box::pin(act), share)))
    }
}

impl<T: Send + 'static> Future for ToItsEnd<T> {
    type Output = Result<T, Refusal>;

    /// An act that panics is refused, as a task that does would be.
    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let Some((act, _)) = &mut self.0 else { return Poll::Ready(Err(Refusal::internal("an act was awaited after its end"))) };
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
        if let Some((act, share)) = self.0.take()
            && let Ok(runtime) = Handle::try_current()
        {
            runtime.spawn(async move {
                let _share = share;
                act.await
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::sync::oneshot;
    use tokio::time::timeout;

    use super::super::shares::Shares;
    use super::*;
    use crate::model::{AgentId, Reason};

    #[tokio::test]
    async fn an_act_that_nobody_waits_for_goes_on_from_where_it_was_and_is_under_way_until_its_end() {
        let (shares, agent) = (Shares::of(1), AgentId::parse("builder/1").unwrap());
        let share = KeyShare::new(shares.take(agent.clone()).unwrap());
        let (begun, has_begun) = oneshot::channel();
        let (go_on, may_go_on) = oneshot::channel::<()>();
        let (done, is_done) = oneshot::channel();
        let act = async move {
            begun.send(()).unwrap();
            may_go_on.await.unwrap();
            done.send(7).unwrap();
            Ok(())
        };
        let act = ToItsEnd::of(act, share);
        let waits = tokio::spawn(act);
        has_begun.await.unwrap();
        waits.abort();
        assert!(waits.await.unwrap_err().is_cancelled());
        assert!(shares.take(agent.clone()).is_none());
        go_on.send(()).unwrap();
        assert_eq!(timeout(Duration::from_secs(5), is_done).await.unwrap().unwrap(), 7);
        // The tests' runtime has one thread: the task that said so ends before this goes on.
        assert!(shares.take(agent).is_some());
    }

    #[tokio::test]
    async fn an_act_that_panics_is_refused_and_not_polled_again() {
        let share = KeyShare::new(Shares::of(1).take(AgentId::parse("builder/1").unwrap()).unwrap());
        let refused = ToItsEnd::<()>::of(async { panic!("as no act should") }, share).await.unwrap_err();
        assert_eq!(refused.reason, Reason::Internal);
    }
}

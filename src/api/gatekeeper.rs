//! Which calls a stranger may make over TCP, and how many calls about keys an agent. Whatever is not in the table needs a client certificate; each act asks the ledger besides.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{Request, Response};
use tonic::body::Body;
use tower::{Layer, Service};

use crate::authn::Connection;
use crate::model::{AgentId, Reason, Refusal};

use super::headers::unindexed;
use super::refusal::status_of;
use super::shares::{Share, Shares};

/// Open without a client certificate. Not Health/Watch: its streams would cost a stranger nothing and stay.
const OPEN: [&str; 2] = ["/keyward.v1.AgentService/Attest", "/grpc.health.v1.Health/Check"];

/// After which one of them has ended, in all likelihood.
const KEY_CALLS_WAIT: Duration = Duration::from_millis(100);
/// Calls about keys, by the path of their service.
const KEYS: &str = "/keyward.v1.KeyService/";
/// Calls about keys of one agent under way at once. Counted before a message is read and until the answer has been taken, since what
/// either brings along takes memory; and until the act has ended, also where its caller hung up.
const KEY_CALLS_MAX: usize = 64;

/// One of them, among the extensions of its request: its act keeps it.
pub(super) type KeyShare = Arc<Share<AgentId>>;

#[derive(Debug, Clone)]
pub(super) struct Gatekeeper {
    keys: Arc<Shares<AgentId>>,
}

impl Default for Gatekeeper {
    fn default() -> Self {
        Self { keys: Shares::of(KEY_CALLS_MAX) }
    }
}

impl<S> Layer<S> for Gatekeeper {
    type Service = Kept<S>;

    fn layer(&self, inner: S) -> Kept<S> {
        Kept { inner, keys: Arc::clone(&self.keys) }
    }
}

#[derive(Debug, Clone)]
pub(super) struct Kept<S> {
    inner: S,
    keys: Arc<Shares<AgentId>>,
}

impl<S> Service<Request<Body>> for Kept<S>
where
    S: Service<Request<Body>, Response = Response<Body>>,
    S::Future: Send + 'static,
    S::Error: Send + 'static,
{
    type Response = Response<Body>;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, mut request: Request<Body>) -> Self::Future {
        let refuse = |refusal: &Refusal| {
            let refused = unindexed(status_of(refusal).into_http());
            Box::pin(std::future::ready(Ok(refused)))
        };
        let caller = request.extensions().get::<Arc<Connection>>().and_then(|connection| connection.named());
        let Some(caller) = caller else {
            if !OPEN.contains(&request.uri().path()) {
                return refuse(&Refusal::new(Reason::Unauthenticated, "present a client certificate"));
            }
            let answer = self.inner.call(request);
            return Box::pin(async move { answer.await.map(unindexed) });
        };
        if !request.uri().path().starts_with(KEYS) {
            let answer = self.inner.call(request);
            return Box::pin(async move { answer.await.map(unindexed) });
        }
        let Some(share) = self.keys.take(caller.clone()).map(KeyShare::new) else {
            let advice = "too many calls about keys of this agent are under way; await an answer";
            return refuse(&Refusal::new(Reason::Overloaded, advice).retry_after(KEY_CALLS_WAIT));
        };
        request.extensions_mut().insert(KeyShare::clone(&share));
        let answer = self.inner.call(request);
        Box::pin(async move { Ok(answer.await.map(unindexed)?.map(|body| Body::new(Held { body, _share: share }))) })
    }
}

/// An answer that its agent has not taken yet. Whoever reads none of them is not given more and more.
struct Held {
    body: Body,
    _share: KeyShare,
}

impl http_body::Body for Held {
    type Data = <Body as http_body::Body>::Data;
    type Error = <Body as http_body::Body>::Error;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
    ) -> Poll<Option<Result<http_body::Frame<Self::Data>, Self::Error>>> {
        Pin::new(&mut self.body).poll_frame(context)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> http_body::SizeHint {
        self.body.size_hint()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_that_nobody_takes_is_a_call_under_way() {
        let (shares, agent) = (Shares::of(1), AgentId::parse("builder/1").unwrap());
        let share = KeyShare::new(shares.take(agent.clone()).unwrap());
        let answer = Body::new(Held { body: Body::new("an answer".to_owned()), _share: share });
        assert!(shares.take(agent.clone()).is_none());
        drop(answer);
        assert!(shares.take(agent).is_some());
    }
}

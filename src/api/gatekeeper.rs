//! Which calls a stranger may make over TCP, and how many calls about keys an agent. Whatever is not in the table needs a client certificate; each act asks the ledger besides.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use http::{HeaderMap, Request, Response};
use tonic::Code;
use tonic::body::Body;
use tower::{Layer, Service};

use crate::authn::Connection;
use crate::ledger::Ledger;
use crate::model::{AgentId, Reason, Refusal};

use super::KEY_MESSAGE_BYTES_MAX;
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

#[derive(Clone)]
pub(super) struct Gatekeeper {
    ledger: Ledger,
    keys: Arc<Shares<AgentId>>,
}

impl Gatekeeper {
    pub(super) fn of(ledger: Ledger) -> Self {
        Self { ledger, keys: Shares::of(KEY_CALLS_MAX) }
    }
}

impl<S> Layer<S> for Gatekeeper {
    type Service = Kept<S>;

    fn layer(&self, inner: S) -> Kept<S> {
        Kept { inner, gatekeeper: self.clone() }
    }
}

#[derive(Clone)]
pub(super) struct Kept<S> {
    inner: S,
    gatekeeper: Gatekeeper,
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
        let Some(share) = self.gatekeeper.keys.take(caller.clone()).map(KeyShare::new) else {
            let advice = "too many calls about keys of this agent are under way; await an answer";
            return refuse(&Refusal::new(Reason::Overloaded, advice).retry_after(KEY_CALLS_WAIT));
        };
        request.extensions_mut().insert(KeyShare::clone(&share));
        let (ledger, path) = (self.gatekeeper.ledger.clone(), request.uri().path_and_query().cloned());
        let answer = self.inner.call(request);
        Box::pin(async move {
            let mut answer = answer.await?;
            if let Some(refusal) = unread(answer.headers()) {
                // Who hung up before the whole of it was there is not refused: this is dropped here then.
                tokio::task::yield_now().await;
                let method = path.as_ref().and_then(|path| path.path().strip_prefix(KEYS)).unwrap_or_default();
                answer = status_of(&ledger.refused(share.who(), method, refusal).await).into_http();
            }
            Ok(unindexed(answer).map(|body| Body::new(Held { body, _share: share })))
        })
    }
}

/// Why the transport did not read a call's message. What an act refuses has its reason already.
fn unread(headers: &HeaderMap) -> Option<Refusal> {
    let code = headers.get("grpc-status").filter(|_| !headers.contains_key("grpc-status-details-bin"))?;
    match Code::from_bytes(code.as_bytes()) {
        Code::OutOfRange | Code::ResourceExhausted => {
            let advice = format!("send a message of at most {KEY_MESSAGE_BYTES_MAX} bytes; sign a large batch in parts");
            Some(Refusal::new(Reason::RequestTooLarge, advice))
        }
        Code::Internal => Some(Refusal::new(Reason::MalformedRequest, "send one well-formed message")),
        _ => None,
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
    use tonic::Status;

    use super::*;

    #[test]
    fn what_the_transport_did_not_read_has_a_reason_and_what_an_act_refused_keeps_its_own() {
        let reason = |status: Status| unread(status.into_http::<Body>().headers()).map(|refusal| refusal.reason);
        assert_eq!(reason(Status::out_of_range("decoded message length too large")), Some(Reason::RequestTooLarge));
        assert_eq!(reason(Status::internal("failed to decode")), Some(Reason::MalformedRequest));
        assert_eq!(reason(Status::unimplemented("no such method")), None);
        for told in [Reason::RequestTooLarge, Reason::Internal, Reason::RateLimited] {
            assert_eq!(reason(status_of(&Refusal::new(told, "as it says"))), None);
        }
    }

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

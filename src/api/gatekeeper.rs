//! Which calls a stranger may make over TCP. Whatever is not in the table needs a client certificate; each act asks the ledger besides.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use http::{Request, Response};
use tonic::body::Body;
use tower::{Layer, Service};

use crate::authn::Connection;
use crate::model::{Reason, Refusal};

use super::headers::unindexed;
use super::refusal::status_of;

/// Open without a client certificate. Not Health/Watch: its streams would cost a stranger nothing and stay.
const OPEN: [&str; 2] = ["/keyward.v1.AgentService/Attest", "/grpc.health.v1.Health/Check"];

#[derive(Debug, Clone, Copy)]
pub(super) struct Gatekeeper;

impl<S> Layer<S> for Gatekeeper {
    type Service = Kept<S>;

    fn layer(&self, inner: S) -> Kept<S> {
        Kept(inner)
    }
}

#[derive(Debug, Clone)]
pub(super) struct Kept<S>(S);

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
        self.0.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let stranger = request.extensions().get::<Arc<Connection>>().is_none_or(|connection| connection.is_stranger());
        if stranger && !OPEN.contains(&request.uri().path()) {
            let refusal = Refusal::new(Reason::Unauthenticated, "present a client certificate");
            let refused = unindexed(status_of(&refusal).into_http());
            return Box::pin(std::future::ready(Ok(refused)));
        }
        let answer = self.0.call(request);
        Box::pin(async move { answer.await.map(unindexed) })
    }
}

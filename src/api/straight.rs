//! Calls about keys go straight to their service. Through the router each would cost a copy of the service, its path taken apart and two
//! boxes around what it brings; of a signature that is a part to be seen.

use std::convert::Infallible;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};

use http::{Request, Response};
use tonic::body::Body;
use tonic::server::NamedService;
use tower::{Layer, Service};

/// `service` for what is in its name, the router for the rest.
#[derive(Debug, Clone)]
pub(super) struct Straight<K, S = ()> {
    service: K,
    rest: S,
}

impl<K> Straight<K> {
    pub(super) fn to(service: K) -> Self {
        Self { service, rest: () }
    }
}

impl<K: Clone, S> Layer<S> for Straight<K> {
    type Service = Straight<K, S>;

    fn layer(&self, rest: S) -> Straight<K, S> {
        Straight { service: self.service.clone(), rest }
    }
}

type Answer = Pin<Box<dyn Future<Output = Result<Response<Body>, Infallible>> + Send>>;

impl<K, S> Service<Request<Body>> for Straight<K, S>
where
    K: Service<Request<Body>, Response = Response<Body>, Error = Infallible, Future = Answer> + NamedService,
    S: Service<Request<Body>, Response = Response<Body>, Error = Infallible>,
    S::Future: Send + 'static,
{
    type Response = Response<Body>;
    type Error = Infallible;
    type Future = Answer;

    /// The service is always ready, as a generated one is.
    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
        self.rest.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Answer {
        let method = request.uri().path().strip_prefix('/').and_then(|path| path.strip_prefix(K::NAME));
        if method.is_some_and(|method| method.starts_with('/')) {
            return self.service.call(request);
        }
        Box::pin(self.rest.call(request))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Answers with its number in the status.
    #[derive(Clone)]
    struct Numbered(u16);

    impl NamedService for Numbered {
        const NAME: &'static str = "a.Service";
    }

    impl Service<Request<Body>> for Numbered {
        type Response = Response<Body>;
        type Error = Infallible;
        type Future = Answer;

        fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), Infallible>> {
            Poll::Ready(Ok(()))
        }

        fn call(&mut self, _: Request<Body>) -> Answer {
            let answer = Response::builder().status(self.0).body(Body::empty()).unwrap();
            Box::pin(async move { Ok(answer) })
        }
    }

    #[tokio::test]
    async fn what_is_in_the_name_of_the_service_goes_to_it_and_all_else_to_the_router() {
        let mut straight = Straight::to(Numbered(200)).layer(Numbered(404));
        let paths = ["/a.Service/Do", "/a.Service/", "/a.Service", "/a.ServiceToo/Do", "/b/a.Service/Do", "/", "*"];
        for (path, number) in paths.into_iter().zip([200, 200, 404, 404, 404, 404, 404]) {
            let request = Request::builder().uri(path).body(Body::empty()).unwrap();
            assert_eq!(straight.call(request).await.unwrap().status(), number, "{path}");
        }
    }
}

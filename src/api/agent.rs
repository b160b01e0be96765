//! AgentService.

use std::net::IpAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Semaphore, watch};
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tokio_stream::{Stream, StreamExt as _};
use tonic::{Request, Response, Status, Streaming};

use crate::acts::{Acts, Issued};
use crate::attest::{Ask, Challenge};
use crate::authn::Connection;
use crate::model::{AgentId, Reason, Refusal};
use crate::proto::agent_service_server::AgentService;
use crate::proto::{
    self, AttestRequest, AttestResponse, RenewRequest, RenewResponse, WatchBundleRequest, WatchBundleResponse,
    attest_response::Step,
};

use super::convert;
use super::refusal::status_of;
use super::shares::{Shares, network_of};

/// Renewals of one agent under way at once. One is what it needs; more are answers that it has lost.
const RENEWALS_MAX: usize = 4;
/// Streams of one agent that follow the bundle. One is what it needs; more are of a process that was replaced, or of a connection
/// whose end nobody has noticed yet.
const WATCHES_MAX: usize = 4;

pub(super) struct Agents {
    acts: Arc<Acts>,
    strangers: Arc<Semaphore>,
    shares: Arc<Shares<IpAddr>>,
    renewals: Arc<Shares<AgentId>>,
    watches: Arc<Shares<AgentId>>,
    watchers: Arc<Semaphore>,
    stopping: watch::Receiver<bool>,
}

impl Agents {
    /// Who follows the bundle keeps a connection, of `connections_max`: at most half of them, so that renewals find the other. Streams without
    /// an end of their own end when `stopping` is true.
    pub(super) fn new(acts: Arc<Acts>, strangers_max: usize, connections_max: usize, stopping: watch::Receiver<bool>) -> Self {
        Self {
            acts,
            strangers: Arc::new(Semaphore::new(strangers_max)),
            shares: Shares::of(strangers_max / 2),
            renewals: Shares::of(RENEWALS_MAX),
            watches: Shares::of(WATCHES_MAX),
            watchers: Arc::new(Semaphore::new(connections_max / 2)),
            stopping,
        }
    }

    fn connection<T>(request: &Request<T>) -> Result<Arc<Connection>, Status> {
        request
            .extensions()
            .get::<Arc<Connection>>()
            .cloned()
            .ok_or_else(|| status_of(&Refusal::internal("a request without a connection")))
    }
}

fn credential(acts: &Acts, issued: Issued) -> Result<proto::Credential, Refusal> {
    Ok(convert::credential(issued, acts.bundle()?))
}

#[tonic::async_trait]
impl AgentService for Agents {
    type AttestStream = Pin<Box<dyn Stream<Item = Result<AttestResponse, Status>> + Send>>;

    /// The challenge is the first message; it lives in this stream's task and dies with it.
    async fn attest(&self, request: Request<Streaming<AttestRequest>>) -> Result<Response<Self::AttestStream>, Status> {
        let connection = Self::connection(&request)?;
        let share = self.shares.take(network_of(connection.source()));
        let place = share.and_then(|share| Some((Arc::clone(&self.strangers).try_acquire_owned().ok()?, share)));
        let Some(place) = place else {
            self.acts.ledger().refused_stranger(Reason::Overloaded, Some(connection.source()));
            return Err(status_of(&Refusal::new(
                Reason::Overloaded,
                "too many attestations are under way; try again in a moment",
            )));
        };
        let mut requests = request.into_inner();
        let acts = Arc::clone(&self.acts);
        let (answers, stream) = tokio::sync::mpsc::channel(2);
        tokio::spawn(async move {
            let _place = place;
            let challenge = Challenge::new();
            let step = Step::Challenge(proto::Challenge {
                nonce: challenge.nonce().to_vec(),
                expires_seconds: u32::try_from(Challenge::LIFETIME.as_secs()).unwrap_or(10),
            });
            if answers.send(Ok(AttestResponse { step: Some(step) })).await.is_err() {
                return;
            }
            let answer = match timeout(Challenge::LIFETIME, requests.next()).await {
                Ok(Some(Ok(AttestRequest { ask, proof }))) => {
                    // From here on the client may go: what has begun is brought to its end.
                    let attested = async { acts.attest(&connection, &challenge, Ask::parse(&ask, proof)?).await };
                    attested.await.and_then(|issued| credential(&acts, issued))
                }
                Ok(Some(Err(status))) => {
                    // Told, where the client is still there: a message past the transport's bound, or none of ours.
                    tracing::debug!(%status, "an attestation broke off");
                    let refusal = match status.code() {
                        tonic::Code::OutOfRange | tonic::Code::ResourceExhausted => {
                            Refusal::new(Reason::RequestTooLarge, "send an ask of at most 6,144 bytes and a proof of at most 80")
                        }
                        _ => Refusal::new(Reason::MalformedRequest, "send one well-formed AttestRequest"),
                    };
                    Err(refusal)
                }
                Ok(None) => return,
                Err(_) => Err(Refusal::new(Reason::ChallengeExpired, "answer the challenge within ten seconds")),
            };
            let answer = answer
                .map(|credential| AttestResponse { step: Some(Step::Credential(credential)) })
                .map_err(|refusal| status_of(&refusal));
            let _ = answers.send(answer).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<RenewResponse>, Status> {
        let connection = Self::connection(&request)?;
        // Who has no name is refused by the act.
        let share = connection.named().map(|agent| self.renewals.take(agent.clone()));
        if matches!(share, Some(None)) {
            self.acts.ledger().refused_stranger(Reason::Overloaded, Some(connection.source()));
            let refusal = Refusal::new(Reason::Overloaded, "too many renewals of this agent are under way; await an answer");
            return Err(status_of(&refusal.retry_after(Refusal::SOON)));
        }
        let acts = Arc::clone(&self.acts);
        let RenewRequest { ask, proof } = request.into_inner();
        // A task of its own: a client that goes away changes nothing.
        let renewed = tokio::spawn(async move {
            let _share = share;
            let issued = acts.renew(&connection, Ask::parse(&ask, proof)?).await?;
            credential(&acts, issued)
        });
        let credential =
            renewed.await.unwrap_or_else(|error| Err(Refusal::internal(error))).map_err(|refusal| status_of(&refusal))?;
        Ok(Response::new(RenewResponse { credential: Some(credential) }))
    }

    type WatchBundleStream = Pin<Box<dyn Stream<Item = Result<WatchBundleResponse, Status>> + Send>>;

    /// Ends with the connection, so with the client's certificate.
    async fn watch_bundle(&self, request: Request<WatchBundleRequest>) -> Result<Response<Self::WatchBundleStream>, Status> {
        let connection = Self::connection(&request)?;
        let mut watch = self.acts.watch_bundle(&connection).await.map_err(|refusal| status_of(&refusal))?;
        let refuse = |reason, advice, wait| {
            self.acts.ledger().refused_stranger(reason, Some(connection.source()));
            status_of(&Refusal::new(reason, advice).retry_after(Duration::from_secs(wait)))
        };
        let share = connection.named().and_then(|agent| self.watches.take(agent.clone()));
        let share = share.ok_or_else(|| {
            refuse(Reason::WatchesTaken, "this agent follows the bundle as often as it may; end another stream", 10)
        })?;
        let place = Arc::clone(&self.watchers).try_acquire_owned();
        let place = place
            .map_err(|_| refuse(Reason::Overloaded, "too many follow the bundle; renewals bring it until there is room", 60))?;
        let mut stopping = self.stopping.clone();
        let (answers, stream) = tokio::sync::mpsc::channel(1);
        tokio::spawn(async move {
            let _place = (place, share);
            // A place first, then what goes there: who reads slowly gets the newest bundle, not those before it.
            while let Ok(place) = answers.reserve().await {
                let told = tokio::select! {
                    told = watch.next() => told,
                    _ = stopping.wait_for(|stopping| *stopping) => {
                        let refusal = Refusal::new(Reason::Draining, "the daemon is stopping; follow it again when it is back");
                        Err(refusal.retry_after(Duration::from_secs(1)))
                    }
                    () = answers.closed() => return,
                };
                let over = told.is_err();
                place.send(told.map_err(|refusal| status_of(&refusal)));
                if over {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(stream))))
    }
}

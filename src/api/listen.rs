//! Sockets: TLS connections with an identity and an end, and the operator socket.

use std::future::Future;
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{Instant, Sleep, sleep_until, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_rustls::server::TlsStream;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::server::Connected;

use crate::acts::Acts;
use crate::authn::{Connection, Operator, OperatorRefused, Tls};
use crate::config;
use crate::model::{AgentId, Reason, thread_cpu_nanos};

use super::gather::Gathered;
use super::shares::{Share, Shares, network_of};

/// A handshake has this long.
const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(5);
/// A connection without a client certificate ends after this long: an attestation takes ten seconds, a look at health less.
const STRANGER_LIFETIME: Duration = Duration::from_secs(60);
/// Connections of one agent at once.
const AGENT_CONNECTIONS_MAX: usize = 64;
/// Operators' connections at once.
const OPERATOR_CONNECTIONS_MAX: usize = 64;
/// Connections at once of local peers that are no operators and are about to be told so, and how long they have for it.
const REFUSED_CONNECTIONS_MAX: usize = 8;
const REFUSED_LIFETIME: Duration = Duration::from_secs(5);
/// After an error of accept(2): out of file descriptors, or the peer is gone already. No spinning.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

/// One connection with what is known of its peer. A read after the certificate's end fails, and the connection with it; the read that
/// always waits wakes at that moment.
pub(super) struct Held<Io, Peer> {
    io: Io,
    peer: Peer,
    ends: Option<Pin<Box<Sleep>>>,
    _places: Places,
}

/// What a connection takes up.
type Places = (OwnedSemaphorePermit, Option<Taken>);

/// What it takes of what its kind of peer shares.
enum Taken {
    Agent { _share: Share<AgentId> },
    Stranger { _place: OwnedSemaphorePermit, _share: Share<IpAddr> },
}

impl<Io, Peer: Clone + Send + Sync + 'static> Connected for Held<Io, Peer> {
    type ConnectInfo = Peer;

    fn connect_info(&self) -> Peer {
        self.peer.clone()
    }
}

impl<Io, Peer> Held<Io, Peer> {
    fn over(&mut self, context: &mut Context<'_>) -> bool {
        self.ends.as_mut().is_some_and(|ends| ends.as_mut().poll(context).is_ready())
    }
}

fn ended() -> io::Error {
    io::Error::new(
        io::ErrorKind::ConnectionAborted,
        "the connection's time is over: its client certificate has expired, or it has none",
    )
}

impl<Io: AsyncRead + Unpin, Peer: Unpin> AsyncRead for Held<Io, Peer> {
    fn poll_read(mut self: Pin<&mut Self>, context: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.over(context) {
            return Poll::Ready(Err(ended()));
        }
        Pin::new(&mut self.io).poll_read(context, buffer)
    }
}

impl<Io: AsyncWrite + Unpin, Peer: Unpin> AsyncWrite for Held<Io, Peer> {
    fn poll_write(mut self: Pin<&mut Self>, context: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write(context, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_flush(context)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.io).poll_shutdown(context)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.io).poll_write_vectored(context, bytes)
    }

    fn is_write_vectored(&self) -> bool {
        self.io.is_write_vectored()
    }
}

pub(super) type Agent = Held<Gathered<TlsStream<TcpStream>>, Arc<Connection>>;

/// Accepted and identified TLS connections, at most `limit` at once: one more waits in the kernel's queue. Ends when the receiver does.
pub(super) fn tls(acts: Arc<Acts>, listener: TcpListener, settings: Arc<Tls>, limit: usize) -> ReceiverStream<io::Result<Agent>> {
    let (sender, receiver) = mpsc::channel(64);
    let places = Arc::new(Semaphore::new(limit));
    // Agents' connections always find half of the places: strangers have the other, and one source of them half of that many.
    let strangers = Strangers { places: Arc::new(Semaphore::new((limit / 2).max(1))), shares: Shares::of(limit / 4) };
    let agents = Shares::of(AGENT_CONNECTIONS_MAX);
    tokio::spawn(async move {
        loop {
            let place = tokio::select! {
                place = Arc::clone(&places).acquire_owned() => place,
                () = sender.closed() => return,
            };
            let Ok(place) = place else { return };
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = sender.closed() => return,
            };
            let (stream, address) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            // A stranger until its handshake is over.
            let source = address.ip().to_canonical();
            let Some(share) = strangers.shares.take(network_of(source)) else {
                acts.ledger().refused_stranger(Reason::Overloaded, Some(source));
                continue;
            };
            let stranger = Stranger { source, share, places: Arc::clone(&strangers.places), agents: Arc::clone(&agents) };
            let trusting = Arc::clone(&settings);
            tokio::spawn(handshake(Arc::clone(&acts), trusting, stream, place, stranger, sender.clone()));
        }
    });
    ReceiverStream::new(receiver)
}

/// What connections without a client certificate share.
struct Strangers {
    places: Arc<Semaphore>,
    shares: Arc<Shares<IpAddr>>,
}

/// A peer of which only its address is known yet.
struct Stranger {
    source: IpAddr,
    share: Share<IpAddr>,
    places: Arc<Semaphore>,
    agents: Arc<Shares<AgentId>>,
}

async fn handshake(
    acts: Arc<Acts>,
    trusting: Arc<Tls>,
    stream: TcpStream,
    place: OwnedSemaphorePermit,
    stranger: Stranger,
    sender: mpsc::Sender<io::Result<Agent>>,
) {
    let source = stranger.source;
    // As they are now: whom they trust may change with every connection.
    let Some(settings) = trusting.settings() else { return };
    let acceptor = TlsAcceptor::from(settings);
    let _ = stream.set_nodelay(true);
    let shaken = Metered { future: Box::pin(acceptor.accept(stream)), nanos: 0 };
    let (tls, nanos) = match timeout(HANDSHAKE_DEADLINE, shaken).await {
        Ok((Ok(tls), nanos)) => (tls, nanos),
        Ok((Err(error), _)) => {
            tracing::debug!(%source, %error, "TLS handshake");
            acts.ledger().refused_stranger(Reason::Unauthenticated, Some(source));
            return;
        }
        Err(_) => {
            tracing::debug!(%source, "TLS handshake: no progress");
            acts.ledger().refused_stranger(Reason::Unauthenticated, Some(source));
            return;
        }
    };
    acts.ledger().meter().handshake.add(nanos);
    let leaf = tls.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let connection = match Connection::identify(leaf.map(AsRef::as_ref), source, acts.domain(), &trusting) {
        Ok(connection) => connection,
        Err(refusal) => {
            tracing::info!(%source, ?refusal, "a certificate of ours that is no agent's");
            acts.ledger().refused_stranger(refusal.reason, Some(source));
            return;
        }
    };
    let left = connection.not_after().map_or(STRANGER_LIFETIME, |not_after| {
        let left = Duration::from_micros(not_after.micros().saturating_sub(acts.ledger().clock().reckoned().micros()));
        left.min(Duration::from_secs(acts.certificate_seconds_longest()))
    });
    let taken = match connection.named() {
        Some(agent) => stranger.agents.take(agent.clone()).map(|share| Taken::Agent { _share: share }),
        None => {
            let place = stranger.places.try_acquire_owned().ok();
            place.map(|place| Taken::Stranger { _place: place, _share: stranger.share })
        }
    };
    if taken.is_none() {
        tracing::debug!(%source, agent = ?connection.named(), "too many connections");
        acts.ledger().refused_stranger(Reason::Overloaded, Some(source));
        return;
    }
    let ends = Some(Box::pin(sleep_until(Instant::now() + left)));
    let held = Held { io: Gathered::new(tls), peer: Arc::new(connection), ends, _places: (place, taken) };
    let _ = sender.send(Ok(held)).await;
}

/// Adds up the CPU that the polls of a future take, wherever they run.
struct Metered<F> {
    future: Pin<Box<F>>,
    nanos: u64,
}

impl<F: Future> Future for Metered<F> {
    type Output = (F::Output, u64);

    fn poll(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<Self::Output> {
        let before = thread_cpu_nanos();
        let polled = self.future.as_mut().poll(context);
        self.nanos += thread_cpu_nanos().saturating_sub(before);
        polled.map(|output| (output, self.nanos))
    }
}

/// Who is at the other end of the operator socket.
#[derive(Clone)]
pub(super) struct LocalPeer(pub(super) Result<Operator, OperatorRefused>);

pub(super) type Local = Held<UnixStream, LocalPeer>;

/// The operators' socket, 0660; what a daemon that was killed left there goes.
pub(super) fn operators_socket(path: &Path) -> io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    let listener = UnixListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o660))?;
    Ok(listener)
}

/// Connections of operators. Who may use the socket is decided by uid and gid, not by its mode alone.
pub(super) fn operators(listener: UnixListener, admitted: config::Operator) -> ReceiverStream<io::Result<Local>> {
    let (sender, receiver) = mpsc::channel(16);
    let places = Arc::new(Semaphore::new(OPERATOR_CONNECTIONS_MAX));
    let refusals = Arc::new(Semaphore::new(REFUSED_CONNECTIONS_MAX));
    tokio::spawn(async move {
        loop {
            let place = tokio::select! {
                place = Arc::clone(&places).acquire_owned() => place,
                () = sender.closed() => return,
            };
            let Ok(place) = place else { return };
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                () = sender.closed() => return,
            };
            let (stream, _) = match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    tracing::warn!(%error, "accept");
                    tokio::time::sleep(ACCEPT_PAUSE).await;
                    continue;
                }
            };
            let Ok(peer) = stream.peer_cred() else { continue };
            // Who is refused is told so on its first call: a closed connection would say nothing.
            // It takes no operator's place while it is.
            let caller = Operator::admit(peer.uid(), peer.gid(), &admitted);
            let (place, ends) = match &caller {
                Ok(_) => (place, None),
                Err(refused) => {
                    tracing::warn!(%refused, "operator socket");
                    let Ok(place) = Arc::clone(&refusals).try_acquire_owned() else { continue };
                    (place, Some(Box::pin(sleep_until(Instant::now() + REFUSED_LIFETIME))))
                }
            };
            let held = Held { io: stream, peer: LocalPeer(caller), ends, _places: (place, None) };
            let _ = sender.send(Ok(held)).await;
        }
    });
    ReceiverStream::new(receiver)
}

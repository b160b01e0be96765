//! gRPC.
//!
//! Owns: sockets, wire types, status codes. Promises: a call is translated, one act is called, the answer is translated back; what
//! needs a client certificate is a table that denies by default; every message has a size, every stream a deadline, every
//! connection an end. Never: decides anything.

mod agent;
mod authorities;
mod convert;
mod gatekeeper;
mod gather;
mod headers;
mod health;
mod key;
mod listen;
mod operator;
mod refusal;
mod shares;
mod status;
mod straight;
mod to_its_end;

use std::future::Future;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;
use tonic::transport::Server;

use crate::acts::Acts;
use crate::authn::Tls;
use crate::config::Config;
use crate::proto;
use crate::proto::agent_service_server::AgentServiceServer;
use crate::proto::key_service_server::KeyServiceServer;
use crate::proto::operator_service_server::OperatorServiceServer;

pub use health::Health;
pub use refusal::status_of;
pub use status::Readiness;

/// Largest message from an agent, in bytes: an ask, a proof, and what protobuf adds.
const AGENT_MESSAGE_BYTES_MAX: usize = 8192;
/// Largest message about keys: a payload, or a batch of 1,000 digests, and what protobuf adds.
const KEY_MESSAGE_BYTES_MAX: usize = 131_072;
/// A page of 1,000 keys with 16 versions each.
const KEY_ANSWER_BYTES_MAX: usize = 8 << 20;
/// Largest message from an operator, in bytes.
const OPERATOR_MESSAGE_BYTES_MAX: usize = 65_536;
/// File descriptors kept for everything but agents' connections.
const DESCRIPTORS_RESERVED: usize = 256;
/// HTTP/2 streams on one connection at once.
const STREAMS_PER_CONNECTION_MAX: u32 = 256;

/// A socket or the transport failed.
#[derive(Debug, thiserror::Error)]
pub enum ApiError {
    /// A socket.
    #[error("{what}: {source}")]
    Socket {
        /// Which.
        what: String,
        /// Why.
        source: std::io::Error,
    },
    /// The HTTP/2 server.
    #[error(transparent)]
    Transport(#[from] tonic::transport::Error),
    /// gRPC reflection.
    #[error(transparent)]
    Reflection(#[from] tonic_reflection::server::Error),
}

fn server() -> Server {
    Server::builder()
        .max_concurrent_streams(STREAMS_PER_CONNECTION_MAX)
        .http2_max_header_list_size(16 * 1024)
        .http2_keepalive_interval(Some(Duration::from_secs(20)))
        .http2_keepalive_timeout(Some(Duration::from_secs(10)))
        .http2_max_pending_accept_reset_streams(Some(32))
        .tcp_nodelay(true)
}

/// A connection is a file descriptor, and some are needed for the ledger, the token and operators: strangers must not be able to take
/// those.
fn connections_max(configured: usize) -> usize {
    let Some(descriptors) = rustix::process::getrlimit(rustix::process::Resource::Nofile).current else { return configured };
    let most = usize::try_from(descriptors).unwrap_or(usize::MAX).saturating_sub(DESCRIPTORS_RESERVED).max(1);
    if most < configured {
        tracing::warn!(configured, most, "fewer connections than configured: the limit of open files is too low (LimitNOFILE=)");
    }
    configured.min(most)
}

/// Serves agents over TLS until `stop` is ready, then drains.
///
/// # Errors
/// When the transport fails.
pub async fn serve_agents(
    acts: Arc<Acts>,
    config: &Config,
    listener: TcpListener,
    tls: Arc<Tls>,
    health: &Health,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), ApiError> {
    let connections_max = connections_max(config.limits.connections);
    let connections = listen::tls(Arc::clone(&acts), listener, tls, connections_max);
    let (tell, stopping) = watch::channel(false);
    let stop = async move {
        stop.await;
        // A drain waits for every stream.
        tell.send_replace(true);
    };
    let keys = key_service(key::Keys::new(Arc::clone(&acts)));
    let gatekeeper = gatekeeper::Gatekeeper::of(acts.ledger().clone());
    let agents =
        AgentServiceServer::new(agent::Agents::new(acts, config.limits.unauthenticated_streams, connections_max, stopping))
            .max_decoding_message_size(AGENT_MESSAGE_BYTES_MAX)
            .max_encoding_message_size(OPERATOR_MESSAGE_BYTES_MAX);
    let reflection = tonic_reflection::server::Builder::configure()
        .register_encoded_file_descriptor_set(proto::DESCRIPTORS)
        .with_service_name("keyward.v1.AgentService")
        .with_service_name("keyward.v1.KeyService")
        .build_v1()?;
    server()
        .layer(gatekeeper)
        .layer(straight::Straight::to(keys))
        .add_service(agents)
        .add_service(health.service())
        .add_service(reflection)
        .serve_with_incoming_shutdown(connections, stop)
        .await?;
    Ok(())
}

/// Listens on `<runtime>/operator.sock`: from here on whoever connects waits and is not turned away.
///
/// # Errors
/// When the socket cannot be made.
pub fn listen_to_operators(config: &Config) -> Result<UnixListener, ApiError> {
    let path = operators_path(config);
    listen::operators_socket(&path).map_err(|source| ApiError::Socket { what: path.display().to_string(), source })
}

fn operators_path(config: &Config) -> PathBuf {
    config.paths.runtime.join("operator.sock")
}

/// Serves operators until `stop` is ready, then drains and removes the socket.
///
/// # Errors
/// When the transport fails.
pub async fn serve_operators(
    acts: Arc<Acts>,
    config: &Config,
    listener: UnixListener,
    readiness: Readiness,
    health: &Health,
    stop: impl Future<Output = ()> + Send,
) -> Result<(), ApiError> {
    let connections = listen::operators(listener, config.operator.clone());
    let keys = key_service(key::Keys::new(Arc::clone(&acts)));
    let operators = OperatorServiceServer::new(operator::Operators::new(acts, readiness))
        .max_decoding_message_size(OPERATOR_MESSAGE_BYTES_MAX)
        .max_encoding_message_size(32 << 20);
    let reflection =
        tonic_reflection::server::Builder::configure().register_encoded_file_descriptor_set(proto::DESCRIPTORS).build_v1()?;
    let served = server()
        .add_service(operators)
        .add_service(keys)
        .add_service(health.service())
        .add_service(reflection)
        .serve_with_incoming_shutdown(connections, stop)
        .await;
    remove_socket(&operators_path(config));
    Ok(served?)
}

/// The same on both faces: who calls decides what may be asked.
fn key_service(keys: key::Keys) -> KeyServiceServer<key::Keys> {
    KeyServiceServer::new(keys).max_decoding_message_size(KEY_MESSAGE_BYTES_MAX).max_encoding_message_size(KEY_ANSWER_BYTES_MAX)
}

fn remove_socket(path: &Path) {
    if let Err(error) = std::fs::remove_file(path) {
        tracing::warn!(%error, path = %path.display(), "the operator socket could not be removed");
    }
}

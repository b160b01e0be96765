//! The operator's client: the daemon's Unix socket, where the kernel says who is calling.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint, Uri};

use super::Error;
use crate::proto::operator_service_client::OperatorServiceClient;

const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
const CALL_TIMEOUT: Duration = Duration::from_secs(15);
/// A page of 1,000 entries, or a CRL of a million serials.
const ANSWER_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Connects to the operator socket at `path`.
///
/// # Errors
/// `Unreachable` when nobody listens, or this user may not connect.
pub async fn connect(path: &Path) -> Result<OperatorServiceClient<Channel>, Error> {
    Ok(OperatorServiceClient::new(channel(path).await?).max_decoding_message_size(ANSWER_BYTES_MAX))
}

pub(super) async fn channel(path: &Path) -> Result<Channel, Error> {
    let socket: PathBuf = path.to_path_buf();
    let connector = tower::service_fn(move |_: Uri| {
        let socket = socket.clone();
        async move { UnixStream::connect(socket).await.map(TokioIo::new) }
    });
    Endpoint::from_static("http://keyward")
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(CALL_TIMEOUT)
        .connect_with_connector(connector)
        .await
        .map_err(|error| Error::of_connection(&error, &path.display().to_string()))
}

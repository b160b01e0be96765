//! TLS as the client makes it: version 1.3 only, the pinned bundle and no other authority, the server known by its SPIFFE
//! ID and not by its host name.

use std::sync::Arc;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{WebPkiSupportedAlgorithms, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::server::ParsedCertificate;
use rustls::{CertificateError, ClientConfig, DigitallySignedStruct, PeerMisbehaved, RootCertStore, SignatureScheme};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tonic::transport::{Channel, Endpoint, Uri};
use x509_parser::extensions::GeneralName;

use super::request::Key;
use super::{Error, Place};
use crate::model::{SpiffeId, TrustDomain};

/// From the first packet to the end of the handshake.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);
/// From the request to the head of the answer.
const CALL_TIMEOUT: Duration = Duration::from_secs(10);

/// The client's side of TLS for `domain`, trusting `authorities` (DER) alone; with a certificate where `identity` is given.
///
/// # Errors
/// When an authority or the identity is not usable.
pub fn config(
    authorities: &[Vec<u8>],
    domain: &TrustDomain,
    identity: Option<(&[Vec<u8>], &Key)>,
) -> Result<ClientConfig, Error> {
    let roots = anchors(authorities)?;
    let provider = Arc::new(aws_lc_rs::default_provider());
    let algorithms = provider.signature_verification_algorithms;
    let verifier = ServerIdentity { roots, expected: domain.server(), algorithms };
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .map_err(unusable)?
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(verifier));
    let mut config = match identity {
        Some((chain, key)) => {
            let chain = chain.iter().map(|der| CertificateDer::from(der.clone())).collect();
            builder.with_client_auth_cert(chain, key.to_rustls().into()).map_err(unusable)?
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    // Each connection proves its key anew.
    config.resumption = Resumption::disabled();
    Ok(config)
}

/// The authorities of a bundle as what chains end at.
///
/// # Errors
/// When one is not usable, or there is none.
pub(super) fn anchors(authorities: &[Vec<u8>]) -> Result<RootCertStore, Error> {
    let mut roots = RootCertStore::empty();
    for der in authorities {
        roots.add(CertificateDer::from_slice(der)).map_err(unusable)?;
    }
    if roots.is_empty() {
        return Err(Error::Crypto("the bundle has no authority".into()));
    }
    Ok(roots)
}

fn unusable(error: rustls::Error) -> Error {
    Error::Crypto(error.to_string())
}

/// Connects to the first of `addresses` (`host:port`) that answers. An impostor ends the search: the next address is not
/// tried as if nothing had been seen. What becomes of a call is sorted by the [`Place`].
///
/// # Errors
/// `Unreachable` with the last cause, or `Untrusted`.
pub async fn connect(addresses: &[String], config: ClientConfig) -> Result<(Channel, Place), Error> {
    let config = Arc::new(config);
    let mut last = Error::Unreachable { place: "no address".into(), cause: "none is known".into() };
    for address in addresses {
        let place = Place::new(address);
        match connect_one(&place, Arc::clone(&config)).await {
            Ok(channel) => return Ok((channel, place)),
            Err(impostor @ Error::Untrusted { .. }) => return Err(impostor),
            Err(error) => last = error,
        }
    }
    Err(last)
}

async fn connect_one(place: &Place, config: Arc<ClientConfig>) -> Result<Channel, Error> {
    let address = place.address();
    let unusable = |cause: String| Error::Unreachable { place: address.to_owned(), cause };
    let uri: Uri = format!("http://{address}").parse().map_err(|_| unusable("not host:port".into()))?;
    // Servers behind a router are found by name; the name proves nothing here.
    let host = uri.host().unwrap_or_default().trim_matches(['[', ']']).to_owned();
    let name =
        ServerName::try_from(host).or_else(|_| ServerName::try_from("keyward")).map_err(|error| unusable(error.to_string()))?;
    let endpoint = Endpoint::from(uri)
        .origin(Uri::from_static("https://keyward"))
        .connect_timeout(CONNECT_TIMEOUT)
        .timeout(CALL_TIMEOUT)
        .http2_keep_alive_interval(Duration::from_secs(30))
        .tcp_nodelay(true);
    let place = place.clone();
    let connector = tower::service_fn(move |_: Uri| {
        let (config, name, place) = (Arc::clone(&config), name.clone(), place.clone());
        async move {
            let handshake = async {
                let tcp = TcpStream::connect(place.address()).await?;
                tcp.set_nodelay(true)?;
                TlsConnector::from(config).connect(name, tcp).await
            };
            let late = |_| std::io::Error::from(std::io::ErrorKind::TimedOut);
            timeout(CONNECT_TIMEOUT, handshake).await.map_err(late)?.map(|tls| TokioIo::new(place.listen(tls)))
        }
    });
    endpoint.connect_with_connector(connector).await.map_err(|error| Error::of_connection(&error, address))
}

/// Accepts the keyward server of one trust domain: a chain to the pinned authorities, and as its only URI
/// `spiffe://<td>/keyward/server` (X509-SVID §5.2). Hosts that it names are for clients that know nothing else.
#[derive(Debug)]
struct ServerIdentity {
    roots: RootCertStore,
    expected: SpiffeId,
    algorithms: WebPkiSupportedAlgorithms,
}

impl ServerCertVerifier for ServerIdentity {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, self.algorithms.all)?;
        let presented = uri_names(end_entity).ok_or(CertificateError::BadEncoding)?;
        if presented != [self.expected.as_str()] {
            return Err(CertificateError::ApplicationVerificationFailure.into());
        }
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(PeerMisbehaved::SignedHandshakeWithUnadvertisedSigScheme.into())
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        verify_tls13_signature(message, cert, dss, &self.algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.algorithms.supported_schemes()
    }
}

/// The URIs among the subject alternative names of a certificate: of an SVID there is one (X509-SVID §2), whatever else it names.
pub(super) fn uri_names(der: &[u8]) -> Option<Vec<String>> {
    let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
    let extension = certificate.subject_alternative_name().ok()??;
    let uri = |name: &GeneralName<'_>| match name {
        GeneralName::URI(uri) => Some((*uri).to_owned()),
        _ => None,
    };
    Some(extension.value.general_names.iter().filter_map(uri).collect())
}

#[cfg(test)]
#[path = "tls_tests.rs"]
mod tests;

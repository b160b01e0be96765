//! TLS as keyward serves it: 1.3 only, no tickets, client certificates verified against the issuing authorities themselves.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use rustls::client::danger::HandshakeSignatureValid;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::time_provider::TimeProvider;
use rustls::version::TLS13;
use rustls::{DigitallySignedStruct, DistinguishedName, RootCertStore, ServerConfig, SignatureScheme};

use crate::model::Clock;

/// The TLS settings cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// rustls said no.
    #[error("TLS: {0}")]
    Rustls(#[from] rustls::Error),
    /// The client verifier could not be built.
    #[error("TLS: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// The server's side of TLS. The certificate and what clients are trusted by are swapped while connections go on.
#[derive(Debug)]
pub struct Tls {
    provider: Arc<CryptoProvider>,
    certificate: Arc<Current>,
    settings: ArcSwapOption<ServerConfig>,
    anchors: Arc<Anchors>,
}

/// The names of the authorities that clients are trusted by now, DER. Each generation has one of its own.
#[derive(Debug, Default)]
pub(super) struct Anchors(ArcSwap<Vec<Vec<u8>>>);

impl Anchors {
    /// Whether certificates of this issuer still count.
    pub(super) fn have(&self, issuer: &[u8]) -> bool {
        self.0.load().iter().any(|name| name == issuer)
    }
}

#[derive(Debug, Default)]
struct Current(ArcSwapOption<CertifiedKey>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.load_full()
    }
}

/// Takes certificates that an anchor has signed itself: what else the client sends is not looked at, so that the issuer's name tells which
/// anchor it was. A stolen issuing key makes no authority under itself that goes by the name of another.
#[derive(Debug)]
struct Directly(Arc<dyn ClientCertVerifier>);

impl ClientCertVerifier for Directly {
    fn offer_client_auth(&self) -> bool {
        self.0.offer_client_auth()
    }

    fn client_auth_mandatory(&self) -> bool {
        self.0.client_auth_mandatory()
    }

    /// None: an agent has one certificate to choose from, and the message that would carry the names holds 64 KiB.
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, rustls::Error> {
        self.0.verify_client_cert(end_entity, &[], now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        self.0.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.supported_verify_schemes()
    }
}

/// The daemon's clock as rustls asks for it. It answers while the wall is not trusted as well: the caller is then told why.
struct Reckoning(Arc<Clock>);

impl std::fmt::Debug for Reckoning {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Reckoning")
    }
}

impl TimeProvider for Reckoning {
    fn current_time(&self) -> Option<UnixTime> {
        Some(UnixTime::since_unix_epoch(Duration::from_micros(self.0.reckoned().micros())))
    }
}

impl Default for Tls {
    fn default() -> Self {
        Self {
            provider: Arc::new(aws_lc_rs::default_provider()),
            certificate: Arc::default(),
            settings: ArcSwapOption::empty(),
            anchors: Arc::default(),
        }
    }
}

impl Tls {
    /// Puts a certificate into service. The key is in memory: rustls signs synchronously in the handshake.
    ///
    /// # Errors
    /// When key and certificate do not fit.
    pub fn serve(&self, chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<(), TlsError> {
        let certified = CertifiedKey::from_der(chain, key, &self.provider)?;
        self.certificate.0.store(Some(Arc::new(certified)));
        Ok(())
    }

    /// As they are now and will be.
    pub(super) fn anchors(&self) -> Arc<Anchors> {
        Arc::clone(&self.anchors)
    }

    /// The settings of new connections; none before clients are trusted by anything.
    #[must_use]
    pub fn settings(&self) -> Option<Arc<ServerConfig>> {
        self.settings.load_full()
    }

    /// Trusts clients by `anchors`, the issuing certificates: a chain through any other authority under the same root is refused, and a
    /// connection that was made under an authority which is not among them any more calls nothing. `clock` tells the time of a handshake:
    /// one reckoning judges certificates everywhere. Session tickets are off: a resumed session would skip the check of the chain.
    ///
    /// # Errors
    /// When an anchor is no certificate.
    pub fn trust(&self, clock: &Arc<Clock>, anchors: &[CertificateDer<'static>]) -> Result<(), TlsError> {
        let mut roots = RootCertStore::empty();
        for anchor in anchors {
            roots.add(anchor.clone())?;
        }
        let names = roots.subjects().iter().map(|name| name.as_ref().to_vec()).collect();
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
            .allow_unauthenticated()
            .build()?;
        let mut settings = ServerConfig::builder_with_details(Arc::clone(&self.provider), Arc::new(Reckoning(Arc::clone(clock))))
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(Arc::new(Directly(verifier)))
            .with_cert_resolver(Arc::clone(&self.certificate) as _);
        settings.send_tls13_tickets = 0;
        settings.session_storage = Arc::new(NoServerSessionStorage {});
        settings.alpn_protocols = vec![b"h2".to_vec()];
        settings.max_early_data_size = 0;
        self.anchors.0.store(Arc::new(names));
        self.settings.store(Some(Arc::new(settings)));
        Ok(())
    }
}

//! TLS as keyward serves it: 1.3 only, no tickets, client certificates verified against the issuing authorities themselves.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use rustls::crypto::{CryptoProvider, aws_lc_rs};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, UnixTime};
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::CertifiedKey;
use rustls::time_provider::TimeProvider;
use rustls::version::TLS13;
use rustls::{RootCertStore, ServerConfig};

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
}

#[derive(Debug, Default)]
struct Current(ArcSwapOption<CertifiedKey>);

impl ResolvesServerCert for Current {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        self.0.load_full()
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
        Self { provider: Arc::new(aws_lc_rs::default_provider()), certificate: Arc::default(), settings: ArcSwapOption::empty() }
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

    /// The settings of new connections; none before clients are trusted by anything.
    #[must_use]
    pub fn settings(&self) -> Option<Arc<ServerConfig>> {
        self.settings.load_full()
    }

    /// Trusts clients of new connections by `anchors`, the issuing certificates: a chain through any other authority under the same root is
    /// refused. `clock` tells the time of a handshake: one reckoning judges certificates everywhere. Session tickets are off: a resumed
    /// session would skip the check of the chain.
    ///
    /// # Errors
    /// When an anchor is no certificate.
    pub fn trust(&self, clock: &Arc<Clock>, anchors: &[CertificateDer<'static>]) -> Result<(), TlsError> {
        let mut roots = RootCertStore::empty();
        for anchor in anchors {
            roots.add(anchor.clone())?;
        }
        let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&self.provider))
            .allow_unauthenticated()
            .build()?;
        let mut settings = ServerConfig::builder_with_details(Arc::clone(&self.provider), Arc::new(Reckoning(Arc::clone(clock))))
            .with_protocol_versions(&[&TLS13])?
            .with_client_cert_verifier(verifier)
            .with_cert_resolver(Arc::clone(&self.certificate) as _);
        settings.send_tls13_tickets = 0;
        settings.session_storage = Arc::new(NoServerSessionStorage {});
        settings.alpn_protocols = vec![b"h2".to_vec()];
        settings.max_early_data_size = 0;
        self.settings.store(Some(Arc::new(settings)));
        Ok(())
    }
}

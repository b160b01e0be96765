//! The daemon's own TLS certificate: a key in memory, a certificate through the ledger, 24 hours, renewed at a third of that.

use std::time::Duration;

use rustls::pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::model::{PublicKey, Refusal, Serial};
use crate::proto::IntentKind;

use super::Acts;
use super::certificate::{assemble, leaf, leaf_to_be_signed, sign_own};

/// Lifetime, in seconds.
const LIFETIME_SECONDS: u64 = 86_400;

/// A key and its certificate, ready for rustls.
pub struct ServerCertificate {
    /// Leaf first.
    pub chain: Vec<CertificateDer<'static>>,
    /// PKCS#8; zeroized by rustls when dropped.
    pub key: PrivateKeyDer<'static>,
    /// When to make the next one.
    pub renew_in: Duration,
}

impl Acts {
    /// A new key and its certificate for `spiffe://<td>/keyward/server`.
    ///
    /// # Errors
    /// `HSM_UNAVAILABLE`, `CLOCK_UNTRUSTED`, `LEDGER_UNAVAILABLE`.
    pub async fn certify_server(&self) -> Result<ServerCertificate, Refusal> {
        let now = self.trusted_now()?;
        let issuing = self.authorities()?.issuing();
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(Refusal::internal)?;
        let key = PublicKey::from_spki(&rcgen::PublicKeyData::subject_public_key_info(&pair)).map_err(Refusal::internal)?;
        let params = leaf(&self.domain.server(), &Serial::random(), now.minus_seconds(30), now.plus_seconds(LIFETIME_SECONDS))?;
        let tbs = leaf_to_be_signed(&issuing, &params, &key)?;
        let (index, signature) = sign_own(&self.ledger, IntentKind::Server, issuing.key(), tbs.clone()).await?;
        tracing::info!(index, "the server has a new certificate");
        Ok(ServerCertificate {
            chain: vec![assemble(&tbs, &signature).into(), issuing.certificate().to_vec().into()],
            key: PrivatePkcs8KeyDer::from(pair.serialize_der()).into(),
            renew_in: Duration::from_secs(LIFETIME_SECONDS / 3),
        })
    }
}

//! The daemon's own TLS certificate: a key in memory, a certificate through the ledger, 24 hours, renewed at a third of that.

use std::sync::Arc;
use std::time::Duration;

use rcgen::SanType;
use rustls::pki_types::PrivatePkcs8KeyDer;

use crate::model::{KeyId, PublicKey, Refusal, Serial, UnixTime};
use crate::proto::IntentKind;

use super::Acts;
use super::certificate::{assemble, leaf, leaf_to_be_signed, sign_own};

/// Lifetime, in seconds.
const LIFETIME_SECONDS: u64 = 86_400;

/// The certificate that the server goes by.
pub(super) struct Served {
    /// Whose it is.
    pub issuer: KeyId,
    /// When it is in force.
    pub not_before: UnixTime,
    pub not_after: UnixTime,
}

impl Acts {
    /// A new key and its certificate for `spiffe://<td>/keyward/server`, put into service. Gives the time until the next one.
    ///
    /// # Errors
    /// `HSM_UNAVAILABLE`, `CLOCK_UNTRUSTED`, `LEDGER_UNAVAILABLE`: the old one stays.
    pub async fn serve_certificate(&self) -> Result<Duration, Refusal> {
        let now = self.trusted_now()?;
        let issuing = self.authorities()?.issuing_for_server();
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).map_err(Refusal::internal)?;
        let key = PublicKey::from_spki(&rcgen::PublicKeyData::subject_public_key_info(&pair)).map_err(Refusal::internal)?;
        let until = now.plus_seconds(LIFETIME_SECONDS);
        // Under one that has ended nobody takes it anyway, and the daemon serves: what is to follow is made then.
        let not_after = if issuing.not_after() > now { until.min(issuing.not_after()) } else { until };
        let not_before = now.minus_seconds(30);
        let mut params = leaf(&self.domain.server(), &Serial::random(), not_before, not_after)?;
        // Stock TLS libraries look for the host that they dialled (RFC 9525 §6); SPIFFE ones for the one URI (X509-SVID §2).
        params.subject_alt_names.extend(self.names.iter().map(|name| host(name)).collect::<Result<Vec<_>, _>>()?);
        let tbs = leaf_to_be_signed(&issuing, &params, &key)?;
        let (index, signature) = sign_own(&self.ledger, IntentKind::Server, issuing.key(), tbs.clone()).await?;
        let chain = vec![assemble(&tbs, &signature).into(), issuing.certificate().to_vec().into()];
        // rustls zeroizes the key when it is dropped.
        self.tls.serve(chain, PrivatePkcs8KeyDer::from(pair.serialize_der()).into()).map_err(Refusal::internal)?;
        self.served.store(Some(Arc::new(Served { issuer: issuing.key().id(), not_before, not_after })));
        tracing::info!(index, "the server has a new certificate");
        Ok(Duration::from_secs((not_after.seconds().saturating_sub(now.seconds()) / 3).max(1)))
    }
}

fn host(name: &str) -> Result<SanType, Refusal> {
    match name.parse() {
        Ok(address) => Ok(SanType::IpAddress(address)),
        Err(_) => Ok(SanType::DnsName(name.try_into().map_err(Refusal::internal)?)),
    }
}

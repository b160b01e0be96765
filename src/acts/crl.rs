//! The list of what is taken back, for those who only know CRLs (RFC 5280 §5). Containment does not wait for it.

use std::collections::HashSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rcgen::{CertificateRevocationListParams, KeyIdMethod, RevocationReason, RevokedCertParams, SerialNumber};
use x509_parser::prelude::FromDer;
use x509_parser::revocation_list::CertificateRevocationList;

use crate::model::{Refusal, UnixTime};
use crate::proto::IntentKind;

use super::Acts;
use super::certificate::{assemble, offset, sign_own};

/// The newest CRL, in memory and beside the ledger as `crl.der`.
pub struct Crl {
    path: PathBuf,
    der: ArcSwap<Vec<u8>>,
}

impl Crl {
    /// With what an earlier daemon left in the state directory.
    #[must_use]
    pub fn open(state: &Path) -> Self {
        let path = state.join("crl.der");
        let der = std::fs::read(&path).unwrap_or_default();
        Self { path, der: ArcSwap::from_pointee(der) }
    }

    /// DER; empty before the first.
    #[must_use]
    pub fn der(&self) -> Arc<Vec<u8>> {
        self.der.load_full()
    }
}

impl Acts {
    /// The newest CRL.
    #[must_use]
    pub fn crl(&self) -> Arc<Vec<u8>> {
        self.crl.der()
    }

    /// Signs and publishes a new CRL. Its number is the tree's size when it was prepared, so it grows; a serial is on it until one period
    /// after its notAfter. Gives the time until the next one is due: half a period.
    ///
    /// # Errors
    /// `HSM_UNAVAILABLE`, `CLOCK_UNTRUSTED`, `LEDGER_UNAVAILABLE`: the old one stays.
    pub async fn publish_crl(&self) -> Result<Duration, Refusal> {
        let now = self.trusted_now()?;
        let issuing = self.authorities()?.issuing();
        let period = u64::from(self.limits.crl_seconds);
        let number = self.ledger.edge().await?.0;
        let denied = self.ledger.denied_certificates(now);
        let listed = denied.len();
        let revoked_certs = denied
            .into_iter()
            .map(|(serial, since)| {
                Ok(RevokedCertParams {
                    serial_number: SerialNumber::from_slice(&serial.0),
                    revocation_time: offset(since)?,
                    reason_code: Some(RevocationReason::KeyCompromise),
                    invalidity_date: None,
                })
            })
            .collect::<Result<Vec<_>, Refusal>>()?;
        let key_identifier = authority_key_identifier(issuing.certificate())?;
        let params = CertificateRevocationListParams {
            this_update: offset(now.minus_seconds(30))?,
            next_update: offset(now.plus_seconds(period))?,
            crl_number: SerialNumber::from_slice(minimal(&number.to_be_bytes())),
            issuing_distribution_point: None,
            revoked_certs,
            key_identifier_method: KeyIdMethod::PreSpecified(key_identifier),
        };
        let tbs = issuing.to_be_signed(|issuer| params.signed_by(issuer))?;
        let (index, signature) = sign_own(&self.ledger, IntentKind::Crl, issuing.key(), tbs.clone()).await?;
        let der = assemble(&tbs, &signature);
        self.keep_crl(der).await?;
        tracing::info!(index, number, listed, "a CRL was published");
        Ok(Duration::from_secs(period / 2))
    }

    async fn keep_crl(&self, der: Vec<u8>) -> Result<(), Refusal> {
        let path = self.crl.path.clone();
        let bytes = der.clone();
        tokio::task::spawn_blocking(move || super::files::replace(&path, &bytes, 0o644))
            .await
            .map_err(Refusal::internal)?
            .map_err(Refusal::internal)?;
        self.crl.der.store(Arc::new(der));
        Ok(())
    }

    /// How many certificates are denied and not on the newest CRL yet: for a second as a rule, longer where it cannot be signed.
    #[must_use]
    pub fn not_on_crl(&self) -> u64 {
        let der = self.crl.der();
        let listed: HashSet<Vec<u8>> = match CertificateRevocationList::from_der(&der) {
            Ok((_, crl)) => crl.iter_revoked_certificates().map(|one| minimal(one.raw_serial()).to_vec()).collect(),
            Err(_) => HashSet::new(),
        };
        let denied = self.ledger.denied_certificates(self.clock().reckoned());
        denied.iter().filter(|(serial, _)| !listed.contains(minimal(&serial.0))).count() as u64
    }

    /// How long the newest CRL may stay as it is: until half of its period is over. Zero without one.
    #[must_use]
    pub fn crl_due_in(&self) -> Duration {
        let der = self.crl.der();
        let Ok((_, crl)) = CertificateRevocationList::from_der(&der) else { return Duration::ZERO };
        let from = crl.last_update().timestamp();
        let until = crl.next_update().map_or(from, |next| next.timestamp());
        let due = u64::try_from(from + (until - from) / 2).unwrap_or(0);
        Duration::from_secs(due.saturating_sub(UnixTime::wall().seconds()))
    }
}

fn authority_key_identifier(certificate: &[u8]) -> Result<Vec<u8>, Refusal> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).map_err(|error| Refusal::internal(error.to_string()))?;
    parsed
        .iter_extensions()
        .find_map(|extension| match extension.parsed_extension() {
            x509_parser::extensions::ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0.to_vec()),
            _ => None,
        })
        .ok_or_else(|| Refusal::internal("the issuing certificate has no SubjectKeyIdentifier"))
}

fn minimal(bytes: &[u8]) -> &[u8] {
    let skip = bytes.iter().take_while(|byte| **byte == 0).count();
    &bytes[skip.min(bytes.len() - 1)..]
}

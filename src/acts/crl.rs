//! The lists of what is taken back, for those who only know CRLs (RFC 5280 §5). Containment does not wait for them.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rcgen::{CertificateRevocationListParams, KeyIdMethod, RevocationReason, RevokedCertParams, SerialNumber};
use x509_parser::prelude::FromDer;
use x509_parser::revocation_list::CertificateRevocationList;

use crate::model::{KeyId, Refusal, Serial, UnixTime, hex};
use crate::proto::IntentKind;

use super::Acts;
use super::certificate::{Authority, assemble, offset, sign_own};

/// The newest CRL of each trusted issuing authority, in memory and beside the ledger: `crl.der` of the active one, `crl-<key id>.der` of
/// the others. Each lists all that is denied, whichever of them signed it: serials are random, none is another's.
pub struct Crl {
    state: PathBuf,
    /// What an earlier daemon left, until there is a newer one.
    left: Vec<u8>,
    newest: ArcSwap<BTreeMap<KeyId, Vec<u8>>>,
}

impl Crl {
    /// With what an earlier daemon left in the state directory.
    #[must_use]
    pub fn open(state: &Path) -> Self {
        let left = std::fs::read(state.join("crl.der")).unwrap_or_default();
        Self { state: state.to_owned(), left, newest: ArcSwap::default() }
    }

    /// Blocking. Of `keys` the first is active; the files of those that are not among them go.
    fn keep(&self, keys: &[KeyId]) -> std::io::Result<()> {
        let newest = self.newest.load();
        let mut names = HashSet::new();
        for (at, key) in keys.iter().enumerate() {
            let Some(der) = newest.get(key) else { continue };
            let name = if at == 0 { "crl.der".to_owned() } else { format!("crl-{}.der", hex(&key.0[..4])) };
            let path = self.state.join(&name);
            if std::fs::read(&path).ok().as_ref() != Some(der) {
                super::files::replace(&path, der, 0o644)?;
            }
            names.insert(name);
        }
        for entry in std::fs::read_dir(&self.state)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("crl-") && !names.contains(&name) {
                std::fs::remove_file(entry.path())?;
            }
        }
        Ok(())
    }
}

impl Acts {
    /// The newest CRLs, of the active issuing authority first; none before the first.
    #[must_use]
    pub fn crls(&self) -> Vec<Vec<u8>> {
        let newest = self.crl.newest.load();
        let Ok(authorities) = self.authorities() else { return Vec::new() };
        let trusted = authorities.issuing_trusted().iter().filter_map(|issuing| newest.get(&issuing.key().id()).cloned());
        let all: Vec<_> = trusted.collect();
        if all.is_empty() && !self.crl.left.is_empty() { vec![self.crl.left.clone()] } else { all }
    }

    /// Signs and publishes a new CRL of each trusted issuing authority. Gives the time until the next ones are due: half a period.
    ///
    /// # Errors
    /// `HSM_UNAVAILABLE`, `CLOCK_UNTRUSTED`, `LEDGER_UNAVAILABLE`: the old ones stay.
    pub async fn publish_crl(&self) -> Result<Duration, Refusal> {
        // Two at once would overwrite each other's files.
        let _one = self.publishing.lock().await;
        let now = self.trusted_now()?;
        let authorities = self.authorities()?;
        let mut newest = BTreeMap::new();
        for issuing in authorities.issuing_trusted() {
            newest.insert(issuing.key().id(), self.sign_crl(issuing, now).await?);
        }
        tracing::info!(authorities = newest.len(), "a CRL was published");
        self.crl.newest.store(Arc::new(newest));
        self.write_crls().await?;
        Ok(Duration::from_secs(u64::from(self.limits.crl_seconds) / 2))
    }

    /// The first CRL of an authority that is about to sign: who goes by CRLs has it before a certificate.
    ///
    /// # Errors
    /// As `publish_crl`.
    pub(super) async fn publish_first_crl(&self, issuing: &Authority) -> Result<(), Refusal> {
        let _one = self.publishing.lock().await;
        let der = self.sign_crl(issuing, self.trusted_now()?).await?;
        let mut newest = BTreeMap::clone(&self.crl.newest.load());
        newest.insert(issuing.key().id(), der);
        self.crl.newest.store(Arc::new(newest));
        self.write_crls().await
    }

    /// The files are what is in memory, under the names that fit who is active now.
    pub(super) async fn keep_crls(&self) -> Result<(), Refusal> {
        let _one = self.publishing.lock().await;
        self.write_crls().await
    }

    async fn write_crls(&self) -> Result<(), Refusal> {
        let authorities = self.authorities()?;
        let keys: Vec<_> = authorities.issuing_trusted().iter().map(|issuing| issuing.key().id()).collect();
        let crl = Arc::clone(&self.crl);
        tokio::task::spawn_blocking(move || crl.keep(&keys)).await.map_err(Refusal::internal)?.map_err(Refusal::internal)
    }

    /// Its number is the tree's size when it was prepared, so it grows; a serial is on it until one period after its notAfter.
    async fn sign_crl(&self, issuing: &Authority, now: UnixTime) -> Result<Vec<u8>, Refusal> {
        let number = self.ledger.edge().await?.0;
        let denied = self.ledger.denied_certificates(now);
        let params = CertificateRevocationListParams {
            this_update: offset(now.minus_seconds(30))?,
            next_update: offset(now.plus_seconds(self.limits.crl_seconds.into()))?,
            crl_number: SerialNumber::from_slice(minimal(&number.to_be_bytes())),
            issuing_distribution_point: None,
            revoked_certs: denied.into_iter().map(revoked).collect::<Result<_, _>>()?,
            key_identifier_method: KeyIdMethod::PreSpecified(authority_key_identifier(issuing.certificate())?),
        };
        let tbs = issuing.to_be_signed(|issuer| params.signed_by(issuer))?;
        let (_, signature) = sign_own(&self.ledger, IntentKind::Crl, issuing.key(), tbs.clone()).await?;
        Ok(assemble(&tbs, &signature))
    }
}

fn revoked((serial, since): (Serial, UnixTime)) -> Result<RevokedCertParams, Refusal> {
    Ok(RevokedCertParams {
        serial_number: SerialNumber::from_slice(&serial.0),
        revocation_time: offset(since)?,
        reason_code: Some(RevocationReason::KeyCompromise),
        invalidity_date: None,
    })
}

impl Acts {
    /// How many certificates are denied and not on the newest CRLs yet: for a second as a rule, longer where none can be signed.
    #[must_use]
    pub fn not_on_crl(&self) -> u64 {
        let crls = self.crls();
        // Each of them lists all that is denied; the oldest tells what is missing.
        let listed = crls.iter().map(|der| match CertificateRevocationList::from_der(der) {
            Ok((_, crl)) => crl.iter_revoked_certificates().map(|one| minimal(one.raw_serial()).to_vec()).collect(),
            Err(_) => HashSet::new(),
        });
        let listed: HashSet<Vec<u8>> = listed.reduce(|all, one| all.intersection(&one).cloned().collect()).unwrap_or_default();
        let denied = self.ledger.denied_certificates(self.clock().reckoned());
        denied.iter().filter(|(serial, _)| !listed.contains(minimal(&serial.0))).count() as u64
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

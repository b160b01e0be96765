//! The lists of what is taken back, for those who only know CRLs (RFC 5280 §5). Containment does not wait for them.

use std::collections::{BTreeMap, HashSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use rcgen::{CertificateRevocationListParams, KeyIdMethod, RevocationReason, RevokedCertParams, SerialNumber};
use x509_parser::prelude::FromDer;
use x509_parser::revocation_list::CertificateRevocationList;

use crate::ledger::Generation;
use crate::model::{KeyId, Refusal, Serial, UnixTime, hex};
use crate::proto::{AuthorityState as State, IntentKind, Purpose};

use super::certificate::{Authority, assemble, offset, sign_own};
use super::{Acts, files};

/// The newest CRL of each trusted issuing authority, in memory and beside the ledger: `crl.der` of the active one, `crl-<key id>.der` of
/// the others. Each lists all that is denied, whichever of them signed it: serials are random, none is another's.
pub struct Crl {
    state: PathBuf,
    /// What an earlier daemon left, by file name: in force until there is a newer one.
    left: BTreeMap<String, Vec<u8>>,
    newest: ArcSwap<BTreeMap<KeyId, Vec<u8>>>,
}

/// That of the active authority.
const ACTIVE: &str = "crl.der";

/// That of another one.
fn beside(key: &KeyId) -> String {
    format!("crl-{}.der", hex(&key.0[..4]))
}

fn name_of(authority: &Generation) -> String {
    if authority.state == State::Active { ACTIVE.to_owned() } else { beside(&authority.key_id) }
}

/// Whether a file is one that is called so by us.
fn is_beside(name: &str) -> bool {
    let id = name.strip_prefix("crl-").and_then(|rest| rest.strip_suffix(".der"));
    id.is_some_and(|id| id.len() == 8 && id.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')))
}

impl Crl {
    /// With what an earlier daemon left in the state directory.
    #[must_use]
    pub fn open(state: &Path) -> Self {
        let names = std::fs::read_dir(state)
            .into_iter()
            .flatten()
            .flatten()
            .map(|entry| entry.file_name().to_string_lossy().into_owned());
        let ours = names.filter(|name| name == ACTIVE || is_beside(name));
        let left = ours.filter_map(|name| Some((name.clone(), std::fs::read(state.join(name)).ok()?))).collect();
        Self { state: state.to_owned(), left, newest: ArcSwap::default() }
    }

    /// The newest of one authority. What is left under a name may be of another one, that had it before.
    fn of(&self, authority: &Generation) -> Option<Vec<u8>> {
        let newest = self.newest.load().get(&authority.key_id).cloned();
        newest.or_else(|| {
            let names = [ACTIVE.to_owned(), beside(&authority.key_id)];
            names.iter().filter_map(|name| self.left.get(name)).find(|der| is_of(der, authority)).cloned()
        })
    }

    /// Blocking. The files of all that are not among `trusted` go. One that cannot be written holds up no other; the first is the error.
    fn keep(&self, trusted: &[Generation]) -> std::io::Result<()> {
        let (mut names, mut kept) = (HashSet::new(), Ok(()));
        for authority in trusted {
            kept = kept.and(self.keep_one(authority));
            names.insert(name_of(authority));
        }
        for entry in std::fs::read_dir(&self.state)? {
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if is_beside(&name) && !names.contains(&name) {
                kept = kept.and(files::keep(&entry.path(), None));
            }
        }
        kept
    }

    /// Blocking.
    fn keep_one(&self, authority: &Generation) -> std::io::Result<()> {
        let der = self.of(authority);
        der.map_or(Ok(()), |der| files::keep(&self.state.join(name_of(authority)), Some(&der)))
    }
}

/// Whether it is this authority's, by the name that is its alone.
fn is_of(der: &[u8], authority: &Generation) -> bool {
    let issuer = x509_parser::parse_x509_certificate(&authority.certificate);
    match (CertificateRevocationList::from_der(der), issuer) {
        (Ok((_, crl)), Ok((_, issuer))) => crl.tbs_cert_list.issuer.as_raw() == issuer.subject().as_raw(),
        _ => false,
    }
}

impl Acts {
    /// The trusted issuing authorities, the active one first, each with its newest CRL if it has one.
    fn crl_of_each(&self) -> Vec<(Generation, Option<Vec<u8>>)> {
        self.issuing_generations().into_iter().map(|authority| (authority.clone(), self.crl.of(&authority))).collect()
    }

    fn issuing_generations(&self) -> Vec<Generation> {
        let (mut all, _) = self.ledger.generations();
        all.retain(|found| found.purpose == Purpose::Issuing && found.is_trusted());
        all.sort_by_key(|found| (found.state != State::Active, std::cmp::Reverse(found.since)));
        all
    }

    /// The newest CRLs: at first that of the active issuing authority, empty before there is one.
    #[must_use]
    pub fn crls(&self) -> Vec<Vec<u8>> {
        let each = self.crl_of_each().into_iter().enumerate();
        each.filter_map(|(at, (_, der))| if at == 0 { Some(der.unwrap_or_default()) } else { der }).collect()
    }

    /// Signs and publishes a new CRL of each trusted issuing authority. Where one that is not active cannot sign, its old one stays. Gives
    /// the time until the next ones are due: half a period.
    ///
    /// # Errors
    /// Of the active one `HSM_UNAVAILABLE`, `CLOCK_UNTRUSTED`, `LEDGER_UNAVAILABLE`: the old ones stay.
    pub async fn publish_crl(&self) -> Result<Duration, Refusal> {
        // Two at once would overwrite each other's files.
        let _one = self.publishing.lock().await;
        let now = self.trusted_now()?;
        let authorities = self.authorities()?;
        let active = authorities.issuing().key().id();
        let mut newest = BTreeMap::clone(&self.crl.newest.load());
        let trusted = self.issuing_generations();
        newest.retain(|key, _| trusted.iter().any(|found| found.key_id == *key));
        for issuing in authorities.issuing_trusted() {
            let key = issuing.key().id();
            match self.sign_crl(issuing, now).await {
                Ok(der) => drop(newest.insert(key, der)),
                Err(refusal) if key == active => return Err(refusal),
                Err(refusal) => {
                    tracing::warn!(%key, ?refusal, "no new CRL of an authority that is not active; its old one stays")
                }
            }
        }
        tracing::info!(authorities = newest.len(), "a CRL was published");
        self.crl.newest.store(Arc::new(newest));
        self.write_crls().await;
        Ok(Duration::from_secs(u64::from(self.limits.crl_seconds) / 2))
    }

    /// The first CRL of an authority that is about to sign: who goes by CRLs has it before a certificate, also as a file.
    ///
    /// # Errors
    /// As `publish_crl`; `INTERNAL` when its file cannot be written.
    pub(super) async fn publish_first_crl(&self, issuing: &Authority) -> Result<(), Refusal> {
        let _one = self.publishing.lock().await;
        let der = self.sign_crl(issuing, self.trusted_now()?).await?;
        let mut newest = BTreeMap::clone(&self.crl.newest.load());
        let key = issuing.key().id();
        newest.insert(key, der);
        self.crl.newest.store(Arc::new(newest));
        let (crl, own) = (Arc::clone(&self.crl), self.issuing_generations().into_iter().find(|found| found.key_id == key));
        files::blocking(move || own.map_or(Ok(()), |own| crl.keep_one(&own))).await.map_err(Refusal::internal)
    }

    /// The files are what is in memory, under the names that fit who is active now.
    pub(super) async fn keep_crls(&self) {
        let _one = self.publishing.lock().await;
        self.write_crls().await;
    }

    async fn write_crls(&self) {
        let (crl, trusted) = (Arc::clone(&self.crl), self.issuing_generations());
        self.behind.note(files::CRLS, files::blocking(move || crl.keep(&trusted)).await);
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
        // Each of them lists all that is denied; the oldest tells what is missing, and one that is not there lists nothing. Under an
        // authority that is yet to come there is nothing to be denied.
        let each = self.crl_of_each().into_iter().filter(|(authority, _)| authority.state != State::Prepublished);
        let listed = each.map(|(_, der)| match der.as_deref().map(CertificateRevocationList::from_der) {
            Some(Ok((_, crl))) => crl.iter_revoked_certificates().map(|one| minimal(one.raw_serial()).to_vec()).collect(),
            _ => HashSet::new(),
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

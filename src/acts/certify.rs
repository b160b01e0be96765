//! Certificates of authorities, and the request to an outside root.

use rcgen::CertificateParams;

use crate::hsm::SigningKey;
use crate::ledger::Ledger;
use crate::model::{KeyId, Refusal, Serial, TrustDomain, UnixTime, hex};
use crate::proto::IntentKind;

use super::certificate::{self, Authority, assemble, leaf_to_be_signed, request_to_be_signed, self_to_be_signed, sign_own};

/// Ten years, in seconds.
const ROOT_SECONDS: u64 = 3650 * 86_400;
/// One year, in seconds.
const ISSUING_SECONDS: u64 = 365 * 86_400;

/// DER, and the intent of its signature.
pub(super) type Certified = (Vec<u8>, u64);

/// A root: signed by its own key, path length 1.
pub(super) async fn certify_root(
    ledger: &Ledger,
    domain: &TrustDomain,
    key: &SigningKey,
    now: UnixTime,
) -> Result<Certified, Refusal> {
    let params = params(domain, "root", key, 1, now, now.plus_seconds(ROOT_SECONDS))?;
    let tbs = self_to_be_signed(&params, key.public())?;
    let (intent, signature) = sign_own(ledger, IntentKind::Root, key, tbs.clone()).await?;
    Ok((assemble(&tbs, &signature), intent))
}

/// An issuing authority under `root`: path length 0, over no later than the root.
pub(super) async fn certify_issuing(
    ledger: &Ledger,
    domain: &TrustDomain,
    key: &SigningKey,
    root: &Authority,
    now: UnixTime,
) -> Result<Certified, Refusal> {
    let until = validity(root.certificate()).map_or(now, |(_, end)| end).min(now.plus_seconds(ISSUING_SECONDS));
    let params = params(domain, "issuing", key, 0, now, until)?;
    let tbs = leaf_to_be_signed(root, &params, key.public())?;
    let (intent, signature) = sign_own(ledger, IntentKind::Issuing, root.key(), tbs.clone()).await?;
    Ok((assemble(&tbs, &signature), intent))
}

/// What an outside root is asked to sign: PKCS#10, DER.
pub(super) async fn request_issuing(
    ledger: &Ledger,
    domain: &TrustDomain,
    key: &SigningKey,
    now: UnixTime,
) -> Result<Vec<u8>, Refusal> {
    let params = params(domain, "issuing", key, 0, now, now.plus_seconds(ISSUING_SECONDS))?;
    let tbs = request_to_be_signed(&params, key.public())?;
    let (_, signature) = sign_own(ledger, IntentKind::Csr, key, tbs.clone()).await?;
    Ok(assemble(&tbs, &signature))
}

/// The common name, of its own for each generation: a chain has one way to be built, and a CRL is one authority's.
fn name(domain: &TrustDomain, what: &str, key: KeyId) -> String {
    format!("{domain} {what} {}", hex(&key.0[..4]))
}

/// O and CN of an issuing authority.
pub(super) fn issuing_subject(domain: &TrustDomain, key: KeyId) -> [String; 2] {
    [certificate::ORGANIZATION.to_owned(), name(domain, "issuing", key)]
}

fn params(
    domain: &TrustDomain,
    what: &str,
    key: &SigningKey,
    path_length: u8,
    now: UnixTime,
    until: UnixTime,
) -> Result<CertificateParams, Refusal> {
    certificate::authority(domain, &name(domain, what, key.id()), path_length, &Serial::random(), now.minus_seconds(30), until)
}

/// notBefore and notAfter of a certificate; none where it does not parse.
pub(super) fn validity(certificate: &[u8]) -> Option<(UnixTime, UnixTime)> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let seconds = |at: x509_parser::time::ASN1Time| u64::try_from(at.timestamp()).ok().map(UnixTime::from_seconds);
    Some((seconds(parsed.validity().not_before)?, seconds(parsed.validity().not_after)?))
}

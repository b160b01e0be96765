//! From a grant to a certificate: everything but the signature is settled first, recorded, and only then signed.

use std::sync::{Arc, Mutex, PoisonError};

use rcgen::{
    BasicConstraints, CertificateParams, CustomExtension, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer,
    KeyUsagePurpose, PKCS_ECDSA_P256_SHA256, PublicKeyData, SanType, SerialNumber, SignatureAlgorithm,
};
use rustls::pki_types::CertificateDer;
use x509_parser::certificate::TbsCertificate;
use x509_parser::extensions::ParsedExtension;
use x509_parser::prelude::FromDer as _;

use crate::attest::{Appraisal, Ask};
use crate::hsm::{Admitted, SignError, SigningKey};
use crate::ledger::{Decided, Intent, Intention, Ledger, Subject};
use crate::model::{
    AGENT_EXTENSION_OID, AgentExtension, Csr, Digest, PublicKey, Reason, Refusal, Serial, SpiffeId, TrustDomain, UnixTime,
};
use crate::policy::Grant;
use crate::proto::IntentKind;

/// DER of AlgorithmIdentifier ecdsa-with-SHA256 (RFC 5758 §3.2): no parameters.
const ECDSA_WITH_SHA256: [u8; 12] = [0x30, 0x0a, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x04, 0x03, 0x02];

/// Stands where a signature would be made, and keeps the bytes that would be signed.
pub(super) struct Capture {
    key: PublicKey,
    bytes: Mutex<Vec<u8>>,
}

impl PublicKeyData for Capture {
    fn der_bytes(&self) -> &[u8] {
        self.key.raw()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

impl rcgen::SigningKey for Capture {
    fn sign(&self, bytes: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        *self.bytes.lock().unwrap_or_else(PoisonError::into_inner) = bytes.to_vec();
        Ok(Vec::new())
    }
}

/// A public key as rcgen wants it.
struct Certified<'a>(&'a PublicKey);

impl PublicKeyData for Certified<'_> {
    fn der_bytes(&self) -> &[u8] {
        self.0.raw()
    }

    fn algorithm(&self) -> &'static SignatureAlgorithm {
        &PKCS_ECDSA_P256_SHA256
    }
}

/// An authority that can sign: its key in the token and its certificate.
pub struct Authority {
    key: SigningKey,
    certificate: Vec<u8>,
    not_after: UnixTime,
    template: Mutex<Issuer<'static, Capture>>,
}

impl Authority {
    /// From its key and its certificate.
    ///
    /// # Errors
    /// When the certificate is none, or another key's.
    pub fn new(key: SigningKey, certificate: Vec<u8>) -> Result<Self, Refusal> {
        let (_, parsed) =
            x509_parser::parse_x509_certificate(&certificate).map_err(|error| Refusal::internal(error.to_string()))?;
        if parsed.public_key().raw != key.public().spki() {
            return Err(Refusal::internal("an authority's certificate is not for its key"));
        }
        let not_after = UnixTime::from_seconds(u64::try_from(parsed.validity().not_after.timestamp()).unwrap_or_default());
        let template = template(&certificate, key.public())?;
        Ok(Self { key, certificate, not_after, template: Mutex::new(template) })
    }

    /// Until when it is in force: nothing under it is for longer.
    #[must_use]
    pub fn not_after(&self) -> UnixTime {
        self.not_after
    }

    /// DER.
    #[must_use]
    pub fn certificate(&self) -> &[u8] {
        &self.certificate
    }

    /// Its key.
    #[must_use]
    pub fn key(&self) -> &SigningKey {
        &self.key
    }

    /// The bytes that would be signed, were `build` to sign with this authority.
    pub(super) fn to_be_signed<T>(
        &self,
        build: impl FnOnce(&Issuer<'static, Capture>) -> Result<T, rcgen::Error>,
    ) -> Result<Arc<[u8]>, Refusal> {
        let issuer = self.template.lock().unwrap_or_else(PoisonError::into_inner);
        build(&issuer).map_err(Refusal::internal)?;
        let bytes = std::mem::take(&mut *issuer.key().bytes.lock().unwrap_or_else(PoisonError::into_inner));
        Ok(bytes.into())
    }
}

/// Stands for an authority where something is to be signed by it.
fn template(certificate: &[u8], key: &PublicKey) -> Result<Issuer<'static, Capture>, Refusal> {
    let capture = Capture { key: key.clone(), bytes: Mutex::default() };
    Issuer::from_ca_cert_der(&CertificateDer::from(certificate), capture).map_err(Refusal::internal)
}

/// Whether a certificate under this authority names it as it names itself, byte for byte (RFC 5280 §6.1.3), and by its key identifier.
pub(super) fn is_named_alike(domain: &TrustDomain, certificate: &[u8], key: &PublicKey) -> bool {
    let made = || {
        let issuer = template(certificate, key).ok()?;
        let (from, until) = (UnixTime::from_seconds(0), UnixTime::from_seconds(1));
        let leaf = leaf(&domain.server(), &Serial::random(), from, until).ok()?;
        leaf.signed_by(&Certified(key), &issuer).ok()?;
        let tbs = std::mem::take(&mut *issuer.key().bytes.lock().unwrap_or_else(PoisonError::into_inner));
        let (_, tbs) = TbsCertificate::from_der(&tbs).ok()?;
        let (_, authority) = x509_parser::parse_x509_certificate(certificate).ok()?;
        let named = tbs.extensions().iter().find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::AuthorityKeyIdentifier(found) => found.key_identifier.as_ref().map(|id| id.0.to_vec()),
            _ => None,
        });
        let own = authority.extensions().iter().find_map(|extension| match extension.parsed_extension() {
            ParsedExtension::SubjectKeyIdentifier(id) => Some(id.0.to_vec()),
            _ => None,
        });
        Some(tbs.issuer.as_raw() == authority.subject().as_raw() && named == own)
    };
    made() == Some(true)
}

/// The bytes of a certificate that its own key will sign.
pub(super) fn self_to_be_signed(params: &CertificateParams, key: &PublicKey) -> Result<Arc<[u8]>, Refusal> {
    let capture = Capture { key: key.clone(), bytes: Mutex::default() };
    params.self_signed(&capture).map_err(Refusal::internal)?;
    Ok(capture.bytes.into_inner().unwrap_or_else(PoisonError::into_inner).into())
}

/// The bytes of a PKCS#10 request (RFC 2986) that its own key will sign.
pub(super) fn request_to_be_signed(params: &CertificateParams, key: &PublicKey) -> Result<Arc<[u8]>, Refusal> {
    let mut params = params.clone();
    params.serial_number = None;
    params.use_authority_key_identifier_extension = false;
    (params.not_before, params.not_after) = (CertificateParams::default().not_before, CertificateParams::default().not_after);
    let capture = Capture { key: key.clone(), bytes: Mutex::default() };
    params.serialize_request(&capture).map_err(Refusal::internal)?;
    Ok(capture.bytes.into_inner().unwrap_or_else(PoisonError::into_inner).into())
}

/// A certificate or CRL from what was signed and its signature (RFC 5280 §4.1, §5.1: the outer form is the same).
#[must_use]
pub fn assemble(tbs: &[u8], signature: &[u8]) -> Vec<u8> {
    let bits = signature.len() + 1;
    let mut bit_string = vec![0x03];
    push_length(&mut bit_string, bits);
    bit_string.push(0);
    bit_string.extend_from_slice(signature);
    let mut der = Vec::with_capacity(tbs.len() + bit_string.len() + 20);
    der.push(0x30);
    push_length(&mut der, tbs.len() + ECDSA_WITH_SHA256.len() + bit_string.len());
    der.extend_from_slice(tbs);
    der.extend_from_slice(&ECDSA_WITH_SHA256);
    der.extend_from_slice(&bit_string);
    der
}

fn push_length(der: &mut Vec<u8>, length: usize) {
    if length < 0x80 {
        der.extend(length.to_be_bytes().last());
        return;
    }
    let bytes = length.to_be_bytes();
    let significant = &bytes[bytes.iter().take_while(|byte| **byte == 0).count()..];
    der.extend((0x80 + significant.len()).to_be_bytes().last());
    der.extend_from_slice(significant);
}

/// Where a certificate's parameters start: nothing by default, everything explicit.
pub(super) fn params(serial: &Serial, not_before: UnixTime, not_after: UnixTime) -> Result<CertificateParams, Refusal> {
    let mut params = CertificateParams::default();
    params.distinguished_name = DistinguishedName::new();
    params.serial_number = Some(SerialNumber::from_slice(&serial.0));
    params.not_before = offset(not_before)?;
    params.not_after = offset(not_after)?;
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

/// Whole seconds, as certificates have them.
pub(super) fn offset(time: UnixTime) -> Result<time::OffsetDateTime, Refusal> {
    let seconds = i64::try_from(time.seconds()).map_err(Refusal::internal)?;
    time::OffsetDateTime::from_unix_timestamp(seconds).map_err(Refusal::internal)
}

/// An X.509-SVID leaf (SPIFFE X509-SVID §4): one URI SAN, critical KeyUsage digitalSignature, EKU server and client, critical
/// empty BasicConstraints, SKI and AKI. The subject is empty and the SAN therefore critical (RFC 5280 §4.1.2.6).
pub(super) fn leaf(
    id: &SpiffeId,
    serial: &Serial,
    not_before: UnixTime,
    not_after: UnixTime,
) -> Result<CertificateParams, Refusal> {
    let mut params = params(serial, not_before, not_after)?;
    params.subject_alt_names = vec![SanType::URI(id.as_str().try_into().map_err(Refusal::internal)?)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.is_ca = IsCa::ExplicitNoCa;
    Ok(params)
}

/// O of every authority.
pub(super) const ORGANIZATION: &str = "keyward";

/// An authority's certificate: SPIFFE ID without a path, keyCertSign and cRLSign, a path length (X509-SVID §4.1).
pub(super) fn authority(
    domain: &TrustDomain,
    name: &str,
    path_length: u8,
    serial: &Serial,
    not_before: UnixTime,
    not_after: UnixTime,
) -> Result<CertificateParams, Refusal> {
    let mut params = params(serial, not_before, not_after)?;
    params.distinguished_name.push(DnType::OrganizationName, ORGANIZATION);
    params.distinguished_name.push(DnType::CommonName, name);
    params.subject_alt_names = vec![SanType::URI(domain.id().as_str().try_into().map_err(Refusal::internal)?)];
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(path_length));
    Ok(params)
}

/// The bytes of a leaf for `key`, to be signed by `issuing`.
pub(super) fn leaf_to_be_signed(issuing: &Authority, params: &CertificateParams, key: &PublicKey) -> Result<Arc<[u8]>, Refusal> {
    issuing.to_be_signed(|issuer| params.signed_by(&Certified(key), issuer))
}

/// A certificate with everything but its signature. Made from a grant; signing consumes it.
pub struct Prepared {
    authority: Arc<Authority>,
    intention: Intention,
    spiffe_id: SpiffeId,
}

impl Prepared {
    /// Settles every byte that will be signed. `ledger_size` is the tree's size now: the appraisal stands there or after.
    ///
    /// # Errors
    /// `INTERNAL` when the encoder refuses.
    #[expect(clippy::too_many_arguments, reason = "each is a value that only its room can make")]
    pub fn new(
        grant: &Grant,
        csr: &Csr,
        appraisal: &Appraisal,
        ask: &Ask,
        kind: IntentKind,
        ledger_size: u64,
        domain: &TrustDomain,
        authority: Arc<Authority>,
    ) -> Result<Self, Refusal> {
        let serial = Serial::random();
        let spiffe_id = grant.agent().spiffe_id(domain);
        let mut params = leaf(&spiffe_id, &serial, grant.not_before(), grant.not_after())?;
        let extension = AgentExtension {
            epoch: grant.epoch(),
            lineage_root: grant.agent().clone(),
            appraisal_index: ledger_size,
            policy_hash: None,
        };
        params.custom_extensions = vec![CustomExtension::from_oid_content(&AGENT_EXTENSION_OID, extension.to_der())];
        let tbs = leaf_to_be_signed(&authority, &params, csr.key())?;
        let subject = Subject {
            agent: grant.agent().clone(),
            epoch: grant.epoch(),
            evidence: appraisal.evidence().clone(),
            fresh_until: appraisal.fresh_until(),
            key: csr.key().clone(),
            serial,
            not_before: grant.not_before(),
            not_after: grant.not_after(),
            request_hash: *ask.hash(),
            idempotency_hash: ask.idempotency_hash(),
        };
        let intention = Intention { kind, key_id: authority.key.id(), tbs, subject: Some(subject) };
        Ok(Self { authority, intention, spiffe_id })
    }

    /// A place on the way to the signature.
    ///
    /// # Errors
    /// `OVERLOADED`, `HSM_UNAVAILABLE`.
    pub fn admit(&self) -> Result<Admitted, Refusal> {
        self.authority.key.admit().map_err(super::hsm_refusal)
    }

    /// What the ledger has to record first.
    #[must_use]
    pub fn intention(&self) -> Intention {
        self.intention.clone()
    }

    /// Has the token sign exactly the recorded bytes, once. The signature comes back verified.
    ///
    /// # Errors
    /// `HSM_UNAVAILABLE` or `OVERLOADED` (the intent has failed: nothing was signed), `SIGNATURE_UNKNOWN` (it may have been).
    pub async fn sign(self, intent: Intent) -> Result<Signed, Refusal> {
        let next_sequence = intent.next_sequence();
        let (intent, signature) = sign_once(intent, &self.authority.key, &self.intention.tbs).await?;
        let certificate = assemble(&self.intention.tbs, &signature);
        let not_after = self.intention.subject.as_ref().map_or_else(UnixTime::default, |subject| subject.not_after);
        let epoch = self.intention.subject.as_ref().map_or(0, |subject| subject.epoch);
        let certified = self.intention.subject.as_ref().map(|subject| subject.key.digest());
        Ok(Signed {
            intent,
            signature,
            issued: Issued {
                chain: vec![certificate, self.authority.certificate.clone()],
                spiffe_id: self.spiffe_id,
                epoch,
                next_sequence,
                ledger_index: 0,
                not_after,
                certified,
            },
        })
    }
}

/// A certificate that nobody has seen yet.
#[must_use = "it has to pass the gate"]
pub struct Signed {
    intent: Intent,
    signature: Vec<u8>,
    issued: Issued,
}

impl Signed {
    /// Through the gate.
    ///
    /// # Errors
    /// `DENIED_MEANWHILE`: a quarantine came first, the certificate is withheld for good.
    pub fn release(self) -> Result<Issued, Refusal> {
        let ledger_index = self.intent.release(&self.signature)?;
        Ok(Issued { ledger_index, ..self.issued })
    }
}

/// What the agent gets.
#[derive(Debug, Clone)]
pub struct Issued {
    /// DER, leaf first, then the issuing certificate.
    pub chain: Vec<Vec<u8>>,
    /// Its name.
    pub spiffe_id: SpiffeId,
    /// Its epoch.
    pub epoch: u32,
    /// What to claim at the next renewal.
    pub next_sequence: u64,
    /// Of the intent.
    pub ledger_index: u64,
    /// When it ends.
    pub not_after: UnixTime,
    /// The key that was certified just now; none where an earlier answer is given again.
    pub certified: Option<Digest>,
}

/// Asks the token once. Whatever happens, the intent is on its way to exactly one outcome.
async fn sign_once(mut intent: Intent, key: &SigningKey, tbs: &Arc<[u8]>) -> Result<(Intent, Vec<u8>), Refusal> {
    intent.asking(tbs)?;
    match key.sign(Arc::clone(tbs)).await {
        Ok(signature) => Ok((intent, signature)),
        Err(SignError::NotSigned(error)) => {
            let refusal = super::hsm_refusal(error);
            intent.fail(refusal.reason);
            Err(refusal)
        }
        Err(SignError::Unknown(error)) => {
            tracing::error!(intent = intent.index(), %error, "the token may or may not have signed; nothing is handed out");
            intent.unknown(error.to_string());
            Err(Refusal::new(
                Reason::SignatureUnknown,
                "keyward's HSM did not answer in time; ask again, with a new idempotency key or the same",
            )
            .because(error)
            .retry_after(Refusal::SOON))
        }
    }
}

/// The daemon's own signatures (authorities, server certificate, CRL): recorded, signed once, released. Gives the intent's index and
/// the signature.
pub(super) async fn sign_own(
    ledger: &Ledger,
    kind: IntentKind,
    key: &SigningKey,
    tbs: Arc<[u8]>,
) -> Result<(u64, Vec<u8>), Refusal> {
    let intention = Intention { kind, key_id: key.id(), tbs: Arc::clone(&tbs), subject: None };
    let Decided::Intent(intent) = ledger.intend(intention).await? else {
        return Err(Refusal::internal("the daemon's own wish was taken for a repeated one"));
    };
    let (intent, signature) = sign_once(intent, key, &tbs).await?;
    let index = intent.release(&signature)?;
    Ok((index, signature))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_certificate_is_assembled_as_rcgen_would() {
        let key = rcgen::KeyPair::generate_for(&PKCS_ECDSA_P256_SHA256).unwrap();
        let id = SpiffeId::parse("spiffe://example.org/agent/a/b").unwrap();
        let params =
            leaf(&id, &Serial::random(), UnixTime::from_seconds(1_800_000_000), UnixTime::from_seconds(1_800_000_600)).unwrap();
        let whole = params.self_signed(&key).unwrap();
        let (_, parsed) = x509_parser::parse_x509_certificate(whole.der()).unwrap();
        let tbs = parsed.tbs_certificate.as_ref();
        assert_eq!(assemble(tbs, &parsed.signature_value.data), whole.der().to_vec());
        let public = PublicKey::from_spki(parsed.public_key().raw).unwrap();
        assert_eq!(&*self_to_be_signed(&params, &public).unwrap(), tbs);
    }
}

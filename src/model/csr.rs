//! A signing request that exists only parsed.

use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::oid_registry::OID_SIG_ECDSA_WITH_SHA256;
use x509_parser::prelude::FromDer;

use super::{Algorithm, InvalidKey, Meter, PublicKey, Reason, Refusal};

/// A PKCS#10 request (RFC 2986) whose self-signature proved possession of the key. Only the key is kept: what else the
/// requester wrote (subject, extensions, CA:TRUE) is not even read.
#[derive(Debug, Clone)]
pub struct Csr {
    key: PublicKey,
}

impl Csr {
    /// Largest request accepted, in bytes.
    pub const BYTES_MAX: usize = 4096;

    /// Parses and checks `der`.
    ///
    /// # Errors
    /// `REQUEST_TOO_LARGE`, `CSR_MALFORMED` (also trailing bytes), `KEY_UNSUPPORTED` (anything but P-256 and
    /// ecdsa-with-SHA256), `CSR_SIGNATURE_INVALID`.
    pub fn parse(der: &[u8], meter: &Meter) -> Result<Self, Refusal> {
        meter.csr.measure(|| Self::parse_unmeasured(der, meter))
    }

    fn parse_unmeasured(der: &[u8], meter: &Meter) -> Result<Self, Refusal> {
        if der.len() > Self::BYTES_MAX {
            return Err(Refusal::new(Reason::RequestTooLarge, "send a CSR of at most 4,096 bytes"));
        }
        let malformed = |why: &'static str| Refusal::new(Reason::CsrMalformed, format!("send a PKCS#10 request in DER ({why})"));
        let (rest, request) =
            X509CertificationRequest::from_der(der).map_err(|error| malformed("it does not parse").because(error.to_string()))?;
        if !rest.is_empty() {
            return Err(malformed("bytes follow it"));
        }
        let info = &request.certification_request_info;
        let unsupported =
            |error: InvalidKey| Refusal::new(Reason::KeyUnsupported, "use a P-256 key with a named curve").because(error);
        let key = PublicKey::from_spki_unchecked(info.subject_pki.raw).map_err(unsupported)?;
        if key.algorithm() != Algorithm::P256 || request.signature_algorithm.algorithm != OID_SIG_ECDSA_WITH_SHA256 {
            return Err(unsupported(InvalidKey::Unsupported));
        }
        if !meter.csr_verify.measure(|| key.verifies(info.raw, &request.signature_value.data)) {
            // A point that is not on the curve verifies nothing.
            key.check_on_curve().map_err(unsupported)?;
            return Err(Refusal::new(Reason::CsrSignatureInvalid, "sign the CSR with the key it names"));
        }
        Ok(Self { key })
    }

    /// The key whose possession was proved.
    #[must_use]
    pub fn key(&self) -> &PublicKey {
        &self.key
    }
}

//! What the to-be-signed bytes of an intent say (RFC 5280 §4.1, §5.1; RFC 2986 §4.1).

use std::collections::HashSet;

use x509_parser::certificate::TbsCertificateParser;
use x509_parser::certification_request::X509CertificationRequestInfo;
use x509_parser::extensions::{GeneralName, ParsedExtension, SubjectAlternativeName};
use x509_parser::nom::Parser as _;
use x509_parser::oid_registry::{OID_X509_EXT_BASIC_CONSTRAINTS, OID_X509_EXT_CRL_NUMBER, OID_X509_EXT_SUBJECT_ALT_NAME};
use x509_parser::prelude::FromDer as _;
use x509_parser::revocation_list::TbsCertList;

use crate::model::{Digest, PublicKey, Serial};

/// BasicConstraints as an empty SEQUENCE: an end entity (RFC 5280 §4.2.1.9).
const END_ENTITY: [u8; 2] = [0x30, 0x00];

/// A TBSCertificate.
pub(super) struct Certificate<'t> {
    pub(super) serial: Serial,
    pub(super) not_after_seconds: u64,
    /// The one URI among its names.
    pub(super) uri: &'t str,
    pub(super) end_entity: bool,
}

impl<'t> Certificate<'t> {
    /// Only the extensions that are looked at are parsed: half of the time otherwise.
    pub(super) fn parse(der: &'t [u8]) -> Result<Self, &'static str> {
        let (rest, tbs) =
            TbsCertificateParser::new().with_deep_parse_extensions(false).parse(der).map_err(|_| "not a TBSCertificate")?;
        if !rest.is_empty() {
            return Err("bytes follow the TBSCertificate");
        }
        let serial = Serial::from_slice(tbs.raw_serial()).ok_or("the serial has not 16 bytes")?;
        let not_after_seconds = u64::try_from(tbs.validity.not_after.timestamp()).map_err(|_| "notAfter is before 1970")?;
        let (mut uri, mut end_entity) = (None, false);
        for extension in tbs.extensions() {
            if extension.oid == OID_X509_EXT_BASIC_CONSTRAINTS {
                end_entity = extension.value == END_ENTITY;
            } else if extension.oid == OID_X509_EXT_SUBJECT_ALT_NAME {
                let (_, names) = SubjectAlternativeName::from_der(extension.value).map_err(|_| "the names do not parse")?;
                for name in names.general_names {
                    if let GeneralName::URI(text) = name
                        && uri.replace(text).is_some()
                    {
                        return Err("more than one URI");
                    }
                }
            }
        }
        Ok(Self { serial, not_after_seconds, uri: uri.ok_or("no URI")?, end_entity })
    }
}

/// A TBSCertList.
pub(super) struct Crl {
    /// The size of the tree when it was prepared.
    pub(super) number: u64,
    pub(super) serials: HashSet<Serial>,
}

impl Crl {
    pub(super) fn parse(der: &[u8]) -> Result<Self, &'static str> {
        let (rest, tbs) = TbsCertList::from_der(der).map_err(|_| "not a TBSCertList")?;
        if !rest.is_empty() {
            return Err("bytes follow the TBSCertList");
        }
        let number = tbs.extensions().iter().find(|extension| extension.oid == OID_X509_EXT_CRL_NUMBER);
        let number = match number.map(|extension| extension.parsed_extension()) {
            Some(ParsedExtension::CRLNumber(number)) => u64::try_from(number).map_err(|_| "the CRL number is too large")?,
            _ => return Err("no CRL number"),
        };
        let serials = tbs.revoked_certificates.iter().filter_map(|revoked| Serial::from_slice(revoked.raw_serial())).collect();
        Ok(Self { number, serials })
    }
}

/// Whether it is a CertificationRequestInfo (RFC 2986 §4.1), which no certificate and no CRL can be taken for.
pub(super) fn is_request(der: &[u8]) -> Result<(), &'static str> {
    match X509CertificationRequestInfo::from_der(der) {
        Ok(([], _)) => Ok(()),
        Ok(_) => Err("bytes follow the CertificationRequestInfo"),
        Err(_) => Err("not a CertificationRequestInfo"),
    }
}

/// The digest of the TBSCertificate within a certificate.
pub(super) fn digest_within(certificate: &[u8]) -> Option<Digest> {
    let (rest, parsed) = x509_parser::certificate::X509Certificate::from_der(certificate).ok()?;
    rest.is_empty().then(|| Digest::of(parsed.tbs_certificate.as_ref()))
}

/// What a certificate says as that of an authority: whose key it is for, and what its issuer signed.
pub(super) struct Authority {
    pub(super) key: PublicKey,
    tbs: Vec<u8>,
    signature: Vec<u8>,
}

impl Authority {
    pub(super) fn parse(der: &[u8]) -> Option<Self> {
        let (rest, parsed) = x509_parser::certificate::X509Certificate::from_der(der).ok()?;
        let key = PublicKey::from_spki(parsed.public_key().raw).ok().filter(|_| rest.is_empty())?;
        let (tbs, signature) = (parsed.tbs_certificate.as_ref().to_vec(), parsed.signature_value.data.to_vec());
        Some(Self { key, tbs, signature })
    }

    pub(super) fn is_signed_by(&self, issuer: &PublicKey) -> bool {
        issuer.verifies(&self.tbs, &self.signature)
    }
}

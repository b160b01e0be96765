//! What an outside root signed, held against what it was asked to sign.

use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::oid_registry::{self, Oid};

use crate::model::{Algorithm, KeyId, PublicKey, Reason, Refusal, TrustDomain, UnixTime};

use super::certificate::is_named_alike;
use super::certify::issuing_subject;

/// keyCertSign and cRLSign, as bits of KeyUsage (RFC 5280 §4.2.1.3) from the first on.
const AUTHORITY_USAGE: u16 = 1 << 5 | 1 << 6;

fn bad(why: &str) -> Refusal {
    Refusal::new(Reason::CertificateUnfit, format!("the outside certificates do not fit: {why}"))
}

/// An outside root has to be dedicated to this trust domain. The issuing certificate is the root's, and as it was asked for: for our key,
/// under the subject that is that key's alone and the SPIFFE ID of the trust domain, a CA of path length 0 that signs certificates and
/// CRLs and nothing else, in force, and for no longer than its root.
///
/// # Errors
/// `CERTIFICATE_UNFIT`, with what does not fit.
pub(super) fn check_outside(
    domain: &TrustDomain,
    root: &[u8],
    issuing: &[u8],
    (key_id, key): (KeyId, &PublicKey),
    now: UnixTime,
) -> Result<(), Refusal> {
    let parse = |der| x509_parser::parse_x509_certificate(der).map(|(_, parsed)| parsed).map_err(|_| bad("one does not parse"));
    let issuing_der = issuing;
    let (root, issuing) = (parse(root)?, parse(issuing)?);
    check_root(&root, &issuing)?;
    if issuing.public_key().raw != key.spki() {
        return Err(bad("the issuing certificate is not for the key of the CSR"));
    }
    check_in_force("the root", &root, now)?;
    check_in_force("the issuing certificate", &issuing, now)?;
    if issuing.validity().not_after > root.validity().not_after {
        return Err(bad("the issuing certificate is good for longer than the root"));
    }
    check_constraints(&issuing)?;
    check_extensions(&root)?;
    check_extensions(&issuing)?;
    check_names(domain, &root, &issuing, key_id)?;
    if !is_named_alike(domain, issuing_der, key) {
        return Err(bad(
            "the issuing certificate's subject is encoded so that certificates under it cannot repeat it; have the CSR's signed",
        ));
    }
    Ok(())
}

fn check_root(root: &X509Certificate<'_>, issuing: &X509Certificate<'_>) -> Result<(), Refusal> {
    let root_key = PublicKey::from_spki(root.public_key().raw).ok().filter(|key| key.algorithm() == Algorithm::P256);
    let root_key = root_key.ok_or_else(|| bad("the root's key is not P-256"))?;
    if !root_key.verifies(issuing.tbs_certificate.as_ref(), &issuing.signature_value.data) || issuing.issuer() != root.subject() {
        return Err(bad("the issuing certificate is not signed by the root"));
    }
    if !root_key.verifies(root.tbs_certificate.as_ref(), &root.signature_value.data) || root.issuer() != root.subject() {
        return Err(bad("the root is not self-signed"));
    }
    let root_usage = root.key_usage().map_err(|_| bad("the root's KeyUsage"))?;
    let root_length = root.basic_constraints().map_err(|_| bad("the root's BasicConstraints"))?;
    let may_sign = root_usage.is_some_and(|usage| usage.value.key_cert_sign());
    if !may_sign || root_length.is_none_or(|found| found.value.path_len_constraint == Some(0)) {
        return Err(bad("the root may not sign an issuing certificate"));
    }
    Ok(())
}

fn check_in_force(which: &str, certificate: &X509Certificate<'_>, now: UnixTime) -> Result<(), Refusal> {
    let (at, validity) = (i64::try_from(now.seconds()).unwrap_or(i64::MAX), certificate.validity());
    match () {
        () if !certificate.is_ca() => Err(bad(&format!("{which} is not a CA"))),
        () if at < validity.not_before.timestamp() => Err(bad(&format!("{which} is not in force yet"))),
        () if validity.not_after.timestamp() <= at => Err(bad(&format!("{which} has expired"))),
        () => Ok(()),
    }
}

fn check_constraints(issuing: &X509Certificate<'_>) -> Result<(), Refusal> {
    // What every leaf and CRL names as its authority.
    if issuing.get_extension_unique(&oid_registry::OID_X509_EXT_SUBJECT_KEY_IDENTIFIER).ok().flatten().is_none() {
        return Err(bad("the issuing certificate has no SubjectKeyIdentifier"));
    }
    let usage = issuing.key_usage().map_err(|_| bad("its KeyUsage"))?.ok_or_else(|| bad("it has no KeyUsage"))?;
    if usage.value.flags & AUTHORITY_USAGE != AUTHORITY_USAGE {
        return Err(bad("the issuing certificate may not sign certificates and CRLs"));
    }
    if usage.value.flags != AUTHORITY_USAGE {
        return Err(bad("the issuing certificate's KeyUsage is more than keyCertSign and cRLSign"));
    }
    let constraints =
        issuing.basic_constraints().map_err(|_| bad("its BasicConstraints"))?.ok_or_else(|| bad("no BasicConstraints"))?;
    if constraints.value.path_len_constraint != Some(0) {
        return Err(bad("the issuing certificate's path length is not 0"));
    }
    Ok(())
}

/// What would have verifiers refuse the certificates under it: some or all, now or when they are updated.
fn check_extensions(authority: &X509Certificate<'_>) -> Result<(), Refusal> {
    for extension in authority.extensions() {
        match extension.parsed_extension() {
            ParsedExtension::NameConstraints(_) => {
                return Err(bad("one has NameConstraints, which verifiers do not agree on for the URI of a SPIFFE ID"));
            }
            // Verifiers hold what is under an authority against the authority's own.
            ParsedExtension::ExtendedKeyUsage(usage) if !(usage.any || usage.client_auth && usage.server_auth) => {
                return Err(bad("one is not for both clients and servers (ExtendedKeyUsage)"));
            }
            ParsedExtension::UnsupportedExtension { .. } | ParsedExtension::ParseError { .. } if extension.critical => {
                return Err(bad("one has a critical extension that is not known"));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Another generation's certificate has another subject, also where somebody made two for one key.
fn check_names(
    domain: &TrustDomain,
    root: &X509Certificate<'_>,
    issuing: &X509Certificate<'_>,
    key_id: KeyId,
) -> Result<(), Refusal> {
    let kinds = [oid_registry::OID_X509_ORGANIZATION_NAME, oid_registry::OID_X509_COMMON_NAME];
    let wanted: Vec<(Oid<'_>, String)> = kinds.into_iter().zip(issuing_subject(domain, key_id)).collect();
    let found = issuing.subject().iter_attributes();
    let found: Vec<_> = found.map(|one| (one.attr_type().clone(), one.as_str().unwrap_or_default().to_owned())).collect();
    if found != wanted {
        return Err(bad("the issuing certificate's subject is not that of the CSR"));
    }
    let expected = domain.id();
    let named = |certificate: &X509Certificate<'_>| {
        let names = certificate.subject_alternative_name().map_err(|_| bad("a SubjectAltName"))?;
        let is_it = |name: &GeneralName<'_>| matches!(name, GeneralName::URI(uri) if *uri == expected.as_str());
        match names.map(|names| names.value.general_names.iter().map(is_it).collect::<Vec<_>>()) {
            Some(found) if found.contains(&false) => Err(bad("one of them names another trust domain")),
            found => Ok(found.is_some_and(|found| found.len() == 1)),
        }
    };
    named(root)?;
    if named(issuing)? { Ok(()) } else { Err(bad("the issuing certificate does not have the SPIFFE ID of the CSR")) }
}

#[cfg(test)]
mod tests {
    use rcgen::{
        BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
        PublicKeyData as _, SanType,
    };

    use super::super::certificate;
    use super::*;
    use crate::model::Serial;

    const NOW: UnixTime = UnixTime::from_seconds(1_800_000_000);
    const KEY: KeyId = KeyId([7; 16]);
    const DAY: u64 = 86_400;

    fn domain() -> TrustDomain {
        TrustDomain::parse("example.org").unwrap()
    }

    fn asked() -> CertificateParams {
        let [_, name] = issuing_subject(&domain(), KEY);
        let end = NOW.plus_seconds(365 * DAY);
        certificate::authority(&domain(), &name, 0, &Serial::random(), NOW.minus_seconds(30), end).unwrap()
    }

    /// What is said of an issuing certificate that differs so from what was asked for, under a root of two years.
    fn said(differs: impl FnOnce(&mut CertificateParams)) -> String {
        said_of(&KeyPair::generate().unwrap(), None, differs)
    }

    fn said_of(key: &KeyPair, signed_for: Option<&KeyPair>, differs: impl FnOnce(&mut CertificateParams)) -> String {
        let end = NOW.plus_seconds(2 * 365 * DAY);
        let root = certificate::authority(&domain(), "root", 1, &Serial::random(), NOW.minus_seconds(DAY), end).unwrap();
        let root_key = KeyPair::generate().unwrap();
        let root_der = root.self_signed(&root_key).unwrap().der().to_vec();
        let mut params = asked();
        differs(&mut params);
        let issuing = params.signed_by(signed_for.unwrap_or(key), &Issuer::new(root, root_key)).unwrap();
        let public = PublicKey::from_spki(&key.subject_public_key_info()).unwrap();
        match check_outside(&domain(), &root_der, issuing.der(), (KEY, &public), NOW) {
            Ok(()) => String::new(),
            Err(refusal) => {
                assert_eq!(refusal.reason, Reason::CertificateUnfit);
                refusal.advice
            }
        }
    }

    fn time(at: UnixTime) -> ::time::OffsetDateTime {
        ::time::OffsetDateTime::from_unix_timestamp(at.seconds().cast_signed()).unwrap()
    }

    #[track_caller]
    fn says(said: &str, why: &str) {
        assert!(said.contains(why), "{said:?}, not {why:?}");
    }

    #[test]
    fn what_was_asked_for_is_taken() {
        assert_eq!(said(|_| {}), "");
        let both = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
        assert_eq!(said(|params| params.extended_key_usages = both), "");
    }

    #[test]
    fn one_for_another_key_is_refused() {
        let (own, other) = (KeyPair::generate().unwrap(), KeyPair::generate().unwrap());
        says(&said_of(&own, Some(&other), |_| {}), "not for the key of the CSR");
    }

    #[test]
    fn one_under_another_name_is_refused() {
        says(&said(|params| params.distinguished_name.push(DnType::CommonName, "example.org issuing 00000000")), "subject");
        says(&said(|params| params.distinguished_name.push(DnType::OrganizationalUnitName, "more")), "subject");
        says(&said(|params| params.distinguished_name = rcgen::DistinguishedName::new()), "subject");
        says(&said(|params| params.subject_alt_names.clear()), "SPIFFE ID");
        let uri = |text: &str| SanType::URI(text.try_into().unwrap());
        says(&said(|params| params.subject_alt_names = vec![uri("spiffe://example.com")]), "another trust domain");
        says(&said(|params| params.subject_alt_names.push(uri("spiffe://example.org/a"))), "another trust domain");
        says(&said(|params| params.subject_alt_names.push(uri("spiffe://example.org"))), "SPIFFE ID");
    }

    #[test]
    fn one_with_other_constraints_is_refused() {
        says(&said(|params| params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1))), "path length");
        says(&said(|params| params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained)), "path length");
        says(&said(|params| params.is_ca = IsCa::ExplicitNoCa), "not a CA");
        says(&said(|params| params.key_usages = vec![KeyUsagePurpose::KeyCertSign]), "may not sign");
        says(&said(|params| params.key_usages.clear()), "KeyUsage");
        says(&said(|params| params.key_usages.push(KeyUsagePurpose::DigitalSignature)), "more than");
        says(&said(|params| params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth]), "ExtendedKeyUsage");
    }

    #[test]
    fn one_that_is_not_in_force_or_outlives_its_root_is_refused() {
        says(&said(|params| params.not_before = time(NOW.plus_seconds(1))), "not in force yet");
        says(&said(|params| params.not_after = time(NOW)), "has expired");
        says(&said(|params| params.not_after = time(NOW.plus_seconds(2 * 365 * DAY + 1))), "longer than the root");
        assert_eq!(said(|params| params.not_after = time(NOW.plus_seconds(2 * 365 * DAY))), "");
        assert_eq!(said(|params| params.not_before = time(NOW)), "");
    }
}

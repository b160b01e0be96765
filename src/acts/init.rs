//! The beginning: keys in the token, authorities over them. Explicit, and resumed by calling it again.

use std::path::Path;

use x509_parser::oid_registry;

use crate::ledger::Ledger;
use crate::model::{Algorithm, KeyId, PublicKey, Reason, Refusal, TrustDomain, UnixTime};
use crate::proto::{self, AuthorityState, Purpose, TokenRole, entry::Body};

use super::certificate::Authority;
use super::certify::{certify_issuing, certify_root, request_issuing};
use super::keys::{Tokens, ensure, reconcile};
use super::{files, verifier_key};

/// Where the root comes from.
pub enum Root {
    /// Made here, in the token.
    Own,
    /// Outside: the issuing key's CSR is handed out.
    Outside,
    /// Outside, and here is what it signed.
    Signed {
        /// The root, DER.
        root: Vec<u8>,
        /// The issuing certificate, DER.
        issuing: Vec<u8>,
    },
}

/// What a call achieved.
pub enum Initialised {
    /// Everything is there.
    Complete {
        /// The ledger's verifier key.
        vkey: String,
        /// The root, PEM.
        bundle: String,
    },
    /// Nothing: a complete one is left alone.
    Already,
    /// The outside root's turn.
    AwaitsRoot {
        /// PKCS#10, PEM.
        csr: String,
    },
}

/// Makes what is missing: keys, then certificates, then the files beside the ledger.
///
/// # Errors
/// When the token or the ledger is not available, or an outside certificate does not fit.
pub async fn initialise(
    ledger: &Ledger,
    tokens: &Tokens,
    domain: &TrustDomain,
    state: &Path,
    root: Root,
) -> Result<Initialised, Refusal> {
    let known = ledger.generations().0;
    let has = |purpose: Purpose| known.iter().any(|found| found.purpose == purpose);
    if has(Purpose::Issuing) && state.join("ledger.vkey").exists() {
        return Ok(Initialised::Already);
    }
    reconcile(ledger, tokens).await?;
    let ledger_key = ensure(ledger, tokens, Purpose::Ledger, TokenRole::Authority).await?;
    if !has(Purpose::Ledger) {
        activate(ledger, Purpose::Ledger, Some(ledger_key.id()), &[], 0).await?;
    }
    ensure(ledger, tokens, Purpose::Canary, TokenRole::Authority).await?;
    if !tokens.shared {
        ensure(ledger, tokens, Purpose::Canary, TokenRole::Agents).await?;
    }
    // Before the root: the first bundle has it.
    let token_key = ensure(ledger, tokens, Purpose::TokenSigning, TokenRole::Authority).await?;
    if !has(Purpose::TokenSigning) {
        activate(ledger, Purpose::TokenSigning, Some(token_key.id()), &[], 0).await?;
    }
    let issuing_key = ensure(ledger, tokens, Purpose::Issuing, TokenRole::Authority).await?;
    let now = UnixTime::wall();
    if !has(Purpose::Issuing) {
        match root {
            Root::Own => {
                if state.join("issuing.csr").exists() {
                    let advice =
                        "an outside root was asked for: give its certificates (--root-certificate, --issuing-certificate)";
                    return Err(Refusal::new(Reason::MalformedRequest, advice));
                }
                let root_key = ensure(ledger, tokens, Purpose::Root, TokenRole::Authority).await?;
                let root = match known.iter().find(|found| found.purpose == Purpose::Root) {
                    Some(found) => found.certificate.clone(),
                    None => {
                        let (der, intent) = certify_root(ledger, domain, &root_key, now).await?;
                        activate(ledger, Purpose::Root, Some(root_key.id()), &der, intent).await?;
                        der
                    }
                };
                let authority = Authority::new(root_key, root)?;
                let (der, intent) = certify_issuing(ledger, domain, &issuing_key, &authority, now).await?;
                activate(ledger, Purpose::Issuing, Some(issuing_key.id()), &der, intent).await?;
            }
            Root::Outside => {
                let der = request_issuing(ledger, domain, &issuing_key, now).await?;
                let csr = pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", der));
                // From here on the root is the outside one's matter.
                files::replace(&state.join("issuing.csr"), csr.as_bytes(), 0o644).map_err(Refusal::internal)?;
                return Ok(Initialised::AwaitsRoot { csr });
            }
            Root::Signed { root, issuing } => {
                check_outside(domain, &root, &issuing, issuing_key.public(), now)?;
                match known.iter().find(|found| found.purpose == Purpose::Root) {
                    None => activate(ledger, Purpose::Root, None, &root, 0).await?,
                    Some(found) if found.certificate == root => {}
                    // A crash came between it and its issuing certificate.
                    Some(_) => {
                        return Err(Refusal::new(Reason::CertificateUnfit, "another root was given before: give that one"));
                    }
                }
                activate(ledger, Purpose::Issuing, Some(issuing_key.id()), &issuing, 0).await?;
            }
        }
    }
    let (generations, _) = ledger.generations();
    let pem_of = |purpose: Purpose| {
        let found = generations.iter().find(|found| found.purpose == purpose && found.state == AuthorityState::Active);
        found
            .map(|found| pem::encode(&pem::Pem::new("CERTIFICATE", found.certificate.as_slice())))
            .ok_or_else(|| Refusal::internal("an authority is missing"))
    };
    let bundle = pem_of(Purpose::Root)?;
    let vkey = verifier_key(domain, ledger_key.public().clone())?.to_string();
    files::replace(&state.join("bundle.pem"), bundle.as_bytes(), 0o644).map_err(Refusal::internal)?;
    files::replace(&state.join("issuing.pem"), pem_of(Purpose::Issuing)?.as_bytes(), 0o644).map_err(Refusal::internal)?;
    // Last: a start and a repeated init both go by it.
    files::replace(&state.join("ledger.vkey"), format!("{vkey}\n").as_bytes(), 0o644).map_err(Refusal::internal)?;
    Ok(Initialised::Complete { vkey, bundle })
}

async fn activate(ledger: &Ledger, purpose: Purpose, key_id: Option<KeyId>, der: &[u8], intent: u64) -> Result<(), Refusal> {
    let body = proto::AuthorityActivated {
        purpose: purpose.into(),
        key_id: key_id.map(|id| id.0.to_vec()).unwrap_or_default(),
        certificate: der.to_vec(),
        intent,
    };
    ledger.record(Body::AuthorityActivated(body)).await.map(drop)
}

/// An outside root has to be dedicated to this trust domain: the issuing certificate is for our key, a CA of path length 0 that may sign
/// certificates and CRLs, names the trust domain if anything, is in force, and is the root's.
pub(super) fn check_outside(
    domain: &TrustDomain,
    root: &[u8],
    issuing: &[u8],
    key: &PublicKey,
    now: UnixTime,
) -> Result<(), Refusal> {
    let bad = |why: &str| Refusal::new(Reason::CertificateUnfit, format!("the outside certificates do not fit: {why}"));
    let parse = |der| x509_parser::parse_x509_certificate(der).map(|(_, parsed)| parsed).map_err(|_| bad("one does not parse"));
    let (root, issuing) = (parse(root)?, parse(issuing)?);
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
    if issuing.public_key().raw != key.spki() {
        return Err(bad("the issuing certificate is not for the key of the CSR"));
    }
    let at = i64::try_from(now.seconds()).unwrap_or(i64::MAX);
    for certificate in [&root, &issuing] {
        let valid = certificate.validity().not_before.timestamp() <= at && at < certificate.validity().not_after.timestamp();
        if !valid || !certificate.is_ca() {
            return Err(bad("one is not a CA, or not in force"));
        }
    }
    // What every leaf and CRL names as its authority.
    if issuing.get_extension_unique(&oid_registry::OID_X509_EXT_SUBJECT_KEY_IDENTIFIER).ok().flatten().is_none() {
        return Err(bad("the issuing certificate has no SubjectKeyIdentifier"));
    }
    let usage = issuing.key_usage().map_err(|_| bad("its KeyUsage"))?.ok_or_else(|| bad("it has no KeyUsage"))?;
    if !usage.value.key_cert_sign() || !usage.value.crl_sign() {
        return Err(bad("the issuing certificate may not sign certificates and CRLs"));
    }
    let constraints =
        issuing.basic_constraints().map_err(|_| bad("its BasicConstraints"))?.ok_or_else(|| bad("no BasicConstraints"))?;
    if constraints.value.path_len_constraint != Some(0) {
        return Err(bad("the issuing certificate's path length is not 0"));
    }
    for certificate in [&root, &issuing] {
        let Some(names) = certificate.subject_alternative_name().map_err(|_| bad("its SubjectAltName"))? else { continue };
        let expected = domain.id();
        let fits = names.value.general_names.iter().all(|name| match name {
            x509_parser::extensions::GeneralName::URI(uri) => *uri == expected.as_str(),
            _ => false,
        });
        if !fits {
            return Err(bad("one of them names another trust domain"));
        }
    }
    Ok(())
}

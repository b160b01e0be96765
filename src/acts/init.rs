//! The beginning: keys in the token, authorities over them. Explicit, and resumed by calling it again.

use std::path::Path;

use crate::ledger::Ledger;
use crate::model::{KeyId, Reason, Refusal, TrustDomain, UnixTime};
use crate::proto::{self, AuthorityState, Purpose, TokenRole, entry::Body};

use super::certificate::Authority;
use super::certify::{certify_issuing, certify_root, request_issuing};
use super::keys::{Tokens, ensure, reconcile};
use super::outside::check_outside;
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
                check_outside(domain, &root, &issuing, (issuing_key.id(), issuing_key.public()), now)?;
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

//! An outside root: what it is asked to sign, and what it signed.

use std::sync::Arc;

use crate::authn::Operator;
use crate::ledger::{Generation, outside_id};
use crate::model::{KeyId, Reason, Refusal};
use crate::proto::{AuthorityState as State, AuthorityStepped, Purpose};

use super::Acts;
use super::certify::request_issuing;
use super::files;
use super::outside::check_outside;
use super::rotate::{Wish, step};

fn is_above(root: &Generation) -> bool {
    root.state == State::Active && root.is_outside()
}

impl Acts {
    /// What the outside root is to sign: the key it is of, PKCS#10 in DER. None while nothing is asked of it.
    #[must_use]
    pub fn request(&self) -> Option<(KeyId, Vec<u8>)> {
        let planned = self.awaiting_the_root()?.key_id;
        self.request.load_full().filter(|request| request.0 == planned).map(|request| (*request).clone())
    }

    /// The issuing authority whose certificate an outside root has yet to sign.
    pub(super) fn awaiting_the_root(&self) -> Option<Generation> {
        let (all, _) = self.ledger.generations();
        let outside = all.iter().any(is_above);
        let planned = |found: &Generation| found.purpose == Purpose::Issuing && found.state == State::Planned && !found.tainted;
        all.into_iter().find(|found| outside && planned(found))
    }

    /// The request, signed anew by each daemon, is there for as long as it is waited for.
    pub(super) async fn ask_the_root(&self, planned: &Generation) -> Result<(), Refusal> {
        let Some(key) = self.key_to_come(planned).await? else { return Ok(()) };
        let der = request_issuing(&self.ledger, &self.domain, &key, self.trusted_now()?).await?;
        self.request.store(Some(Arc::new((planned.key_id, der))));
        tracing::warn!(key = %planned.key_id, "the outside root's turn: sign issuing.csr, and give it back with `keyward ca adopt`");
        Ok(())
    }

    /// `issuing.csr` is what is asked now, and gone when it is answered. A crash before leaves one that the next daemon removes.
    pub(super) async fn keep_request_file(&self) {
        let asked = self.request();
        let told = asked.as_ref().map(|(key, _)| *key);
        if *self.request_told.lock().await == Some(told) {
            return;
        }
        let text = asked.map(|(_, der)| pem::encode(&pem::Pem::new("CERTIFICATE REQUEST", der)));
        let path = self.state.join("issuing.csr");
        let kept = files::blocking(move || files::keep(&path, text.as_ref().map(String::as_bytes))).await;
        *self.request_told.lock().await = kept.is_ok().then_some(told);
        self.behind.note(files::REQUEST, kept);
    }

    /// Takes what the outside root signed for the request; with a new root, that one as well. Gives the issuing authority's key.
    ///
    /// # Errors
    /// `NOT_FOUND` when nothing is waited for, `CERTIFICATE_UNFIT`, `ROTATION_UNDER_WAY` when yet another root is on its way.
    pub async fn adopt(&self, operator: &Operator, issuing: Vec<u8>, root: Vec<u8>, reason: &str) -> Result<KeyId, Refusal> {
        let _one = self.rotating.lock().await;
        let now = self.trusted_now()?;
        let (all, _) = self.ledger.generations();
        let nothing = || {
            let advice = match all.iter().any(is_above) {
                true => "no certificate is waited for; begin with `keyward ca rotate issuing`",
                false => "the root is inside the HSM and signs there: nothing is to be adopted",
            };
            Refusal::new(Reason::NotFound, advice)
        };
        let planned = self.awaiting_the_root().ok_or_else(nothing)?;
        let key = self.key_to_come(&planned).await?.ok_or_else(nothing)?;
        let known = |certificate: &[u8]| {
            all.iter().find(|found| found.purpose == Purpose::Root && found.is_trusted() && found.certificate == certificate)
        };
        let active =
            all.iter().find(|found| found.purpose == Purpose::Root && found.state == State::Active).ok_or_else(nothing)?;
        let root = if root.is_empty() { active.certificate.clone() } else { root };
        check_outside(&self.domain, &root, &issuing, (key.id(), key.public()), now)?;
        let by = || Wish { by: Some(operator.signs(reason)), now: planned.now, cause: "signed outside" };
        let issuer = match known(&root) {
            Some(found) if found.state == State::Retiring || found.tainted => {
                return Err(Refusal::new(Reason::CertificateUnfit, "this root is on its way out; have the newest one sign"));
            }
            Some(found) => found.key_id,
            None => {
                let id = outside_id(&root).ok_or_else(nothing)?;
                let body = AuthorityStepped {
                    purpose: Purpose::Root.into(),
                    key_id: id.0.to_vec(),
                    to: State::Prepublished.into(),
                    certificate: root,
                    ..step(&planned, &by())
                };
                self.record_step(body).await?;
                id
            }
        };
        // A crash before this leaves a root that is trusted without anything under it: the same call completes it.
        let body = AuthorityStepped {
            to: State::Prepublished.into(),
            certificate: issuing,
            issuer: issuer.0.to_vec(),
            ..step(&planned, &by())
        };
        self.record_step(body).await?;
        self.take_arrows().await?.of(&planned.key_id)?;
        Ok(planned.key_id)
    }
}

//! The story.

use std::sync::Arc;
use std::time::Duration;

use crate::attest::{self, Appraisal, Ask, Challenge, Contact, Rejected};
use crate::authn::Connection;
use crate::ledger::Decided;
use crate::model::{Csr, KeyId, Reason, Refusal, UnixTime};
use crate::policy::{self, Grant, Wish};
use crate::proto::{IntentKind, Purpose};

use super::Acts;
use super::certificate::{Issued, Prepared, assemble};

/// Longest wait of a repeated request for the outcome of the first.
const OUTCOME_DEADLINE: Duration = Duration::from_secs(2);
/// Longest wait for the authority that signs by now.
const SUPERSEDED_DEADLINE: Duration = Duration::from_secs(2);

impl Acts {
    /// First contact or rejoin: over a stream whose challenge the proof answers.
    ///
    /// # Errors
    /// The reason codes of every check below.
    pub async fn attest(&self, source: &Connection, challenge: &Challenge, ask: Ask) -> Result<Issued, Refusal> {
        let contact = Contact::Stream(challenge);
        match self.issue(IntentKind::Attest, &contact, &ask).await {
            Ok(issued) => Ok(issued),
            Err(rejected) => Err(self.record_refusal("Attest", source, rejected).await),
        }
    }

    /// The next certificate, over a connection that an agent's certificate opened.
    ///
    /// # Errors
    /// The reason codes of every check below; `UNAUTHENTICATED`, `AGENT_QUARANTINED`, `EPOCH_STALE` of the caller itself.
    pub async fn renew(&self, source: &Arc<Connection>, ask: Ask) -> Result<Issued, Refusal> {
        let renewed = async {
            let caller = source.claimant(&self.ledger).map_err(|refusal| Rejected { agent: source.named().cloned(), refusal })?;
            let issued = self.issue(IntentKind::Renew, &Contact::Connection(caller), &ask).await?;
            // Not for an answer given again: whoever repeats a request has shown no more than its bytes.
            if let Some(key) = issued.certified {
                caller.now_proves(key);
            }
            Ok::<_, Rejected>(issued)
        };
        match renewed.await {
            Ok(issued) => Ok(issued),
            Err(rejected) => Err(self.record_refusal("Renew", source, rejected).await),
        }
    }

    /// A signing request and its evidence become a certificate, or a refusal.
    async fn issue(&self, kind: IntentKind, contact: &Contact<'_>, ask: &Ask) -> Result<Issued, Rejected> {
        let now = self.trusted_now()?;
        // Whoever would wait too long for a signature hears so before anything is computed or recorded for them.
        // A place is taken later, by whom that is known of: strangers hold none.
        if let Err(error) = self.authorities()?.issuing().key().has_room() {
            let refusal = super::hsm_refusal(error);
            // What was answered is answered again without a signature; a look into memory tells, and proves nothing yet.
            let answered = ask.claimant(&self.ledger).and_then(|agent| self.ledger.answered(&agent, ask.hash())).is_some();
            // While the token is away, who comes without a certificate hears after its proof, and only then, what the book says of it.
            let unproved = matches!(contact, Contact::Stream(_)) && refusal.reason == Reason::HsmUnavailable;
            if !answered && !unproved {
                return Err(refusal.into());
            }
        }
        // Proof of possession inside; only the public key is taken.
        let csr = Csr::parse(ask.csr(), self.ledger.meter())?;
        // Names the identity; the evidence is bound to this key.
        let appraisal = attest::appraise(&self.ledger, &self.domain, contact, &csr, ask, now)?;
        self.issue_to(kind, &appraisal, &csr, ask, now)
            .await
            .map_err(|refusal| Rejected { agent: Some(appraisal.agent().clone()), refusal })
    }

    async fn issue_to(
        &self,
        kind: IntentKind,
        appraisal: &Appraisal,
        csr: &Csr,
        ask: &Ask,
        now: UnixTime,
    ) -> Result<Issued, Refusal> {
        // Memory; refuses unknown, quarantined, stale epoch.
        let standing = self.ledger.standing(appraisal.agent(), appraisal.epoch())?;
        // An answer that was lost is given again, whatever the limits say now.
        if let Some((intent, next_sequence)) = self.ledger.answered(appraisal.agent(), ask.hash()) {
            return self.repeat(appraisal, intent, next_sequence).await;
        }
        let wish = Wish { ttl_seconds: ask.ttl_seconds() };
        let grant = policy::decide(&standing, appraisal.fresh_until(), wish, self.limits.live_certificates_per_agent, now)?;
        let mut changes = self.changes.subscribe();
        loop {
            let issued = self.issue_granted(kind, appraisal, csr, ask, &grant).await;
            // Another authority became active meanwhile; nothing was recorded. It is about to be known here, too.
            let superseded = issued.as_ref().is_err_and(|refusal| refusal.reason == Reason::AuthoritySuperseded);
            if !superseded || !matches!(tokio::time::timeout(SUPERSEDED_DEADLINE, changes.changed()).await, Ok(Ok(()))) {
                return issued;
            }
        }
    }

    async fn issue_granted(
        &self,
        kind: IntentKind,
        appraisal: &Appraisal,
        csr: &Csr,
        ask: &Ask,
        grant: &Grant,
    ) -> Result<Issued, Refusal> {
        let authority = self.authorities()?.issuing();
        let grant = &grant.within(authority.not_after())?;
        let size = self.ledger.progress().borrow().size;
        // Everything but the signature.
        let prepared = self
            .ledger
            .meter()
            .certificate
            .measure(|| Prepared::new(grant, csr, appraisal, ask, kind, size, &self.domain, authority))?;
        // A place on the way to a signature, given back however this ends.
        let place = prepared.admit()?;
        // Decided in order and durable: token spent, sequence claimed. From here on the act runs to its end.
        match self.ledger.intend(prepared.intention()).await? {
            // Once, verified against the pinned key, then the gate: denied meanwhile → withheld.
            Decided::Intent(intent) => prepared.sign(intent).await?.release(),
            Decided::Repeat { intent, next_sequence } => {
                // Nothing is signed for it.
                drop(place);
                self.repeat(appraisal, intent, next_sequence).await
            }
        }
    }

    /// The stored answer, rebuilt from what was recorded. The gate was passed then; the standing has just been looked at.
    async fn repeat(&self, appraisal: &Appraisal, intent: u64, next_sequence: u64) -> Result<Issued, Refusal> {
        let mut progress = self.ledger.progress();
        let until = tokio::time::Instant::now() + OUTCOME_DEADLINE;
        let (tbs, signature, key) = loop {
            progress.mark_unchanged();
            let ledger = self.ledger.clone();
            let answer = tokio::task::spawn_blocking(move || ledger.answer(intent)).await.map_err(Refusal::internal)?;
            match answer {
                // Decided and not durable yet: the next commit has it.
                Err(refusal) if refusal.reason == Reason::RequestInProgress => {
                    if !matches!(tokio::time::timeout_at(until, progress.changed()).await, Ok(Ok(()))) {
                        return Err(refusal);
                    }
                }
                answered => break answered?,
            }
        };
        let leaf = assemble(&tbs, &signature);
        let not_after = {
            let (_, parsed) = x509_parser::parse_x509_certificate(&leaf).map_err(|error| Refusal::internal(error.to_string()))?;
            UnixTime::from_seconds(u64::try_from(parsed.validity().not_after.timestamp()).map_err(Refusal::internal)?)
        };
        // The denial may have come while the entries were read.
        self.ledger.admits(appraisal.agent(), appraisal.epoch())?;
        Ok(Issued {
            chain: vec![leaf, self.issuing_certificate(key).await?],
            spiffe_id: appraisal.agent().spiffe_id(&self.domain),
            epoch: appraisal.epoch(),
            next_sequence,
            ledger_index: intent,
            not_after,
            certified: None,
        })
    }

    /// Of the authority that signed, in force or not.
    async fn issuing_certificate(&self, key: KeyId) -> Result<Vec<u8>, Refusal> {
        let authorities = self.authorities()?;
        if let Some(found) = authorities.generations().iter().find(|found| found.key_id == key) {
            return Ok(found.certificate.clone());
        }
        let ledger = self.ledger.clone();
        let all = tokio::task::spawn_blocking(move || ledger.reader().generations(Purpose::Issuing)).await;
        let all = all.map_err(Refusal::internal)?.map_err(Refusal::internal)?;
        let found = all.into_iter().find(|found| found.key_id == key);
        found.map(|found| found.certificate).ok_or_else(|| Refusal::internal("a certificate of an unknown authority"))
    }

    /// A refusal of a known identity is an entry, one of a stranger a count.
    pub(super) async fn record_refusal(&self, method: &str, source: &Connection, rejected: Rejected) -> Refusal {
        match &rejected.agent {
            Some(agent) => {
                tracing::info!(method, %agent, source = %source.source(), refusal = ?rejected.refusal, "refused");
                self.ledger.refused(agent, method, rejected.refusal).await
            }
            None => {
                // Anyone can cause these, as often as they like: the ledger's count is what is told by default.
                tracing::debug!(method, source = %source.source(), refusal = ?rejected.refusal, "refused a stranger");
                self.ledger.refused_stranger(rejected.refusal.reason, Some(source.source()));
                rejected.refusal
            }
        }
    }
}

//! The intents of the ledger and how each ended (promises 2 and 4).

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap, HashSet};

use super::agent_keys::Signer;
use super::agents::{Agents, Candidate};
use super::keys::Keys;
use super::tbs::{self, Certificate, Crl, digest_within};
use super::{At, OPEN_INTENTS_MAX};
use crate::model::{Digest, KeyId, Serial, TrustDomain};
use crate::proto::{AuthorityActivated, AuthorityState, AuthorityStepped, Intended, IntentKind, Purpose, Released};

struct Open {
    kind: IntentKind,
    /// Of an agent's own signatures.
    signer: Option<Signer>,
    key: Option<KeyId>,
    /// Of an agent's certificate.
    candidate: Option<Candidate>,
    /// Kept only for the signature, or for what is put in force later.
    tbs: Vec<u8>,
}

#[derive(Clone, Copy, Default)]
pub(super) struct Counts {
    pub(super) intents: u64,
    pub(super) certificates: u64,
    pub(super) released: u64,
    pub(super) withheld: u64,
    pub(super) failed: u64,
    pub(super) unknown: u64,
}

pub(super) struct Intents {
    signatures: bool,
    counts: Counts,
    open: HashMap<u64, Open>,
    /// A bit for each entry: whether it is an intent.
    known: Vec<u64>,
    /// Of intents that have not expired, and when they do.
    serials: HashSet<Serial>,
    expiries: BinaryHeap<Reverse<(u64, Serial)>>,
    crl_number: Option<u64>,
    /// Released authority certificates: what was signed, for whom, by which key.
    authorities: HashMap<u64, (Purpose, Digest, Option<KeyId>)>,
}

fn is_agents(kind: IntentKind) -> bool {
    matches!(kind, IntentKind::Attest | IntentKind::Renew)
}

impl Intents {
    pub(super) fn new(signatures: bool) -> Self {
        Self {
            signatures,
            counts: Counts::default(),
            open: HashMap::new(),
            known: Vec::new(),
            serials: HashSet::new(),
            expiries: BinaryHeap::new(),
            crl_number: None,
            authorities: HashMap::new(),
        }
    }

    /// An intent whose key may sign such a thing, or may not (`right`). Until when an agent's certificate may be in force by it, in
    /// Unix seconds; 0: there is none.
    pub(super) fn intended(
        &mut self,
        intent: &Intended,
        right: bool,
        domain: Option<&TrustDomain>,
        agents: &mut Agents,
        at: &mut At<'_>,
    ) -> u64 {
        self.counts.intents += 1;
        let kind = intent.kind();
        if !right {
            at.violates("intent-key", format_args!("the key is not active, or not one that signs {}", kind.as_str_name()));
        }
        let mut leaf_until = 0;
        let mut candidate = is_agents(kind).then(|| candidate(intent, agents, at)).flatten();
        if kind == IntentKind::Crl {
            self.crl(intent, agents, at);
        } else if kind == IntentKind::Csr {
            if let Err(error) = tbs::is_request(&intent.tbs) {
                at.violates("intent-tbs", format_args!("{error}"));
            }
        } else if let Some((serial, not_after_seconds)) = self.certificate(intent, domain, at)
            && let Some(candidate) = &mut candidate
        {
            candidate.serial = Some(serial);
            candidate.not_after_seconds = not_after_seconds;
            leaf_until = not_after_seconds;
        }
        if self.open.len() >= OPEN_INTENTS_MAX {
            at.violates("intents-open", format_args!("{OPEN_INTENTS_MAX} others are open"));
        } else {
            let keep = self.signatures || matches!(kind, IntentKind::Root | IntentKind::Issuing);
            let tbs = if keep { intent.tbs.clone() } else { Vec::new() };
            let key = KeyId::from_slice(&intent.key_id);
            self.open.insert(at.index, Open { kind, signer: None, key, candidate, tbs });
        }
        self.remember(at.index);
        leaf_until
    }

    /// An intent to sign with an agent's key; what is wrong with it has been told.
    pub(super) fn sign_intended(&mut self, signer: Option<Signer>, at: &mut At<'_>) {
        self.counts.intents += 1;
        if self.open.len() >= OPEN_INTENTS_MAX {
            at.violates("intents-open", format_args!("{OPEN_INTENTS_MAX} others are open"));
        } else {
            let open = Open { kind: IntentKind::Unspecified, signer, key: None, candidate: None, tbs: Vec::new() };
            self.open.insert(at.index, open);
        }
        self.remember(at.index);
    }

    /// Checks a certificate's bytes; its serial and notAfter.
    fn certificate(&mut self, intent: &Intended, domain: Option<&TrustDomain>, at: &mut At<'_>) -> Option<(Serial, u64)> {
        let certificate = match Certificate::parse(&intent.tbs) {
            Ok(certificate) => certificate,
            Err(error) => {
                at.violates("intent-tbs", format_args!("{error}"));
                return None;
            }
        };
        let kind = intent.kind();
        let authority = matches!(kind, IntentKind::Root | IntentKind::Issuing);
        if certificate.end_entity == authority {
            at.violates("intent-tbs", format_args!("an authority's certificate for another, or the reverse"));
        }
        if domain.is_some_and(|domain| !names(certificate.uri, intent, domain)) {
            at.violates("intent-identity", format_args!("{:.80} is not the identity of the intent", certificate.uri));
        }
        let fresh_until = intent.appraised.as_ref().map_or(0, |appraised| appraised.fresh_until_unix_seconds);
        if is_agents(kind) && certificate.not_after_seconds > fresh_until {
            let detail = format_args!("valid until {}, appraised until {fresh_until}", certificate.not_after_seconds);
            at.violates("intent-freshness", detail);
        }
        let now = at.time.seconds();
        while self.expiries.peek().is_some_and(|Reverse((expiry, _))| *expiry < now) {
            if let Some(Reverse((_, serial))) = self.expiries.pop() {
                self.serials.remove(&serial);
            }
        }
        if self.serials.insert(certificate.serial) {
            self.expiries.push(Reverse((certificate.not_after_seconds, certificate.serial)));
        } else {
            at.violates("serial", format_args!("{} is the serial of another certificate", certificate.serial));
        }
        Some((certificate.serial, certificate.not_after_seconds))
    }

    fn crl(&mut self, intent: &Intended, agents: &mut Agents, at: &mut At<'_>) {
        match Crl::parse(&intent.tbs) {
            Ok(crl) => {
                if Some(crl.number) <= self.crl_number || crl.number > at.index {
                    at.violates("crl-number", format_args!("number {} after {:?}", crl.number, self.crl_number));
                }
                self.crl_number = self.crl_number.max(Some(crl.number));
                agents.crl(crl.number, &crl.serials, at.time, at);
            }
            Err(error) => at.violates("intent-tbs", format_args!("{error}")),
        }
    }

    /// An intent was released. Gives whose signatures they are, where they are an agent's own.
    pub(super) fn released(
        &mut self,
        released: &Released,
        started: u64,
        keys: &Keys,
        agents: &mut Agents,
        at: &mut At<'_>,
    ) -> Option<Signer> {
        self.counts.released += 1;
        let open = self.close(released.intent, at)?;
        if released.intent < started {
            at.violates("outcome-restart", format_args!("intent {} is from before the start at {started}", released.intent));
        }
        if open.kind == IntentKind::Unspecified && open.key.is_none() {
            return open.signer;
        }
        self.counts.certificates += u64::from(!matches!(open.kind, IntentKind::Crl | IntentKind::Csr));
        if let Some(candidate) = &open.candidate {
            agents.released(candidate, at);
        }
        let signed = || open.key.is_some_and(|key| keys.verifies(&key, &open.tbs, &released.signature));
        if self.signatures && !signed() {
            at.violates("signature", format_args!("not the key's signature over intent {}", released.intent));
        }
        let purpose = match open.kind {
            IntentKind::Root => Purpose::Root,
            IntentKind::Issuing => Purpose::Issuing,
            _ => return None,
        };
        self.authorities.insert(released.intent, (purpose, Digest::of(&open.tbs), open.key));
        None
    }

    pub(super) fn withheld(&mut self, intent: u64, at: &mut At<'_>) {
        self.counts.withheld += 1;
        self.close(intent, at);
    }

    pub(super) fn failed(&mut self, intent: u64, at: &mut At<'_>) {
        self.counts.failed += 1;
        self.close(intent, at);
    }

    /// The certificate may exist: it counts as live from now on.
    pub(super) fn unknown(&mut self, intent: u64, agents: &mut Agents, at: &mut At<'_>) {
        self.counts.unknown += 1;
        if let Some(candidate) = self.close(intent, at).and_then(|open| open.candidate) {
            agents.unknown(&candidate, at);
        }
    }

    fn close(&mut self, intent: u64, at: &mut At<'_>) -> Option<Open> {
        let open = self.open.remove(&intent);
        if open.is_none() {
            if self.is_known(intent) {
                at.violates("outcome-twice", format_args!("intent {intent} has ended before"));
            } else {
                at.violates("outcome-intent", format_args!("entry {intent} is no intent"));
            }
        }
        open
    }

    pub(super) fn authority(&self, activated: &AuthorityActivated, keys: &Keys, at: &mut At<'_>) {
        let purpose = activated.purpose();
        if !activated.key_id.is_empty() && !is_there(keys, &activated.key_id, purpose) {
            at.violates("authority", format_args!("its key is not active, or not one of a {}", purpose.as_str_name()));
        }
        self.authority_certificate(purpose, &activated.certificate, activated.intent, at);
    }

    /// What is trusted from now on has a key of ours, or a certificate from outside.
    pub(super) fn authority_stepped(&self, step: &AuthorityStepped, keys: &Keys, at: &mut At<'_>) {
        if step.to() != AuthorityState::Prepublished {
            return;
        }
        let (purpose, outside) = (step.purpose(), step.certificate.ends_with(&step.key_id));
        let from_outside = outside && purpose == Purpose::Root;
        if !from_outside && !is_there(keys, &step.key_id, purpose) {
            at.violates("authority", format_args!("its key is not active, or not one of a {}", purpose.as_str_name()));
        }
        self.authority_certificate(purpose, &step.certificate, step.intent, at);
    }

    fn authority_certificate(&self, purpose: Purpose, certificate: &[u8], intent: u64, at: &mut At<'_>) {
        // 0 is the genesis: signed outside.
        if intent != 0 {
            let signed = digest_within(certificate).map(|digest| (purpose, digest));
            let released = self.authorities.get(&intent).map(|(purpose, digest, _)| (*purpose, *digest));
            if signed.is_none() || signed != released {
                at.violates("authority", format_args!("not the certificate that intent {intent} released"));
            }
        }
    }

    /// Whose key signed the authority's certificate of this intent.
    pub(super) fn signer_of_authority(&self, intent: u64) -> Option<KeyId> {
        self.authorities.get(&intent).and_then(|(_, _, signer)| *signer)
    }

    pub(super) fn counts(&self) -> Counts {
        self.counts
    }

    /// Those without an outcome, in order.
    pub(super) fn open(&self) -> Vec<u64> {
        let mut open: Vec<u64> = self.open.keys().copied().collect();
        open.sort_unstable();
        open
    }

    fn remember(&mut self, index: u64) {
        let word = usize::try_from(index / 64).unwrap_or(usize::MAX);
        if self.known.len() <= word {
            self.known.resize(word + 1, 0);
        }
        self.known[word] |= 1 << (index % 64);
    }

    fn is_known(&self, index: u64) -> bool {
        let word = usize::try_from(index / 64).ok().and_then(|word| self.known.get(word));
        word.is_some_and(|word| word >> (index % 64) & 1 == 1)
    }
}

fn is_there(keys: &Keys, id: &[u8], purpose: Purpose) -> bool {
    if purpose == Purpose::Wrapping { keys.wraps(id) } else { keys.is_active(id, purpose) }
}

fn candidate(intent: &Intended, agents: &Agents, at: &mut At<'_>) -> Option<Candidate> {
    let Some(slot) = agents.find(&intent.agent) else {
        at.violates("intent-agent", format_args!("{:.80} is not enrolled", intent.agent));
        return None;
    };
    if intent.epoch > agents.epoch(slot) {
        at.violates("intent-epoch", format_args!("{} is in epoch {}, not {}", intent.agent, agents.epoch(slot), intent.epoch));
    }
    Some(Candidate { slot, epoch: intent.epoch, sequence: intent.sequence, serial: None, not_after_seconds: 0 })
}

/// Whether `uri` is the SPIFFE ID that a certificate of this intent has (design §5).
fn names(uri: &str, intent: &Intended, domain: &TrustDomain) -> bool {
    let Some(path) = uri.strip_prefix("spiffe://").and_then(|rest| rest.strip_prefix(domain.as_str())) else {
        return false;
    };
    match intent.kind() {
        IntentKind::Attest | IntentKind::Renew => path.strip_prefix("/agent/") == Some(intent.agent.as_str()),
        IntentKind::Server => path == "/keyward/server",
        IntentKind::Root | IntentKind::Issuing => path.is_empty(),
        IntentKind::Crl | IntentKind::Csr | IntentKind::Unspecified => false,
    }
}

//! A right ledger of real certificates, made entry by entry, for the tests to break.

use std::collections::HashMap;
use std::convert::Infallible;

use prost::Message as _;
use rcgen::{
    BasicConstraints, CertificateParams, CertificateRevocationListParams, CustomExtension, IsCa, Issuer, KeyIdMethod, KeyPair,
    KeyUsagePurpose, PublicKeyData as _, RevokedCertParams, SanType, SerialNumber,
};
use time::OffsetDateTime;
use x509_parser::prelude::FromDer as _;

use super::*;
use crate::model::Serial;
use crate::proto::{self, IntentKind, KeyAlgorithm, Purpose};

pub(super) const ROOT: [u8; 16] = [1; 16];
pub(super) const ISSUING: [u8; 16] = [2; 16];
pub(super) const AGENT: &str = "builder/7";
const START_SECONDS: u64 = 1_800_000_000;

/// A ledger in the making.
pub(super) struct Book {
    pub(super) entries: Vec<Vec<u8>>,
    pub(super) time: UnixTime,
    root: Issuer<'static, KeyPair>,
    issuing: Issuer<'static, KeyPair>,
    ledger_keys: HashMap<[u8; 16], KeyPair>,
    pub(super) signatures: HashMap<u64, Vec<u8>>,
    pub(super) serials: HashMap<u64, Serial>,
}

fn authority(key: KeyPair) -> Issuer<'static, KeyPair> {
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    Issuer::new(params, key)
}

fn at_seconds(seconds: u64) -> OffsetDateTime {
    OffsetDateTime::from_unix_timestamp(i64::try_from(seconds).unwrap()).unwrap()
}

/// What an agent's certificate is to say.
pub(super) struct Ask {
    pub(super) agent: &'static str,
    pub(super) uri: String,
    pub(super) epoch: u32,
    pub(super) sequence: u64,
    pub(super) serial: Serial,
    pub(super) ttl_seconds: u64,
    pub(super) fresh_seconds: u64,
    pub(super) key: [u8; 16],
    pub(super) authority: bool,
}

impl Ask {
    pub(super) fn new(epoch: u32, sequence: u64) -> Self {
        Self::of(AGENT, epoch, sequence)
    }

    pub(super) fn of(agent: &'static str, epoch: u32, sequence: u64) -> Self {
        Self {
            agent,
            uri: format!("spiffe://example.org/agent/{agent}"),
            epoch,
            sequence,
            serial: Serial::random(),
            ttl_seconds: 600,
            fresh_seconds: 86_400,
            key: ISSUING,
            authority: false,
        }
    }
}

impl Book {
    /// Genesis, two active keys in force as root and issuing authority, one enrolled agent.
    pub(super) fn new() -> Self {
        let mut book = Self::empty();
        book.genesis();
        book.key(ROOT, Purpose::Root);
        book.key(ISSUING, Purpose::Issuing);
        book.in_force(ROOT, Purpose::Root);
        book.in_force(ISSUING, Purpose::Issuing);
        book.enrol(AGENT);
        book
    }

    /// What `init` says of an authority from outside.
    pub(super) fn in_force(&mut self, id: [u8; 16], purpose: Purpose) {
        let authority = proto::AuthorityActivated { purpose: purpose.into(), key_id: id.to_vec(), ..Default::default() };
        self.add(Body::AuthorityActivated(authority));
    }

    pub(super) fn empty() -> Self {
        Self {
            entries: Vec::new(),
            time: UnixTime::from_seconds(START_SECONDS),
            root: authority(KeyPair::generate().unwrap()),
            issuing: authority(KeyPair::generate().unwrap()),
            ledger_keys: HashMap::new(),
            signatures: HashMap::new(),
            serials: HashMap::new(),
        }
    }

    pub(super) fn add(&mut self, body: Body) -> u64 {
        let index = self.size();
        self.time.0 += 1000;
        self.raw(&Entry { index, time_unix_micros: self.time.micros(), body: Some(body) })
    }

    pub(super) fn raw(&mut self, entry: &Entry) -> u64 {
        self.entries.push(entry.encode_to_vec());
        self.size() - 1
    }

    pub(super) fn size(&self) -> u64 {
        u64::try_from(self.entries.len()).unwrap()
    }

    pub(super) fn genesis(&mut self) -> u64 {
        self.add(Body::Genesis(Genesis { trust_domain: "example.org".into(), deployment: vec![7; 16], schema: 1 }))
    }

    pub(super) fn key(&mut self, id: [u8; 16], purpose: Purpose) {
        self.key_intended(id, purpose);
        self.key_activated(id);
    }

    pub(super) fn key_intended(&mut self, id: [u8; 16], purpose: Purpose) {
        self.add(Body::KeyIntended(proto::KeyIntended {
            key_id: id.to_vec(),
            purpose: purpose.into(),
            algorithm: KeyAlgorithm::P256.into(),
            token: proto::TokenRole::Authority.into(),
        }));
    }

    pub(super) fn key_activated(&mut self, id: [u8; 16]) {
        let spki = self.key_pair(id).subject_public_key_info();
        self.add(Body::KeyActivated(proto::KeyActivated { key_id: id.to_vec(), spki }));
    }

    /// A key that signs checkpoints.
    pub(super) fn ledger_key(&mut self, id: [u8; 16]) {
        self.ledger_keys.insert(id, KeyPair::generate().unwrap());
        self.key(id, Purpose::Ledger);
    }

    /// The tree as it is now, as these ledger keys say.
    pub(super) fn note(&self, signers: &[[u8; 16]]) -> String {
        let checkpoint = self.checkpoint();
        let sign = |id: &[u8; 16]| {
            let key = &self.ledger_keys[id];
            let public = PublicKey::from_spki(&key.subject_public_key_info()).unwrap();
            (public, rcgen::SigningKey::sign(key, checkpoint.body().as_bytes()).unwrap())
        };
        let signed: Vec<_> = signers.iter().map(sign).collect();
        let lines: Vec<_> = signed.iter().map(|(public, signature)| (public, signature.clone())).collect();
        checkpoint.signed(&checkpoint.origin, &lines)
    }

    pub(super) fn enrol(&mut self, agent: &str) -> u64 {
        self.add(Body::Enrolled(proto::Enrolled { agent: agent.into(), epoch: 1, ..Default::default() }))
    }

    pub(super) fn certificate(&self, ask: &Ask) -> Vec<u8> {
        let mut params = CertificateParams::default();
        params.serial_number = Some(SerialNumber::from_slice(&ask.serial.0));
        params.not_before = at_seconds(self.time.seconds() - 30);
        params.not_after = at_seconds(self.time.seconds() + ask.ttl_seconds);
        params.subject_alt_names = vec![SanType::URI(ask.uri.as_str().try_into().unwrap())];
        if ask.authority {
            params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        } else {
            let mut end_entity = CustomExtension::from_oid_content(&[2, 5, 29, 19], vec![0x30, 0]);
            end_entity.set_criticality(true);
            params.custom_extensions = vec![end_entity];
        }
        let issuer = if ask.key == ROOT { &self.root } else { &self.issuing };
        params.signed_by(self.issuing.key(), issuer).unwrap().der().to_vec()
    }

    pub(super) fn intend_kind(&mut self, kind: IntentKind, ask: &Ask) -> u64 {
        let der = self.certificate(ask);
        let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(&der).unwrap();
        let index = self.add(Body::Intended(proto::Intended {
            kind: kind.into(),
            key_id: ask.key.to_vec(),
            tbs: parsed.tbs_certificate.as_ref().to_vec(),
            agent: ask.agent.into(),
            epoch: ask.epoch,
            sequence: ask.sequence,
            appraised: Some(proto::Appraised {
                fresh_until_unix_seconds: self.time.seconds() + ask.fresh_seconds,
                ..Default::default()
            }),
            ..Default::default()
        }));
        self.signatures.insert(index, parsed.signature_value.data.to_vec());
        self.serials.insert(index, ask.serial);
        index
    }

    /// An authority's certificate for the key `of`, by the key `by`, released: DER, and its intent.
    pub(super) fn certify(&mut self, of: [u8; 16], by: [u8; 16]) -> (Vec<u8>, u64) {
        let mut params = CertificateParams::default();
        params.serial_number = Some(SerialNumber::from_slice(&Serial::random().0));
        params.not_before = at_seconds(self.time.seconds() - 30);
        params.not_after = at_seconds(self.time.seconds() + 86_400);
        params.subject_alt_names = vec![SanType::URI("spiffe://example.org".try_into().unwrap())];
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(1));
        let (key, issuer) = (self.key_pair(of), if by == ROOT { &self.root } else { &self.issuing });
        let der = params.signed_by(key, issuer).unwrap().der().to_vec();
        let (_, parsed) = x509_parser::certificate::X509Certificate::from_der(&der).unwrap();
        let (tbs, signature) = (parsed.tbs_certificate.as_ref().to_vec(), parsed.signature_value.data.to_vec());
        let kind = if of == by { IntentKind::Root } else { IntentKind::Issuing };
        let index =
            self.add(Body::Intended(proto::Intended { kind: kind.into(), key_id: by.to_vec(), tbs, ..Default::default() }));
        self.add(Body::Released(proto::Released { intent: index, signature }));
        (der, index)
    }

    /// That of the first root; all others have one.
    pub(super) fn key_pair(&self, id: [u8; 16]) -> &KeyPair {
        self.ledger_keys.get(&id).unwrap_or(if id == ROOT { self.root.key() } else { self.issuing.key() })
    }

    pub(super) fn intend(&mut self, ask: &Ask) -> u64 {
        self.intend_kind(if ask.sequence == 0 { IntentKind::Attest } else { IntentKind::Renew }, ask)
    }

    pub(super) fn release(&mut self, intent: u64) -> u64 {
        let signature = self.signatures.get(&intent).cloned().unwrap_or_default();
        self.add(Body::Released(proto::Released { intent, signature }))
    }

    pub(super) fn issue(&mut self, ask: &Ask) -> u64 {
        let intent = self.intend(ask);
        self.release(intent);
        intent
    }

    pub(super) fn withhold(&mut self, intent: u64) {
        self.add(Body::Withheld(proto::Withheld { intent, reason: proto::Reason::DeniedMeanwhile.into() }));
    }

    pub(super) fn unknown(&mut self, intent: u64) {
        self.add(Body::Unknown(proto::Unknown { intent, cause: "timeout".into() }));
    }

    pub(super) fn quarantine(&mut self, agent: &str, epoch: u32) {
        self.add(Body::Quarantined(proto::Quarantined { agent: agent.into(), epoch, ..Default::default() }));
    }

    pub(super) fn reinstate(&mut self, agent: &str, epoch: u32) {
        self.add(Body::Reinstated(proto::Reinstated { agent: agent.into(), epoch, ..Default::default() }));
    }

    pub(super) fn start(&mut self) {
        self.add(Body::Started(proto::Started::default()));
    }

    /// A CRL that lists the certificates of `intents`.
    pub(super) fn crl(&mut self, number: u64, intents: &[u64]) {
        let now = at_seconds(self.time.seconds());
        let revoked = |intent| RevokedCertParams {
            serial_number: SerialNumber::from_slice(&self.serials[intent].0),
            revocation_time: now,
            reason_code: None,
            invalidity_date: None,
        };
        let params = CertificateRevocationListParams {
            this_update: now,
            next_update: now + time::Duration::hours(1),
            crl_number: SerialNumber::from(number),
            issuing_distribution_point: None,
            revoked_certs: intents.iter().map(revoked).collect(),
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let crl = params.signed_by(&self.issuing).unwrap();
        let (_, parsed) = x509_parser::revocation_list::CertificateRevocationList::from_der(crl.der()).unwrap();
        let index = self.add(Body::Intended(proto::Intended {
            kind: IntentKind::Crl.into(),
            key_id: ISSUING.to_vec(),
            tbs: parsed.tbs_cert_list.as_ref().to_vec(),
            ..Default::default()
        }));
        self.signatures.insert(index, parsed.signature_value.data.to_vec());
        self.release(index);
    }

    pub(super) fn checkpoint(&self) -> Checkpoint {
        let mut tree = Tree::new();
        for entry in &self.entries {
            tree.push(leaf_hash(entry), &mut Vec::new());
        }
        Checkpoint { origin: "example.org/ledger".into(), size: tree.size(), root: tree.root() }
    }

    pub(super) fn report(&self, checkpoints: &[Checkpoint]) -> Report {
        verify(self.entries.iter().map(Ok::<_, Infallible>), checkpoints.iter().cloned(), true).unwrap()
    }

    /// The rules found broken.
    pub(super) fn broken(&self) -> Vec<&'static str> {
        self.report(&[self.checkpoint()]).violations.iter().map(|violation| violation.rule).collect()
    }
}

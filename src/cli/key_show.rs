//! Keys and signatures, as they are printed.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::Serialize;

use super::Failure;
use super::describe::algorithm_name;
use super::describe_keys::{accounting_name, purpose_name, storage_name};
use super::render::{brief, pairs, table, time};
use crate::model::{UnixTime, hex};
use crate::proto::{self, KeyAccounting, KeyAlgorithm, KeyState, signature::Form};

#[derive(Serialize)]
pub(super) struct KeyShown {
    agent: String,
    epoch: u32,
    pub(super) name: String,
    purpose: &'static str,
    algorithm: &'static str,
    storage_asked: &'static str,
    storage: &'static str,
    accounting: &'static str,
    signatures_max: Option<u64>,
    /// That count against the budget: of a recorded key without one the ledger alone tells them.
    signatures: Option<u64>,
    state: &'static str,
    ttl_seconds: u32,
    versions: Vec<Version>,
}

#[derive(Serialize)]
struct Version {
    number: u32,
    kid: String,
    spki: String,
    storage: &'static str,
    expires: String,
}

impl KeyShown {
    pub(super) fn of(key: proto::Key) -> Self {
        let version = |version: &proto::KeyVersion| Version {
            number: version.number,
            kid: version.kid.clone(),
            spki: hex(&version.spki),
            storage: storage_name(version.storage()),
            expires: time(version.expires_unix_seconds),
        };
        Self {
            purpose: purpose_name(key.purpose()),
            algorithm: signs_with(key.algorithm()),
            storage_asked: storage_name(key.storage_asked()),
            storage: key.versions.first().map_or("-", |newest| storage_name(newest.storage())),
            accounting: accounting_name(key.accounting()),
            signatures_max: (key.signatures_max > 0).then_some(key.signatures_max),
            signatures: (key.signatures_max > 0 || key.accounting() == KeyAccounting::Counted).then_some(key.signatures),
            state: standing(&key),
            ttl_seconds: key.ttl_seconds,
            versions: key.versions.iter().map(version).collect(),
            agent: key.agent,
            epoch: key.epoch,
            name: key.name,
        }
    }

    pub(super) fn text(&self) -> String {
        let newest = self.versions.first();
        let budget = match (self.signatures_max, self.signatures) {
            (Some(max), made) => format!("{} of {max}", made.unwrap_or_default()),
            (None, Some(made)) => format!("none ({made} counted or reserved)"),
            (None, None) => "none".to_owned(),
        };
        let storage = if self.storage_asked == "default" || self.storage_asked == self.storage {
            self.storage.to_owned()
        } else {
            format!("{} ({} was asked for)", self.storage, self.storage_asked)
        };
        pairs(&[
            ("agent", self.agent.clone()),
            ("name", self.name.clone()),
            ("purpose", self.purpose.into()),
            ("algorithm", self.algorithm.into()),
            ("storage", storage),
            ("signatures", self.accounting.into()),
            ("budget", budget),
            ("state", self.state.into()),
            ("version", newest.map_or("-".into(), |newest| newest.number.to_string())),
            ("kid", newest.map_or("-".into(), |newest| newest.kid.clone())),
            ("expires", newest.map_or("-".into(), |newest| newest.expires.clone())),
        ])
    }

    /// With what still verifies beside the newest, where there is any.
    pub(super) fn text_with_versions(&self) -> String {
        if self.versions.len() < 2 {
            return self.text();
        }
        let row = |one: &Version| vec![one.number.to_string(), one.kid.clone(), one.expires.clone()];
        let versions = table(&["VERSION", "KID", "EXPIRES"], &self.versions.iter().map(row).collect::<Vec<_>>());
        format!("{}\n{versions}", self.text())
    }
}

/// SubjectPublicKeyInfo, in lines.
pub(super) fn public_key_pem(spki: &[u8]) -> String {
    let lf = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new("PUBLIC KEY", spki), lf)
}

/// By the names that `--algorithm` has.
fn signs_with(algorithm: KeyAlgorithm) -> &'static str {
    match algorithm {
        KeyAlgorithm::P256 => "es256",
        KeyAlgorithm::P384 => "es384",
        KeyAlgorithm::Ed25519 => "eddsa",
        other => algorithm_name(other),
    }
}

/// Whether it signs, and if not, why.
fn standing(key: &proto::Key) -> &'static str {
    let expired = key.versions.first().is_some_and(|newest| newest.expires_unix_seconds <= UnixTime::wall().seconds());
    match key.state() {
        _ if key.denied => "denied",
        KeyState::Active if expired => "expired",
        state => state_name(state),
    }
}

fn state_name(state: KeyState) -> &'static str {
    match state {
        KeyState::Unspecified => "unknown",
        KeyState::Active => "active",
        KeyState::Disabled => "disabled",
        KeyState::Destroyed => "destroyed",
    }
}

pub(super) fn keys_table(keys: &[KeyShown]) -> String {
    let now = UnixTime::wall();
    let row = |key: &KeyShown| {
        let newest = key.versions.first();
        vec![
            key.name.clone(),
            key.purpose.into(),
            key.algorithm.into(),
            key.storage.into(),
            key.state.into(),
            newest.map_or("-".into(), |newest| newest.number.to_string()),
            newest.map_or("-".into(), |newest| brief(&newest.expires, now)),
        ]
    };
    table(&["NAME", "PURPOSE", "ALG", "STORAGE", "STATE", "V", "EXPIRES"], &keys.iter().map(row).collect::<Vec<_>>())
}

/// A key that signs no more.
#[derive(Serialize)]
pub(super) struct Ended<'a> {
    name: &'a str,
    state: &'a str,
    already: bool,
    ledger_index: Option<u64>,
}

impl<'a> Ended<'a> {
    /// Without an entry it was so before.
    pub(super) fn of(name: &'a str, state: &'a str, ledger_index: u64) -> Self {
        Self { name, state, already: ledger_index == 0, ledger_index: (ledger_index != 0).then_some(ledger_index) }
    }

    pub(super) fn text(&self) -> String {
        match self.ledger_index {
            Some(index) => format!("{} is {}, ledger entry {index}\n", self.name, self.state),
            None => format!("{} was {} before\n", self.name, self.state),
        }
    }
}

/// The result alone is what a program wants; the rest is in the JSON.
#[derive(Serialize)]
pub(super) struct Signed {
    #[serde(skip_serializing_if = "Option::is_none")]
    signature: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    jws: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    dpop: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    signature_input: Option<String>,
    kid: String,
    ledger_index: u64,
}

impl Signed {
    pub(super) fn of(answer: proto::SignResponse) -> Result<Self, Failure> {
        let (kid, ledger_index) = (answer.kid, answer.ledger_index);
        let mut signed = Self { signature: None, jws: None, dpop: None, signature_input: None, kid, ledger_index };
        match answer.signature.and_then(|signature| signature.form) {
            Some(Form::Der(der)) => signed.signature = Some(STANDARD.encode(der)),
            Some(Form::Jws(token)) => signed.jws = Some(token),
            Some(Form::Dpop(proof)) => signed.dpop = Some(proof),
            Some(Form::Http(fields)) => {
                (signed.signature_input, signed.signature) = (Some(fields.signature_input), Some(fields.signature));
            }
            None => return Err(Failure::error("the daemon answered without a signature")),
        }
        Ok(signed)
    }

    pub(super) fn text(&self) -> String {
        match (&self.signature_input, &self.signature) {
            (Some(input), Some(signature)) => format!("Signature-Input: {input}\nSignature: {signature}\n"),
            (_, signature) => {
                let one = signature.as_ref().or(self.jws.as_ref()).or(self.dpop.as_ref());
                one.map(|one| format!("{one}\n")).unwrap_or_default()
            }
        }
    }
}

#[derive(Serialize)]
pub(super) struct Verified {
    agent: String,
    key: String,
    kid: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload_base64: Option<String>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    covered: Vec<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    jti: Option<String>,
}

impl Verified {
    pub(super) fn of(answer: proto::VerifyResponse) -> Self {
        // A payload that is no text would not survive as such.
        let (payload, payload_base64) = match String::from_utf8(answer.payload) {
            Ok(text) => ((!text.is_empty()).then_some(text), None),
            Err(bytes) => (None, Some(STANDARD.encode(bytes.as_bytes()))),
        };
        Self {
            agent: answer.agent,
            key: answer.key,
            kid: answer.kid,
            payload,
            payload_base64,
            covered: answer.covered,
            jti: (!answer.jti.is_empty()).then_some(answer.jti),
        }
    }

    pub(super) fn text(&self) -> String {
        let mut lines = vec![("signed by", self.agent.clone()), ("key", self.key.clone()), ("kid", self.kid.clone())];
        if let Some(payload) = &self.payload {
            lines.push(("payload", payload.trim_end().to_owned()));
        }
        if let Some(payload) = &self.payload_base64 {
            lines.push(("payload in base64", payload.clone()));
        }
        if !self.covered.is_empty() {
            lines.push(("covered", self.covered.join(" ")));
        }
        if let Some(jti) = &self.jti {
            lines.push(("jti", jti.clone()));
        }
        pairs(&lines)
    }
}

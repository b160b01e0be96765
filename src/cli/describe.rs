//! Ledger entries in words: one name for the kind, named fields for the rest.

use serde::Serialize;
use serde_json::{Value, json};

use super::describe_keys;
use super::render::{pairs, time};
use crate::model::{UnixTime, hex};
use crate::proto::entry::Body;
use crate::proto::{
    self, AuthorityState, Entry, EvidenceKind, IntentKind, KeyAlgorithm, Operator, Purpose, QuarantineCause, TokenRole,
};

/// The fields that tell one entry from the next; a line too short for all of them shows these.
const FIRST: [&str; 11] = ["agent", "purpose", "to", "reason", "cause", "by", "method", "detail", "token", "sequence", "epoch"];
/// Bytes in hexadecimal, this long or longer, are for programs.
const HEX_CHARS_LONG: usize = 32;
/// What a person compares of them.
const HEX_CHARS_SHOWN: usize = 8;

/// An entry as JSON has it.
#[derive(Serialize)]
pub(super) struct Described {
    pub(super) index: u64,
    pub(super) time: String,
    pub(super) kind: &'static str,
    #[serde(flatten)]
    fields: serde_json::Map<String, Value>,
}

impl Described {
    pub(super) fn of(entry: &Entry) -> Self {
        let (kind, fields) = entry.body.as_ref().map_or(("unknown_kind", Value::Null), body);
        let fields = match fields {
            Value::Object(fields) => fields,
            _ => serde_json::Map::new(),
        };
        Self { index: entry.index, time: UnixTime(entry.time_unix_micros).to_string(), kind, fields }
    }

    /// The fields in one line, the telling ones first: what does not fit is cut at the end. Hashes and objects are left out,
    /// key ids are shortened.
    pub(super) fn summary(&self) -> String {
        let mut short: Vec<_> = self.fields.iter().filter(|(name, value)| !is_empty(value) && !is_noise(name, value)).collect();
        short.sort_by_key(|(name, _)| FIRST.iter().position(|first| first == name).unwrap_or(FIRST.len()));
        short.into_iter().map(|(name, value)| format!("{name}={}", shortened(value))).collect::<Vec<_>>().join(" ")
    }

    /// All of it, one field a line.
    pub(super) fn text(&self) -> String {
        let mut lines = vec![("index", self.index.to_string()), ("time", self.time.clone()), ("kind", self.kind.to_owned())];
        let fields: Vec<_> = self.fields.iter().flat_map(|(name, value)| flat(name, value)).collect();
        lines.extend(fields.iter().map(|(name, value)| (name.as_str(), value.clone())));
        pairs(&lines)
    }
}

fn is_empty(value: &Value) -> bool {
    value.is_null() || value == "" || value == &json!([])
}

/// Objects, notes of several lines, and bytes that a person cannot tell apart and has no use for. Exceptions are who has acted, and a
/// key's id.
fn is_noise(name: &str, value: &Value) -> bool {
    (value.is_object() && name != "by")
        || value.as_str().is_some_and(|text| text.contains('\n'))
        || (hexadecimal(value).is_some() && name != "key_id")
}

fn hexadecimal(value: &Value) -> Option<&str> {
    value.as_str().filter(|text| text.len() >= HEX_CHARS_LONG && text.bytes().all(|byte| byte.is_ascii_hexdigit()))
}

fn shortened(value: &Value) -> String {
    match (hexadecimal(value), value) {
        (Some(hex), _) => format!("{}…", &hex[..HEX_CHARS_SHOWN]),
        (None, Value::Array(items)) => items.iter().map(shortened).collect::<Vec<_>>().join(", "),
        (None, Value::Object(by)) if by.contains_key("uid") => match plain(&by["reason"]) {
            nothing if nothing == "-" => format!("uid {}", by["uid"]),
            reason => format!("uid {}: {reason}", by["uid"]),
        },
        (None, Value::Object(fields)) => fields.values().map(plain).collect::<Vec<_>>().join(" "),
        (None, value) => plain(value),
    }
}

/// A field as lines of text: an object's fields have a line each.
fn flat(name: &str, value: &Value) -> Vec<(String, String)> {
    match value {
        Value::Object(fields) => fields.iter().map(|(field, value)| (format!("{name}.{field}"), plain(value))).collect(),
        value => vec![(name.to_owned(), plain(value))],
    }
}

fn plain(value: &Value) -> String {
    match value {
        Value::String(text) if text.is_empty() => "-".into(),
        Value::String(text) => text.clone(),
        Value::Null => "-".into(),
        other => other.to_string(),
    }
}

fn body(body: &Body) -> (&'static str, Value) {
    match body {
        Body::Genesis(e) => {
            ("genesis", json!({"trust_domain": e.trust_domain, "deployment": hex(&e.deployment), "schema": e.schema}))
        }
        Body::Started(e) => ("started", json!({"version": e.version, "config_hash": hex(&e.config_hash)})),
        Body::Stopped(e) => ("stopped", json!({"cause": e.cause})),
        Body::ClockAccepted(e) => {
            ("clock_accepted", json!({"deviation_micros": e.deviation_micros, "by": operator(e.by.as_ref())}))
        }
        Body::HsmUnlocked(e) => (
            "hsm_unlocked",
            json!({"token": e.token, "role": role_name(e.role()), "asked": time(e.asked_unix_micros / 1_000_000),
                   "by": operator(e.by.as_ref())}),
        ),
        Body::KeyIntended(_) | Body::KeyActivated(_) | Body::KeyAbandoned(_) | Body::AuthorityActivated(_) => key(body),
        Body::AuthorityStepped(e) => ("authority_stepped", stepped(e)),
        Body::AuthorityTainted(e) => ("authority_tainted", json!({"key_id": hex(&e.key_id), "by": operator(e.by.as_ref())})),
        Body::RotationPaused(e) => ("rotation_paused", json!({"by": operator(e.by.as_ref())})),
        Body::RotationResumed(e) => ("rotation_resumed", json!({"by": operator(e.by.as_ref())})),
        Body::OrphansDestroyed(e) => (
            "orphans_destroyed",
            json!({"token": role_name(e.token()), "key_id": hex(&e.key_id), "objects_destroyed": e.objects_destroyed,
                   "by": operator(e.by.as_ref())}),
        ),
        Body::Intended(e) => ("intended", intended(e)),
        Body::AgentKeyCreated(_)
        | Body::AgentKeyRotated(_)
        | Body::AgentKeyDisabled(_)
        | Body::AgentKeyDestroyed(_)
        | Body::AgentKeyObjectEnded(_)
        | Body::AgentKeysForgotten(_)
        | Body::SignIntended(_)
        | Body::SignaturesReserved(_)
        | Body::SignaturesSealed(_)
        | Body::AgentKeysRewrapped(_) => describe_keys::body(body),
        Body::Released(e) => ("released", json!({"intent": e.intent, "signature": hex(&e.signature)})),
        Body::Withheld(e) => ("withheld", json!({"intent": e.intent, "reason": e.reason().as_str_name()})),
        Body::Failed(e) => ("failed", json!({"intent": e.intent, "reason": e.reason().as_str_name()})),
        Body::Unknown(e) => ("unknown", json!({"intent": e.intent, "cause": e.cause})),
        Body::Enrolled(_) | Body::Quarantined(_) | Body::Reinstated(_) => agent(body),
        Body::Refused(e) => {
            ("refused", json!({"agent": e.agent, "method": e.method, "reason": e.reason().as_str_name(), "detail": e.detail}))
        }
        Body::RefusalsCounted(e) => {
            let count = |c: &proto::refusals_counted::Count| json!({"reason": c.reason().as_str_name(), "source": c.source, "count": c.count});
            ("refusals_counted", json!({"counts": e.counts.iter().map(count).collect::<Vec<_>>()}))
        }
    }
}

fn key(body: &Body) -> (&'static str, Value) {
    match body {
        Body::KeyIntended(e) => (
            "key_intended",
            json!({"purpose": purpose_name(e.purpose()), "algorithm": algorithm_name(e.algorithm()),
                   "token": role_name(e.token()), "key_id": hex(&e.key_id)}),
        ),
        Body::KeyActivated(e) => ("key_activated", json!({"key_id": hex(&e.key_id), "spki": hex(&e.spki)})),
        Body::KeyAbandoned(e) => {
            ("key_abandoned", json!({"key_id": hex(&e.key_id), "cause": e.cause, "objects_destroyed": e.objects_destroyed}))
        }
        Body::AuthorityActivated(e) => (
            "authority_activated",
            json!({"purpose": purpose_name(e.purpose()), "key_id": hex(&e.key_id),
                   // What an outside root signed has no intent here.
                   "intent": (e.intent != 0).then_some(e.intent),
                   "certificate": hex(&e.certificate)}),
        ),
        _ => ("unknown_kind", Value::Null),
    }
}

fn stepped(e: &proto::AuthorityStepped) -> Value {
    let filled = |bytes: &[u8]| (!bytes.is_empty()).then(|| hex(bytes));
    json!({"purpose": purpose_name(e.purpose()), "to": state_name(e.to()), "key_id": hex(&e.key_id), "cause": e.cause,
           "replaces": filled(&e.replaces), "issuer": filled(&e.issuer), "intent": (e.intent != 0).then_some(e.intent),
           "certificate": filled(&e.certificate), "checkpoint": (!e.checkpoint.is_empty()).then_some(&e.checkpoint),
           "objects_destroyed": (e.to() == AuthorityState::Destroyed).then_some(e.objects_destroyed),
           "now": e.now.then_some(true), "by": operator(e.by.as_ref())})
}

/// How far a generation of an authority has got.
pub(super) fn state_name(state: AuthorityState) -> &'static str {
    match state {
        AuthorityState::Unspecified => "-",
        AuthorityState::Planned => "planned",
        AuthorityState::Prepublished => "prepublished",
        AuthorityState::Active => "active",
        AuthorityState::Retiring => "retiring",
        AuthorityState::Retired => "retired",
        AuthorityState::Destroyed => "destroyed",
    }
}

fn agent(body: &Body) -> (&'static str, Value) {
    match body {
        Body::Enrolled(e) => {
            let limits = e.limits.unwrap_or_default();
            (
                "enrolled",
                json!({"agent": e.agent, "epoch": e.epoch, "ttl_seconds_max": limits.ttl_seconds_max,
                       "rejoin_seconds": limits.rejoin_seconds, "token_expires": time(e.token_expires_unix_seconds),
                       "token_id": hex(&e.token_id), "token_public_key": hex(&e.token_public_key),
                       "by": operator(e.by.as_ref())}),
            )
        }
        Body::Quarantined(e) => (
            "quarantined",
            json!({"agent": e.agent, "epoch": e.epoch, "cause": cause_name(e.cause()), "detail": e.detail,
                   "by": operator(e.by.as_ref())}),
        ),
        Body::Reinstated(e) => (
            "reinstated",
            json!({"agent": e.agent, "epoch": e.epoch, "token_expires": time(e.token_expires_unix_seconds),
                   "token_id": hex(&e.token_id), "token_public_key": hex(&e.token_public_key),
                   "by": operator(e.by.as_ref())}),
        ),
        _ => ("unknown_kind", Value::Null),
    }
}

fn intended(e: &proto::Intended) -> Value {
    let mut fields = json!({"purpose": intent_name(e.kind())});
    if !e.agent.is_empty() {
        fields = json!({"purpose": intent_name(e.kind()), "agent": e.agent, "epoch": e.epoch, "sequence": e.sequence,
            "request_hash": hex(&e.request_hash), "idempotency_hash": hex(&e.idempotency_hash),
            "policy_hash": hex(&e.policy_hash), "appraised": e.appraised.as_ref().map(appraised)});
    }
    fields["key_id"] = hex(&e.key_id).into();
    fields["tbs"] = hex(&e.tbs).into();
    fields
}

fn appraised(e: &proto::Appraised) -> Value {
    let kind = match e.kind() {
        EvidenceKind::JoinToken => "join_token",
        EvidenceKind::BoundKey => "bound_key",
        EvidenceKind::Unspecified => "unknown",
    };
    json!({"kind": kind, "evidence_id": hex(&e.evidence_id), "fresh_until": time(e.fresh_until_unix_seconds),
           "channel_proved": e.channel_proved})
}

pub(super) fn operator(by: Option<&Operator>) -> Value {
    by.map_or(Value::Null, |by| json!({"uid": by.uid, "reason": by.reason}))
}

fn intent_name(kind: IntentKind) -> &'static str {
    match kind {
        IntentKind::Unspecified => "unknown",
        IntentKind::Attest => "attest",
        IntentKind::Renew => "renew",
        IntentKind::Server => "server",
        IntentKind::Crl => "crl",
        IntentKind::Root => "root",
        IntentKind::Issuing => "issuing",
        IntentKind::Csr => "csr",
    }
}

/// What an authority key is for.
pub(super) fn purpose_name(purpose: Purpose) -> &'static str {
    match purpose {
        Purpose::Unspecified => "unknown",
        Purpose::Root => "root",
        Purpose::Issuing => "issuing",
        Purpose::Ledger => "ledger",
        Purpose::Canary => "canary",
        Purpose::TokenSigning => "token-signing",
        Purpose::Wrapping => "wrapping",
        Purpose::Agent => "agent",
    }
}

pub(super) fn algorithm_name(algorithm: KeyAlgorithm) -> &'static str {
    match algorithm {
        KeyAlgorithm::Unspecified => "unknown",
        KeyAlgorithm::P256 => "p256",
        KeyAlgorithm::Ed25519 => "ed25519",
        KeyAlgorithm::P384 => "p384",
        KeyAlgorithm::Ps256 => "ps256",
    }
}

fn role_name(role: TokenRole) -> &'static str {
    match role {
        TokenRole::Unspecified => "unknown",
        TokenRole::Authority => "authority",
        TokenRole::Agents => "agents",
    }
}

fn cause_name(cause: QuarantineCause) -> &'static str {
    match cause {
        QuarantineCause::Unspecified => "unknown",
        QuarantineCause::Operator => "operator",
        QuarantineCause::CloneSuspected => "clone_suspected",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_is_told_in_words_with_stable_names() {
        let by = Some(Operator { uid: 1000, reason: "case 1".into() });
        let quarantined = proto::Quarantined { by, agent: "coder/7".into(), epoch: 1, cause: 1, detail: "case 1".into() };
        let entry = Entry { index: 5, time_unix_micros: 1_800_000_000_000_000, body: Some(Body::Quarantined(quarantined)) };
        let described = Described::of(&entry);
        let value = serde_json::to_value(&described).expect("json");
        assert_eq!(value["kind"], "quarantined");
        assert_eq!(value["time"], "2027-01-15T08:00:00Z");
        assert_eq!((&value["agent"], &value["by"]["uid"]), (&json!("coder/7"), &json!(1000)));
        assert_eq!(described.summary(), "agent=coder/7 cause=operator by=uid 1000: case 1 detail=case 1 epoch=1");
        assert!(described.text().contains("cause      operator\n"));
        assert!(described.text().contains("by.uid     1000\n"));
    }

    #[test]
    fn a_line_opens_with_what_tells_entries_apart() {
        let crl =
            proto::Intended { kind: IntentKind::Crl.into(), key_id: vec![0x0a; 16], tbs: vec![1; 40], ..Default::default() };
        let line = |body| Described::of(&Entry { index: 1, time_unix_micros: 0, body: Some(body) }).summary();
        assert_eq!(line(Body::Intended(crl)), "purpose=crl key_id=0a0a0a0a…");
        let renewal = proto::Intended {
            kind: IntentKind::Renew.into(),
            agent: "coder/7".into(),
            epoch: 1,
            sequence: 3,
            idempotency_hash: vec![7; 16],
            ..Default::default()
        };
        assert_eq!(line(Body::Intended(renewal)), "agent=coder/7 purpose=renew sequence=3 epoch=1");
        let count = proto::refusals_counted::Count { source: "127.0.0.1".into(), count: 3, ..Default::default() };
        let counted = line(Body::RefusalsCounted(proto::RefusalsCounted { counts: vec![count] }));
        assert!(counted.starts_with("counts=3 ") && counted.ends_with(" 127.0.0.1"), "{counted}");
    }

    #[test]
    fn an_entry_newer_than_this_program_is_still_listed() {
        assert_eq!(Described::of(&Entry { index: 1, ..Entry::default() }).kind, "unknown_kind");
    }
}

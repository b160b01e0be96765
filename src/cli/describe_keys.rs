//! Entries about agents' signing keys, in words.

use serde_json::{Value, json};

use super::describe::{algorithm_name, operator};
use super::render::time;
pub(super) use crate::acts::key_purpose_name as purpose_name;
use crate::model::hex;
use crate::proto::entry::Body;
use crate::proto::{AgentKeyVersion, KeyAccounting, KeyOver, KeyStorage, RewrappedVersion};

pub(super) fn body(body: &Body) -> (&'static str, Value) {
    match body {
        Body::AgentKeyCreated(e) => (
            "agent_key_created",
            json!({"agent": e.agent, "epoch": e.epoch, "name": e.name, "purpose": purpose_name(e.purpose()),
                   "algorithm": algorithm_name(e.algorithm()), "storage_asked": storage_name(e.storage_asked()),
                   "accounting": accounting_name(e.accounting()), "signatures_max": e.signatures_max,
                   "ttl_seconds": e.ttl_seconds, "version": e.version.as_ref().map(version)}),
        ),
        Body::AgentKeyRotated(e) => (
            "agent_key_rotated",
            json!({"agent": e.agent, "epoch": e.epoch, "name": e.name, "version": e.version.as_ref().map(version)}),
        ),
        Body::AgentKeyDisabled(e) => {
            ("agent_key_disabled", json!({"agent": e.agent, "epoch": e.epoch, "name": e.name, "by": operator(e.by.as_ref())}))
        }
        Body::AgentKeyDestroyed(e) => {
            ("agent_key_destroyed", json!({"agent": e.agent, "epoch": e.epoch, "name": e.name, "by": operator(e.by.as_ref())}))
        }
        Body::AgentKeyObjectEnded(e) => (
            "agent_key_object_ended",
            json!({"agent": e.agent, "epoch": e.epoch, "name": e.name, "key_id": hex(&e.key_id), "cause": over_name(e.cause())}),
        ),
        Body::AgentKeysForgotten(e) => {
            ("agent_keys_forgotten", json!({"agent": e.agent, "epoch": e.epoch, "names": e.names, "cause": over_name(e.cause())}))
        }
        Body::SignIntended(e) => (
            "sign_intended",
            json!({"agent": e.agent, "epoch": e.epoch, "name": e.name, "profile": purpose_name(e.profile()),
                   "key_id": hex(&e.key_id), "signatures": e.digests.len(),
                   "digests": e.digests.iter().map(|digest| hex(digest)).collect::<Vec<_>>()}),
        ),
        Body::SignaturesReserved(e) => (
            "signatures_reserved",
            json!({"agent": e.agent, "epoch": e.epoch, "name": e.name, "key_id": hex(&e.key_id), "count": e.count}),
        ),
        Body::AgentKeysRewrapped(e) => {
            let version = |one: &RewrappedVersion| {
                let kept = !one.wrapped_sha256.is_empty();
                json!({"key_id": hex(&one.key_id), "wrapped_sha256": kept.then(|| hex(&one.wrapped_sha256)), "exposed": one.exposed})
            };
            let versions: Vec<_> = e.versions.iter().map(version).collect();
            ("agent_keys_rewrapped", json!({"wrapping_key_id": hex(&e.wrapping_key_id), "versions": versions}))
        }
        Body::SignaturesSealed(e) => ("signatures_sealed", json!({"reservation": e.reservation, "used": e.used})),
        _ => ("unknown_kind", Value::Null),
    }
}

fn version(version: &AgentKeyVersion) -> Value {
    json!({"number": version.number, "kid": version.kid, "key_id": hex(&version.key_id), "spki": hex(&version.spki),
           "storage": storage_name(version.storage()), "wrapped_sha256": hex(&version.wrapped_sha256),
           "wrapping_key_id": hex(&version.wrapping_key_id), "expires": time(version.expires_unix_seconds)})
}

fn over_name(cause: KeyOver) -> &'static str {
    match cause {
        KeyOver::Unspecified => "unknown",
        KeyOver::Expired => "expired",
        KeyOver::Epoch => "epoch",
        KeyOver::Agent => "agent",
    }
}

pub(super) fn storage_name(storage: KeyStorage) -> &'static str {
    match storage {
        KeyStorage::Unspecified => "default",
        KeyStorage::Session => "session",
        KeyStorage::Wrapped => "wrapped",
        KeyStorage::Resident => "resident",
    }
}

pub(super) fn accounting_name(accounting: KeyAccounting) -> &'static str {
    match accounting {
        KeyAccounting::Unspecified => "unknown",
        KeyAccounting::Recorded => "recorded",
        KeyAccounting::Counted => "counted",
    }
}

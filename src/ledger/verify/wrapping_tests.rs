//! Agents' keys under wrapping keys, in an otherwise right ledger: what may be under which, and what becomes of it.

use super::book::{AGENT, Book};
use super::*;
use crate::formats::Jwk;
use crate::proto::{
    self, AgentKeyCreated, AgentKeyVersion, AgentKeysRewrapped, AuthorityState as State, AuthorityStepped, KeyAlgorithm,
    KeyPurpose, KeyStorage, Purpose, RewrappedVersion, SignIntended,
};

const OLD: [u8; 16] = [5; 16];
const NEW: [u8; 16] = [6; 16];
const KEY: [u8; 16] = [9; 16];

impl Book {
    fn step_wrapping(&mut self, key: [u8; 16], to: State, replaces: &[u8]) {
        let (purpose, to) = (Purpose::Wrapping.into(), to.into());
        let step = AuthorityStepped { purpose, key_id: key.to_vec(), to, replaces: replaces.to_vec(), ..Default::default() };
        self.add(Body::AuthorityStepped(step));
    }

    fn wrapping_key(&mut self, key: [u8; 16]) {
        self.key_intended(key, Purpose::Wrapping);
        self.add(Body::KeyActivated(proto::KeyActivated { key_id: key.to_vec(), spki: Vec::new() }));
    }

    fn wrapped_key(&mut self, name: &str, key_id: [u8; 16], wrapping: [u8; 16]) {
        let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
        let spki = rcgen::PublicKeyData::subject_public_key_info(&pair);
        let version = AgentKeyVersion {
            number: 1,
            key_id: key_id.to_vec(),
            kid: Jwk::thumbprint(&PublicKey::from_spki(&spki).unwrap()),
            spki,
            storage: KeyStorage::Wrapped.into(),
            wrapped_sha256: vec![1; 32],
            wrapping_key_id: wrapping.to_vec(),
            expires_unix_seconds: self.time.seconds() + 86_400,
        };
        self.add(Body::AgentKeyCreated(AgentKeyCreated {
            agent: AGENT.into(),
            epoch: 1,
            name: name.into(),
            purpose: KeyPurpose::RawDigest.into(),
            algorithm: KeyAlgorithm::P256.into(),
            version: Some(version),
            ..Default::default()
        }));
    }

    fn rewrap(&mut self, wrapping: [u8; 16], key_id: [u8; 16], kept: bool) {
        let wrapped_sha256 = if kept { vec![2; 32] } else { Vec::new() };
        let versions = vec![RewrappedVersion { key_id: key_id.to_vec(), wrapped_sha256, exposed: false }];
        self.add(Body::AgentKeysRewrapped(AgentKeysRewrapped { wrapping_key_id: wrapping.to_vec(), versions }));
    }

    fn an_agent_signs(&mut self) {
        let (name, key_id, profile) = ("a".into(), KEY.to_vec(), KeyPurpose::RawDigest.into());
        let digests = vec![vec![1; 32]];
        self.add(Body::SignIntended(SignIntended { agent: AGENT.into(), epoch: 1, name, key_id, profile, digests }));
    }
}

/// One key under the old wrapping key, and the new one active.
fn replaced() -> Book {
    let mut book = Book::new();
    book.wrapping_key(OLD);
    let first = proto::AuthorityActivated { purpose: Purpose::Wrapping.into(), key_id: OLD.to_vec(), ..Default::default() };
    book.add(Body::AuthorityActivated(first));
    book.wrapped_key("a", KEY, OLD);
    book.step_wrapping(NEW, State::Planned, &[]);
    book.wrapping_key(NEW);
    book.step_wrapping(NEW, State::Prepublished, &[]);
    book.step_wrapping(NEW, State::Active, &OLD);
    book
}

#[test]
fn a_wrapping_key_retires_when_what_may_sign_is_under_another() {
    let mut book = replaced();
    book.an_agent_signs();
    book.rewrap(NEW, KEY, true);
    book.wrapped_key("b", [8; 16], NEW);
    book.step_wrapping(OLD, State::Retired, &[]);
    book.step_wrapping(OLD, State::Destroyed, &[]);
    book.an_agent_signs();
    assert_eq!(book.broken(), [""; 0]);
    let mut early = replaced();
    early.step_wrapping(OLD, State::Retired, &[]);
    assert_eq!(early.broken(), ["wrapping-retired"]);
    let mut denied = replaced();
    denied.quarantine(AGENT, 1);
    denied.step_wrapping(OLD, State::Retired, &[]);
    assert_eq!(denied.broken(), [""; 0], "it never signs again");
}

#[test]
fn nothing_comes_under_a_wrapping_key_that_is_not_active() {
    let mut made = replaced();
    made.wrapped_key("b", [8; 16], OLD);
    assert_eq!(made.broken(), ["wrapping"]);
    let mut rewrapped = replaced();
    rewrapped.rewrap(OLD, KEY, true);
    assert_eq!(rewrapped.broken(), ["wrapping"]);
    let mut never_made = Book::new();
    never_made.step_wrapping(NEW, State::Planned, &[]);
    never_made.step_wrapping(NEW, State::Prepublished, &[]);
    assert_eq!(never_made.broken(), ["authority"]);
}

#[test]
fn what_may_sign_is_kept_and_what_is_not_kept_signs_no_more() {
    let mut nobodys = replaced();
    nobodys.rewrap(NEW, [8; 16], true);
    assert_eq!(nobodys.broken(), ["rewrapped"]);
    let mut lost = replaced();
    lost.rewrap(NEW, KEY, false);
    assert_eq!(lost.broken(), ["rewrapped"]);
    lost.an_agent_signs();
    assert_eq!(lost.broken(), ["rewrapped", "sign-key"]);
    lost.rewrap(NEW, KEY, true);
    assert_eq!(lost.broken(), ["rewrapped", "sign-key", "rewrapped"]);
}

#[test]
fn a_key_is_forgotten_before_it_expires_only_where_it_verifies_no_more() {
    let forgotten = |exposed| {
        let mut book = replaced();
        book.add(Body::AuthorityTainted(proto::AuthorityTainted { by: None, key_id: OLD.to_vec() }));
        let (agent, name) = (AGENT.to_owned(), "a".to_owned());
        book.add(Body::AgentKeyDisabled(proto::AgentKeyDisabled {
            by: None,
            agent: agent.clone(),
            epoch: 1,
            name: name.clone(),
        }));
        let versions = vec![RewrappedVersion { key_id: KEY.to_vec(), wrapped_sha256: Vec::new(), exposed }];
        book.add(Body::AgentKeysRewrapped(AgentKeysRewrapped { wrapping_key_id: NEW.to_vec(), versions }));
        let cause = proto::KeyOver::Agent.into();
        book.add(Body::AgentKeysForgotten(proto::AgentKeysForgotten { agent, epoch: 1, names: vec![name], cause }));
        book.broken()
    };
    assert_eq!(forgotten(true), [""; 0]);
    assert_eq!(forgotten(false), ["agent-key"]);
}

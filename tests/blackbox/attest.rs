//! First contact: "issues only to what it has attested".

use keyward::proto::IntentKind;

use crate::house::wire::{Draft, refused};
use crate::house::{Body, House};

#[test]
fn an_enrolled_agent_turns_its_join_file_into_a_certificate_for_a_key_it_made() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    let der = agent.certificate();
    let (_, certificate) = x509_parser::parse_x509_certificate(&der).unwrap();
    let names = certificate.subject_alternative_name().unwrap().unwrap();
    assert_eq!(names.value.general_names.len(), 1);
    assert!(format!("{:?}", names.value.general_names[0]).contains("spiffe://house.example/agent/builder/1"));
    let key = rcgen::KeyPair::from_pem(&std::fs::read_to_string(agent.key()).unwrap()).unwrap();
    use rcgen::PublicKeyData as _;
    assert_eq!(certificate.public_key().raw, key.subject_public_key_info());
    agent.shown_once(|shown| shown["state"] == "active");
}

#[test]
fn the_credentials_of_an_agent_are_for_its_owner_alone() {
    use std::os::unix::fs::MetadataExt;
    let house = House::serving();
    let agent = house.attested("builder/1");
    for file in [agent.svid(), agent.key(), agent.bundle(), agent.join_file()] {
        assert_eq!(std::fs::metadata(&file).unwrap().mode() & 0o077, 0, "{}", file.display());
    }
    assert_eq!(std::fs::metadata(agent.dir()).unwrap().mode() & 0o077, 0);
}

#[test]
fn the_whole_certificate_is_in_the_ledger_before_the_token_signs_it_and_its_one_outcome_after() {
    let mut house = House::serving();
    let der = house.attested("builder/1").certificate();
    let (_, certificate) = x509_parser::parse_x509_certificate(&der).unwrap();
    let entries = house.stopped_entries();
    let (index, intent) = entries
        .iter()
        .enumerate()
        .find_map(|(at, body)| match body {
            Body::Intended(intent) if intent.kind() == IntentKind::Attest => Some((at, intent)),
            _ => None,
        })
        .expect("an intent");
    assert_eq!(intent.tbs, certificate.tbs_certificate.as_ref(), "every byte that was signed");
    assert_eq!(intent.agent, "builder/1");
    let released: Vec<_> = entries
        .iter()
        .filter_map(|body| match body {
            Body::Released(released) if released.intent == index as u64 => Some(released),
            _ => None,
        })
        .collect();
    assert_eq!(released.len(), 1);
    assert_eq!(released[0].signature, certificate.signature_value.as_ref());
}

#[test]
fn the_same_request_gets_the_same_certificate_and_the_token_signs_once() {
    let house = House::new().with_shim().initialised().served();
    let wire = house.wire();
    let join = wire.enrol("builder/1");
    let draft = Draft::join(&join);
    let first = wire.attest(None, |challenge| draft.joined(challenge, &join.token_seed)).unwrap();
    let signed = house.signatures();
    let second = wire.attest(None, |challenge| draft.joined(challenge, &join.token_seed)).unwrap();
    assert_eq!(first, second);
    let (_, certificate) = x509_parser::parse_x509_certificate(&first.chain[0]).unwrap();
    let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, certificate.tbs_certificate.as_ref());
    assert_eq!(signed.of_digest(digest.as_ref()), 1);
    assert_eq!(house.signatures().of_digest(digest.as_ref()), 1);
}

#[test]
fn a_join_token_is_good_for_one_key() {
    let house = House::serving();
    let wire = house.wire();
    let join = wire.enrol("builder/1");
    wire.attest(None, |challenge| Draft::join(&join).joined(challenge, &join.token_seed)).unwrap();
    let thief = wire.attest(None, |challenge| Draft::join(&join).joined(challenge, &join.token_seed));
    refused(thief, "TOKEN_SPENT");
    let recorded = house.entries().iter().any(|body| matches!(body, Body::Refused(refusal) if refusal.agent == "builder/1"));
    assert!(recorded, "a second use of a token is told in the ledger");
}

#[test]
fn an_agent_whose_certificate_expired_comes_back_with_its_key() {
    let house = House::serving();
    let wire = house.wire();
    let join = wire.enrol("builder/1");
    let draft = Draft::join(&join);
    let first = wire.attest(None, |challenge| draft.joined(challenge, &join.token_seed)).unwrap();
    let holder = draft.identity(&first);
    let again = Draft::bound("builder/1", first.next_sequence);
    let second = wire.attest(None, |challenge| again.rejoined(challenge, &holder)).unwrap();
    assert_eq!(second.next_sequence, first.next_sequence + 1);
    assert_ne!(second.chain[0], first.chain[0]);
}

#[test]
fn every_answer_carries_the_bundle_that_its_chain_ends_at() {
    let house = House::serving();
    let wire = house.wire();
    let join = wire.enrol("builder/1");
    let answer = wire.attest(None, |challenge| Draft::join(&join).joined(challenge, &join.token_seed)).unwrap();
    let bundle = answer.bundle.expect("a bundle");
    assert_eq!(bundle.authorities, join.bundle.expect("a bundle").authorities);
    assert_eq!(answer.chain.len(), 2);
    let (_, issuing) = x509_parser::parse_x509_certificate(&answer.chain[1]).unwrap();
    let (_, root) = x509_parser::parse_x509_certificate(&bundle.authorities[0]).unwrap();
    issuing.verify_signature(Some(root.public_key())).unwrap();
}

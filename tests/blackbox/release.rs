//! Release: another chance, with fresh evidence, a new key and a new epoch; nothing of before comes back.

use crate::house::wire::{Draft, Identity, refused};
use crate::house::{Body, House};

#[test]
fn a_released_agent_attests_anew_under_the_next_epoch() {
    let mut house = House::serving();
    {
        let agent = house.attested("builder/1");
        let epoch = agent.shown()["epoch"].as_u64().unwrap();
        agent.quarantine().ok();
        agent.release().ok();
        let shown = agent.shown();
        assert_eq!(shown["state"], "reattest");
        assert_eq!(shown["epoch"].as_u64().unwrap(), epoch + 1);
        agent.attest(&[]).ok();
        agent.shown_once(|shown| shown["state"] == "active");
        agent.renew().ok();
    }
    house.stop_and_verify();
}

#[test]
fn only_a_new_join_file_brings_a_released_agent_back() {
    let house = House::serving();
    let wire = house.wire();
    let join = wire.enrol("builder/1");
    let draft = Draft::join(&join);
    let answer = wire.attest(None, |challenge| draft.joined(challenge, &join.token_seed)).unwrap();
    let holder = draft.identity(&answer);
    let agent = house.agent("builder/1");
    agent.quarantine().ok();
    agent.release().ok();
    refused(wire.renew(Some(&holder), Draft::bound("builder/1", answer.next_sequence).renewal(&holder)), "EPOCH_STALE");
    let rejoin = Draft::bound("builder/1", answer.next_sequence);
    wire.attest(None, |challenge| rejoin.rejoined(challenge, &holder)).expect_err("the old key proves nothing any more");
    let old_token = Draft::join(&join);
    refused(wire.attest(None, |challenge| old_token.joined(challenge, &join.token_seed)), "TOKEN_UNKNOWN");
}

#[test]
fn a_certificate_of_an_old_epoch_opens_nothing_after_the_agent_is_back() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    let old = Identity::of(&agent);
    agent.quarantine().ok();
    agent.release().ok();
    std::fs::remove_dir_all(agent.dir()).unwrap();
    agent.attest(&[]).ok();
    let sequence = agent.shown()["next_sequence"].as_u64().unwrap();
    refused(house.wire().renew(Some(&old), Draft::bound("builder/1", sequence).renewal(&old)), "EPOCH_STALE");
    agent.renew().ok();
}

#[test]
fn old_serials_stay_on_the_crl_after_a_release() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    let serial = agent.serial();
    agent.quarantine().ok();
    crate::certificate::crl_listing(&house, &serial);
    agent.release().ok();
    let shown = agent.shown();
    let denied = shown["certificates"].as_array().unwrap();
    assert!(denied.iter().all(|certificate| certificate["denied"] == true), "{shown}");
    assert!(crate::certificate::crl_listing(&house, &serial).contains(&serial));
}

#[test]
fn the_key_of_before_is_not_certified_again() {
    let house = House::serving();
    let wire = house.wire();
    let join = wire.enrol("builder/1");
    let draft = Draft::join(&join);
    wire.attest(None, |challenge| draft.joined(challenge, &join.token_seed)).unwrap();
    house.agent("builder/1").quarantine().ok();
    let again = wire.release("builder/1");
    let mut reused = Draft::join(&again);
    reused.key = rcgen::KeyPair::try_from(draft.key.serialize_der().as_slice()).unwrap();
    reused.ask.csr = crate::house::wire::csr(&reused.key);
    refused(wire.attest(None, |challenge| reused.joined(challenge, &again.token_seed)), "KEY_IN_USE");
}

#[test]
fn what_is_not_quarantined_cannot_be_released() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    agent.release().refused("NOT_QUARANTINED");
    agent.renew().ok();
    assert!(!agent.join_file().exists(), "no empty join file is left behind");
}

#[test]
fn a_release_names_its_operator_and_reason_in_the_ledger() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    agent.quarantine().ok();
    agent.release().ok();
    let entries = house.entries();
    let by = entries
        .iter()
        .find_map(|body| match body {
            Body::Reinstated(entry) => entry.by.as_ref(),
            _ => None,
        })
        .expect("an entry");
    assert_eq!(by.reason, "looked into it");
    assert_eq!(by.uid, rustix::process::geteuid().as_raw());
}

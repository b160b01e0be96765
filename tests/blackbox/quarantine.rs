//! Quarantine: everything is taken back at once, and stays taken.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use keyward::proto::IntentKind;

use crate::house::wire::{Draft, Face, Identity, ServingStatus, refused};
use crate::house::{Body, DEADLINE, House};

#[test]
fn a_quarantined_agent_gets_nothing_more_and_is_told_why() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    let asked = house.keyward(&["quarantine", "apply", "builder/1", "--reason", "a test"]).exits(2);
    asked.says("its keys sign and verify no more").says("nothing was done");
    agent.quarantine().ok();
    agent.renew().refused("AGENT_QUARANTINED");
    let shown = agent.shown();
    assert_eq!(shown["state"], "quarantined");
    assert!(shown["certificates"].as_array().unwrap().iter().all(|certificate| certificate["denied"] == true), "{shown}");
}

#[test]
fn another_agent_is_not_touched() {
    let house = House::serving();
    let (bad, good) = (house.attested("builder/1"), house.attested("builder/2"));
    bad.quarantine().ok();
    good.renew().ok();
}

#[test]
fn quarantine_is_sticky_through_restarts_and_crashes() {
    let mut house = House::serving();
    {
        let agent = house.attested("builder/1");
        agent.quarantine().ok();
    }
    house.restart();
    house.agent("builder/1").renew().refused("AGENT_QUARANTINED");
    house.kill9();
    house.serve();
    house.agent("builder/1").renew().refused("AGENT_QUARANTINED");
    house.stop_and_verify();
}

#[test]
fn repeating_a_quarantine_is_harmless_and_says_so() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    agent.quarantine().ok();
    agent.quarantine().ok();
    let told = house.entries().iter().filter(|body| matches!(body, Body::Quarantined(_))).count();
    assert_eq!(told, 1);
}

#[test]
fn an_unspent_join_token_of_a_quarantined_agent_is_void() {
    let house = House::serving();
    let agent = house.agent("builder/1");
    agent.enrol(&[]).ok();
    agent.quarantine().ok();
    let output = agent.attest(&[]).exits(3);
    assert!(output.stderr.contains("TOKEN_UNKNOWN") || output.stderr.contains("AGENT_QUARANTINED"), "{}", output.stderr);
}

#[test]
fn enrolling_a_quarantined_agent_again_is_refused() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    agent.quarantine().ok();
    agent.enrol(&[]).refused("AGENT_EXISTS");
}

#[test]
fn an_agent_that_nobody_enrolled_cannot_be_quarantined() {
    let house = House::serving();
    house.quarantine("builder/404").exits(4).says("AGENT_UNKNOWN");
}

#[test]
fn a_quarantine_that_an_outage_keeps_off_the_crl_is_told_and_is_on_it_as_soon_as_the_token_signs() {
    let mut house = House::new().with_one_token().with_shim().initialised().served();
    let serial = {
        let agent = house.attested("builder/1");
        agent.serial()
    };
    let before = house.log().len();
    house.shim().tell("lose");
    house.quarantine("builder/1").ok();
    assert_eq!(house.keyward(&["status", "--format", "json"]).json()["not_on_crl"], 1);
    house.keyward(&["crl", "show"]).ok().says("NOT ON IT YET");
    // By now the next try would be due in four seconds.
    let until = Instant::now() + DEADLINE;
    while house.log()[before..].matches("no new CRL could be signed").count() < 2 {
        assert!(Instant::now() < until, "it does not try");
        std::thread::sleep(Duration::from_millis(20));
    }
    house.shim().tell("return");
    house.wire().health_becomes(Face::Operator, "", ServingStatus::Serving);
    let from = Instant::now();
    assert!(crate::certificate::crl_listing(&house, &serial).contains(&serial));
    assert!(from.elapsed() < Duration::from_secs(2), "{:?}", from.elapsed());
    assert_eq!(house.keyward(&["status", "--format", "json"]).json()["not_on_crl"], 0);
    assert_eq!(house.keyward(&["crl", "show"]).ok().stderr, "");
    house.stop_and_verify();
}

#[test]
fn the_crl_lists_every_serial_of_a_quarantined_agent() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    let first = agent.serial();
    agent.renew().ok();
    let second = agent.serial();
    agent.quarantine().ok();
    let revoked = crate::certificate::crl_listing(&house, &second);
    assert!(revoked.contains(&first) && revoked.contains(&second), "{revoked:?}");
}

#[test]
fn two_diverging_copies_of_an_agent_are_both_shut_out() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    let copy = agent.copied_as("builder-1-copy");
    agent.renew().ok();
    agent.renew().ok();
    copy.renew().refused("CLONE_SUSPECTED");
    agent.renew().refused("AGENT_QUARANTINED");
    assert_eq!(agent.shown()["quarantine"]["cause"], "clone_suspected");
}

/// Promise 5, from outside and from the book: after the acknowledgement no certificate is handed out, and in the book none
/// is released between `quarantined` and `reinstated`, however the requests race.
#[test]
fn quarantine_wins_every_race() {
    let mut house = House::serving();
    let agents: Vec<String> = (0..4).map(|n| format!("racer/{n}")).collect();
    {
        let house = &house;
        let holders: Vec<(Identity, u64)> = agents
            .iter()
            .map(|name| {
                let wire = house.wire();
                let join = wire.enrol(name);
                let draft = Draft::join(&join);
                let answer = wire.attest(None, |challenge| draft.joined(challenge, &join.token_seed)).unwrap();
                (draft.identity(&answer), answer.next_sequence)
            })
            .collect();
        let acknowledged: Vec<AtomicBool> = agents.iter().map(|_| AtomicBool::new(false)).collect();
        thread::scope(|scope| {
            for ((name, (holder, sequence)), acknowledged) in agents.iter().zip(&holders).zip(&acknowledged) {
                scope.spawn(move || {
                    let wire = house.wire();
                    let (mut holder, mut sequence) = (holder.clone(), *sequence);
                    loop {
                        let draft = Draft::bound(name, sequence);
                        let late = acknowledged.load(Ordering::SeqCst);
                        match wire.renew(Some(&holder), draft.renewal(&holder)) {
                            Ok(answer) => {
                                assert!(!late, "{name} was answered after its quarantine was acknowledged");
                                (holder, sequence) = (draft.identity(&answer), answer.next_sequence);
                            }
                            Err(refusal) if ["AGENT_QUARANTINED", "DENIED_MEANWHILE"].contains(&refusal.reason.as_str()) => {
                                return;
                            }
                            // As many live certificates as it may have: the race goes on with refusals.
                            Err(refusal) => assert_eq!(refusal.reason, "RATE_LIMITED", "{refusal:?}"),
                        }
                    }
                });
            }
            for (name, acknowledged) in agents.iter().zip(&acknowledged) {
                house.quarantine(name).ok();
                acknowledged.store(true, Ordering::SeqCst);
            }
        });
        no_release_while_quarantined(&house.entries());
    }
    house.stop_and_verify();
}

/// The promise as a walk over the book.
pub fn no_release_while_quarantined(entries: &[Body]) {
    let mut quarantined = std::collections::BTreeSet::new();
    for (index, body) in entries.iter().enumerate() {
        match body {
            Body::Quarantined(entry) => drop(quarantined.insert(entry.agent.clone())),
            Body::Reinstated(entry) => drop(quarantined.remove(&entry.agent)),
            Body::Released(released) => {
                let agent = match entries.get(usize::try_from(released.intent).unwrap()) {
                    Some(Body::Intended(intent)) => {
                        matches!(intent.kind(), IntentKind::Attest | IntentKind::Renew).then_some(&intent.agent)
                    }
                    Some(Body::SignIntended(intent)) => Some(&intent.agent),
                    _ => panic!("entry {index} releases entry {}, which is no intent", released.intent),
                };
                if let Some(agent) = agent {
                    assert!(!quarantined.contains(agent), "entry {index} releases to {agent}");
                }
            }
            _ => {}
        }
    }
}

#[test]
fn a_quarantined_agents_attempts_are_recorded_and_refer_to_the_book() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    let holder = Identity::of(&agent);
    let sequence = agent.shown()["next_sequence"].as_u64().unwrap();
    agent.quarantine().ok();
    let refusal =
        refused(house.wire().renew(Some(&holder), Draft::bound("builder/1", sequence).renewal(&holder)), "AGENT_QUARANTINED");
    let index = refusal.ledger_index.expect("the refusal names its entry");
    let entries = house.entries();
    let told = match &entries[usize::try_from(index).unwrap()] {
        Body::Refused(entry) => entry.agent == "builder/1",
        Body::Quarantined(entry) => entry.agent == "builder/1",
        _ => false,
    };
    assert!(told, "entry {index} tells of it");
}

/// While the token is away nothing is signed for anybody; who is quarantined hears that it would not be, and nobody else hears it.
#[test]
fn a_quarantined_agent_hears_so_while_the_token_is_away_once_it_has_proved_who_it_is() {
    let house = House::new().with_shim().initialised().served();
    let wire = house.wire();
    let [bad, good] = ["builder/1", "builder/2"].map(|name| Identity::of(&house.attested(name)));
    wire.quarantine("builder/1");
    house.shim().tell("lose");
    wire.health_becomes(Face::Operator, "hsm", ServingStatus::NotServing);
    let (as_bad, as_good) = (Draft::bound("builder/1", 1), Draft::bound("builder/2", 1));
    refused(wire.renew(Some(&bad), as_bad.renewal(&bad)), "AGENT_QUARANTINED");
    refused(wire.attest(None, |challenge| as_bad.rejoined(challenge, &bad)), "AGENT_QUARANTINED");
    refused(wire.renew(Some(&good), as_good.renewal(&good)), "HSM_UNAVAILABLE");
    refused(wire.attest(None, |challenge| as_good.rejoined(challenge, &good)), "HSM_UNAVAILABLE");
    // Who proves nothing cannot tell one from the other.
    refused(wire.attest(None, |challenge| as_bad.rejoined(challenge, &good)), "PROOF_INVALID");
    refused(wire.attest(None, |challenge| as_good.rejoined(challenge, &bad)), "PROOF_INVALID");
}

//! Renewal: a new appraisal, a new key, one sequence.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use keyward::proto::RenewRequest;
use prost::Message as _;

use crate::crash::Holder;
use crate::faults::unavailable;
use crate::house::wire::{Draft, Face, Identity, ServingStatus, Wire, refused};
use crate::house::{DEADLINE, House};

/// An attested agent as its own client sees it: what it holds, and what to claim next.
fn attested(wire: &Wire, name: &str) -> (Identity, u64) {
    let join = wire.enrol(name);
    let draft = Draft::join(&join);
    let answer = wire.attest(None, |challenge| draft.joined(challenge, &join.token_seed)).unwrap();
    (draft.identity(&answer), answer.next_sequence)
}

#[test]
fn a_renewal_brings_a_new_key_a_new_serial_and_the_next_sequence() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    let (serial, key) = (agent.serial(), std::fs::read(agent.key()).unwrap());
    agent.shown_once(|shown| shown["next_sequence"] == 1);
    agent.renew().ok();
    assert_ne!(agent.serial(), serial);
    assert_ne!(std::fs::read(agent.key()).unwrap(), key);
    agent.shown_once(|shown| shown["next_sequence"] == 2);
}

#[test]
fn a_connection_that_proved_the_newest_key_needs_no_other_proof() {
    let house = House::serving();
    let wire = house.wire();
    let (holder, sequence) = attested(&wire, "builder/1");
    let draft = Draft::bound("builder/1", sequence);
    let request = RenewRequest { ask: draft.ask.encode_to_vec(), proof: Vec::new() };
    wire.renew(Some(&holder), request).unwrap();
}

#[test]
fn the_key_that_is_certified_already_is_not_certified_again() {
    let house = House::serving();
    let wire = house.wire();
    let (holder, sequence) = attested(&wire, "builder/1");
    let mut draft = Draft::bound("builder/1", sequence);
    draft.key = holder.pair();
    draft.ask.csr = crate::house::wire::csr(&draft.key);
    refused(wire.renew(Some(&holder), draft.renewal(&holder)), "KEY_IN_USE");
}

#[test]
fn a_key_that_is_live_for_another_agent_is_refused() {
    let house = House::serving();
    let wire = house.wire();
    let (other, _) = attested(&wire, "builder/1");
    let (holder, sequence) = attested(&wire, "builder/2");
    let mut draft = Draft::bound("builder/2", sequence);
    draft.key = other.pair();
    draft.ask.csr = crate::house::wire::csr(&draft.key);
    refused(wire.renew(Some(&holder), draft.renewal(&holder)), "KEY_IN_USE");
}

#[test]
fn a_lost_answer_is_given_again_byte_for_byte_and_signed_once() {
    let house = House::new().with_shim().initialised().served();
    let wire = house.wire();
    let (holder, sequence) = attested(&wire, "builder/1");
    let draft = Draft::bound("builder/1", sequence);
    let first = wire.renew(Some(&holder), draft.renewal(&holder)).unwrap();
    let again = wire.renew(Some(&holder), draft.renewal(&holder)).unwrap();
    assert_eq!(first, again);
    assert!(house.signatures().made.values().all(|count| *count == 1), "{:?}", house.signatures());
}

/// It is in the book: no token is needed to give it again.
#[test]
fn a_lost_answer_is_given_again_while_the_token_is_away() {
    let house = House::new().with_shim().initialised().served();
    let wire = house.wire();
    let join = wire.enrol("builder/1");
    let first = Draft::join(&join);
    let attested = wire.attest(None, |challenge| first.joined(challenge, &join.token_seed)).unwrap();
    let (holder, sequence) = self::attested(&wire, "builder/2");
    let next = Draft::bound("builder/2", sequence);
    let renewed = wire.renew(Some(&holder), next.renewal(&holder)).unwrap();
    house.shim().tell("lose");
    wire.health_becomes(Face::Operator, "hsm", ServingStatus::NotServing);
    assert_eq!(wire.attest(None, |challenge| first.joined(challenge, &join.token_seed)).unwrap(), attested);
    assert_eq!(wire.renew(Some(&holder), next.renewal(&holder)).unwrap(), renewed);
    let fresh = Draft::bound("builder/2", renewed.next_sequence);
    let holder = next.identity(&renewed);
    refused(wire.renew(Some(&holder), fresh.renewal(&holder)), "HSM_UNAVAILABLE");
    house.shim().tell("return");
    wire.health_becomes(Face::Operator, "", ServingStatus::Serving);
    wire.renew(Some(&holder), fresh.renewal(&holder)).unwrap();
}

#[test]
fn a_lost_answer_is_given_again_while_others_are_turned_away() {
    let mut house = House::new().configured("limits", "live_certificates_per_agent = 64").with_shim().initialised();
    house.shim_script("delay C_Sign ms=100\n");
    house.serve();
    let wire = house.wire();
    let (holder, sequence) = attested(&wire, "builder/1");
    let draft = Draft::bound("builder/1", sequence);
    let answer = wire.renew(Some(&holder), draft.renewal(&holder)).unwrap();
    let mut standing = wire.standing(&holder);
    let crowd: Vec<_> = (0..14).map(|number| Holder::attest(&house, &format!("crowd/{number}"))).collect();
    let (over, turned_away) = (&AtomicBool::new(false), &AtomicUsize::new(0));
    let repeated: Vec<_> = thread::scope(|scope| {
        for mut holder in crowd {
            let house = &house;
            scope.spawn(move || {
                while !over.load(Ordering::SeqCst) {
                    let answer = holder.try_renew(house);
                    if answer.as_ref().is_err_and(|refusal| refusal.reason == "OVERLOADED") {
                        turned_away.fetch_add(1, Ordering::SeqCst);
                    }
                    unavailable(answer);
                }
            });
        }
        // So many more were turned away; false: nobody is any more.
        let crowded = |more| {
            let wanted = turned_away.load(Ordering::SeqCst) + more;
            let until = Instant::now() + DEADLINE;
            while turned_away.load(Ordering::SeqCst) < wanted && Instant::now() < until {
                thread::sleep(Duration::from_millis(5));
            }
            turned_away.load(Ordering::SeqCst) >= wanted
        };
        let answers = (0..20).map_while(|_| crowded(1).then(|| wire.renew_over(&mut standing, draft.renewal(&holder))));
        let answers = answers.collect();
        over.store(true, Ordering::SeqCst);
        answers
    });
    assert_eq!(repeated.len(), 20, "there was a crowd all the time");
    for repeated in repeated {
        assert_eq!(repeated.unwrap(), answer);
    }
}

#[test]
fn an_answer_outlives_a_restart() {
    let mut house = House::serving();
    let (draft, holder, first) = {
        let wire = house.wire();
        let (holder, sequence) = attested(&wire, "builder/1");
        let draft = Draft::bound("builder/1", sequence);
        let first = wire.renew(Some(&holder), draft.renewal(&holder)).unwrap();
        (draft, holder, first)
    };
    house.restart();
    assert_eq!(house.wire().renew(Some(&holder), draft.renewal(&holder)).unwrap(), first);
}

#[test]
fn the_claim_to_a_sequence_that_was_never_reached_is_refused_and_changes_nothing() {
    let house = House::serving();
    let wire = house.wire();
    let (holder, sequence) = attested(&wire, "builder/1");
    let ahead = Draft::bound("builder/1", sequence + 5);
    refused(wire.renew(Some(&holder), ahead.renewal(&holder)), "SEQUENCE_AHEAD");
    let due = Draft::bound("builder/1", sequence);
    wire.renew(Some(&holder), due.renewal(&holder)).unwrap();
}

/// A request's bytes are no proof of the key in them: who repeats one with an earlier key gets the answer, and no further.
#[test]
fn a_repeated_request_proves_nothing_for_the_connection_it_came_over() {
    let house = House::serving();
    let wire = house.wire();
    let (holder, sequence) = attested(&wire, "builder/1");
    let mut old = wire.standing(&holder);
    let draft = Draft::bound("builder/1", sequence);
    let answer = wire.renew(Some(&holder), draft.renewal(&holder)).unwrap();
    let mut repeated = draft.renewal(&holder);
    repeated.proof.clear();
    assert_eq!(wire.renew_over(&mut old, repeated).unwrap(), answer);
    let mut next = Draft::bound("builder/1", answer.next_sequence).renewal(&holder);
    next.proof.clear();
    refused(wire.renew_over(&mut old, next), "PROOF_INVALID");
}

/// What needs no signature takes no place on the way to one: neither answers given again nor claims that are refused.
#[test]
fn one_agent_that_asks_without_end_keeps_nobody_from_a_slow_token() {
    let mut house = House::new().with_shim().initialised();
    house.shim_script("delay C_Sign ms=150\n");
    house.serve();
    let house = house;
    let wire = house.wire();
    let (holder, sequence) = attested(&wire, "builder/1");
    let answered = Draft::bound("builder/1", sequence).renewal(&holder);
    let next = wire.renew(Some(&holder), answered.clone()).unwrap().next_sequence;
    let early = Draft::bound("builder/1", next + 5).renewal(&holder);
    let (mut other, mut due) = attested(&wire, "builder/2");
    let (over, asked) = (&AtomicBool::new(false), &AtomicUsize::new(0));
    let refused: Vec<_> = thread::scope(|scope| {
        for request in [&answered, &early].repeat(24) {
            let (house, holder) = (&house, &holder);
            scope.spawn(move || {
                let wire = house.wire();
                let mut standing = wire.standing(holder);
                while !over.load(Ordering::SeqCst) {
                    let _ = wire.renew_over(&mut standing, request.clone());
                    asked.fetch_add(1, Ordering::SeqCst);
                }
            });
        }
        while asked.load(Ordering::SeqCst) < 100 {
            thread::sleep(Duration::from_millis(5));
        }
        let answers = (0..7).filter_map(|_| {
            let draft = Draft::bound("builder/2", due);
            let answer = wire.renew(Some(&other), draft.renewal(&other));
            if let Ok(answer) = &answer {
                (other, due) = (draft.identity(answer), answer.next_sequence);
            }
            answer.err()
        });
        let refused = answers.collect();
        over.store(true, Ordering::SeqCst);
        refused
    });
    assert!(refused.is_empty(), "{} of 7 were turned away: {:?}", refused.len(), refused.first());
}

//! The book: everything is in it, in one order, and it can be held against the promises without trusting the daemon.

use std::collections::{BTreeMap, BTreeSet};

use keyward::proto::IntentKind;

use crate::house::{Body, House};

/// A house with a little of everything in its book.
fn lived_in() -> House {
    let mut house = House::serving();
    {
        let (one, two) = (house.attested("builder/1"), house.attested("builder/2"));
        one.renew().ok();
        one.quarantine().ok();
        one.renew().refused("AGENT_QUARANTINED");
        one.release().ok();
        one.attest(&[]).ok();
        two.renew().ok();
        crate::certificate::crl_listing(&house, &two_serials_never(&house));
    }
    house.restart();
    house
}

/// The CRL lists the denied serials of the released agent: any one of them will do.
fn two_serials_never(house: &House) -> Vec<u8> {
    let shown = house.agent("builder/1").shown();
    let denied =
        shown["certificates"].as_array().unwrap().iter().find(|one| one["denied"] == true).expect("a denied one").clone();
    let hex = denied["serial"].as_str().unwrap();
    let mut serial: Vec<u8> = (0..hex.len()).step_by(2).map(|at| u8::from_str_radix(&hex[at..at + 2], 16).unwrap()).collect();
    // As DER has it: an integer is positive.
    if serial[0] & 0x80 != 0 {
        serial.insert(0, 0);
    }
    serial
}

#[test]
fn a_book_with_a_little_of_everything_verifies_offline() {
    let mut house = lived_in();
    house.stop_and_verify();
}

#[test]
fn every_act_is_one_entry_in_one_order() {
    let house = lived_in();
    let entries = house.wire().entries();
    assert!(entries.iter().enumerate().all(|(at, entry)| entry.index == at as u64), "the index is dense");
    assert!(entries.is_sorted_by_key(|entry| entry.time_unix_micros), "time does not go back");
    let bodies: Vec<Body> = entries.into_iter().map(|entry| entry.body.unwrap()).collect();
    assert!(matches!(bodies[0], Body::Genesis(_)));
    let count = |wanted: fn(&Body) -> bool| bodies.iter().filter(|body| wanted(body)).count();
    assert_eq!(count(|body| matches!(body, Body::Started(_))), 2);
    assert_eq!(count(|body| matches!(body, Body::Stopped(stop) if stop.cause != "init")), 1);
    assert_eq!(count(|body| matches!(body, Body::Enrolled(_))), 2);
    assert_eq!(count(|body| matches!(body, Body::Quarantined(_))), 1);
    assert_eq!(count(|body| matches!(body, Body::Reinstated(_))), 1);
    let kind = |wanted: IntentKind| {
        bodies.iter().filter(|body| matches!(body, Body::Intended(intent) if intent.kind() == wanted)).count()
    };
    assert_eq!(kind(IntentKind::Attest), 3);
    assert_eq!(kind(IntentKind::Renew), 2);
    assert!(kind(IntentKind::Crl) >= 1);
}

#[test]
fn every_intent_has_exactly_one_outcome() {
    let mut house = lived_in();
    one_outcome_each(&house.stopped_entries());
}

/// Over the whole book of a daemon that has stopped.
pub fn one_outcome_each(entries: &[Body]) {
    let mut open: BTreeSet<u64> = BTreeSet::new();
    for (index, body) in entries.iter().enumerate() {
        let ended = match body {
            Body::Intended(_) | Body::SignIntended(_) => {
                open.insert(index as u64);
                continue;
            }
            Body::Released(outcome) => outcome.intent,
            Body::Withheld(outcome) => outcome.intent,
            Body::Failed(outcome) => outcome.intent,
            Body::Unknown(outcome) => outcome.intent,
            _ => continue,
        };
        assert!(open.remove(&ended), "entry {index} ends intent {ended}, which was not open");
    }
    assert!(open.is_empty(), "intents {open:?} have no outcome");
}

#[test]
fn the_token_signed_nothing_that_was_not_in_the_book_and_nothing_twice() {
    let mut house = House::new().with_shim().initialised().served();
    {
        let agent = house.attested("builder/1");
        agent.renew().ok();
        agent.quarantine().ok();
        crate::certificate::crl_listing(&house, &agent.serial());
    }
    let entries = house.stopped_entries();
    signed_only_what_was_intended(&house, &entries);
}

/// Promise 2, from the token's side: each digest that an authority key signed is of an intent's bytes, and was signed once.
pub fn signed_only_what_was_intended(house: &House, entries: &[Body]) {
    // A key is tried when it is made and when a daemon starts to use it.
    let lives = 2 + entries.iter().filter(|body| matches!(body, Body::Started(_))).count();
    let tests = signed_beside_intents(house, entries);
    assert!(tests.values().all(|count| *count <= lives), "signed without an intent: {tests:?}");
}

/// How often each authority key signed something else than an intent's bytes: test signatures, over a tag that no certificate starts
/// with. What was intended must have been signed at most as often.
pub fn signed_beside_intents(house: &House, entries: &[Body]) -> BTreeMap<String, usize> {
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let mut intended = BTreeMap::new();
    let mut authorities = BTreeSet::new();
    for body in entries {
        if let Body::Intended(intent) = body {
            authorities.insert(hex(&intent.key_id));
            let digest = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, &intent.tbs);
            *intended.entry((hex(&intent.key_id), hex(digest.as_ref()))).or_insert(0_usize) += 1;
        }
    }
    let signatures = house.signatures();
    let mut tests = BTreeMap::<String, usize>::new();
    for ((key, data), count) in signatures.made.iter().filter(|((key, _), _)| authorities.contains(key)) {
        match intended.get(&(key.clone(), data.clone())) {
            Some(times) => assert!(count <= times, "{data} was signed {count} times with {key}, intended {times} times"),
            None => *tests.entry(key.clone()).or_default() += count,
        }
    }
    tests
}

#[test]
fn a_book_that_was_changed_by_one_bit_does_not_verify() {
    let mut house = lived_in();
    assert_eq!(house.stop(), 0);
    let db = rusqlite::Connection::open(house.state().join("keyward.db")).unwrap();
    let size: i64 = db.query_row("SELECT count(*) FROM entry", [], |row| row.get(0)).unwrap();
    for index in [1, size / 2, size - 1] {
        let original: Vec<u8> = db.query_row("SELECT bytes FROM entry WHERE idx = ?1", [index], |row| row.get(0)).unwrap();
        let mut changed = original.clone();
        *changed.last_mut().unwrap() ^= 1;
        db.execute("UPDATE entry SET bytes = ?2 WHERE idx = ?1", (index, &changed)).unwrap();
        house.verify().exits(6);
        db.execute("UPDATE entry SET bytes = ?2 WHERE idx = ?1", (index, &original)).unwrap();
    }
    house.verify().ok();
}

#[test]
fn a_book_with_an_entry_missing_does_not_verify() {
    let mut house = lived_in();
    assert_eq!(house.stop(), 0);
    let db = rusqlite::Connection::open(house.state().join("keyward.db")).unwrap();
    db.execute("DELETE FROM entry WHERE idx = (SELECT max(idx) FROM entry)", []).unwrap();
    drop(db);
    house.verify().exits(6);
}

#[test]
fn a_book_of_another_house_does_not_verify_under_this_ones_key() {
    let (mut house, mut other) = (House::serving(), House::serving());
    assert_eq!((house.stop(), other.stop()), (0, 0));
    std::fs::copy(other.state().join("ledger.vkey"), house.state().join("ledger.vkey")).unwrap();
    house.verify().exits(6);
}

//! Signing keys that agents use and never hold.

use std::sync::Barrier;
use std::thread;

use keyward::ledger::Reader;
use keyward::proto::signature::Form;
use keyward::proto::{
    Content, CreateKeyRequest, KeyAccounting, KeyAlgorithm, KeyPurpose, KeyState, KeyStorage, Purpose, VerifyRequest, content,
    get_jwks_request::Of, verify_request,
};

use crate::house::keys::{digest, lives, payload, verifies, wish};
use crate::house::wire::{Identity, refused};
use crate::house::{Body, House};
use crate::instruments;

const STORAGES: [KeyStorage; 3] = [KeyStorage::Session, KeyStorage::Wrapped, KeyStorage::Resident];

fn for_jws(name: &str) -> CreateKeyRequest {
    CreateKeyRequest { purpose: KeyPurpose::Jws.into(), ..wish(name) }
}

#[test]
fn an_agent_signs_with_keys_of_every_storage_class_and_the_book_has_each_signature() {
    let mut house = House::serving();
    {
        let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
        for storage in STORAGES {
            let name = storage.as_str_name().to_lowercase().replace('_', "-");
            let key = keys.create(CreateKeyRequest { storage: storage.into(), ..wish(&name) }).unwrap();
            assert_eq!((key.storage_asked(), key.versions[0].storage()), (storage, lives(storage)));
            for message in ["one", "two"] {
                let signed = keys.sign(&name, digest(message.as_bytes())).unwrap();
                assert_eq!(signed.kid, key.versions[0].kid);
                let form = signed.signature.and_then(|signature| signature.form);
                assert!(verifies(&key, message.as_bytes(), form.as_ref()));
            }
        }
        assert_eq!(keys.list("").unwrap().len(), 3);
    }
    let entries = house.stopped_entries();
    let intents = entries.iter().filter(|body| matches!(body, Body::SignIntended(_))).count();
    assert_eq!(intents, 6);
    crate::ledger::one_outcome_each(&entries);
    house.verify().ok();
}

#[test]
fn the_same_wish_for_a_key_is_the_same_key_and_another_wish_of_its_name_is_refused() {
    let house = House::serving();
    let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
    let first = keys.create(wish("a")).unwrap();
    assert_eq!(keys.create(wish("a")).unwrap(), first);
    refused(keys.create(for_jws("a")), "KEY_EXISTS");
    refused(keys.create(CreateKeyRequest { signatures_max: 1, ..wish("a") }), "KEY_EXISTS");
    keys.destroy("", "a").unwrap();
    refused(keys.create(wish("a")), "KEY_EXISTS");
}

#[test]
fn of_many_wishes_for_one_name_at_once_one_key_comes() {
    // Whoever comes too early asks again at once.
    let mut house = House::new().configured("limits", "key_changes_per_second = 100000").initialised().served();
    {
        let identity = Identity::of(&house.attested("builder/1"));
        let (house, identity, start) = (&house, &identity, &Barrier::new(8));
        let kids: Vec<_> = thread::scope(|scope| {
            let askers: Vec<_> = (0..8)
                .map(|_| {
                    scope.spawn(move || {
                        let mut keys = house.keys(identity);
                        start.wait();
                        loop {
                            match keys.create(wish("a")) {
                                Ok(key) => return key.versions[0].kid.clone(),
                                Err(refused) => assert_eq!(refused.reason, "REQUEST_IN_PROGRESS"),
                            }
                        }
                    })
                })
                .collect();
            askers.into_iter().map(|asker| asker.join().unwrap()).collect()
        });
        assert!(kids.iter().all(|kid| *kid == kids[0]));
    }
    let entries = house.stopped_entries();
    assert_eq!(entries.iter().filter(|body| matches!(body, Body::AgentKeyCreated(_))).count(), 1);
}

#[test]
fn a_key_of_somebody_else_is_not_found_as_one_that_nobody_has() {
    let house = House::serving();
    let mut own = house.keys(&Identity::of(&house.attested("builder/1")));
    let mut other = house.keys(&Identity::of(&house.attested("builder/2")));
    own.create(wish("a")).unwrap();
    let foreign = refused(other.sign("a", digest(b"x")), "KEY_NOT_FOUND");
    let missing = refused(other.sign("b", digest(b"x")), "KEY_NOT_FOUND");
    let never = refused(other.sign("no such name", digest(b"x")), "KEY_NOT_FOUND");
    for told in [&missing, &never] {
        assert_eq!((foreign.code, &foreign.message), (told.code, &told.message));
    }
    refused(other.show("a"), "KEY_NOT_FOUND");
    refused(other.rotate("a", 0), "KEY_NOT_FOUND");
    refused(other.disable("", "a"), "KEY_NOT_FOUND");
    refused(other.destroy("", "a"), "KEY_NOT_FOUND");
    refused(other.destroy("builder/1", "a"), "KEY_NOT_FOUND");
    refused(other.list("builder/1"), "KEY_NOT_FOUND");
    own.sign("a", digest(b"x")).unwrap();
}

/// Whoever tries what is not its to have leaves a trace, whatever the call; a message that does not verify says nothing of who read it.
#[test]
fn a_refusal_of_the_caller_is_an_entry_in_every_call_and_one_of_a_message_is_none() {
    let mut house = House::serving();
    {
        house.keys(&Identity::of(&house.attested("builder/2"))).create(for_jws("a")).unwrap();
        let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
        refused(keys.verify(received("a.b.c".into())), "MALFORMED_REQUEST");
        refused(keys.list("builder/2"), "KEY_NOT_FOUND");
        refused(keys.disable("builder/2", "a"), "KEY_NOT_FOUND");
        refused(keys.destroy("builder/2", "a"), "KEY_NOT_FOUND");
        let denied = Identity::of(&house.attested("builder/3"));
        house.wire().quarantine("builder/3");
        let mut keys = house.keys(&denied);
        refused(keys.verify(received("a.b.c".into())), "AGENT_QUARANTINED");
        refused(keys.list(""), "AGENT_QUARANTINED");
        refused(keys.kids(Of::Class("builder".into())), "AGENT_QUARANTINED");
    }
    let entries = house.stopped_entries();
    let told = entries.iter().filter_map(|body| if let Body::Refused(refusal) = body { Some(refusal) } else { None });
    let told: Vec<_> =
        told.map(|refusal| (refusal.agent.as_str(), refusal.method.as_str(), refusal.reason().as_str_name())).collect();
    let expected = [
        ("builder/1", "ListKeys", "KEY_NOT_FOUND"),
        ("builder/1", "DisableKey", "KEY_NOT_FOUND"),
        ("builder/1", "DestroyKey", "KEY_NOT_FOUND"),
        ("builder/3", "Verify", "AGENT_QUARANTINED"),
        ("builder/3", "ListKeys", "AGENT_QUARANTINED"),
        ("builder/3", "GetJwks", "AGENT_QUARANTINED"),
    ];
    assert_eq!(told, expected);
    house.verify().ok();
}

#[test]
fn the_next_page_of_a_jwks_starts_where_the_daemon_said_and_nowhere_else() {
    let house = House::serving();
    let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
    keys.create(for_jws("a")).unwrap();
    for of in [Of::Agent("builder/1".into()), Of::Agent("builder/9".into()), Of::Class("builder".into())] {
        refused(keys.jwks(of, "builder/1 1 a"), "MALFORMED_REQUEST");
    }
}

#[test]
fn a_key_signs_its_purpose_and_nothing_else() {
    let house = House::serving();
    let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
    keys.create(wish("digests")).unwrap();
    keys.create(for_jws("tokens")).unwrap();
    let told = refused(keys.sign("digests", payload("{}")), "PROFILE_MISMATCH");
    assert!(told.message.contains("raw-digest"), "its owner hears what it is for: {told:?}");
    for length in [1, 32] {
        let digest = Content { content: Some(content::Content::Digest(vec![7; length])) };
        refused(keys.sign("tokens", digest), "PROFILE_MISMATCH");
    }
    let dpop = content::DpopProof { method: "GET".into(), uri: "https://a.example/".into(), ..Default::default() };
    refused(keys.sign("tokens", Content { content: Some(content::Content::Dpop(dpop)) }), "PROFILE_MISMATCH");
    let typed = content::Jws { payload: b"{}".to_vec(), typ: "dpop+jwt".into(), ..Default::default() };
    refused(keys.sign("tokens", Content { content: Some(content::Content::Jws(typed)) }), "PROFILE_MISMATCH");
    refused(keys.sign("tokens", Content::default()), "MALFORMED_REQUEST");
    refused(keys.create(CreateKeyRequest { name: "none".into(), ..Default::default() }), "MALFORMED_REQUEST");
}

#[test]
fn what_is_not_a_digest_of_the_keys_length_is_refused() {
    let house = House::serving();
    let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
    keys.create(wish("a")).unwrap();
    for length in [0, 20, 31, 33, 48, 64] {
        let short = Content { content: Some(content::Content::Digest(vec![7; length])) };
        refused(keys.sign("a", short), "DIGEST_LENGTH_INVALID");
    }
    keys.create(CreateKeyRequest { algorithm: KeyAlgorithm::P384.into(), ..wish("b") }).unwrap();
    refused(keys.sign("b", digest(b"x")), "DIGEST_LENGTH_INVALID");
    keys.sign("b", Content { content: Some(content::Content::Digest(vec![7; 48])) }).unwrap();
    let edwards = CreateKeyRequest { algorithm: KeyAlgorithm::Ed25519.into(), ..wish("c") };
    refused(keys.create(edwards), "ALGORITHM_REFUSED");
}

#[test]
fn sizes_and_numbers_have_bounds() {
    let house = House::new().configured("limits", "keys_per_agent = 2\nresident_keys_per_agent = 1").initialised().served();
    let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
    let session = |wish| CreateKeyRequest { storage: KeyStorage::Session.into(), ..wish };
    for name in ["", "UPPER", "a/b", &"a".repeat(65)] {
        refused(keys.create(wish(name)), "MALFORMED_REQUEST");
    }
    keys.create(session(for_jws("a"))).unwrap();
    keys.create(session(wish("b"))).unwrap();
    refused(keys.create(session(wish("c"))), "KEYS_TOO_MANY");
    keys.destroy("", "b").unwrap();
    keys.create(session(wish("c"))).unwrap();
    refused(keys.sign("a", payload(&"x".repeat(65_537))), "REQUEST_TOO_LARGE");
    keys.sign("a", payload(&"x".repeat(65_536))).unwrap();
    refused(keys.sign_batch("c", vec![]), "REQUEST_TOO_LARGE");
    refused(keys.sign_batch("c", vec![digest(b"x"); 1001]), "REQUEST_TOO_LARGE");
    refused(keys.create(CreateKeyRequest { ttl_seconds: 31_536_001, ..wish("d") }), "MALFORMED_REQUEST");
    keys.destroy("", "a").unwrap();
    let resident = |name: &str| CreateKeyRequest { storage: KeyStorage::Resident.into(), ..wish(name) };
    keys.create(resident("e")).unwrap();
    keys.destroy("", "c").unwrap();
    refused(keys.create(resident("f")), "KEYS_TOO_MANY");
    keys.create(session(wish("f"))).unwrap();
}

/// Each within its bounds, and the message that brings them all is not: a refusal with its reason, and an entry like any other.
#[test]
fn a_message_over_its_bound_is_refused_with_a_reason_and_is_an_entry() {
    let mut house = House::serving();
    {
        let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
        keys.create(for_jws("a")).unwrap();
        let large = refused(keys.sign_batch("a", vec![payload(&"x".repeat(200)); 700]), "REQUEST_TOO_LARGE");
        assert!(large.ledger_index.is_some() && large.message.contains("131072"), "{large:?}");
        keys.sign_batch("a", vec![payload(&"x".repeat(200)); 600]).unwrap();
    }
    let entries = house.stopped_entries();
    let told: Vec<_> =
        entries.iter().filter_map(|body| if let Body::Refused(told) = body { Some(&*told.method) } else { None }).collect();
    assert_eq!(told, ["SignBatch"]);
}

/// Two objects of the token under one id: which of them is the agent's is not guessed, and asking again finds two as well.
#[test]
fn of_keys_whose_ids_collide_none_signs_and_nobody_is_told_to_ask_again() {
    let mut house = House::serving();
    let agent = Identity::of(&house.attested("builder/1"));
    let resident = CreateKeyRequest { storage: KeyStorage::Resident.into(), ..wish("a") };
    house.keys(&agent).create(resident.clone()).unwrap();
    house.keys(&agent).create(CreateKeyRequest { name: "b".into(), ..resident }).unwrap();
    assert_eq!(house.stop(), 0);
    let stored = Reader::open(&house.state().join("keyward.db")).unwrap().all_agent_keys(None, 10).unwrap();
    instruments::make_another_under(&house, "agents", &stored[0].versions[0].key_id.0);
    house.serve();
    let mut keys = house.keys(&agent);
    let collided = refused(keys.sign("a", digest(b"x")), "KEY_NOT_AS_RECORDED");
    assert!(collided.retry_after.is_none() && collided.ledger_index.is_some(), "{collided:?}");
    refused(keys.sign("a", digest(b"x")), "KEY_NOT_AS_RECORDED");
    assert_eq!(house.log().matches("it signs no more").count(), 1);
    keys.sign("b", digest(b"x")).unwrap();
    // Another version has an id of its own.
    keys.rotate("a", 1).unwrap();
    keys.sign("a", digest(b"x")).unwrap();
}

#[test]
fn an_agent_asks_for_so_much_in_a_second_and_not_more() {
    let house = House::new().configured("limits", "signatures_per_second = 10").initialised().served();
    let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
    keys.create(wish("a")).unwrap();
    let refusal = refused(keys.sign_batch("a", vec![digest(b"x"); 11]), "RATE_LIMITED");
    assert!(refusal.retry_after.is_some());
}

#[test]
fn a_disabled_key_signs_no_more_and_a_destroyed_one_is_gone() {
    let mut house = House::serving();
    {
        let agent = house.attested("builder/1");
        let mut keys = house.keys(&Identity::of(&agent));
        let mut operator = house.operator_keys();
        for storage in STORAGES {
            let name = storage.as_str_name().to_lowercase().replace('_', "-");
            keys.create(CreateKeyRequest { storage: storage.into(), ..wish(&name) }).unwrap();
            keys.sign(&name, digest(b"x")).unwrap();
            assert!(operator.disable("builder/1", &name).unwrap() > 0);
            assert_eq!(operator.disable("builder/1", &name).unwrap(), 0, "it was so before");
            refused(keys.sign(&name, digest(b"x")), "KEY_DISABLED");
            refused(keys.rotate(&name, 0), "KEY_DISABLED");
            assert!(keys.destroy("", &name).unwrap() > 0);
            refused(keys.sign(&name, digest(b"x")), "KEY_DESTROYED");
            refused(keys.disable("", &name), "KEY_DESTROYED");
            assert_eq!(keys.destroy("", &name).unwrap(), 0);
        }
        let states: Vec<_> = operator.list("builder/1").unwrap().iter().map(|key| key.state()).collect();
        assert_eq!(states, [KeyState::Destroyed; 3]);
    }
    house.restart();
    {
        let mut keys = house.keys(&Identity::of(&house.agent("builder/1")));
        refused(keys.sign("key-storage-wrapped", digest(b"x")), "KEY_DESTROYED");
    }
    house.stop_and_verify();
}

#[test]
fn only_its_agent_makes_and_uses_a_key() {
    let house = House::serving();
    house.attested("builder/1");
    let mut operator = house.operator_keys();
    refused(operator.create(wish("a")), "CALLER_NOT_ALLOWED");
    refused(operator.sign("a", digest(b"x")), "CALLER_NOT_ALLOWED");
    refused(operator.disable("builder/1", "a"), "KEY_NOT_FOUND");
    refused(operator.disable("builder/9", "a"), "AGENT_UNKNOWN");
}

#[test]
fn an_expired_key_signs_no_more_until_it_is_rotated() {
    let house = House::serving();
    let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
    keys.create(CreateKeyRequest { ttl_seconds: 1, ..wish("a") }).unwrap();
    // Its life is what is tested: time must pass.
    thread::sleep(std::time::Duration::from_millis(1200));
    refused(keys.sign("a", digest(b"x")), "KEY_EXPIRED");
    let listed = house.keyward(&["key", "list", "--agent", "builder/1", "--format", "json"]).ok().json();
    assert_eq!(listed[0]["state"], "expired");
    let (key, _) = keys.rotate("a", 0).unwrap();
    assert_eq!(key.versions.len(), 1, "what has expired is forgotten");
    assert_eq!(key.versions[0].number, 2);
}

#[test]
fn a_budget_is_kept_to_the_last_signature_also_across_a_restart() {
    let mut house = House::serving();
    {
        let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
        keys.create(CreateKeyRequest { signatures_max: 5, ..wish("recorded") }).unwrap();
        let counted = CreateKeyRequest { accounting: KeyAccounting::Counted.into(), signatures_max: 5, ..wish("counted") };
        keys.create(counted).unwrap();
        for name in ["recorded", "counted"] {
            keys.sign(name, digest(b"x")).unwrap();
            keys.sign_batch(name, vec![digest(b"x"); 2]).unwrap();
        }
    }
    house.restart();
    {
        let mut keys = house.keys(&Identity::of(&house.agent("builder/1")));
        for name in ["recorded", "counted"] {
            refused(keys.sign_batch(name, vec![digest(b"x"); 3]), "KEY_BUDGET_SPENT");
            keys.sign_batch(name, vec![digest(b"x"); 2]).unwrap();
            refused(keys.sign(name, digest(b"x")), "KEY_BUDGET_SPENT");
        }
    }
    house.stop_and_verify();
}

#[test]
fn what_a_crash_leaves_reserved_counts_as_made() {
    let mut house = House::new().with_shim().initialised().served();
    {
        let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
        keys.create(CreateKeyRequest { accounting: KeyAccounting::Counted.into(), ..wish("a") }).unwrap();
        for _ in 0..10 {
            keys.sign("a", digest(b"x")).unwrap();
        }
    }
    house.kill9();
    house.serve();
    {
        let mut keys = house.keys(&Identity::of(&house.agent("builder/1")));
        assert!(keys.show("a").unwrap().signatures >= 10);
        keys.sign("a", digest(b"x")).unwrap();
    }
    let entries = house.stopped_entries();
    let (mut sum, mut open) = (0, std::collections::BTreeMap::new());
    for (index, body) in entries.iter().enumerate() {
        match body {
            Body::SignaturesReserved(reserved) => drop(open.insert(index as u64, reserved.count)),
            Body::SignaturesSealed(sealed) => {
                open.remove(&sealed.reservation).expect("a reservation that is open");
                sum += sealed.used;
            }
            _ => {}
        }
    }
    assert_eq!(open.len(), 1, "the crash left one");
    assert_eq!(sum, 1, "the stop sealed the other");
    assert!(sum + open.values().sum::<u64>() >= 11);
    house.verify().ok();
}

#[test]
fn a_batch_is_one_entry_and_all_of_it_verifies() {
    let mut house = House::serving();
    {
        let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
        let key = keys.create(wish("a")).unwrap();
        let messages: Vec<_> = (0_u32..1000).map(|number| number.to_be_bytes()).collect();
        let made = keys.sign_batch("a", messages.iter().map(|message| digest(message)).collect()).unwrap();
        assert_eq!(made.signatures.len(), 1000);
        for (message, signature) in messages.iter().zip(&made.signatures) {
            assert!(verifies(&key, message, signature.form.as_ref()));
        }
    }
    let entries = house.stopped_entries();
    let intents: Vec<_> = entries.iter().filter(|body| matches!(body, Body::SignIntended(_))).collect();
    assert!(matches!(intents.as_slice(), [Body::SignIntended(one)] if one.digests.len() == 1000));
    house.verify().ok();
}

#[test]
fn an_intent_to_sign_that_a_crash_left_open_is_closed_as_unknown() {
    let mut house = House::new().with_shim().initialised().served();
    let identity = Identity::of(&house.attested("builder/1"));
    house.keys(&identity).create(wish("a")).unwrap();
    {
        let house = &house;
        thread::scope(|scope| {
            // The token does not answer; the intent is durable by then.
            house.shim().tell("hang C_Sign count=all");
            let asker = scope.spawn(|| house.keys(&identity).sign("a", digest(b"x")));
            let intended = || house.entries().iter().any(|body| matches!(body, Body::SignIntended(_)));
            let until = std::time::Instant::now() + crate::house::DEADLINE;
            while !intended() {
                assert!(std::time::Instant::now() < until, "no intent was recorded");
            }
            house.daemon_signal(rustix::process::Signal::KILL);
            asker.join().unwrap().unwrap_err();
        });
    }
    house.kill9();
    house.serve();
    let entries = house.stopped_entries();
    crate::ledger::one_outcome_each(&entries);
    let intent = entries.iter().position(|body| matches!(body, Body::SignIntended(_))).unwrap() as u64;
    assert!(entries.iter().any(|body| matches!(body, Body::Unknown(unknown) if unknown.intent == intent)));
    house.verify().ok();
}

/// Waits until the agent's signing has begun, by the book.
#[track_caller]
fn begins(house: &House, name: &str) {
    let is_its = |body: &Body| match body {
        Body::SignIntended(intent) => intent.agent == name,
        Body::SignaturesReserved(reserved) => reserved.agent == name,
        _ => false,
    };
    let until = std::time::Instant::now() + crate::house::DEADLINE;
    while !house.entries().iter().any(is_its) {
        assert!(std::time::Instant::now() < until, "nothing was intended");
    }
}

/// Two seconds for all of it, with 10 ms for each on a house's two lanes: less than the deadline of a signature.
fn long_batch() -> Vec<Content> {
    vec![digest(b"x"); 400]
}

#[test]
fn a_batch_whose_asker_hangs_up_is_carried_to_its_end() {
    let mut house = House::new().with_shim().initialised().served();
    for accounting in [KeyAccounting::Recorded, KeyAccounting::Counted] {
        let name = format!("builder/{}", house.entries().len());
        let identity = Identity::of(&house.attested(&name));
        house.keys(&identity).create(CreateKeyRequest { accounting: accounting.into(), ..wish("a") }).unwrap();
        house.shim().tell("delay C_Sign ms=10");
        let (hang_up, told) = tokio::sync::oneshot::channel();
        let (house, identity) = (&house, &identity);
        thread::scope(|scope| {
            scope.spawn(move || house.keys(identity).sign_batch_until("a", long_batch(), told));
            begins(house, &name);
            hang_up.send(()).expect("it is still being signed");
        });
        house.shim().tell("clear");
        house.keys(identity).sign("a", digest(b"y")).unwrap();
    }
    // No intent says of a counted one when it is over: the token does.
    let (signed, until) = (<sha2::Sha256 as sha2::Digest>::digest(b"x"), std::time::Instant::now() + crate::house::DEADLINE);
    while house.signatures().of_digest(&signed) < 2 * long_batch().len() {
        assert!(std::time::Instant::now() < until, "{} were signed", house.signatures().of_digest(&signed));
        thread::sleep(std::time::Duration::from_millis(20));
    }
    let entries = house.stopped_entries();
    crate::ledger::one_outcome_each(&entries);
    assert!(!entries.iter().any(|body| matches!(body, Body::Unknown(_) | Body::Failed(_))));
    let used: Vec<_> = entries
        .iter()
        .filter_map(|body| if let Body::SignaturesSealed(sealed) = body { Some(sealed.used) } else { None })
        .collect();
    assert_eq!(used, [long_batch().len() as u64 + 1]);
    house.verify().ok();
}

#[test]
fn a_batch_under_way_when_its_agent_or_its_key_is_denied_is_withheld_as_a_whole() {
    let mut house = House::new().with_shim().initialised().served();
    let quarantined = |house: &House, name: &str| house.wire().quarantine(name);
    let disabled = |house: &House, name: &str| house.operator_keys().disable(name, "a").unwrap();
    for (accounting, deny) in [
        (KeyAccounting::Recorded, &quarantined as &dyn Fn(&House, &str) -> u64),
        (KeyAccounting::Counted, &quarantined),
        (KeyAccounting::Recorded, &disabled),
    ] {
        let name = format!("builder/{}", house.entries().len());
        let identity = Identity::of(&house.attested(&name));
        house.keys(&identity).create(CreateKeyRequest { accounting: accounting.into(), ..wish("a") }).unwrap();
        house.shim().tell("delay C_Sign ms=10");
        let (house, identity) = (&house, &identity);
        thread::scope(|scope| {
            let asker = scope.spawn(move || house.keys(identity).sign_batch("a", long_batch()));
            begins(house, &name);
            deny(house, &name);
            assert!(!asker.is_finished(), "the batch was over before the denial");
            refused(asker.join().unwrap(), "DENIED_MEANWHILE");
        });
        house.shim().tell("clear");
    }
    let entries = house.stopped_entries();
    assert_eq!(entries.iter().filter(|body| matches!(body, Body::Withheld(_))).count(), 2);
    crate::ledger::one_outcome_each(&entries);
    house.verify().ok();
}

#[test]
fn keys_are_rotated_while_they_sign_and_every_signature_is_of_the_version_it_names() {
    let mut house = House::serving();
    {
        let identity = Identity::of(&house.attested("builder/1"));
        let (house, identity, over) = (&house, &identity, &std::sync::atomic::AtomicBool::new(false));
        for accounting in [KeyAccounting::Recorded, KeyAccounting::Counted] {
            let name = &format!("a{}", i32::from(accounting));
            house.keys(identity).create(CreateKeyRequest { accounting: accounting.into(), ..wish(name) }).unwrap();
            over.store(false, std::sync::atomic::Ordering::SeqCst);
            let signed: Vec<_> = thread::scope(|scope| {
                let signers: Vec<_> = (0..3)
                    .map(|_| {
                        scope.spawn(move || {
                            let (mut keys, mut made) = (house.keys(identity), Vec::new());
                            while !over.load(std::sync::atomic::Ordering::SeqCst) {
                                made.push(keys.sign(name, digest(b"x")).unwrap());
                            }
                            made
                        })
                    })
                    .collect();
                let mut keys = house.keys(identity);
                (0..8).for_each(|_| drop(keys.rotate(name, 0).unwrap()));
                over.store(true, std::sync::atomic::Ordering::SeqCst);
                signers.into_iter().flat_map(|signer| signer.join().unwrap()).collect()
            });
            let key = house.keys(identity).show(name).unwrap();
            assert_eq!(key.versions.len(), 9);
            for one in signed {
                let version = key.versions.iter().find(|version| version.kid == one.kid).expect("a version that verifies");
                let of_version = keyward::proto::Key { versions: vec![version.clone()], ..key.clone() };
                assert!(verifies(&of_version, b"x", one.signature.and_then(|signature| signature.form).as_ref()));
            }
        }
    }
    house.stop_and_verify();
}

#[test]
fn a_resident_key_that_a_crash_left_half_made_is_given_up_at_the_next_start() {
    let mut house = House::new().with_shim().initialised().served();
    let identity = Identity::of(&house.attested("builder/1"));
    house.shim().tell("abort C_GenerateKeyPair");
    let resident = || CreateKeyRequest { storage: KeyStorage::Resident.into(), ..wish("a") };
    house.keys(&identity).create(resident()).unwrap_err();
    assert_ne!(house.ended(), Some(0));
    house.serve();
    house.keys(&identity).create(resident()).unwrap();
    let entries = house.stopped_entries();
    assert_eq!(entries.iter().filter(|body| matches!(body, Body::KeyAbandoned(_))).count(), 1);
    assert_eq!(entries.iter().filter(|body| matches!(body, Body::AgentKeyCreated(_))).count(), 1);
    house.verify().ok();
}

#[test]
fn a_key_that_is_being_made_when_its_agent_is_quarantined_is_given_up() {
    let mut house = House::new().with_shim().initialised().served();
    {
        let identity = Identity::of(&house.attested("builder/1"));
        house.shim().tell("delay C_GenerateKeyPair ms=2000");
        let (house, identity) = (&house, &identity);
        thread::scope(|scope| {
            let resident = CreateKeyRequest { storage: KeyStorage::Resident.into(), ..wish("a") };
            let asker = scope.spawn(move || house.keys(identity).create(resident));
            let intended = |body: &Body| matches!(body, Body::KeyIntended(key) if key.purpose() == Purpose::Agent);
            let until = std::time::Instant::now() + crate::house::DEADLINE;
            while !house.entries().iter().any(intended) {
                assert!(std::time::Instant::now() < until, "no key was intended");
            }
            house.wire().quarantine("builder/1");
            assert!(!asker.is_finished(), "the key was made before the quarantine");
            refused(asker.join().unwrap(), "AGENT_QUARANTINED");
        });
    }
    let entries = house.stopped_entries();
    assert!(!entries.iter().any(|body| matches!(body, Body::AgentKeyCreated(_))));
    let abandoned = |body: &Body| matches!(body, Body::KeyAbandoned(key) if key.objects_destroyed > 0);
    assert_eq!(entries.iter().filter(|body| abandoned(body)).count(), 1);
    house.verify().ok();
}

#[test]
fn from_a_quarantines_acknowledgement_on_no_signature_is_handed_out() {
    let mut house = House::serving();
    for accounting in [KeyAccounting::Recorded, KeyAccounting::Counted] {
        let name = format!("builder/{}", i32::from(accounting));
        let identity = Identity::of(&house.attested(&name));
        house.keys(&identity).create(CreateKeyRequest { accounting: accounting.into(), ..wish("a") }).unwrap();
        let (house, identity, start) = (&house, &identity, &Barrier::new(5));
        let acknowledged = &std::sync::OnceLock::new();
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(move || {
                    let mut keys = house.keys(identity);
                    keys.sign("a", digest(b"x")).unwrap();
                    start.wait();
                    loop {
                        let late = acknowledged.get().is_some();
                        match keys.sign_batch("a", vec![digest(b"x"); 50]) {
                            Ok(_) => assert!(!late, "signatures came after the quarantine was acknowledged"),
                            Err(refused) => {
                                let denied = ["AGENT_QUARANTINED", "DENIED_MEANWHILE"];
                                assert!(denied.contains(&refused.reason.as_str()), "{refused:?}");
                                break;
                            }
                        }
                    }
                });
            }
            start.wait();
            house.wire().quarantine(&name);
            acknowledged.set(()).unwrap();
        });
        refused(house.keys(identity).sign("a", digest(b"x")), "AGENT_QUARANTINED");
        refused(house.keys(identity).create(wish("b")), "AGENT_QUARANTINED");
    }
    let entries = house.stopped_entries();
    crate::ledger::one_outcome_each(&entries);
    crate::quarantine::no_release_while_quarantined(&entries);
    house.verify().ok();
}

#[test]
fn keys_of_before_a_release_stay_denied() {
    let mut house = House::serving();
    {
        let agent = house.attested("builder/1");
        let old = Identity::of(&agent);
        let kid = house.keys(&old).create(for_jws("a")).unwrap().versions[0].kid.clone();
        agent.quarantine().ok();
        agent.release().ok();
        agent.attest(&[]).ok();
        refused(house.keys(&old).sign("a", payload("{}")), "EPOCH_STALE");
        let mut keys = house.keys(&Identity::of(&agent));
        refused(keys.sign("a", payload("{}")), "KEY_NOT_FOUND");
        let new = keys.create(for_jws("a")).unwrap();
        assert_ne!(new.versions[0].kid, kid);
        assert_eq!(keys.kids(Of::Agent("builder/1".into())).unwrap(), [new.versions[0].kid.clone()]);
    }
    house.stop_and_verify();
}

#[test]
fn older_versions_verify_after_a_rotation_and_a_repeated_one_rotates_once() {
    let mut house = House::serving();
    {
        let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
        for storage in STORAGES {
            let name = storage.as_str_name().to_lowercase().replace('_', "-");
            let first = keys.create(CreateKeyRequest { storage: storage.into(), ..for_jws(&name) }).unwrap();
            let before = keys.jws(&name, "{}").unwrap();
            let (rotated, index) = keys.rotate(&name, 1).unwrap();
            assert!(index > 0);
            assert_eq!(keys.rotate(&name, 1).unwrap(), (rotated.clone(), 0), "a lost answer is asked for again");
            assert_eq!(rotated.versions[1], first.versions[0]);
            let after = keys.jws(&name, "{}").unwrap();
            let kids = keys.kids(Of::Class("builder".into())).unwrap();
            for (token, version) in [(before, &rotated.versions[1]), (after, &rotated.versions[0])] {
                assert!(kids.contains(&version.kid));
                assert_eq!(keys.verify(received(token)).unwrap().kid, version.kid);
            }
        }
    }
    house.stop_and_verify();
}

fn received(token: String) -> VerifyRequest {
    let jws = verify_request::Jws { token, ..verify_request::Jws::default() };
    VerifyRequest { agent: String::new(), message: Some(verify_request::Message::Jws(jws)) }
}

#[test]
fn a_jwks_drops_an_agents_keys_the_moment_it_is_quarantined() {
    let house = House::serving();
    let mut reader = house.keys(&Identity::of(&house.attested("reader/1")));
    let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
    let mut other = house.keys(&Identity::of(&house.attested("builder/2")));
    let kid = keys.create(for_jws("a")).unwrap().versions[0].kid.clone();
    let stays = other.create(for_jws("a")).unwrap().versions[0].kid.clone();
    keys.create(wish("digests")).unwrap();
    let token = keys.jws("a", "{}").unwrap();
    assert_eq!(reader.verify(received(token.clone())).unwrap().agent, "builder/1");
    assert_eq!(
        reader.kids(Of::Agent("builder/1".into())).unwrap(),
        std::slice::from_ref(&kid),
        "a key for digests is not published"
    );
    assert_eq!(reader.kids(Of::Class("builder".into())).unwrap().len(), 2);
    house.wire().quarantine("builder/1");
    assert!(reader.kids(Of::Agent("builder/1".into())).unwrap().is_empty());
    assert!(house.operator_keys().kids(Of::Agent("builder/1".into())).unwrap().is_empty());
    assert_eq!(reader.kids(Of::Class("builder".into())).unwrap(), [stays]);
    assert!(reader.kids(Of::Agent("builder/9".into())).unwrap().is_empty());
    refused(reader.verify(received(token)), "KID_UNKNOWN");
}

#[test]
fn a_received_message_is_refused_for_what_is_wrong_with_it() {
    let house = House::serving();
    let mut reader = house.keys(&Identity::of(&house.attested("reader/1")));
    let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
    keys.create(for_jws("a")).unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let claims = |audience: &str, jti: &str, exp: u64| format!(r#"{{"aud":"{audience}","jti":"{jti}","iat":{now},"exp":{exp}}}"#);
    let check = |token: String| {
        let jws = verify_request::Jws { token, audience: "here".into(), ..verify_request::Jws::default() };
        VerifyRequest { agent: "builder/1".into(), message: Some(verify_request::Message::Jws(jws)) }
    };
    let good = keys.jws("a", &claims("here", "one", now + 60)).unwrap();
    let verified = reader.verify(check(good.clone())).unwrap();
    assert_eq!((verified.agent.as_str(), verified.key.as_str()), ("builder/1", "a"));
    refused(reader.verify(check(good.clone())), "REPLAYED");
    let elsewhere = keys.jws("a", &claims("there", "two", now + 60)).unwrap();
    refused(reader.verify(check(elsewhere)), "AUDIENCE_MISMATCH");
    let expired = keys.jws("a", &claims("here", "three", now - 120)).unwrap();
    refused(reader.verify(check(expired)), "MESSAGE_EXPIRED");
    let endless = keys.jws("a", &claims("here", "four", now + 86_400)).unwrap();
    refused(reader.verify(check(endless)), "OUTSIDE_TIME_WINDOW");
    let mut forged = good.clone().into_bytes();
    let at = forged.len() - 10;
    forged[at] = if forged[at] == b'A' { b'B' } else { b'A' };
    refused(reader.verify(check(String::from_utf8(forged).unwrap())), "SIGNATURE_INVALID");
    let detached = content::Jws { payload: b"{}".to_vec(), detached: true, ..Default::default() };
    let signed = keys.sign("a", Content { content: Some(content::Content::Jws(detached)) }).unwrap();
    let Some(Form::Jws(detached)) = signed.signature.and_then(|signature| signature.form) else { panic!("a JWS") };
    let told = refused(reader.verify(received(detached)), "SIGNATURE_INVALID");
    assert!(told.message.contains("send it as well"), "its payload is missing: {told:?}");
    let unsigned = {
        use base64::Engine as _;
        let encode = |text: &str| base64::engine::general_purpose::URL_SAFE_NO_PAD.encode(text);
        format!("{}.{}.", encode(r#"{"alg":"none","kid":"x"}"#), encode(&claims("here", "five", now + 60)))
    };
    refused(reader.verify(check(unsigned)), "ALGORITHM_REFUSED");
    let mut not_theirs = check(good);
    not_theirs.agent = "builder/2".into();
    refused(reader.verify(not_theirs), "KID_UNKNOWN");
}

#[test]
fn a_proof_and_an_http_message_are_signed_and_verified() {
    let house = House::serving();
    let mut reader = house.keys(&Identity::of(&house.attested("reader/1")));
    let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
    keys.create(CreateKeyRequest { purpose: KeyPurpose::Dpop.into(), ..wish("proofs") }).unwrap();
    let http = CreateKeyRequest {
        purpose: KeyPurpose::HttpMessageSignature.into(),
        algorithm: KeyAlgorithm::Ed25519.into(),
        ..wish("web")
    };
    keys.create(http).unwrap();
    let (method, uri) = ("POST".to_owned(), "https://api.example/token".to_owned());
    let dpop = content::DpopProof { method: method.clone(), uri: uri.clone(), ..Default::default() };
    let signed = keys.sign("proofs", Content { content: Some(content::Content::Dpop(dpop)) }).unwrap();
    let Some(Form::Dpop(proof)) = signed.signature.and_then(|signature| signature.form) else { panic!("a proof") };
    let check = |uri: &str| {
        let dpop = verify_request::Dpop { proof: proof.clone(), method: method.clone(), uri: uri.into(), ..Default::default() };
        VerifyRequest { agent: String::new(), message: Some(verify_request::Message::Dpop(dpop)) }
    };
    refused(reader.verify(check("https://api.example/other")), "BINDING_MISMATCH");
    assert_eq!(reader.verify(check(&uri)).unwrap().kid, signed.kid);
    refused(reader.verify(check(&uri)), "REPLAYED");

    let component = |identifier: &str, value: &str| content::Component { identifier: identifier.into(), value: value.into() };
    let components = vec![component("@method", "GET"), component("@authority", "api.example")];
    let message = content::HttpMessage { components: components.clone(), nonce: "n1".into(), ..Default::default() };
    let signed = keys.sign("web", Content { content: Some(content::Content::HttpMessage(message)) }).unwrap();
    let Some(Form::Http(fields)) = signed.signature.and_then(|signature| signature.form) else { panic!("fields") };
    let check = |components: Vec<content::Component>| {
        let http = verify_request::Http {
            signature_input: fields.signature_input.clone(),
            signature: fields.signature.clone(),
            components,
            required: vec!["@method".into()],
            ..Default::default()
        };
        VerifyRequest { agent: "builder/1".into(), message: Some(verify_request::Message::Http(http)) }
    };
    let other = vec![component("@method", "DELETE"), component("@authority", "api.example")];
    refused(reader.verify(check(other)), "SIGNATURE_INVALID");
    assert_eq!(reader.verify(check(components.clone())).unwrap().covered.len(), 2);
    refused(reader.verify(check(components)), "REPLAYED");
}

/// As openssl verifies RSASSA-PSS: SHA-256, MGF1 with SHA-256, a salt of 32 bytes.
fn openssl_verifies(house: &House, key: &keyward::proto::Key, message: &[u8], signature: &[u8]) -> bool {
    let [spki, signed, content] = ["rsa.spki", "rsa.signature", "rsa.message"].map(|name| house.path(name));
    std::fs::write(&spki, &key.versions[0].spki).unwrap();
    std::fs::write(&signed, signature).unwrap();
    std::fs::write(&content, message).unwrap();
    let mut openssl = std::process::Command::new("openssl");
    openssl.args(["dgst", "-sha256", "-keyform", "DER", "-sigopt", "rsa_padding_mode:pss", "-sigopt", "rsa_pss_saltlen:32"]);
    openssl.args(["-sigopt", "rsa_mgf1_md:sha256", "-verify"]).arg(spki).arg("-signature").arg(signed).arg(content);
    openssl.output().unwrap().status.success()
}

#[test]
fn an_rsa_key_of_each_class_signs_what_openssl_verifies_and_comes_back_after_a_restart() {
    let mut house = House::serving();
    let rsa = |name: &str| CreateKeyRequest { algorithm: KeyAlgorithm::Ps256.into(), ..wish(name) };
    let signs = |house: &House, keys: &mut crate::house::keys::Keys, name: &str| {
        let key = keys.show(name).unwrap();
        assert_eq!(key.algorithm(), KeyAlgorithm::Ps256);
        let signed = keys.sign(name, digest(b"message")).unwrap();
        let Some(Form::Der(signature)) = signed.signature.and_then(|signature| signature.form) else { panic!("a signature") };
        assert_eq!(signature.len(), 256);
        assert!(openssl_verifies(house, &key, b"message", &signature), "{name}");
        assert!(!openssl_verifies(house, &key, b"another", &signature), "{name}");
    };
    {
        let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
        for storage in STORAGES {
            let name = storage.as_str_name().to_lowercase().replace('_', "-");
            let key = keys.create(CreateKeyRequest { storage: storage.into(), ..rsa(&name) }).unwrap();
            assert_eq!(key.versions[0].storage(), lives(storage));
            signs(&house, &mut keys, &name);
        }
        for length in [20, 48, 64] {
            let content = Content { content: Some(content::Content::Digest(vec![7; length])) };
            refused(keys.sign("key-storage-wrapped", content), "DIGEST_LENGTH_INVALID");
        }
        // Each signature of a batch is bound to its own digest.
        let batch = keys.sign_batch("key-storage-wrapped", (0..100_u8).map(|n| digest(&[n])).collect()).unwrap();
        let key = keys.show("key-storage-wrapped").unwrap();
        for (n, signature) in (0..).zip(batch.signatures) {
            assert!(verifies(&key, &[n], signature.form.as_ref()));
        }
        let web = CreateKeyRequest { purpose: KeyPurpose::HttpMessageSignature.into(), ..rsa("web") };
        refused(keys.create(web), "ALGORITHM_REFUSED");
        assert_eq!(keys.rotate("key-storage-resident", 1).unwrap().0.versions[0].number, 2);
        signs(&house, &mut keys, "key-storage-resident");
    }
    house.restart();
    {
        let mut keys = house.keys(&Identity::of(&house.agent("builder/1")));
        refused(keys.sign("key-storage-session", digest(b"x")), "KEY_LOST");
        for name in ["key-storage-wrapped", "key-storage-resident"] {
            signs(&house, &mut keys, name);
        }
    }
    house.keyward(&["hsm", "reconcile", "--format", "json"]).ok();
    house.stop_and_verify();
}

#[test]
fn an_rsa_key_signs_tokens_and_proofs_that_are_verified_and_is_published() {
    let house = House::serving();
    let mut reader = house.keys(&Identity::of(&house.attested("reader/1")));
    let agent = house.attested("builder/1");
    let dir = agent.dir().to_str().unwrap().to_owned();
    house.keyward(&["key", "create", "tokens", "--dir", &dir, "--purpose", "jws", "--algorithm", "ps256"]).ok();
    let shown = house.keyward(&["key", "list", "--dir", &dir, "--format", "json"]).ok().json();
    assert_eq!(shown[0]["algorithm"], "ps256", "{shown}");
    let mut keys = house.keys(&Identity::of(&agent));
    let token = keys.jws("tokens", "{}").unwrap();
    let message = verify_request::Jws { token: token.clone(), ..Default::default() };
    let verified = reader.verify(VerifyRequest { agent: String::new(), message: Some(verify_request::Message::Jws(message)) });
    let kid = verified.unwrap().kid;
    let set = house.keyward(&["key", "jwks", "--dir", &dir, "--of", "builder/1"]).ok().json();
    let key = &set["keys"][0];
    assert_eq!((&key["kty"], &key["alg"], &key["e"], &key["kid"]), (&"RSA".into(), &"PS256".into(), &"AQAB".into(), &kid.into()));
    assert_eq!(key["n"].as_str().unwrap().len(), 342);
    let proofs = CreateKeyRequest { purpose: KeyPurpose::Dpop.into(), algorithm: KeyAlgorithm::Ps256.into(), ..wish("proofs") };
    keys.create(proofs).unwrap();
    let (method, uri) = ("POST".to_owned(), "https://api.example/token".to_owned());
    let dpop = content::DpopProof { method: method.clone(), uri: uri.clone(), ..Default::default() };
    let signed = keys.sign("proofs", Content { content: Some(content::Content::Dpop(dpop)) }).unwrap();
    let Some(Form::Dpop(proof)) = signed.signature.and_then(|signature| signature.form) else { panic!("a proof") };
    let dpop = verify_request::Dpop { proof, method, uri, ..Default::default() };
    let request = VerifyRequest { agent: String::new(), message: Some(verify_request::Message::Dpop(dpop)) };
    assert_eq!(reader.verify(request).unwrap().kid, signed.kid);
}

#[test]
fn a_token_that_was_not_seen_to_make_rsa_keys_is_not_asked_for_them() {
    let house = House::new().with_shim();
    house.shim_script("no_session_keys");
    let mut house = house.initialised().served();
    {
        let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
        let rsa = |name: &str| CreateKeyRequest { algorithm: KeyAlgorithm::Ps256.into(), ..wish(name) };
        let before = house.shim().calls("C_GenerateKeyPair");
        refused(keys.create(rsa("a")), "ALGORITHM_UNSUPPORTED");
        assert_eq!(house.shim().calls("C_GenerateKeyPair"), before);
        keys.create(wish("a")).unwrap();
    }
    house.stop_and_verify();
}

#[test]
fn an_agent_has_one_rsa_key_made_at_a_time_and_nobody_elses_key_waits_for_it() {
    let mut house = House::new().with_shim().initialised().served();
    {
        let (greedy, other) = (Identity::of(&house.attested("builder/1")), Identity::of(&house.attested("builder/2")));
        let rsa = |name: &str| CreateKeyRequest {
            algorithm: KeyAlgorithm::Ps256.into(),
            storage: KeyStorage::Session.into(),
            ..wish(name)
        };
        house.shim().tell("hang C_GenerateKeyPair");
        thread::scope(|scope| {
            let mut keys = house.keys(&greedy);
            let first = scope.spawn(move || keys.create(rsa("first")));
            house.shim().tell("await hanging=1");
            refused(house.keys(&greedy).create(rsa("second")), "RATE_LIMITED");
            let mut others = house.keys(&other);
            for name in ["a", "b", "c", "d"] {
                others.create(wish(name)).unwrap();
                others.sign(name, digest(b"x")).unwrap();
            }
            // Its own others, too.
            house.keys(&greedy).create(wish("quick")).unwrap();
            house.shim().tell("release");
            first.join().unwrap().unwrap();
        });
        house.keys(&greedy).create(rsa("second")).unwrap();
    }
    house.stop_and_verify();
}

#[test]
fn session_keys_die_with_the_daemon_and_the_others_come_back() {
    let mut house = House::serving();
    {
        let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
        for storage in STORAGES {
            let name = storage.as_str_name().to_lowercase().replace('_', "-");
            keys.create(CreateKeyRequest { storage: storage.into(), ..wish(&name) }).unwrap();
        }
    }
    house.restart();
    {
        let mut keys = house.keys(&Identity::of(&house.agent("builder/1")));
        refused(keys.sign("key-storage-session", digest(b"x")), "KEY_LOST");
        // Nor is it handed out again as if it were there; another version brings it back.
        let again = CreateKeyRequest { storage: KeyStorage::Session.into(), ..wish("key-storage-session") };
        refused(keys.create(again.clone()), "KEY_LOST");
        keys.rotate("key-storage-session", 1).unwrap();
        keys.create(again).unwrap();
        for name in ["key-storage-wrapped", "key-storage-resident"] {
            let key = keys.show(name).unwrap();
            let signed = keys.sign(name, digest(b"x")).unwrap();
            assert!(verifies(&key, b"x", signed.signature.and_then(|signature| signature.form).as_ref()));
        }
    }
    house.stop_and_verify();
}

#[test]
fn session_keys_that_never_sign_again_make_room_in_the_token() {
    let mut house = House::new().with_shim().initialised().served();
    {
        let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
        let session =
            |name: &str, ttl_seconds| CreateKeyRequest { storage: KeyStorage::Session.into(), ttl_seconds, ..wish(name) };
        keys.create(session("stays", 3600)).unwrap();
        keys.create(session("short", 1)).unwrap();
        let before = house.shim().calls("C_DestroyObject");
        let destroyed = |count: u64| {
            let until = std::time::Instant::now() + crate::house::DEADLINE;
            while house.shim().calls("C_DestroyObject") < before + count {
                assert!(std::time::Instant::now() < until, "{count} session keys were not destroyed");
                thread::sleep(std::time::Duration::from_millis(20));
            }
        };
        destroyed(1);
        keys.sign("stays", digest(b"x")).unwrap();
        refused(keys.sign("short", digest(b"x")), "KEY_EXPIRED");
        assert_eq!(keys.rotate("short", 1).unwrap().0.versions[0].number, 2);
        house.wire().quarantine("builder/1");
        // Both, and before them the public half of the new version.
        destroyed(4);
    }
    house.stop_and_verify();
}

#[test]
fn more_keys_than_memory_holds_are_used_one_after_the_other() {
    let mut house = House::new()
        .configured("limits", "keys_cached = 16\nresident_keys_per_agent = 64\nkey_changes_per_second = 1000")
        .initialised()
        .served();
    {
        let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
        let counted = |name: &str| CreateKeyRequest { accounting: KeyAccounting::Counted.into(), ..wish(name) };
        for number in 0..64 {
            let name = format!("k{number}");
            let terms = if number % 2 == 0 { wish(&name) } else { counted(&name) };
            keys.create(CreateKeyRequest { signatures_max: 3, ..terms }).unwrap();
        }
        for _ in 0..3 {
            for number in 0..64 {
                keys.sign(&format!("k{number}"), digest(b"x")).unwrap();
            }
        }
        for number in 0..64 {
            refused(keys.sign(&format!("k{number}"), digest(b"x")), "KEY_BUDGET_SPENT");
        }
    }
    house.stop_and_verify();
}

#[test]
fn the_command_makes_a_key_signs_verifies_and_ends_it() {
    let mut house = House::serving();
    {
        let agent = house.attested("builder/1");
        let dir = agent.dir();
        let dir = dir.to_str().unwrap();
        let own = |verb: &str, more: &[&str]| house.keyward(&[&["key", verb, "--dir", dir][..], more].concat());
        let wrong = own("create", &["tokens", "--purpose", "jws", "--signatures-max", "0"]).exits(2);
        wrong.says("--signatures-max");
        let wrong = own("create", &["web", "--purpose", "http-message-signature", "--algorithm", "ps256"]).exits(3);
        wrong.says("ALGORITHM_REFUSED");
        let stored = if lives(KeyStorage::Wrapped) == KeyStorage::Wrapped { "wrapped" } else { "resident" };
        let made = own("create", &["tokens", "--purpose", "jws", "--ttl", "1h", "--format", "json"]).ok().json();
        assert_eq!((made["storage"].as_str(), made["state"].as_str()), (Some(stored), Some("active")));
        let file = house.path("payload");
        std::fs::write(&file, b"{}").unwrap();
        let signed = own("sign", &["tokens", "--payload", file.to_str().unwrap(), "--format", "json"]).ok().json();
        let token = house.path("token");
        std::fs::write(&token, signed["jws"].as_str().unwrap()).unwrap();
        let verified = own("verify", &["--jws", token.to_str().unwrap(), "--format", "json"]).ok().json();
        assert_eq!((verified["agent"].as_str(), verified["key"].as_str()), (Some("builder/1"), Some("tokens")));
        let pem = own("show", &["tokens", "--pem"]).ok().stdout;
        let first = made["versions"][0]["spki"].as_str().unwrap();
        let der = spki_of(&pem);
        assert_eq!(der.iter().map(|byte| format!("{byte:02x}")).collect::<String>(), first);
        own("rotate", &["tokens"]).ok();
        let shown = own("show", &["tokens", "--format", "json"]).ok().json();
        assert_eq!(shown["versions"].as_array().unwrap().len(), 2);
        assert_eq!(shown["versions"][1]["spki"].as_str(), Some(first));
        assert_ne!(own("show", &["tokens", "--pem"]).ok().stdout, pem, "the newest version");
        let table = own("show", &["tokens"]).ok().stdout;
        let kids = shown["versions"].as_array().unwrap().iter().map(|version| version["kid"].as_str().unwrap());
        assert!(kids.clone().all(|kid| table.contains(kid)), "{table}");
        assert!(shown["signatures"].is_null(), "nobody counts what each of its entries tells: {shown}");
        own("create", &["used", "--purpose", "raw-digest", "--counted"]).ok();
        own("sign", &["used", "--digest", &"5a".repeat(32)]).ok();
        let counted = own("show", &["used", "--format", "json"]).ok().json();
        let made = counted["signatures"].as_u64().filter(|made| *made > 0).unwrap();
        let told = own("show", &["used"]).ok().stdout;
        assert!(told.contains(&format!("none ({made} counted or reserved)")), "{told}");
        own("show", &["nobodys"]).exits(4).says("KEY_NOT_FOUND");
        let set = own("jwks", &["--class", "builder"]).ok().json();
        assert_eq!(set["keys"].as_array().unwrap().len(), 2);
        for whose in [["--class", "builder"], ["--of", "builder/1"]] {
            let told = house.keyward(&[&["key", "jwks"][..], &whose].concat()).ok().json();
            assert_eq!(told, set, "an operator is told the same over the daemon's socket");
        }
        let listed = house.keyward(&["key", "list", "--agent", "builder/1", "--format", "json"]).ok().json();
        assert_eq!(listed[0]["versions"].as_array().unwrap().len(), 2);
        own("disable", &["tokens", "--yes"]).ok();
        house.keyward(&["key", "destroy", "tokens", "--agent", "builder/1", "--reason", "case 1", "--yes"]).ok();
        let gone = own("sign", &["tokens", "--payload", file.to_str().unwrap()]);
        gone.refused("KEY_DESTROYED");
    }
    house.stop_and_verify();
}

fn spki_of(pem: &str) -> Vec<u8> {
    use base64::Engine as _;
    let body = pem.strip_prefix("-----BEGIN PUBLIC KEY-----\n").and_then(|rest| rest.strip_suffix("-----END PUBLIC KEY-----\n"));
    let lines: String = body.expect(pem).lines().collect();
    base64::engine::general_purpose::STANDARD.decode(lines).unwrap()
}

#[test]
fn after_a_failed_fsync_a_counted_key_signs_nothing_more_though_its_block_is_open() {
    let mut house = House::new().with_preload().initialised();
    house.serve();
    {
        let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
        keys.create(CreateKeyRequest { accounting: KeyAccounting::Counted.into(), ..wish("counted") }).unwrap();
        keys.create(wish("recorded")).unwrap();
        keys.sign("counted", digest(b"one")).unwrap();
        house.control().fail_next_sync();
        refused(keys.sign("recorded", digest(b"two")), "LEDGER_UNAVAILABLE");
        refused(keys.sign("counted", digest(b"three")), "LEDGER_UNAVAILABLE");
    }
    assert_eq!(house.ended(), Some(74));
    house.control().clear();
    house.power_cut();
    house.serve();
    house.stop_and_verify();
}

//! Nobody takes more than its share of the token, of the disk and of the readers; and what is over leaves them.

use std::thread;
use std::time::{Duration, Instant};

use keyward::proto::{
    CreateKeyRequest, KeyAccounting, KeyAlgorithm, KeyOver, KeyPurpose, KeyStorage, Purpose, VerifyRequest, get_jwks_request::Of,
    verify_request,
};

use crate::house::keys::{Keys, digest, wish};
use crate::house::wire::{Answer, Identity, refused};
use crate::house::{Body, DEADLINE, House};

fn session(name: &str) -> CreateKeyRequest {
    CreateKeyRequest { storage: KeyStorage::Session.into(), ..wish(name) }
}

fn resident(name: &str) -> CreateKeyRequest {
    CreateKeyRequest { storage: KeyStorage::Resident.into(), ..wish(name) }
}

/// Called again and again, it is refused before long.
fn is_limited<T: std::fmt::Debug>(mut call: impl FnMut() -> Answer<T>) {
    let limited = (0..200).map(|_| call()).find(|answer| answer.as_ref().is_err_and(|refused| refused.reason == "RATE_LIMITED"));
    assert!(limited.is_some_and(|answer| answer.unwrap_err().retry_after.is_some()), "two hundred calls, and none too many");
}

/// Waits until it is so.
fn until(what: &str, mut so: impl FnMut() -> bool) {
    let until = Instant::now() + DEADLINE;
    while !so() {
        assert!(Instant::now() < until, "{what}");
        thread::sleep(Duration::from_millis(50));
    }
}

fn rows(house: &House, table: &str, agent: &str, epoch: u32) -> u64 {
    let db = rusqlite::Connection::open(house.state().join("keyward.db")).unwrap();
    let query = format!("SELECT count(*) FROM {table} WHERE agent = ?1 AND epoch = ?2");
    db.query_row(&query, (agent, epoch), |row| row.get::<_, i64>(0)).unwrap().cast_unsigned()
}

fn ended(house: &House) -> Vec<KeyOver> {
    let of = |body: &Body| match body {
        Body::AgentKeyObjectEnded(ended) => Some(ended.cause()),
        _ => None,
    };
    house.entries().iter().filter_map(of).collect()
}

/// Neither token has anything that the ledger does not know, or the other way round.
fn no_strays(house: &House) {
    assert_eq!(house.keyward(&["hsm", "reconcile", "--format", "json"]).ok().json(), serde_json::json!([]));
}

#[test]
fn every_call_about_keys_spends_a_rate() {
    let limits = "signatures_per_second = 5\nkey_changes_per_second = 2";
    let house = House::new().configured("limits", limits).initialised().served();
    let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
    until("a key", || keys.create(session("a")).is_ok());
    is_limited(|| keys.show("a"));
    is_limited(|| keys.sign("a", digest(b"x")));
    is_limited(|| keys.create(wish("b")));
    is_limited(|| keys.rotate("a", 1));
    is_limited(|| keys.disable("", "nobodys"));
    is_limited(|| keys.destroy("", "nobodys"));
    // A page costs more than this.
    refused(keys.list(""), "RATE_LIMITED");
    refused(keys.kids(Of::Class("builder".to_owned())), "RATE_LIMITED");
    // What one agent has spent is no other's.
    let mut other = house.keys(&Identity::of(&house.attested("builder/2")));
    is_limited(|| keys.show("a"));
    is_limited(|| keys.destroy("", "nobodys"));
    other.create(session("a")).unwrap();
    other.sign("a", digest(b"x")).unwrap();
}

/// Behind a rotation whose entry waits for the disk.
#[test]
fn what_was_asked_for_is_under_way_though_its_asker_hung_up_and_waits_no_longer_than_for_a_commit() {
    let limits = "signatures_per_second = 1000000";
    let mut house = House::new().configured("limits", limits).initialised().served();
    {
        let identity = Identity::of(&house.attested("builder/1"));
        let mut others = house.keys(&Identity::of(&house.attested("builder/2")));
        let mut keys = house.keys(&identity);
        keys.create(CreateKeyRequest { accounting: KeyAccounting::Counted.into(), ..session("a") }).unwrap();
        // From here on there is a block, and a signature waits for no disk.
        keys.sign("a", digest(b"x")).unwrap();
        // The writer waits for this lock as it would for a disk that does not answer.
        let other = rusqlite::Connection::open(house.state().join("keyward.db")).unwrap();
        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        let (house, identity) = (&house, &identity);
        thread::scope(|scope| {
            let rotation = scope.spawn(move || house.keys(identity).rotate("a", 1));
            let (mut hung_up, end) = (0, Instant::now() + DEADLINE);
            let refusal = loop {
                assert!(hung_up < 256 && Instant::now() < end, "{hung_up} were hung up on, and none was too many");
                match keys.sign_and_hang_up("a", 16) {
                    Ok(more) => hung_up += more,
                    Err(refusal) => break refusal,
                }
            };
            assert_eq!(refusal.reason, "OVERLOADED", "{refusal:?}");
            // Others have their own.
            others.list("").unwrap();
            refused(rotation.join().unwrap(), "LEDGER_UNAVAILABLE");
            until("they wait for ever", || keys.show("a").is_ok());
            refused(keys.sign("a", digest(b"x")), "LEDGER_UNAVAILABLE");
        });
        other.execute_batch("ROLLBACK").unwrap();
        until("the new version never signs", || keys.sign("a", digest(b"x")).is_ok());
        assert_eq!(keys.show("a").unwrap().versions.len(), 2, "the rotation was decided, and is durable by now");
    }
    house.stop_and_verify();
}

#[test]
fn session_keys_are_few_and_live_for_a_short_time() {
    let house = House::new().configured("limits", "session_keys_per_agent = 2").initialised().served();
    let identity = Identity::of(&house.attested("builder/1"));
    let mut keys = house.keys(&identity);
    let too_long = CreateKeyRequest { ttl_seconds: 86_401, ..session("a") };
    refused(keys.create(too_long), "MALFORMED_REQUEST");
    assert_eq!(keys.create(session("a")).unwrap().ttl_seconds, 3600);
    assert_eq!(keys.create(wish("w")).unwrap().ttl_seconds, 2_592_000);
    // Four more at once, and there is room for one.
    let made = thread::scope(|scope| {
        let others: Vec<_> = (0..4)
            .map(|number| {
                let (house, identity) = (&house, &identity);
                scope.spawn(move || house.keys(identity).create(session(&format!("more-{number}"))))
            })
            .collect();
        others.into_iter().map(|other| other.join().unwrap()).collect::<Vec<_>>()
    });
    let there = made.iter().filter(|answer| answer.is_ok()).count();
    assert!(there <= 1, "{made:?}");
    assert!(made.iter().filter_map(|answer| answer.as_ref().err()).all(|refused| refused.reason == "KEYS_TOO_MANY"), "{made:?}");
    if there == 0 {
        keys.create(session("more")).unwrap();
    }
    refused(keys.create(session("c")), "KEYS_TOO_MANY");
    keys.rotate("a", 1).unwrap();
    keys.destroy("", "a").unwrap();
    keys.create(session("c")).unwrap();
    house.keys(&Identity::of(&house.attested("builder/2"))).create(session("a")).unwrap();
}

#[test]
fn resident_keys_are_few_for_each_and_in_all() {
    let mut house = House::new().configured("limits", "resident_keys_per_agent = 2\nresident_keys = 3").initialised().served();
    {
        let (one, two) = (Identity::of(&house.attested("builder/1")), Identity::of(&house.attested("builder/2")));
        let (mut keys, mut others) = (house.keys(&one), house.keys(&two));
        keys.create(resident("a")).unwrap();
        keys.create(resident("b")).unwrap();
        refused(keys.create(resident("c")), "KEYS_TOO_MANY");
        // Another takes its place.
        keys.rotate("b", 1).unwrap();
        others.create(resident("a")).unwrap();
        refused(others.create(resident("b")), "KEYS_TOO_MANY");
        others.rotate("a", 1).unwrap();
        keys.destroy("", "a").unwrap();
        // Four at once, and there is room for one.
        let made = thread::scope(|scope| {
            let tries: Vec<_> = (0..4)
                .map(|number| {
                    let (house, who) = (&house, if number % 2 == 0 { &one } else { &two });
                    scope.spawn(move || house.keys(who).create(resident(&format!("more-{number}"))).is_ok())
                })
                .collect();
            tries.into_iter().map(|tried| tried.join().unwrap()).filter(|made| *made).count()
        });
        assert!(made <= 1, "{made} were made");
    }
    no_strays(&house);
    house.stop_and_verify();
}

/// Agents' keys that were intended, and those of them that were given up with objects.
fn intended_and_given_up(house: &House) -> (usize, usize) {
    let entries = house.entries();
    let intended = |body: &&Body| matches!(body, Body::KeyIntended(key) if key.purpose() == Purpose::Agent);
    let given_up = |body: &&Body| matches!(body, Body::KeyAbandoned(key) if key.objects_destroyed > 0);
    (entries.iter().filter(intended).count(), entries.iter().filter(given_up).count())
}

#[test]
fn while_the_token_is_away_no_resident_key_is_intended() {
    let mut house = House::new().with_shim().initialised().served();
    {
        let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
        keys.create(resident("there")).unwrap();
        house.shim().tell("lose");
        let usable = || {
            let tokens = house.keyward(&["hsm", "status", "--format", "json"]).json();
            tokens.as_array().unwrap().iter().filter(|token| token["usable"] == true).count()
        };
        until("nobody misses them", || usable() == 0);
        refused(keys.create(resident("a")), "HSM_UNAVAILABLE");
        refused(keys.rotate("there", 1), "HSM_UNAVAILABLE");
        assert_eq!(intended_and_given_up(&house), (1, 0));
        house.shim().tell("return");
        until("they are not back", || usable() == 2);
        until("no key is made any more", || keys.create(resident("a")).is_ok());
    }
    no_strays(&house);
    house.stop_and_verify();
}

#[test]
fn resident_keys_that_can_neither_be_made_nor_destroyed_are_few_and_are_given_up_while_the_daemon_runs() {
    let mut house = House::new().with_shim().configured("limits", "resident_keys_per_agent = 2").initialised().served();
    {
        let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
        // Both objects are there, and nobody hears of them.
        house.shim().tell("fail C_GenerateKeyPair rv=0x06 count=all after");
        house.shim().tell("fail C_DestroyObject rv=0x06 count=all");
        until("none is intended", || {
            refused(keys.create(resident("a")), "HSM_UNAVAILABLE");
            intended_and_given_up(&house) == (2, 0)
        });
        until("more are tried", || keys.create(resident("b")).is_err_and(|refused| refused.message.contains("never used")));
        assert_eq!(intended_and_given_up(&house), (2, 0));
        house.shim().tell("clear");
        until("they are not given up", || intended_and_given_up(&house) == (2, 2));
        no_strays(&house);
        until("there is no room", || keys.create(resident("a")).is_ok());
    }
    no_strays(&house);
    house.stop_and_verify();
}

#[test]
fn a_resident_key_whose_making_takes_long_is_not_taken_for_one_that_was_left() {
    let mut house = House::new().with_shim().initialised().served();
    {
        let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
        // For two looks at what is left.
        house.shim().tell("delay C_GenerateKeyPair ms=5000");
        keys.create(resident("a")).unwrap();
        keys.sign("a", digest(b"x")).unwrap();
    }
    no_strays(&house);
    assert!(!house.stopped_entries().iter().any(|body| matches!(body, Body::KeyAbandoned(_))));
    house.verify().ok();
}

#[test]
fn of_an_epoch_that_is_over_neither_objects_nor_rows_are_left() {
    let limits = "resident_keys_per_agent = 2\nsession_keys_per_agent = 2";
    let mut house = House::new().with_shim().configured("limits", limits).initialised().served();
    {
        let agent = house.attested("builder/1");
        let mut keys = house.keys(&Identity::of(&agent));
        let for_jws = |wish: CreateKeyRequest| CreateKeyRequest { purpose: KeyPurpose::Jws.into(), ..wish };
        keys.create(for_jws(resident("a"))).unwrap();
        keys.create(resident("b")).unwrap();
        keys.create(for_jws(session("c"))).unwrap();
        keys.create(session("gone")).unwrap();
        keys.destroy("", "gone").unwrap();
        assert_eq!((rows(&house, "agent_key", "builder/1", 1), rows(&house, "agent_kid", "builder/1", 1)), (4, 2));
        // The token destroys nothing for now: what is there counts in the next epoch, too.
        house.shim().tell("fail C_DestroyObject rv=0x06 count=all");
        agent.quarantine().ok();
        assert_eq!(ended(&house), []);
        agent.release().ok();
        agent.attest(&[]).ok();
        let mut keys = house.keys(&Identity::of(&agent));
        until("the objects were not ended", || ended(&house) == [KeyOver::Epoch; 2]);
        refused(keys.create(resident("a")), "KEYS_TOO_MANY");
        house.shim().tell("clear");
        // Names are free in every epoch.
        until("no room was made", || keys.create(resident("a")).is_ok());
        until("rows are left", || rows(&house, "agent_key", "builder/1", 1) == 0);
        assert_eq!((rows(&house, "agent_kid", "builder/1", 1), rows(&house, "resident_key", "builder/1", 1)), (0, 0));
        assert_eq!(rows(&house, "agent_key", "builder/1", 2), 1);
        keys.sign("a", digest(b"x")).unwrap();
    }
    no_strays(&house);
    house.restart();
    no_strays(&house);
    let entries = house.stopped_entries();
    let forgotten = entries.iter().filter_map(|body| match body {
        Body::AgentKeysForgotten(gone) => Some(gone.names.clone()),
        _ => None,
    });
    let mut names: Vec<String> = forgotten.flatten().collect();
    names.sort();
    assert_eq!(names, ["a", "b", "c", "gone"]);
    house.verify().ok();
}

#[test]
fn a_resident_key_that_has_expired_leaves_the_token_and_may_be_rotated_all_the_same() {
    let limits = "ttl_seconds_default = 86400\nresident_keys_per_agent = 2";
    let mut house = House::new().configured("limits", limits).with_preload().initialised();
    house.serve();
    {
        // The connection stays: the tests' own clock does not move.
        let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
        keys.create(CreateKeyRequest { ttl_seconds: 60, ..resident("short") }).unwrap();
        keys.create(resident("long")).unwrap();
        house.control().move_clock(2 * 3_600_000);
        house.keyward(&["clock", "accept", "--reason", "hours pass"]).ok();
        until("it stays in the token", || ended(&house) == [KeyOver::Expired]);
        refused(keys.sign("short", digest(b"x")), "KEY_EXPIRED");
        keys.sign("long", digest(b"x")).unwrap();
        until("its object stays", || rows(&house, "resident_key", "builder/1", 1) == 1);
        // Its place is free, and another's then.
        keys.create(resident("third")).unwrap();
        refused(keys.rotate("short", 1), "KEYS_TOO_MANY");
        keys.rotate("long", 1).unwrap();
        keys.destroy("", "third").unwrap();
        keys.rotate("short", 1).unwrap();
        keys.sign("short", digest(b"x")).unwrap();
    }
    no_strays(&house);
    house.stop_and_verify();
}

#[test]
fn the_resident_keys_of_an_agent_that_cannot_come_back_leave_the_token_and_what_they_signed_verifies() {
    let mut house = House::new().configured("limits", "rejoin_seconds_default = 0").with_preload().initialised();
    house.serve();
    {
        // The reader's connection stays: the tests' own clock does not move.
        let reader = house.agent("builder/2");
        reader.enrol(&["--ttl", "1d"]).ok();
        reader.attest(&["--ttl", "1d"]).ok();
        let mut reader = house.keys(&Identity::of(&reader));
        reader.list("").unwrap();
        let signed = {
            let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
            let for_jws = |wish: CreateKeyRequest| CreateKeyRequest { purpose: KeyPurpose::Jws.into(), ..wish };
            keys.create(for_jws(resident("long"))).unwrap();
            keys.create(CreateKeyRequest { ttl_seconds: 60, ..for_jws(session("short")) }).unwrap();
            keys.jws("long", "{}").unwrap()
        };
        house.control().move_clock(2 * 3_600_000);
        house.keyward(&["clock", "accept", "--reason", "hours pass"]).ok();
        until("it stays in the token", || ended(&house) == [KeyOver::Agent]);
        until("what expired is kept", || rows(&house, "agent_key", "builder/1", 1) == 1);
        let message = verify_request::Message::Jws(verify_request::Jws { token: signed, ..Default::default() });
        let asked = VerifyRequest { agent: String::new(), message: Some(message) };
        assert_eq!(reader.verify(asked).unwrap().agent, "builder/1");
    }
    no_strays(&house);
    house.stop_and_verify();
}

#[test]
fn a_key_that_is_forgotten_signs_no_more_when_the_clock_is_set_back() {
    let mut house = House::new().configured("limits", "rejoin_seconds_default = 0").with_preload().initialised();
    house.serve();
    {
        // The connection stays: the tests' own clock does not move.
        let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
        let before = keys.create(CreateKeyRequest { ttl_seconds: 600, ..wish("a") }).unwrap();
        keys.sign("a", digest(b"x")).unwrap();
        let set = |hours: i64| {
            house.control().move_clock(hours * 3_600_000);
            house.keyward(&["clock", "accept", "--reason", "hours pass"]).ok();
        };
        set(3);
        until("its row is kept", || rows(&house, "agent_key", "builder/1", 1) == 0);
        set(0);
        refused(keys.sign("a", digest(b"x")), "KEY_NOT_FOUND");
        let again = keys.create(wish("a")).unwrap();
        assert_ne!(before.versions[0].kid, again.versions[0].kid);
        keys.sign("a", digest(b"x")).unwrap();
    }
    no_strays(&house);
    assert_eq!(house.stop(), 0);
}

#[test]
fn by_a_version_that_has_expired_and_by_a_destroyed_key_nobody_is_named_any_more() {
    let house = House::serving();
    let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
    let for_jws = |name: &str| CreateKeyRequest { purpose: KeyPurpose::Jws.into(), ..wish(name) };
    keys.create(CreateKeyRequest { ttl_seconds: 1, ..for_jws("a") }).unwrap();
    keys.create(for_jws("b")).unwrap();
    assert_eq!(rows(&house, "agent_kid", "builder/1", 1), 2);
    // Its life is what is tested: time must pass.
    thread::sleep(Duration::from_millis(1200));
    keys.rotate("a", 1).unwrap();
    assert_eq!(rows(&house, "agent_kid", "builder/1", 1), 2, "the new version's, and the other key's");
    keys.rotate("b", 1).unwrap();
    assert_eq!(rows(&house, "agent_kid", "builder/1", 1), 3);
    keys.destroy("", "b").unwrap();
    assert_eq!(rows(&house, "agent_kid", "builder/1", 1), 1);
    refused(keys.create(for_jws("b")), "KEY_EXISTS");
}

/// What a key is tried with begins so.
const TAG: &[u8] = b"keyward/";

#[test]
fn beside_what_is_in_the_book_an_agents_key_signs_trials_and_nothing_else() {
    let mut house = House::new().with_shim().initialised().served();
    let sign = |keys: &mut Keys, storage: KeyStorage| {
        let name = storage.as_str_name().to_lowercase().replace('_', "-");
        let wish = CreateKeyRequest {
            storage: storage.into(),
            purpose: KeyPurpose::Jws.into(),
            algorithm: KeyAlgorithm::Ed25519.into(),
            accounting: KeyAccounting::Counted.into(),
            ..wish(&name)
        };
        keys.create(wish).unwrap();
        for number in 0..5 {
            keys.jws(&name, &number.to_string()).unwrap();
        }
    };
    {
        let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
        for storage in [KeyStorage::Session, KeyStorage::Wrapped, KeyStorage::Resident] {
            sign(&mut keys, storage);
        }
        keys.rotate("key-storage-resident", 1).unwrap();
        keys.jws("key-storage-resident", "6").unwrap();
    }
    house.restart();
    {
        let mut keys = house.keys(&Identity::of(&house.agent("builder/1")));
        keys.jws("key-storage-resident", "7").unwrap();
        keys.jws("key-storage-wrapped", "8").unwrap();
    }
    let entries = house.stopped_entries();
    let hex = |bytes: &[u8]| bytes.iter().map(|byte| format!("{byte:02x}")).collect::<String>();
    let mut reserved = std::collections::BTreeMap::<u64, (String, u64)>::new();
    let mut versions = std::collections::BTreeSet::new();
    for (index, body) in (0..).zip(&entries) {
        match body {
            Body::AgentKeyCreated(created) => drop(versions.insert(hex(&created.version.as_ref().unwrap().key_id))),
            Body::AgentKeyRotated(rotated) => drop(versions.insert(hex(&rotated.version.as_ref().unwrap().key_id))),
            Body::SignaturesReserved(block) => drop(reserved.insert(index, (hex(&block.key_id), block.count))),
            Body::SignaturesSealed(sealed) => reserved.get_mut(&sealed.reservation).unwrap().1 = sealed.used,
            _ => {}
        }
    }
    assert_eq!(versions.len(), 4);
    let made = house.signatures().made;
    for key in &versions {
        let of = made.iter().filter(|((by, _), _)| by == key);
        let (trials, signed): (Vec<_>, Vec<_>) = of.partition(|((_, data), _)| data.starts_with(&hex(TAG)));
        let count = |some: &[(_, &usize)]| some.iter().map(|(_, count)| **count as u64).sum::<u64>();
        let booked: u64 = reserved.values().filter(|(by, _)| by == key).map(|(_, count)| count).sum();
        assert!(count(&signed) >= 1 && count(&signed) <= booked, "{key}: {} signed, {booked} in the book", count(&signed));
        // When it is made, when each daemon uses it first.
        assert!(count(&trials) <= 3, "{key} was tried {} times", count(&trials));
    }
    house.verify().ok();
}

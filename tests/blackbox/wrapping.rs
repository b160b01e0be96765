//! The key that agents' keys are wrapped under is replaced: no agent notices, and what it wrapped is wrapped anew.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use keyward::ledger::{Reader, StoredKey};
use keyward::model::Digest;
use keyward::proto::get_jwks_request::Of;
use keyward::proto::{CreateKeyRequest, KeyAlgorithm, KeyPurpose, KeyStorage, VerifyRequest, verify_request};

use crate::house::keys::{Keys, digest, lives, wish};
use crate::house::wire::{Identity, refused};
use crate::house::{Body, DEADLINE, House};
use crate::instruments;
use crate::rotate::{become_states, generations, later, nothing_is_left_over, rotate, states};

/// More than one entry tells of.
const MANY: usize = 140;

/// Whether the token can wrap; where it cannot, there is nothing to rotate.
fn wraps() -> bool {
    lives(KeyStorage::Wrapped) == KeyStorage::Wrapped
}

fn served_with(rotation: &str) -> House {
    let house =
        House::new().configured("rotation", rotation).configured("limits", "keys_cached = 16\nkey_changes_per_second = 1000");
    let mut house = house.with_preload().initialised();
    house.serve();
    house
}

fn name(number: usize) -> String {
    format!("key-{number}")
}

fn make(keys: &mut Keys, count: usize) {
    for number in 0..count {
        let made = keys.create(wish(&name(number))).unwrap();
        assert_eq!(made.versions[0].storage(), KeyStorage::Wrapped);
    }
}

/// Each signs, also those that no cache has.
fn all_sign(keys: &mut Keys, count: usize) {
    for number in 0..count {
        keys.sign(&name(number), digest(b"still there")).unwrap();
    }
}

/// Of each page of keys one.
fn some_sign(keys: &mut Keys) {
    for number in (0..MANY).step_by(29) {
        keys.sign(&name(number), digest(b"still there")).unwrap();
    }
}

/// The rows of all keys, each held against the entries that tell of it.
fn rows_as_the_book_has_them(house: &House) -> Vec<StoredKey> {
    let mut told = HashMap::new();
    for body in house.ended_entries() {
        match body {
            Body::AgentKeyCreated(proto) => {
                told.extend(proto.version.map(|one| (one.key_id, (one.wrapped_sha256, one.wrapping_key_id))))
            }
            Body::AgentKeyRotated(proto) => {
                told.extend(proto.version.map(|one| (one.key_id, (one.wrapped_sha256, one.wrapping_key_id))))
            }
            Body::AgentKeysRewrapped(rewrapped) => {
                for one in rewrapped.versions {
                    let wrapping = if one.wrapped_sha256.is_empty() { Vec::new() } else { rewrapped.wrapping_key_id.clone() };
                    told.insert(one.key_id, (one.wrapped_sha256, wrapping)).expect("of a version that was told of");
                }
            }
            _ => {}
        }
    }
    let rows = Reader::open(&house.state().join("keyward.db")).unwrap().all_agent_keys(None, 10_000).unwrap();
    for version in rows.iter().flat_map(|key| &key.versions) {
        let (digest, wrapping) = &told[version.key_id.0.as_slice()];
        let found = version.wrapped.as_ref().map(|(blob, wrapping)| (Digest::of(blob).0.to_vec(), wrapping.0.to_vec()));
        assert_eq!(found.unwrap_or_default(), (digest.clone(), wrapping.clone()));
    }
    rows
}

/// How many keys are wrapped under a wrapping key, by its id in hexadecimal.
fn count_under(rows: &[StoredKey], wrapping: &str) -> usize {
    let under =
        |key: &&StoredKey| key.versions.iter().any(|one| one.wrapped.as_ref().is_some_and(|(_, by)| by.to_string() == wrapping));
    rows.iter().filter(under).count()
}

#[test]
fn a_wrapping_key_is_replaced_while_agents_sign_and_make_keys_and_no_call_fails() {
    if !wraps() {
        return;
    }
    let mut house = served_with("destroy_days = 0");
    let first = generations(&house, "wrapping");
    assert_eq!(first.len(), 1);
    {
        let identities: Vec<_> = ["builder/1", "builder/2"].map(|agent| Identity::of(&house.attested(agent))).into();
        for identity in &identities {
            make(&mut house.keys(identity), MANY);
        }
        let (over, signed) = (AtomicBool::new(false), AtomicUsize::new(0));
        thread::scope(|scope| {
            for identity in &identities {
                let (house, over, signed) = (&house, &over, &signed);
                scope.spawn(move || {
                    let mut keys = house.keys(identity);
                    for number in (0..MANY).cycle() {
                        keys.sign(&name(number), digest(b"under load")).unwrap();
                        signed.fetch_add(1, Ordering::Relaxed);
                        if over.load(Ordering::Relaxed) {
                            break;
                        }
                    }
                });
                scope.spawn(move || {
                    let mut keys = house.keys(identity);
                    for number in 0.. {
                        keys.create(wish(&format!("late-{number}"))).unwrap();
                        if over.load(Ordering::Relaxed) || number == 500 {
                            break;
                        }
                    }
                });
            }
            for _ in 0..2 {
                let before = signed.load(Ordering::Relaxed);
                rotate(&house, "wrapping").ok();
                become_states(&house, "wrapping", &["active"]);
                assert!(signed.load(Ordering::Relaxed) > before, "nobody signed meanwhile");
            }
            over.store(true, Ordering::Relaxed);
        });
        for identity in &identities {
            all_sign(&mut house.keys(identity), MANY);
        }
    }
    nothing_is_left_over(&house);
    let last = generations(&house, "wrapping");
    assert_ne!(first, last);
    house.restart();
    {
        let agent = house.agent("builder/1");
        all_sign(&mut house.keys(&Identity::of(&agent)), MANY);
    }
    let entries = house.stopped_entries();
    assert!(!entries.iter().any(|body| matches!(body, Body::Refused(_))), "nobody was refused");
    let told = entries.iter().filter(|body| matches!(body, Body::AgentKeysRewrapped(_))).count();
    assert!((6..200).contains(&told), "{told} entries");
    let rows = rows_as_the_book_has_them(&house);
    assert!(rows.len() > 2 * MANY);
    assert_eq!(count_under(&rows, &last[0].0), rows.len());
    house.verify().ok();
}

/// As after a restore of an agents' token that is older than the wrapping key.
#[test]
fn a_wrapping_key_that_the_token_has_lost_is_told_and_an_operator_makes_another() {
    if !wraps() {
        return;
    }
    let mut house = served_with("");
    let agent = Identity::of(&house.attested("builder/1"));
    make(&mut house.keys(&agent), 10);
    let lost = generations(&house, "wrapping")[0].0.clone();
    assert_eq!(house.stop(), 0);
    instruments::destroy_secret(&house, "agents", &instruments::unhex(&lost));
    house.serve();
    let mut keys = house.keys(&agent);
    refused(keys.sign(&name(0), digest(b"under what is gone")), "KEY_LOST");
    let told = refused(keys.create(wish("new")), "HSM_REFUSED");
    assert!(told.message.contains("keyward ca rotate wrapping --now"), "{told:?}");
    rotate(&house, "wrapping").ok();
    let until = Instant::now() + DEADLINE;
    while generations(&house, "wrapping")[0].1 != "active" || generations(&house, "wrapping")[0].0 == lost {
        assert!(Instant::now() < until, "{:?}", generations(&house, "wrapping"));
        thread::sleep(Duration::from_millis(100));
    }
    keys.create(wish("new")).unwrap();
    keys.sign("new", digest(b"under another")).unwrap();
    keys.rotate(&name(0), 1).unwrap();
    keys.sign(&name(0), digest(b"under another")).unwrap();
    // What is lost for good holds nothing up: what can be replaced is, though it comes after them.
    let second = generations(&house, "wrapping")[0].0.clone();
    house.keyward(&["ca", "taint", &second, "--reason", "a copy was made", "--yes"]).ok();
    let until = Instant::now() + DEADLINE;
    while keys.show("new").unwrap().versions[0].number == 1 {
        assert!(Instant::now() < until, "what may be in other hands still signs");
        thread::sleep(Duration::from_millis(100));
    }
    keys.sign("new", digest(b"under a third")).unwrap();
    // Nor does what stays under it keep the next wrapping key from coming.
    let third = generations(&house, "wrapping")[0].clone();
    assert_eq!(third.1, "active");
    rotate(&house, "wrapping").ok();
    let until = Instant::now() + DEADLINE;
    while !generations(&house, "wrapping").iter().any(|(id, state)| *id == third.0 && state == "retired") {
        assert!(Instant::now() < until, "{:?}", generations(&house, "wrapping"));
        thread::sleep(Duration::from_millis(100));
    }
    keys.sign("new", digest(b"under a fourth")).unwrap();
    assert!(generations(&house, "wrapping").contains(&(lost.clone(), "retiring".into())));
    // Who does not want to wait for the agents gives up what is under it.
    refused(keys.sign(&name(1), digest(b"under what is gone")), "KEY_LOST");
    house.keyward(&["ca", "taint", &lost, "--reason", "it is gone", "--yes"]).ok();
    let until = Instant::now() + DEADLINE;
    while (1..10).any(|number| keys.show(&name(number)).unwrap().versions[0].number == 1) {
        assert!(Instant::now() < until, "what cannot sign is not replaced");
        thread::sleep(Duration::from_millis(100));
    }
    keys.sign(&name(1), digest(b"under a fourth")).unwrap();
    // Each pass met it, with nine keys under it.
    assert_eq!(house.log().matches("has not this wrapping key").count(), 1);
}

#[test]
fn a_replaced_wrapping_key_stays_for_as_long_as_a_backup_may_need_it() {
    if !wraps() {
        return;
    }
    let mut house = served_with("jitter_seconds = 0");
    make(&mut house.keys(&Identity::of(&house.attested("builder/1"))), 3);
    let old = generations(&house, "wrapping")[0].0.clone();
    rotate(&house, "wrapping").ok();
    become_states(&house, "wrapping", &["active", "retired"]);
    later(&house, 6 * 86_400);
    assert_eq!(states(&house, "wrapping"), ["active", "retired"]);
    later(&house, 7 * 86_400 + 60);
    become_states(&house, "wrapping", &["active"]);
    nothing_is_left_over(&house);
    // And by age, by itself; by then none of the keys may sign, and none is kept.
    later(&house, 373 * 86_400);
    become_states(&house, "wrapping", &["active", "retired"]);
    assert_eq!(house.stop(), 0);
    let rows = rows_as_the_book_has_them(&house);
    // Their agent does not come back: the rows go as well, sooner or later.
    assert_eq!(count_under(&rows, &old), 0);
    assert!(rows.iter().all(|key| key.versions[0].wrapped.is_none()), "expired, and kept");
    house.verify().ok();
}

#[test]
fn rewrapping_goes_on_after_a_power_cut_at_any_moment_and_every_key_still_signs() {
    if !wraps() {
        return;
    }
    let mut house = served_with("destroy_days = 0");
    make(&mut house.keys(&Identity::of(&house.attested("builder/1"))), MANY);
    let every = if crate::instruments::slow() { 1 } else { 3 };
    for sync in (2..13).step_by(every) {
        let before = generations(&house, "wrapping");
        house.control().kill_after_sync(sync);
        let asked = rotate(&house, "wrapping").code == 0;
        // Checkpoints sync as well: the daemon comes to that one.
        house.ended();
        house.control().clear();
        house.after_power_cut();
        rows_as_the_book_has_them(&house);
        house.serve();
        become_states(&house, "wrapping", &["active"]);
        assert!(!asked || generations(&house, "wrapping") != before, "acknowledged, and forgotten");
        some_sign(&mut house.keys(&Identity::of(&house.agent("builder/1"))));
        nothing_is_left_over(&house);
    }
    all_sign(&mut house.keys(&Identity::of(&house.agent("builder/1"))), MANY);
    assert_eq!(house.stop(), 0);
    rows_as_the_book_has_them(&house);
    house.verify().ok();
}

#[test]
fn a_daemon_that_is_killed_while_it_rewraps_goes_on_with_what_is_left() {
    if !wraps() {
        return;
    }
    let mut house = served_with("destroy_days = 0");
    make(&mut house.keys(&Identity::of(&house.attested("builder/1"))), MANY);
    rotate(&house, "wrapping").ok();
    let until = Instant::now() + DEADLINE;
    while !house.entries().iter().any(|body| matches!(body, Body::AgentKeysRewrapped(_))) {
        assert!(Instant::now() < until, "nothing is rewrapped");
    }
    house.kill9();
    rows_as_the_book_has_them(&house);
    house.serve();
    become_states(&house, "wrapping", &["active"]);
    all_sign(&mut house.keys(&Identity::of(&house.agent("builder/1"))), MANY);
    nothing_is_left_over(&house);
    assert_eq!(house.stop(), 0);
    rows_as_the_book_has_them(&house);
    house.verify().ok();
}

#[test]
fn a_wrapping_key_whose_making_was_cut_off_is_taken_up_or_given_up_at_the_next_start() {
    if !wraps() {
        return;
    }
    let mut cut = Vec::new();
    // The syncs of a first start: of the logins, of what started, of the key intended, made, taken up.
    for sync in 8..12 {
        let mut house = House::new().with_preload().initialised();
        house.control().kill_after_sync(sync);
        house.start();
        house.ended();
        house.control().clear();
        house.after_power_cut();
        cut.extend(house.ended_entries().last().map(std::mem::discriminant));
        house.serve();
        assert_eq!(states(&house, "wrapping"), ["active"], "killed after sync {sync}");
        make(&mut house.keys(&Identity::of(&house.attested("builder/1"))), 1);
        nothing_is_left_over(&house);
        house.stop_and_verify();
    }
    for wanted in [Body::KeyIntended(Default::default()), Body::KeyActivated(Default::default())] {
        assert!(cut.contains(&std::mem::discriminant(&wanted)), "not cut off after {wanted:?}: other syncs come before");
    }
}

#[test]
fn what_was_ever_under_a_tainted_wrapping_key_is_replaced_at_once_and_verifies_no_more() {
    if !wraps() {
        return;
    }
    let mut house = served_with("jitter_seconds = 0");
    let identity = Identity::of(&house.attested("builder/1"));
    let for_jws = |name: &str| CreateKeyRequest { purpose: KeyPurpose::Jws.into(), ..wish(name) };
    let mut keys = house.keys(&identity);
    for name in ["signs", "rotated", "disabled"] {
        keys.create(for_jws(name)).unwrap();
    }
    let resident = CreateKeyRequest { storage: KeyStorage::Resident.into(), ..for_jws("resident") };
    let spared = keys.create(resident).unwrap().versions[0].kid.clone();
    let message = keys.jws("signs", "{}").unwrap();
    let tainted = generations(&house, "wrapping")[0].0.clone();
    rotate(&house, "wrapping").ok();
    become_states(&house, "wrapping", &["active", "retired"]);
    // One that never was under it, over one that was.
    keys.rotate("rotated", 1).unwrap();
    keys.disable("", "disabled").unwrap();
    let newer = keys.show("rotated").unwrap().versions.iter().map(|one| one.kid.clone()).collect::<Vec<_>>();
    let of = || Of::Agent("builder/1".into());
    assert_eq!(keys.kids(of()).unwrap().len(), 5);
    let verify = |keys: &mut Keys| {
        let jws = verify_request::Jws { token: message.clone(), ..verify_request::Jws::default() };
        keys.verify(VerifyRequest { agent: String::new(), message: Some(verify_request::Message::Jws(jws)) })
    };
    verify(&mut keys).unwrap();
    house.keyward(&["ca", "pause", "--reason", "even then"]).ok();
    house.keyward(&["ca", "taint", &tainted[..8], "--reason", "a backup was read", "--yes"]).ok();
    become_states(&house, "wrapping", &["active"]);
    let kids = keys.kids(of()).unwrap();
    let shown = keys.show("signs").unwrap();
    let signs = &shown.versions.iter().find(|one| one.number == 2).expect("a version instead of it").kid;
    let rotated = newer.iter().find(|kid| kids.contains(kid)).expect("the newer one");
    let mut expected = vec![signs.clone(), rotated.clone(), spared];
    let mut found = kids;
    expected.sort();
    found.sort();
    assert_eq!(found, expected, "what is exposed is published no more");
    refused(verify(&mut keys), "KID_UNKNOWN");
    let again = keys.jws("signs", "{}").unwrap();
    assert_ne!(message, again);
    keys.jws("rotated", "{}").unwrap();
    keys.jws("resident", "{}").unwrap();
    refused(keys.sign("disabled", crate::house::keys::payload("{}")), "KEY_DISABLED");
    // The active one, too.
    let active = generations(&house, "wrapping")[0].0.clone();
    house.keyward(&["ca", "taint", &active[..8], "--reason", "and that one", "--yes"]).ok();
    let until = Instant::now() + DEADLINE;
    while generations(&house, "wrapping").iter().any(|(key, _)| *key == active) {
        assert!(Instant::now() < until, "it stays");
        thread::sleep(Duration::from_millis(100));
    }
    let newest = |keys: &mut Keys, name: &str| keys.show(name).unwrap().versions.iter().map(|one| one.number).collect::<Vec<_>>();
    assert_eq!((newest(&mut keys, "signs"), newest(&mut keys, "rotated")), (vec![3], vec![3]));
    keys.jws("signs", "{}").unwrap();
    drop(keys);
    nothing_is_left_over(&house);
    house.restart();
    house.keys(&Identity::of(&house.agent("builder/1"))).jws("signs", "{}").unwrap();
    assert_eq!(house.stop(), 0);
    rows_as_the_book_has_them(&house);
    house.verify().ok();
}

#[test]
fn where_the_token_cannot_wrap_there_is_no_wrapping_key_to_rotate() {
    if wraps() {
        return;
    }
    let house = House::serving();
    assert!(states(&house, "wrapping").is_empty());
    rotate(&house, "wrapping").refused("NO_SUCH_AUTHORITY_HERE");
}

#[test]
fn a_key_that_the_token_does_not_unwrap_holds_up_no_other_and_is_told() {
    if !wraps() {
        return;
    }
    let mut house = served_with("destroy_days = 0");
    make(&mut house.keys(&Identity::of(&house.attested("builder/1"))), 20);
    assert_eq!(house.stop(), 0);
    // A bit of one wrapped key has turned.
    {
        let db = rusqlite::Connection::open(house.state().join("keyward.db")).unwrap();
        let row: Vec<u8> = db.query_row("SELECT row FROM agent_key WHERE name = 'key-3'", [], |row| row.get(0)).unwrap();
        let stored = Reader::open(&house.state().join("keyward.db")).unwrap().all_agent_keys(None, 100).unwrap();
        let key = stored.into_iter().find(|key| key.of.name.to_string() == "key-3").unwrap();
        let blob = key.versions[0].wrapped.clone().unwrap().0;
        let at = row.windows(blob.len()).position(|window| *window == *blob).unwrap();
        let mut damaged = row;
        damaged[at + 20] ^= 1;
        db.execute("UPDATE agent_key SET row = ?1 WHERE name = 'key-3'", [damaged]).unwrap();
    }
    house.serve();
    rotate(&house, "wrapping").ok();
    let until = Instant::now() + DEADLINE;
    while !house.keyward(&["ca", "list"]).ok().stdout.contains("1 keys left") {
        assert!(Instant::now() < until, "{}", house.keyward(&["ca", "list"]).stdout);
        thread::sleep(Duration::from_millis(100));
    }
    assert_eq!(states(&house, "wrapping"), ["active", "retiring"]);
    house.operator_keys().destroy("builder/1", "key-3").unwrap();
    become_states(&house, "wrapping", &["active"]);
    house.stop_and_verify();
}

#[test]
fn rows_that_cannot_be_read_keep_no_tainted_key_from_being_replaced_and_none_from_being_published() {
    if !wraps() {
        return;
    }
    let mut house = served_with("jitter_seconds = 0");
    let for_jws = |name: &str| CreateKeyRequest { purpose: KeyPurpose::Jws.into(), ..wish(name) };
    {
        let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
        for number in 0..20 {
            keys.create(for_jws(&name(number))).unwrap();
        }
    }
    assert_eq!(house.stop(), 0);
    {
        let db = rusqlite::Connection::open(house.state().join("keyward.db")).unwrap();
        // One has lost its end; and before all others there are more than a page that nobody can name.
        let torn = "UPDATE agent_key SET row = substr(row, 1, length(row) - 9) WHERE name = 'key-3'";
        let nobodys = "WITH RECURSIVE number (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM number WHERE n < 100) \
                       INSERT INTO agent_key SELECT '!' || n, 1, '?', 1, 0, x'ff' FROM number";
        assert_eq!((db.execute(torn, []).unwrap(), db.execute(nobodys, []).unwrap()), (1, 100));
    }
    house.serve();
    {
        let mut keys = house.keys(&Identity::of(&house.agent("builder/1")));
        assert_eq!(keys.kids(Of::Agent("builder/1".into())).unwrap().len(), 19);
        assert_eq!(keys.kids(Of::Class("builder".into())).unwrap().len(), 19);
        let tainted = generations(&house, "wrapping")[0].0.clone();
        house.keyward(&["ca", "taint", &tainted[..8], "--reason", "a backup was read", "--yes"]).ok();
        let until = Instant::now() + DEADLINE;
        while !house.keyward(&["ca", "list"]).ok().stdout.contains("1 keys left") {
            assert!(Instant::now() < until, "{}", house.keyward(&["ca", "list"]).stdout);
            thread::sleep(Duration::from_millis(100));
        }
        for number in (0..20).filter(|number| *number != 3) {
            assert_eq!(keys.show(&name(number)).unwrap().versions.last().unwrap().number, 2);
            keys.jws(&name(number), "{}").unwrap();
        }
        refused(keys.jws("key-3", "{}"), "KEY_NOT_AS_RECORDED");
        assert!(house.log().contains("key key-3: its row names no entry"), "an operator hears of it");
        house.operator_keys().destroy("builder/1", "key-3").unwrap();
        become_states(&house, "wrapping", &["active"]);
        refused(keys.jws("key-3", "{}"), "KEY_NOT_AS_RECORDED");
        assert_eq!(keys.kids(Of::Agent("builder/1".into())).unwrap().len(), 19);
    }
    house.stop_and_verify();
}

#[test]
fn who_has_rsa_keys_made_all_the_time_keeps_no_tainted_key_from_being_replaced() {
    if !wraps() {
        return;
    }
    // As many keys of the greedy one as a pass would bear to fail.
    const RSA: usize = 8;
    let mut house = served_with("jitter_seconds = 0");
    let (greedy, other) = (Identity::of(&house.attested("builder/1")), Identity::of(&house.attested("builder/2")));
    let rsa = |name: &str| CreateKeyRequest { algorithm: KeyAlgorithm::Ps256.into(), ..wish(name) };
    let first = house.keys(&greedy).create(rsa(&name(0))).unwrap();
    if first.versions[0].storage() == KeyStorage::Wrapped {
        for number in 1..RSA {
            house.keys(&greedy).create(rsa(&name(number))).unwrap();
        }
        make(&mut house.keys(&other), 1);
        let over = AtomicBool::new(false);
        thread::scope(|scope| {
            scope.spawn(|| {
                let mut keys = house.keys(&greedy);
                for number in 0.. {
                    // Refused or not: asked again at once.
                    if keys.create(rsa(&format!("more-{number}"))).is_ok() {
                        keys.destroy("", &format!("more-{number}")).ok();
                    }
                    if over.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
            let tainted = generations(&house, "wrapping")[0].0.clone();
            house.keyward(&["ca", "taint", &tainted[..8], "--reason", "a backup was read", "--yes"]).ok();
            let mut keys = house.keys(&other);
            let until = Instant::now() + DEADLINE;
            let replaced = loop {
                let newest = keys.show(&name(0)).unwrap().versions.iter().map(|one| one.number).max();
                if newest == Some(2) || Instant::now() > until {
                    break newest;
                }
                thread::sleep(Duration::from_millis(100));
            };
            over.store(true, Ordering::Relaxed);
            assert_eq!(replaced, Some(2), "another agent's key waits for the greedy one's");
        });
        let mut keys = house.keys(&greedy);
        for number in 0..RSA {
            assert_eq!(keys.show(&name(number)).unwrap().versions.last().unwrap().number, 2);
        }
    }
    house.stop_and_verify();
}

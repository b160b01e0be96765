//! Rows that somebody else has changed are believed by no start, and what keyward itself has written always is.

use rusqlite::Connection;

use super::*;
use crate::ledger::Ledger;
use crate::ledger::store::Store;
use crate::ledger::tests::{House, in_force, stepped};
use crate::ledger::verify::Verifier;
use crate::proto;

/// What a start makes of the file as it is.
fn held(house: &House) -> Result<(), StoreError> {
    let mut store = Store::open(&house.file()).unwrap();
    let mut generations = store.generations()?;
    store.hold(&mut generations)
}

/// What `keyward ledger verify` says of the rows; of random bytes as certificates it says more.
fn violations(house: &House) -> i64 {
    let reader = house.ledger.reader();
    let mut verifier = Verifier::new([], false);
    let (size, rows) = reader.authority_rows().unwrap().unwrap();
    verifier.expect_authorities(size, rows);
    reader.entries(0, 1000).unwrap().iter().for_each(|entry| verifier.entry(entry));
    verifier.finish().violations.iter().map(|found| i64::from(found.rule == "authority-row")).sum()
}

fn outside_root(last: u8) -> Vec<u8> {
    [&[0x30; 40][..], &[last; 16]].concat()
}

fn step(house: &House, purpose: Purpose, key: KeyId, to: State, more: impl FnOnce(&mut AuthorityStepped)) {
    let Body::AuthorityStepped(mut step) = stepped(key, to, None) else { unreachable!() };
    step.purpose = purpose.into();
    more(&mut step);
    house.record(Body::AuthorityStepped(step));
}

/// A root with an issuing authority, both replaced; the first issuing authority is destroyed, the first root retired and tainted.
fn rotated(house: &House) {
    let (first, next) = (KeyId([1; 16]), KeyId([2; 16]));
    let (old, new) = (KeyId([3; 16]), KeyId([4; 16]));
    house.record(in_force(Purpose::Ledger, KeyId([9; 16])));
    house.record(Body::AuthorityActivated(AuthorityActivated {
        purpose: Purpose::Root.into(),
        certificate: outside_root(1),
        ..AuthorityActivated::default()
    }));
    house.record(in_force(Purpose::Issuing, old));
    step(house, Purpose::Root, next, State::Prepublished, |step| step.certificate = outside_root(2));
    step(house, Purpose::Root, next, State::Active, |step| step.replaces = first.0.to_vec());
    step(house, Purpose::Issuing, new, State::Planned, |_| {});
    step(house, Purpose::Issuing, new, State::Planned, |step| step.now = true);
    step(house, Purpose::Issuing, new, State::Prepublished, |step| {
        (step.certificate, step.issuer) = (b"DER".to_vec(), next.0.to_vec());
    });
    step(house, Purpose::Issuing, new, State::Active, |step| step.replaces = old.0.to_vec());
    step(house, Purpose::Issuing, old, State::Retired, |_| {});
    step(house, Purpose::Issuing, old, State::Destroyed, |_| {});
    house.record(Body::AuthorityTainted(proto::AuthorityTainted { by: None, key_id: first.0.to_vec() }));
    step(house, Purpose::Root, first, State::Retired, |_| {});
    step(house, Purpose::Issuing, KeyId([5; 16]), State::Planned, |_| {});
    house.record(Body::KeyAbandoned(proto::KeyAbandoned { key_id: vec![5; 16], ..Default::default() }));
    house.record(Body::RotationPaused(proto::RotationPaused { by: Some(Operator { uid: 7, reason: "r".into() }) }));
}

const CHANGES: [&str; 13] = [
    "UPDATE generation SET state = 4 WHERE state = 5",
    "UPDATE generation SET state = 3 WHERE state = 6",
    "INSERT INTO generation VALUES (x'07070707070707070707070707070707', 1, 2, 0, x'07070707070707070707070707070707', NULL, '', 0, 0)",
    "UPDATE generation SET tainted = 0",
    "UPDATE generation SET tainted = 1 WHERE key_id = x'02020202020202020202020202020202'",
    "UPDATE generation SET certificate = x'30' WHERE purpose = 2 AND state = 3",
    "UPDATE generation SET issuer = NULL WHERE purpose = 2 AND state = 3",
    "UPDATE generation SET checkpoint = 'signed' WHERE purpose = 3",
    "UPDATE generation SET now = 0",
    "UPDATE generation SET purpose = 2 WHERE purpose = 3",
    "UPDATE generation SET since_micros = since_micros - 60000000 WHERE state = 3",
    "UPDATE generation SET since_micros = since_micros + 60000000 WHERE state = 3",
    "DELETE FROM generation WHERE state = 5",
];

#[test]
fn a_row_that_the_entries_do_not_amount_to_is_not_believed() {
    let house = House::new(|_| ());
    rotated(&house);
    held(&house).unwrap();
    assert_eq!(violations(&house), 0);
    let db = Connection::open(house.file()).unwrap();
    let forget = format!("DELETE FROM fact WHERE name = '{}'", held::LIST);
    for list in ["", &forget] {
        for change in CHANGES {
            db.execute_batch("CREATE TEMP TABLE kept AS SELECT * FROM generation").unwrap();
            assert!(db.execute(change, []).unwrap() > 0, "{change}");
            db.execute_batch(list).unwrap();
            assert!(matches!(held(&house), Err(StoreError::NotAsRecorded(_))), "{change}");
            assert_eq!(violations(&house), db_changed(&db), "{change}");
            db.execute_batch("DELETE FROM generation; INSERT INTO generation SELECT * FROM kept; DROP TABLE kept").unwrap();
        }
        held(&house).unwrap();
    }
    db.execute("UPDATE fact SET value = x'00' WHERE name = 'rotation_paused'", []).unwrap();
    assert!(matches!(held(&house), Err(StoreError::NotAsRecorded(_))), "an operator holds it up");
}

/// How many rows are not as they were kept.
fn db_changed(db: &Connection) -> i64 {
    let ids = "SELECT count(DISTINCT key_id) FROM (SELECT key_id FROM (SELECT * FROM generation EXCEPT SELECT * FROM kept) \
               UNION SELECT key_id FROM (SELECT * FROM kept EXCEPT SELECT * FROM generation))";
    db.query_row(ids, [], |row| row.get(0)).unwrap()
}

#[test]
fn a_list_that_is_cut_or_foreign_is_made_again_of_all_entries() {
    let house = House::new(|_| ());
    rotated(&house);
    let db = Connection::open(house.file()).unwrap();
    let list = || -> Vec<u8> { db.query_row("SELECT value FROM fact WHERE name = ?1", [held::LIST], |row| row.get(0)).unwrap() };
    let whole = list();
    assert_eq!(whole.len() % 8, 0);
    let first_twice = [&whole[..8], &whole[..]].concat();
    for other in [&whole[..whole.len() - 8 * 6], &whole[..whole.len() - 1], &whole[8..], b"", &first_twice, &[0xff; 8]] {
        db.execute("UPDATE fact SET value = ?2 WHERE name = ?1", rusqlite::params![held::LIST, other]).unwrap();
        held(&house).unwrap();
        assert_eq!(list(), whole);
    }
}

#[test]
fn what_was_decided_by_a_clock_that_was_set_back_is_believed() {
    let house = House::new(|state| {
        let ahead = UnixTime::wall().plus_seconds(86_400).micros();
        let started = Body::Started(proto::Started::default());
        let entry = proto::Entry { index: 1, time_unix_micros: ahead, body: Some(started) };
        Store::open(&Ledger::file(state)).unwrap().commit(1, &[entry.encode_to_vec()], &[], &[]).unwrap();
    });
    house.record(in_force(Purpose::TokenSigning, KeyId([6; 16])));
    let _ = house.ledger.clock().now();
    let deviation_micros = house.ledger.clock().deviation_micros();
    assert!(deviation_micros < -86_000_000_000);
    house.record(Body::ClockAccepted(proto::ClockAccepted { by: None, deviation_micros }));
    house.ledger.clock().accept();
    rotated(&house);
    let (all, _) = house.ledger.generations();
    assert!(all.iter().all(|found| found.since <= UnixTime::wall()), "{all:?}");
    held(&house).unwrap();
    assert_eq!(violations(&house), 0);
}

#[test]
fn an_older_house_has_its_first_ledger_key_and_the_age_of_its_authorities_from_no_entry() {
    let house = House::new(|_| ());
    let key = |id: u8| proto::KeyIntended {
        key_id: vec![id; 16],
        purpose: Purpose::Ledger.into(),
        algorithm: proto::KeyAlgorithm::P256.into(),
        ..Default::default()
    };
    house.record(Body::KeyIntended(key(8)));
    house.record(Body::KeyAbandoned(proto::KeyAbandoned { key_id: vec![8; 16], ..Default::default() }));
    house.record(Body::KeyIntended(key(9)));
    let spki = crate::ledger::tests::key().spki().to_vec();
    house.record(Body::KeyActivated(proto::KeyActivated { key_id: vec![9; 16], spki }));
    held(&house).unwrap();
    house.record(in_force(Purpose::Issuing, KeyId([3; 16])));
    let db = Connection::open(house.file()).unwrap();
    db.execute_batch(
        "DELETE FROM fact;
         UPDATE generation SET since_micros = since_micros + 1000000000000;
         INSERT INTO generation SELECT id, 3, 3, 2000000000000000, x'', NULL, '', 0, 0 FROM hsm_key WHERE state = 'active'",
    )
    .unwrap();
    held(&house).unwrap();
    assert_eq!(violations(&house), 0);
    db.execute("UPDATE generation SET key_id = x'08080808080808080808080808080808' WHERE purpose = 3", []).unwrap();
    assert!(matches!(held(&house), Err(StoreError::NotAsRecorded(_))));
    assert_eq!(violations(&house), 1);
}

#[test]
fn a_pause_that_an_older_file_tells_of_holds() {
    assert_eq!(Pause::read(&[1], &[]), Some(Pause::default()));
    assert_eq!(Pause::read(&[0], &[]), None);
    let pause = Pause { by: Some(Operator { uid: 7, reason: "r".into() }), since: Some(UnixTime::from_seconds(9)) };
    let facts = Pause::rows(Some(&pause)).into_iter().map(|row| match row {
        Row::Fact(_, value) => value,
        other => panic!("{other:?}"),
    });
    let [whether, by] = <[Vec<u8>; 2]>::try_from(facts.collect::<Vec<_>>()).unwrap();
    assert_eq!(Pause::read(&whether, &by), Some(pause));
    assert_eq!(Pause::read(&[0], &by), None, "an older daemon has resumed it");
}

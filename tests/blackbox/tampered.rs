//! Who can write to the ledger's file, but has neither a token's PIN nor a key, gains no key by it.

use keyward::proto::{
    AgentKeyVersion, CreateKeyRequest, KeyPurpose, KeyStorage, Purpose, VerifyRequest, entry::Body, get_jwks_request,
    verify_request,
};
use prost::Message as _;
use rusqlite::{Connection, params};
use std::time::{Duration, Instant};

use crate::house::keys::{digest, wish};
use crate::house::wire::{Identity, refused};
use crate::house::{DEADLINE, House};
use crate::rotate::{become_states, generations, later, nothing_is_left_over, rotate, states};

/// A key's row, as the file has it.
#[derive(Clone, PartialEq, prost::Message)]
struct Row {
    #[prost(int32, tag = "1")]
    purpose: i32,
    #[prost(int32, tag = "2")]
    algorithm: i32,
    #[prost(int32, tag = "3")]
    storage_asked: i32,
    #[prost(int32, tag = "4")]
    accounting: i32,
    #[prost(uint64, tag = "5")]
    signatures_max: u64,
    #[prost(uint32, tag = "6")]
    ttl_seconds: u32,
    #[prost(message, repeated, tag = "7")]
    versions: Vec<Version>,
    #[prost(uint64, optional, tag = "8")]
    created: Option<u64>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct Version {
    #[prost(message, optional, tag = "1")]
    version: Option<AgentKeyVersion>,
    #[prost(bytes = "vec", tag = "2")]
    wrapped: Vec<u8>,
    #[prost(uint64, optional, tag = "5")]
    entry: Option<u64>,
}

fn file(house: &House) -> Connection {
    Connection::open(house.state().join("keyward.db")).unwrap()
}

fn row(db: &Connection, agent: &str, name: &str) -> Row {
    let of = params![agent, name];
    let bytes: Vec<u8> = db.query_row("SELECT row FROM agent_key WHERE agent = ?1 AND name = ?2", of, |row| row.get(0)).unwrap();
    Row::decode(bytes.as_slice()).unwrap()
}

fn write(db: &Connection, agent: &str, name: &str, row: &Row) {
    let of = params![agent, name, row.encode_to_vec()];
    assert_eq!(db.execute("UPDATE agent_key SET row = ?3 WHERE agent = ?1 AND name = ?2", of).unwrap(), 1);
}

fn version(row: &mut Row) -> &mut AgentKeyVersion {
    row.versions[0].version.as_mut().unwrap()
}

type Change = fn(&mut Row, &Row);

/// Each to a key of its own; with the row of somebody else's key at hand.
const CHANGES: [(&str, Change); 15] = [
    ("version", |own, other| own.versions = other.versions.clone()),
    ("version-as-own", |own, other| {
        let entry = own.versions[0].entry;
        own.versions = other.versions.clone();
        own.versions[0].entry = entry;
    }),
    ("version-more", |own, other| {
        own.versions.push(other.versions[0].clone());
        version(own).number = 1;
        own.versions[1].version.as_mut().unwrap().number = 2;
    }),
    ("whole", |own, other| *own = other.clone()),
    ("purpose", |own, _| own.purpose = KeyPurpose::Jws.into()),
    ("budget", |own, _| own.signatures_max = 0),
    ("accounting", |own, _| own.accounting = 2),
    ("life", |own, _| own.ttl_seconds += 1),
    ("expires", |own, _| version(own).expires_unix_seconds += 1),
    ("blob", |own, other| own.versions[0].wrapped = [&other.versions[0].wrapped[..], b"x"].concat()),
    ("blob-wrapping", |own, _| version(own).wrapping_key_id = vec![7; 16]),
    ("storage", |own, _| version(own).storage = KeyStorage::Session.into()),
    ("twice", |own, _| own.versions.push(own.versions[0].clone())),
    ("no-entry", |own, _| own.versions[0].entry = None),
    ("not-made", |own, _| own.created = None),
];

#[test]
fn a_keys_row_that_is_not_what_its_entry_says_signs_nothing() {
    let mut house =
        House::new().configured("limits", "resident_keys_per_agent = 64\nkey_changes_per_second = 1000").initialised().served();
    let limited = |name: &str| CreateKeyRequest { signatures_max: 5, ..wish(name) };
    {
        let (mut own, mut other) =
            (house.keys(&Identity::of(&house.attested("builder/1"))), house.keys(&Identity::of(&house.attested("builder/2"))));
        other.create(limited("other")).unwrap();
        for (name, _) in CHANGES {
            own.create(limited(name)).unwrap();
        }
        own.create(limited("good")).unwrap();
        own.rotate("good", 0).unwrap();
    }
    assert_eq!(house.stop(), 0);
    {
        let db = file(&house);
        let other = row(&db, "builder/2", "other");
        for (name, change) in CHANGES {
            let before = row(&db, "builder/1", name);
            let mut changed = before.clone();
            change(&mut changed, &other);
            // A token that does not wrap gives no blobs to change, and no wrapping keys.
            if changed == before || other.versions[0].wrapped.is_empty() && name.starts_with("blob") {
                continue;
            }
            write(&db, "builder/1", name, &changed);
        }
    }
    house.serve();
    let wraps = !row(&file(&house), "builder/2", "other").versions[0].wrapped.is_empty();
    {
        let mut own = house.keys(&Identity::of(&house.agent("builder/1")));
        own.sign("good", digest(b"x")).unwrap();
        for (name, _) in CHANGES.iter().filter(|(name, _)| wraps || !name.starts_with("blob")) {
            let refusal = refused(own.sign(name, digest(b"x")), "KEY_NOT_AS_RECORDED");
            assert_eq!(refusal.code, tonic::Code::DataLoss, "{name}");
        }
        own.sign("good", digest(b"x")).unwrap();
        // An operator takes it away, and with it nothing of what it was made to look like.
        refused(own.destroy("", "version"), "KEY_NOT_AS_RECORDED");
        assert!(house.operator_keys().destroy("builder/1", "version").unwrap() > 0);
        refused(own.sign("version", digest(b"x")), "KEY_DESTROYED");
        assert!(house.operator_keys().destroy("builder/1", "not-made").unwrap() > 0);
        refused(own.sign("not-made", digest(b"x")), "KEY_NOT_AS_RECORDED");
        refused(own.create(limited("not-made")), "KEY_EXISTS");
        house.keys(&Identity::of(&house.agent("builder/2"))).sign("other", digest(b"x")).unwrap();
    }
    assert!(house.log().contains("a key's row was changed by somebody else"), "an operator hears of it");
    let entries = house.stopped_entries();
    let told = |body: &&Body| matches!(body, Body::Refused(refused) if refused.reason().as_str_name() == "KEY_NOT_AS_RECORDED");
    assert!(entries.iter().filter(told).count() >= 5, "each is an entry, up to five a second");
    house.verify().ok();
}

#[test]
fn a_keys_row_that_is_not_what_its_entry_says_verifies_nothing_and_is_published_nowhere() {
    let mut house = House::serving();
    let for_jws = |name: &str| CreateKeyRequest { purpose: KeyPurpose::Jws.into(), ..wish(name) };
    let mut tokens = Vec::new();
    {
        let (mut own, mut other) =
            (house.keys(&Identity::of(&house.attested("builder/1"))), house.keys(&Identity::of(&house.attested("builder/2"))));
        own.create(for_jws("forged")).unwrap();
        own.create(for_jws("good")).unwrap();
        other.create(for_jws("other")).unwrap();
        tokens.push(other.jws("other", "{}").unwrap());
        tokens.push(own.jws("good", "{}").unwrap());
    }
    assert_eq!(house.stop(), 0);
    {
        // What the other signs is to count as builder/1's.
        let db = file(&house);
        let other = row(&db, "builder/2", "other");
        let kid = &other.versions[0].version.as_ref().unwrap().kid;
        write(&db, "builder/1", "forged", &other);
        let moved = db.execute("UPDATE agent_kid SET agent = 'builder/1', name = 'forged' WHERE kid = ?1", [kid]);
        assert_eq!(moved.unwrap(), 1);
    }
    house.serve();
    let received = |token: &String| VerifyRequest {
        agent: String::new(),
        message: Some(verify_request::Message::Jws(verify_request::Jws { token: token.clone(), ..Default::default() })),
    };
    {
        let mut reader = house.keys(&Identity::of(&house.agent("builder/2")));
        refused(reader.verify(received(&tokens[0])), "KID_UNKNOWN");
        assert_eq!(reader.verify(received(&tokens[1])).unwrap().agent, "builder/1");
        let of = get_jwks_request::Of::Agent("builder/1".to_owned());
        assert_eq!(reader.kids(of).unwrap().len(), 1, "the good one");
        assert_eq!(reader.kids(get_jwks_request::Of::Class("builder".to_owned())).unwrap().len(), 2);
        let told = house.log().matches("a key's row was changed by somebody else").count();
        assert_eq!(told, 1, "once, however often it is met");
    }
    let entries = house.stopped_entries();
    let counted = |body: &&Body| match body {
        Body::RefusalsCounted(sealed) => sealed.counts.iter().any(|one| one.reason().as_str_name() == "KEY_NOT_AS_RECORDED"),
        _ => false,
    };
    assert!(entries.iter().any(|body| counted(&body)), "it is counted in the book");
}

#[test]
fn an_entry_that_was_changed_with_the_row_is_found_by_its_leaf() {
    let mut house = House::serving();
    {
        let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
        keys.create(CreateKeyRequest { signatures_max: 200, ..wish("a") }).unwrap();
        keys.create(wish("b")).unwrap();
        // Its tile is complete then.
        for number in 0_u32..140 {
            keys.sign("b", digest(&number.to_be_bytes())).unwrap();
        }
    }
    assert_eq!(house.stop(), 0);
    {
        let db = file(&house);
        let mut changed = row(&db, "builder/1", "a");
        let index = changed.created.unwrap();
        let bytes: Vec<u8> =
            db.query_row("SELECT bytes FROM entry WHERE idx = ?1", [index.cast_signed()], |row| row.get(0)).unwrap();
        let mut entry = keyward::proto::Entry::decode(bytes.as_slice()).unwrap();
        let Some(Body::AgentKeyCreated(created)) = &mut entry.body else { panic!("{entry:?}") };
        created.signatures_max = 300;
        changed.signatures_max = 300;
        db.execute("UPDATE entry SET bytes = ?2 WHERE idx = ?1", params![index.cast_signed(), entry.encode_to_vec()]).unwrap();
        write(&db, "builder/1", "a", &changed);
    }
    house.serve();
    {
        let mut keys = house.keys(&Identity::of(&house.agent("builder/1")));
        refused(keys.sign("a", digest(b"x")), "KEY_NOT_AS_RECORDED");
        keys.sign("b", digest(b"x")).unwrap();
    }
    assert_eq!(house.stop(), 0);
    house.verify().exits(6);
}

/// Of each of so many keys, by a start or by the round.
#[track_caller]
fn told_of(house: &House, what: &str, times: usize) {
    let until = Instant::now() + DEADLINE;
    while house.log().matches(what).count() < times {
        assert!(Instant::now() < until, "{what}, of fewer than {times}");
        std::thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(house.log().matches(what).count(), times, "each once");
}

#[test]
fn no_row_makes_a_start_destroy_a_key() {
    let mut house = House::serving();
    {
        let mut keys = house.keys(&Identity::of(&house.attested("builder/1")));
        keys.create(CreateKeyRequest { storage: KeyStorage::Resident.into(), ..wish("resident") }).unwrap();
        keys.create(wish("other")).unwrap();
    }
    // Those of the authorities, the canaries, an agent; in the second state no daemon finds its authorities' and canaries'.
    let agents = [Purpose::Agent, Purpose::Wrapping].map(|purpose| purpose as i32);
    for (state, told, agents_alone) in [("intended", "is not one in the making", false), ("destroying", "has not ended", true)] {
        assert_eq!(house.stop(), 0);
        let change = "UPDATE hsm_key SET state = ?1 WHERE state = 'active' AND (NOT ?2 OR purpose IN (?3, ?4))";
        let made = file(&house).execute(change, params![state, agents_alone, agents[0], agents[1]]).unwrap();
        assert!(made >= if agents_alone { 2 } else { 7 }, "{made}");
        // More than an agent may have.
        let made_up = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 17) INSERT INTO hsm_key \
                       (id, purpose, algorithm, token, state) SELECT CAST('made up ' || (1000000 + i) || '0' AS BLOB), 7, 1, 2, ?1 FROM n";
        let made = made + file(&house).execute(made_up, [state]).unwrap();
        house.serve();
        {
            let agent = house.agent("builder/1");
            agent.renew().ok();
            let mut keys = house.keys(&Identity::of(&agent));
            keys.sign("resident", digest(b"x")).unwrap();
            keys.sign("other", digest(b"x")).unwrap();
            told_of(&house, told, made);
            // Odd rows keep nobody from making one.
            keys.create(CreateKeyRequest { storage: KeyStorage::Resident.into(), ..wish(state) }).unwrap();
        }
        assert_eq!(house.stop(), 0);
        file(&house).execute("DELETE FROM hsm_key WHERE CAST(id AS TEXT) LIKE 'made up %'", []).unwrap();
        file(&house).execute("UPDATE hsm_key SET state = 'active' WHERE state = ?1", [state]).unwrap();
        house.serve();
    }
    // A row that lies under the running daemon is not believed by its round, either.
    let of_resident = "UPDATE hsm_key SET state = ?1 WHERE state = ?2 AND purpose = 7";
    let told = house.log().matches("has not ended").count();
    let there = file(&house).execute(of_resident, ["destroying", "active"]).unwrap();
    told_of(&house, "has not ended", told + there);
    {
        let mut keys = house.keys(&Identity::of(&house.agent("builder/1")));
        keys.sign("resident", digest(b"x")).unwrap();
        // One that did end is destroyed, as it is said by an entry.
        keys.destroy("", "destroying").unwrap();
    }
    assert_eq!(house.stop(), 0);
    file(&house).execute(of_resident, ["active", "destroying"]).unwrap();
    house.serve();
    nothing_is_left_over(&house);
    let entries = house.stopped_entries();
    assert!(!entries.iter().any(|body| matches!(body, Body::KeyAbandoned(_))));
    house.verify().ok();
}

/// The keys of tokens in the bundle.
fn of_tokens(house: &House) -> Vec<String> {
    let set = house.keyward(&["bundle", "show", "--jwks"]).ok().json();
    let keys = set["keys"].as_array().unwrap().iter().filter(|key| key["use"] == "jwt-svid");
    keys.map(|key| key["kid"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn a_row_puts_no_key_into_the_bundle_and_takes_none_out() {
    let mut house = House::new().with_preload().initialised().served();
    let mine = rcgen::PublicKeyData::subject_public_key_info(&rcgen::KeyPair::generate().unwrap());
    let write = |house: &House, id: &str| {
        let changed = file(house).execute("UPDATE hsm_key SET spki = ?1 WHERE hex(id) = upper(?2)", params![mine, id]);
        assert_eq!(changed.unwrap(), 1);
    };
    let first = of_tokens(&house);
    // Under the daemon: its own is in its hands.
    write(&house, &generations(&house, "token-signing")[0].0);
    rotate(&house, "token-signing").ok();
    assert_eq!(states(&house, "token-signing"), ["prepublished", "active"]);
    let both = of_tokens(&house);
    assert_eq!((both.len(), &both[0]), (2, &first[0]));
    later(&house, 901);
    become_states(&house, "token-signing", &["active", "retiring"]);
    // Before a start: it is not bound, and what it signed verifies.
    house.restart();
    assert!(house.log().contains("a key that is not active cannot be used"));
    assert_eq!(of_tokens(&house), [both[1].clone(), both[0].clone()]);
    // And at a look after that.
    rotate(&house, "issuing").ok();
    assert_eq!(of_tokens(&house), [both[1].clone(), both[0].clone()]);
    house.stop_and_verify();
}

/// Each to the rows of the authorities, in a house with an issuing authority that is retired and one that is tainted.
const AUTHORITY_CHANGES: [&str; 5] = [
    "UPDATE generation SET state = 4 WHERE state = 5",
    "INSERT INTO generation SELECT substr(certificate, -16), 1, 2, since_micros, certificate, NULL, '', 0, 0 FROM generation \
     WHERE purpose = 1",
    "UPDATE generation SET tainted = 0 WHERE tainted = 1",
    "UPDATE generation SET certificate = (SELECT certificate FROM generation WHERE purpose = 1) WHERE purpose = 2 AND state = 3",
    "DELETE FROM generation WHERE state = 5",
];

#[test]
fn a_row_of_an_authority_that_is_not_what_the_entries_say_stops_the_daemon_and_shows_in_ledger_verify() {
    let mut house = House::new().with_preload().initialised().served();
    rotate(&house, "issuing").ok();
    become_states(&house, "issuing", &["active", "retiring"]);
    later(&house, 90_000);
    become_states(&house, "issuing", &["active", "retired"]);
    let active = generations(&house, "token-signing").remove(0).0;
    house.keyward(&["ca", "taint", &active, "--reason", "a test", "--yes"]).ok();
    become_states(&house, "token-signing", &["active", "retiring"]);
    house.restart();
    assert_eq!(house.stop(), 0);
    house.verify().ok();
    let db = file(&house);
    db.execute_batch("CREATE TABLE kept AS SELECT * FROM generation").unwrap();
    for change in AUTHORITY_CHANGES {
        assert!(db.execute(change, []).unwrap() > 0, "{change}");
        house.start();
        assert_eq!(house.ended(), Some(1), "{change}");
        assert!(house.log().contains("the ledger file was tampered with"), "{change}: {}", house.log());
        house.verify().exits(6).says("violations");
        db.execute_batch("DELETE FROM generation; INSERT INTO generation SELECT * FROM kept").unwrap();
    }
    db.execute_batch("DROP TABLE kept").unwrap();
    house.serve();
    house.stop_and_verify();
}

//! Authorities replace themselves: no agent notices, no verifier meets an unknown issuer, nothing is left behind in the token.

use std::collections::BTreeSet;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use keyward::proto::{AuthorityState, CreateKeyRequest, EnrolRequest, Entry, KeyStorage, Purpose, Stopped};
use prost::Message as _;
use rustix::fs::inotify::{self, CreateFlags, WatchFlags};
use x509_parser::prelude::{CertificateRevocationList, FromDer as _};

use crate::crash::Holder;
use crate::house::keys::wish;
use crate::house::wire::{Draft, Identity, refused};
use crate::house::{Body, DEADLINE, House, Output, run};
use crate::init::{FITS, OutsideRoot, awaiting_root};
use crate::instruments;
use crate::ledger::{one_outcome_each, signed_only_what_was_intended};

pub fn rotate(house: &House, purpose: &str) -> Output {
    house.keyward(&["ca", "rotate", purpose, "--now", "--yes"])
}

/// So many seconds have passed since the house was built, as an operator who corrects the clock says.
pub fn later(house: &House, seconds: i64) {
    house.control().move_clock(seconds * 1000);
    house.keyward(&["clock", "accept", "--reason", "hours pass"]).ok();
}

/// The generations of a purpose, by key id and state.
pub fn generations(house: &House, purpose: &str) -> Vec<(String, String)> {
    let all = house.keyward(&["ca", "list", "--format", "json"]).ok().json();
    let text = |one: &serde_json::Value, name: &str| one[name].as_str().unwrap().to_owned();
    let of = |one: &&serde_json::Value| one["purpose"] == purpose;
    all.as_array().unwrap().iter().filter(of).map(|one| (text(one, "key_id"), text(one, "state"))).collect()
}

pub fn states(house: &House, purpose: &str) -> Vec<String> {
    generations(house, purpose).into_iter().map(|(_, state)| state).collect()
}

/// Waits for what the daemon does at one of its next looks.
#[track_caller]
fn comes_about(what: &str, mut is_so: impl FnMut() -> bool) {
    let until = Instant::now() + DEADLINE;
    while !is_so() {
        assert!(Instant::now() < until, "{what}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// The newest checkpoint that is kept.
fn newest_checkpoint(house: &House) -> String {
    let db = rusqlite::Connection::open(house.state().join("keyward.db")).unwrap();
    let note: Vec<u8> = db.query_row("SELECT value FROM fact WHERE name = 'checkpoint'", [], |row| row.get(0)).unwrap();
    String::from_utf8(note).unwrap()
}

/// How many have signed a note: each in a line of its own.
fn signatures_of(note: &str) -> usize {
    note.lines().filter(|line| line.starts_with('\u{2014}')).count()
}

/// Something new is recorded, and a checkpoint that has it comes.
fn next_checkpoint(house: &House, why: &str) -> String {
    let before = newest_checkpoint(house);
    for verb in ["pause", "resume"] {
        house.keyward(&["ca", verb, "--reason", why]).ok();
    }
    comes_about("a checkpoint", || newest_checkpoint(house) != before);
    newest_checkpoint(house)
}

/// Waits until the generations of a purpose are in these states. The daemon looks once a second.
#[track_caller]
pub fn become_states(house: &House, purpose: &str, wanted: &[&str]) {
    let until = Instant::now() + DEADLINE;
    loop {
        let found = states(house, purpose);
        if found == wanted {
            return;
        }
        assert!(Instant::now() < until, "{purpose}: {found:?}, not {wanted:?}");
        thread::sleep(Duration::from_millis(100));
    }
}

/// The token holds exactly the keys that the book knows, and says so itself.
pub fn nothing_is_left_over(house: &House) {
    let mut strays = serde_json::Value::Null;
    // That goes by itself, round by round.
    comes_about("what is being destroyed is gone", || {
        strays = house.keyward(&["hsm", "reconcile", "--format", "json"]).ok().json();
        !strays.to_string().contains("being destroyed")
    });
    assert_eq!(strays, serde_json::json!([]));
}

#[test]
fn an_issuing_authority_is_replaced_under_load_and_no_renewal_fails() {
    let mut house = House::new().configured("limits", "live_certificates_per_agent = 64").with_shim().initialised().served();
    let mut holders: Vec<_> = (0..3).map(|n| Holder::attest(&house, &format!("builder/{n}"))).collect();
    let done = AtomicBool::new(false);
    thread::scope(|scope| {
        for holder in &mut holders {
            let (house, done) = (&house, &done);
            scope.spawn(move || {
                for _ in 0..60 {
                    holder.try_renew(house).unwrap();
                    if done.load(Ordering::Relaxed) {
                        break;
                    }
                }
            });
        }
        for _ in 0..4 {
            rotate(&house, "issuing").ok();
        }
        done.store(true, Ordering::Relaxed);
    });
    assert_eq!(states(&house, "issuing"), ["active", "retiring", "retiring", "retiring", "retiring"]);
    for holder in &mut holders {
        holder.try_renew(&house).unwrap();
    }
    nothing_is_left_over(&house);
    let entries = house.stopped_entries();
    for holder in &holders {
        crate::crash::are_in_the_book(&entries, holder);
    }
    one_outcome_each(&entries);
    signed_only_what_was_intended(&house, &entries);
    house.verify().ok();
}

#[test]
fn an_agent_of_the_authority_before_renews_and_gets_the_new_one() {
    let mut house = House::serving();
    {
        let agent = house.attested("builder/1");
        let before = agent.chain();
        rotate(&house, "issuing").ok();
        agent.renew().ok();
        let after = agent.chain();
        assert_ne!(before[1], after[1], "another issuing certificate");
        assert_eq!(after[1], crate::house::certificates(&house.state().join("issuing.pem"))[0]);
        agent.renew().ok();
    }
    house.restart();
    house.agent("builder/1").renew().ok();
    house.stop_and_verify();
}

#[test]
fn every_trusted_issuing_authority_has_a_crl_of_its_own() {
    let mut house = House::serving();
    {
        let agent = house.attested("builder/1");
        rotate(&house, "issuing").ok();
        agent.quarantine().ok();
        crate::certificate::crl_listing(&house, &agent.serial());
        let pem = house.keyward(&["crl", "show", "--pem"]).ok().stdout;
        let crls: Vec<_> = pem::parse_many(pem).unwrap().into_iter().map(pem::Pem::into_contents).collect();
        let certificates = house.keyward(&["ca", "show", "--pem"]).ok().stdout;
        let certificates: Vec<_> = pem::parse_many(certificates).unwrap().into_iter().map(pem::Pem::into_contents).collect();
        assert_eq!((crls.len(), certificates.len()), (2, 3));
        let mut issuers = BTreeSet::new();
        for der in &crls {
            let (_, crl) = CertificateRevocationList::from_der(der).unwrap();
            let issuer = certificates.iter().map(|der| x509_parser::parse_x509_certificate(der).unwrap().1);
            let issuer = issuer.into_iter().find(|issuer| issuer.subject() == crl.issuer()).expect("one of ours");
            crl.verify_signature(issuer.public_key()).expect("its signature");
            assert!(crl.iter_revoked_certificates().any(|revoked| revoked.raw_serial() == agent.serial()));
            issuers.insert(crl.issuer().to_string());
        }
        assert_eq!(issuers.len(), 2);
    }
    house.stop_and_verify();
}

#[test]
fn a_lost_key_of_an_authority_before_holds_up_neither_crls_nor_checkpoints() {
    let mut house = House::serving();
    let serial = {
        let agent = house.attested("builder/1");
        rotate(&house, "issuing").ok();
        rotate(&house, "ledger").ok();
        for purpose in ["issuing", "ledger"] {
            let (lost, state) = generations(&house, purpose).pop().unwrap();
            assert_eq!(state, "retiring");
            instruments::destroy(&house, "authority", &instruments::unhex(&lost));
        }
        agent.quarantine().ok();
        crate::certificate::crl_listing(&house, &agent.serial());
        agent.serial()
    };
    for why in ["one", "two", "three"] {
        assert_eq!(signatures_of(&next_checkpoint(&house, why)), 1);
    }
    assert_eq!(house.log().matches("checkpoints go without the signature").count(), 1, "told when it begins: {}", house.log());
    let lost = generations(&house, "issuing").pop().unwrap().0;
    let beside = house.state().join(format!("crl-{}.der", &lost[..8]));
    let old = std::fs::read(&beside).unwrap();
    house.restart();
    crate::certificate::crl_listing(&house, &serial);
    let pem = house.keyward(&["crl", "show", "--pem"]).ok().says("NOT ON IT YET").stdout;
    let crls: Vec<_> = pem::parse_many(pem).unwrap().into_iter().map(pem::Pem::into_contents).collect();
    assert_eq!((crls.len(), &crls[1]), (2, &old), "the old one stays, and is told");
    assert_eq!(std::fs::read(&beside).unwrap(), old);
    house.stop_and_verify();
}

#[test]
fn an_issuing_authority_is_destroyed_when_its_last_certificate_has_ended() {
    let mut house = House::new().configured("rotation", "destroy_days = 0").with_preload().initialised();
    house.serve();
    let first = generations(&house, "issuing")[0].0.clone();
    house.attested("builder/1");
    rotate(&house, "issuing").ok();
    later(&house, 599);
    house.agent("builder/1").renew();
    assert_eq!(states(&house, "issuing"), ["active", "retiring"]);
    later(&house, 700);
    become_states(&house, "issuing", &["active"]);
    let kept = instruments::private_keys(&house, "authority").into_iter().map(|key| key.id);
    assert!(!kept.into_iter().any(|id| id == first), "its key is gone from the token");
    assert!(!house.state().join(format!("crl-{}.der", &first[..8])).exists());
    nothing_is_left_over(&house);
    assert!(Holder::attest(&house, "builder/2").renew(&house));
    house.restart();
    house.stop_and_verify();
}

#[test]
fn a_retired_key_stays_for_as_long_as_a_backup_may_need_it() {
    let mut house = House::new().with_preload().initialised();
    house.serve();
    let copy = house.path("copy.db");
    let ledger = house.state().join("keyward.db");
    rusqlite::Connection::open(&ledger).unwrap().execute("VACUUM INTO ?1", [copy.to_str().unwrap()]).unwrap();
    rotate(&house, "issuing").ok();
    rotate(&house, "ledger").ok();
    later(&house, 4_000);
    become_states(&house, "issuing", &["active", "retired"]);
    become_states(&house, "ledger", &["active", "retired"]);
    rotate(&house, "root").ok();
    let sequence =
        |house: &House| house.keyward(&["bundle", "show", "--format", "json"]).ok().json()["sequence"].as_u64().unwrap();
    let told = sequence(&house);
    // The ledger of before the rotation is put back, and knows nothing of it.
    assert_eq!(house.stop(), 0);
    for name in ["keyward.db", "keyward.db-wal", "keyward.db-shm", "ledger.vkey", "issuing.pem"] {
        let _ = std::fs::remove_file(house.state().join(name));
    }
    std::fs::copy(&copy, &ledger).unwrap();
    house.keyward(&["init"]).ok();
    house.serve();
    Holder::attest(&house, "builder/1");
    rotate(&house, "issuing").ok();
    rotate(&house, "root").ok();
    assert!(sequence(&house) > told, "who knows the bundle of before listens still");
    house.stop_and_verify();
}

#[test]
fn what_is_due_by_age_is_rotated_by_itself_once_after_a_long_absence() {
    let mut house = House::new().configured("rotation", "jitter_seconds = 0").with_preload().initialised();
    house.serve();
    assert_eq!(house.stop(), 0);
    // Four ages of an issuing authority.
    house.control().move_clock(4 * 90 * 86_400_000);
    house.serve();
    become_states(&house, "issuing", &["active", "retiring"]);
    Holder::attest(&house, "builder/1");
    house.stop_and_verify();
}

/// A clock that ran ahead is set back: what was made by it is in force in a year only, and what the book says of its time is in the future.
#[test]
fn authorities_follow_a_clock_that_was_a_year_ahead_and_is_set_back() {
    let mut house = House::new().configured("rotation", "jitter_seconds = 0").with_preload().initialised();
    house.serve();
    later(&house, 366 * 86_400);
    become_states(&house, "issuing", &["active", "retiring"]);
    Holder::attest(&house, "builder/1");
    later(&house, 0);
    let in_force = |house: &House| {
        let [issuing] = crate::house::certificates(&house.state().join("issuing.pem")).try_into().unwrap();
        let (_, parsed) = x509_parser::parse_x509_certificate(&issuing).unwrap();
        parsed.validity().is_valid()
    };
    let until = Instant::now() + DEADLINE;
    while !in_force(&house) {
        assert!(Instant::now() < until, "{:?}", generations(&house, "issuing"));
        thread::sleep(Duration::from_millis(100));
    }
    Holder::attest(&house, "builder/2");
    let before = generations(&house, "issuing")[0].0.clone();
    rotate(&house, "issuing").ok();
    assert_ne!(generations(&house, "issuing")[0].0, before, "asked for now, done now");
    let before = generations(&house, "issuing")[0].0.clone();
    house.keyward(&["ca", "taint", &before, "--reason", "a test", "--yes"]).ok();
    assert_eq!(states(&house, "root"), ["active", "retiring"]);
    // The server's certificate is in force as well at the next look.
    house.agent("builder/3").enrol(&[]).ok();
    let until = Instant::now() + DEADLINE;
    while house.agent("builder/3").attest(&[]).code != 0 {
        assert!(Instant::now() < until, "an honest client does not trust the server");
        thread::sleep(Duration::from_millis(100));
    }
    later(&house, 901);
    become_states(&house, "root", &["active"]);
    house.stop_and_verify();
}

#[test]
fn nothing_is_rotated_while_an_operator_holds_it_up() {
    let mut house = House::new().configured("rotation", "jitter_seconds = 0").with_preload().initialised();
    house.serve();
    house.keyward(&["ca", "pause", "--reason", "change freeze"]).ok();
    rotate(&house, "issuing").refused("ROTATION_PAUSED");
    let again = house.keyward(&["ca", "pause", "--reason", "so say I", "--format", "json"]).ok();
    assert_eq!((&again.json()["already"], &again.json()["ledger_index"]), (&true.into(), &serde_json::Value::Null));
    again.says("change freeze").says("nothing was recorded");
    later(&house, 100 * 86_400);
    house.restart();
    let listed = house.keyward(&["ca", "list"]).ok().says("paused since 20").says("by uid").says("change freeze");
    assert!(!listed.stdout.contains("retiring"), "{}", listed.stdout);
    let rotation = house.keyward(&["status", "--format", "json"]).ok().json()["rotation"].clone();
    assert_eq!((&rotation["paused"], &rotation["pause"]["by"]["reason"]), (&true.into(), &"change freeze".into()));
    house.keyward(&["ca", "resume", "--reason", "freeze is over"]).ok();
    house.keyward(&["ca", "resume", "--reason", "so say I"]).ok().says("nothing was recorded");
    let held = house.entries().into_iter().filter(|body| matches!(body, Body::RotationPaused(_) | Body::RotationResumed(_)));
    assert_eq!(held.count(), 2, "what changes nothing is no entry");
    become_states(&house, "issuing", &["active", "retiring"]);
    house.stop_and_verify();
}

/// The power fails at each sync of a rotation in turn; afterwards it goes on by itself, or is asked for again.
#[test]
fn a_power_cut_at_any_moment_of_a_rotation_leaves_nothing_behind() {
    let begin = || {
        let mut house = House::new().configured("limits", "live_certificates_per_agent = 64").with_preload().initialised();
        house.serve();
        let holder = Holder::attest(&house, "builder/1");
        (house, holder)
    };
    let end = |mut house: House| {
        assert_eq!(house.stop(), 0);
        one_outcome_each(&house.ended_entries());
        house.verify().ok();
    };
    let (mut house, mut holder) = begin();
    for sync in (1..).step_by(if instruments::slow() { 1 } else { 4 }) {
        // Each rotation leaves one more in service, and there is a bound.
        if states(&house, "issuing").len() >= 12 {
            let (next, of_next) = begin();
            end(std::mem::replace(&mut house, next));
            holder = of_next;
        }
        house.control().kill_after_sync(sync);
        let asked = rotate(&house, "issuing");
        assert!(!asked.stderr.contains("ROTATION_UNDER_WAY"), "{}", asked.stderr);
        let done = asked.code == 0;
        house.control().clear();
        house.power_cut();
        house.serve();
        let coming =
            states(&house, "issuing").iter().filter(|state| matches!(state.as_str(), "planned" | "prepublished")).count();
        if coming > 0 {
            let until = Instant::now() + DEADLINE;
            while states(&house, "issuing").iter().any(|state| matches!(state.as_str(), "planned" | "prepublished")) {
                assert!(Instant::now() < until, "what had begun did not go on");
                thread::sleep(Duration::from_millis(100));
            }
        }
        nothing_is_left_over(&house);
        assert!(holder.renew(&house) || holder.renew(&house), "killed after sync {sync}");
        if done {
            assert!(sync > 8, "a rotation syncs more often than that");
            break;
        }
    }
    end(house);
}

/// The same for the arrows that time brings: a new root signs, authorities retire and are destroyed. The next daemon goes on.
#[test]
fn a_power_cut_at_any_moment_of_the_later_arrows_leaves_nothing_behind() {
    let mut house = House::new().configured("rotation", "destroy_days = 0").with_preload().initialised();
    house.serve();
    let settled = |house: &House| ["root", "issuing", "ledger"].iter().all(|purpose| states(house, purpose) == ["active"]);
    let mut seconds = 0;
    for sync in (1..).step_by(if instruments::slow() { 1 } else { 13 }) {
        for purpose in ["root", "issuing", "ledger"] {
            rotate(&house, purpose).ok();
        }
        // Past the overlaps of the root and of what it brings along.
        for step in [901, 3_700] {
            seconds += step;
            house.control().move_clock_and_kill_after_sync(seconds * 1000, sync);
            house.keyward(&["clock", "accept", "--reason", "hours pass"]);
            // It dies of it within a few looks, or has had nothing to sync that often.
            let until = Instant::now() + Duration::from_secs(3);
            while house.keyward(&["ca", "list"]).code == 0 && Instant::now() < until {
                thread::sleep(Duration::from_millis(50));
            }
            house.control().move_clock(seconds * 1000);
            house.power_cut();
            house.serve();
        }
        // What has begun goes on, as time does.
        let until = Instant::now() + DEADLINE;
        while !settled(&house) {
            assert!(Instant::now() < until, "after sync {sync}: {:?}", generations(&house, "root"));
            seconds += 600;
            later(&house, seconds);
            thread::sleep(Duration::from_millis(1100));
        }
        nothing_is_left_over(&house);
        assert_eq!(crate::house::certificates(&house.state().join("bundle.pem")).len(), 1);
        Holder::attest(&house, &format!("builder/{sync}"));
        if sync > 40 {
            break;
        }
    }
    house.stop_and_verify();
}

#[test]
fn a_new_root_is_in_every_bundle_before_it_signs_and_the_old_one_stays_as_long_as_it_is_needed() {
    let mut house = House::new().configured("rotation", "destroy_days = 0").with_preload().initialised();
    house.serve();
    house.attested("builder/1");
    let bundle = |house: &House| crate::house::certificates(&house.state().join("bundle.pem"));
    let old = bundle(&house);
    rotate(&house, "root").ok();
    assert_eq!(states(&house, "root"), ["prepublished", "active"]);
    assert_eq!(bundle(&house).len(), 2);
    house.attested("builder/2");
    assert_eq!(crate::house::certificates(&house.agent("builder/2").bundle()).len(), 2, "an agent learns of it");
    later(&house, 600);
    assert_eq!(states(&house, "root"), ["prepublished", "active"], "not before everybody can have it");
    later(&house, 901);
    become_states(&house, "root", &["active", "retiring"]);
    become_states(&house, "issuing", &["active", "retiring"]);
    Holder::attest(&house, "builder/3");
    later(&house, 901 + 700);
    become_states(&house, "issuing", &["active"]);
    become_states(&house, "root", &["active"]);
    assert_eq!(bundle(&house).len(), 1);
    assert_ne!(bundle(&house), old);
    nothing_is_left_over(&house);
    house.restart();
    house.stop_and_verify();
}

#[test]
fn a_tainted_issuing_authority_is_replaced_at_once_together_with_its_root() {
    let mut house = House::new().configured("rotation", "destroy_days = 0").with_preload().initialised();
    house.serve();
    house.attested("builder/1");
    let issuing = house.state().join("issuing.pem").display().to_string();
    house.keyward(&["ca", "adopt", "--issuing-certificate", &issuing]).exits(4).says("the root is inside the HSM");
    let tainted = generations(&house, "issuing")[0].0.clone();
    house.keyward(&["ca", "pause", "--reason", "even then"]).ok();
    house.keyward(&["ca", "taint", &tainted[..8], "--reason", "a test"]).exits(2).says("its root are replaced, at once");
    house.keyward(&["ca", "taint", "ffffffff", "--reason", "a test", "--yes"]).exits(4);
    house.keyward(&["ca", "taint", &tainted[..8], "--reason", "backup tape lost", "--yes"]).ok();
    assert_eq!(states(&house, "root"), ["active", "retiring"]);
    assert_eq!(states(&house, "issuing"), ["active", "retiring"]);
    // Whoever holds a certificate of the old one renews meanwhile.
    house.agent("builder/1").renew().ok();
    later(&house, 901);
    become_states(&house, "root", &["active"]);
    become_states(&house, "issuing", &["active"]);
    house.restart();
    house.stop_and_verify();
}

#[test]
fn a_connection_that_was_made_under_a_tainted_authority_ends_with_it() {
    let mut house = House::new().with_preload().initialised();
    house.serve();
    let wire = house.wire();
    let join =
        wire.try_enrol(EnrolRequest { agent: "builder/1".to_owned(), ttl_seconds_max: 7200, ..EnrolRequest::default() }).unwrap();
    let draft = Draft::join(&join);
    let answer = wire.attest(None, |challenge| draft.joined(challenge, &join.token_seed)).unwrap();
    let mut holder = draft.identity(&answer);
    let mut standing = wire.standing(&holder);
    let tainted = generations(&house, "issuing")[0].0.clone();
    house.keyward(&["ca", "taint", &tainted[..8], "--reason", "a test", "--yes"]).ok();
    // Until it goes, agents renew.
    let next = Draft::bound("builder/1", answer.next_sequence);
    let answer = wire.renew_over(&mut standing, next.renewal(&holder)).unwrap();
    holder = next.identity(&answer);
    later(&house, 901);
    become_states(&house, "issuing", &["active"]);
    let next = Draft::bound("builder/1", answer.next_sequence);
    refused(wire.renew_over(&mut standing, next.renewal(&holder)), "UNAUTHENTICATED");
    // Over a connection with the certificate of the new authority it goes on.
    wire.renew(Some(&holder), next.renewal(&holder)).unwrap();
    drop(standing);
    house.stop_and_verify();
}

/// It has been retiring for longer than a taint leaves anybody, and would go at once.
#[test]
fn what_is_under_an_authority_that_was_retiring_when_it_was_tainted_has_as_long_to_be_renewed() {
    let mut house = House::new().configured("rotation", "destroy_days = 0").with_preload().initialised();
    house.serve();
    let agent = house.agent("builder/1");
    agent.enrol(&["--ttl", "2h"]).ok();
    agent.attest(&[]).ok();
    let retiring = generations(&house, "issuing")[0].0.clone();
    rotate(&house, "issuing").ok();
    later(&house, 1800);
    let wire = house.wire();
    let mut following = wire.watch_bundle(Some(&Identity::of(&agent))).unwrap();
    house.keyward(&["ca", "taint", &retiring, "--reason", "a test", "--yes"]).ok();
    assert_eq!(states(&house, "issuing"), ["active", "retiring", "retiring"]);
    let within = following.renew_within();
    assert!((840..=900).contains(&within), "{within}");
    agent.renew().ok();
    let mut following = wire.watch_bundle(Some(&Identity::of(&agent))).unwrap();
    later(&house, 1800 + 901);
    become_states(&house, "issuing", &["active"]);
    become_states(&house, "root", &["active"]);
    // Its certificate is of the authority that stayed: the stream goes on.
    while following.next().unwrap().authorities.len() > 1 {}
    drop(following);
    house.stop_and_verify();
}

/// The power fails at each sync of a taint in turn: once it is recorded, the next daemon does what follows from it.
#[test]
fn a_taint_that_was_recorded_is_acted_on_after_a_power_cut_at_any_moment() {
    let mut house = House::new().with_preload().initialised();
    house.serve();
    for sync in (1..).step_by(if instruments::slow() { 1 } else { 7 }) {
        let active = |house: &House| generations(house, "issuing").into_iter().find(|(_, state)| state == "active").unwrap().0;
        let tainted = active(&house);
        house.control().kill_after_sync(sync);
        let done = house.keyward(&["ca", "taint", &tainted, "--reason", "a test", "--yes"]).code == 0;
        house.control().clear();
        house.power_cut();
        let recorded = house.ended_entries().iter().rev().any(|body| match body {
            Body::AuthorityTainted(taint) => taint.key_id.iter().map(|byte| format!("{byte:02x}")).collect::<String>() == tainted,
            _ => false,
        });
        house.serve();
        let until = Instant::now() + DEADLINE;
        while recorded && active(&house) == tainted {
            assert!(Instant::now() < until, "killed after sync {sync}: a tainted authority stays active");
            thread::sleep(Duration::from_millis(100));
        }
        assert!(recorded || !done, "acknowledged, and lost");
        Holder::attest(&house, &format!("builder/{sync}"));
        if done {
            assert!(sync > 20, "a taint syncs more often than that");
            break;
        }
    }
    nothing_is_left_over(&house);
    house.stop_and_verify();
}

#[test]
fn a_ledger_key_is_vouched_for_by_the_one_before_it() {
    let mut house = House::new().configured("rotation", "destroy_days = 0").with_preload().initialised();
    house.serve();
    let pinned = house.path("pinned.vkey");
    std::fs::copy(house.state().join("ledger.vkey"), &pinned).unwrap();
    house.attested("builder/1");
    for hours in [0, 2, 4] {
        later(&house, hours * 3600);
        become_states(&house, "ledger", &["active"]);
        rotate(&house, "ledger").ok();
        become_states(&house, "ledger", &["active", "retiring"]);
    }
    later(&house, 6 * 3600);
    become_states(&house, "ledger", &["active"]);
    Holder::attest(&house, "builder/2");
    nothing_is_left_over(&house);
    assert_eq!(house.stop(), 0);
    house.verify().ok();
    let file = house.state().join("keyward.db");
    let with = |key: &std::path::Path| {
        run(house.command().args(["ledger", "verify", file.to_str().unwrap(), "--key", key.to_str().unwrap(), "--signatures"]))
    };
    with(&pinned).ok();
    assert_ne!(std::fs::read(&pinned).unwrap(), std::fs::read(house.state().join("ledger.vkey")).unwrap());
    // The key of another house vouches for nothing here.
    let other = House::new().initialised();
    with(&other.state().join("ledger.vkey")).exits(6);
}

/// The keys of tokens in the SPIFFE bundle, and its sequence.
fn told_of_tokens(house: &House) -> (Vec<String>, u64) {
    let set = house.keyward(&["bundle", "show", "--jwks"]).ok().json();
    let of_tokens = |key: &&serde_json::Value| key["use"] == "jwt-svid";
    let kids = set["keys"].as_array().unwrap().iter().filter(of_tokens).map(|key| key["kid"].as_str().unwrap().to_owned());
    (kids.collect(), set["spiffe_sequence"].as_u64().unwrap())
}

#[test]
fn the_first_token_signing_key_is_there_from_the_beginning_and_each_that_follows_is_known_before_it_signs() {
    let mut house = House::new().configured("rotation", "destroy_days = 0").with_preload().initialised();
    house.serve();
    assert_eq!(states(&house, "token-signing"), ["active"]);
    let (first, sequence) = told_of_tokens(&house);
    assert_eq!((first.len(), sequence), (1, 1));
    let agent = house.attested("builder/1");
    let wire = house.wire();
    let mut following = wire.watch_bundle(Some(&Identity::of(&agent))).unwrap();
    let told = following.next().unwrap();
    let coming = house.keyward(&["ca", "rotate", "token-signing", "--now", "--yes", "--format", "json"]).ok().json();
    let again = house.keyward(&["ca", "rotate", "token-signing", "--now", "--yes", "--format", "json"]).ok().says("under way");
    assert_eq!(again.json()["key_id"], coming["key_id"], "asked for twice, it is replaced once");
    house.keyward(&["ca", "rotate", "token-signing", "--yes"]).refused("ROTATION_UNDER_WAY");
    assert_eq!(states(&house, "token-signing"), ["prepublished", "active"]);
    let (both, second) = told_of_tokens(&house);
    assert_eq!((both.len(), &both[0]), (2, &first[0]), "the active one first");
    assert!(second > sequence);
    let newer = following.next().unwrap();
    assert_eq!((newer.sequence, newer.token_signing_keys.len()), (second, 2));
    assert_eq!(newer.authorities, told.authorities);
    later(&house, 901);
    become_states(&house, "token-signing", &["active", "retiring"]);
    // The same keys in another order: nothing that a verifier would have to learn of.
    assert_eq!(told_of_tokens(&house), (vec![both[1].clone(), both[0].clone()], second));
    later(&house, 901 + 3_601);
    become_states(&house, "token-signing", &["active"]);
    let (last, third) = told_of_tokens(&house);
    assert_eq!(last, both[1..]);
    assert!(third > second);
    nothing_is_left_over(&house);
    house.stop_and_verify();
}

/// What `hsm reconcile` finds: what it is, and its key id.
fn found(house: &House) -> Vec<(String, String)> {
    let strays = house.keyward(&["hsm", "reconcile", "--format", "json"]).json();
    let text = |one: &serde_json::Value, name: &str| one[name].as_str().unwrap().to_owned();
    strays.as_array().unwrap().iter().map(|one| (text(one, "found"), text(one, "key_id"))).collect()
}

fn count(found: &[(String, String)], what: &str) -> usize {
    found.iter().filter(|one| one.0 == what).count()
}

#[test]
fn a_token_signing_key_is_replaced_by_age_and_a_tainted_one_leaves_the_bundle_soon() {
    let mut house =
        House::new().configured("rotation", "jitter_seconds = 0\ntoken_signing_days = 1").with_preload().initialised();
    house.serve();
    let first = generations(&house, "token-signing").remove(0).0;
    later(&house, 86_401);
    become_states(&house, "token-signing", &["prepublished", "active"]);
    // Whoever may have it signs tokens until verifiers hear of it.
    house.keyward(&["ca", "taint", &first, "--reason", "a test", "--yes"]).ok();
    assert_eq!(states(&house, "token-signing"), ["active", "retiring"]);
    later(&house, 86_401 + 901);
    become_states(&house, "token-signing", &["active"]);
    assert_eq!(told_of_tokens(&house).0.len(), 1);
    house.stop_and_verify();
}

#[test]
fn a_house_from_before_there_were_token_signing_keys_gets_one_by_itself() {
    let mut house = House::new().with_preload().initialised();
    let db = rusqlite::Connection::open(house.state().join("keyward.db")).unwrap();
    let gone = db.execute("DELETE FROM generation WHERE purpose = ?1", [Purpose::TokenSigning as i32]).unwrap();
    assert_eq!(gone, 1);
    // Nor did an earlier keyward tell of one, or list the entries about authorities: something else stands there.
    let first = |body: &Body| matches!(body, Body::AuthorityActivated(first) if first.purpose() == Purpose::TokenSigning);
    let at = house.ended_entries().iter().position(first).unwrap();
    let at = i64::try_from(at).unwrap();
    let told: Vec<u8> = db.query_row("SELECT bytes FROM entry WHERE idx = ?1", [at], |row| row.get(0)).unwrap();
    let other = Entry { body: Some(Body::Stopped(Stopped::default())), ..Entry::decode(told.as_slice()).unwrap() };
    db.execute("UPDATE entry SET bytes = ?2 WHERE idx = ?1", rusqlite::params![at, other.encode_to_vec()]).unwrap();
    db.execute("DELETE FROM fact WHERE name = 'authority_entries'", []).unwrap();
    drop(db);
    house.serve();
    become_states(&house, "token-signing", &["prepublished"]);
    let (keys, sequence) = told_of_tokens(&house);
    assert!(keys.len() == 1 && sequence > 1, "{keys:?} {sequence}");
    house.restart();
    later(&house, 901);
    become_states(&house, "token-signing", &["active"]);
    assert_eq!(house.stop(), 0);
}

#[test]
fn strays_are_told_and_destroyed_only_when_asked_and_what_is_another_deployments_never() {
    let mut house = House::new().initialised();
    // The same tokens under a new book: another deployment's.
    std::fs::remove_dir_all(house.state()).unwrap();
    house.keyward(&["init"]).ok();
    house.serve();
    let foreign = found(&house);
    let made_by_init = foreign.len();
    assert!(made_by_init >= 5, "root, issuing, ledger, two canaries: {foreign:?}");
    assert_eq!(count(&foreign, "foreign"), made_by_init, "{foreign:?}");
    house.keyward(&["hsm", "reconcile"]).ok();
    house.keyward(&["hsm", "reconcile", "--destroy", &foreign[0].1, "--yes"]).exits(4);
    house.keyward(&["hsm", "reconcile", "--destroy-orphans", "--yes"]).ok();
    assert_eq!(found(&house), foreign, "they share the tokens");
    // Keys of the same deployment that its book does not know: it is an older copy.
    let agent = Identity::of(&house.attested("builder/1"));
    let copy = house.path("copy.db");
    let ledger = house.state().join("keyward.db");
    rusqlite::Connection::open(&ledger).unwrap().execute("VACUUM INTO ?1", [copy.to_str().unwrap()]).unwrap();
    rotate(&house, "issuing").ok();
    house.keys(&agent).create(resident("a")).unwrap();
    assert_eq!(found(&house), foreign);
    assert_eq!(house.stop(), 0);
    for name in ["keyward.db", "keyward.db-wal", "keyward.db-shm", "ledger.vkey", "issuing.pem"] {
        let _ = std::fs::remove_file(house.state().join(name));
    }
    std::fs::copy(&copy, &ledger).unwrap();
    house.keyward(&["init"]).ok();
    house.serve();
    let strays: Vec<_> = found(&house).into_iter().filter(|one| one.0 == "stray").collect();
    assert_eq!(strays.len(), 2, "an issuing key and an agent's: {strays:?}");
    house.keyward(&["hsm", "reconcile"]).exits(5).says("2 not as the ledger says");
    house.keyward(&["hsm", "reconcile", "--destroy-orphans"]).exits(2).says("nothing was done");
    let in_use = generations(&house, "issuing").remove(0).0;
    house.keyward(&["hsm", "reconcile", "--destroy", &in_use, "--yes"]).exits(4);
    house.keyward(&["hsm", "reconcile", "--destroy", &strays[0].1[..8]]).exits(2).says("nothing was done");
    assert_eq!(count(&found(&house), "stray"), 2);
    house.keyward(&["hsm", "reconcile", "--destroy", &strays[0].1[..8], "--yes"]).exits(5);
    assert_eq!(found(&house).into_iter().filter(|one| one.0 == "stray").collect::<Vec<_>>(), strays[1..]);
    house.keyward(&["hsm", "reconcile", "--destroy-orphans", "--yes"]).ok();
    assert_eq!(found(&house), foreign);
    house.attested("builder/2").renew().ok();
    // A key of the book that the token has lost is told as well, and is nobody's to destroy.
    rotate(&house, "issuing").ok();
    let (lost, _) = generations(&house, "issuing").pop().unwrap();
    instruments::destroy(&house, "authority", &instruments::unhex(&lost));
    house.keyward(&["hsm", "reconcile", "--destroy-orphans", "--yes"]).exits(5);
    house.keyward(&["hsm", "reconcile", "--destroy", &lost, "--yes"]).exits(4);
    let now = found(&house);
    assert_eq!((count(&now, "foreign"), now.len()), (made_by_init, made_by_init + 1), "{now:?}");
    assert!(now.contains(&("missing".to_owned(), lost)), "{now:?}");
    assert_eq!(house.stop(), 0);
    let entries = house.ended_entries();
    let destroyed = entries.iter().filter_map(|body| match body {
        Body::OrphansDestroyed(gone) => Some((gone.objects_destroyed, gone.key_id.clone())),
        _ => None,
    });
    assert_eq!(destroyed.collect::<Vec<_>>(), strays.iter().map(|one| (2, instruments::unhex(&one.1))).collect::<Vec<_>>());
    house.verify().ok();
}

#[test]
fn an_agents_key_that_is_half_made_or_half_gone_is_no_stray() {
    let mut house = House::new().with_shim().initialised().served();
    let agent = Identity::of(&house.attested("builder/1"));
    house.keys(&agent).create(resident("ends")).unwrap();
    let label = house.keyward(&["hsm", "reconcile"]).ok();
    assert!(!label.stdout.contains("keyward/agent"), "in use: {}", label.stdout);
    house.shim().tell("fail C_DestroyObject rv=0x30 count=all");
    house.keys(&agent).destroy("", "ends").unwrap();
    house.shim().tell("fail C_GenerateKeyPair rv=0x30 after");
    house.keys(&agent).create(resident("begins")).unwrap_err();
    let mut kinds: Vec<_> = Vec::new();
    // The token is back in a moment.
    comes_about("both are told", || {
        if house.keyward(&["hsm", "reconcile"]).code == 5 {
            return false;
        }
        kinds = found(&house).into_iter().map(|one| one.0).collect();
        kinds.sort();
        kinds == ["being destroyed", "in the making"]
    });
    house.shim().tell("clear");
    // Nor are they an operator's to destroy.
    house.keyward(&["hsm", "reconcile", "--destroy-orphans", "--yes"]).ok();
    assert_eq!(found(&house).len(), 2);
    house.restart();
    nothing_is_left_over(&house);
    house.stop_and_verify();
}

fn resident(name: &str) -> CreateKeyRequest {
    CreateKeyRequest { storage: KeyStorage::Resident.into(), ..wish(name) }
}

/// The whole of it at once, as `keyward bench rotation` judges it: days pass, agents renew, authorities of all kinds follow each other, and
/// daemons die of it.
#[test]
fn through_many_rotations_nothing_is_refused_rejected_or_left_over() {
    let (rotations, kills) = if instruments::slow() { ("1000", "200") } else { ("20", "5") };
    let runs = if instruments::slow() { vec!["0", kills] } else { vec![kills] };
    for kills in runs {
        let work = tempfile::tempdir().unwrap();
        let mut bench = Command::new(env!("CARGO_BIN_EXE_keyward"));
        bench.args(["bench", "rotation", "--format", "json", "--rotations", rotations, "--kills", kills]);
        bench.arg("--clock").arg(crate::house::instrument::preload_library()).arg("--work").arg(work.path());
        let report = run(&mut bench).ok().json();
        for figure in ["failed_issues", "rejected", "orphans", "violations"] {
            assert_eq!(report[figure], 0, "{figure}: {}", report["complaints"]);
        }
        assert!(report["rotations"].as_u64() >= rotations.parse().ok(), "{}", report["rotations"]);
        assert_eq!(report["kills"].to_string(), kills);
        assert!(report["issued"].as_u64() > Some(20));
    }
}

/// A house whose issuing authority an outside root has signed.
fn under_an_outside_root() -> (House, OutsideRoot) {
    let (house, csr) = awaiting_root();
    let root = OutsideRoot::new(&house, "root");
    let issuing = root.sign(&csr, FITS);
    house.keyward(&["init", "--root-certificate", &root.certificate(), "--issuing-certificate", &issuing]).ok();
    let mut house = house.configured("rotation", "destroy_days = 0").with_preload();
    house.serve();
    (house, root)
}

/// The request that waits for the outside root.
fn request(house: &House) -> String {
    let path = house.path("next.csr");
    let until = Instant::now() + DEADLINE;
    loop {
        // A daemon signs its own at its first look.
        let shown = house.keyward(&["ca", "show", "--csr"]);
        if shown.code == 0 {
            std::fs::write(&path, shown.stdout).unwrap();
            return path.display().to_string();
        }
        assert!(Instant::now() < until, "{shown:?}");
        thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn under_an_outside_root_the_next_issuing_authority_waits_for_its_certificate() {
    let (mut house, root) = under_an_outside_root();
    house.attested("builder/1");
    rotate(&house, "root").refused("NO_SUCH_AUTHORITY_HERE");
    house.keyward(&["ca", "show", "--csr"]).exits(4);
    rotate(&house, "issuing").ok().says("BEGIN CERTIFICATE REQUEST");
    assert_eq!(states(&house, "issuing"), ["planned", "active"]);
    assert_eq!(house.keyward(&["status", "--format", "json"]).ok().json()["rotation"]["awaits_certificate"], true);
    house.agent("builder/1").renew().ok();
    let key = |path: &str| run(Command::new("openssl").args(["req", "-in", path, "-noout", "-pubkey"])).ok().stdout;
    let before = key(&request(&house));
    house.restart();
    let csr = request(&house);
    assert_eq!(key(&csr), before, "the same key waits");
    let adopt = |issuing: &str| house.keyward(&["ca", "adopt", "--issuing-certificate", issuing]);
    adopt(&root.sign(&csr, &FITS.replace("pathlen:0", "pathlen:1"))).refused("CERTIFICATE_UNFIT");
    adopt(&OutsideRoot::new(&house, "stranger").sign(&csr, FITS)).refused("CERTIFICATE_UNFIT");
    let text = house.path("claims.json");
    std::fs::write(&text, "{}").unwrap();
    for none in [&csr, text.to_str().unwrap()] {
        adopt(none).exits(1).says("is no PEM certificate");
    }
    adopt(&root.sign(&csr, FITS)).ok();
    assert_eq!(states(&house, "issuing"), ["active", "retiring"]);
    adopt(&root.sign(&csr, FITS)).exits(4).says("ca rotate issuing");
    house.agent("builder/1").renew().ok();
    nothing_is_left_over(&house);
    house.restart();
    house.stop_and_verify();
}

/// A house whose outside root signed its issuing authority for a day.
fn under_an_authority_of_a_day() -> (House, OutsideRoot) {
    let (house, csr) = awaiting_root();
    let root = OutsideRoot::new(&house, "root");
    let brief = root.sign_for_days(&csr, "1");
    house.keyward(&["init", "--root-certificate", &root.certificate(), "--issuing-certificate", &brief]).ok();
    let mut house = house.with_preload();
    house.serve();
    (house, root)
}

#[test]
fn nothing_is_certified_for_longer_than_the_authority_over_it_is_in_force() {
    let (mut house, _) = under_an_authority_of_a_day();
    let until = |der: &[u8]| x509_parser::parse_x509_certificate(der).unwrap().1.validity().not_after.timestamp();
    let end = until(&crate::house::certificates(&house.state().join("issuing.pem"))[0]);
    // Five minutes before its end a certificate of ten minutes is one of five.
    later(&house, 86_400 - 300);
    let mut holder = Holder::attest(&house, "builder/1");
    assert_eq!(until(&holder.identity.chain[0]), end);
    assert!(until(&house.wire().server_certificate()) <= end);
    later(&house, 86_400 + 1);
    let refusal = Holder::attest_within(&house, "builder/2", Duration::ZERO).map(drop).unwrap_err();
    assert_eq!(refusal.reason, "AUTHORITY_EXPIRED", "{refusal:?}");
    assert!(holder.try_renew(&house).is_err());
    house.stop_and_verify();
}

/// What `keyward status` has against being ready.
fn causes(house: &House) -> Vec<String> {
    let status = house.keyward(&["status", "--format", "json"]).json();
    status["not_ready_because"].as_array().unwrap().iter().map(|cause| cause.as_str().unwrap().to_owned()).collect()
}

#[test]
fn the_end_of_an_authority_is_told_before_and_makes_the_daemon_unready_until_another_is_adopted() {
    let (mut house, root) = under_an_authority_of_a_day();
    let told = |house: &House| house.log().matches("the active issuing authority ends at").count();
    assert!(told(&house) == 0 && causes(&house).is_empty(), "there is time");
    // The last third of its life.
    later(&house, 60_000);
    comes_about("warned of the end", || told(&house) == 1);
    assert!(house.log().contains("keyward ca adopt"));
    comes_about("ready still", || causes(&house).is_empty());
    // A certificate of ten minutes would end after it.
    later(&house, 86_400 - 300);
    let says = |house: &House, what: &str| {
        let told =
            |cause: &String| cause.starts_with("authority: ") && cause.contains(what) && cause.contains("keyward ca adopt");
        matches!(causes(house).as_slice(), [cause] if told(cause))
    };
    comes_about("not ready", || says(&house, "sooner than the longest certificate"));
    assert!(house.keyward(&["status"]).exits(5).stdout.contains("keyward ca adopt"));
    later(&house, 86_400 + 1);
    comes_about("not ready", || says(&house, "ended at"));
    house.restart();
    comes_about("not ready after a restart", || says(&house, "ended at"));
    let issuing = root.sign(&request(&house), FITS);
    house.keyward(&["ca", "adopt", "--issuing-certificate", &issuing]).ok();
    comes_about("ready", || causes(&house).is_empty());
    Holder::attest(&house, "builder/1");
    house.stop_and_verify();
}

#[test]
fn a_rotation_held_up_until_an_authority_ends_is_told_before_and_makes_the_daemon_unready_until_it_is_resumed() {
    let mut house = House::new().with_preload().initialised().served();
    house.keyward(&["ca", "pause", "--reason", "change freeze"]).ok();
    let certificate = crate::house::certificates(&house.state().join("issuing.pem")).remove(0);
    let validity = x509_parser::parse_x509_certificate(&certificate).unwrap().1.validity().clone();
    let left = validity.not_after.timestamp() - i64::try_from(keyward::model::UnixTime::wall().seconds()).unwrap();
    let told = |house: &House| house.log().matches("the active issuing authority ends at").count();
    later(&house, left - 15 * 86_400);
    comes_about("there is time", || causes(&house).is_empty());
    later(&house, left - 13 * 86_400);
    comes_about("warned of the end", || told(&house) == 1);
    assert!(house.log().contains("the rotation is paused; `keyward ca resume`"));
    comes_about("ready still", || causes(&house).is_empty());
    later(&house, left - 300);
    let says = |house: &House| {
        let told = |cause: &String| cause.starts_with("authority: ") && cause.contains("keyward ca resume");
        matches!(causes(house).as_slice(), [cause] if told(cause))
    };
    comes_about("not ready", || says(&house));
    house.keyward(&["ca", "resume", "--reason", "freeze is over"]).ok();
    comes_about("ready", || causes(&house).is_empty());
    Holder::attest(&house, "builder/1");
    house.stop_and_verify();
}

#[test]
fn who_rotates_in_a_loop_is_stopped_before_denials_and_handshakes_suffer() {
    let mut house = House::new().initialised().served();
    let refused = (0..40).map(|_| rotate(&house, "issuing")).find(|output| output.code != 0).expect("there is a bound");
    refused.refused("ROTATION_UNDER_WAY");
    assert_eq!(states(&house, "issuing").len(), 16);
    let agent = house.attested("builder/1");
    agent.quarantine().ok();
    crate::certificate::crl_listing(&house, &agent.serial());
    // A taint waits for nothing.
    let active = generations(&house, "issuing")[0].0.clone();
    house.keyward(&["ca", "taint", &active, "--reason", "a test", "--yes"]).ok();
    assert_ne!(generations(&house, "issuing")[0].0, active);
    house.stop_and_verify();
}

#[test]
fn another_outside_root_is_in_the_bundle_before_anything_under_it_signs() {
    let (mut house, _) = under_an_outside_root();
    house.attested("builder/1");
    let next = OutsideRoot::new(&house, "next");
    rotate(&house, "issuing").ok();
    let issuing = next.sign(&request(&house), FITS);
    let arguments = ["ca", "adopt", "--issuing-certificate", &issuing, "--root-certificate", &next.certificate()];
    house.keyward(&arguments).ok();
    assert_eq!(states(&house, "root"), ["prepublished", "active"]);
    assert_eq!(states(&house, "issuing"), ["prepublished", "active"]);
    house.agent("builder/1").renew().ok();
    assert_eq!(crate::house::certificates(&house.agent("builder/1").bundle()).len(), 2);
    house.restart();
    later(&house, 901);
    become_states(&house, "root", &["active", "retiring"]);
    become_states(&house, "issuing", &["active", "retiring"]);
    later(&house, 901 + 700);
    become_states(&house, "issuing", &["active"]);
    become_states(&house, "root", &["active"]);
    Holder::attest(&house, "builder/2");
    nothing_is_left_over(&house);
    house.restart();
    house.stop_and_verify();
}

#[test]
fn every_arrow_is_an_entry_with_its_cause() {
    let mut house = House::serving();
    house.keyward(&["ca", "rotate", "issuing", "--now", "--reason", "yearly", "--yes"]).ok();
    let entries = house.stopped_entries();
    let arrows: Vec<_> = entries
        .iter()
        .filter_map(|body| match body {
            Body::AuthorityStepped(step) => {
                assert_eq!(step.purpose(), Purpose::Issuing);
                Some((step.to(), step.by.as_ref().map(|by| by.reason.clone())))
            }
            _ => None,
        })
        .collect();
    let wanted = [
        (AuthorityState::Planned, Some("yearly".to_owned())),
        (AuthorityState::Prepublished, None),
        (AuthorityState::Active, None),
    ];
    assert_eq!(arrows, wanted);
}

#[test]
fn a_token_that_makes_no_key_neither_fills_the_book_nor_keeps_an_operator_waiting() {
    let house = House::new().with_shim().initialised().served();
    house.shim().tell("fail C_GenerateKeyPair rv=0x31 count=all");
    let issuing = generations(&house, "issuing").remove(0).0;
    let from = Instant::now();
    let said = house.keyward(&["ca", "taint", &issuing, "--reason", "a test", "--yes"]);
    assert!(said.code != 0 && said.stderr.contains("the taint stands") && said.stderr.contains("ledger entry"), "{said:?}");
    house.keyward(&["ca", "pause", "--reason", "a test"]).ok();
    assert!(from.elapsed() < DEADLINE, "{:?}", from.elapsed());
    let entries = house.keyward(&["status", "--format", "json"]).ok().json()["ledger"]["entries"].as_u64().unwrap();
    assert!(entries < 100, "{entries} entries");
    house.shim().tell("clear");
    house.keyward(&["ca", "resume", "--reason", "a test"]).ok();
    let until = Instant::now() + DEADLINE;
    while !generations(&house, "issuing").contains(&(issuing.clone(), "retiring".to_owned())) {
        assert!(Instant::now() < until, "{:?}", generations(&house, "issuing"));
        thread::sleep(Duration::from_millis(100));
    }
    nothing_is_left_over(&house);
}

/// An authority that is to come loses its key in the token before it signs.
#[test]
fn an_authority_whose_key_is_gone_before_it_signs_is_given_up_and_followed_by_another() {
    let mut house = House::new().configured("rotation", "destroy_days = 0").with_preload().initialised();
    house.serve();
    let active = generations(&house, "root")[0].0.clone();
    rotate(&house, "root").ok();
    let lost = generations(&house, "root")[0].clone();
    assert_eq!(lost.1, "prepublished");
    instruments::destroy(&house, "authority", &instruments::unhex(&lost.0));
    later(&house, 901);
    comes_about("another root is prepublished", || {
        let now = generations(&house, "root");
        now.len() == 2 && now[0].1 == "prepublished" && now[0].0 != lost.0
    });
    assert_eq!(generations(&house, "root")[1], (active, "active".to_owned()), "it stays until another one can sign");
    Holder::attest(&house, "builder/1");
    later(&house, 2 * 901);
    become_states(&house, "root", &["active", "retiring"]);
    become_states(&house, "issuing", &["active", "retiring"]);
    Holder::attest(&house, "builder/2");
    // A ledger key that waits for the one before it to go.
    rotate(&house, "ledger").ok();
    rotate(&house, "ledger").ok();
    become_states(&house, "ledger", &["prepublished", "active", "retiring"]);
    let lost = generations(&house, "ledger")[0].0.clone();
    instruments::destroy(&house, "authority", &instruments::unhex(&lost));
    later(&house, 2 * 901 + 3_700);
    comes_about("another ledger key signs", || {
        let now = generations(&house, "ledger");
        now.iter().all(|(key, _)| *key != lost)
            && now[0].1 == "active"
            && now.iter().filter(|one| one.1 == "retiring").count() == 1
    });
    nothing_is_left_over(&house);
    house.restart();
    let entries = house.stopped_entries();
    let causes = entries.iter().filter_map(|body| match body {
        Body::AuthorityStepped(step) if step.cause == "its key is not in the token any more" => Some(step.to()),
        _ => None,
    });
    assert_eq!(causes.collect::<Vec<_>>(), [AuthorityState::Retired, AuthorityState::Retired]);
    house.verify().ok();
}

#[test]
fn a_token_that_is_away_costs_no_authority_that_is_to_come() {
    let mut house = House::new().with_preload().with_shim().initialised();
    house.serve();
    rotate(&house, "root").ok();
    let coming = generations(&house, "root")[0].0.clone();
    // Away while its time comes; and back without showing what it has, for a while.
    house.shim().tell("lose");
    later(&house, 901);
    comes_about("an arrow that waits", || house.log().contains("has to wait"));
    assert_eq!(generations(&house, "root")[0], (coming.clone(), "prepublished".to_owned()));
    house.shim().tell("fail C_FindObjectsInit rv=0x30 count=40");
    house.shim().tell("return");
    become_states(&house, "root", &["active", "retiring"]);
    assert_eq!(generations(&house, "root")[0].0, coming);
    house.shim().tell("clear");
    house.stop_and_verify();
}

#[test]
fn a_request_whose_key_is_gone_is_made_anew() {
    let (mut house, root) = under_an_outside_root();
    rotate(&house, "issuing").ok();
    let csr = request(&house);
    let lost = generations(&house, "issuing")[0].0.clone();
    let issuing = root.sign(&csr, FITS);
    instruments::destroy(&house, "authority", &instruments::unhex(&lost));
    house.keyward(&["ca", "adopt", "--issuing-certificate", &issuing]).refused("KEY_LOST");
    comes_about("another one is planned", || {
        let now = generations(&house, "issuing");
        now[0].1 == "planned" && now[0].0 != lost && house.keyward(&["ca", "show", "--csr"]).code == 0
    });
    house.keyward(&["ca", "adopt", "--issuing-certificate", &issuing]).refused("CERTIFICATE_UNFIT");
    house.keyward(&["ca", "adopt", "--issuing-certificate", &root.sign(&request(&house), FITS)]).ok();
    become_states(&house, "issuing", &["active", "retiring"]);
    nothing_is_left_over(&house);
    house.stop_and_verify();
}

#[test]
fn a_request_that_cannot_be_signed_holds_up_nothing_else() {
    let (mut house, _) = under_an_outside_root();
    rotate(&house, "issuing").ok();
    let planned = generations(&house, "issuing")[0].0.clone();
    assert_eq!(house.stop(), 0);
    // Half of it is there: that is no key that was lost for certain, and none that signs.
    instruments::destroy_private(&house, "authority", &instruments::unhex(&planned));
    house.serve();
    house.keyward(&["ca", "show", "--csr"]).exits(4);
    rotate(&house, "ledger").ok();
    become_states(&house, "ledger", &["active", "retiring"]);
    assert_eq!(generations(&house, "issuing")[0], (planned, "planned".to_owned()));
    house.stop_and_verify();
}

/// What happens to files of a directory from now on.
fn watch(directory: &Path, what: WatchFlags) -> OwnedFd {
    let watch = inotify::init(CreateFlags::NONBLOCK | CreateFlags::CLOEXEC).unwrap();
    inotify::add_watch(&watch, directory, what).unwrap();
    watch
}

/// Whose it happened to until now.
fn names(watch: &OwnedFd) -> Vec<String> {
    let mut buffer = [const { MaybeUninit::uninit() }; 4096];
    let mut events = inotify::Reader::new(watch, &mut buffer);
    let mut names = Vec::new();
    while let Ok(event) = events.next() {
        names.extend(event.file_name().map(|name| name.to_string_lossy().into_owned()));
    }
    names
}

#[test]
fn the_request_to_the_outside_root_lies_there_for_as_long_as_it_is_waited_for() {
    let (mut house, root) = under_an_outside_root();
    let file = house.state().join("issuing.csr");
    comes_about("the request of `init` is gone", || !file.exists());
    rotate(&house, "issuing").ok();
    let first = std::fs::read(&file).unwrap();
    house.keyward(&["ca", "adopt", "--issuing-certificate", &root.sign(&request(&house), FITS)]).ok();
    assert!(!file.exists(), "it is answered");
    rotate(&house, "issuing").ok();
    let asked = std::fs::read(&file).unwrap();
    assert_ne!(asked, first);
    // Another daemon asks by a request of its own, and at no moment is there none.
    let gone = watch(&house.state(), WatchFlags::DELETE | WatchFlags::MOVED_FROM);
    house.restart();
    comes_about("the request is another daemon's", || std::fs::read(&file).unwrap() != asked);
    assert!(!names(&gone).contains(&"issuing.csr".to_owned()), "it was not there for a moment");
    // One that a crash has left is removed by the next daemon.
    house.keyward(&["ca", "adopt", "--issuing-certificate", &root.sign(&request(&house), FITS)]).ok();
    assert_eq!(house.stop(), 0);
    std::fs::write(&file, first).unwrap();
    house.serve();
    comes_about("it is gone", || !file.exists());
    house.stop_and_verify();
}

#[test]
fn a_ledger_key_signs_checkpoints_from_its_activation_until_it_is_retired() {
    let mut house = House::new().with_preload().initialised();
    house.serve();
    rotate(&house, "ledger").ok();
    // At most two sign: the third waits.
    rotate(&house, "ledger").ok();
    become_states(&house, "ledger", &["prepublished", "active", "retiring"]);
    assert_eq!(signatures_of(&next_checkpoint(&house, "a new checkpoint")), 2);
    later(&house, 3_700);
    become_states(&house, "ledger", &["active", "retiring", "retired"]);
    assert_eq!(signatures_of(&next_checkpoint(&house, "the next checkpoint")), 2);
    let entries = house.stopped_entries();
    let notes = entries.iter().filter_map(|body| match body {
        Body::AuthorityStepped(step) if step.to() == AuthorityState::Active => Some(signatures_of(&step.checkpoint)),
        _ => None,
    });
    assert_eq!(notes.collect::<Vec<_>>(), [2, 2], "each came into service by the one before and itself");
    house.verify().ok();
}

#[test]
fn a_file_that_cannot_be_written_is_told_and_written_at_the_next_look() {
    let mut house = House::serving();
    let told = |house: &House| house.keyward(&["status", "--format", "json"]).ok().json()["files_behind"].to_string();
    assert_eq!(told(&house), "[]");
    // Where a file is to be there is something that cannot be replaced.
    let blocked = ["issuing.pem", "crl.der"].map(|name| house.state().join(name));
    for path in &blocked {
        comes_about("the daemon has written it", || path.exists());
        std::fs::remove_file(path).unwrap();
        std::fs::create_dir(path).unwrap();
        std::fs::write(path.join("in the way"), b"").unwrap();
    }
    rotate(&house, "issuing").ok();
    assert_eq!(states(&house, "issuing"), ["active", "retiring"], "nothing waits for files");
    assert!(told(&house).contains("issuing.pem") && told(&house).contains("crl.der"), "{}", told(&house));
    assert!(house.keyward(&["status"]).ok().stdout.contains("NOT WRITTEN"));
    let agent = house.attested("builder/1");
    for path in &blocked {
        std::fs::remove_dir_all(path).unwrap();
    }
    comes_about("they are written", || told(&house) == "[]");
    assert_eq!(crate::house::certificates(&blocked[0])[0], agent.chain()[1]);
    assert_eq!(std::fs::read(&blocked[1]).unwrap(), {
        let path = house.path("shown.der");
        house.keyward(&["crl", "show", "--der", path.to_str().unwrap()]).ok();
        std::fs::read(path).unwrap()
    });
    assert_eq!(house.log().matches("files do not say what is in force").count(), 2, "one line each: {}", house.log());
    drop(agent);
    house.stop_and_verify();
}

/// The server's certificate is of an authority that retires at a moment when nothing can be signed.
#[test]
fn the_servers_certificate_is_tried_again_after_a_retirement_without_it() {
    let mut house = House::new().with_preload().with_shim().initialised();
    house.serve();
    rotate(&house, "issuing").ok();
    let wire = house.wire();
    let before = wire.server_certificate();
    house.shim().tell("fail C_Sign rv=0x30 count=all");
    later(&house, 700);
    become_states(&house, "issuing", &["active", "retired"]);
    assert_eq!(wire.server_certificate(), before, "nothing could sign another one");
    house.shim().tell("clear");
    comes_about("the server has a certificate of the new authority", || wire.server_certificate() != before);
    let issuing = std::fs::read(house.state().join("issuing.pem")).unwrap();
    let issuing = pem::parse(issuing).unwrap().into_contents();
    let (_, issuing) = x509_parser::parse_x509_certificate(&issuing).unwrap();
    let now = wire.server_certificate();
    let (_, now) = x509_parser::parse_x509_certificate(&now).unwrap();
    now.verify_signature(Some(issuing.public_key())).expect("it is of the active one");
    drop(wire);
    house.stop_and_verify();
}

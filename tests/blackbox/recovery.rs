//! A token whose calls hang: whoever waits for them hears of it, everybody else is served, and what cannot be helped inside the process
//! is helped by a new one.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use keyward::proto::TokenRole;
use rustix::process::Signal;

use crate::crash::{Holder, are_in_the_book};
use crate::faults::{digest, lost_tbs, ready_again, serial, unavailable, until_unknown};
use crate::house::wire::{Answer, Face, ServingStatus};
use crate::house::{Body, DEADLINE, House, Remote};
use crate::instruments::{self, slow};
use crate::ledger::one_outcome_each;

/// EX_TEMPFAIL: restart me.
const RESTART: Option<i32> = Some(75);
/// How soon anybody hears that a token is gone, or back.
const SOON: Duration = Duration::from_secs(1);

/// Deadlines short enough for a test.
fn house() -> House {
    House::new()
        .configured("limits", "live_certificates_per_agent = 64")
        .configured("limits", "sign_deadline_ms = 1000")
        .with_shim()
        .initialised()
        .served()
}

/// What `keyward hsm status` shows of the authority's token: lanes that serve, lanes that hang.
fn lanes(house: &House) -> (u64, u64) {
    let tokens = house.keyward(&["hsm", "status", "--format", "json"]).json();
    let authority = tokens.as_array().unwrap().iter().find(|token| token["role"] == "authority").expect("a token");
    (authority["lanes"].as_u64().unwrap(), authority["hanging"].as_u64().unwrap())
}

/// Waits until so many lanes hang. Nothing tells of it.
#[track_caller]
fn lanes_become(house: &House, wanted: (u64, u64)) {
    let until = Instant::now() + DEADLINE;
    while lanes(house) != wanted {
        assert!(Instant::now() < until, "lanes that serve and that hang: {:?}, not {wanted:?}", lanes(house));
        thread::sleep(Duration::from_millis(20));
    }
}

/// How long until health is as wanted, which it is not yet.
fn takes(house: &House, wanted: ServingStatus, what: impl FnOnce()) -> Duration {
    let wire = house.wire();
    let mut health = wire.watch_health("");
    health.becomes(match wanted {
        ServingStatus::Serving => ServingStatus::NotServing,
        _ => ServingStatus::Serving,
    });
    let from = Instant::now();
    what();
    health.becomes(wanted);
    from.elapsed()
}

/// Nothing was signed twice, nothing has two outcomes, everything given is in the book.
fn holds(house: &mut House, holders: &[&Holder]) {
    let entries = house.stopped_entries();
    for holder in holders {
        are_in_the_book(&entries, holder);
    }
    one_outcome_each(&entries);
    let signatures = house.signatures();
    let intents = entries.iter().filter_map(|body| if let Body::Intended(intent) = body { Some(&intent.tbs) } else { None });
    for tbs in intents {
        assert!(signatures.of_digest(&digest(tbs)) <= 1, "an intent was signed twice");
    }
    house.verify().ok();
}

#[test]
fn while_a_lane_hangs_everybody_but_its_caller_is_served() {
    let mut house = house();
    let (mut one, mut other) = (Holder::attest(&house, "builder/1"), Holder::attest(&house, "builder/2"));
    let over = AtomicBool::new(false);
    let served = thread::scope(|scope| {
        let (shared, over) = (&house, &over);
        let other = &mut other;
        let serving = scope.spawn(move || {
            let (mut served, mut longest) = (0, Duration::ZERO);
            while !over.load(Ordering::SeqCst) && served < 50 {
                let from = Instant::now();
                // The fault may meet this one instead: then it is the caller of the lane that hangs.
                if other.try_renew(shared).is_ok() {
                    (served, longest) = (served + 1, longest.max(from.elapsed()));
                }
                // As many as may be live at once have to last.
                thread::sleep(Duration::from_millis(20));
            }
            (served, longest)
        });
        let from = Instant::now();
        until_unknown(shared, &mut one, "hang C_Sign", || ready_again(shared));
        eprintln!("the caller was told after {:.3} s", from.elapsed().as_secs_f64());
        assert_eq!(shared.shim().number("hanging"), 1);
        over.store(true, Ordering::SeqCst);
        serving.join().unwrap()
    });
    eprintln!("{} others were served, each within {:.3} s", served.0, served.1.as_secs_f64());
    assert!(served.0 > 0 && served.1 < SOON, "{served:?}");
    // Two lanes are configured: a spare has taken the place of the one that hangs.
    lanes_become(&house, (2, 1));
    assert_eq!(house.wire().health(Face::Operator, "").unwrap(), ServingStatus::Serving);
    other.try_renew(&house).unwrap();
    let lost = lost_tbs(&house, "builder/1");
    assert_eq!(house.signatures().of_digest(&digest(&lost)), 0, "it hangs before the token has signed");
    house.shim().tell("release");
    lanes_become(&house, (2, 0));
    assert_eq!(house.signatures().of_digest(&digest(&lost)), 1, "the late signature was made");
    one.try_renew(&house).unwrap();
    assert!(!one.given.contains(&lost), "and never left");
    assert_ne!(serial(&lost), serial(one.given.last().unwrap()));
    holds(&mut house, &[&one, &other]);
}

#[test]
fn when_every_lane_hangs_the_daemon_says_so_within_a_second_and_serves_again_when_they_come_back_in_time() {
    let mut house = house();
    let mut holder = Holder::attest(&house, "builder/1");
    let mut late = Vec::new();
    for round in 0..if slow() { 10 } else { 3 } {
        let logins = house.signatures().logins;
        let away = takes(&house, ServingStatus::NotServing, || drop(house.shim().tell("hang C_Sign count=all")));
        // Its first lane, and a spare that was tried.
        let (_, hanging) = lanes(&house);
        assert!(hanging <= 2, "{hanging} lanes were given up");
        let parked = house.shim().number("hanging");
        unavailable(holder.try_renew(&house));
        let back = takes(&house, ServingStatus::Serving, || drop(house.shim().tell("clear")));
        eprintln!("round {round}: unready {:.3} s, back {:.3} s, {parked} calls hung", away.as_secs_f64(), back.as_secs_f64());
        holder.try_renew(&house).unwrap();
        assert!(house.signatures().logins - logins <= 2, "one login for each token");
        if away > SOON || back > SOON {
            late.push((away, back));
        }
    }
    assert!(late.is_empty(), "late: {late:?}");
    holds(&mut house, &[&holder]);
}

/// The intent of a caller whose lane hangs has an outcome, whoever writes it: this daemon or the next.
#[test]
fn when_every_lane_hangs_for_good_the_daemon_ends_with_75_and_the_next_one_serves() {
    let mut house = house();
    let mut holder = Holder::attest(&house, "builder/1");
    let from = Instant::now();
    house.shim().tell("hang C_Sign count=all");
    unavailable(holder.try_renew(&house).or_else(gone));
    assert_eq!(house.ended(), RESTART);
    eprintln!("ended {:.3} s after the first call hung", from.elapsed().as_secs_f64());
    let (entries, from) = (house.ended_entries(), Instant::now());
    let open = open_intents(&entries);
    house.serve();
    eprintln!("{open} intents were open; the next daemon serves after {:.3} s", from.elapsed().as_secs_f64());
    assert_eq!(open_intents(&house.entries()[..entries.len() + open]), 0);
    holder.try_renew(&house).unwrap();
    holds(&mut house, &[&holder]);
}

/// A connection that ends with the daemon is no refusal.
fn gone(refusal: crate::house::wire::Refused) -> Answer<()> {
    if refusal.reason.is_empty() { Ok(()) } else { Err(refusal) }
}

fn open_intents(entries: &[Body]) -> usize {
    let count = |what: fn(&Body) -> bool| entries.iter().filter(|body| what(body)).count();
    let ended = |body: &Body| matches!(body, Body::Released(_) | Body::Withheld(_) | Body::Failed(_) | Body::Unknown(_));
    count(|body| matches!(body, Body::Intended(_))) - count(ended)
}

#[test]
fn two_lanes_may_hang_for_good_and_the_third_ends_the_daemon() {
    // One token: whoever meets the fault, it is one of its lanes that hangs.
    let mut house =
        House::new().configured("limits", "sign_deadline_ms = 1000").with_one_token().with_shim().initialised().served();
    let mut holder = Holder::attest(&house, "builder/1");
    for hanging in 1..=2 {
        house.shim().tell("hang C_Sign");
        house.shim().tell(&format!("await hanging={hanging}"));
        lanes_become(&house, (2, hanging));
        holder.try_renew(&house).unwrap();
        assert_eq!(house.wire().health(Face::Operator, "").unwrap(), ServingStatus::Serving);
    }
    let from = Instant::now();
    house.shim().tell("hang C_Sign");
    assert_eq!(house.ended(), RESTART);
    eprintln!("ended {:.3} s after the third call hung", from.elapsed().as_secs_f64());
    house.serve();
    holder.try_renew(&house).unwrap();
    holds(&mut house, &[&holder]);
}

/// Calls of a recovery, and a fault that brings it about.
const RECOVERING: [(&str, &str); 7] = [
    ("C_Finalize", "fail C_SignInit rv=0x30"),
    ("C_Initialize", "fail C_SignInit rv=0x30"),
    ("C_GetSlotList", "fail C_SignInit rv=0x30"),
    ("C_GetTokenInfo", "fail C_SignInit rv=0x30"),
    ("C_OpenSession", "fail C_SignInit rv=0x30"),
    ("C_Login", "fail C_SignInit rv=0x30"),
    ("C_Login", "logout"),
];

/// What has to work without a token.
fn works_without_a_token(house: &House, agent: &str) {
    house.keyward(&["status"]).exits(5);
    house.keyward(&["hsm", "status"]).exits(5);
    assert_eq!(house.wire().health(Face::Operator, "hsm").unwrap(), ServingStatus::NotServing);
    house.quarantine(agent).ok();
}

#[test]
fn a_recovery_that_hangs_keeps_nobody_from_a_quarantine_and_ends_well_when_the_hang_does() {
    let mut house = house();
    let mut holder = Holder::attest(&house, "builder/1");
    for (round, (function, fault)) in RECOVERING.into_iter().enumerate() {
        let bad = Holder::attest(&house, &format!("bad/{round}"));
        let shim = house.shim();
        shim.tell(&format!("hang {function}"));
        let away = takes(&house, ServingStatus::NotServing, || drop(shim.tell(fault)));
        shim.tell("await hanging=1");
        works_without_a_token(&house, &bad.name);
        unavailable(holder.try_renew(&house));
        let back = takes(&house, ServingStatus::Serving, || drop(shim.tell("clear")));
        eprintln!("{function} hung: unready {:.3} s, back {:.3} s", away.as_secs_f64(), back.as_secs_f64());
        assert!(away < SOON && back < SOON, "{function}: {away:?}, {back:?}");
        holder.try_renew(&house).unwrap();
    }
    // Asked to stop, it stops all the same.
    house.shim().tell("hang C_Login");
    house.shim().tell("logout");
    house.shim().tell("await hanging=1");
    assert_eq!(house.stop(), 0);
    // That login has not ended: whether it cost a try is for an operator to judge.
    house.start();
    assert!(!house.daemon().was_ready());
    house.keyward(&["hsm", "unlock"]).ok();
    assert!(house.daemon().is_ready());
    // The stop itself may hang.
    house.shim().tell("hang C_Finalize");
    holds(&mut house, &[&holder]);
}

#[test]
fn a_recovery_that_hangs_for_good_ends_the_daemon_with_75() {
    if !slow() {
        return;
    }
    for (function, fault) in RECOVERING {
        let mut house = house();
        let mut holder = Holder::attest(&house, "builder/1");
        house.shim().tell(&format!("hang {function}"));
        let from = Instant::now();
        house.shim().tell(fault);
        assert_eq!(house.ended(), RESTART);
        eprintln!("{function} hung: ended after {:.3} s", from.elapsed().as_secs_f64());
        if function == "C_Login" {
            house.keyward(&["hsm", "unlock"]).ok();
        }
        house.serve();
        holder.try_renew(&house).unwrap();
        holds(&mut house, &[&holder]);
    }
}

/// Calls of a start. The second token's are other calls than the first one's.
const STARTING: [&str; 6] = [
    "hang C_Initialize",
    "hang C_GetSlotList",
    "hang C_OpenSession",
    "hang C_Login",
    "hang C_Login nth=2",
    "hang C_Finalize\nfail C_GetSlotList rv=0x30",
];

#[test]
fn a_start_that_hangs_keeps_nobody_from_a_quarantine_and_ends_well_when_the_hang_does() {
    thread::scope(|scope| {
        for script in STARTING {
            scope.spawn(move || {
                let mut house = house();
                let mut holder = Holder::attest(&house, "builder/1");
                let bad = Holder::attest(&house, "bad/1");
                assert_eq!(house.stop(), 0);
                house.shim_script(script);
                house.start();
                assert!(!house.daemon().was_ready(), "{script}");
                house.shim().tell("await hanging=1");
                works_without_a_token(&house, &bad.name);
                house.shim().tell("clear");
                assert!(house.daemon().is_ready(), "{script}");
                house.shim_script("");
                holder.try_renew(&house).unwrap();
                holds(&mut house, &[&holder]);
            });
        }
    });
}

#[test]
fn a_start_that_hangs_for_good_ends_with_75_or_when_it_is_asked_to() {
    thread::scope(|scope| {
        for script in STARTING {
            scope.spawn(move || {
                let mut house = house();
                assert_eq!(house.stop(), 0);
                house.shim_script(script);
                house.start();
                house.shim().tell("await hanging=1");
                if slow() {
                    let from = Instant::now();
                    assert_eq!(house.daemon().ended_within(4 * DEADLINE), RESTART, "{script}");
                    eprintln!("{script}: ended after {:.3} s", from.elapsed().as_secs_f64());
                } else {
                    house.daemon_signal(Signal::TERM);
                    assert_eq!(house.ended(), Some(0), "{script}");
                }
            });
        }
    });
}

/// Signatures made in the authority's token.
fn signed_by_authorities(house: &House) -> usize {
    let entries = house.entries();
    let ids: Vec<String> = entries
        .iter()
        .filter_map(|body| match body {
            Body::KeyIntended(key) if key.token() == TokenRole::Authority => Some(&key.key_id),
            _ => None,
        })
        .map(|id| id.iter().map(|byte| format!("{byte:02x}")).collect())
        .collect();
    assert!(!ids.is_empty());
    house.signatures().made.iter().filter(|((id, _), _)| ids.contains(id)).map(|(_, count)| count).sum()
}

/// Another process initialises the authority's token anew: same label, and for each key another one with its CKA_ID.
#[test]
fn a_token_that_was_initialised_under_the_daemon_signs_nothing_for_it_and_the_right_one_serves_when_it_is_back() {
    let mut house = house();
    let mut holder = Holder::attest(&house, "builder/1");
    for pin in ["house-pin-1234", "another-pin-1234"] {
        let logins = house.signatures().logins;
        house.keep_tokens();
        let away = takes(&house, ServingStatus::NotServing, || instruments::make_another(&house, "authority", pin));
        let gone = Instant::now();
        let signed = signed_by_authorities(&house);
        unavailable(holder.try_renew(&house));
        house.keyward(&["hsm", "test"]).exits(5);
        // Several attempts to recover have met the foreign token by now.
        thread::sleep(Duration::from_millis(1500));
        assert_eq!(signed_by_authorities(&house), signed, "a foreign key has signed");
        let tried = house.signatures().logins - logins;
        let (from, absent) = (Instant::now(), gone.elapsed());
        house.bring_tokens_back();
        if pin != "house-pin-1234" {
            let status = house.keyward(&["hsm", "status", "--format", "json"]).exits(5).json();
            assert_eq!((&status[0]["pin_pending"], tried), (&true.into(), 2), "one try, and the neighbour's login: {status}");
            house.keyward(&["hsm", "unlock"]).ok();
        }
        house.wire().health_becomes(Face::Operator, "", ServingStatus::Serving);
        let back = from.elapsed();
        // Where a module has to start afresh to see it (Kryoptic), its neighbour's service is spared: at most as long again.
        assert!(away < 2 * SOON && back < SOON + absent, "{pin:?}: {away:?}, {back:?} after {absent:?}");
        eprintln!("{pin:?}: unready {:.3} s, back {:.3} s, {tried} logins", away.as_secs_f64(), back.as_secs_f64());
        holder.try_renew(&house).unwrap();
    }
    holds(&mut house, &[&holder]);
}

#[test]
fn a_pin_of_which_one_try_is_left_is_not_tried_by_the_daemon() {
    for (script, why) in [("pin_tries n=1", "one more wrong PIN would lock it"), ("pin_tries n=0", "the user PIN is locked")] {
        // At the start, and in the middle of its life.
        let mut house = House::new().with_one_token().with_shim().initialised();
        let logins = house.signatures().logins;
        house.shim_script(script);
        house.start();
        assert!(!house.daemon().was_ready());
        house.keyward(&["status"]).exits(5);
        assert!(house.keyward(&["hsm", "status"]).exits(5).stdout.contains(why), "{script}");
        assert_eq!(house.signatures().logins, logins, "{script}");
        house.shim().tell("clear");
        assert!(house.daemon().is_ready());
        assert_eq!(house.signatures().logins, logins + 1);
        let wire = house.wire();
        let mut health = wire.watch_health("");
        health.becomes(ServingStatus::Serving);
        house.shim().tell(script);
        house.shim().tell("logout");
        health.becomes(ServingStatus::NotServing);
        let said = |house: &House| house.keyward(&["hsm", "status"]).exits(5).stdout;
        let until = Instant::now() + DEADLINE;
        while !said(&house).contains(why) {
            assert!(Instant::now() < until, "{}", said(&house));
        }
        assert_eq!(house.signatures().logins, logins + 1, "{script}");
        house.shim().tell("clear");
        health.becomes(ServingStatus::Serving);
        assert_eq!(house.signatures().logins, logins + 2);
        house.stop_and_verify();
    }
}

#[test]
fn a_token_with_few_sessions_serves_with_fewer_lanes_and_says_so() {
    let house = House::new().with_shim();
    let config = std::fs::read_to_string(house.config()).unwrap();
    std::fs::write(house.config(), config.replace("lanes = 2", "lanes = 8")).unwrap();
    house.shim_script("sessions_max n=5");
    let mut house = house.initialised().served();
    let mut holder = Holder::attest(&house, "builder/1");
    assert_eq!(lanes(&house), (2, 0), "an anchor, an admin lane and one in reserve are the others");
    let status = house.keyward(&["hsm", "status", "--format", "json"]).ok().json();
    assert_eq!(status[0]["capabilities"]["sessions_max"], 5);
    assert!(house.log().contains("fewer lanes"), "the log says so");
    thread::scope(|scope| {
        for worker in 0..4 {
            let house = &house;
            scope.spawn(move || {
                let mut holder = Holder::attest(house, &format!("worker/{worker}"));
                for _ in 0..6 {
                    holder.try_renew(house).unwrap();
                }
            });
        }
    });
    assert!(house.shim().number("sessions") <= 10, "two tokens");
    // All of them are opened anew.
    house.shim().tell("logout");
    let until = Instant::now() + DEADLINE;
    while house.signatures().logins < 4 || holder.try_renew(&house).is_err() {
        assert!(Instant::now() < until, "it did not recover");
    }
    assert_eq!(lanes(&house), (2, 0));
    holds(&mut house, &[&holder]);
}

/// What the log says of an outage in which the daemon has tried often to have the token back.
#[test]
fn an_outage_is_told_when_it_begins_and_when_it_is_over_and_not_at_each_try() {
    let mut house = House::new().with_shim().initialised().served();
    let rounds =
        [("lose", "return"), ("fail C_SignInit rv=0x05 count=all", "clear"), ("fail C_Initialize rv=0x05 count=all", "clear")];
    for (round, (fault, remedy)) in rounds.into_iter().enumerate() {
        let bad = format!("bad/{round}");
        house.attested(&bad);
        let before = house.log().len();
        let said = |what: &str| house.log()[before..].lines().filter(|line| line.contains(what)).count();
        let until_said = |what: &str| {
            let until = Instant::now() + DEADLINE;
            while said(what) == 0 {
                assert!(Instant::now() < until, "{fault}: the log does not say {what:?}");
                thread::sleep(Duration::from_millis(20));
            }
        };
        let restarts = house.shim().calls("C_Initialize");
        takes(&house, ServingStatus::NotServing, || {
            house.shim().tell(fault);
            // What meets the last one is a restart, which something has to bring about.
            house.shim().tell("fail C_SignInit rv=0x30");
        });
        // Something new in the book, of which no checkpoint can be signed.
        house.quarantine(&bad).ok();
        until_said("no checkpoint could be signed");
        let until = Instant::now() + DEADLINE;
        while house.shim().calls("C_Initialize") < restarts + 8 {
            assert!(Instant::now() < until, "{fault}: it does not try");
            thread::sleep(Duration::from_millis(20));
        }
        takes(&house, ServingStatus::Serving, || drop(house.shim().tell(remedy)));
        until_said("ready again after");
        until_said("a checkpoint was signed again after");
        let log = house.log()[before..].to_owned();
        let line = log.lines().find(|line| line.contains("not ready")).expect("it was told");
        assert!(line.contains("authority") || line.contains("agents"), "which token? {line}");
        assert!(line.contains("CKR_"), "why? {line}");
        for (what, most) in [
            ("not ready", 1),
            ("ready again", 1),
            ("no checkpoint could be signed", 1),
            // One of each token.
            ("the token is out of service token=", 2),
            ("back in service", 2),
            ("not back yet", 2),
        ] {
            assert!(said(what) <= most, "{fault}: {} times {what:?} in\n{log}", said(what));
        }
        eprintln!("{fault}: {} lines", log.lines().count());
    }
    house.stop_and_verify();
}

/// The process that has the tokens dies and is started again; the daemon stays.
#[test]
fn a_token_server_that_dies_and_returns_is_noticed_within_a_second_each_way() {
    let mut house = House::new()
        .configured("limits", "live_certificates_per_agent = 64")
        .configured("limits", "sign_deadline_ms = 1000")
        .with_shim()
        .with_remote_tokens();
    let mut remote = Some(Remote::start(&house));
    house = house.initialised().served();
    let mut holder = Holder::attest(&house, "builder/1");
    let mut late = Vec::new();
    for round in 0..if slow() { 10 } else { 3 } {
        let away = takes(&house, ServingStatus::NotServing, || drop(remote.take()));
        unavailable(holder.try_renew(&house));
        // A short loss and longer ones.
        thread::sleep(Duration::from_millis(round * 1500));
        remote = Some(Remote::start(&house));
        let from = Instant::now();
        while let Err(refusal) = holder.try_renew(&house) {
            unavailable::<()>(Err(refusal));
            assert!(from.elapsed() < DEADLINE, "it did not recover");
        }
        let back = from.elapsed();
        eprintln!("round {round}: unready {:.3} s, next certificate {:.3} s", away.as_secs_f64(), back.as_secs_f64());
        if away > SOON || back > SOON {
            late.push((away, back));
        }
        house.wire().health_becomes(Face::Operator, "", ServingStatus::Serving);
    }
    // A server that hangs and goes on.
    let server = remote.as_ref().unwrap();
    let away = takes(&house, ServingStatus::NotServing, || server.signal(Signal::STOP));
    let back = takes(&house, ServingStatus::Serving, || server.signal(Signal::CONT));
    eprintln!("the server hung: unready {:.3} s, back {:.3} s", away.as_secs_f64(), back.as_secs_f64());
    holder.try_renew(&house).unwrap();
    assert!(away < SOON && back < SOON && late.is_empty(), "late: {late:?}");
    holds(&mut house, &[&holder]);
}

//! A token that fails in every way, under load: nothing wrong, nothing twice, nothing unrecorded leaves; nothing is lost; and the
//! daemon is ready again when the token is well.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::crash::{Holder, are_in_the_book};
use crate::house::wire::{Answer, Face, Refused, ServingStatus};
use crate::house::{Body, DEADLINE, House, Output};
use crate::instruments::slow;
use crate::ledger::{one_outcome_each, signed_beside_intents};

/// Certificates that may be live at once, of one agent: one that has had so many makes way for another.
const LIVE_MAX: usize = 64;

fn house() -> House {
    House::new().configured("limits", "live_certificates_per_agent = 64").with_shim().initialised().served()
}

/// The token is well: the daemon is ready again by itself.
pub fn ready_again(house: &House) {
    house.shim().tell("clear");
    house.wire().health_becomes(Face::Operator, "", ServingStatus::Serving);
}

/// What an agent may hear of a token that fails: to ask again, and when.
#[track_caller]
pub fn unavailable<T: std::fmt::Debug>(answer: Answer<T>) {
    if let Err(refusal) = answer {
        // A code that says "never" is refused for good, as far as the daemon can tell; the next request meets another.
        let for_good = refusal.reason == "HSM_REFUSED";
        let known = ["SIGNATURE_UNKNOWN", "HSM_UNAVAILABLE", "OVERLOADED", "REQUEST_IN_PROGRESS"];
        assert!(for_good || known.contains(&refusal.reason.as_str()), "{refusal:?}");
        assert_eq!(refusal.retry_after.is_some(), !for_good, "{refusal:?} says when to ask again");
    }
}

/// Agents that renew without a pause until told to stop; a new one where too many certificates of one are live.
fn renew_until(over: &AtomicBool, house: &House, worker: usize) -> Vec<Holder> {
    let mut holders: Vec<Holder> = Vec::new();
    let mut asked = LIVE_MAX;
    while !over.load(Ordering::SeqCst) {
        // A signature of which nobody knows counts as live.
        if asked >= LIVE_MAX - 4 {
            let name = format!("builder-{worker}/{}", holders.len());
            holders.push(Holder::attest_within(house, &name, 4 * DEADLINE).unwrap());
            asked = 1;
        }
        if let Some(holder) = holders.last_mut() {
            asked += 1;
            let answer = holder.try_renew(house);
            if let Err(refusal) = &answer {
                // As it was told, but sooner: load is wanted.
                thread::sleep(refusal.retry_after.unwrap_or_default() / 10);
            }
            unavailable(answer);
        }
    }
    holders
}

/// Every code at every function that the daemon calls, before it and after it; signatures spoilt; devices that restart; faults by chance.
fn rounds() -> Vec<String> {
    // Of each row of the fault table that a token may answer with while it signs; tests/hsm_room/faults.rs has their names.
    const CODES: [u32; 12] = [0x05, 0x06, 0x30, 0x31, 0x32, 0x60, 0x82, 0x90, 0xb3, 0xe0, 0x101, 0x8000_0001];
    let signing = CODES.iter().flat_map(|code| {
        [
            format!("fail C_SignInit rv={code} nth=3 count=2"),
            format!("fail C_Sign rv={code} nth=5"),
            format!("fail C_Sign rv={code} nth=4 after\ncorrupt C_Sign nth=9"),
        ]
    });
    let around = [
        "C_OpenSession",
        "C_CloseSession",
        "C_GetSessionInfo",
        "C_FindObjectsInit",
        "C_FindObjects",
        "C_FindObjectsFinal",
        "C_GetAttributeValue",
        "C_Login",
        "C_Finalize",
        "C_Initialize",
        "C_GetSlotList",
        "C_GetTokenInfo",
    ];
    // These are called when the daemon recovers: something has to be recovered from.
    let recovering = around.iter().enumerate().flat_map(|(at, function)| {
        let after = if at % 2 == 0 { "" } else { " after" };
        [0x30, 0x05].map(|code| format!("fail {function} rv={code}{after}\nfail C_SignInit rv=0x30"))
    });
    let chance = (1..=6).map(|seed| format!("random seed={seed} per_mille=20"));
    let restarts = (0..5).map(|_| "logout\nfail C_SignInit rv=0x82".to_owned());
    signing.chain(recovering).chain(restarts).chain(chance).collect()
}

#[test]
fn of_200_faults_at_every_function_under_load_nothing_wrong_twice_or_unrecorded_comes() {
    let mut house = house();
    let holders = {
        let (house, over) = (&house, &AtomicBool::new(false));
        thread::scope(|scope| {
            let workers: Vec<_> = (0..3).map(|worker| scope.spawn(move || renew_until(over, house, worker))).collect();
            for round in rounds() {
                let shim = house.shim();
                let (before, until) = (shim.number("faults"), Instant::now() + 4 * DEADLINE);
                round.lines().for_each(|fault| drop(shim.tell(fault)));
                let wanted = before
                    + if round.starts_with("random") {
                        25
                    } else {
                        round.lines().filter(|fault| *fault != "logout").count() as u64
                    };
                while let Err(why) = shim.ask(&format!("await faults={wanted}")) {
                    assert!(Instant::now() < until, "{round:?} was not met: {why}");
                }
                let from = Instant::now();
                ready_again(house);
                let met = shim.number("faults") - before;
                eprintln!("{:6.2} s to recover from {met} faults: {round:?}", from.elapsed().as_secs_f64());
            }
            over.store(true, Ordering::SeqCst);
            workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect::<Vec<_>>()
        })
    };
    let shim = house.shim();
    let (faults, searches) = (shim.number("faults"), shim.calls("C_FindObjectsInit"));
    eprintln!("{faults} faults; calls: {}", shim.tell("counts"));
    assert!(faults >= 200, "{faults} faults were met");
    holds(&mut house, holders, usize::try_from(searches).unwrap());
}

/// Each goes on; everything given is in the book; what the token signed is in the book, but for test signatures: at most one for each
/// search that binds a key.
fn holds(house: &mut House, mut holders: Vec<Holder>, searches: usize) {
    for holder in &mut holders {
        let until = Instant::now() + DEADLINE;
        while !holder.renew(house) {
            assert!(Instant::now() < until, "{} cannot go on", holder.name);
        }
    }
    let given: usize = holders.iter().map(|holder| holder.given.len()).sum();
    let entries = house.stopped_entries();
    for holder in &holders {
        are_in_the_book(&entries, holder);
    }
    one_outcome_each(&entries);
    let tests: usize = signed_beside_intents(house, &entries).values().sum();
    assert!(tests <= searches + 8, "{tests} signatures without an intent, {searches} searches");
    let count = |what: fn(&Body) -> bool| entries.iter().filter(|body| what(body)).count();
    eprintln!(
        "{given} certificates given; {} intents: {} released, {} unknown, {} failed; {tests} test signatures",
        count(|body| matches!(body, Body::Intended(_))),
        count(|body| matches!(body, Body::Released(_))),
        count(|body| matches!(body, Body::Unknown(_))),
        count(|body| matches!(body, Body::Failed(_))),
    );
    house.verify().ok();
}

/// The index of each intent that ended unknown.
fn unknown(entries: &[Body]) -> Vec<u64> {
    entries.iter().filter_map(|body| if let Body::Unknown(outcome) = body { Some(outcome.intent) } else { None }).collect()
}

/// What came of the last intent for an agent that ended unknown.
pub fn lost_tbs(house: &House, agent: &str) -> Vec<u8> {
    // The caller hears of it before the outcome is durable.
    let until = Instant::now() + DEADLINE;
    while house.keyward(&["status", "--format", "json"]).json()["ledger"]["open_intents"] != 0 {
        assert!(Instant::now() < until, "an intent stays open");
        thread::sleep(Duration::from_millis(5));
    }
    let entries = house.entries();
    let lost = unknown(&entries).into_iter().rev().find_map(|index| match &entries[usize::try_from(index).unwrap()] {
        Body::Intended(intent) if intent.agent == agent => Some(intent.tbs.clone()),
        _ => None,
    });
    lost.expect("an intent that ended unknown")
}

pub fn digest(bytes: &[u8]) -> Vec<u8> {
    aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes).as_ref().to_vec()
}

pub fn serial(tbs: &[u8]) -> Vec<u8> {
    use x509_parser::prelude::FromDer as _;
    x509_parser::certificate::TbsCertificate::from_der(tbs).unwrap().1.raw_serial().to_vec()
}

/// Arms the fault until it meets a certificate: the daemon's own signatures may meet it first.
pub fn until_unknown(house: &House, holder: &mut Holder, fault: &str, after_each: impl Fn()) -> Refused {
    let until = Instant::now() + DEADLINE;
    loop {
        assert!(Instant::now() < until, "{fault} never met a certificate");
        house.shim().tell(fault);
        match holder.try_renew(house) {
            Err(refusal) if refusal.reason == "SIGNATURE_UNKNOWN" => return refusal,
            answer => unavailable(answer),
        }
        after_each();
    }
}

#[test]
fn a_signature_whose_answer_is_lost_is_recorded_as_unknown_and_never_asked_for_again() {
    let mut house = house();
    let mut holder = Holder::attest(&house, "builder/1");
    let refusal = until_unknown(&house, &mut holder, "fail C_Sign rv=0x30 after", || ready_again(&house));
    assert!(refusal.retry_after.is_some(), "{refusal:?}");
    ready_again(&house);
    holder.try_renew(&house).unwrap();
    let lost = lost_tbs(&house, "builder/1");
    assert_eq!(house.signatures().of_digest(&digest(&lost)), 1, "it was signed, once");
    assert!(!holder.given.contains(&lost), "it was never handed out");
    assert_ne!(serial(&lost), serial(holder.given.last().unwrap()), "the next attempt has a serial of its own");
    let searches = usize::try_from(house.shim().calls("C_FindObjectsInit")).unwrap();
    holds(&mut house, vec![holder], searches);
}

#[test]
fn a_signature_that_comes_too_late_is_never_handed_out() {
    let mut house = House::new().configured("limits", "sign_deadline_ms = 1000").with_shim().initialised().served();
    {
        let (mut holder, doomed) = (Holder::attest(&house, "builder/1"), house.attested("builder/2"));
        let from = Instant::now();
        until_unknown(&house, &mut holder, "hang C_Sign", || ready_again(&house));
        eprintln!("told after {:.3} s", from.elapsed().as_secs_f64());
        // One lane hangs: the operator is served, and what needs the token has another.
        assert_eq!(house.shim().number("hanging"), 1);
        doomed.quarantine().ok();
        let lost = lost_tbs(&house, "builder/1");
        assert_eq!(house.signatures().of_digest(&digest(&lost)), 0);
        house.shim().tell("release");
        let until = Instant::now() + DEADLINE;
        while house.signatures().of_digest(&digest(&lost)) == 0 {
            assert!(Instant::now() < until, "the parked call never signed");
            thread::sleep(Duration::from_millis(5));
        }
        ready_again(&house);
        holder.try_renew(&house).unwrap();
        assert!(!holder.given.contains(&lost));
        assert_ne!(serial(&lost), serial(holder.given.last().unwrap()));
        doomed.renew().refused("AGENT_QUARANTINED");
    }
    house.stop_and_verify();
}

#[test]
fn a_signature_by_another_key_or_with_a_bit_flipped_never_leaves() {
    for fault in ["remap", "corrupt C_Sign count=all"] {
        let mut house = house();
        let mut holder = Holder::attest(&house, "builder/1");
        let before = house.shim().number("faults");
        house.shim().tell(fault);
        for _ in 0..5 {
            let answer = holder.try_renew(&house);
            assert!(answer.is_err(), "{fault}: a certificate was handed out");
            unavailable(answer);
        }
        assert!(house.shim().number("faults") > before, "{fault}: nothing was met");
        ready_again(&house);
        holder.try_renew(&house).unwrap();
        let entries = house.stopped_entries();
        are_in_the_book(&entries, &holder);
        one_outcome_each(&entries);
        house.verify().ok();
    }
}

/// Devices as they are sold: few sessions and slow, no read-only sessions, no session keys.
#[test]
fn every_kind_of_device_serves() {
    for preset in ["yubihsm", "cloudhsm", "tpm"] {
        let from = Instant::now();
        let house = House::new().with_shim();
        house.shim_script(&format!("preset {preset}\n"));
        let mut house = house.initialised().served();
        {
            let agent = house.attested("builder/1");
            agent.renew().ok();
            agent.quarantine().ok();
            agent.renew().refused("AGENT_QUARANTINED");
        }
        assert!(house.shim().calls("C_Sign") > 0);
        house.stop_and_verify();
        eprintln!("{preset}: {:.1} s from init to stop", from.elapsed().as_secs_f64());
    }
}

#[test]
fn a_device_that_goes_and_returns_is_noticed_within_a_second_each_way() {
    let mut house = house();
    {
        let (wire, shim) = (house.wire(), house.shim());
        let mut holder = Holder::attest(&house, "builder/1");
        let mut health = wire.watch_health("");
        health.becomes(ServingStatus::Serving);
        let mut late = Vec::new();
        for round in 0..if slow() { 10 } else { 3 } {
            // A short loss and longer ones: recovery has tried several times by then, and waits between its tries.
            let away = Duration::from_millis(round * 1500);
            for (command, wanted) in [("lose", ServingStatus::NotServing), ("return", ServingStatus::Serving)] {
                let from = Instant::now();
                shim.tell(command);
                health.becomes(wanted);
                let took = from.elapsed();
                eprintln!("{command} after {away:?}: {:.3} s", took.as_secs_f64());
                if took > Duration::from_secs(1) {
                    late.push((command, away, took));
                }
                if command == "lose" {
                    unavailable(holder.try_renew(&house));
                    thread::sleep(away);
                }
            }
            holder.try_renew(&house).unwrap();
        }
        assert!(late.is_empty(), "late: {late:?}");
    }
    house.stop_and_verify();
}

/// Sessions, handles and the login are gone; the device is there.
#[test]
fn a_device_that_restarts_is_served_again_after_one_login_for_each_token() {
    let mut house = house();
    let mut holder = Holder::attest(&house, "builder/1");
    for round in 1..=3 {
        let logins = house.signatures().logins;
        house.shim().tell("logout");
        let (from, until) = (Instant::now(), Instant::now() + DEADLINE);
        while let Err(refusal) = holder.try_renew(&house) {
            unavailable::<()>(Err(refusal));
            assert!(Instant::now() < until, "it did not recover");
        }
        eprintln!("restart {round}: the next certificate after {:.3} s", from.elapsed().as_secs_f64());
        // The other token's canary may be what notices.
        ready_again(&house);
        holder.try_renew(&house).unwrap();
        assert_eq!(house.signatures().logins - logins, 2);
    }
    house.stop_and_verify();
}

/// Before the length is asked for, before the signature, and so on: the process dies inside C_Sign.
#[test]
fn a_daemon_that_dies_inside_the_module_signs_nothing_again() {
    let mut house = house();
    let mut holder = Holder::attest(&house, "builder/1");
    for call in 1..=4 {
        house.shim().tell(&format!("abort C_Sign nth={call}"));
        // Its own signatures go on: the count is reached whether or not the agent is served.
        let _ = holder.try_renew(&house);
        assert_eq!(house.ended(), None, "it dies of a signal");
        house.serve();
        are_in_the_book(&house.entries(), &holder);
        holder.try_renew(&house).unwrap();
    }
    let searches = usize::try_from(house.shim().calls("C_FindObjectsInit")).unwrap();
    // Each life binds its keys anew; only the last one's searches are still counted.
    holds(&mut house, vec![holder], 5 * searches);
}

/// A mechanism, a kind of key, a key that is used up: to ask again at once is of no use, and nobody is told to.
#[test]
fn what_the_token_refuses_for_good_is_told_apart_from_what_passes() {
    let mut house = house();
    let mut holder = Holder::attest(&house, "builder/1");
    for code in [0x70, 0x63, 0x203] {
        let until = Instant::now() + DEADLINE;
        let refusal = loop {
            assert!(Instant::now() < until, "{code:#x} never met a certificate");
            house.shim().tell(&format!("fail C_SignInit rv={code:#x}"));
            // A canary may be what meets it.
            if let Err(refusal) = holder.try_renew(&house) {
                break refusal;
            }
        };
        assert_eq!((refusal.reason.as_str(), refusal.retry_after), ("HSM_REFUSED", None), "{refusal:?}");
        // The token serves whom it can.
        house.wire().health_becomes(Face::Operator, "", ServingStatus::Serving);
        // An operator has mended it.
        holder.try_renew(&house).unwrap();
    }
    let failed = |body: &Body| matches!(body, Body::Failed(failed) if failed.reason().as_str_name() == "HSM_REFUSED");
    // The daemon's own signatures may have met it, too.
    assert!(house.stopped_entries().into_iter().filter(failed).count() >= 3);
    house.verify().ok();
}

/// What the operator sees: the CLI says so, and its exit code.
#[test]
fn a_device_that_is_gone_is_told_to_operator_and_agent() {
    let mut house = house();
    {
        let agent = house.attested("builder/1");
        house.shim().tell("lose");
        house.wire().health_becomes(Face::Operator, "hsm", ServingStatus::NotServing);
        let refused: Output = agent.renew();
        assert_eq!(refused.code, 5, "{refused:?}");
        // Quarantine needs no token.
        agent.quarantine().ok();
        house.shim().tell("return");
        house.wire().health_becomes(Face::Operator, "", ServingStatus::Serving);
        agent.renew().refused("AGENT_QUARANTINED");
    }
    house.stop_and_verify();
}

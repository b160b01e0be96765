//! An operator unlocks a login: who did so, and why, is in the book before the PIN is tried, and one unlock is one try.

use std::thread;
use std::time::{Duration, Instant};

use keyward::proto::TokenRole;

use crate::crash::Holder;
use crate::house::wire::{Face, ServingStatus};
use crate::house::{Body, DEADLINE, House, Output, write_private};
use crate::instruments::slow;

/// Of each unlock in the book: which token, and why. Each names whoever ran the command.
fn unlocks(entries: &[Body]) -> Vec<(TokenRole, String)> {
    let told = entries.iter().filter_map(|body| if let Body::HsmUnlocked(unlock) = body { Some(unlock) } else { None });
    told.map(|unlock| {
        let by = unlock.by.as_ref().expect("an operator");
        assert_eq!(by.uid, rustix::process::geteuid().as_raw());
        assert!(unlock.asked_unix_micros > 0 && !unlock.token.is_empty(), "{unlock:?}");
        (unlock.role(), by.reason.clone())
    })
    .collect()
}

fn of_authority(reasons: &[&str]) -> Vec<(TokenRole, String)> {
    reasons.iter().map(|reason| (TokenRole::Authority, (*reason).to_owned())).collect()
}

fn unlock(house: &House, reason: &str) -> Output {
    unlock_ends_with(house, reason, 0)
}

fn unlock_ends_with(house: &House, reason: &str, code: i32) -> Output {
    let said = house.keyward(&["hsm", "unlock", "--reason", reason, "--format", "json"]).exits(code);
    assert_eq!(said.json()["unlocked"], serde_json::json!(["authority"]));
    said
}

/// A daemon has tried a wrong PIN and has ended. How many logins there have been.
fn locked(house: &mut House) -> usize {
    house.misplace_pins();
    house.start();
    assert!(!house.daemon().was_ready());
    assert_eq!(house.stop(), 0);
    house.signatures().logins
}

/// Waits until `hsm status` says it of the authorities' token, which is out of service.
#[track_caller]
fn token_becomes(house: &House, is_so: impl Fn(&serde_json::Value) -> bool) -> serde_json::Value {
    let until = Instant::now() + DEADLINE;
    loop {
        let status = house.keyward(&["hsm", "status", "--format", "json"]);
        let token = status.json()[0].clone();
        if is_so(&token) {
            status.exits(5);
            return token;
        }
        assert!(Instant::now() < until, "{token}");
        thread::sleep(Duration::from_millis(20));
    }
}

/// Waits until the running daemon tries no login. Nothing tells of it.
#[track_caller]
fn is_locked(house: &House) {
    token_becomes(house, |token| token["pin_pending"] == true);
}

/// Waits until so many logins were tried.
#[track_caller]
fn logins_become(house: &House, wanted: usize) {
    let until = Instant::now() + DEADLINE;
    while house.signatures().logins < wanted {
        assert!(Instant::now() < until, "{} logins", house.signatures().logins);
        thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn an_unlock_without_a_daemon_is_in_the_book_before_the_next_one_tries_the_pin_whatever_comes_of_it() {
    let mut house = House::new().with_shim().initialised();
    let logins = locked(&mut house);
    assert!(unlock(&house, "the first").stderr.contains("started next"));
    assert_eq!(unlocks(&house.ended_entries()), []);
    house.shim_script("hang C_Login");
    house.start();
    house.shim().tell("await hanging=1");
    assert_eq!(unlocks(&house.entries()), of_authority(&["the first"]), "the login is still under way");
    // One that takes long is told, and not as one that failed.
    let token = token_becomes(&house, |token| token["fault"].as_str().is_some_and(|fault| fault.contains("is not open after")));
    assert_eq!(token["pin_pending"], false, "{token}");
    // It dies, and so do those who come after it: one unlock is one try, and one entry.
    house.kill9();
    house.shim_script("");
    for _ in 0..3 {
        house.start();
        assert!(!house.daemon().was_ready());
        assert_eq!(unlocks(&house.entries()), of_authority(&["the first"]));
        house.kill9();
    }
    let tried = house.signatures().logins;
    assert!(tried <= logins + 1, "{tried} logins, {logins} before");
    // The PIN is still wrong.
    unlock(&house, "the second");
    house.start();
    assert!(!house.daemon().was_ready());
    assert_eq!(house.signatures().logins, tried + 1);
    assert_eq!(unlocks(&house.entries()), of_authority(&["the first", "the second"]));
    // And the daemon that met it hears of the next one.
    house.return_pins();
    let said = unlock(&house, "the third");
    assert_eq!(said.json()["logged_in"], serde_json::json!(["authority"]), "{said:?}");
    assert!(house.daemon().is_ready());
    let listed = house.keyward(&["ledger", "list"]).ok().stdout;
    assert_eq!(listed.lines().filter(|line| line.contains("hsm_unlocked")).count(), 3, "{listed}");
    let by = format!("by=uid {}: the second", rustix::process::geteuid().as_raw());
    assert!(listed.contains(&by) && !listed.contains("by=…"), "{listed}");
    let whole = house.keyward(&["ledger", "list", "--format", "json"]).ok().stdout;
    assert!(whole.contains("the second"), "{whole}");
    assert_eq!(unlocks(&house.stopped_entries()), of_authority(&["the first", "the second", "the third"]));
    house.verify().ok();
}

#[test]
fn an_unlock_under_a_daemon_whose_token_came_back_is_in_the_book_before_the_pin_is_tried() {
    let mut house = House::new().with_one_token().with_shim().initialised().served();
    house.shim().tell("hang C_Login");
    house.shim().tell("fail C_Login rv=0xa0");
    house.shim().tell("logout");
    house.shim().tell("await hanging=1");
    let status = house.keyward(&["hsm", "status", "--format", "json"]).exits(5);
    assert_eq!(status.json()[0]["pin_pending"], false, "nothing came of the login yet: {status:?}");
    house.shim().tell("release");
    is_locked(&house);
    let logins = house.signatures().logins;
    // Wrong once more, and then slow.
    house.shim().tell("fail C_Login rv=0xa0");
    let said = unlock_ends_with(&house, "the first", 5);
    assert!(said.stderr.contains("refused again") && said.json()["logged_in"] == serde_json::json!([]), "{said:?}");
    assert_eq!(said.json()["refused"], serde_json::json!(["authority"]), "what came of it is on standard output, too");
    logins_become(&house, logins + 1);
    is_locked(&house);
    assert_eq!(unlocks(&house.entries()), of_authority(&["the first"]));
    house.shim().tell("hang C_Login");
    let unlocking = house.keyward_async(&["hsm", "unlock", "--reason", "the second"]);
    house.shim().tell("await hanging=1");
    assert_eq!(unlocks(&house.entries()), of_authority(&["the first", "the second"]), "the login is still under way");
    let status = house.keyward(&["hsm", "status", "--format", "json"]).exits(5);
    assert_eq!(status.json()[0]["pin_pending"], false, "what came of the one before is over: {status:?}");
    house.shim().tell("clear");
    house.wire().health_becomes(Face::Operator, "", ServingStatus::Serving);
    drop(unlocking);
    // Nothing is locked any more: that is no act.
    let said = house.keyward(&["hsm", "unlock"]).ok();
    assert!(said.stderr.contains("no login was locked"), "{said:?}");
    assert_eq!(unlocks(&house.stopped_entries()), of_authority(&["the first", "the second"]));
    assert_eq!(house.signatures().logins, logins + 2);
    house.verify().ok();
}

/// Nobody looks at `hsm status` unasked: it is the log that has to say so, and not ten seconds after the outage began.
#[test]
fn a_pin_that_a_running_daemon_is_refused_is_in_the_log_at_once_and_agents_hear_that_an_operator_is_needed() {
    let mut house = House::new().with_one_token().with_shim().initialised().served();
    let mut holder = Holder::attest(&house, "builder/1");
    house.shim().tell("fail C_Login rv=0xa0");
    let before = house.log().len();
    house.shim().tell("logout");
    is_locked(&house);
    let from = Instant::now();
    let until_said = |level: &str, words: &[&str]| {
        let says = |line: &str| line.contains(level) && words.iter().all(|word| line.contains(word));
        while !house.log()[before..].lines().any(says) {
            assert!(from.elapsed() < Duration::from_secs(5), "no {level} of {words:?} in\n{}", &house.log()[before..]);
            thread::sleep(Duration::from_millis(20));
        }
    };
    until_said("ERROR", &["PIN try is spent", "hsm.authority", "refused the PIN", "keyward hsm unlock"]);
    until_said("WARN", &["not ready", "hsm.authority", "keyward hsm unlock"]);
    let refusal = holder.try_renew(&house).unwrap_err();
    assert_eq!(refusal.reason, "HSM_UNAVAILABLE");
    assert!(refusal.message.contains("keyward's HSM") && refusal.message.contains("operator"), "{refusal:?}");
    assert!(!refusal.message.contains("in a moment"), "{refusal:?}");
    let refused = house.log()[before..].lines().filter(|line| line.contains("PIN try is spent")).count();
    assert_eq!(refused, 1, "once for each try");
    unlock(&house, "the PIN is right");
    house.wire().health_becomes(Face::Operator, "", ServingStatus::Serving);
    holder.try_renew(&house).unwrap();
    house.stop_and_verify();
}

#[test]
fn of_two_unlocks_before_a_daemon_hears_of_one_the_second_says_so() {
    let mut house = House::new().with_shim().initialised();
    let logins = locked(&mut house);
    unlock(&house, "the first");
    let said = house.keyward(&["hsm", "unlock", "--reason", "the second", "--format", "json"]).exits(3);
    assert!(said.stderr.contains("the first") && said.stderr.contains("not kept"), "{said:?}");
    assert_eq!(said.json()["unlocked"], serde_json::json!([]));
    assert_eq!(said.json()["not_kept"], serde_json::json!(["authority"]));
    house.start();
    assert!(!house.daemon().was_ready());
    assert_eq!(unlocks(&house.stopped_entries()), of_authority(&["the first"]));
    assert_eq!(house.signatures().logins, logins + 1);
}

#[test]
fn an_unlock_names_the_token_that_was_locked() {
    let mut house = House::new().with_shim().initialised();
    write_private(&house.path("agents.pin"), "not the PIN");
    house.start();
    assert!(!house.daemon().was_ready());
    house.return_pins();
    let said = house.keyward(&["hsm", "unlock", "--token", "authority"]).ok();
    assert!(said.stderr.contains("no login was locked"), "{said:?}");
    let said = house.keyward(&["hsm", "unlock", "--token", "agents"]).ok();
    assert_eq!(said.stdout, "agents: logged in\n");
    assert!(house.daemon().is_ready());
    assert_eq!(unlocks(&house.stopped_entries()), [(TokenRole::Agents, String::new())]);
    house.verify().ok();
}

/// A full disk has a reserve for what an operator does; a disk that cannot be trusted has none.
#[test]
fn an_unlock_that_cannot_be_recorded_unlocks_nothing_until_the_next_daemon_has_recorded_it() {
    let mut house = House::new().with_shim().initialised();
    let logins = locked(&mut house);
    house = house.with_preload();
    house.start();
    assert!(!house.daemon().was_ready());
    house.control().fail_next_sync();
    assert!(unlock_ends_with(&house, "the first", 5).stderr.contains("started next"));
    assert_eq!(house.ended(), Some(74));
    assert!(house.log().contains("an unlock could not be recorded"));
    assert_eq!(house.signatures().logins, logins, "the PIN was tried");
    house.control().clear();
    house.start();
    assert!(!house.daemon().was_ready());
    assert_eq!(house.signatures().logins, logins + 1);
    let mut told = unlocks(&house.stopped_entries());
    // What the disk did not confirm may be there all the same.
    told.dedup();
    assert_eq!(told, of_authority(&["the first"]));
}

/// Killed after each sync in turn, with its power cut: what is left never allows a second try, nor one that nobody knows of.
#[test]
fn a_power_cut_at_any_moment_makes_two_tries_of_no_unlock_and_forgets_none() {
    for sync in (1..).step_by(if slow() { 1 } else { 2 }) {
        let mut house = House::new().with_shim().initialised();
        let logins = locked(&mut house);
        unlock(&house, "the first");
        house = house.with_preload();
        house.control().kill_after_sync(sync);
        house.start();
        if !house.daemon().has_ended() {
            assert!(sync > 5, "it syncs more often than that before it says anything");
            return;
        }
        assert_eq!(house.ended(), None);
        house.control().clear();
        house.after_power_cut();
        let tried = house.signatures().logins - logins;
        assert!(tried <= unlocks(&house.ended_entries()).len(), "a try that nobody knows of, after sync {sync}");
        house.start();
        assert!(!house.daemon().was_ready());
        let mut told = unlocks(&house.stopped_entries());
        told.dedup();
        assert_eq!(told, of_authority(&["the first"]), "after sync {sync}");
        assert!(house.signatures().logins <= logins + 1, "after sync {sync}");
    }
}

/// Of operators who come at once, each is told the truth: who is told that a login was unlocked is in the book, with the reason, and nobody
/// else is; and there are no more tries than unlocks.
#[test]
fn of_operators_who_unlock_at_once_those_are_in_the_book_who_were_told_so() {
    let mut house = House::new().with_shim().initialised();
    let logins = locked(&mut house);
    house.start();
    assert!(!house.daemon().was_ready());
    let reasons = ["one", "two", "three", "four", "five", "six"];
    for round in 0..2 {
        // At first the PIN is wrong still, and then it is right.
        if round == 1 {
            house.return_pins();
        }
        let before = unlocks(&house.entries()).len();
        let said: Vec<Output> = thread::scope(|scope| {
            let ask = |reason| {
                let house = &house;
                scope.spawn(move || house.keyward(&["hsm", "unlock", "--reason", reason, "--format", "json"]))
            };
            let asked = reasons.map(ask);
            asked.into_iter().map(|asked| asked.join().unwrap()).collect()
        });
        let mut told = Vec::new();
        for (said, reason) in said.iter().zip(reasons) {
            assert!([0, 1, 3, 5].contains(&said.code), "{said:?}");
            // Somebody else's unlock, and this one came to nothing: that is said in words.
            let Ok(answer) = serde_json::from_str::<serde_json::Value>(&said.stdout) else {
                assert!(said.code == 1 && said.stderr.contains("recorded this moment"), "{said:?}");
                continue;
            };
            if answer["unlocked"] == serde_json::json!(["authority"]) {
                told.push((TokenRole::Authority, reason.to_owned()));
            } else {
                assert!(said.code == 3 || said.stderr.contains("no login was locked"), "{said:?}");
            }
        }
        assert!(!told.is_empty(), "{said:?}");
        let mut recorded = unlocks(&house.entries()).split_off(before);
        told.sort_by(|one, other| one.1.cmp(&other.1));
        recorded.sort_by(|one, other| one.1.cmp(&other.1));
        assert_eq!(recorded, told);
    }
    assert!(house.daemon().is_ready());
    let recorded = unlocks(&house.stopped_entries()).len();
    // Both tokens are logged in to, and at most one is tried for each unlock beside.
    assert!(
        house.signatures().logins <= logins + recorded + 1,
        "{} tries for {recorded} unlocks",
        house.signatures().logins - logins
    );
    house.verify().ok();
}

/// A PIN that cannot be read and a token that is away cost no try: the one that the unlock allowed is made when it can be.
#[test]
fn an_unlock_that_finds_no_pin_or_no_token_says_so_and_is_good_for_one_try_when_they_are_back() {
    let mut house = House::new().with_shim().initialised();
    let logins = locked(&mut house);
    house.start();
    assert!(!house.daemon().was_ready());
    let pin = house.path("authority.pin");
    std::fs::rename(&pin, house.path("elsewhere")).unwrap();
    let said = unlock_ends_with(&house, "the first", 5);
    assert!(said.stderr.contains("authority.pin") && said.json()["logged_in"] == serde_json::json!([]), "{said:?}");
    house.take_token_away("authority");
    house.return_pins();
    token_becomes(&house, |token| token["fault"].as_str().is_some_and(|fault| !fault.contains("authority.pin")));
    // There is nothing to unlock any more: it was, and no try was spent.
    let said = house.keyward(&["hsm", "unlock", "--reason", "the second"]).ok();
    assert!(said.stderr.contains("no login was locked"), "{said:?}");
    // A module that keeps what it has open takes the PIN of a token that is gone.
    let meanwhile = logins + usize::from(house.tokens_are_kept_open());
    assert_eq!(house.signatures().logins, meanwhile);
    house.bring_tokens_back();
    assert!(house.daemon().is_ready());
    assert_eq!(house.signatures().logins, meanwhile + 2, "once for each token");
    assert_eq!(unlocks(&house.stopped_entries()), of_authority(&["the first"]));
    house.verify().ok();
}

/// A second daemon over the same state has no word in it.
#[test]
fn a_daemon_that_may_not_have_the_ledger_carries_out_no_unlock() {
    let mut house = House::new().with_shim().initialised();
    let logins = locked(&mut house);
    house.start();
    assert!(!house.daemon().was_ready());
    house.daemon_signal(rustix::process::Signal::STOP);
    // The first cannot hear of it.
    let state = house.state();
    assert!(keyward::hsm::ask_to_unlock(&state, TokenRole::Authority, "the first").unwrap());
    let second = house.keyward(&["serve"]);
    assert_ne!(second.code, 0, "{second:?}");
    assert!(keyward::hsm::asked_to_unlock(&state, TokenRole::Authority).unwrap().is_some(), "it was carried out");
    assert_eq!(house.signatures().logins, logins);
    house.return_pins();
    house.daemon_signal(rustix::process::Signal::CONT);
    assert!(house.daemon().is_ready());
    assert_eq!(unlocks(&house.stopped_entries()), of_authority(&["the first"]));
    assert_eq!(house.signatures().logins, logins + 2, "once for each token");
    house.verify().ok();
}

//! What an operator asks of the tokens: which there are, how they are, whether they do what they are there for.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::time::{Duration, Instant};

use keyward::proto::{KeyStorage, Purpose};
use serde_json::Value;

use crate::house::keys::lives;
use crate::house::wire::{Face, ServingStatus};
use crate::house::{Body, DEADLINE, House, Output, instrument, run};
use crate::instruments;

/// The token of a role, of `keyward hsm status`, whose exit code says whether all of them are usable.
fn status(house: &House, role: &str) -> Value {
    let output = house.keyward(&["hsm", "status", "--format", "json"]);
    let tokens = output.json();
    let usable = tokens.as_array().unwrap().iter().all(|token| token["usable"] == true);
    let tokens = output.exits(if usable { 0 } else { 5 }).json();
    tokens.as_array().unwrap().iter().find(|token| token["role"] == role).expect("a token of that role").clone()
}

fn rows(output: &Output) -> Vec<Value> {
    output.json().as_array().unwrap().clone()
}

fn key_of(house: &House, purpose: Purpose) -> Vec<u8> {
    let intended = house.entries().into_iter().find_map(|body| match body {
        Body::KeyIntended(key) if key.purpose() == purpose => Some(key.key_id),
        _ => None,
    });
    intended.expect("a key of that purpose")
}

#[test]
fn slots_are_shown_before_init_without_a_pin_and_without_a_login() {
    let house = House::new().with_shim();
    for pin in ["authority.pin", "agents.pin"] {
        fs::remove_file(house.path(pin)).unwrap();
    }
    let slots = rows(&house.keyward(&["hsm", "slots", "--format", "json"]).ok());
    for role in ["authority", "agents"] {
        let slot = slots.iter().find(|slot| slot["label"] == role).expect("its slot");
        assert_eq!(slot["configured"], serde_json::json!([role]), "{slot}");
        assert_eq!((&slot["initialised"], &slot["pin"], &slot["error"]), (&true.into(), &Value::Null, &Value::Null), "{slot}");
        assert!(!slot["serial"].as_str().unwrap().is_empty(), "{slot}");
    }
    let table = house.keyward(&["hsm", "slots"]).ok().stdout;
    assert!(table.contains("CONFIGURED") && table.contains("authority") && table.contains("agents"), "{table}");
    assert_eq!(house.signatures().logins, 0);
    assert!(!house.state().exists(), "looking leaves nothing behind");
    // Of a module that is given by name they are shown before there is a configuration.
    let mut command = house.command();
    let nowhere = house.path("nowhere.toml");
    let arguments = ["hsm", "slots", "--format", "json", "--module"];
    let seen = rows(&run(command.env("KEYWARD_CONFIG", nowhere).args(arguments).arg(house.module())).ok());
    assert!(seen.iter().any(|slot| slot["label"] == "authority" && slot["configured"] == serde_json::json!([])), "{seen:?}");
    house.keyward(&["hsm", "slots", "--module", "/nowhere.so"]).exits(5).says("/nowhere.so");
}

#[test]
fn slots_show_a_pin_of_which_one_try_is_left_and_a_token_that_cannot_be_described() {
    let house = House::new().with_shim();
    for (script, expected) in [("pin_tries n=1", "one try left"), ("pin_tries n=0", "locked")] {
        house.shim_script(script);
        let slots = rows(&house.keyward(&["hsm", "slots", "--format", "json"]).ok());
        let slot = slots.iter().find(|slot| slot["label"] == "authority").expect("its slot");
        assert_eq!(slot["pin"], expected);
    }
    house.shim_script("fail C_GetTokenInfo rv=0x30");
    let slots = rows(&house.keyward(&["hsm", "slots", "--format", "json"]).ok());
    assert_eq!(slots.iter().filter(|slot| slot["error"].is_string()).count(), 1, "one must not hide the others: {slots:?}");
    assert!(slots.iter().any(|slot| slot["configured"] != serde_json::json!([])), "{slots:?}");
    house.shim_script("hang C_GetSlotList");
    house.keyward(&["hsm", "slots"]).unavailable("does not answer");
}

#[test]
fn slots_warn_of_a_configured_token_that_no_module_shows_and_of_a_module_that_cannot_start() {
    let house = House::new();
    assert_eq!(house.keyward(&["hsm", "slots"]).ok().stderr, "");
    house.take_tokens_away();
    let output = house.keyward(&["hsm", "slots"]).ok();
    for role in ["authority", "agents"] {
        let (variable, _) = house.module_environment();
        let warning = output.stderr.lines().find(|line| line.contains(&format!("hsm.{role} names token {role:?}")));
        assert!(warning.is_some_and(|line| line.starts_with("warning: ") && line.contains(variable)), "{output:?}");
    }
    let house = House::new().with_shim();
    house.shim_script("fail C_Initialize rv=5");
    let output = house.keyward(&["hsm", "slots"]).exits(5).says("C_Initialize answered CKR_GENERAL_ERROR");
    assert!(!output.stderr.contains("Pkcs11("), "{output:?}");
}

/// What `keyward status` has against being ready.
fn causes(house: &House) -> Vec<String> {
    let status = house.keyward(&["status", "--format", "json"]).json();
    status["not_ready_because"].as_array().unwrap().iter().map(|cause| cause.as_str().unwrap().to_owned()).collect()
}

#[test]
fn while_tokens_are_away_the_status_names_them_and_not_their_keys() {
    let house = House::serving();
    let before = house.log().len();
    house.take_tokens_away();
    let until = Instant::now() + DEADLINE;
    let out_of_service = |cause: &String, role: &str| {
        cause.starts_with(&format!("hsm.{role}: the token is out of service: "))
            && cause.ends_with("; it is tried again by itself")
    };
    let all = |causes: &[String]| {
        let roles = ["authority", "agents"];
        causes.len() == 2 && causes.iter().zip(roles).all(|(cause, role)| out_of_service(cause, role))
    };
    while !all(&causes(&house)) {
        assert!(Instant::now() < until, "{:?}", causes(&house));
    }
    house.bring_tokens_back();
    house.wire().health_becomes(Face::Operator, "", ServingStatus::Serving);
    assert!(causes(&house).is_empty());
    let log = house.log()[before..].to_owned();
    let mut told =
        log.lines().filter(|line| ["out of service", "not ready", "not back yet"].iter().any(|what| line.contains(what)));
    assert!(!told.any(|line| line.contains("is not in the token")), "it is no matter of one key:\n{log}");
}

#[test]
fn where_one_key_is_gone_and_others_are_there_the_log_names_it() {
    let house = House::serving();
    let key = key_of(&house, Purpose::Canary);
    instruments::destroy(&house, "authority", &key);
    house.keyward(&["hsm", "test"]).exits(5);
    let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    let until = Instant::now() + DEADLINE;
    while !causes(&house).iter().any(|cause| cause.contains(&format!("key {hex} is not in the token"))) {
        assert!(Instant::now() < until, "{:?}", causes(&house));
    }
    assert!(!house.log().contains("does not show its keys"));
}

#[test]
fn the_neighbour_of_a_token_for_which_the_module_is_restarted_is_no_error_and_says_for_whose_sake() {
    let mut house = House::new().with_shim().initialised().served();
    let before = house.log().len();
    house.shim().tell("fail C_SignInit rv=0x30");
    let said = |what: &str| house.log()[before..].lines().filter(|line| line.contains(what)).count();
    let until = Instant::now() + DEADLINE;
    while said("is back in service") < 2 {
        assert!(Instant::now() < until, "{}", &house.log()[before..]);
        std::thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(said(" ERROR "), 1, "{}", &house.log()[before..]);
    // What readiness says of it has the token's own words in it, and may come first.
    let says =
        |line: &str| ["WARN", "out of service for a moment", "for the sake of token"].iter().all(|words| line.contains(words));
    assert!(house.log()[before..].lines().any(says), "{}", &house.log()[before..]);
    house.stop_and_verify();
}

#[test]
fn a_running_daemon_says_where_its_module_looks_for_tokens_and_that_this_is_its_own_environment() {
    let house = House::serving();
    let (variable, conf) = house.module_environment();
    fs::rename(&conf, house.path("conf.away")).unwrap();
    house.take_tokens_away();
    let until = Instant::now() + DEADLINE;
    let told = |causes: &[String]| {
        let hint = |cause: &String| cause.contains(variable) && cause.contains("in the daemon's environment");
        causes.len() == 2 && causes.iter().all(hint)
    };
    while !told(&causes(&house)) {
        assert!(Instant::now() < until, "{:?}", causes(&house));
    }
    fs::rename(house.path("conf.away"), conf).unwrap();
    house.bring_tokens_back();
    house.wire().health_becomes(Face::Operator, "", ServingStatus::Serving);
}

#[test]
fn while_one_token_is_tried_again_at_a_start_the_other_one_stays_open_and_is_logged_in_to_once() {
    let mut house = House::new().with_shim().initialised();
    let logins = house.signatures().logins;
    fs::set_permissions(house.path("agents.pin"), fs::Permissions::from_mode(0o640)).unwrap();
    house.start();
    assert!(!house.daemon().was_ready());
    let until = Instant::now() + DEADLINE;
    while status(&house, "agents")["faults"][0]["count"].as_u64() < Some(4) {
        assert!(Instant::now() < until, "{}", status(&house, "agents"));
    }
    assert_eq!(status(&house, "authority")["usable"], true);
    assert_eq!(house.signatures().logins - logins, 1);
    fs::set_permissions(house.path("agents.pin"), fs::Permissions::from_mode(0o600)).unwrap();
    assert!(house.daemon().is_ready());
    assert_eq!(house.signatures().logins - logins, 2);
    house.stop_and_verify();
}

#[test]
fn a_daemon_that_starts_without_its_tokens_tells_of_both() {
    let mut house = House::new().initialised();
    house.take_tokens_away();
    house.start();
    assert!(!house.daemon().was_ready());
    let told = causes(&house);
    assert!(told[0].starts_with("hsm.authority: ") && told[0].ends_with("; it is tried again by itself"), "{told:?}");
    let (authority, agents) = (status(&house, "authority"), status(&house, "agents"));
    assert_eq!((&authority["usable"], &authority["fault"]), (&false.into(), &authority["faults"][0]["fault"]), "{authority}");
    assert_eq!(
        (&agents["usable"], &agents["fault"]),
        (&false.into(), &"not open: it waits for hsm.authority".into()),
        "{agents}"
    );
    house.bring_tokens_back();
    assert!(house.daemon().is_ready());
    assert_eq!(status(&house, "agents")["usable"], true);
}

/// A module looks for tokens when it is started: the healthy one stands aside for that, and seldom.
#[test]
fn a_token_that_is_away_at_a_start_is_found_when_it_is_back_and_the_other_one_is_seldom_disturbed() {
    let mut house = House::new().with_shim().initialised();
    let logins = house.signatures().logins;
    house.take_token_away("agents");
    house.start();
    assert!(!house.daemon().was_ready());
    let until = Instant::now() + DEADLINE;
    while status(&house, "agents")["faults"][0]["count"].as_u64() < Some(6) {
        assert!(Instant::now() < until, "{}", status(&house, "agents"));
    }
    assert!(status(&house, "agents")["fault"].as_str().unwrap().contains("no token is labelled \"agents\""));
    let tried = house.signatures().logins - logins;
    assert!(tried <= 3, "one of the start, one for each restart: {tried}");
    house.bring_tokens_back();
    assert!(house.daemon().is_ready());
    house.stop_and_verify();
}

#[test]
fn the_status_tells_what_a_token_is_what_it_can_and_what_it_has_been_through() {
    let mut house = House::new().with_one_token().with_shim().initialised().served();
    let before = status(&house, "authority");
    assert_eq!((&before["usable"], &before["lanes"], &before["hanging"]), (&true.into(), &2.into(), &0.into()), "{before}");
    assert_eq!(
        (&before["label"], &before["reconnects"], &before["pin_pending"]),
        (&"authority".into(), &0.into(), &false.into())
    );
    assert_eq!(before["module"], instrument::shim().display().to_string());
    let words =
        |value: &Value| value.as_array().unwrap().iter().map(|word| word.as_str().unwrap().to_owned()).collect::<Vec<_>>();
    assert!(words(&before["mechanisms"]).contains(&"CKM_ECDSA".to_owned()), "{before}");
    assert_eq!(before["capabilities"]["session_keys"], true);
    let wraps = lives(KeyStorage::Wrapped) == KeyStorage::Wrapped;
    assert_eq!(before["capabilities"]["wrapped_keys"], wraps, "{before}");
    assert!(words(&before["capabilities"]["algorithms"]).contains(&"es256".to_owned()), "{before}");
    let told = if wraps { "wraps keys" } else { "wraps no keys" };
    assert!(house.keyward(&["hsm", "status"]).ok().stdout.contains(told));
    assert!(before["signatures"].as_u64().unwrap() > 0 && before["sessions"].as_u64().unwrap() >= 3, "{before}");
    house.shim().tell("lose");
    house.wire().health_becomes(Face::Operator, "hsm", ServingStatus::NotServing);
    let away = status(&house, "authority");
    assert_eq!(away["usable"], false);
    assert!(!away["fault"].as_str().unwrap().is_empty(), "{away}");
    assert_eq!(away["fault"], away["faults"][0]["fault"], "the newest one has a time: {away}");
    let table = house.keyward(&["hsm", "status"]).exits(5).stdout;
    assert!(table.contains("NO: it is tried again by itself") && table.contains("newest fault  20"), "{table}");
    house.shim().tell("return");
    house.wire().health_becomes(Face::Operator, "", ServingStatus::Serving);
    let after = status(&house, "authority");
    assert_eq!((&after["usable"], &after["reconnects"]), (&true.into(), &1.into()), "{after}");
    assert!(after["faults"].as_array().unwrap().iter().any(|seen| seen["count"].as_u64().unwrap() > 0), "{after}");
    house.stop_and_verify();
}

#[test]
fn a_test_of_the_tokens_has_every_key_in_use_looked_up_and_sign() {
    let house = House::serving();
    let checks = rows(&house.keyward(&["hsm", "test", "--signatures", "5", "--format", "json"]).ok());
    assert!(checks.iter().all(|check| check["passed"] == true && check["error"].is_null()), "{checks:?}");
    for role in ["authority", "agents"] {
        assert!(checks.iter().any(|check| check["role"] == role && check["check"] == "5 signatures"), "{checks:?}");
    }
    for purpose in [Purpose::Root, Purpose::Issuing, Purpose::TokenSigning, Purpose::Ledger, Purpose::Canary] {
        let id: String = key_of(&house, purpose).iter().map(|byte| format!("{byte:02x}")).collect();
        let named = purpose.as_str_name().to_lowercase().replace("purpose_", "").replace('_', "-");
        let of_key = |check: &&Value| check["check"] == format!("key {id}") && check["purpose"] == *named;
        assert_eq!(checks.iter().filter(of_key).count(), 1, "{purpose:?}: {checks:?}");
    }
    let table = house.keyward(&["hsm", "test"]).ok().stdout;
    assert!(table.contains("8 signatures") && table.contains("issuing key ") && table.contains("passed"), "{table}");
}

#[test]
fn a_test_of_the_tokens_fails_when_a_key_is_missing() {
    let house = House::serving();
    let key = key_of(&house, Purpose::Issuing);
    instruments::destroy(&house, "authority", &key);
    let output = house.keyward(&["hsm", "test", "--format", "json"]).exits(5);
    let failed: Vec<Value> = rows(&output).into_iter().filter(|check| check["passed"] == false).collect();
    let hex: String = key.iter().map(|byte| format!("{byte:02x}")).collect();
    assert_eq!(failed.iter().map(|check| &check["check"]).collect::<Vec<_>>(), [&format!("key {hex}")], "{output:?}");
    // The rest is as it was: quarantine, the book, and the daemon itself. The token is well, and what is said is the key.
    house.quarantine("builder/1").exits(4);
    house.wire().health_becomes(Face::Operator, "hsm", ServingStatus::NotServing);
    assert_eq!(causes(&house), [format!("hsm.authority: key {hex} is not in the token; it is looked for again by itself")]);
    assert_eq!(status(&house, "authority")["usable"], true);
}

#[test]
fn a_test_of_the_tokens_fails_when_a_token_is_away_or_was_never_opened() {
    let mut house = House::new().with_shim().initialised().served();
    house.shim().tell("lose");
    house.keyward(&["hsm", "test"]).exits(5).says("failed");
    house.wire().health_becomes(Face::Operator, "hsm", ServingStatus::NotServing);
    let checks = rows(&house.keyward(&["hsm", "test", "--format", "json"]).exits(5));
    assert!(checks.iter().any(|check| check["role"] == "authority" && check["check"] == "in service"), "{checks:?}");
    house.shim().tell("return");
    house.wire().health_becomes(Face::Operator, "", ServingStatus::Serving);
    house.keyward(&["hsm", "test"]).ok();
    assert_eq!(house.stop(), 0);
    house.keyward(&["hsm", "test"]).exits(5).says("is `keyward serve` running?");
    house.misplace_pins();
    house.start();
    let checks = rows(&house.keyward(&["hsm", "test", "--format", "json"]).exits(5));
    assert!(checks[0]["error"].as_str().unwrap().contains("PIN"), "{checks:?}");
    assert_eq!(status(&house, "authority")["pin_pending"], true);
    let told = causes(&house);
    assert!(told[0].starts_with("hsm.authority: ") && told[0].contains("keyward hsm unlock"), "{told:?}");
    assert!(!told[0].contains("by itself"), "it waits for the operator: {told:?}");
}

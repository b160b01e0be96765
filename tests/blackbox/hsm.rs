//! The HSM: what it is asked, what it holds, and what happens when it is gone.

use std::fs;
use std::time::{Duration, Instant};

use keyward::proto::{CreateKeyRequest, KeyStorage};

use crate::house::keys::wish;
use crate::house::wire::Identity;
use crate::house::{Body, DEADLINE, House, Output, PIN};
use crate::instruments;

/// The daemon recovers by itself: the call is repeated until it succeeds. There is no event to wait for outside.
fn until_ok(mut call: impl FnMut() -> Output) {
    let until = Instant::now() + DEADLINE;
    loop {
        let output = call();
        if output.code == 0 {
            return;
        }
        assert!(Instant::now() < until, "it did not recover: {output:?}");
        std::thread::sleep(Duration::from_millis(100));
    }
}

#[test]
fn a_wrong_pin_costs_one_try_in_all_over_twenty_restarts() {
    let mut house = House::new().with_one_token().with_shim().initialised();
    let before = house.signatures().logins;
    house.misplace_pins();
    for _ in 0..20 {
        house.start();
        assert!(!house.daemon().was_ready(), "a daemon without its keys is not ready");
        if house.daemon().has_ended() {
            house.ended();
        } else {
            house.stop();
        }
    }
    assert_eq!(house.signatures().logins - before, 1);
    house.return_pins();
    house.start();
    assert!(!house.daemon().was_ready(), "the right PIN is not tried before an operator says so");
    house.stop();
    assert_eq!(house.signatures().logins - before, 1);
    house.keyward(&["hsm", "unlock"]).ok();
    house.serve();
    house.attested("builder/1");
    assert_eq!(house.signatures().logins - before, 2);
}

#[test]
fn a_pin_file_that_others_can_read_is_refused_without_a_login() {
    use std::os::unix::fs::PermissionsExt as _;
    let mut house = House::new().with_shim().initialised();
    let before = house.signatures().logins;
    fs::set_permissions(house.path("authority.pin"), fs::Permissions::from_mode(0o640)).unwrap();
    fs::set_permissions(house.path("agents.pin"), fs::Permissions::from_mode(0o640)).unwrap();
    house.start();
    assert!(!house.daemon().was_ready());
    assert_eq!(house.signatures().logins, before);
}

#[test]
fn quarantine_and_status_work_while_the_token_is_locked() {
    let mut house = House::new().initialised().served();
    house.attested("builder/1");
    assert_eq!(house.stop(), 0);
    house.misplace_pins();
    house.start();
    house.quarantine("builder/1").ok();
    let status = house.keyward(&["status", "--format", "json"]).exits(5).json();
    assert_eq!(status["ready"], false);
    assert_eq!(house.agent("builder/1").shown()["state"], "quarantined");
}

#[test]
fn authority_keys_were_made_in_the_token_and_cannot_leave_it() {
    let house = House::serving();
    let keys = instruments::private_keys(&house, "authority");
    assert!(keys.len() >= 4, "root, issuing, ledger and canary keys: {keys:?}");
    for key in keys {
        assert!(key.sensitive && key.never_extractable && key.local && !key.extractable, "{key:?}");
    }
}

#[test]
fn every_key_in_the_token_is_in_the_book() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    let resident = CreateKeyRequest { storage: KeyStorage::Resident.into(), ..wish("a") };
    let made = house.keys(&Identity::of(&agent)).create(resident).unwrap();
    let mut told: Vec<String> = house
        .entries()
        .iter()
        .filter_map(|body| match body {
            // The wrapping key is a secret key, and has no public half.
            Body::KeyActivated(key) if !key.spki.is_empty() => {
                Some(key.key_id.iter().map(|byte| format!("{byte:02x}")).collect())
            }
            _ => None,
        })
        .collect();
    let of_agents = house.entries().into_iter().find_map(|body| match body {
        Body::AgentKeyCreated(key) => key.version.filter(|version| version.spki == made.versions[0].spki),
        _ => None,
    });
    told.extend(of_agents.map(|version| version.key_id.iter().map(|byte| format!("{byte:02x}")).collect::<String>()));
    let mut held: Vec<String> =
        ["authority", "agents"].iter().flat_map(|token| instruments::private_keys(&house, token)).map(|key| key.id).collect();
    told.sort();
    held.sort();
    assert_eq!(told, held);
}

#[test]
fn when_the_token_vanishes_callers_hear_it_and_when_it_returns_the_daemon_recovers() {
    let mut house = House::serving();
    {
        let (one, two) = (house.attested("builder/1"), house.attested("builder/2"));
        house.take_tokens_away();
        let output = one.renew();
        assert_eq!(output.code, 5, "{output:?}");
        // Kryoptic calls a store that it cannot read CKR_DEVICE_MEMORY: for a second it is taken for a device that is full.
        let heard = ["HSM_UNAVAILABLE", "SIGNATURE_UNKNOWN", "OVERLOADED"];
        assert!(heard.iter().any(|reason| output.stderr.contains(reason)), "{output:?}");
        two.quarantine().ok();
        house.bring_tokens_back();
        until_ok(|| one.renew());
        two.renew().refused("AGENT_QUARANTINED");
    }
    house.stop_and_verify();
}

/// Promise 11. The daemon runs with all it can log.
#[test]
fn no_pin_and_no_token_shows_in_log_arguments_or_environment() {
    let mut house = House::new().configured("log", "level = \"trace\"").initialised().served();
    {
        let join = house.wire().enrol("builder/9");
        let agent = house.attested("builder/1");
        agent.renew().ok();
        agent.quarantine().ok();
        let pid = house.daemon_pid();
        let mut seen = house.log().into_bytes();
        for file in ["environ", "cmdline"] {
            seen.extend(fs::read(format!("/proc/{pid}/{file}")).unwrap());
        }
        let key = fs::read_to_string(agent.key()).unwrap();
        let key_body = key.lines().nth(1).unwrap();
        let hex: String = join.token_seed.iter().map(|byte| format!("{byte:02x}")).collect();
        use base64::Engine as _;
        let base64 = base64::engine::general_purpose::STANDARD.encode(&join.token_seed);
        for secret in [PIN, key_body, &hex, &base64] {
            assert!(!seen.windows(secret.len()).any(|window| window == secret.as_bytes()), "{secret} shows");
        }
    }
    assert_eq!(house.stop(), 0);
}

#[test]
fn another_process_of_the_same_user_cannot_read_the_daemons_memory() {
    let house = House::serving();
    // Not dumpable: its memory and environment belong to root alone (prctl(2), PR_SET_DUMPABLE).
    let status = fs::read_to_string(format!("/proc/{}/limits", house.daemon_pid())).unwrap();
    let core = status.lines().find(|line| line.starts_with("Max core file size")).unwrap();
    assert!(core.split_whitespace().nth(4) == Some("0"), "{core}");
}

//! What the daemon's memory holds of a PIN: its own copies are gone as soon as the login has ended.
//!
//! The PIN that the daemon is given is not the token's: the fault module puts the right one in its place on the way. So no copy that is
//! found can be the real module's; each one is the daemon's.

use std::time::{Duration, Instant};

use crate::crash::Holder;
use crate::house::wire::{Face, ServingStatus};
use crate::house::{DEADLINE, House, write_private};

/// The PIN of the tokens (tests/blackbox/house/token.rs).
const REAL: &str = "house-pin-1234";

/// Long, and like nothing else.
fn random_pin() -> String {
    let mut bytes = [0; 32];
    aws_lc_rs::rand::fill(&mut bytes).unwrap();
    hex(&bytes)
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// In how many places of the daemon's memory the text or a part of it is, and where.
fn found(house: &House, text: &str) -> (u64, String) {
    let told = house.shim().tell(&format!("memory {}", hex(text.as_bytes())));
    let (count, places) = told.split_once(' ').unwrap_or((&told, ""));
    (count.parse().unwrap(), places.to_owned())
}

/// The daemon knows that one token refused its PIN, and has logged in to the other one again. That it had been unready before, nothing tells
/// by an event.
fn refused(house: &House) {
    let until = Instant::now() + DEADLINE;
    loop {
        let tokens = house.keyward(&["hsm", "status", "--format", "json"]).json();
        let count = |what: &str| tokens.as_array().unwrap().iter().filter(|token| token[what] == true).count();
        if (count("usable"), count("pin_pending")) == (1, 1) {
            return;
        }
        assert!(Instant::now() < until, "no PIN was refused: {tokens}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

#[test]
fn after_a_login_no_pin_is_left_in_the_daemons_memory() {
    let house = House::new().with_shim();
    house.shim_script(&format!("pin real={REAL}\n"));
    let pins = [random_pin(), random_pin()];
    write_private(&house.path("authority.pin"), &pins[0]);
    // As an editor leaves it.
    write_private(&house.path("agents.pin"), &format!("{}\n", pins[1]));
    let mut house = house.initialised().served();
    let nowhere = |house: &House, when: &str| {
        for (pin, of) in pins.iter().zip(["authority", "agents"]) {
            let (count, places) = found(house, pin);
            assert_eq!(count, 0, "{when}: the PIN of {of} at {places}");
        }
    };
    // The search finds what is there.
    let path = house.path("authority.pin").display().to_string();
    assert!(found(&house, &path).0 > 0, "the daemon knows the path of the PIN");
    nowhere(&house, "after the first login");
    let mut holder = Holder::attest(&house, "builder/1");
    holder.try_renew(&house).unwrap();
    nowhere(&house, "after use");
    for fault in ["logout", "fail C_SignInit rv=0x30"] {
        house.shim().tell("hang C_Login");
        house.shim().tell(fault);
        house.shim().tell("await hanging=1");
        let there = pins.iter().map(|pin| found(&house, pin).0).collect::<Vec<_>>();
        assert_eq!(there.iter().sum::<u64>(), 1, "during a login there is one copy, of one PIN: {there:?}");
        house.shim().tell("release");
        house.wire().health_becomes(Face::Operator, "", ServingStatus::Serving);
        nowhere(&house, fault);
    }
    // The token refuses the next one: that PIN is as secret.
    house.shim().tell("fail C_Login rv=0xa0");
    house.shim().tell("logout");
    house.shim().tell("await faults=4");
    refused(&house);
    nowhere(&house, "after a login that failed");
    house.keyward(&["hsm", "unlock"]).ok();
    house.wire().health_becomes(Face::Operator, "", ServingStatus::Serving);
    holder.try_renew(&house).unwrap();
    nowhere(&house, "at the end");
    house.stop_and_verify();
}

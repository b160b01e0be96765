//! Enrolment: an operator says which agents there may be.

use std::os::unix::fs::PermissionsExt as _;

use keyward::proto::EnrolRequest;

use crate::house::wire::{Draft, Identity, refused};
use crate::house::{Body, House};

#[test]
fn an_instance_is_enrolled_once_and_never_again() {
    let house = House::serving();
    let agent = house.agent("builder/1");
    agent.enrol(&[]).ok();
    agent.enrol(&[]).refused("AGENT_EXISTS");
}

#[test]
fn a_join_file_that_others_can_read_is_not_used() {
    let house = House::serving();
    let agent = house.agent("builder/1");
    agent.enrol(&[]).ok();
    std::fs::set_permissions(agent.join_file(), std::fs::Permissions::from_mode(0o644)).unwrap();
    agent.attest(&[]).exits(1).says("0644");
}

#[test]
fn a_join_file_can_go_from_hand_to_hand_without_touching_a_disk() {
    let house = House::serving();
    let join = house.keyward(&["agents", "enrol", "builder/1", "--out", "-"]).ok().stdout;
    let dir = house.path("agents/piped");
    house.keyward_given(&["agent", "attest", "--join", "-", "--out", dir.to_str().unwrap()], join.as_bytes()).ok();
}

#[test]
fn the_secret_of_a_join_token_is_nowhere_on_the_daemons_side() {
    let mut house = House::serving();
    let seed = house.wire().enrol("builder/1").token_seed;
    assert_eq!(house.stop(), 0);
    for file in std::fs::read_dir(house.state()).unwrap().map(|entry| entry.unwrap().path()).filter(|path| path.is_file()) {
        let bytes = std::fs::read(&file).unwrap();
        assert!(!bytes.windows(seed.len()).any(|window| window == seed), "{}", file.display());
    }
}

#[test]
fn what_the_operator_granted_is_the_most_an_agent_gets() {
    let house = House::serving();
    let agent = house.agent("builder/1");
    agent.enrol(&["--ttl", "60s"]).ok();
    agent.attest(&["--ttl", "61s"]).refused("WISH_BEYOND_GRANT");
    agent.attest(&["--ttl", "30s"]).ok();
    let der = agent.certificate();
    let (_, certificate) = x509_parser::parse_x509_certificate(&der).unwrap();
    let lifetime = certificate.validity().not_after.timestamp() - certificate.validity().not_before.timestamp();
    assert!((30..=61).contains(&lifetime), "{lifetime} s");
}

#[test]
fn names_and_limits_that_break_the_rules_are_refused_with_nothing_recorded() {
    let house = House::serving();
    let wire = house.wire();
    let before = house.entries().len();
    let too_long = "x".repeat(200);
    for name in ["", "builder", "builder/", "/1", "a/b/c", "builder/..", "keyward/\0", "bu ilder/1", &too_long] {
        let request = EnrolRequest { agent: name.to_owned(), ..EnrolRequest::default() };
        refused(wire.try_enrol(request), "MALFORMED_REQUEST");
    }
    let request = |ttl, rejoin, token| EnrolRequest {
        agent: "builder/1".to_owned(),
        ttl_seconds_max: ttl,
        rejoin_seconds: rejoin,
        token_ttl_seconds: token,
    };
    for request in [request(1, 0, 0), request(u32::MAX, 0, 0), request(0, u32::MAX, 0), request(0, 0, 1), request(0, 0, u32::MAX)]
    {
        refused(wire.try_enrol(request), "MALFORMED_REQUEST");
    }
    let enrolled = house.entries()[before..].iter().any(|body| matches!(body, Body::Enrolled(_)));
    assert!(!enrolled);
    house.keyward(&["agents", "enrol", "not a name", "--out", "-"]).exits(2);
}

#[test]
fn no_operator_call_is_answered_over_tcp() {
    let house = House::serving();
    let wire = house.wire();
    let agent = house.attested("builder/1");
    for identity in [None, Some(Identity::of(&agent))] {
        let refusal = wire.operator_call_over_tcp(identity.as_ref()).expect_err("an operator call over TCP");
        assert!(
            matches!(refusal.code, tonic::Code::Unimplemented | tonic::Code::PermissionDenied | tonic::Code::Unauthenticated),
            "{refusal:?}"
        );
    }
}

#[test]
fn a_token_of_another_house_opens_nothing_here() {
    let (house, other) = (House::serving(), House::serving());
    let foreign = other.wire().enrol("builder/1");
    house.wire().enrol("builder/1");
    let answer = house.wire().attest(None, |challenge| Draft::join(&foreign).joined(challenge, &foreign.token_seed));
    refused(answer, "TOKEN_UNKNOWN");
}

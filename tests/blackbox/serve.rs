//! The daemon as its supervisor, its load balancer and its operator meet it: ready, ill, draining, gone.

use std::sync::mpsc::channel;
use std::thread;

use keyward::proto::IntentKind;
use rustix::process::Signal;

use crate::house::wire::{Draft, Face, Identity, ServingStatus, refused};
use crate::house::{Body, House};
use crate::ledger::one_outcome_each;

#[test]
fn health_is_told_of_the_whole_and_of_each_dependency_on_both_faces_without_a_certificate() {
    let house = House::serving();
    let wire = house.wire();
    for face in [Face::Tcp, Face::Operator] {
        for service in ["", "hsm", "ledger"] {
            wire.health_becomes(face, service, ServingStatus::Serving);
            assert_eq!(wire.health(face, service).unwrap(), ServingStatus::Serving, "{service:?} over {face:?}");
        }
        assert_eq!(wire.health(face, "nonsense").unwrap_err().code, tonic::Code::NotFound);
    }
}

#[test]
fn health_says_which_dependency_is_missing_when_the_token_is() {
    let mut house = House::serving();
    assert_eq!(house.stop(), 0);
    house.misplace_pins();
    house.start();
    assert!(!house.daemon().was_ready());
    let wire = house.wire();
    // Never better than it is, from the first answer on.
    assert_ne!(wire.health(Face::Operator, "").unwrap(), ServingStatus::Serving);
    wire.health_becomes(Face::Operator, "hsm", ServingStatus::NotServing);
    wire.health_becomes(Face::Operator, "ledger", ServingStatus::Serving);
    wire.health_becomes(Face::Operator, "", ServingStatus::NotServing);
    house.keyward(&["status"]).exits(5);
}

#[test]
fn health_says_which_dependency_is_missing_when_the_disk_is_full() {
    let mut house = House::new().with_preload().initialised();
    house.serve();
    let wire = house.wire();
    house.control().fill_disk();
    // Something has to be written before anybody knows.
    let noticed = (0..512).any(|n| house.agent(&format!("builder/{n}")).enrol(&[]).code != 0);
    assert!(noticed, "the disk never was full");
    wire.health_becomes(Face::Tcp, "ledger", ServingStatus::NotServing);
    wire.health_becomes(Face::Tcp, "", ServingStatus::NotServing);
    wire.health_becomes(Face::Operator, "hsm", ServingStatus::Serving);
    house.control().clear();
    assert_eq!(house.stop(), 0);
    house.serve();
    house.wire().health_becomes(Face::Tcp, "", ServingStatus::Serving);
    house.stop_and_verify();
}

#[test]
fn reflection_lists_to_operators_everything_to_agents_their_services_and_to_strangers_nothing() {
    let house = House::serving();
    let wire = house.wire();
    let all = wire.reflected(Face::Operator, None).unwrap();
    assert!(all.contains(&"keyward.v1.OperatorService".to_owned()), "{all:?}");
    let agent = Identity::of(&house.attested("builder/1"));
    assert_eq!(wire.reflected(Face::Tcp, Some(&agent)).unwrap(), ["keyward.v1.AgentService", "keyward.v1.KeyService"]);
    refused(wire.reflected(Face::Tcp, None), "UNAUTHENTICATED");
}

#[test]
fn a_supervisor_is_told_of_readiness_and_of_the_stop() {
    let mut house = House::new().initialised();
    house.start();
    assert!(house.daemon().is_ready());
    house.daemon_signal(Signal::TERM);
    house.daemon().tells("STOPPING=1");
    assert_eq!(house.ended(), Some(0));
}

#[test]
fn a_supervisor_is_told_why_the_daemon_is_not_ready() {
    let mut house = House::new().initialised();
    house.misplace_pins();
    house.start();
    assert!(!house.daemon().was_ready());
    house.return_pins();
    house.keyward(&["hsm", "unlock"]).ok();
    assert!(house.daemon().is_ready());
    house.stop_and_verify();
}

/// SIGTERM while renewals are under way: what has begun ends, exactly once; what was answered is in the book; nothing is unknown.
#[test]
fn a_stop_lets_every_renewal_under_way_come_to_its_end() {
    let mut house = House::new().configured("limits", "live_certificates_per_agent = 64").initialised();
    for life in 0..3 {
        house.serve();
        let shared = &house;
        let (count, answered) = channel();
        let serials: Vec<Vec<u8>> = thread::scope(|scope| {
            let workers: Vec<_> = (0..4)
                .map(|n| {
                    let count = count.clone();
                    scope.spawn(move || until_the_stop(shared, &format!("life-{life}/{n}"), &count))
                })
                .collect();
            drop(count);
            // All of them are at it.
            assert_eq!(answered.iter().take(24 + 3 * life).count(), 24 + 3 * life);
            shared.daemon_signal(Signal::TERM);
            workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect()
        });
        assert_eq!(house.ended(), Some(0));
        let entries = house.ended_entries();
        one_outcome_each(&entries);
        assert!(!entries.iter().any(|body| matches!(body, Body::Unknown(_))), "a stop leaves nothing unknown");
        assert!(matches!(entries.last(), Some(Body::Stopped(_))), "the stop is the last entry");
        let released = released_serials(&entries);
        assert!(serials.iter().all(|serial| released.contains(serial)), "what was answered is released in the book");
        house.verify().ok();
    }
}

/// Renews as fast as it can until the daemon is gone; the serials it was given.
fn until_the_stop(house: &House, name: &str, count: &std::sync::mpsc::Sender<()>) -> Vec<Vec<u8>> {
    let wire = house.wire();
    let join = wire.enrol(name);
    let draft = Draft::join(&join);
    let mut answer = wire.attest(None, |challenge| draft.joined(challenge, &join.token_seed)).unwrap();
    let mut holder = draft.identity(&answer);
    let mut standing = wire.standing(&holder);
    let mut serials = Vec::new();
    loop {
        serials.push(serial(&answer.chain[0]));
        let _ = count.send(());
        let draft = Draft::bound(name, answer.next_sequence);
        answer = match wire.renew_over(&mut standing, draft.renewal(&holder)) {
            Ok(answer) => answer,
            Err(refusal) => {
                assert!(["", "DRAINING", "RATE_LIMITED"].contains(&refusal.reason.as_str()), "{refusal:?}");
                return serials;
            }
        };
        holder = draft.identity(&answer);
    }
}

/// As a number: TBS and certificate spell it alike.
fn serial(der: &[u8]) -> Vec<u8> {
    x509_parser::parse_x509_certificate(der).unwrap().1.raw_serial().to_vec()
}

fn released_serials(entries: &[Body]) -> std::collections::BTreeSet<Vec<u8>> {
    use x509_parser::prelude::{FromDer as _, TbsCertificate};
    let released = entries.iter().filter_map(|body| match body {
        Body::Released(released) => match entries.get(usize::try_from(released.intent).unwrap()) {
            Some(Body::Intended(intent)) if intent.kind() != IntentKind::Crl && intent.kind() != IntentKind::Csr => Some(intent),
            _ => None,
        },
        _ => None,
    });
    released.map(|intent| TbsCertificate::from_der(&intent.tbs).unwrap().1.raw_serial().to_vec()).collect()
}

#[test]
fn strangers_refused_in_the_last_second_are_counted_in_the_book() {
    let mut house = House::serving();
    let forged = keyward::proto::JoinFile { token_id: vec![7; 16], token_seed: vec![7; 32], ..Default::default() };
    let draft = Draft::join(&forged);
    refused(house.wire().attest(None, |challenge| draft.joined(challenge, &forged.token_seed)), "TOKEN_UNKNOWN");
    let entries = house.stopped_entries();
    let counted: u64 = entries
        .iter()
        .filter_map(|body| match body {
            Body::RefusalsCounted(counted) => Some(counted),
            _ => None,
        })
        .flat_map(|counted| &counted.counts)
        .filter(|count| count.reason() == keyward::proto::Reason::TokenUnknown)
        .map(|count| count.count)
        .sum();
    assert_eq!(counted, 1);
}

#[test]
fn the_address_is_told_only_while_somebody_listens_there() {
    let mut house = House::serving();
    let address = house.runtime().join("address");
    assert_eq!(std::fs::read_to_string(&address).unwrap().trim_end(), house.address().to_string());
    assert_eq!(house.stop(), 0);
    assert!(!address.exists(), "after a stop");
    house.serve();
    house.kill9();
    assert!(address.exists(), "nobody was there to remove it");
    house.take_tokens_away();
    house.start();
    assert!(!house.daemon().was_ready() && !address.exists(), "before the agents' side is open");
}

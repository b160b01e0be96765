//! Races at full speed: many clients, one token; many certificates, many quarantines.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, Barrier, Mutex};
use std::thread;

use keyward::proto::IntentKind;

use crate::house::wire::{Draft, Wire};
use crate::house::{Body, House};
use crate::instruments::slow;
use crate::ledger::{one_outcome_each, signed_only_what_was_intended};
use crate::quarantine::no_release_while_quarantined;

#[test]
fn of_100_clients_with_one_token_one_wins() {
    let mut house = House::new().with_shim().initialised().served();
    let winner = {
        let join = house.wire().enrol("builder/1");
        let (house, join, start) = (&house, &join, &Barrier::new(100));
        let answers: Vec<_> = thread::scope(|scope| {
            let clients: Vec<_> = (0..100)
                .map(|_| {
                    scope.spawn(move || {
                        let (wire, draft) = (house.wire(), Draft::join(join));
                        start.wait();
                        wire.attest(None, |challenge| draft.joined(challenge, &join.token_seed))
                    })
                })
                .collect();
            clients.into_iter().map(|client| client.join().unwrap()).collect()
        });
        let (won, lost): (Vec<_>, Vec<_>) = answers.into_iter().partition(Result::is_ok);
        for refusal in lost.into_iter().filter_map(Result::err) {
            assert!(["TOKEN_SPENT", "RATE_LIMITED"].contains(&refusal.reason.as_str()), "{refusal:?}");
        }
        assert_eq!(won.len(), 1, "one winner");
        won.into_iter().next().unwrap().unwrap()
    };
    let entries = house.stopped_entries();
    let (_, certificate) = x509_parser::parse_x509_certificate(&winner.chain[0]).unwrap();
    let intents: Vec<_> = entries
        .iter()
        .filter_map(|body| match body {
            Body::Intended(intent) if intent.kind() == IntentKind::Attest => Some(intent.tbs.as_slice()),
            _ => None,
        })
        .collect();
    assert_eq!(intents, [certificate.tbs_certificate.as_ref()], "the others were never meant to be signed");
    one_outcome_each(&entries);
    signed_only_what_was_intended(&house, &entries);
    house.verify().ok();
}

/// What a worker renews at the moment, for the operator to strike.
type Target = Mutex<Option<(String, Arc<AtomicBool>)>>;

/// How much is issued, how much is taken back, by how many at once.
struct Size {
    certificates: usize,
    quarantines: usize,
    workers: usize,
}

/// Promise 5 at full speed: 100,000 certificates and 1,000 quarantines with `scripts/test --slow`, a fraction of it otherwise.
#[test]
fn issuing_at_full_speed_while_quarantining_releases_nothing_that_is_denied() {
    let size = if slow() {
        Size { certificates: 100_000, quarantines: 1_000, workers: 32 }
    } else {
        Size { certificates: 500, quarantines: 25, workers: 6 }
    };
    let mut house = House::new().configured("limits", "live_certificates_per_agent = 64").with_shim().initialised().served();
    let handed_out = {
        let house = &house;
        let targets: Vec<Target> = (0..size.workers).map(|_| Target::default()).collect();
        let (targets, names, over) = (&targets, &AtomicUsize::new(0), &AtomicBool::new(false));
        thread::scope(|scope| {
            let (count, counted) = channel();
            let workers: Vec<_> = targets
                .iter()
                .map(|target| {
                    let count = count.clone();
                    scope.spawn(move || issue_until(over, &house.wire(), target, names, &count))
                })
                .collect();
            drop(count);
            let returned = strike(&house.wire(), targets, &size, &counted);
            over.store(true, Ordering::SeqCst);
            let mut all: Vec<Vec<u8>> = workers.into_iter().flat_map(|worker| worker.join().unwrap()).collect();
            all.extend(returned);
            all
        })
    };
    let entries = house.stopped_entries();
    let struck = entries.iter().filter(|body| matches!(body, Body::Quarantined(_))).count();
    assert_eq!(struck, size.quarantines);
    assert!(entries.iter().any(|body| matches!(body, Body::Reinstated(_))));
    assert!(handed_out.len() >= size.certificates, "{} certificates", handed_out.len());
    no_release_while_quarantined(&entries);
    one_outcome_each(&entries);
    let released = released(&entries);
    assert!(handed_out.iter().all(|tbs| released.contains(tbs)), "the book knows every certificate handed out, as released");
    signed_only_what_was_intended(&house, &entries);
    house.verify().ok();
}

/// Agents one after the other, each renewed until it is struck or has had its share. The digests of what was handed out.
fn issue_until(over: &AtomicBool, wire: &Wire, target: &Target, names: &AtomicUsize, count: &Sender<()>) -> Vec<Vec<u8>> {
    let mut handed_out = Vec::new();
    while !over.load(Ordering::SeqCst) {
        let name = format!("racer/{}", names.fetch_add(1, Ordering::Relaxed));
        let join = wire.enrol(&name);
        let draft = Draft::join(&join);
        let mut answer = wire.attest(None, |challenge| draft.joined(challenge, &join.token_seed)).unwrap();
        let mut holder = draft.identity(&answer);
        let mut standing = wire.standing(&holder);
        let acknowledged = Arc::new(AtomicBool::new(false));
        *target.lock().unwrap() = Some((name.clone(), Arc::clone(&acknowledged)));
        for _ in 0..60 {
            handed_out.push(tbs_digest(&answer.chain[0]));
            let _ = count.send(());
            if over.load(Ordering::SeqCst) {
                break;
            }
            let draft = Draft::bound(&name, answer.next_sequence);
            let late = acknowledged.load(Ordering::SeqCst);
            match wire.renew_over(&mut standing, draft.renewal(&holder)) {
                Ok(next) => {
                    assert!(!late, "{name} was answered after its quarantine was acknowledged");
                    holder = draft.identity(&next);
                    answer = next;
                }
                Err(refusal) => {
                    // Released meanwhile, it is back under an epoch that this one is not of.
                    let denied = ["AGENT_QUARANTINED", "DENIED_MEANWHILE", "EPOCH_STALE"];
                    assert!(denied.contains(&refusal.reason.as_str()), "{refusal:?}");
                    break;
                }
            }
        }
    }
    handed_out
}

/// Quarantines whatever is being renewed, evenly over the certificates; every fourth comes back under its next epoch. The digests of what
/// those were given.
fn strike(wire: &Wire, targets: &[Target], size: &Size, counted: &Receiver<()>) -> Vec<Vec<u8>> {
    let mut handed_out = Vec::new();
    let between = size.certificates / size.quarantines;
    for strike in 0..size.quarantines {
        assert_eq!(counted.iter().take(between).count(), between, "the workers go on");
        let (name, acknowledged) = loop {
            let next = (0..targets.len()).find_map(|turn| targets[(strike + turn) % targets.len()].lock().unwrap().take());
            match next {
                Some(next) => break next,
                // Each has been struck already: a certificate later there is another.
                None => counted.recv().unwrap(),
            }
        };
        wire.quarantine(&name);
        acknowledged.store(true, Ordering::SeqCst);
        if strike % 4 == 0 {
            let join = wire.release(&name);
            let draft = Draft::join(&join);
            let answer = wire.attest(None, |challenge| draft.joined(challenge, &join.token_seed)).unwrap();
            handed_out.push(tbs_digest(&answer.chain[0]));
        }
    }
    handed_out
}

fn digest(bytes: &[u8]) -> Vec<u8> {
    aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, bytes).as_ref().to_vec()
}

fn tbs_digest(der: &[u8]) -> Vec<u8> {
    digest(x509_parser::parse_x509_certificate(der).unwrap().1.tbs_certificate.as_ref())
}

/// The digests of what the book says was released.
fn released(entries: &[Body]) -> BTreeSet<Vec<u8>> {
    let intent_of = |body: &Body| match body {
        Body::Released(released) => match &entries[usize::try_from(released.intent).unwrap()] {
            Body::Intended(intent) => Some(digest(&intent.tbs)),
            _ => None,
        },
        _ => None,
    };
    entries.iter().filter_map(intent_of).collect()
}

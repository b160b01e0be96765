//! Crashes and power cuts at every moment: nothing acknowledged is lost, nothing is signed twice, the book stays whole.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::house::wire::{Answer, Draft, Identity, Refused};
use crate::house::{Body, House};
use crate::instruments;
use crate::ledger::{one_outcome_each, signed_only_what_was_intended};

/// An agent on the wire that remembers the newest certificate it was given.
pub struct Holder {
    pub name: String,
    pub identity: Identity,
    sequence: u64,
    /// Sent without an answer: repeated with the same bytes.
    pending: Option<Draft>,
    /// The bytes under the signature of each certificate it ever was given.
    pub given: Vec<Vec<u8>>,
}

impl Holder {
    pub fn attest(house: &House, name: &str) -> Self {
        Self::attest_within(house, name, Duration::ZERO).unwrap()
    }

    /// Asks with the same bytes until it is answered, or so long.
    pub fn attest_within(house: &House, name: &str, patience: Duration) -> Answer<Self> {
        let until = Instant::now() + patience;
        let wire = house.wire();
        let join = wire.enrol(name);
        let draft = Draft::join(&join);
        loop {
            match wire.attest(None, |challenge| draft.joined(challenge, &join.token_seed)) {
                Ok(answer) => {
                    let (identity, sequence) = (draft.identity(&answer), answer.next_sequence);
                    let given = vec![to_be_signed(&identity)];
                    return Ok(Self { name: name.to_owned(), identity, sequence, pending: None, given });
                }
                Err(refusal) if Instant::now() >= until => return Err(refusal),
                Err(refusal) => {
                    honest(name, &refusal);
                    // As it was told, but sooner: these tests want load.
                    thread::sleep(refusal.retry_after.unwrap_or_default() / 10);
                }
            }
        }
    }

    /// One renewal; whether it was answered.
    pub fn renew(&mut self, house: &House) -> bool {
        self.try_renew(house).is_ok()
    }

    /// One renewal, with the bytes that were not answered if there are any.
    pub fn try_renew(&mut self, house: &House) -> Answer<()> {
        let draft = self.pending.take().unwrap_or_else(|| Draft::bound(&self.name, self.sequence));
        match house.wire().renew(Some(&self.identity), draft.renewal(&self.identity)) {
            Ok(answer) => {
                self.identity = draft.identity(&answer);
                self.sequence = answer.next_sequence;
                self.given.push(to_be_signed(&self.identity));
                Ok(())
            }
            Err(refusal) => {
                honest(&self.name, &refusal);
                self.pending = Some(draft);
                Err(refusal)
            }
        }
    }
}

/// An honest agent within its limits: it hears nothing, or that the daemon cannot.
fn honest(name: &str, refusal: &Refused) {
    let wrong = ["CLONE_SUSPECTED", "RATE_LIMITED", "IDEMPOTENCY_MISMATCH", "UNAUTHENTICATED"];
    assert!(!wrong.contains(&refusal.reason.as_str()), "{name}: {refusal:?}");
}

fn to_be_signed(identity: &Identity) -> Vec<u8> {
    x509_parser::parse_x509_certificate(&identity.chain[0]).unwrap().1.tbs_certificate.as_ref().to_vec()
}

/// Every certificate that an agent was ever given is in the book, and not as one that it was not given.
pub fn are_in_the_book(entries: &[Body], holder: &Holder) {
    let intents: BTreeMap<&[u8], u64> = (0..)
        .zip(entries)
        .filter_map(|(index, body)| match body {
            Body::Intended(intent) => Some((intent.tbs.as_slice(), index)),
            _ => None,
        })
        .collect();
    // A crash after the answer may leave the outcome unknown; never failed or withheld.
    let not_given: BTreeSet<u64> = entries
        .iter()
        .filter_map(|body| match body {
            Body::Withheld(outcome) => Some(outcome.intent),
            Body::Failed(outcome) => Some(outcome.intent),
            _ => None,
        })
        .collect();
    for (number, tbs) in holder.given.iter().enumerate() {
        let intent = intents.get(tbs.as_slice());
        let intent = intent.unwrap_or_else(|| panic!("the book knows nothing of certificate {number} of {}", holder.name));
        assert!(!not_given.contains(intent), "{} was given what the book says it was not", holder.name);
    }
}

/// At the end: everything given is in the book, everything the token signed is, and the book holds every promise.
fn holds(house: &mut House, holders: &[Holder]) {
    let entries = house.stopped_entries();
    for holder in holders {
        are_in_the_book(&entries, holder);
    }
    one_outcome_each(&entries);
    signed_only_what_was_intended(house, &entries);
    house.verify().ok();
}

/// Any moment within the first 128 milliseconds.
fn random_moment() -> Duration {
    let mut byte = [0];
    aws_lc_rs::rand::fill(&mut byte).unwrap();
    Duration::from_micros(u64::from(byte[0]) * 500)
}

/// Agents that renew for this many crashes stay within what may be live at once.
const CRASHES_PER_AGENT: usize = 6;

#[test]
fn after_a_kill_at_any_moment_agents_go_on_and_the_book_is_whole() {
    let mut house = House::new().configured("limits", "live_certificates_per_agent = 64").with_shim().initialised().served();
    let mut holders: Vec<Holder> = Vec::new();
    let kills = if instruments::slow() { 120 } else { CRASHES_PER_AGENT };
    for round in 0..kills {
        if round % CRASHES_PER_AGENT == 0 {
            holders.extend((0..2).map(|n| Holder::attest(&house, &format!("builder-{n}/{round}"))));
        }
        let done = AtomicBool::new(false);
        let newest = holders.len() - 2;
        thread::scope(|scope| {
            for holder in &mut holders[newest..] {
                let (house, done) = (&house, &done);
                scope.spawn(move || {
                    for _ in 0..9 {
                        if done.load(Ordering::Relaxed) || !holder.renew(house) {
                            return;
                        }
                    }
                });
            }
            // The moment is what varies: time must pass.
            thread::sleep(random_moment());
            house.daemon_signal(rustix::process::Signal::KILL);
            done.store(true, Ordering::Relaxed);
        });
        house.kill9();
        house.serve();
        let entries = house.entries();
        for holder in &holders[newest..] {
            are_in_the_book(&entries, holder);
        }
    }
    let newest = holders.len() - 2;
    for holder in &mut holders[newest..] {
        assert!(holder.renew(&house) || holder.renew(&house), "{} cannot go on", holder.name);
    }
    holds(&mut house, &holders);
}

#[test]
fn a_power_cut_at_any_sync_loses_nothing_that_was_acknowledged() {
    let mut house =
        House::new().configured("limits", "live_certificates_per_agent = 64").with_shim().with_preload().initialised();
    house.serve();
    let mut holders: Vec<Holder> = Vec::new();
    let cuts = if instruments::slow() { 32 } else { 8 };
    for cut in 0..cuts {
        if cut % 8 == 0 {
            holders.push(Holder::attest(&house, &format!("builder/{cut}")));
        }
        let (sync, holder) = (cut / 2 % 8 + 1, holders.last_mut().unwrap());
        if cut % 2 == 0 {
            house.control().kill_before_sync(sync);
        } else {
            house.control().kill_after_sync(sync);
        }
        let mut renewals = 0;
        while renewals < 6 && holder.renew(&house) {
            renewals += 1;
        }
        house.control().clear();
        house.power_cut();
        house.serve();
        are_in_the_book(&house.entries(), holder);
    }
    holds(&mut house, &holders);
}

#[test]
fn an_acknowledged_quarantine_survives_a_power_cut_in_the_next_instant() {
    let mut house = House::new().with_preload().initialised();
    house.serve();
    house.attested("builder/1");
    for sync in 1..=4 {
        let name = format!("builder/{}", sync + 1);
        house.attested(&name);
        house.control().kill_after_sync(sync);
        let acknowledged = house.quarantine(&name).code == 0;
        house.control().clear();
        house.power_cut();
        house.serve();
        if acknowledged {
            house.agent(&name).renew().refused("AGENT_QUARANTINED");
        }
    }
    house.agent("builder/1").renew().ok();
    house.stop_and_verify();
}

#[test]
fn a_quarantine_that_was_in_force_is_in_force_after_a_kill() {
    let mut house = House::serving();
    for n in 0..4 {
        let name = format!("builder/{n}");
        house.attested(&name);
        let acknowledged = house.quarantine(&name).code == 0;
        house.kill9();
        house.serve();
        assert!(acknowledged);
        house.agent(&name).renew().refused("AGENT_QUARANTINED");
    }
}

/// `keyward init` is killed and loses its power at each of its syncs in turn; called again it completes, and the token holds
/// exactly the keys the book tells of.
#[test]
fn an_interrupted_init_is_resumed_by_calling_it_again() {
    for sync in (1..).step_by(if instruments::slow() { 1 } else { 5 }) {
        let mut house = House::new().with_preload();
        house.control().kill_after_sync(sync);
        let first = house.init_preloaded(&[]);
        house.control().clear();
        if first.code == 0 {
            assert!(sync > 5, "init syncs more often than that");
            return;
        }
        assert_eq!(first.code, -1, "{first:?}");
        house.after_power_cut();
        let mut again = house.keyward(&["init"]);
        if again.stderr.contains("keyward hsm unlock") {
            // Killed between the note of a login and its end: whether that cost a try is for an operator to judge.
            house.keyward(&["hsm", "unlock"]).ok();
            again = house.keyward(&["init"]);
        }
        // Killed after its last durable step, it was complete.
        assert!(again.code == 0 || again.stderr.contains("initialised already"), "{again:?}");
        house.serve();
        house.attested("builder/1");
        // The wrapping key is a secret key, and has no public half.
        let told = house.entries().iter().filter(|body| matches!(body, Body::KeyActivated(key) if !key.spki.is_empty())).count();
        let held = instruments::private_keys(&house, "authority").len() + instruments::private_keys(&house, "agents").len();
        assert_eq!(told, held, "killed after sync {sync}");
        house.stop_and_verify();
    }
}

#[test]
fn a_complete_house_is_not_initialised_twice() {
    let house = House::new().initialised();
    let output = house.keyward(&["init"]);
    assert_ne!(output.code, 0, "{output:?}");
}

#[test]
fn a_client_that_disconnects_anywhere_changes_nothing_but_its_own_luck() {
    let mut house = House::new().configured("limits", "live_certificates_per_agent = 64").with_shim().initialised().served();
    {
        let wire = house.wire();
        let mut holder = Holder::attest(&house, "builder/1");
        for micros in [0, 500, 1000, 2000, 3000, 5000, 8000, 13_000, 21_000, 34_000] {
            let draft = Draft::bound("builder/1", holder.sequence);
            wire.renew_and_vanish(&holder.identity, draft.renewal(&holder.identity), Duration::from_micros(micros));
            // It comes back with the same bytes and gets the one answer there is.
            let until = Instant::now() + crate::house::DEADLINE;
            loop {
                match wire.renew(Some(&holder.identity), draft.renewal(&holder.identity)) {
                    Ok(answer) => {
                        holder.identity = draft.identity(&answer);
                        holder.sequence = answer.next_sequence;
                        break;
                    }
                    Err(refusal) => assert_eq!(refusal.reason, "REQUEST_IN_PROGRESS", "{refusal:?}"),
                }
                assert!(Instant::now() < until);
            }
        }
    }
    let entries = house.stopped_entries();
    one_outcome_each(&entries);
    house.verify().ok();
    signed_only_what_was_intended(&house, &entries);
}

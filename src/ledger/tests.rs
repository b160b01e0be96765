//! Races that no client can be made to win on purpose: decided here by holding the gate, or the disk.

use std::time::Instant;

use super::store::Store;
use super::*;
use crate::model::{Algorithm, KeyId, PublicKey, Serial, TokenId, TrustDomain, UnixTime};
use crate::proto::IntentKind;

use prost::Message as _;

pub(super) struct House {
    pub(super) ledger: Ledger,
    runtime: tokio::runtime::Runtime,
    directory: tempfile::TempDir,
}

fn settings(state: &Path) -> Settings {
    Settings { state: state.join("state"), runtime: state.into(), queue_max: 64, live_max: 8, forget_seconds: 3600 }
}

fn agent() -> AgentId {
    AgentId::parse("builder/1").unwrap()
}

pub(super) fn key() -> PublicKey {
    let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    PublicKey::from_raw(Algorithm::P256, rcgen::PublicKeyData::der_bytes(&pair)).unwrap()
}

fn token(expires: UnixTime) -> Token {
    Token { id: TokenId::random(), public_key: [7; 32], expires, spent_for: None }
}

fn intention(evidence: Evidence, key: &PublicKey, now: UnixTime) -> Intention {
    let subject = Subject {
        agent: agent(),
        epoch: 1,
        evidence,
        fresh_until: now.plus_seconds(86_400),
        key: key.clone(),
        serial: Serial::random(),
        not_before: now.minus_seconds(30),
        not_after: now.plus_seconds(600),
        request_hash: Digest::of(&key.digest().0),
        idempotency_hash: key.digest().0[..16].try_into().unwrap(),
    };
    Intention { kind: IntentKind::Renew, key_id: KeyId::random(), tbs: Arc::from(&b"tbs"[..]), subject: Some(subject) }
}

fn bound(prover: &PublicKey, sequence: u64) -> Evidence {
    Evidence::BoundKey { prover: prover.digest(), sequence, channel_proved: true }
}

impl House {
    /// A book, with what `before` writes into its file before it is opened.
    pub(super) fn new(before: impl FnOnce(&Path)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let settings = settings(directory.path());
        create(&settings.state, &TrustDomain::parse("example.org").unwrap(), [1; 16]).unwrap();
        before(&settings.state);
        let ledger = Ledger::open(&settings, Arc::default()).unwrap().ledger;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        Self { ledger, runtime, directory }
    }

    pub(super) fn file(&self) -> PathBuf {
        Ledger::file(&self.directory.path().join("state"))
    }

    pub(super) fn record(&self, body: Body) {
        self.runtime.block_on(self.ledger.record(body)).unwrap();
    }

    fn enrol(&self, token: Token) -> Result<u64, Refusal> {
        let limits = proto::Limits { ttl_seconds_max: 600, rejoin_seconds: 600 };
        self.runtime.block_on(self.ledger.enrol(&agent(), limits, proto::Operator::default(), token))
    }

    fn intend(&self, evidence: Evidence, key: &PublicKey) -> Intent {
        match self.runtime.block_on(self.ledger.intend(intention(evidence, key, self.ledger.clock().reckoned()))) {
            Ok(Decided::Intent(intent)) => intent,
            other => panic!("{other:?}"),
        }
    }

    /// Enrolled, and released one certificate: its key.
    fn joined(&self) -> PublicKey {
        let token = token(self.ledger.clock().reckoned().plus_seconds(3600));
        let (id, first) = (token.id, key());
        self.enrol(token).unwrap();
        self.intend(Evidence::JoinToken(id), &first).release(b"signature").unwrap();
        first
    }

    fn entries(&self) -> Vec<Body> {
        self.runtime.block_on(self.ledger.edge()).unwrap();
        let entries = self.ledger.reader().entries(0, 1000).unwrap();
        entries.iter().map(|bytes| proto::Entry::decode(&bytes[..]).unwrap().body.unwrap()).collect()
    }

    fn pending(&self) -> String {
        std::fs::read_to_string(self.directory.path().join("pending-denials")).unwrap()
    }
}

/// Promise 5: what came through the gate before a clone was noticed stands before the quarantine in the book.
#[test]
fn a_release_that_waits_behind_a_clones_claim_is_in_the_book_before_the_quarantine() {
    let house = House::new(|_| ());
    let first = house.joined();
    let renewal = house.intend(bound(&first, 1), &key());
    let (answer, told) = oneshot::channel();
    let mut gate = house.ledger.gate();
    let claim = Box::new(intention(bound(&first, 1), &key(), house.ledger.clock().reckoned()));
    gate.intents += 1;
    gate.push(Command::Intend { intention: claim, answer });
    // As `Intent::release` does, in the same hold of the gate: the writer cannot come in between.
    assert!(gate.book.named(&agent()).unwrap().1.admits(1).is_ok());
    let released = renewal.index();
    gate.push(Command::Close { intent: released, outcome: Outcome::Released(b"signature".to_vec()) });
    drop(gate);
    std::mem::forget(renewal);
    house.ledger.wake();
    let refusal = house.runtime.block_on(told).unwrap().unwrap_err();
    assert_eq!(refusal.reason, Reason::CloneSuspected);
    let entries = house.entries();
    let place = |wanted: &dyn Fn(&Body) -> bool| entries.iter().position(wanted).unwrap();
    let release = place(&|body| matches!(body, Body::Released(entry) if entry.intent == released));
    let quarantine = place(&|body| matches!(body, Body::Quarantined(_)));
    assert!(release < quarantine, "released at {release}, quarantined at {quarantine}");
    assert_eq!(refusal.entry, Some(quarantine as u64));
    assert_eq!(house.ledger.gate().intents, 0);
}

#[test]
fn a_suspected_clone_is_news_for_the_crl() {
    let house = House::new(|_| ());
    let first = house.joined();
    house.intend(bound(&first, 1), &key()).release(b"signature").unwrap();
    let mut denials = house.ledger.denials();
    denials.mark_unchanged();
    let claim = intention(bound(&first, 1), &key(), house.ledger.clock().reckoned());
    let refusal = house.runtime.block_on(house.ledger.intend(claim)).unwrap_err();
    assert_eq!(refusal.reason, Reason::CloneSuspected);
    assert!(denials.has_changed().unwrap());
    assert_eq!(house.ledger.denied_certificates(house.ledger.clock().reckoned()).len(), 2);
}

/// Promise 5: the acknowledgement comes after the commit, for a repeated call too.
#[test]
fn a_repeated_quarantine_is_acknowledged_no_sooner_than_the_disk_has_the_first() {
    let house = House::new(|_| ());
    house.joined();
    house.entries();
    let other = rusqlite::Connection::open(Ledger::file(&house.directory.path().join("state"))).unwrap();
    // The writer waits for this lock as it would for a disk that does not answer.
    other.execute_batch("BEGIN IMMEDIATE").unwrap();
    let quarantine =
        |ledger: Ledger| async move { ledger.quarantine(&agent(), None, proto::QuarantineCause::Operator, "").await };
    let first = house.runtime.spawn(quarantine(house.ledger.clone()));
    let until = Instant::now() + Duration::from_secs(1);
    while house.ledger.agent(&agent()).unwrap().quarantine.is_none_or(|found| found.index.is_none()) {
        assert!(Instant::now() < until, "the writer has not decided");
        std::thread::yield_now();
    }
    let mut second = house.runtime.spawn(quarantine(house.ledger.clone()));
    let early = house.runtime.block_on(async { tokio::time::timeout(Duration::from_millis(200), &mut second).await });
    assert!(early.is_err(), "acknowledged before it is durable: {early:?}");
    other.execute_batch("ROLLBACK").unwrap();
    for answer in [first, second] {
        assert!(house.runtime.block_on(answer).unwrap().is_ok());
    }
    assert_eq!(house.pending(), "");
}

#[test]
fn durable_lines_of_pending_denials_do_not_stay_for_ever() {
    let house = House::new(|state| std::fs::write(state.join("../pending-denials"), "1 builder/1\n1 gone/1\n").unwrap());
    house.joined();
    house.runtime.block_on(house.ledger.quarantine(&agent(), None, proto::QuarantineCause::Operator, "")).unwrap();
    assert_eq!(house.pending(), "");
}

/// The clock was a day ahead when the last entry was written; an operator set it right and accepted it.
#[test]
fn after_a_clock_was_set_back_tokens_are_good_and_live_certificates_are_known() {
    let house = House::new(|state| {
        let started = Body::Started(proto::Started::default());
        let ahead = UnixTime::wall().plus_seconds(86_400).micros();
        let entry = proto::Entry { index: 1, time_unix_micros: ahead, body: Some(started) };
        Store::open(&Ledger::file(state)).unwrap().commit(1, &[entry.encode_to_vec()], &[], &[]).unwrap();
    });
    assert!(house.ledger.clock().now().is_err());
    house.ledger.clock().accept();
    house.joined();
    assert_eq!(house.ledger.agent(&agent()).unwrap().live.len(), 1);
    house.runtime.block_on(house.ledger.quarantine(&agent(), None, proto::QuarantineCause::Operator, "")).unwrap();
    assert_eq!(house.ledger.denied_certificates(house.ledger.clock().reckoned()).len(), 1);
}

pub(super) fn in_force(purpose: proto::Purpose, key: KeyId) -> Body {
    Body::AuthorityActivated(proto::AuthorityActivated {
        purpose: purpose.into(),
        key_id: key.0.to_vec(),
        ..proto::AuthorityActivated::default()
    })
}

pub(super) fn stepped(key: KeyId, to: proto::AuthorityState, replaces: Option<KeyId>) -> Body {
    Body::AuthorityStepped(proto::AuthorityStepped {
        purpose: proto::Purpose::Issuing.into(),
        key_id: key.0.to_vec(),
        to: to.into(),
        replaces: replaces.map(|key| key.0.to_vec()).unwrap_or_default(),
        ..proto::AuthorityStepped::default()
    })
}

#[test]
fn nothing_is_intended_for_a_key_whose_generation_does_not_sign_it_nor_for_one_that_is_forgotten() {
    use proto::AuthorityState as State;
    let house = House::new(|_| ());
    let record = |body| house.runtime.block_on(house.ledger.record(body));
    let (old, new) = (KeyId::random(), KeyId::random());
    record(in_force(proto::Purpose::Issuing, old)).unwrap();
    record(stepped(new, State::Planned, None)).unwrap();
    record(stepped(new, State::Prepublished, None)).unwrap();
    let intend = |kind, key_id| {
        let intention = Intention { kind, key_id, tbs: Arc::from(&b"tbs"[..]), subject: None };
        match house.runtime.block_on(house.ledger.intend(intention)) {
            Ok(Decided::Intent(intent)) => intent.release(b"signature").map(drop),
            other => other.map(drop),
        }
    };
    let superseded = |kind, key| intend(kind, key).unwrap_err().reason == Reason::AuthoritySuperseded;
    assert!(superseded(IntentKind::Renew, new), "it is only trusted");
    intend(IntentKind::Crl, new).unwrap();
    record(stepped(new, State::Active, Some(old))).unwrap();
    assert!(superseded(IntentKind::Renew, old), "it retires");
    intend(IntentKind::Crl, old).unwrap();
    record(stepped(old, State::Retired, None)).unwrap();
    assert!(superseded(IntentKind::Crl, old));
    record(stepped(old, State::Destroyed, None)).unwrap();
    assert!(superseded(IntentKind::Crl, old), "forgotten is not unknown");
    assert_eq!(house.ledger.gate().intents, 0);
}

/// What begins while the daemon waits for the last outcomes would be the intent that the next start closes as unknown.
#[test]
fn once_intents_come_to_their_end_no_other_begins() {
    let house = House::new(|_| ());
    let first = house.joined();
    let open = house.intend(bound(&first, 1), &key());
    let settled = |patience| house.runtime.block_on(house.ledger.settle(patience));
    assert!(!settled(Duration::from_millis(50)), "one is open");
    let intention = Intention { kind: IntentKind::Crl, key_id: KeyId::random(), tbs: Arc::from(&b"tbs"[..]), subject: None };
    let refused = house.runtime.block_on(house.ledger.intend(intention)).map(drop).unwrap_err();
    assert_eq!(refused.reason, Reason::Draining);
    open.release(b"signature").unwrap();
    assert!(settled(Duration::from_secs(5)));
}

#[test]
fn the_bundles_sequence_grows_with_roots_and_token_signing_keys_and_nothing_else() {
    use proto::{AuthorityState as State, Purpose};
    let house = House::new(|_| ());
    let record = |body| house.runtime.block_on(house.ledger.record(body)).map(|_| house.ledger.generations().1).unwrap();
    let step = |purpose: Purpose, key: KeyId, to, replaces| {
        let Body::AuthorityStepped(step) = stepped(key, to, replaces) else { unreachable!() };
        record(Body::AuthorityStepped(proto::AuthorityStepped { purpose: purpose.into(), ..step }))
    };
    let (tokens, next, issuing) = (KeyId::random(), KeyId::random(), KeyId::random());
    // As `init` goes: nobody is told of a bundle without a root.
    assert_eq!(record(in_force(Purpose::TokenSigning, tokens)), 1);
    assert_eq!(record(in_force(Purpose::Root, KeyId::random())), 1);
    assert_eq!(record(in_force(Purpose::Issuing, KeyId::random())), 1);
    assert_eq!(step(Purpose::Issuing, issuing, State::Planned, None), 1);
    assert_eq!(step(Purpose::Issuing, issuing, State::Prepublished, None), 1);
    assert_eq!(step(Purpose::TokenSigning, next, State::Planned, None), 1);
    let began = house.ledger.clock().reckoned().micros() / 1000;
    let second = step(Purpose::TokenSigning, next, State::Prepublished, None);
    assert!(second >= began, "what a restored ledger tells is news");
    assert_eq!(step(Purpose::TokenSigning, next, State::Active, Some(tokens)), second);
    assert!(step(Purpose::TokenSigning, tokens, State::Retired, None) > second);
}

#[test]
fn there_is_one_authority_on_its_way_and_no_arrow_but_to_the_next_state() {
    use proto::AuthorityState as State;
    let house = House::new(|_| ());
    let record = |body| house.runtime.block_on(house.ledger.record(body));
    let (old, new) = (KeyId::random(), KeyId::random());
    record(in_force(proto::Purpose::Issuing, old)).unwrap();
    for to in [State::Prepublished, State::Active, State::Retiring, State::Retired, State::Destroyed] {
        assert_eq!(record(stepped(new, to, Some(old))).unwrap_err().reason, Reason::Internal, "{to:?}");
    }
    record(stepped(new, State::Planned, None)).unwrap();
    assert_eq!(record(stepped(KeyId::random(), State::Planned, None)).unwrap_err().reason, Reason::RotationUnderWay);
    record(stepped(new, State::Prepublished, None)).unwrap();
    assert_eq!(record(stepped(new, State::Active, None)).unwrap_err().reason, Reason::Internal, "whom it replaces");
    record(stepped(new, State::Active, Some(old))).unwrap();
    // As a start would find them.
    let (found, _) = house.ledger.generations();
    let read = house.ledger.reader().generations(proto::Purpose::Issuing).unwrap();
    assert_eq!(found.len(), 2);
    assert!(read.iter().all(|row| found.contains(row)), "{read:?}");
    let before = house.entries().len();
    assert!(record(stepped(old, State::Active, Some(new))).is_err());
    assert_eq!(house.entries().len(), before, "what is refused is no entry");
}

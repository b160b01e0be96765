//! Every arrow of an authority's life that there is not, in an otherwise right ledger.

use super::book::{Ask, Book, ISSUING, ROOT};
use super::*;
use crate::model::PublicKey;
use crate::proto::{self, AuthorityState as State, AuthorityStepped, Purpose};

const NEXT: [u8; 16] = [3; 16];
const LEDGER: [u8; 16] = [4; 16];

impl Book {
    fn step(&mut self, purpose: Purpose, key: [u8; 16], to: State) {
        self.step_with(purpose, key, to, |_| {});
    }

    fn step_with(&mut self, purpose: Purpose, key: [u8; 16], to: State, more: impl FnOnce(&mut AuthorityStepped)) {
        let mut step =
            AuthorityStepped { purpose: purpose.into(), key_id: key.to_vec(), to: to.into(), ..AuthorityStepped::default() };
        more(&mut step);
        self.add(Body::AuthorityStepped(step));
    }

    /// A second issuing authority, up to the moment before it signs.
    fn next_issuing(&mut self) {
        self.step(Purpose::Issuing, NEXT, State::Planned);
        self.key(NEXT, Purpose::Issuing);
        self.prepublish(Purpose::Issuing, ROOT);
    }

    fn prepublish(&mut self, purpose: Purpose, by: [u8; 16]) {
        let (certificate, intent) = self.certify(NEXT, by);
        let issuer = if by == NEXT { Vec::new() } else { by.to_vec() };
        self.step_with(purpose, NEXT, State::Prepublished, |step| {
            (step.certificate, step.intent, step.issuer) = (certificate, intent, issuer);
        });
    }

    fn replace_issuing(&mut self) {
        self.step_with(Purpose::Issuing, NEXT, State::Active, |step| step.replaces = ISSUING.to_vec());
    }
}

#[test]
fn an_issuing_authority_follows_another_and_each_signs_only_while_it_may() {
    let mut book = Book::new();
    book.issue(&Ask::new(1, 0));
    book.next_issuing();
    book.replace_issuing();
    book.issue(&Ask { key: NEXT, ..Ask::new(1, 1) });
    book.crl(book.size(), &[]);
    book.time = book.time.plus_seconds(601);
    book.step(Purpose::Issuing, ISSUING, State::Retired);
    book.step(Purpose::Issuing, ISSUING, State::Destroyed);
    assert_eq!(book.broken(), [""; 0]);
    book.crl(book.size(), &[]);
    book.issue(&Ask { key: ISSUING, ..Ask::new(1, 2) });
    assert_eq!(book.broken(), ["intent-key", "intent-key"]);
}

#[test]
fn a_key_that_is_not_active_issues_nothing() {
    let mut book = Book::new();
    book.next_issuing();
    book.issue(&Ask { key: NEXT, ..Ask::new(1, 0) });
    book.replace_issuing();
    book.issue(&Ask { key: ISSUING, ..Ask::new(1, 1) });
    assert_eq!(book.broken(), ["intent-key", "intent-key"]);
}

#[test]
fn an_authority_is_not_retired_over_a_certificate_in_force_unless_it_is_tainted() {
    for (tainted, expected) in [(false, &["authority-retired"][..]), (true, &[])] {
        let mut book = Book::new();
        book.issue(&Ask::new(1, 0));
        book.next_issuing();
        book.replace_issuing();
        if tainted {
            book.add(Body::AuthorityTainted(proto::AuthorityTainted { by: None, key_id: ISSUING.to_vec() }));
        }
        book.step(Purpose::Issuing, ISSUING, State::Retired);
        assert_eq!(book.broken(), expected);
    }
}

#[test]
fn states_are_gone_through_in_order() {
    for (from, to) in [
        (State::Planned, State::Active),
        (State::Planned, State::Retired),
        (State::Prepublished, State::Retiring),
        (State::Prepublished, State::Destroyed),
    ] {
        let mut book = Book::new();
        book.step(Purpose::Issuing, NEXT, State::Planned);
        book.key(NEXT, Purpose::Issuing);
        if from == State::Prepublished {
            book.prepublish(Purpose::Issuing, ROOT);
        }
        book.step_with(Purpose::Issuing, NEXT, to, |step| step.replaces = ISSUING.to_vec());
        assert_eq!(book.broken().first(), Some(&"authority-step"), "{from:?} to {to:?}");
    }
    let mut book = Book::new();
    book.step(Purpose::Issuing, ISSUING, State::Destroyed);
    book.step(Purpose::Issuing, NEXT, State::Active);
    book.add(Body::AuthorityTainted(proto::AuthorityTainted { by: None, key_id: vec![9; 16] }));
    assert_eq!(book.broken(), ["authority-step", "authority-step", "authority-tainted"]);
}

#[test]
fn a_root_signs_only_when_every_bundle_can_have_it() {
    for (seconds, expected) in [(299, &["authority-overlap"][..]), (301, &[])] {
        let mut book = Book::new();
        book.step(Purpose::Root, NEXT, State::Planned);
        book.key(NEXT, Purpose::Root);
        book.prepublish(Purpose::Root, NEXT);
        book.time = book.time.plus_seconds(seconds);
        book.step_with(Purpose::Root, NEXT, State::Active, |step| step.replaces = ROOT.to_vec());
        assert_eq!(book.broken(), expected);
    }
}

#[test]
fn what_is_prepublished_is_what_an_intent_released() {
    let mut book = Book::new();
    book.step(Purpose::Issuing, NEXT, State::Planned);
    book.key(NEXT, Purpose::Issuing);
    let (_, intent) = book.certify(NEXT, ROOT);
    let (certificate, _) = book.certify(NEXT, ROOT);
    book.step_with(Purpose::Issuing, NEXT, State::Prepublished, |step| {
        (step.certificate, step.intent, step.issuer) = (certificate, intent, ROOT.to_vec());
    });
    assert_eq!(book.broken(), ["authority"]);
}

#[test]
fn a_ledger_key_comes_into_service_by_the_signatures_of_both_over_a_tree_that_has_it() {
    let followed = |note: &dyn Fn(&Book, &str) -> String| {
        let mut book = Book::new();
        book.ledger_key(LEDGER);
        book.in_force(LEDGER, Purpose::Ledger);
        book.step(Purpose::Ledger, NEXT, State::Planned);
        book.ledger_key(NEXT);
        let early = book.note(&[LEDGER, NEXT]);
        book.step(Purpose::Ledger, NEXT, State::Prepublished);
        let checkpoint = note(&book, &early);
        book.step_with(Purpose::Ledger, NEXT, State::Active, |step| {
            (step.replaces, step.checkpoint) = (LEDGER.to_vec(), checkpoint);
        });
        book.broken()
    };
    assert_eq!(followed(&|book, _| book.note(&[LEDGER, NEXT])), [""; 0]);
    assert_eq!(followed(&|book, _| book.note(&[LEDGER])), ["ledger-key"], "the next one has not signed");
    assert_eq!(followed(&|book, _| book.note(&[NEXT])), ["ledger-key"], "nobody vouches for it");
    assert_eq!(followed(&|_, early| early.to_owned()), ["ledger-key", "ledger-key"], "a tree without it");
    let forged = |book: &Book, _: &str| book.note(&[LEDGER, NEXT]).replacen("\n1", "\n2", 1);
    assert_eq!(followed(&forged), ["ledger-key", "ledger-key"], "another size than was signed");
    assert_eq!(followed(&|_, _| String::new()), ["ledger-key", "ledger-key"]);
}

#[test]
fn an_authority_that_was_given_up_is_followed_by_another_and_signs_nothing() {
    // Planned, its key made, and lost.
    let mut book = Book::new();
    book.step(Purpose::Issuing, NEXT, State::Planned);
    book.key(NEXT, Purpose::Issuing);
    book.step(Purpose::Issuing, NEXT, State::Destroyed);
    book.issue(&Ask { key: NEXT, ..Ask::new(1, 0) });
    assert_eq!(book.broken(), ["intent-key"]);
    // Prepublished, and lost.
    let mut book = Book::new();
    book.next_issuing();
    book.step(Purpose::Issuing, NEXT, State::Retired);
    book.step(Purpose::Issuing, [5; 16], State::Planned);
    assert_eq!(book.broken(), [""; 0]);
    book.replace_issuing();
    assert_eq!(book.broken().first(), Some(&"authority-step"), "what was given up does not come back");
}

#[test]
fn a_forged_arrow_that_takes_the_place_of_another_is_noticed() {
    let activated = |more: &dyn Fn(&mut AuthorityStepped)| {
        let mut book = Book::new();
        book.next_issuing();
        book.step_with(Purpose::Issuing, NEXT, State::Active, |step| {
            step.replaces = ISSUING.to_vec();
            more(step);
        });
        book.broken()
    };
    assert_eq!(activated(&|_| {}), [""; 0]);
    assert_eq!(activated(&|step| step.replaces = vec![9; 16]), ["authority-step"], "it replaces nobody");
    assert_eq!(
        activated(&|step| step.purpose = Purpose::Root.into()).first(),
        Some(&"authority-step"),
        "it is of another purpose"
    );
    assert_eq!(activated(&|step| step.key_id = vec![9; 16]).first(), Some(&"authority-step"), "nobody planned it");
    assert_eq!(activated(&|step| step.key_id.truncate(15)), ["authority-step"]);
}

/// Who can write the ledger, and has every ledger key, still cannot have an authority of their own trusted under our root.
#[test]
fn a_forged_authority_is_noticed_whatever_it_says_of_where_it_comes_from() {
    let forged = |change: &dyn Fn(&mut Book, &mut AuthorityStepped)| {
        let mut book = Book::new();
        book.step(Purpose::Issuing, NEXT, State::Planned);
        book.key(NEXT, Purpose::Issuing);
        let (certificate, intent) = book.certify(NEXT, ROOT);
        let mut step = AuthorityStepped { certificate, intent, issuer: ROOT.to_vec(), ..AuthorityStepped::default() };
        change(&mut book, &mut step);
        book.step_with(Purpose::Issuing, NEXT, State::Prepublished, |forged| {
            (forged.certificate, forged.intent, forged.issuer) = (step.certificate, step.intent, step.issuer);
        });
        book.broken()
    };
    assert_eq!(forged(&|_, _| {}), [""; 0]);
    // As if it had been signed outside, by a root that is here.
    assert_eq!(forged(&|_, step| step.intent = 0), ["authority"]);
    assert_eq!(forged(&|_, step| step.certificate.clear()), ["authority", "authority"]);
    assert_eq!(forged(&|_, step| (step.certificate, step.intent) = (Vec::new(), 0)), ["authority"]);
    assert_eq!(forged(&|_, step| step.issuer = ISSUING.to_vec()), ["authority-step"]);
    // The root's own certificate for another key.
    let of_another = |book: &mut Book, step: &mut AuthorityStepped| (step.certificate, step.intent) = book.certify(ROOT, [9; 16]);
    assert!(forged(&of_another).contains(&"authority"));
    let tainted = |book: &mut Book, _: &mut AuthorityStepped| {
        book.add(Body::AuthorityTainted(proto::AuthorityTainted { by: None, key_id: ROOT.to_vec() }));
    };
    assert_eq!(forged(&tainted), ["authority-tainted"]);
}

#[test]
fn what_is_tainted_does_not_come_to_sign_and_what_is_destroyed_does_not_come_back() {
    let mut book = Book::new();
    book.next_issuing();
    book.add(Body::AuthorityTainted(proto::AuthorityTainted { by: None, key_id: NEXT.to_vec() }));
    book.replace_issuing();
    assert_eq!(book.broken(), ["authority-tainted"]);
    let mut book = Book::new();
    book.next_issuing();
    book.replace_issuing();
    book.step(Purpose::Issuing, ISSUING, State::Retired);
    book.step(Purpose::Issuing, ISSUING, State::Destroyed);
    assert_eq!(book.broken(), [""; 0]);
    book.step(Purpose::Issuing, ISSUING, State::Planned);
    assert_eq!(book.broken(), ["authority-step"]);
}

/// Whoever has the key of years ago cannot seal what they have added to a ledger since.
#[test]
fn a_retired_ledger_key_seals_nothing_more() {
    let (first, next) = (LEDGER, NEXT);
    let mut book = Book::new();
    book.ledger_key(first);
    book.in_force(first, Purpose::Ledger);
    book.step(Purpose::Ledger, next, State::Planned);
    book.ledger_key(next);
    book.step(Purpose::Ledger, next, State::Prepublished);
    let key = |id| PublicKey::from_spki(&rcgen::PublicKeyData::subject_public_key_info(book.key_pair(id))).unwrap();
    let (one, two, note) = (key(first), key(next), book.note(&[first, next]));
    book.step_with(Purpose::Ledger, next, State::Active, |step| (step.replaces, step.checkpoint) = (first.to_vec(), note));
    let in_service = book.checkpoint();
    book.step(Purpose::Ledger, first, State::Retired);
    let after = book.checkpoint();
    let sealed = |by: &PublicKey, checkpoint: &Checkpoint| {
        let mut verifier = Verifier::new([checkpoint.clone()], true);
        verifier.expect_in_service(by.clone(), checkpoint.size);
        book.entries.iter().for_each(|entry| verifier.entry(entry));
        verifier.finish().violations.into_iter().map(|violation| violation.rule).collect::<Vec<_>>()
    };
    assert_eq!(sealed(&one, &in_service), [""; 0]);
    assert_eq!(sealed(&two, &after), [""; 0]);
    assert_eq!(sealed(&one, &after), ["ledger-key"]);
}

/// After an operator has set the clock back, entries' times stand still: they do not tell that a root was in the bundle for too short.
#[test]
fn times_that_stand_still_are_no_evidence() {
    let mut book = Book::new();
    book.step(Purpose::Root, NEXT, State::Planned);
    book.key(NEXT, Purpose::Root);
    book.prepublish(Purpose::Root, NEXT);
    book.add(Body::ClockAccepted(proto::ClockAccepted { by: None, deviation_micros: -86_400_000_000 }));
    book.step_with(Purpose::Root, NEXT, State::Active, |step| step.replaces = ROOT.to_vec());
    assert_eq!(book.broken(), [""; 0]);
}

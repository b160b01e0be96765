//! Every arrow of an authority's life that there is not, in an otherwise right ledger.

use super::book::{Ask, Book, ISSUING, ROOT};
use super::*;
use crate::model::Serial;
use crate::proto::{self, AuthorityState as State, AuthorityStepped, IntentKind, Purpose};

const NEXT: [u8; 16] = [3; 16];

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
        self.step_with(Purpose::Issuing, NEXT, State::Prepublished, |step| step.issuer = ROOT.to_vec());
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
        if tainted {
            book.add(Body::AuthorityTainted(proto::AuthorityTainted { by: None, key_id: ISSUING.to_vec() }));
        }
        book.next_issuing();
        book.replace_issuing();
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
            book.step_with(Purpose::Issuing, NEXT, State::Prepublished, |step| step.issuer = ROOT.to_vec());
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
        book.step(Purpose::Root, NEXT, State::Prepublished);
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
    let ask = Ask { key: ROOT, authority: true, uri: "spiffe://example.org".into(), agent: "", ..Ask::new(0, 0) };
    let intent = book.intend_kind(IntentKind::Issuing, &ask);
    book.release(intent);
    let certificate = book.certificate(&Ask { serial: Serial::random(), ..ask });
    book.step_with(Purpose::Issuing, NEXT, State::Prepublished, |step| {
        (step.certificate, step.intent, step.issuer) = (certificate, intent, ROOT.to_vec());
    });
    assert_eq!(book.broken(), ["authority"]);
}

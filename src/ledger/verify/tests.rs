//! Every rule is broken once, by hand, in an otherwise right ledger.

use std::convert::Infallible;
use std::sync::OnceLock;

use proptest::prelude::*;
use proptest::sample::Index;

use super::book::{AGENT, Ask, Book, ISSUING, ROOT};
use super::*;
use crate::model::Serial;
use crate::proto::{self, IntentKind, Purpose};

#[test]
fn a_right_ledger_holds_and_is_counted() {
    let mut book = Book::new();
    book.start();
    book.enrol("builder/8");
    book.issue(&Ask::new(1, 0));
    let failed = book.intend(&Ask::new(1, 1));
    book.add(Body::Failed(proto::Failed { intent: failed, ..Default::default() }));
    let unknown = book.intend(&Ask::new(1, 1));
    book.unknown(unknown);
    book.issue(&Ask::new(1, 1));
    book.issue(&Ask::of("builder/8", 1, 0));
    let sealed = book.checkpoint();
    let racing = book.intend(&Ask::new(1, 2));
    book.quarantine(AGENT, 1);
    book.quarantine(AGENT, 1);
    book.withhold(racing);
    book.reinstate(AGENT, 2);
    book.issue(&Ask::new(2, 0));
    let open = book.intend(&Ask::new(2, 1));

    let report = book.report(std::slice::from_ref(&sealed));
    assert_eq!(report.violations, []);
    assert!(report.holds());
    assert_eq!((report.entries, report.size_sealed), (book.size(), sealed.size));
    assert_eq!(report.not_yet_sealed(), book.size() - sealed.size);
    assert_eq!(report.root, book.checkpoint().root);
    assert_eq!((report.agents, report.intents, report.certificates, report.released), (2, 8, 4, 4));
    assert_eq!((report.withheld, report.failed, report.unknown), (1, 1, 1));
    assert_eq!((report.quarantines, report.reinstatements), (1, 1));
    assert_eq!(report.open_intents, [open]);
    assert_eq!(report.trust_domain.as_ref().map(TrustDomain::as_str), Some("example.org"));
    // Every checkpoint ever kept is held against the same entries.
    let empty = Checkpoint { origin: sealed.origin.clone(), size: 0, root: empty_root() };
    assert!(book.report(&[book.checkpoint(), empty, sealed]).holds());
}

#[test]
fn an_empty_ledger_has_no_findings_but_against_a_checkpoint_it_is_truncated() {
    let book = Book::empty();
    assert!(book.report(&[]).holds());
    let report = book.report(&[Book::new().checkpoint()]);
    assert_eq!(report.violations[0].rule, "truncated");
}

#[test]
fn a_changed_entry_or_a_cut_tail_is_noticed() {
    let mut book = Book::new();
    let checkpoint = book.checkpoint();
    let enrolled = book.entries[7].clone();
    book.entries[7].extend([0xc0, 0x0c, 0]); // an unknown field 200: decodes, other bytes
    assert_eq!(book.report(std::slice::from_ref(&checkpoint)).violations[0].rule, "root");
    book.entries[7] = enrolled;
    assert!(book.report(std::slice::from_ref(&checkpoint)).holds());
    book.entries.pop();
    assert_eq!(book.report(&[checkpoint]).violations[0].rule, "truncated");
}

#[test]
fn a_ledger_of_another_trust_domain_than_the_checkpoints_is_noticed() {
    let book = Book::new();
    let checkpoint = Checkpoint { origin: "other.org/ledger".into(), ..book.checkpoint() };
    assert_eq!(book.report(&[checkpoint]).violations[0].rule, "genesis");
}

#[test]
fn entries_are_dense_in_time_order_and_known() {
    let stopped = Some(Body::Stopped(proto::Stopped::default()));
    let mut book = Book::new();
    let (index, time_unix_micros) = (book.size(), book.time.micros());
    book.raw(&Entry { index: index + 1, time_unix_micros, body: stopped.clone() });
    assert_eq!(book.broken(), ["index"]);

    let mut book = Book::new();
    book.raw(&Entry { index, time_unix_micros: time_unix_micros - 1, body: stopped });
    assert_eq!(book.broken(), ["time"]);

    let mut book = Book::new();
    book.raw(&Entry { index, time_unix_micros, body: None });
    book.entries.push(vec![0xff; 9]);
    assert_eq!(book.broken(), ["entry-malformed", "entry-malformed"]);
}

#[test]
fn the_genesis_is_first_and_only() {
    let mut book = Book::new();
    book.genesis();
    assert_eq!(book.broken(), ["genesis"]);
    let mut book = Book::empty();
    book.start();
    assert_eq!(book.broken(), ["genesis"]);
    let mut book = Book::empty();
    book.add(Body::Genesis(Genesis::default()));
    assert_eq!(book.broken(), ["genesis"]);
}

#[test]
fn a_key_is_intended_once_and_settled_once() {
    let abandoned = |id: [u8; 16]| Body::KeyAbandoned(proto::KeyAbandoned { key_id: id.to_vec(), ..Default::default() });
    let mut book = Book::new();
    book.key_intended(ISSUING, Purpose::Issuing);
    assert_eq!(book.broken(), ["key-intent"]);
    let mut book = Book::new();
    book.key_activated(ISSUING);
    assert_eq!(book.broken(), ["key-settled"]);
    let mut book = Book::new();
    book.add(abandoned(ISSUING));
    assert_eq!(book.broken(), ["key-settled"]);
    let mut book = Book::new();
    book.key_activated([9; 16]);
    assert_eq!(book.broken(), ["key-settled"]);
    let mut book = Book::new();
    book.key_intended([9; 16], Purpose::Canary);
    book.add(abandoned([9; 16]));
    assert_eq!(book.broken(), [""; 0]);
    let mut book = Book::new();
    book.key_intended([9; 16], Purpose::Canary);
    book.add(Body::KeyActivated(proto::KeyActivated { key_id: vec![9; 16], spki: vec![1] }));
    assert_eq!(book.broken(), ["key-spki"]);
}

#[test]
fn only_an_active_key_of_the_purpose_signs() {
    let mut book = Book::new();
    book.issue(&Ask { key: ROOT, ..Ask::new(1, 0) });
    assert_eq!(book.broken(), ["intent-key"]);
    let mut book = Book::new();
    book.key_intended([9; 16], Purpose::Issuing);
    book.intend(&Ask { key: [9; 16], ..Ask::new(1, 0) });
    assert_eq!(book.broken(), ["intent-key"]);
}

#[test]
fn every_outcome_ends_one_open_intent() {
    let mut book = Book::new();
    let intent = book.issue(&Ask::new(1, 0));
    book.withhold(intent);
    assert_eq!(book.broken(), ["outcome-twice"]);
    let mut book = Book::new();
    book.unknown(3);
    book.release(99_999);
    assert_eq!(book.broken(), ["outcome-intent", "outcome-intent"]);
}

#[test]
fn nothing_is_released_across_a_restart() {
    let mut book = Book::new();
    let intent = book.intend(&Ask::new(1, 0));
    book.start();
    book.release(intent);
    assert_eq!(book.broken(), ["outcome-restart"]);
}

#[test]
fn a_release_between_quarantine_and_reinstatement_is_noticed() {
    let mut book = Book::new();
    let racing = book.intend(&Ask::new(1, 0));
    book.quarantine(AGENT, 1);
    book.release(racing);
    book.reinstate(AGENT, 2);
    assert_eq!(book.broken(), ["released-quarantined", "released-denied"]);
}

#[test]
fn a_release_of_a_denied_epoch_is_noticed_even_after_the_reinstatement() {
    let mut book = Book::new();
    let racing = book.intend(&Ask::new(1, 0));
    book.quarantine(AGENT, 1);
    book.reinstate(AGENT, 2);
    book.issue(&Ask::new(2, 0));
    assert_eq!(book.broken(), [""; 0]);
    book.release(racing);
    assert_eq!(book.broken(), ["released-denied", "sequence"]);
}

#[test]
fn epochs_grow_by_one_through_quarantine_and_reinstatement() {
    for (epoch, expected) in [(1, "reinstated"), (2, ""), (3, "reinstated")] {
        let mut book = Book::new();
        book.quarantine(AGENT, 1);
        book.reinstate(AGENT, epoch);
        assert_eq!(book.broken().first().copied().unwrap_or_default(), expected);
    }
    let mut book = Book::new();
    book.reinstate(AGENT, 1);
    assert_eq!(book.broken(), ["reinstated"]);
    let mut book = Book::new();
    book.quarantine(AGENT, 2);
    assert_eq!(book.broken(), ["quarantined"]);
    let mut book = Book::new();
    book.issue(&Ask::new(2, 0));
    assert_eq!(book.broken(), ["intent-epoch"]);
}

#[test]
fn only_enrolled_agents_are_told_of() {
    let mut book = Book::new();
    book.quarantine("builder/8", 1);
    book.reinstate("builder/8", 2);
    book.issue(&Ask::of("builder/8", 1, 0));
    book.enrol(AGENT);
    book.enrol("../etc");
    assert_eq!(book.broken(), ["quarantined", "reinstated", "intent-agent", "enrolled", "enrolled"]);
}

#[test]
fn releases_of_an_agent_follow_each_other() {
    let mut book = Book::new();
    book.issue(&Ask::new(1, 0));
    book.issue(&Ask::new(1, 1));
    book.issue(&Ask::new(1, 1));
    book.issue(&Ask::new(1, 3));
    assert_eq!(book.broken(), ["sequence", "sequence"]);
}

#[test]
fn what_is_signed_is_a_certificate_of_the_agent_within_its_appraisal() {
    let mut book = Book::new();
    book.issue(&Ask { uri: "spiffe://example.org/agent/builder/8".into(), ..Ask::new(1, 0) });
    book.issue(&Ask { uri: "spiffe://example.org.evil/agent/builder/7".into(), ..Ask::new(1, 1) });
    book.issue(&Ask { fresh_seconds: 599, ..Ask::new(1, 2) });
    book.issue(&Ask { fresh_seconds: 600, ..Ask::new(1, 3) });
    book.issue(&Ask { authority: true, ..Ask::new(1, 4) });
    assert_eq!(book.broken(), ["intent-identity", "intent-identity", "intent-freshness", "intent-tbs"]);
    let mut book = Book::new();
    for (kind, tbs) in [(IntentKind::Server, vec![0x30, 0]), (IntentKind::Crl, vec![1, 2, 3])] {
        book.add(Body::Intended(proto::Intended { kind: kind.into(), key_id: ISSUING.to_vec(), tbs, ..Default::default() }));
    }
    assert_eq!(book.broken(), ["intent-tbs", "intent-tbs"]);
}

#[test]
fn a_serial_is_not_used_again_while_its_certificate_lives() {
    let serial = Serial::random();
    let mut book = Book::new();
    book.issue(&Ask { serial, ..Ask::new(1, 0) });
    book.issue(&Ask { serial, ..Ask::new(1, 1) });
    assert_eq!(book.broken(), ["serial"]);
}

#[test]
fn a_forged_signature_is_noticed_where_signatures_are_asked_for() {
    let mut book = Book::new();
    let intent = book.intend(&Ask::new(1, 0));
    book.signatures.get_mut(&intent).unwrap()[20] ^= 1;
    book.release(intent);
    assert_eq!(book.broken(), ["signature"]);
    let without = verify(book.entries.iter().map(Ok::<_, Infallible>), [book.checkpoint()], false).unwrap();
    assert!(without.holds());
}

#[test]
fn an_authority_in_force_is_the_one_that_was_released() {
    let ask = || Ask { key: ROOT, authority: true, uri: "spiffe://example.org".into(), agent: "", ..Ask::new(0, 0) };
    let activate = |book: &mut Book, purpose: Purpose, certificate: Vec<u8>, intent: u64| {
        let key_id = if purpose == Purpose::Root { ROOT } else { ISSUING }.to_vec();
        let purpose = purpose.into();
        book.add(Body::AuthorityActivated(proto::AuthorityActivated { purpose, key_id, certificate, intent }));
    };
    let mut book = Book::empty();
    book.genesis();
    book.key(ROOT, Purpose::Root);
    book.key(ISSUING, Purpose::Issuing);
    activate(&mut book, Purpose::Root, vec![], 0);
    let ask_issuing = ask();
    let certificate = book.certificate(&ask_issuing);
    let intent = book.intend_kind(IntentKind::Issuing, &ask_issuing);
    book.release(intent);
    activate(&mut book, Purpose::Issuing, certificate.clone(), intent);
    assert_eq!(book.broken(), [""; 0]);
    activate(&mut book, Purpose::Root, certificate, intent);
    let other = book.certificate(&ask());
    activate(&mut book, Purpose::Issuing, other, intent);
    assert_eq!(book.broken(), ["authority", "authority-step", "authority", "authority-step"]);
}

#[test]
fn a_crl_after_a_quarantine_lists_what_was_live() {
    let mut book = Book::new();
    book.enrol("builder/8");
    let bystander = book.issue(&Ask::of("builder/8", 1, 0));
    let gone = book.issue(&Ask { ttl_seconds: 60, ..Ask::new(1, 0) });
    let first = book.issue(&Ask::new(1, 1));
    let unknown = book.intend(&Ask::new(1, 2));
    book.crl(book.size(), &[]);
    let prepared_before = book.size();
    book.quarantine(AGENT, 1);
    book.crl(prepared_before, &[]);
    book.unknown(unknown);
    book.time = book.time.plus_seconds(120);
    book.reinstate(AGENT, 2);
    book.crl(book.size(), &[first, unknown]);
    book.crl(book.size(), &[first, unknown, gone, bystander]);
    assert_eq!(book.broken(), [""; 0]);
    book.crl(book.size(), &[first]);
    book.crl(book.size(), &[unknown]);
    assert_eq!(book.broken(), ["crl-incomplete", "crl-incomplete"]);
    let mut book = Book::new();
    book.crl(5, &[]);
    book.crl(5, &[]);
    book.crl(1000, &[]);
    assert_eq!(book.broken(), ["crl-number", "crl-number"]);
}

#[test]
fn findings_are_bounded_and_counted() {
    let mut book = Book::new();
    for _ in 0..1500 {
        book.unknown(1);
    }
    let report = book.report(&[]);
    assert_eq!((report.violations.len(), report.violations_total, report.holds()), (VIOLATIONS_KEPT, 1500, false));
}

proptest! {
    #[test]
    fn whatever_is_changed_below_the_checkpoint_is_noticed(
        which in any::<Index>(),
        byte in any::<Index>(),
        bit in 0_u32..8,
        other in any::<Index>(),
    ) {
        static RIGHT: OnceLock<(Vec<Vec<u8>>, Checkpoint)> = OnceLock::new();
        let (entries, checkpoint) = RIGHT.get_or_init(|| {
            let mut book = Book::new();
            book.issue(&Ask::new(1, 0));
            book.quarantine(AGENT, 1);
            book.crl(book.size(), &[8]);
            book.reinstate(AGENT, 2);
            book.issue(&Ask::new(2, 0));
            assert_eq!(book.broken(), [""; 0]);
            (book.entries.clone(), book.checkpoint())
        });
        let (at, other) = (which.index(entries.len()), other.index(entries.len()));
        let holds = |entries: &[Vec<u8>]| {
            verify(entries.iter().map(Ok::<_, Infallible>), [checkpoint.clone()], true).unwrap().holds()
        };
        let mut flipped = entries.clone();
        let byte = byte.index(flipped[at].len());
        flipped[at][byte] ^= 1_u8 << bit;
        prop_assert!(!holds(&flipped));
        let mut swapped = entries.clone();
        swapped.swap(at, other);
        prop_assert_eq!(holds(&swapped), at == other);
        let mut dropped = entries.clone();
        dropped.remove(at);
        prop_assert!(!holds(&dropped));
    }
}

use super::*;
use crate::client::request;
use crate::proto::ask::Claim;

fn claim(sequence: u64) -> Claim {
    Claim::BoundKey(proto::BoundKeyClaim { agent: "coder/7".into(), sequence })
}

fn card(sequence: u64) -> Card {
    Card {
        version: 1,
        agent: "coder/7".into(),
        spiffe_id: "spiffe://example.org/agent/coder/7".into(),
        trust_domain: "example.org".into(),
        epoch: 1,
        next_sequence: sequence,
        ledger_index: 9,
        not_before_unix_seconds: 1000,
        not_after_unix_seconds: 1600,
        bundle_sequence: 1,
        addresses: vec!["127.0.0.1:8443".into()],
        token_id: "00".into(),
    }
}

/// A certificate for `key`, self-signed by it: the store looks at key and serial alone.
fn credential(key: &Key, serial: u64) -> proto::Credential {
    let mut parameters = rcgen::CertificateParams::default();
    parameters.serial_number = Some(serial.into());
    let leaf = parameters.self_signed(key).expect("a certificate").der().to_vec();
    let bundle = Some(proto::Bundle { authorities: vec![leaf.clone()], sequence: 1, ..proto::Bundle::default() });
    proto::Credential { chain: vec![leaf], bundle, ..Default::default() }
}

fn intend(dir: &AgentDir, sequence: u64) -> Result<Pending, StoreError> {
    let key = Key::generate().expect("a key");
    let ask = request::ask(&key, 60, claim(sequence)).expect("an ask");
    dir.intend(key, ask, claim(sequence))
}

fn directory() -> (tempfile::TempDir, AgentDir) {
    let root = tempfile::tempdir().expect("a directory");
    let dir = AgentDir::open(&root.path().join("agent"), true).expect("opened");
    (root, dir)
}

#[test]
fn everything_in_it_is_for_its_owner_alone() {
    let (_root, dir) = directory();
    let pending = intend(&dir, 1).expect("durable");
    let answer = credential(&pending.key, 1);
    dir.promote(&pending, &card(2), &answer).expect("promoted");
    intend(&dir, 2).expect("durable");
    let current = dir.path().join("current");
    for directory in [dir.path(), &current] {
        assert_eq!(fs::metadata(directory).expect("there").mode() & 0o777, 0o700);
        for entry in fs::read_dir(directory).expect("listed") {
            let metadata = fs::metadata(entry.expect("an entry").path()).expect("there");
            assert_eq!(metadata.mode() & 0o077, 0);
        }
    }
    for file in FILES {
        assert!(fs::read(dir.path().join(file)).is_ok(), "{file} is there through its link");
    }
}

#[test]
fn a_second_process_and_an_open_directory_are_refused() {
    let (root, dir) = directory();
    assert!(matches!(AgentDir::open(dir.path(), false), Err(StoreError::Busy { .. })));
    let open = root.path().join("open");
    DirBuilder::new().mode(0o755).create(&open).expect("made");
    fs::set_permissions(&open, std::os::unix::fs::PermissionsExt::from_mode(0o755)).expect("chmod");
    assert!(matches!(AgentDir::open(&open, true), Err(StoreError::Open { .. })));
}

#[test]
fn a_directory_that_is_not_there_has_no_credential_yet() {
    let (root, _) = directory();
    assert!(matches!(AgentDir::open(&root.path().join("nowhere"), false), Err(StoreError::Empty { .. })));
}

#[test]
fn a_request_has_the_same_bytes_after_a_crash() {
    let (_root, dir) = directory();
    assert!(dir.pending().expect("read").is_none());
    let sent = intend(&dir, 1).expect("durable");
    let again = dir.pending().expect("read").expect("outstanding");
    assert_eq!(again.ask, sent.ask);
    assert_eq!(again.key.public(), sent.key.public());
    assert_eq!(again.claim, sent.claim);
}

/// Dies at every point of two renewals in turn; whatever the point, there is a usable pair, and the work can be finished
/// with the request that may have been sent.
#[test]
fn a_crash_at_any_line_leaves_one_usable_pair() {
    for point in 0.. {
        let (_root, dir) = directory();
        let first = intend(&dir, 1).expect("durable");
        dir.promote(&first, &card(2), &credential(&first.key, 1)).expect("the first");

        dir.crash_at.set(Some(point));
        let mut sent = None;
        let outcome = intend(&dir, 2).and_then(|pending| {
            let answer = credential(&pending.key, 2);
            sent = Some((pending.ask.clone(), pending.key.public().clone(), answer.clone()));
            dir.promote(&pending, &card(3), &answer)
        });
        let died = outcome.is_err();
        dir.crash_at.set(None);

        // `holding` fails unless certificate and key belong together.
        let holding = dir.holding().expect("a usable pair");
        dir.settle(&holding).expect("settled");
        if let Some((ask, key, answer)) = sent {
            if holding.key.public() == &key {
                assert_eq!(holding.card.next_sequence, 3);
                assert!(dir.pending().expect("read").is_none());
            } else {
                let pending = dir.pending().expect("read").expect("what was sent is still known");
                assert_eq!(pending.ask, ask, "point {point}");
                dir.promote(&pending, &card(3), &answer).expect("the same answer, later");
                assert_eq!(dir.holding().expect("usable").key.public(), &key);
            }
        } else {
            assert_eq!(holding.key.public(), first.key.public());
        }
        if !died {
            assert!(point >= 7, "every point was visited");
            break;
        }
    }
}

#[test]
fn only_the_current_credential_and_the_one_before_are_kept() {
    let (_root, dir) = directory();
    for sequence in 1..=4 {
        let pending = intend(&dir, sequence).expect("durable");
        dir.promote(&pending, &card(sequence + 1), &credential(&pending.key, sequence)).expect("promoted");
    }
    let kept = fs::read_dir(dir.path()).expect("listed");
    let kept = kept.filter(|entry| entry.as_ref().expect("an entry").file_name().to_string_lossy().starts_with("credential-"));
    assert_eq!(kept.count(), 2);
}

#[test]
fn half_life_is_the_middle_of_validity() {
    assert_eq!(card(1).half_life(), UnixTime::from_seconds(1300));
    assert!(card(1).is_expired(UnixTime::from_seconds(1600)) && !card(1).is_expired(UnixTime::from_seconds(1599)));
}

fn bundle(sequence: u64) -> proto::Bundle {
    let authorities = (0..sequence).map(|root| root.to_be_bytes().to_vec()).collect();
    proto::Bundle { authorities, sequence, ..proto::Bundle::default() }
}

#[test]
fn a_newer_bundle_is_kept_beside_the_credential_and_an_older_one_is_not() {
    let (_root, dir) = directory();
    assert!(matches!(dir.keep_bundle(&bundle(2)), Err(StoreError::Empty { .. })));
    let pending = intend(&dir, 1).expect("durable");
    dir.promote(&pending, &card(2), &credential(&pending.key, 1)).expect("promoted");
    assert!(dir.keep_bundle(&bundle(3)).expect("kept"));
    for sequence in [3, 2] {
        assert!(!dir.keep_bundle(&bundle(sequence)).expect("left alone"));
    }
    let holding = dir.holding().expect("a usable pair");
    assert_eq!((holding.card.bundle_sequence, holding.authorities), (3, bundle(3).authorities));
    assert_eq!(holding.card, Card { bundle_sequence: 3, ..card(2) });
}

#[test]
fn a_crash_between_the_bundle_and_its_sequence_is_made_good_by_the_same_bundle() {
    let (_root, dir) = directory();
    let pending = intend(&dir, 1).expect("durable");
    dir.promote(&pending, &card(2), &credential(&pending.key, 1)).expect("promoted");
    dir.crash_at.set(Some(0));
    dir.keep_bundle(&bundle(3)).expect_err("died");
    dir.crash_at.set(None);
    let holding = dir.holding().expect("a usable pair");
    assert_eq!((holding.card.bundle_sequence, holding.authorities), (1, bundle(3).authorities));
    assert!(dir.keep_bundle(&bundle(3)).expect("kept"));
    assert_eq!(dir.holding().expect("a usable pair").card.bundle_sequence, 3);
}

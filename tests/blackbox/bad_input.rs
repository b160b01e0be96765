//! Whatever is wrong with a request, a file or the machine: one clear refusal with a stable reason code, and nothing lost.

use std::fs;
use std::io::Write as _;
use std::net::TcpListener;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use keyward::proto::{JoinFile, ask::Claim};
use prost::Message as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};

use crate::house::wire::{Answer, Draft, Identity, Wire, csr, refused};
use crate::house::{Body, House, run, write_private};
use crate::instruments::slow;

fn attest(wire: &Wire, join: &JoinFile, draft: &Draft) -> Answer<keyward::proto::Credential> {
    wire.attest(None, |challenge| draft.joined(challenge, &join.token_seed))
}

/// A serving house, its wire, and a join token; when the test is done the token must still be good.
fn with_token(test: impl FnOnce(&Wire, &JoinFile)) {
    let mut house = House::serving();
    {
        let wire = house.wire();
        let join = wire.enrol("builder/1");
        test(&wire, &join);
        attest(&wire, &join, &Draft::join(&join)).expect("a refused request must not spend the token");
    }
    house.stop_and_verify();
}

/// An attested agent and the sequence it has to claim next.
fn attested(wire: &Wire, name: &str) -> (Identity, u64) {
    let join = wire.enrol(name);
    let draft = Draft::join(&join);
    let answer = attest(wire, &join, &draft).unwrap();
    (draft.identity(&answer), answer.next_sequence)
}

// The request

#[test]
fn a_request_that_does_not_parse_is_refused() {
    with_token(|wire, join| {
        for ask in [b"".to_vec(), b"\xff".to_vec(), vec![0x0a, 0xff, 0xff, 0xff, 0xff, 0x0f], b"GET / HTTP/1.1\r\n".to_vec()] {
            let answer = wire.attest(None, |challenge| {
                let mut request = Draft::join(join).joined(challenge, &join.token_seed);
                request.ask.clone_from(&ask);
                request
            });
            refused(answer, "MALFORMED_REQUEST");
        }
        let mut draft = Draft::join(join);
        draft.ask.claim = None;
        refused(attest(wire, join, &draft), "MALFORMED_REQUEST");
        for key in ["", "two words\n", &"k".repeat(65), "ключ"] {
            let mut draft = Draft::join(join);
            draft.ask.idempotency_key = key.to_owned();
            refused(attest(wire, join, &draft), "MALFORMED_REQUEST");
        }
    });
}

#[test]
fn a_request_that_is_too_large_is_refused() {
    with_token(|wire, join| {
        let mut draft = Draft::join(join);
        draft.ask.csr = vec![0x30; 5000];
        refused(attest(wire, join, &draft), "REQUEST_TOO_LARGE");
        draft.ask.csr = vec![0x30; 7000];
        refused(attest(wire, join, &draft), "REQUEST_TOO_LARGE");
        let mut proof = Draft::join(join);
        let answer = wire.attest(None, |challenge| {
            let mut request = proof.joined(challenge, &join.token_seed);
            request.proof = vec![0; 5000];
            request
        });
        refused(answer, "REQUEST_TOO_LARGE");
        // Past every bound: the transport itself gives up, and the next caller is served.
        proof.ask.csr = vec![0x30; 16 << 20];
        attest(wire, join, &proof).expect_err("16 MiB");
    });
}

#[test]
fn a_csr_that_is_none_is_refused() {
    with_token(|wire, join| {
        let good = csr(&rcgen::KeyPair::generate().unwrap());
        let trailing = [good.clone(), vec![0]].concat();
        for bytes in [b"".to_vec(), b"not DER".to_vec(), good[..good.len() - 1].to_vec(), trailing, vec![0x30, 0x80, 0, 0]] {
            let mut draft = Draft::join(join);
            draft.ask.csr = bytes;
            refused(attest(wire, join, &draft), "CSR_MALFORMED");
        }
    });
}

#[test]
fn a_csr_not_signed_by_its_own_key_is_refused() {
    with_token(|wire, join| {
        let mut draft = Draft::join(join);
        let last = draft.ask.csr.len() - 1;
        draft.ask.csr[last] ^= 1;
        refused(attest(wire, join, &draft), "CSR_SIGNATURE_INVALID");
    });
}

#[test]
fn a_key_that_is_not_on_p256_is_refused() {
    with_token(|wire, join| {
        for algorithm in [&rcgen::PKCS_ECDSA_P384_SHA384, &rcgen::PKCS_ED25519, &rcgen::PKCS_ECDSA_P521_SHA512] {
            let mut draft = Draft::join(join);
            draft.key = rcgen::KeyPair::generate_for(algorithm).unwrap();
            draft.ask.csr = csr(&draft.key);
            refused(attest(wire, join, &draft), "KEY_UNSUPPORTED");
        }
    });
}

#[test]
fn a_weak_rsa_key_is_refused() {
    let pem = run(std::process::Command::new("openssl").args([
        "req",
        "-new",
        "-newkey",
        "rsa:1024",
        "-nodes",
        "-keyout",
        "/dev/null",
        "-subj",
        "/CN=x",
    ]))
    .ok();
    let der = pem::parse(pem.stdout).unwrap().into_contents();
    with_token(|wire, join| {
        let mut draft = Draft::join(join);
        draft.ask.csr.clone_from(&der);
        refused(attest(wire, join, &draft), "KEY_UNSUPPORTED");
    });
}

#[test]
fn a_point_off_the_curve_is_refused() {
    with_token(|wire, join| {
        let mut draft = Draft::join(join);
        use rcgen::PublicKeyData as _;
        let point = draft.key.der_bytes().to_vec();
        let at = draft.ask.csr.windows(point.len()).position(|window| window == point).unwrap();
        draft.ask.csr[at + 40] ^= 1;
        refused(attest(wire, join, &draft), "KEY_UNSUPPORTED");
    });
}

#[test]
fn what_a_csr_wishes_for_besides_its_key_is_not_granted() {
    with_token(|wire, _| {
        let join = wire.enrol("builder/2");
        let mut draft = Draft::join(&join);
        let mut params = rcgen::CertificateParams::new(vec!["evil.example".to_owned()]).unwrap();
        params.distinguished_name.push(rcgen::DnType::CommonName, "root");
        params.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        params.key_usages = vec![rcgen::KeyUsagePurpose::KeyCertSign];
        draft.ask.csr = params.serialize_request(&draft.key).unwrap().der().to_vec();
        let answer = attest(wire, &join, &draft).unwrap();
        let (_, certificate) = x509_parser::parse_x509_certificate(&answer.chain[0]).unwrap();
        assert!(!certificate.is_ca());
        let told = format!("{certificate:?}");
        assert!(!told.contains("evil.example") && certificate.subject().iter_common_name().next().is_none());
    });
}

#[test]
fn a_wish_beyond_the_grant_is_refused() {
    with_token(|wire, join| {
        for ttl in [601, 86_400, u32::MAX] {
            let mut draft = Draft::join(join);
            draft.ask.ttl_seconds = ttl;
            refused(attest(wire, join, &draft), "WISH_BEYOND_GRANT");
        }
    });
}

#[test]
fn a_repeated_request_with_other_bytes_is_refused() {
    let house = House::serving();
    let wire = house.wire();
    let join = wire.enrol("builder/1");
    let mut draft = Draft::join(&join);
    let first = attest(&wire, &join, &draft).unwrap();
    draft.ask.ttl_seconds = 60;
    refused(attest(&wire, &join, &draft), "IDEMPOTENCY_MISMATCH");
    let holder = draft.identity(&first);
    let mut renewal = Draft::bound("builder/1", first.next_sequence);
    let second = wire.renew(Some(&holder), renewal.renewal(&holder)).unwrap();
    renewal.ask.ttl_seconds = 61;
    refused(wire.renew(Some(&holder), renewal.renewal(&holder)), "IDEMPOTENCY_MISMATCH");
    renewal.ask.ttl_seconds = 0;
    assert_eq!(wire.renew(Some(&holder), renewal.renewal(&holder)).unwrap(), second);
}

// The evidence

#[test]
fn a_token_that_was_never_issued_is_refused() {
    with_token(|wire, join| {
        let mut draft = Draft::join(join);
        for id in [vec![7; 16], vec![0; 16]] {
            draft.ask.claim = Some(Claim::Join(keyward::proto::JoinClaim { token_id: id }));
            refused(attest(wire, join, &draft), "TOKEN_UNKNOWN");
        }
        draft.ask.claim = Some(Claim::Join(keyward::proto::JoinClaim { token_id: vec![7; 15] }));
        refused(attest(wire, join, &draft), "MALFORMED_REQUEST");
    });
}

#[test]
fn a_proof_by_another_seed_is_refused_and_does_not_spend_the_token() {
    with_token(|wire, join| {
        let answer = wire.attest(None, |challenge| Draft::join(join).joined(challenge, &[9; 32]));
        refused(answer, "PROOF_INVALID");
    });
}

#[test]
fn a_proof_over_anything_but_this_request_this_stream_this_key_and_this_domain_is_refused() {
    with_token(|wire, join| {
        let mut elsewhere = Draft::join(join);
        elsewhere.domain = "other.example".to_owned();
        refused(attest(wire, join, &elsewhere), "PROOF_INVALID");
        let other_key = wire.attest(None, |challenge| {
            let mut draft = Draft::join(join);
            draft.key = rcgen::KeyPair::generate().unwrap();
            draft.joined(challenge, &join.token_seed)
        });
        refused(other_key, "PROOF_INVALID");
        let other_request = wire.attest(None, |challenge| {
            let mut draft = Draft::join(join);
            let proof = draft.joined(challenge, &join.token_seed).proof;
            draft.ask.ttl_seconds = 60;
            keyward::proto::AttestRequest { ask: draft.ask.encode_to_vec(), proof }
        });
        refused(other_request, "PROOF_INVALID");
    });
}

#[test]
fn an_answer_to_the_challenge_of_another_stream_is_refused() {
    let house = House::serving();
    let wire = house.wire();
    let join = wire.enrol("builder/1");
    let mut first = wire.open(None).unwrap();
    let overheard = Draft::join(&join).joined(&first.challenge, &join.token_seed);
    let mut second = wire.open(None).unwrap();
    assert_ne!(first.challenge.nonce, second.challenge.nonce);
    second.send(&wire, overheard.clone());
    refused(second.credential(&wire), "PROOF_INVALID");
    first.send(&wire, overheard.clone());
    first.credential(&wire).expect("on its own stream it is good");
    let mut third = wire.open(None).unwrap();
    third.send(&wire, overheard);
    refused(third.credential(&wire), "PROOF_INVALID");
}

#[test]
fn a_late_answer_to_a_challenge_is_refused() {
    if !slow() {
        eprintln!("SKIP: waits eleven seconds; scripts/test --slow");
        return;
    }
    with_token(|wire, join| {
        let answer =
            wire.attest_after(None, Duration::from_secs(11), |challenge| Draft::join(join).joined(challenge, &join.token_seed));
        refused(answer, "CHALLENGE_EXPIRED");
    });
}

#[test]
fn an_expired_token_is_refused() {
    let mut house = House::new().with_preload().initialised();
    house.serve();
    let agent = house.agent("builder/1");
    agent.enrol(&["--token-ttl", "1m"]).ok();
    house.control().move_clock(120_000);
    house.keyward(&["clock", "accept", "--reason", "a test"]).ok();
    agent.attest(&[]).refused("TOKEN_EXPIRED");
}

#[test]
fn an_agent_can_renew_no_other_than_itself() {
    let house = House::serving();
    let wire = house.wire();
    let (one, _) = attested(&wire, "builder/1");
    let (two, sequence) = attested(&wire, "builder/2");
    let draft = Draft::bound("builder/2", sequence);
    refused(wire.renew(Some(&one), draft.renewal(&two)), "CALLER_NOT_ALLOWED");
    wire.renew(Some(&two), draft.renewal(&two)).unwrap();
}

#[test]
fn a_renewal_without_a_certificate_is_refused() {
    let house = House::serving();
    let wire = house.wire();
    let (holder, sequence) = attested(&wire, "builder/1");
    refused(wire.renew(None, Draft::bound("builder/1", sequence).renewal(&holder)), "UNAUTHENTICATED");
}

#[test]
fn a_certificate_of_another_trust_domain_opens_nothing() {
    let (house, other) = (House::serving(), House::serving());
    let (foreign, sequence) = attested(&other.wire(), "builder/1");
    attested(&house.wire(), "builder/1");
    let refusal = house
        .wire()
        .renew(Some(&foreign), Draft::bound("builder/1", sequence).renewal(&foreign))
        .expect_err("a foreign certificate");
    // Refused in the handshake, by the issuing certificate that is the anchor.
    assert!(refusal.reason.is_empty() || refusal.reason == "UNAUTHENTICATED", "{refusal:?}");
}

#[test]
fn an_agents_certificate_does_not_make_a_server() {
    let house = House::serving();
    let impostor = Identity::of(&house.attested("builder/1"));
    let victim = house.agent("builder/2");
    victim.enrol(&[]).ok();
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let mut join: serde_json::Value = serde_json::from_slice(&fs::read(victim.join_file()).unwrap()).unwrap();
    join["addresses"] = serde_json::json!([listener.local_addr().unwrap().to_string()]);
    write_private(&victim.join_file(), &join.to_string());
    let server = thread::spawn(move || pose_as_server(&listener, &impostor));
    victim.attest(&[]).exits(6);
    assert!(!server.join().unwrap(), "the client spoke to an impostor");
}

/// Takes one connection with an agent's certificate; whether the client sent anything after its handshake.
fn pose_as_server(listener: &TcpListener, identity: &Identity) -> bool {
    let chain = identity.chain.iter().map(|der| CertificateDer::from(der.clone())).collect();
    let mut config = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(chain, PrivateKeyDer::Pkcs8(identity.key.clone().into()))
        .unwrap();
    config.alpn_protocols = vec![b"h2".to_vec()];
    let mut connection = rustls::ServerConnection::new(Arc::new(config)).unwrap();
    let (mut tcp, _) = listener.accept().unwrap();
    tcp.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    if connection.complete_io(&mut tcp).is_err() {
        return false;
    }
    let mut heard = [0; 1];
    std::io::Read::read(&mut rustls::Stream::new(&mut connection, &mut tcp), &mut heard).is_ok_and(|count| count > 0)
}

// The machine

#[test]
fn while_the_clock_is_not_trusted_nothing_is_issued_and_quarantine_works() {
    let mut house = House::new().with_preload().initialised();
    house.serve();
    {
        let (one, two) = (house.attested("builder/1"), house.attested("builder/2"));
        // More than the five seconds that are trusted, less than would make the agents' certificates expired or not yet valid.
        for (offset, victim) in [(20_000, "builder/3"), (-20_000, "builder/4")] {
            house.attested(victim);
            house.control().move_clock(offset);
            one.renew().unavailable("CLOCK_UNTRUSTED");
            house.quarantine(victim).ok();
            house.keyward(&["hsm", "status"]).ok();
            house.control().clear();
            one.renew().ok();
            house.agent(victim).renew().refused("AGENT_QUARANTINED");
        }
        two.renew().ok();
    }
    house.stop_and_verify();
}

#[test]
fn a_start_before_the_last_entry_is_not_trusted_until_an_operator_accepts_it() {
    let mut house = House::new().with_preload().initialised();
    house.serve();
    house.attested("builder/1");
    assert_eq!(house.stop(), 0);
    house.control().move_clock(-600_000);
    house.start();
    // Its own certificate cannot be issued either: agents find the port closed, operators are heard.
    assert!(!house.daemon().was_ready());
    house.agent("builder/1").renew().exits(5);
    house.keyward(&["clock", "accept", "--reason", "the battery was empty"]).ok();
    assert!(house.daemon().is_ready());
    assert!(house.entries().iter().any(|body| matches!(body, Body::ClockAccepted(_))));
    let times: Vec<u64> = house.wire().entries().iter().map(|entry| entry.time_unix_micros).collect();
    assert!(times.is_sorted(), "the book's time does not go back");
}

#[test]
fn on_a_full_disk_nothing_is_issued_and_a_quarantine_is_still_recorded() {
    let mut house = House::new().configured("limits", "live_certificates_per_agent = 64").with_preload().initialised();
    house.serve();
    {
        let (one, two) = (house.attested("builder/1"), house.attested("builder/2"));
        house.control().fill_disk();
        // What was allocated before may take a few entries more.
        let refused = (0..60).map(|_| one.renew()).find(|output| output.code != 0).expect("the disk is full");
        refused.unavailable("LEDGER_UNAVAILABLE");
        two.quarantine().ok();
        two.renew().refused("AGENT_QUARANTINED");
    }
    assert_eq!(house.stop(), 0);
    assert!(!house.log().contains("there is room on the disk again"), "there was none");
    house.control().clear();
    house.serve();
    house.agent("builder/1").renew().ok();
    house.agent("builder/2").renew().refused("AGENT_QUARANTINED");
    house.stop_and_verify();
}

#[test]
fn after_a_failed_fsync_the_daemon_issues_nothing_more_ends_and_has_lost_nothing() {
    let mut house = House::new().with_preload().initialised();
    house.serve();
    let wire = house.wire();
    let (holder, sequence) = attested(&wire, "builder/1");
    house.attested("builder/2");
    house.control().fail_next_sync();
    let draft = Draft::bound("builder/1", sequence);
    refused(wire.renew(Some(&holder), draft.renewal(&holder)), "LEDGER_UNAVAILABLE");
    // Denials go on in memory, and outlive the process.
    let enforced = house.keyward_async(&["quarantine", "apply", "builder/2", "--reason", "a test", "--yes"]);
    assert_eq!(house.ended(), Some(74));
    house.control().clear();
    // What the command repeats meanwhile reaches the next daemon.
    house.power_cut_keeping_runtime();
    house.serve();
    drop(enforced);
    house.agent("builder/2").renew().refused("AGENT_QUARANTINED");
    house.wire().renew(Some(&holder), draft.renewal(&holder)).unwrap();
    house.stop_and_verify();
}

#[test]
fn two_daemons_do_not_share_a_state_directory() {
    let house = House::serving();
    let second = house.keyward(&["serve"]);
    assert_ne!(second.code, 0);
    assert!(second.stderr.contains("another keyward"), "{second:?}");
    house.attested("builder/1");
}

#[test]
fn a_database_of_a_newer_version_is_refused_and_left_alone() {
    let mut house = House::serving();
    assert_eq!(house.stop(), 0);
    let file = house.state().join("keyward.db");
    let db = rusqlite::Connection::open(&file).unwrap();
    db.pragma_update(None, "user_version", 999).unwrap();
    drop(db);
    let before = fs::read(&file).unwrap();
    let output = house.keyward(&["serve"]);
    assert_ne!(output.code, 0);
    assert!(output.stderr.contains("newer"), "{output:?}");
    assert_eq!(fs::read(&file).unwrap(), before);
}

#[test]
fn unknown_configuration_keys_are_refused_all_at_once_with_their_lines() {
    let house = House::new().configured("limits", "ttl_secnds_default = 5").configured("log", "colour = true");
    for verb in [&["config", "validate"][..], &["serve"], &["init"]] {
        let output = house.keyward(verb);
        assert_ne!(output.code, 0);
        let told = format!("{}{}", output.stdout, output.stderr);
        assert!(told.contains("ttl_secnds_default") && told.contains("colour") && told.contains("line "), "{told}");
    }
}

#[test]
fn a_daemon_that_was_not_initialised_says_so() {
    let house = House::new();
    let output = house.keyward(&["serve"]);
    assert_ne!(output.code, 0);
    assert!(output.stderr.contains("keyward init"), "{output:?}");
}

/// 65534 is what a user namespace shows for everybody it does not know.
#[test]
fn the_overflow_uid_is_refused_on_the_operator_socket() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("SKIP: only root can take another uid");
        return;
    }
    let house = House::serving();
    let agent = house.attested("builder/1");
    // As careless as an administrator can be: the file modes must not be what saves us.
    for path in [house.path(""), house.runtime(), house.runtime().join("operator.sock")] {
        fs::set_permissions(path, fs::Permissions::from_mode(0o777)).unwrap();
    }
    let binary = house.path("keyward");
    fs::copy(env!("CARGO_BIN_EXE_keyward"), &binary).unwrap();
    for (uid, code) in [(65_534, 3), (4_242, 3), (0, 0)] {
        let mut command = std::process::Command::new(&binary);
        command.args(["--socket", house.runtime().join("operator.sock").to_str().unwrap(), "agents", "list"]).uid(uid).gid(uid);
        let output = run(&mut command).exits(code);
        assert!(code == 0 || output.stderr.contains("CALLER_NOT_ALLOWED"), "{output:?}");
    }
    agent.renew().ok();
}

#[test]
fn noise_on_the_port_does_not_disturb_the_agents() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    let silent: Vec<_> = (0..32).map(|_| std::net::TcpStream::connect(house.address()).unwrap()).collect();
    for noise in [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0; 4096], b"\x16\x03\x01\xff\xff", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"] {
        let mut tcp = std::net::TcpStream::connect(house.address()).unwrap();
        let _ = tcp.write_all(noise);
    }
    agent.renew().ok();
    drop(silent);
}

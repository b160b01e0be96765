//! The bundle: what peers trust, shown to operators and told to agents.

use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;
use std::thread;
use std::time::{Duration, Instant};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::Value;
use tonic::Code;

use crate::house::wire::{Identity, refused};
use crate::house::{Agent, Body, DEADLINE, DOMAIN, House, certificates, run};

fn shown(house: &House, form: &str) -> String {
    house.keyward(&["bundle", "show", form]).ok().stdout
}

#[test]
fn an_operator_is_shown_the_authorities_that_every_chain_ends_at() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    let told = house.keyward(&["bundle", "show", "--format", "json"]).ok().json();
    assert_eq!((&told["trust_domain"], &told["sequence"]), (&DOMAIN.into(), &1.into()));
    let [root] = certificates(&agent.bundle()).try_into().unwrap();
    let (_, parsed) = x509_parser::parse_x509_certificate(&root).unwrap();
    assert_eq!(told["authorities"].as_array().unwrap().len(), 1);
    assert_eq!(told["authorities"][0]["subject"], parsed.subject().to_string());
    let text = house.keyward(&["bundle", "show"]).ok().stdout;
    assert!(text.contains(DOMAIN) && text.contains(told["authorities"][0]["certificate_sha256"].as_str().unwrap()), "{text}");
    // And as a verifier takes them.
    let pem = house.path("authorities.pem");
    std::fs::write(&pem, shown(&house, "--pem")).unwrap();
    let chain = agent.svid();
    let verify = ["verify", "-x509_strict", "-CAfile", path(&pem), "-untrusted", path(&chain), path(&chain)];
    run(Command::new("openssl").args(verify)).ok();
}

/// SPIFFE Trust Domain and Bundle §4, X509-SVID §6: every MUST, and what is not defined there is not there.
#[test]
fn the_spiffe_bundle_keeps_every_must_of_its_standard() {
    let house = House::serving();
    let set: Value = serde_json::from_str(&shown(&house, "--jwks")).unwrap();
    assert_eq!(names(&set), ["keys", "spiffe_refresh_hint", "spiffe_sequence"]);
    assert!(set["spiffe_sequence"].as_u64().is_some_and(|sequence| sequence >= 1));
    assert!(set["spiffe_refresh_hint"].as_u64().is_some_and(|seconds| seconds >= 1));
    let keys = set["keys"].as_array().unwrap();
    let (of_tokens, of_peers): (Vec<_>, Vec<_>) = keys.iter().partition(|key| key["use"] == "jwt-svid");
    // A kid, and no certificate.
    let [of_tokens] = of_tokens[..] else { panic!("the one that `init` made: {set}") };
    assert_eq!(names(of_tokens), ["crv", "kid", "kty", "use", "x", "y"]);
    assert_eq!((&of_tokens["kty"], &of_tokens["crv"]), (&"EC".into(), &"P-256".into()));
    let told = house.keyward(&["bundle", "show", "--format", "json"]).ok().json();
    assert_eq!(told["token_signing_kids"], serde_json::json!([of_tokens["kid"]]));
    assert!(!of_peers.is_empty());
    for key in of_peers {
        // No kid, and of x5c exactly one certificate.
        assert_eq!(names(key), ["crv", "kty", "use", "x", "x5c", "y"]);
        assert_eq!((&key["kty"], &key["use"], &key["crv"]), (&"EC".into(), &"x509-svid".into(), &"P-256".into()));
        let [authority] = key["x5c"].as_array().unwrap().as_slice() else { panic!("one certificate: {key}") };
        let der = STANDARD.decode(authority.as_str().unwrap()).unwrap();
        let (_, certificate) = x509_parser::parse_x509_certificate(&der).unwrap();
        assert!(certificate.is_ca());
    }
}

#[test]
fn openssl_finds_the_key_of_the_spiffe_bundle_in_its_certificate() {
    let house = House::serving();
    let set: Value = serde_json::from_str(&shown(&house, "--jwks")).unwrap();
    let key = &set["keys"][0];
    let pem = house.path("authority.pem");
    let text = format!("-----BEGIN CERTIFICATE-----\n{}\n-----END CERTIFICATE-----\n", wrapped(key["x5c"][0].as_str().unwrap()));
    std::fs::write(&pem, text).unwrap();
    let certified = run(Command::new("openssl").args(["x509", "-in", path(&pem), "-noout", "-pubkey"])).ok().stdout;
    // The point as openssl writes it, without the colons.
    let public = house.path("authority.pub");
    std::fs::write(&public, certified).unwrap();
    let told = run(Command::new("openssl").args(["pkey", "-pubin", "-in", path(&public), "-noout", "-text"])).ok().stdout;
    let printed: String = told.chars().filter(|c| !c.is_whitespace() && *c != ':').collect();
    let coordinate = |name: &str| URL_SAFE_NO_PAD.decode(key[name].as_str().unwrap()).unwrap();
    let point: String = [vec![4], coordinate("x"), coordinate("y")].concat().iter().map(|byte| format!("{byte:02x}")).collect();
    assert!(printed.contains(&point), "{point} is not in\n{told}");
}

#[test]
fn whoever_follows_the_bundle_is_told_at_once_what_a_renewal_would_tell() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    let wire = house.wire();
    let bundle = wire.watch_bundle(Some(&Identity::of(&agent))).unwrap().next().unwrap();
    assert_eq!(bundle.authorities, certificates(&agent.bundle()));
    assert!(bundle.sequence >= 1 && bundle.refresh_hint_seconds >= 1, "{bundle:?}");
}

#[test]
fn a_stranger_and_an_operator_follow_nothing() {
    let house = House::serving();
    let wire = house.wire();
    refused(wire.watch_bundle(None), "UNAUTHENTICATED");
    assert_eq!(wire.watch_bundle_as_operator().unwrap_err().code, Code::Unimplemented);
}

#[test]
fn one_agent_follows_four_times_and_no_more_until_it_ends_one() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    let (wire, identity) = (house.wire(), Identity::of(&agent));
    let mut streams: Vec<_> = (0..4).map(|_| wire.watch_bundle(Some(&identity)).unwrap()).collect();
    for stream in &mut streams {
        stream.next().unwrap();
    }
    let refusal = refused(wire.watch_bundle(Some(&identity)), "WATCHES_TAKEN");
    assert!(refusal.retry_after.is_some());
    let other = house.attested("builder/2");
    wire.watch_bundle(Some(&Identity::of(&other))).unwrap().next().unwrap();
    streams.pop();
    let until = Instant::now() + DEADLINE;
    // Its end reaches the daemon with the next packets.
    while let Err(refusal) = wire.watch_bundle(Some(&identity)).and_then(|mut stream| stream.next()) {
        assert!(refusal.reason == "WATCHES_TAKEN" && Instant::now() < until, "{refusal:?}");
    }
}

#[test]
fn who_follows_leaves_half_of_the_connections_to_renewals() {
    let house = House::new().configured("limits", "connections = 8").initialised().served();
    let [first, second, third] = ["builder/1", "builder/2", "builder/3"].map(|name| house.attested(name));
    let wire = house.wire();
    let following = [&first, &second, &first, &second].map(|agent| wire.watch_bundle(Some(&Identity::of(agent))).unwrap());
    let refusal = refused(wire.watch_bundle(Some(&Identity::of(&third))), "OVERLOADED");
    assert!(refusal.retry_after.is_some());
    third.renew().ok();
    drop(following);
}

#[test]
fn a_quarantine_ends_the_stream_and_refuses_the_next_with_an_entry() {
    let house = House::serving();
    let (agent, other) = (house.attested("builder/1"), house.attested("builder/2"));
    let (wire, identity) = (house.wire(), Identity::of(&agent));
    let mut stream = wire.watch_bundle(Some(&identity)).unwrap();
    let mut untouched = wire.watch_bundle(Some(&Identity::of(&other))).unwrap();
    stream.next().unwrap();
    untouched.next().unwrap();
    agent.quarantine().ok();
    let asked = Instant::now();
    let ended = refused(stream.next(), "AGENT_QUARANTINED");
    assert!(asked.elapsed() < Duration::from_secs(1), "{:?}", asked.elapsed());
    assert_eq!(ended.code, Code::PermissionDenied);
    refused(wire.watch_bundle(Some(&identity)), "AGENT_QUARANTINED");
    let recorded = |body: &Body| matches!(body, Body::Refused(refused) if refused.method == "WatchBundle");
    assert_eq!(house.entries().iter().filter(|body| recorded(body)).count(), 1);
}

#[test]
fn the_stream_ends_with_the_certificate_it_was_opened_with() {
    let house = House::serving();
    let agent = house.agent("builder/1");
    agent.enrol(&["--ttl", "10s"]).ok();
    agent.attest(&[]).ok();
    let identity = Identity::of(&agent);
    let wire = house.wire();
    let mut stream = wire.watch_bundle(Some(&identity)).unwrap();
    stream.next().unwrap();
    // A newer certificate does not prolong the connection of the old one.
    agent.renew().ok();
    let ended = stream.next().unwrap_err();
    let (_, leaf) = x509_parser::parse_x509_certificate(&identity.chain[0]).unwrap();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    assert!(now >= u64::try_from(leaf.validity().not_after.timestamp()).unwrap(), "{ended:?}");
}

#[test]
fn a_stop_does_not_wait_for_who_follows() {
    let mut house = House::serving();
    let identity = Identity::of(&house.attested("builder/1"));
    let wire = house.wire();
    let (ready, follows) = channel();
    thread::scope(|scope| {
        let follower = scope.spawn(move || {
            let mut stream = wire.watch_bundle(Some(&identity)).unwrap();
            stream.next().unwrap();
            ready.send(()).unwrap();
            refused(stream.next(), "DRAINING")
        });
        follows.recv_timeout(DEADLINE).unwrap();
        let asked = Instant::now();
        assert_eq!(house.stop(), 0);
        assert!(asked.elapsed() < Duration::from_secs(8), "{:?}", asked.elapsed());
        assert!(follower.join().unwrap().retry_after.is_some());
    });
}

/// Its certificate is good for ten minutes, so no renewal is what tells it.
#[test]
fn a_command_beside_its_credentials_ends_the_moment_its_agent_is_quarantined() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    let mut child = beside(&house, &agent).stdout(Stdio::piped()).stderr(Stdio::null()).spawn().unwrap();
    let mut line = String::new();
    BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
    assert_eq!(line, "up\n");
    agent.quarantine().ok();
    let (tell, ended) = channel();
    thread::spawn(move || tell.send(child.wait().unwrap()));
    assert_eq!(ended.recv_timeout(DEADLINE).expect("it ended").code(), Some(3));
    // A supervisor calls for it again: fresh as the credentials look, nothing starts with them.
    let again = run(&mut beside(&house, &agent)).exits(3);
    let again = again.says("AGENT_QUARANTINED").says("was not started");
    assert_eq!(again.stdout, "");
}

/// It waits a second for a daemon that says nothing, and for one that does no longer than that takes.
#[test]
fn a_command_starts_once_the_daemon_has_spoken() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    let starts = || {
        let mut command = house.command();
        command.args(["agent", "run", "--out"]).arg(agent.dir()).args(["--", "true"]);
        let from = Instant::now();
        run(&mut command).ok();
        from.elapsed()
    };
    // On a busy machine one of them may take long.
    assert!((0..20).any(|_| starts() < Duration::from_secs(1)));
}

#[test]
fn a_command_starts_with_good_credentials_while_the_daemon_is_away() {
    let mut house = House::serving();
    house.attested("builder/1");
    assert_eq!(house.stop(), 0);
    let agent = house.agent("builder/1");
    let mut command = house.command();
    command.args(["agent", "run", "--out"]).arg(agent.dir()).args(["--", "sh", "-c", "echo up; exit 7"]);
    assert_eq!(run(&mut command).exits(7).stdout, "up\n");
}

fn beside(house: &House, agent: &Agent<'_>) -> Command {
    let mut command = house.command();
    command.args(["agent", "run", "--out"]).arg(agent.dir()).args(["--", "sh", "-c", "echo up; exec sleep 600"]);
    command
}

/// The parameters of a JSON object, sorted.
fn names(object: &Value) -> Vec<&str> {
    let mut names: Vec<_> = object.as_object().unwrap().keys().map(String::as_str).collect();
    names.sort_unstable();
    names
}

/// As PEM wants its lines.
fn wrapped(base64: &str) -> String {
    base64.as_bytes().chunks(64).map(|line| std::str::from_utf8(line).unwrap()).collect::<Vec<_>>().join("\n")
}

fn path(path: &Path) -> &str {
    path.to_str().unwrap()
}

#[test]
fn a_new_root_is_told_within_a_second_and_before_it_signs() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    let wire = house.wire();
    let mut following = wire.watch_bundle(Some(&Identity::of(&agent))).unwrap();
    let before = following.next().unwrap();
    let from = Instant::now();
    house.keyward(&["ca", "rotate", "root", "--now", "--yes"]).ok();
    let after = following.next().unwrap();
    // The command waits for the new root's own certificate: to make a key and sign twice.
    assert!(from.elapsed() < Duration::from_secs(2), "{:?}", from.elapsed());
    assert!(after.sequence > before.sequence);
    assert_eq!(after.authorities.len(), 2);
    assert!(after.authorities.contains(&before.authorities[0]), "the old root stays");
    // Nobody is certified under the new one yet.
    agent.renew().ok();
    assert_eq!(certificates(&agent.bundle()).len(), 2);
    let pem = house.path("old.pem");
    std::fs::write(&pem, keyward::client::store::certificates_pem(&before.authorities)).unwrap();
    let chain = agent.svid();
    let verify = ["verify", "-x509_strict", "-CAfile", path(&pem), "-untrusted", path(&chain), path(&chain)];
    run(Command::new("openssl").args(verify)).ok();
}

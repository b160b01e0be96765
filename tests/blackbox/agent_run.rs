//! `keyward agent run`: a command beside its credentials, while authorities are replaced under it.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use rustls::RootCertStore;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;

use crate::crash::Holder;
use crate::house::{Agent, DEADLINE, House, certificates, run};
use crate::rotate::{become_states, later, nothing_is_left_over, rotate, states};

/// Writes a line when it starts, and for each signal one with the number of authorities that it finds.
const RECORDS: &str = r#"
    trap '' HUP
    trap 'echo "bundle $(grep -c BEGIN "$KEYWARD_BUNDLE")" >> "$1"' USR1
    trap 'echo renewed >> "$1"' USR2
    trap 'exit 9' TERM
    echo started >> "$1"
    while :; do sleep 0.05; done"#;

/// `keyward agent run`, by the clock of the house.
struct Runner {
    process: Child,
    agent: PathBuf,
    /// What the command recorded, and what was said beside it.
    log: PathBuf,
    said: PathBuf,
}

impl Runner {
    /// Waits until the command has started.
    fn start(house: &House, agent: &Agent<'_>, name: &str, actions: &[&str], script: &str) -> Self {
        let (log, said) = (house.path(&format!("{name}.log")), house.path(&format!("{name}.said")));
        let mut command = house.command_preloaded();
        command.args(["agent", "run", "--out"]).arg(agent.dir()).args(actions);
        command.args(["--", "sh", "-c", script, "sh"]).arg(&log);
        let process = command.stdout(Stdio::null()).stderr(File::create(&said).unwrap()).spawn().unwrap();
        let runner = Self { process, agent: agent.dir(), log, said };
        runner.becomes("started", || runner.recorded("started") == 1);
        runner
    }

    fn lines(&self) -> Vec<String> {
        fs::read_to_string(&self.log).unwrap_or_default().lines().map(str::to_owned).collect()
    }

    fn recorded(&self, what: &str) -> usize {
        self.lines().iter().filter(|line| line.starts_with(what)).count()
    }

    fn said(&self) -> String {
        fs::read_to_string(&self.said).unwrap()
    }

    /// How often it was said that the bundle has changed.
    fn bundles(&self) -> usize {
        self.said().matches("the bundle has changed").count()
    }

    fn authorities(&self) -> Vec<Vec<u8>> {
        certificates(&self.agent.join("bundle.pem"))
    }

    fn chain(&self) -> Vec<Vec<u8>> {
        certificates(&self.agent.join("svid.pem"))
    }

    #[track_caller]
    fn becomes(&self, what: &str, mut is_so: impl FnMut() -> bool) {
        let until = Instant::now() + DEADLINE;
        while !is_so() {
            assert!(Instant::now() < until, "not {what}: {:?}\n{}", self.lines(), self.said());
            thread::sleep(Duration::from_millis(20));
        }
    }

    fn send(&self, signal: Signal) {
        kill_process(Pid::from_child(&self.process), signal).unwrap();
    }

    /// Hours have passed: it looks at the clock when it has passed a signal on, and renews where that is due.
    #[track_caller]
    fn renews(&self) {
        let before = self.chain();
        self.send(Signal::HUP);
        self.becomes("renewed", || self.chain() != before);
    }

    /// Ended by SIGTERM: the command's own code.
    fn stop(mut self) -> Option<i32> {
        self.send(Signal::TERM);
        self.process.wait().unwrap().code()
    }
}

impl Drop for Runner {
    fn drop(&mut self) {
        // Dead as it may be: the command dies with it in any case.
        let _ = self.process.kill();
        let _ = self.process.wait();
        if thread::panicking() {
            eprintln!("--- {} ---\n{}", self.said.display(), self.said());
        }
    }
}

/// Whether somebody who trusts `authorities` alone takes this chain, at the moment it was issued: which one it was is what is asked here.
fn takes(authorities: &[Vec<u8>], chain: &[Vec<u8>]) -> bool {
    let mut roots = RootCertStore::empty();
    for der in authorities {
        roots.add(CertificateDer::from(der.as_slice())).unwrap();
    }
    let provider = Arc::new(aws_lc_rs::default_provider());
    let verifier = WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build().unwrap();
    let chain: Vec<_> = chain.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
    let (leaf, issuing) = chain.split_first().unwrap();
    let (_, parsed) = x509_parser::parse_x509_certificate(leaf).unwrap();
    let issued = u64::try_from(parsed.validity().not_before.timestamp()).unwrap() + 31;
    verifier.verify_client_cert(leaf, issuing, UnixTime::since_unix_epoch(Duration::from_secs(issued))).is_ok()
}

/// The same by openssl, of the chain as it is now: the next may come at any time.
fn openssl_takes(bundle: &Path, chain: &Path) {
    let copy = tempfile::NamedTempFile::new().unwrap();
    fs::copy(chain, copy.path()).unwrap();
    let chain = copy.path();
    let leaf = certificates(chain).remove(0);
    let (_, parsed) = x509_parser::parse_x509_certificate(&leaf).unwrap();
    let issued = (parsed.validity().not_before.timestamp() + 31).to_string();
    let verify = ["verify", "-x509_strict", "-attime", &issued, "-CAfile"];
    run(Command::new("openssl").args(verify).arg(bundle).arg("-untrusted").arg(chain).arg(chain)).ok();
}

/// Reads the files as a program does that knows nothing of their story: one after the other, in any order, all the time.
fn reads_on(runners: &[&Runner], done: &AtomicBool, times: &AtomicUsize) {
    while !done.load(Ordering::Relaxed) {
        for reader in runners {
            let before = reader.authorities();
            for peer in runners {
                let chain = peer.chain();
                assert!(takes(&before, &chain), "a peer is rejected by a bundle that was read first");
                assert!(takes(&reader.authorities(), &chain), "a peer is rejected by a bundle that was read after");
            }
            // And as one that opens the directory once.
            let held = fs::canonicalize(reader.agent.join("current")).unwrap();
            assert!(takes(&certificates(&held.join("bundle.pem")), &certificates(&held.join("svid.pem"))));
            times.fetch_add(1, Ordering::Relaxed);
        }
    }
}

/// Hours of a root's turn: it is in everybody's bundle before it signs anything, each command is told of it as it was asked for, and whoever
/// goes by the files of one agent takes every other, all the time.
#[test]
fn a_new_root_is_in_the_files_of_agents_before_it_signs_and_nobody_is_rejected_until_the_old_one_is_gone() {
    let mut house = House::new().configured("rotation", "destroy_days = 0").with_preload().initialised();
    house.serve();
    let enrolled = ["builder/1", "builder/2", "builder/3"].map(|name| {
        house.agent(name).enrol(&["--ttl", "1h"]).ok();
        house.agent(name).attest(&[]).ok();
        name
    });
    let start = |at: usize, actions: &[&str]| {
        Runner::start(&house, &house.agent(enrolled[at]), &format!("runner-{at}"), actions, RECORDS)
    };
    let told = start(0, &["--on-bundle", "signal:USR1", "--on-renew", "signal:USR2"]);
    let restarted = start(1, &["--on-bundle", "restart"]);
    let left_alone = start(2, &["--on-bundle", "none", "--on-renew", "signal:USR2"]);
    let all = [&told, &restarted, &left_alone];
    let old = told.authorities();
    let (done, times) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        let (done, times) = (&done, &times);
        let reader = scope.spawn(move || reads_on(&all, done, times));
        {
            let _end = End(done);
            a_root_turns(&mut house, all, &old);
        }
        reader.join().expect("nobody is rejected");
    });
    assert!(times.load(Ordering::Relaxed) > 50, "{times:?}");
    for runner in all {
        openssl_takes(&told.agent.join("bundle.pem"), &runner.agent.join("svid.pem"));
    }
    // Each was told as often as there was something to tell, and of nothing else.
    told.becomes("told", || told.recorded("bundle") == told.bundles());
    assert_eq!(told.lines().iter().rfind(|line| line.starts_with("bundle")).unwrap(), "bundle 1");
    assert!(told.recorded("started") == 1 && told.recorded("renewed") > 0, "{:?}", told.lines());
    restarted.becomes("restarted", || restarted.recorded("started") == restarted.bundles() + 1);
    assert!(restarted.recorded("bundle") + restarted.recorded("renewed") == 0, "{:?}", restarted.lines());
    assert!(left_alone.bundles() > 0 && left_alone.recorded("started") == 1 && left_alone.recorded("bundle") == 0);
    assert_eq!(left_alone.recorded("renewed"), left_alone.said().matches("keyward: renewed").count());
    for runner in [told, restarted, left_alone] {
        assert_eq!(runner.stop(), Some(9));
    }
    nothing_is_left_over(&house);
    house.stop_and_verify();
}

/// Whatever becomes of the test, the readers end.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn a_root_turns(house: &mut House, all: [&Runner; 3], old: &[Vec<u8>]) {
    let [told, ..] = all;
    rotate(house, "root").ok();
    for runner in all {
        runner.becomes("told of the new root", || runner.authorities().len() == 2);
    }
    told.becomes("signalled", || told.lines().contains(&"bundle 2".to_owned()));
    // Nothing hangs from it yet.
    assert_eq!(states(house, "root"), ["prepublished", "active"]);
    assert!(takes(old, &Holder::attest(house, "late/1").identity.chain));
    // Streams end, and begin again.
    house.restart();
    // Who takes the bundle with a renewal alone has it as well by the time that the longest certificate of before has ended.
    later(house, 2_400);
    assert_eq!(states(house, "root"), ["prepublished", "active"]);
    for runner in all {
        runner.renews();
        assert!(takes(old, &runner.chain()));
    }
    later(house, 3_601);
    become_states(house, "root", &["active", "retiring"]);
    become_states(house, "issuing", &["active", "retiring"]);
    let new = Holder::attest(house, "late/2").identity.chain;
    assert!(!takes(old, &new));
    for runner in all {
        assert!(takes(&runner.authorities(), &new));
    }
    // Past half-life each gets a certificate of the new one.
    later(house, 2 * 2_400);
    for runner in all {
        runner.renews();
        assert!(!takes(old, &runner.chain()));
    }
    house.kill9();
    house.serve();
    later(house, 2 * 3_600 + 120);
    become_states(house, "issuing", &["active"]);
    become_states(house, "root", &["active"]);
    for runner in all {
        runner.becomes("told that the old root is gone", || runner.authorities().len() == 1);
        assert!(runner.authorities() != old);
    }
}

/// An agent whose certificate is good for hours would not renew by itself before its authority is gone.
#[test]
fn a_certificate_of_a_tainted_authority_is_replaced_by_itself_and_the_bundle_is_followed_on() {
    let mut house = House::new().configured("rotation", "destroy_days = 0").with_preload().initialised();
    house.serve();
    let agent = house.agent("builder/1");
    agent.enrol(&["--ttl", "2h"]).ok();
    agent.attest(&[]).ok();
    let actions = ["--on-bundle", "signal:USR1", "--on-renew", "signal:USR2"];
    let runner = Runner::start(&house, &agent, "runner", &actions, RECORDS);
    let old = runner.authorities();
    let tainted = crate::rotate::generations(&house, "issuing")[0].0.clone();
    house.keyward(&["ca", "taint", &tainted, "--reason", "a test", "--yes"]).ok();
    runner.becomes("told", || runner.recorded("bundle") == 1);
    runner.becomes("told of the taint", || runner.said().contains("another certificate before"));
    // Half of the time that is left: both authorities are in the bundle still.
    later(&house, 451);
    runner.renews();
    runner.becomes("signalled", || runner.recorded("renewed") == 1);
    assert_eq!(states(&house, "issuing"), ["active", "retiring"]);
    assert!(runner.authorities().len() == 2 && !takes(&old, &runner.chain()));
    later(&house, 901);
    become_states(&house, "root", &["active"]);
    runner.becomes("told", || runner.authorities().len() == 1);
    assert!(runner.authorities() != old && takes(&runner.authorities(), &runner.chain()));
    runner.becomes("signalled", || runner.recorded("bundle") == 2);
    // With that it is followed again, and at once.
    rotate(&house, "root").ok();
    runner.becomes("told", || runner.authorities().len() == 2);
    runner.becomes("signalled", || runner.lines().last().is_some_and(|line| line == "bundle 2"));
    assert_eq!(runner.recorded("renewed"), 1, "{:?}", runner.lines());
    let said = runner.said();
    assert!(!said.contains("another certificate soon") && !said.contains("does not take"), "never rejected: {said}");
    assert_eq!(said.matches("another certificate before").count(), 1, "{said}");
    assert_eq!(runner.stop(), Some(9));
    house.stop_and_verify();
}

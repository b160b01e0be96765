//! The HSM room against private tokens of the module under test. Each test runs in a process of its own, because a module takes its
//! configuration from the environment: the test executes this binary again with that set.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test says what went wrong by panicking")]

#[path = "blackbox/house/token.rs"]
#[expect(dead_code, reason = "some is for the other tests")]
mod token;

#[path = "blackbox/house/shim.rs"]
mod shim;

#[path = "hsm_room/agent_keys.rs"]
mod agent_keys;

#[path = "hsm_room/faults.rs"]
mod faults;

#[path = "hsm_room/hostile.rs"]
mod hostile;

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use keyward::config::{PinSource, Token};
use keyward::hsm::{Error, Hsm, Modules, Settings, SignError, SigningKey};
use keyward::model::{Algorithm, KeyId, Meter, hex, unhex};
use keyward::proto::TokenRole;

const HOUSE: &str = "KEYWARD_TEST_HOUSE";
const ERRAND: &str = "KEYWARD_TEST_DESTROY";
const LOCKER: &str = "KEYWARD_TEST_LOCKER";

/// A directory with tokens `authority` and `agents`, and the process that may use them.
struct House(PathBuf);

impl House {
    fn settings(&self, label: &str) -> Settings {
        let state = self.0.join("state");
        fs::create_dir_all(&state).unwrap();
        Settings {
            token: Token {
                module: token::module(),
                label: label.into(),
                serial: None,
                pin: PinSource::File(self.pin(label)),
                lanes: 2,
            },
            role: if label == "agents" { TokenRole::Agents } else { TokenRole::Authority },
            for_agents: label == "agents",
            state,
            queue: 64,
            sign_deadline: Duration::from_secs(5),
        }
    }

    fn pin(&self, label: &str) -> PathBuf {
        self.0.join(format!("{label}.pin"))
    }

    fn open(&self, modules: &Modules, label: &str) -> Hsm {
        Hsm::open(modules, self.settings(label), Arc::new(Meter::default())).unwrap()
    }
}

/// Runs `body` in a process of its own with fresh tokens. `name` is the test's.
fn in_house(name: &str, body: impl AsyncFnOnce(House)) {
    if let Some(house) = std::env::var_os(HOUSE) {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        runtime.block_on(body(House(house.into())));
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    token::furnish(directory.path());
    for label in ["authority", "agents"] {
        let pin = directory.path().join(format!("{label}.pin"));
        fs::write(&pin, token::PIN).unwrap();
        fs::set_permissions(pin, fs::Permissions::from_mode(0o600)).unwrap();
    }
    let status = itself(name, directory.path()).status().unwrap();
    assert!(status.success(), "{name} failed in its own process: {status}");
}

fn itself(name: &str, house: &Path) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([name, "--exact", "--nocapture", "--test-threads=1"]);
    command.env(HOUSE, house).envs([token::environment(house)]);
    command.env("KEYWARD_SHIM_MODULE", token::module()).env("KEYWARD_SHIM_LOG", house.join("shim.log"));
    command.env("KEYWARD_SHIM_SOCKET", house.join("shim.sock"));
    command
}

/// The fault module, built beside the binary.
fn shim_module() -> PathBuf {
    let built = Path::new(env!("CARGO_BIN_EXE_keyward")).with_file_name("examples").join("libp11shim.so");
    assert!(built.exists(), "{} is missing: cargo build --examples, with the profile of the tests", built.display());
    built
}

/// What the module under test cannot do: Kryoptic wraps only by a mechanism that the wrapper around PKCS#11 has no name for.
fn lacks() -> Vec<String> {
    if std::env::var("HSM_UNDER_TEST").is_ok_and(|under_test| under_test == "kryoptic") {
        vec!["wrapped-keys".into()]
    } else {
        vec![]
    }
}

async fn new_key(hsm: &Hsm, algorithm: Algorithm) -> SigningKey {
    let id = KeyId::random();
    let public = hsm.generate(id, algorithm, "keyward/test").await.unwrap();
    hsm.key(id, public).await.unwrap()
}

async fn until(what: &str, patience: Duration, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !holds() {
        assert!(Instant::now() < deadline, "not within {patience:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn a_generated_key_keeps_promise_one_and_its_signatures_verify() {
    in_house("a_generated_key_keeps_promise_one_and_its_signatures_verify", async |house| {
        let hsm = house.open(&Modules::new(), "authority");
        assert!(hsm.capabilities().ed25519 && hsm.capabilities().session_keys, "{:?}", hsm.capabilities());
        for algorithm in [Algorithm::P256, Algorithm::Ed25519] {
            let key = new_key(&hsm, algorithm).await;
            for size in [0, 1, 1000] {
                let message: Arc<[u8]> = vec![7; size].into();
                let signature = key.sign(message.clone()).await.unwrap();
                assert!(key.public().verifies(&message, &signature));
            }
            let found = hsm.find(key.id()).await.unwrap();
            assert_eq!(found.len(), 2);
            assert_eq!(found.iter().filter(|object| object.private).count(), 1);
            assert!(found.iter().any(|object| object.public.as_ref() == Some(key.public())));
            assert_eq!(hsm.destroy(key.id()).await.unwrap(), 2);
            assert!(hsm.find(key.id()).await.unwrap().is_empty());
            assert_eq!(hsm.destroy(key.id()).await.unwrap(), 0);
        }
        let status = hsm.status();
        assert!(status.usable && status.lanes == 2 && status.off == lacks() && status.signatures >= 6, "{status:?}");
        hsm.shut_down(Duration::from_secs(5));
        let error = hsm.find(KeyId::random()).await.unwrap_err();
        assert!(matches!(error, Error::ShutDown), "{error}");
    });
}

#[test]
fn a_key_is_bound_only_to_its_own_public_key() {
    in_house("a_key_is_bound_only_to_its_own_public_key", async |house| {
        let hsm = house.open(&Modules::new(), "authority");
        let (one, other) = (new_key(&hsm, Algorithm::P256).await, new_key(&hsm, Algorithm::P256).await);
        let error = hsm.key(one.id(), other.public().clone()).await.err().unwrap();
        assert!(matches!(error, Error::KeyMismatch(_)), "{error}");
        let error = hsm.key(KeyId::random(), one.public().clone()).await.err().unwrap();
        assert!(matches!(error, Error::KeyLost(_)), "{error}");
        // The failed binding did not disturb the good one.
        one.sign(b"still"[..].into()).await.unwrap();
        hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn a_token_is_named_by_its_label_alone() {
    in_house("a_token_is_named_by_its_label_alone", async |house| {
        let mut settings = house.settings("authority");
        settings.token.label = "nobody".into();
        let error = Hsm::open(&Modules::new(), settings, Arc::default()).err().unwrap().to_string();
        assert!(
            error.contains("no token is labelled") && error.contains("\"authority\"") && error.contains("\"agents\""),
            "{error}"
        );
        let mut settings = house.settings("authority");
        settings.token.serial = Some("0000".into());
        assert!(matches!(Hsm::open(&Modules::new(), settings, Arc::default()), Err(Error::TokenNotFound { matches: 0, .. })));
    });
}

#[test]
fn a_module_is_never_unloaded() {
    in_house("a_module_is_never_unloaded", async |house| {
        let modules = Modules::new();
        let mut settings = house.settings("authority");
        settings.token.label = "nobody".into();
        assert!(Hsm::open(&modules, settings, Arc::default()).is_err());
        drop(modules);
        // Threads that were inside may be ending there still: libraries leave work for that moment.
        let module = token::module().canonicalize().unwrap();
        let mapped = fs::read_to_string("/proc/self/maps").unwrap();
        assert!(mapped.contains(module.to_str().unwrap()), "{} was unloaded", module.display());
    });
}

#[test]
fn one_wrong_pin_costs_one_try_over_twenty_starts() {
    in_house("one_wrong_pin_costs_one_try_over_twenty_starts", async |house| {
        let good = fs::read(house.pin("authority")).unwrap();
        fs::write(house.pin("authority"), "wrong-pin-0815").unwrap();
        let modules = Modules::new();
        let mut tries = 0;
        for _ in 0..20 {
            let error = Hsm::open(&modules, house.settings("authority"), Arc::default()).err().unwrap();
            assert!(!error.to_string().contains("0815"), "{error}");
            match error {
                Error::PinIncorrect { .. } => tries += 1,
                Error::PinPending { .. } => assert_eq!(tries, 1),
                other => panic!("{other}"),
            }
        }
        assert_eq!(tries, 1);
        fs::write(house.pin("authority"), good).unwrap();
        // The right PIN alone changes nothing: an operator has to say so.
        assert!(matches!(Hsm::open(&modules, house.settings("authority"), Arc::default()), Err(Error::PinPending { .. })));
        let state = house.settings("authority").state;
        assert!(keyward::hsm::unlock(&state, TokenRole::Authority).unwrap());
        let hsm = house.open(&modules, "authority");
        assert!(!hsm.status().pin_pending);
        hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn a_pin_file_that_others_can_read_is_refused_without_a_login() {
    in_house("a_pin_file_that_others_can_read_is_refused_without_a_login", async |house| {
        fs::set_permissions(house.pin("agents"), fs::Permissions::from_mode(0o644)).unwrap();
        let error = Hsm::open(&Modules::new(), house.settings("agents"), Arc::default()).err().unwrap();
        assert!(matches!(error, Error::PinSource { .. }), "{error}");
        assert!(!keyward::hsm::pin_pending(&house.settings("agents").state, TokenRole::Agents));
    });
}

/// Not a test of its own: the process that destroys a key behind another's back.
#[test]
fn another_process() {
    let Some(id) = std::env::var_os(ERRAND) else { return };
    in_house("another_process", async |house| {
        let hsm = house.open(&Modules::new(), "authority");
        let id = KeyId::from_slice(&unhex(id.to_str().unwrap()).unwrap()).unwrap();
        assert_eq!(hsm.destroy(id).await.unwrap(), 2);
        hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn a_key_destroyed_by_another_process_is_lost_and_the_others_go_on() {
    in_house("a_key_destroyed_by_another_process_is_lost_and_the_others_go_on", async |house| {
        let hsm = house.open(&Modules::new(), "authority");
        let (doomed, other) = (new_key(&hsm, Algorithm::P256).await, new_key(&hsm, Algorithm::P256).await);
        hsm.set_canary(new_key(&hsm, Algorithm::P256).await);
        doomed.sign(b"before"[..].into()).await.unwrap();
        let status = itself("another_process", &house.0).env(ERRAND, hex(&doomed.id().0)).status().unwrap();
        assert!(status.success());
        for _ in 0..3 {
            match doomed.sign(b"after"[..].into()).await.unwrap_err() {
                SignError::NotSigned(Error::KeyLost(id)) => assert_eq!(id, doomed.id()),
                error => panic!("{error}"),
            }
            let signature = other.sign(b"after"[..].into()).await.unwrap();
            assert!(other.public().verifies(b"after", &signature));
        }
        assert!(hsm.status().usable && hsm.status().reconnects == 0, "{:?}", hsm.status());
        let health = hsm.health();
        let told = || health.borrow().key.as_ref().is_some_and(|key| key.contains(&doomed.id().to_string()));
        until("readiness hears of it", Duration::from_secs(1), told).await;
        hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn a_token_that_vanishes_and_returns_is_in_service_again_by_itself() {
    in_house("a_token_that_vanishes_and_returns_is_in_service_again_by_itself", async |house| {
        let modules = Modules::new();
        // Two tokens of one module: a restart for the one must bring back the other.
        let (hsm, agents) = (house.open(&modules, "authority"), house.open(&modules, "agents"));
        let (key, agent) = (new_key(&hsm, Algorithm::P256).await, new_key(&agents, Algorithm::P256).await);
        hsm.set_canary(new_key(&hsm, Algorithm::P256).await);
        agents.set_canary(new_key(&agents, Algorithm::P256).await);
        for round in 1..=2 {
            token::take_away(&house.0);
            until("the loss is noticed", Duration::from_secs(2), || !hsm.status().usable).await;
            let asked = Instant::now();
            assert!(matches!(key.sign(b"gone"[..].into()).await, Err(SignError::NotSigned(_))));
            assert!(asked.elapsed() < Duration::from_millis(500), "a lost token answers at once");
            token::bring_back(&house.0);
            until("both are back", Duration::from_secs(12), || hsm.status().usable && agents.status().usable).await;
            for key in [&key, &agent] {
                let signature = key.sign(b"back"[..].into()).await.unwrap();
                assert!(key.public().verifies(b"back", &signature));
            }
            assert!(hsm.status().reconnects >= round, "{:?}", hsm.status());
            assert!(!hsm.status().pin_pending);
        }
        hsm.shut_down(Duration::from_secs(5));
        agents.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn another_token_under_the_same_label_is_not_used() {
    in_house("another_token_under_the_same_label_is_not_used", async |house| {
        let hsm = house.open(&Modules::new(), "authority");
        let key = new_key(&hsm, Algorithm::P256).await;
        hsm.set_canary(new_key(&hsm, Algorithm::P256).await);
        token::take_away(&house.0);
        // The same labels, the same PINs; but none of our keys.
        token::make(&house.0);
        until("the loss is noticed", Duration::from_secs(2), || !hsm.status().usable).await;
        until("the canary is missed in it", Duration::from_secs(5), || {
            // Once when it went away, and again in what is there instead.
            hsm.status().faults.iter().any(|seen| seen.fault == "the token does not show its keys" && seen.count >= 3)
        })
        .await;
        assert!(matches!(key.sign(b"foreign"[..].into()).await, Err(SignError::NotSigned(_))));
        assert!(hsm.generate(KeyId::random(), Algorithm::P256, "foreign").await.is_err());
        assert!(!hsm.status().usable && !hsm.status().pin_pending, "{:?}", hsm.status());
        hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn a_wrong_pin_met_during_recovery_is_tried_once_and_waits_for_the_operator() {
    in_house("a_wrong_pin_met_during_recovery_is_tried_once_and_waits_for_the_operator", async |house| {
        let hsm = house.open(&Modules::new(), "authority");
        let key = new_key(&hsm, Algorithm::P256).await;
        hsm.set_canary(key.clone());
        let good = fs::read(house.pin("authority")).unwrap();
        fs::write(house.pin("authority"), "wrong-pin-0815").unwrap();
        token::take_away(&house.0);
        until("the loss is noticed", Duration::from_secs(2), || !hsm.status().usable).await;
        token::bring_back(&house.0);
        let mut faults = Vec::new();
        until("the second attempt is held back", Duration::from_secs(15), || {
            let fault = hsm.status().fault.unwrap();
            if faults.last() != Some(&fault) {
                faults.push(fault);
            }
            faults.last().is_some_and(|fault| fault.contains("keyward hsm unlock") && fault.contains("pin-pending-authority"))
        })
        .await;
        assert_eq!(faults.iter().filter(|fault| fault.contains("refused the PIN")).count(), 1, "{faults:?}");
        assert!(hsm.status().pin_pending && !faults.concat().contains("0815"));
        fs::write(house.pin("authority"), good).unwrap();
        assert!(keyward::hsm::unlock(&house.settings("authority").state, TokenRole::Authority).unwrap());
        until("it is back", Duration::from_secs(8), || hsm.status().usable).await;
        key.sign(b"back"[..].into()).await.unwrap();
        hsm.shut_down(Duration::from_secs(5));
    });
}

fn files(folder: &Path) -> Vec<PathBuf> {
    let paths = fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    paths.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

/// Not a test of its own: holds a lock on every file of the tokens until its standard input ends, so that the module hangs.
#[test]
fn a_locker() {
    let Some(house) = std::env::var_os(LOCKER) else { return };
    let mut held = Vec::new();
    for path in files(&Path::new(&house).join("tokens")) {
        let file = fs::File::options().read(true).write(true).open(path).unwrap();
        rustix::fs::fcntl_lock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive).unwrap();
        held.push(file);
    }
    fs::write(Path::new(&house).join("locked"), "").unwrap();
    let mut rest = Vec::new();
    std::io::Read::read_to_end(&mut std::io::stdin(), &mut rest).unwrap();
}

#[test]
fn a_module_that_hangs_is_told_apart_and_serves_again_when_it_comes_back() {
    in_house("a_module_that_hangs_is_told_apart_and_serves_again_when_it_comes_back", async |house| {
        let mut settings = house.settings("authority");
        settings.sign_deadline = Duration::from_secs(1);
        let hsm = Hsm::open(&Modules::new(), settings, Arc::default()).unwrap();
        let key = new_key(&hsm, Algorithm::P256).await;
        hsm.set_canary(new_key(&hsm, Algorithm::P256).await);
        let mut locker = itself("a_locker", &house.0);
        let mut locker = locker.env(LOCKER, &house.0).stdin(std::process::Stdio::piped()).spawn().unwrap();
        until("the files are locked", Duration::from_secs(5), || house.0.join("locked").exists()).await;

        let asked = Instant::now();
        match key.sign(b"into the void"[..].into()).await.unwrap_err() {
            // A lane had begun: it may sign yet.
            SignError::Unknown(Error::Deadline | Error::Unusable(_)) => {}
            other => panic!("{other:?}"),
        }
        assert!(asked.elapsed() < Duration::from_millis(1500), "{:?}", asked.elapsed());
        until("the hang is noticed", Duration::from_secs(3), || !hsm.status().usable).await;
        let health = hsm.health();
        until("the module is called stuck", Duration::from_secs(5), || health.borrow().stuck).await;
        assert!(matches!(key.sign(b"no"[..].into()).await, Err(SignError::NotSigned(Error::Stuck))));

        drop(locker.stdin.take());
        assert!(locker.wait().unwrap().success());
        until("it is back", Duration::from_secs(12), || hsm.status().usable).await;
        let signature = key.sign(b"back"[..].into()).await.unwrap();
        assert!(key.public().verifies(b"back", &signature));
        // In service first, and counted then.
        until("it is counted", Duration::from_secs(1), || hsm.status().reconnects == 1).await;
        assert!(!health.borrow().stuck, "{:?}", hsm.status());
        hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn eight_hammer_signatures_while_keys_come_and_go() {
    in_house("eight_hammer_signatures_while_keys_come_and_go", async |house| {
        let modules = Modules::new();
        let mut settings = house.settings("authority");
        settings.token.lanes = 4;
        let hsm = Hsm::open(&modules, settings, Arc::default()).unwrap();
        let (key, signed) = (new_key(&hsm, Algorithm::P256).await, Arc::new(AtomicU64::new(0)));
        let end = Instant::now() + Duration::from_secs(3);
        let mut hammers = Vec::new();
        for lane in 0..8_u8 {
            let (key, signed) = (key.clone(), Arc::clone(&signed));
            hammers.push(tokio::spawn(async move {
                while Instant::now() < end {
                    let message: Arc<[u8]> = [lane; 64][..].into();
                    let signature = key.sign(message.clone()).await.unwrap();
                    assert!(key.public().verifies(&message, &signature));
                    signed.fetch_add(1, Ordering::Relaxed);
                }
            }));
        }
        let mut made = 0;
        while Instant::now() < end {
            let passing = new_key(&hsm, Algorithm::P256).await;
            passing.sign(b"once"[..].into()).await.unwrap();
            assert_eq!(hsm.destroy(passing.id()).await.unwrap(), 2);
            made += 1;
        }
        for hammer in hammers {
            hammer.await.unwrap();
        }
        let (status, signed) = (hsm.status(), signed.load(Ordering::Relaxed));
        assert!(made > 3 && signed > 500, "{made} keys, {signed} signatures");
        assert!(status.fault.is_none() && status.reconnects == 0, "{status:?}");
        hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn a_full_queue_answers_at_once_and_what_was_queued_is_signed() {
    in_house("a_full_queue_answers_at_once_and_what_was_queued_is_signed", async |house| {
        let mut settings = house.settings("authority");
        settings.token.lanes = 1;
        settings.queue = 4;
        let hsm = Hsm::open(&Modules::new(), settings, Arc::default()).unwrap();
        let key = new_key(&hsm, Algorithm::P256).await;
        // A large message keeps the lane busy with hashing while the queue fills.
        let message: Arc<[u8]> = vec![1; 4 << 20].into();
        let mut waiting = Vec::new();
        for _ in 0..32 {
            let (key, message) = (key.clone(), message.clone());
            waiting.push(tokio::spawn(async move {
                let asked = Instant::now();
                (key.sign(message).await, asked.elapsed())
            }));
        }
        let (mut full, mut signed) = (0, 0);
        for one in waiting {
            match one.await.unwrap() {
                (Ok(_), _) => signed += 1,
                (Err(SignError::NotSigned(Error::QueueFull)), took) => {
                    assert!(took < Duration::from_millis(100), "{took:?}");
                    full += 1;
                }
                (Err(error), _) => panic!("{error}"),
            }
        }
        assert!(full > 0 && signed >= 4, "{full} turned away, {signed} signed");
        hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn a_deadline_that_has_passed_signs_nothing() {
    in_house("a_deadline_that_has_passed_signs_nothing", async |house| {
        let mut settings = house.settings("authority");
        settings.token.lanes = 1;
        let hsm = Hsm::open(&Modules::new(), settings.clone(), Arc::default()).unwrap();
        let key = new_key(&hsm, Algorithm::P256).await;
        hsm.shut_down(Duration::from_secs(5));
        // The same token again, in the same process, with no time at all to sign.
        settings.sign_deadline = Duration::from_secs(2);
        let hsm = Hsm::open(&Modules::new(), settings.clone(), Arc::default()).unwrap();
        let again = hsm.key(key.id(), key.public().clone()).await.unwrap();
        let before = hsm.status().signatures;
        for _ in 0..5 {
            // Dropped before it was polled to its end: withdrawn, or signed and thrown away; never an error for the next.
            let abandoned = tokio::time::timeout(Duration::ZERO, again.sign(b"late"[..].into())).await;
            assert!(abandoned.is_err() || abandoned.unwrap().is_ok());
        }
        again.sign(b"in time"[..].into()).await.unwrap();
        assert!(hsm.status().signatures > before);
        let error = key.sign(b"closed"[..].into()).await.unwrap_err();
        assert!(matches!(error, SignError::NotSigned(Error::ShutDown)), "{error}");
        hsm.shut_down(Duration::from_secs(5));
    });
}

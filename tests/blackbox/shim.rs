//! The fault module is tested before it judges: each command shows its effect on a real token.

use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Function, Pkcs11};
use cryptoki::error::{Error, RvError};
use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, ObjectHandle};
use cryptoki::session::{Session, SessionState, UserType};
use cryptoki::slot::{Limit, Slot};
use cryptoki::types::AuthPin;

use crate::house::{House, Output, PIN, Shim, Signatures, instrument, run};

/// Set for the process that uses the module.
const OWN: &str = "KEYWARD_TEST_SHIM_PROCESS";
const DIGEST: [u8; 32] = [0xaa; 32];

/// Runs `body` in a process of its own with fresh tokens: a module, its faults and its environment are a process's.
fn in_own_process(name: &str, body: impl FnOnce(&Ground)) {
    with_script(name, "", body);
}

/// The same with faults from the start.
fn with_script(name: &str, script: &str, body: impl FnOnce(&Ground)) {
    if std::env::var_os(OWN).is_some() {
        body(&Ground::tread());
    } else {
        let house = House::new();
        house.shim_script(script);
        ran(run(&mut itself(&house, name)).ok());
    }
}

fn itself(house: &House, name: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args([&format!("shim::{name}"), "--exact", "--nocapture", "--include-ignored"]).env(OWN, "1");
    house.lend_tokens(&mut command);
    command
}

/// A name that no test has would pass by running none.
fn ran(output: Output) {
    assert!(output.stdout.contains("1 passed"), "{output:?}");
    if let Some((_, told)) = output.stderr.split_once("measured: ") {
        eprintln!("{}", told.lines().next().unwrap());
    }
}

/// The module, initialised, and one of its tokens.
struct Ground {
    module: Pkcs11,
    slot: Slot,
    shim: Shim,
}

fn variable(name: &str) -> PathBuf {
    std::env::var_os(name).unwrap().into()
}

fn initialise(module: &Pkcs11) -> Result<(), Error> {
    module.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK))
}

impl Ground {
    fn tread() -> Self {
        let module = Pkcs11::new(instrument::shim()).unwrap();
        initialise(&module).unwrap();
        let slot = module.get_slots_with_initialized_token().unwrap()[0];
        Self { module, slot, shim: Shim::at(&variable("KEYWARD_SHIM_SOCKET")) }
    }

    fn tell(&self, command: &str) -> String {
        self.shim.tell(command)
    }

    fn log(&self) -> Signatures {
        Signatures::read(&variable("KEYWARD_SHIM_LOG"))
    }

    fn session(&self) -> Session {
        self.module.open_rw_session(self.slot).unwrap()
    }

    /// A session after the login.
    fn user(&self) -> Session {
        let session = self.session();
        log_in(&session, PIN).unwrap();
        session
    }
}

fn log_in(session: &Session, pin: &str) -> Result<(), Error> {
    session.login(UserType::User, Some(&AuthPin::new(pin.into())))
}

/// Public and private key.
fn pair(session: &Session, id: u8, durable: bool) -> Result<(ObjectHandle, ObjectHandle), Error> {
    let params = Attribute::EcParams(vec![0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07]);
    let id = Attribute::Id(vec![id; 16]);
    let public = [params, Attribute::Token(durable), Attribute::Verify(true), id.clone()];
    let private = [Attribute::Token(durable), Attribute::Sign(true), id];
    session.generate_key_pair(&Mechanism::EccKeyPairGen, &public, &private)
}

fn sign(session: &Session, key: ObjectHandle) -> Result<Vec<u8>, Error> {
    session.sign(&Mechanism::Ecdsa, key, &DIGEST)
}

/// The code that a call was answered with.
#[track_caller]
fn code<T>(answer: Result<T, Error>) -> RvError {
    match answer {
        Err(Error::Pkcs11(code, _)) => code,
        Err(other) => panic!("{other:?}"),
        Ok(_) => panic!("it succeeded"),
    }
}

/// A session may be left with an operation active after a failure: the next signature comes from a new one.
fn sign_anew(ground: &Ground, key: ObjectHandle) -> Result<Vec<u8>, Error> {
    sign(&ground.session(), key)
}

#[test]
fn a_failure_meets_the_calls_it_names_and_no_other() {
    in_own_process("a_failure_meets_the_calls_it_names_and_no_other", |ground| {
        let session = ground.user();
        let (_, key) = pair(&session, 1, false).unwrap();
        ground.tell("fail C_SignInit rv=0x30 nth=2 count=2");
        let met: Vec<bool> = (0..5).map(|_| sign_anew(ground, key).is_err()).collect();
        assert_eq!(met, [false, true, true, false, false]);
        assert_eq!((ground.log().count(), ground.shim.number("faults")), (3, 2));
        // Two at once take two calls.
        ground.tell("fail C_Sign rv=0x80000001");
        ground.tell("fail * rv=5 nth=3 count=all");
        let failed = sign(&session, key);
        assert!(matches!(failed, Err(Error::Pkcs11(RvError::VendorDefined(_), Function::Sign))), "{failed:?}");
        assert_eq!(ground.log().count(), 3, "the real C_Sign was not called");
        // C_SignInit and both C_Sign were called, or not, before the first of these.
        let info: Vec<bool> = (0..3).map(|_| session.get_session_info().is_ok()).collect();
        assert_eq!(info, [false, false, false]);
        ground.tell("clear");
        sign_anew(ground, key).unwrap();
    });
}

#[test]
fn a_signature_whose_answer_is_lost_is_in_the_log() {
    in_own_process("a_signature_whose_answer_is_lost_is_in_the_log", |ground| {
        let session = ground.user();
        let (_, key) = pair(&session, 1, false).unwrap();
        ground.tell("fail C_Sign rv=0x30 after");
        let lost = sign(&session, key);
        assert!(matches!(lost, Err(Error::Pkcs11(RvError::DeviceError, Function::Sign))), "{lost:?}");
        assert_eq!(ground.log().made[&("01".repeat(16), "aa".repeat(32))], 1);
        ground.tell("fail C_GenerateKeyPair rv=0x30 after");
        assert_eq!(code(pair(&session, 2, false)), RvError::DeviceError);
        let left = session.find_objects(&[Attribute::Id(vec![2; 16])]).unwrap();
        assert_eq!(left.len(), 2, "both halves were made");
    });
}

#[test]
fn a_delay_is_as_long_as_asked() {
    in_own_process("a_delay_is_as_long_as_asked", |ground| {
        let session = ground.session();
        // The least of many: what the kernel adds on a busy machine is not the module's.
        let least = || {
            let time = |_| {
                let from = Instant::now();
                session.get_session_info().unwrap();
                from.elapsed()
            };
            (0..100).map(time).min().unwrap()
        };
        let bare = least();
        for millis in [2.0, 0.5] {
            ground.tell(&format!("delay C_GetSessionInfo ms={millis}"));
            let (asked, took) = (Duration::from_secs_f64(millis / 1000.0), least());
            assert!(took >= asked && took < asked + bare + Duration::from_micros(100), "{took:?} for {asked:?}");
        }
        ground.tell("delay C_GetSessionInfo ms=0");
        assert!(least() < Duration::from_micros(100));
        ground.tell("slow_keygen ms=300");
        let from = Instant::now();
        pair(&ground.user(), 1, false).unwrap();
        assert!(from.elapsed() >= Duration::from_millis(300));
    });
}

#[test]
fn the_time_of_c_sign_is_paid_for_a_signature_and_not_for_its_length() {
    in_own_process("the_time_of_c_sign_is_paid_for_a_signature_and_not_for_its_length", |ground| {
        let session = ground.user();
        let (_, key) = pair(&session, 1, false).unwrap();
        let least = || {
            let time = |_| {
                let from = Instant::now();
                sign(&session, key).unwrap();
                from.elapsed()
            };
            (0..10).map(time).min().unwrap()
        };
        let delay = Duration::from_millis(20);
        let before = ground.shim.calls("C_Sign");
        sign(&session, key).unwrap();
        assert_eq!(ground.shim.calls("C_Sign") - before, 2, "the wrapper asks for the length first");
        ground.tell("delay C_Sign ms=20");
        let once = least();
        assert!(once >= delay && once < delay * 2, "{once:?}");
        ground.tell("delay C_Sign ms=20 queries");
        assert!(least() >= delay * 2);
        ground.tell("delay * ms=20");
        assert!(least() >= delay * 2, "C_SignInit and one C_Sign");
    });
}

#[test]
fn a_call_that_hangs_parks_until_it_is_released() {
    in_own_process("a_call_that_hangs_parks_until_it_is_released", |ground| {
        let session = ground.user();
        let (_, key) = pair(&session, 1, false).unwrap();
        ground.tell("hang C_SignInit count=2");
        thread::scope(|scope| {
            let hanging = [0, 1].map(|_| scope.spawn(|| sign_anew(ground, key)));
            ground.tell("await hanging=2");
            assert_eq!((ground.shim.number("hanging"), ground.log().count()), (2, 0));
            // Others pass.
            sign_anew(ground, key).unwrap();
            ground.tell("release");
            for one in hanging {
                one.join().unwrap().unwrap();
            }
        });
        assert_eq!((ground.shim.number("hanging"), ground.log().count()), (0, 3));
    });
}

#[test]
fn a_device_that_restarts_takes_sessions_and_login_with_it() {
    in_own_process("a_device_that_restarts_takes_sessions_and_login_with_it", |ground| {
        let session = ground.user();
        let (_, key) = pair(&session, 1, true).unwrap();
        assert_eq!(ground.shim.number("sessions"), 1);
        assert_eq!(ground.tell("logout"), "1");
        assert_eq!(code(sign(&session, key)), RvError::SessionHandleInvalid);
        assert_eq!(ground.shim.number("sessions"), 0);
        let next = ground.session();
        assert_eq!(next.get_session_info().unwrap().session_state(), SessionState::RwPublic);
        log_in(&next, PIN).unwrap();
        assert_eq!(next.find_objects(&[Attribute::Id(vec![1; 16])]).unwrap().len(), 2);
    });
}

#[test]
fn a_device_that_is_gone_answers_nothing_until_it_returns() {
    in_own_process("a_device_that_is_gone_answers_nothing_until_it_returns", |ground| {
        let session = ground.user();
        let (_, key) = pair(&session, 1, true).unwrap();
        ground.tell("lose");
        assert_eq!(code(ground.module.get_slots_with_token()), RvError::DeviceRemoved);
        assert_eq!(code(ground.module.get_token_info(ground.slot)), RvError::TokenNotPresent);
        assert_eq!(code(ground.module.open_rw_session(ground.slot)), RvError::TokenNotPresent);
        assert_eq!(code(sign(&session, key)), RvError::DeviceRemoved);
        assert_eq!(code(ground.module.clone().finalize()), RvError::DeviceRemoved);
        assert_eq!(code(initialise(&ground.module)), RvError::DeviceRemoved);
        ground.tell("return");
        initialise(&ground.module).unwrap();
        assert_eq!(code(sign(&session, key)), RvError::SessionHandleInvalid);
        let next = ground.user();
        assert_eq!(next.find_objects(&[Attribute::Id(vec![1; 16])]).unwrap().len(), 2);
    });
}

#[test]
fn sessions_end_where_the_device_has_no_more() {
    in_own_process("sessions_end_where_the_device_has_no_more", |ground| {
        ground.tell("sessions_max n=3");
        let mut held: Vec<Session> = (0..3).map(|_| ground.session()).collect();
        assert_eq!(code(ground.module.open_ro_session(ground.slot)), RvError::SessionCount);
        let info = ground.module.get_token_info(ground.slot).unwrap();
        assert!(matches!(info.max_session_count(), Limit::Max(3)), "{:?}", info.max_session_count());
        held.pop();
        held.push(ground.session());
        assert_eq!(ground.shim.number("sessions"), 3);
        ground.tell("clear");
        held.push(ground.session());
    });
}

#[test]
fn wrong_pins_are_counted_told_and_lock() {
    in_own_process("wrong_pins_are_counted_told_and_lock", |ground| {
        ground.tell("pin_tries n=3");
        let session = ground.session();
        let flags = || {
            let info = ground.module.get_token_info(ground.slot).unwrap();
            (info.user_pin_count_low(), info.user_pin_final_try(), info.user_pin_locked())
        };
        assert_eq!(flags(), (false, false, false));
        assert_eq!(code(log_in(&session, "wrong")), RvError::PinIncorrect);
        assert_eq!(flags(), (true, false, false));
        log_in(&session, PIN).unwrap();
        session.logout().unwrap();
        assert_eq!(flags(), (false, false, false), "a right one starts anew");
        for expected in [(true, false, false), (true, true, false), (false, false, true)] {
            assert_eq!(code(log_in(&session, "wrong")), RvError::PinIncorrect);
            assert_eq!(flags(), expected);
        }
        assert_eq!(code(log_in(&session, PIN)), RvError::PinLocked);
        assert_eq!(ground.log().logins, 6);
    });
}

#[test]
fn a_remapped_handle_signs_with_another_key_and_the_log_tells_which() {
    in_own_process("a_remapped_handle_signs_with_another_key_and_the_log_tells_which", |ground| {
        let session = ground.user();
        let (public, key) = pair(&session, 1, false).unwrap();
        ground.tell("remap");
        assert_eq!(code(sign(&session, key)), RvError::KeyHandleInvalid, "there is no other key");
        let (other, _) = pair(&session, 2, false).unwrap();
        let signature = sign(&session, key).unwrap();
        assert!(session.verify(&Mechanism::Ecdsa, public, &DIGEST, &signature).is_err());
        session.verify(&Mechanism::Ecdsa, other, &DIGEST, &signature).unwrap();
        assert_eq!(ground.log().made[&("02".repeat(16), "aa".repeat(32))], 1);
        ground.tell("clear");
        let signature = sign(&session, key).unwrap();
        session.verify(&Mechanism::Ecdsa, public, &DIGEST, &signature).unwrap();
        assert_eq!(ground.log().made[&("01".repeat(16), "aa".repeat(32))], 1);
    });
}

#[test]
fn a_corrupted_signature_does_not_verify() {
    in_own_process("a_corrupted_signature_does_not_verify", |ground| {
        let session = ground.user();
        let (public, key) = pair(&session, 1, false).unwrap();
        ground.tell("corrupt C_Sign nth=2 count=2");
        let good: Vec<bool> = (0..4)
            .map(|_| {
                let signature = sign(&session, key).unwrap();
                session.verify(&Mechanism::Ecdsa, public, &DIGEST, &signature).is_ok()
            })
            .collect();
        assert_eq!(good, [true, false, false, true]);
        assert_eq!(ground.log().count(), 4);
    });
}

#[test]
fn a_process_can_be_ended_inside_a_call() {
    if std::env::var_os(OWN).is_some() {
        let ground = Ground::tread();
        let session = ground.user();
        let (_, key) = pair(&session, 1, false).unwrap();
        // The second signature's length query.
        ground.tell("abort C_Sign nth=3");
        sign(&session, key).unwrap();
        let _ = sign(&session, key);
        return;
    }
    let house = House::new();
    run(&mut itself(&house, "a_process_can_be_ended_inside_a_call")).exits(-1);
    assert_eq!(house.signatures().count(), 1);
    assert!(house.path("shim.sock").exists(), "it left its socket behind");
    // The next process has one of its own there.
    ran(run(&mut itself(&house, "a_command_that_is_wrong_changes_nothing")).ok());
}

#[test]
fn a_poor_device_refuses_what_it_lacks() {
    in_own_process("a_poor_device_refuses_what_it_lacks", |ground| {
        let session = ground.user();
        ground.tell("no_session_keys");
        assert_eq!(code(pair(&session, 1, false)), RvError::AttributeValueInvalid);
        pair(&session, 1, true).unwrap();
        ground.tell("unique_ids");
        assert_eq!(code(pair(&session, 1, true)), RvError::AttributeValueInvalid);
        pair(&session, 2, true).unwrap();
        ground.module.open_ro_session(ground.slot).unwrap();
        ground.tell("no_read_only_sessions");
        assert!(ground.module.open_ro_session(ground.slot).is_err());
        ground.session();
        ground.tell("clear");
        pair(&session, 1, false).unwrap();
        ground.module.open_ro_session(ground.slot).unwrap();
    });
}

#[test]
fn a_device_of_one_operation_at_a_time_takes_turns() {
    with_script("a_device_of_one_operation_at_a_time_takes_turns", "preset yubihsm\n", |ground| {
        let info = ground.module.get_token_info(ground.slot).unwrap();
        assert!(matches!(info.max_session_count(), Limit::Max(16)));
        let session = ground.user();
        let (_, key) = pair(&session, 1, false).unwrap();
        let from = Instant::now();
        thread::scope(|scope| {
            for _ in 0..2 {
                scope.spawn(|| sign_anew(ground, key).unwrap());
            }
        });
        // Each asks for the length first, which takes no time.
        assert!(from.elapsed() >= Duration::from_millis(2 * 73), "{:?}", from.elapsed());
    });
}

#[test]
fn faults_by_chance_are_the_same_for_the_same_seed() {
    in_own_process("faults_by_chance_are_the_same_for_the_same_seed", |ground| {
        let session = ground.user();
        let (_, key) = pair(&session, 1, false).unwrap();
        let lived = |seed: u32| -> Vec<String> {
            ground.tell(&format!("random seed={seed} per_mille=200"));
            let told = (0..200).map(|_| format!("{:?}", session.get_session_info().map(drop))).collect();
            ground.tell("clear");
            told
        };
        let (once, again, other) = (lived(7), lived(7), lived(8));
        assert_eq!(once, again);
        assert_ne!(once, other);
        let failed = once.iter().filter(|answer| *answer != "Ok(())").count();
        assert!((20..60).contains(&failed), "{failed} of 200 with 200 in 1000");
        // No login is ever answered with a word about the PIN; nothing hangs, nothing aborts.
        ground.tell("random seed=1 per_mille=1000");
        for _ in 0..200 {
            if let Err(Error::Pkcs11(code, _)) = log_in(&session, PIN) {
                let pin = format!("{code:?}").contains("Pin");
                assert!(!pin, "{code:?}");
            }
            let _ = sign(&session, key);
        }
        ground.tell("clear");
        sign_anew(ground, key).unwrap();
    });
}

#[test]
fn a_script_that_cannot_be_carried_out_keeps_the_module_from_loading() {
    let name = "a_script_that_cannot_be_carried_out_keeps_the_module_from_loading";
    if std::env::var_os(OWN).is_some() {
        assert!(Pkcs11::new(instrument::shim()).is_err());
        return;
    }
    let house = House::new();
    house.shim_script("sessions_max n=3\nfail C_Sing rv=0x30\n");
    ran(run(&mut itself(&house, name)).ok());
}

#[test]
fn a_command_that_is_wrong_changes_nothing() {
    in_own_process("a_command_that_is_wrong_changes_nothing", |ground| {
        let session = ground.session();
        for wrong in [
            "",
            "fial C_GetSessionInfo rv=0x30",
            "fail C_GetSessionInfo",
            "fail rv=0x30",
            "fail C_Nothing rv=0x30",
            "fail C_GetSessionInfo rv=0x30 nth=0",
            "fail C_GetSessionInfo rv=0x30 count=0",
            "fail C_GetSessionInfo rv=0x30 befor",
            "corrupt C_GetSessionInfo",
            "delay C_GetSessionInfo ms=-1",
            "preset abacus",
        ] {
            assert!(ground.shim.ask(wrong).is_err(), "{wrong:?}");
        }
        session.get_session_info().unwrap();
        assert_eq!(ground.shim.number("faults"), 0);
        assert_eq!(ground.shim.calls("C_GetSessionInfo"), 1);
    });
}

/// What the module adds to a signature, the log's write included: the same token with and without it, in turns.
#[test]
#[ignore = "a measurement, best on a quiet machine with the release profile"]
fn what_the_module_costs() {
    in_own_process("what_the_module_costs", |ground| {
        let session = ground.user();
        let (_, key) = pair(&session, 1, false).unwrap();
        // The same library, so the same sessions and handles.
        let bare = Pkcs11::new(variable("KEYWARD_SHIM_MODULE")).unwrap();
        let bare = bare.open_rw_session(ground.slot).unwrap();
        let hooked = ground.session();
        let time = |session: &Session| {
            let from = Instant::now();
            for _ in 0..1000 {
                sign(session, key).unwrap();
            }
            from.elapsed().as_secs_f64() * 1e3
        };
        let mut rounds: Vec<(f64, f64)> = (0..20).map(|_| (time(&bare), time(&hooked))).collect();
        rounds.sort_by(|one, other| (one.1 - one.0).total_cmp(&(other.1 - other.0)));
        let (without, with) = rounds[rounds.len() / 2];
        eprintln!("measured: {without:.1} µs a signature without the module, {with:.1} with it, {:.2} more", with - without);
    });
}

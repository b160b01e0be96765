//! The fault table against a real token: every code of it at every step, and what may follow. What is expected is written down here
//! once more, by code and not by class, so that a change of the table is a change of this page.

use std::fs;
use std::sync::Arc;
use std::time::Duration;

use keyward::hsm::{Hsm, Modules, SignError, SigningKey};
use keyward::model::{Algorithm, Digest, hex};

use super::shim::Shim;
use super::{House, in_house, new_key, until};

/// What the asker gets for one fault.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// The signature: another session, or the handle of another lookup, did it.
    Signed,
    /// That nothing was signed, and that it is a matter of load: come back.
    Shed,
    /// That nothing was signed.
    NotSigned,
    /// The same, and that it never will be.
    Never,
}

/// Code, what follows from it at C_SignInit, whether the token comes back from recovery afterwards.
pub(super) const AT_SIGN_INIT: &[(u32, &str, Answer, bool)] = &[
    (0xb3, "CKR_SESSION_HANDLE_INVALID", Answer::Signed, false),
    (0xb0, "CKR_SESSION_CLOSED", Answer::Signed, false),
    (0x90, "CKR_OPERATION_ACTIVE", Answer::Signed, false),
    (0x91, "CKR_OPERATION_NOT_INITIALIZED", Answer::Signed, false),
    (0xb5, "CKR_SESSION_READ_ONLY", Answer::Signed, false),
    (0x82, "CKR_OBJECT_HANDLE_INVALID", Answer::Signed, false),
    (0x60, "CKR_KEY_HANDLE_INVALID", Answer::Signed, false),
    (0x05, "CKR_GENERAL_ERROR", Answer::Signed, false),
    (0x06, "CKR_FUNCTION_FAILED", Answer::Signed, false),
    (0x50, "CKR_FUNCTION_CANCELED", Answer::Signed, false),
    (0x07, "CKR_ARGUMENTS_BAD", Answer::Signed, false),
    (0x204, "CKR_PENDING", Answer::Signed, false),
    (0x8000_0001, "a vendor's own", Answer::Signed, false),
    (0x101, "CKR_USER_NOT_LOGGED_IN", Answer::NotSigned, true),
    (0x30, "CKR_DEVICE_ERROR", Answer::NotSigned, true),
    (0x32, "CKR_DEVICE_REMOVED", Answer::NotSigned, true),
    (0xe0, "CKR_TOKEN_NOT_PRESENT", Answer::NotSigned, true),
    (0xe1, "CKR_TOKEN_NOT_RECOGNIZED", Answer::NotSigned, true),
    (0x03, "CKR_SLOT_ID_INVALID", Answer::NotSigned, true),
    (0x190, "CKR_CRYPTOKI_NOT_INITIALIZED", Answer::NotSigned, true),
    (0xb1, "CKR_SESSION_COUNT", Answer::Shed, false),
    (0x31, "CKR_DEVICE_MEMORY", Answer::Shed, false),
    (0x02, "CKR_HOST_MEMORY", Answer::Shed, false),
    (0x201, "CKR_TOKEN_RESOURCE_EXCEEDED", Answer::Shed, false),
    (0xa0, "CKR_PIN_INCORRECT", Answer::NotSigned, false),
    (0xa1, "CKR_PIN_INVALID", Answer::NotSigned, false),
    (0xa2, "CKR_PIN_LEN_RANGE", Answer::NotSigned, false),
    (0xa4, "CKR_PIN_LOCKED", Answer::NotSigned, false),
    (0xa3, "CKR_PIN_EXPIRED", Answer::NotSigned, false),
    (0x102, "CKR_USER_PIN_NOT_INITIALIZED", Answer::NotSigned, false),
    (0x104, "CKR_USER_ANOTHER_ALREADY_LOGGED_IN", Answer::NotSigned, false),
    (0x1b, "CKR_ACTION_PROHIBITED", Answer::Never, false),
    (0x10, "CKR_ATTRIBUTE_READ_ONLY", Answer::Never, false),
    (0x11, "CKR_ATTRIBUTE_SENSITIVE", Answer::Never, false),
    (0x12, "CKR_ATTRIBUTE_TYPE_INVALID", Answer::Never, false),
    (0x13, "CKR_ATTRIBUTE_VALUE_INVALID", Answer::Never, false),
    (0x140, "CKR_CURVE_NOT_SUPPORTED", Answer::Never, false),
    (0x20, "CKR_DATA_INVALID", Answer::Never, false),
    (0x130, "CKR_DOMAIN_PARAMS_INVALID", Answer::Never, false),
    (0x54, "CKR_FUNCTION_NOT_SUPPORTED", Answer::Never, false),
    (0x63, "CKR_KEY_TYPE_INCONSISTENT", Answer::Never, false),
    (0x71, "CKR_MECHANISM_PARAM_INVALID", Answer::Never, false),
    (0xd0, "CKR_TEMPLATE_INCOMPLETE", Answer::Never, false),
    (0xe2, "CKR_TOKEN_WRITE_PROTECTED", Answer::Never, false),
    (0x70, "CKR_MECHANISM_INVALID", Answer::Never, false),
    (0xd1, "CKR_TEMPLATE_INCONSISTENT", Answer::Never, false),
    (0x68, "CKR_KEY_FUNCTION_NOT_PERMITTED", Answer::Never, false),
    (0x21, "CKR_DATA_LEN_RANGE", Answer::Never, false),
    (0x62, "CKR_KEY_SIZE_RANGE", Answer::Never, false),
    (0x203, "CKR_KEY_EXHAUSTED", Answer::Never, false),
];

/// A token with one lane behind the fault module. It has no canary: that is a signature of the watch's own, of a moment of its own, and would
/// now and then meet the fault that is meant for another.
struct Bench {
    hsm: Hsm,
    key: SigningKey,
    shim: Shim,
    log: std::path::PathBuf,
    asked: u32,
}

impl Bench {
    async fn open(house: &House) -> Self {
        let mut settings = house.settings("authority");
        settings.token.module = super::shim_module();
        settings.token.lanes = 1;
        settings.sign_deadline = Duration::from_secs(2);
        let hsm = Hsm::open(&Modules::new(), settings, Arc::default()).unwrap();
        let key = new_key(&hsm, Algorithm::P256).await;
        Self { hsm, key, shim: Shim::at(&house.0.join("shim.sock")), log: house.0.join("shim.log"), asked: 0 }
    }

    /// Asks for one signature over a message of its own. With how often the token made it.
    async fn ask(&mut self) -> (Result<Vec<u8>, SignError>, usize) {
        self.asked += 1;
        let message: Arc<[u8]> = self.asked.to_be_bytes().as_slice().into();
        let answer = self.key.sign(Arc::clone(&message)).await;
        if let Ok(signature) = &answer {
            assert!(self.key.public().verifies(&message, signature));
        }
        let digest = hex(&Digest::of(&message).0);
        let made = fs::read_to_string(&self.log).unwrap().lines().filter(|line| line.ends_with(&digest)).count();
        (answer, made)
    }

    fn logins(&self) -> usize {
        fs::read_to_string(&self.log).unwrap().lines().filter(|line| *line == "login").count()
    }

    /// The token is in service and signs; every session that was spoilt on the way is closed.
    async fn is_well(&mut self, what: &str) {
        until(what, Duration::from_secs(10), || self.hsm.status().usable).await;
        let (answer, made) = self.ask().await;
        assert!(answer.is_ok() && made == 1, "after {what}: {answer:?}");
        // The anchor, the lane, the admin lane.
        let open = self.shim.number("sessions");
        assert!(open <= 3, "after {what}: {open} sessions are open");
    }
}

#[test]
fn before_c_sign_each_code_has_its_consequence_and_nothing_is_signed_twice() {
    in_house("faults::before_c_sign_each_code_has_its_consequence_and_nothing_is_signed_twice", async |house| {
        let mut bench = Bench::open(&house).await;
        for (code, name, expected, recovers) in AT_SIGN_INIT {
            let (logins, back) = (bench.logins(), bench.hsm.status().reconnects);
            bench.shim.tell(&format!("fail C_SignInit rv={code:#x}"));
            let (answer, made) = bench.ask().await;
            match (expected, &answer) {
                (Answer::Signed, Ok(_)) => assert_eq!(made, 1, "{name}"),
                (Answer::Shed | Answer::NotSigned | Answer::Never, Err(SignError::NotSigned(error))) => {
                    let told = (error.is_overload(), error.is_permanent());
                    assert_eq!((made, told), (0, (*expected == Answer::Shed, *expected == Answer::Never)), "{name}");
                }
                _ => panic!("{name}: {answer:?}"),
            }
            bench.is_well(name).await;
            assert_eq!(bench.hsm.status().reconnects - back, u64::from(*recovers), "{name}");
            // Only the module's restart took the login with it.
            let restarted = usize::from(*recovers && *code != 0x101);
            assert_eq!(bench.logins() - logins, restarted, "{name}");
        }
        bench.hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn whatever_c_sign_answers_nobody_asks_again() {
    in_house("faults::whatever_c_sign_answers_nobody_asks_again", async |house| {
        let mut bench = Bench::open(&house).await;
        for (code, name, _, _) in AT_SIGN_INIT {
            for when in ["", " after"] {
                bench.shim.tell(&format!("fail C_Sign rv={code:#x}{when}"));
                let (answer, made) = bench.ask().await;
                assert!(matches!(answer, Err(SignError::Unknown(_))), "{name}{when}: {answer:?}");
                assert_eq!(made, usize::from(!when.is_empty()), "{name}{when}");
                bench.is_well(name).await;
            }
        }
        bench.hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn a_lane_that_can_open_no_session_says_so_and_opens_one_later() {
    in_house("faults::a_lane_that_can_open_no_session_says_so_and_opens_one_later", async |house| {
        let mut bench = Bench::open(&house).await;
        for (code, name, _, _) in AT_SIGN_INIT {
            bench.shim.tell("fail C_SignInit rv=0xb3");
            bench.shim.tell(&format!("fail C_OpenSession rv={code:#x}"));
            let (answer, made) = bench.ask().await;
            // Another lookup of the handle may have mended it.
            assert!(matches!(answer, Ok(_) | Err(SignError::NotSigned(_))), "{name}: {answer:?}");
            assert_eq!(made, usize::from(answer.is_ok()), "{name}");
            bench.is_well(name).await;
        }
        bench.hsm.shut_down(Duration::from_secs(5));
    });
}

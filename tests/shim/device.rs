//! What kind of device it is: how many sessions, how many wrong PINs, which objects it refuses.
//!
//! All of it is asked from within a call of the real module (see [`crate::real`]), never on the way to a signature.

use std::collections::{BTreeSet, HashMap};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cryptoki_sys::{
    CK_ATTRIBUTE, CK_BBOOL, CK_FLAGS, CK_FUNCTION_LIST, CK_RV, CK_SESSION_HANDLE, CK_SLOT_ID, CK_TOKEN_INFO, CK_TRUE, CK_ULONG,
    CKA_CLASS, CKA_ID, CKA_TOKEN, CKF_RW_SESSION, CKF_USER_PIN_COUNT_LOW, CKF_USER_PIN_FINAL_TRY, CKF_USER_PIN_LOCKED,
    CKR_ARGUMENTS_BAD, CKR_ATTRIBUTE_VALUE_INVALID, CKR_OK, CKR_PIN_INCORRECT, CKR_PIN_LOCKED, CKR_SESSION_COUNT,
};

use crate::functions::Function;
use crate::{book, faults, real};

/// Slots and their sessions, and what the device lacks.
#[derive(Default)]
struct Device {
    sessions: HashMap<CK_SESSION_HANDLE, CK_SLOT_ID>,
    /// Wrong logins in a row, by slot.
    wrong_pins: HashMap<CK_SLOT_ID, u64>,
    real_pin: Option<Vec<u8>>,
    lacks: Lacks,
}

#[derive(Default)]
struct Lacks {
    sessions_max: Option<u64>,
    pin_tries: Option<u64>,
    session_keys: bool,
    read_only_sessions: bool,
    second_ids: bool,
}

static DEVICE: LazyLock<Mutex<Device>> = LazyLock::new(Mutex::default);

fn device() -> MutexGuard<'static, Device> {
    DEVICE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Devices whose manners are known.
pub fn preset(name: &str) -> Result<(), String> {
    match name {
        "yubihsm" => {
            set_sessions_max(16);
            faults::take_turns();
            faults::delay(Some(Function::C_Sign), Duration::from_millis(73), false);
        }
        "cloudhsm" => {
            refuse_read_only_sessions();
            refuse_second_ids();
            faults::delay(Some(Function::C_Sign), Duration::from_millis(2), false);
        }
        "tpm" => {
            refuse_session_keys();
            faults::delay(Some(Function::C_Sign), Duration::from_millis(200), false);
        }
        _ => return Err(format!("no preset {name:?}: yubihsm, cloudhsm, tpm")),
    }
    Ok(())
}

pub fn set_sessions_max(most: u64) {
    device().lacks.sessions_max = Some(most);
}

pub fn set_pin_tries(tries: u64) {
    device().lacks.pin_tries = Some(tries);
}

/// From now on logins are made with this PIN.
pub fn set_real_pin(pin: &str) {
    device().real_pin = Some(pin.into());
}

/// What logins are made with, if not with the caller's PIN.
pub fn real_pin() -> Option<Vec<u8>> {
    device().real_pin.clone()
}

pub fn refuse_session_keys() {
    device().lacks.session_keys = true;
}

pub fn refuse_read_only_sessions() {
    device().lacks.read_only_sessions = true;
}

pub fn refuse_second_ids() {
    device().lacks.second_ids = true;
}

/// It lacks nothing, and counts PINs from the start. Its PIN stays what it is.
pub fn clear() {
    let mut device = device();
    device.lacks = Lacks::default();
    device.wrong_pins.clear();
}

/// Open sessions.
pub fn sessions() -> usize {
    device().sessions.len()
}

/// Opens a session by `open`, if there may be one more of this kind.
pub fn open_session(
    slot: CK_SLOT_ID,
    flags: CK_FLAGS,
    session: *mut CK_SESSION_HANDLE,
    open: impl FnOnce() -> Option<CK_RV>,
) -> Option<CK_RV> {
    let mut device = device();
    let open_now = device.sessions.values().filter(|of| **of == slot).count();
    if device.lacks.read_only_sessions && flags & CKF_RW_SESSION == 0 {
        return Some(CKR_ARGUMENTS_BAD);
    }
    if device.lacks.sessions_max.is_some_and(|most| open_now as u64 >= most) {
        return Some(CKR_SESSION_COUNT);
    }
    let rv = open()?;
    if rv == CKR_OK {
        // SAFETY: the real module has just written the handle there.
        device.sessions.insert(unsafe { *session }, slot);
    }
    Some(rv)
}

/// A session was closed.
pub fn closed(session: CK_SESSION_HANDLE) {
    device().sessions.remove(&session);
}

/// A slot's sessions were closed; all of them if none is named.
pub fn closed_all(slot: Option<CK_SLOT_ID>) {
    device().sessions.retain(|_, of| slot.is_some_and(|slot| slot != *of));
}

/// The real C_CloseAllSessions on every slot in use: sessions, session objects and logins are gone, as after a restart of the
/// device. How many sessions there were.
pub fn lose_sessions() -> Result<usize, String> {
    real::alone(|real| {
        let close_all = real.C_CloseAllSessions.ok_or("no C_CloseAllSessions")?;
        book::forget();
        let sessions = std::mem::take(&mut device().sessions);
        for slot in sessions.values().collect::<BTreeSet<_>>() {
            // SAFETY: a slot that sessions were opened on; nobody else is in the module.
            match unsafe { close_all(*slot) } {
                CKR_OK => {}
                rv => return Err(format!("C_CloseAllSessions: {rv:#x}")),
            }
        }
        Ok(sessions.len())
    })
}

/// Logs in by `log_in` unless the PIN is locked, and counts.
pub fn log_in(session: CK_SESSION_HANDLE, log_in: impl FnOnce() -> Option<CK_RV>) -> Option<CK_RV> {
    let (slot, wrong, tries) = {
        let device = device();
        let slot = device.sessions.get(&session).copied().unwrap_or(CK_SLOT_ID::MAX);
        (slot, device.wrong_pins.get(&slot).copied().unwrap_or(0), device.lacks.pin_tries)
    };
    if tries.is_some_and(|tries| wrong >= tries) {
        return Some(CKR_PIN_LOCKED);
    }
    let rv = log_in()?;
    match rv {
        CKR_OK => drop(device().wrong_pins.remove(&slot)),
        CKR_PIN_INCORRECT => drop(device().wrong_pins.insert(slot, wrong + 1)),
        _ => {}
    }
    Some(rv)
}

/// What C_GetTokenInfo tells of the limits.
pub fn describe(slot: CK_SLOT_ID, info: &mut CK_TOKEN_INFO) {
    let device = device();
    if let Some(most) = device.lacks.sessions_max {
        info.ulMaxSessionCount = most;
        info.ulMaxRwSessionCount = most;
    }
    if let Some(tries) = device.lacks.pin_tries {
        let wrong = device.wrong_pins.get(&slot).copied().unwrap_or(0);
        info.flags &= !(CKF_USER_PIN_COUNT_LOW | CKF_USER_PIN_FINAL_TRY | CKF_USER_PIN_LOCKED);
        info.flags |= match tries.saturating_sub(wrong) {
            0 => CKF_USER_PIN_LOCKED,
            1 => CKF_USER_PIN_COUNT_LOW | CKF_USER_PIN_FINAL_TRY,
            _ if wrong > 0 => CKF_USER_PIN_COUNT_LOW,
            _ => 0,
        };
    }
}

/// Whether the device will not make an object of this template.
pub fn refuses(real: &CK_FUNCTION_LIST, session: CK_SESSION_HANDLE, template: &[CK_ATTRIBUTE]) -> Option<CK_RV> {
    let (session_keys, second_ids) = {
        let lacks = &device().lacks;
        (lacks.session_keys, lacks.second_ids)
    };
    let value = |kind| template.iter().find(|attribute| attribute.type_ == kind && !attribute.pValue.is_null());
    // SAFETY: the caller's attributes are as long as they say.
    let token = value(CKA_TOKEN).is_some_and(|token| unsafe { *token.pValue.cast::<CK_BBOOL>() } == CK_TRUE);
    if session_keys && !token {
        return Some(CKR_ATTRIBUTE_VALUE_INVALID);
    }
    let same: Vec<CK_ATTRIBUTE> = [CKA_CLASS, CKA_ID].into_iter().filter_map(|kind| value(kind).copied()).collect();
    let named = same.iter().any(|attribute| attribute.type_ == CKA_ID);
    (second_ids && named && !real::find(real, session, &same).is_empty()).then_some(CKR_ATTRIBUTE_VALUE_INVALID)
}

/// The caller's template.
///
/// # Safety
/// `template` is null or `count` attributes long while the result lives.
pub unsafe fn template<'a>(template: *const CK_ATTRIBUTE, count: CK_ULONG) -> &'a [CK_ATTRIBUTE] {
    if template.is_null() {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(template, usize::try_from(count).unwrap_or_default()) }
}

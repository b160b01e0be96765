//! A PKCS#11 module that stands before the real one and keeps count: what was signed, with which key, and every login.
//!
//! Owns: a copy of the real module's function list with some entries replaced. Promises: every call reaches the real
//! module unchanged; each signature that it handed out is one line in the log before the caller sees it, written by a
//! single append, so a SIGKILL of the caller loses none. Never: decides anything. (Faults come to [`pass`], the one place
//! through which each hooked call goes.)
//!
//! `KEYWARD_SHIM_MODULE` is the real module, `KEYWARD_SHIM_LOG` the log: `<hex CKA_ID> <hex signed data>` for a signature,
//! `login` for a C_Login (whatever came of it).
#![allow(unsafe_code, reason = "PKCS#11 is a C interface")]
#![allow(non_snake_case, reason = "PKCS#11 names its functions")]

mod book;
mod real;

use cryptoki_sys::{
    CK_BYTE, CK_FUNCTION_LIST, CK_MECHANISM, CK_OBJECT_HANDLE, CK_RV, CK_SESSION_HANDLE, CK_SLOT_ID, CK_ULONG, CK_USER_TYPE,
    CK_UTF8CHAR, CK_VOID_PTR, CKR_ARGUMENTS_BAD, CKR_GENERAL_ERROR, CKR_OK,
};

/// Hands out the hooked function list (PKCS#11 2.40 §5.4).
///
/// # Safety
/// `list` is null or writable, as PKCS#11 asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn C_GetFunctionList(list: *mut *mut CK_FUNCTION_LIST) -> CK_RV {
    if list.is_null() {
        return CKR_ARGUMENTS_BAD;
    }
    let Some(hooked) = real::hooked(hook) else { return CKR_GENERAL_ERROR };
    // SAFETY: checked to be non-null; the caller promises it is writable.
    unsafe { *list = hooked };
    CKR_OK
}

/// Which functions are ours.
fn hook(list: &mut CK_FUNCTION_LIST) {
    list.C_GetFunctionList = Some(C_GetFunctionList);
    list.C_Finalize = Some(finalize);
    list.C_CloseSession = Some(close_session);
    list.C_CloseAllSessions = Some(close_all_sessions);
    list.C_DestroyObject = Some(destroy_object);
    list.C_Login = Some(login);
    list.C_SignInit = Some(sign_init);
    list.C_Sign = Some(sign);
    list.C_SignUpdate = Some(sign_update);
    list.C_SignFinal = Some(sign_final);
}

/// Every hooked call goes through here on its way to the real module.
fn pass(_function: &'static str, call: impl FnOnce(&CK_FUNCTION_LIST) -> Option<CK_RV>) -> CK_RV {
    real::list().and_then(call).unwrap_or(CKR_GENERAL_ERROR)
}

unsafe extern "C" fn login(session: CK_SESSION_HANDLE, user: CK_USER_TYPE, pin: *mut CK_UTF8CHAR, pin_len: CK_ULONG) -> CK_RV {
    book::login();
    // SAFETY: the caller's arguments, handed on.
    pass("C_Login", |real| Some(unsafe { real.C_Login?(session, user, pin, pin_len) }))
}

unsafe extern "C" fn sign_init(session: CK_SESSION_HANDLE, mechanism: *mut CK_MECHANISM, key: CK_OBJECT_HANDLE) -> CK_RV {
    // SAFETY: the caller's arguments, handed on.
    let rv = pass("C_SignInit", |real| Some(unsafe { real.C_SignInit?(session, mechanism, key) }));
    if rv == CKR_OK {
        book::begin(session, key, || real::key_id(session, key));
    }
    rv
}

unsafe extern "C" fn sign(
    session: CK_SESSION_HANDLE,
    data: *mut CK_BYTE,
    data_len: CK_ULONG,
    signature: *mut CK_BYTE,
    signature_len: *mut CK_ULONG,
) -> CK_RV {
    // SAFETY: the caller's arguments, handed on.
    let rv = pass("C_Sign", |real| Some(unsafe { real.C_Sign?(session, data, data_len, signature, signature_len) }));
    // A null buffer only asks for the length: nothing was signed.
    if rv == CKR_OK && !signature.is_null() {
        // SAFETY: the real module has just read these bytes.
        book::signed(session, unsafe { real::bytes(data, data_len) });
    }
    rv
}

unsafe extern "C" fn sign_update(session: CK_SESSION_HANDLE, part: *mut CK_BYTE, part_len: CK_ULONG) -> CK_RV {
    // SAFETY: the caller's arguments, handed on.
    let rv = pass("C_SignUpdate", |real| Some(unsafe { real.C_SignUpdate?(session, part, part_len) }));
    if rv == CKR_OK {
        // SAFETY: the real module has just read these bytes.
        book::part(session, unsafe { real::bytes(part, part_len) });
    }
    rv
}

unsafe extern "C" fn sign_final(session: CK_SESSION_HANDLE, signature: *mut CK_BYTE, signature_len: *mut CK_ULONG) -> CK_RV {
    // SAFETY: the caller's arguments, handed on.
    let rv = pass("C_SignFinal", |real| Some(unsafe { real.C_SignFinal?(session, signature, signature_len) }));
    if rv == CKR_OK && !signature.is_null() {
        book::signed(session, &[]);
    }
    rv
}

// Handles may name other things after these: what the book remembers of them is dropped.

unsafe extern "C" fn finalize(reserved: CK_VOID_PTR) -> CK_RV {
    book::forget();
    // SAFETY: the caller's arguments, handed on.
    pass("C_Finalize", |real| Some(unsafe { real.C_Finalize?(reserved) }))
}

unsafe extern "C" fn close_session(session: CK_SESSION_HANDLE) -> CK_RV {
    book::forget_session(session);
    // SAFETY: the caller's arguments, handed on.
    pass("C_CloseSession", |real| Some(unsafe { real.C_CloseSession?(session) }))
}

unsafe extern "C" fn close_all_sessions(slot: CK_SLOT_ID) -> CK_RV {
    book::forget();
    // SAFETY: the caller's arguments, handed on.
    pass("C_CloseAllSessions", |real| Some(unsafe { real.C_CloseAllSessions?(slot) }))
}

unsafe extern "C" fn destroy_object(session: CK_SESSION_HANDLE, object: CK_OBJECT_HANDLE) -> CK_RV {
    book::forget_key(object);
    // SAFETY: the caller's arguments, handed on.
    pass("C_DestroyObject", |real| Some(unsafe { real.C_DestroyObject?(session, object) }))
}

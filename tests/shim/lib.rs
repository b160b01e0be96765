//! A PKCS#11 module that stands before the real one: it keeps count, and it fails when it is told to.
//!
//! Owns: a copy of the real module's function list with its entries replaced. Promises: without faults every call reaches the
//! real module unchanged; each signature that the token made is one line in the log before the caller hears anything, also when
//! the answer is then lost or falsified, written by a single append, so a SIGKILL of the caller loses none; each hooked call
//! goes through [`pass`], so a fault can be put anywhere. Never: decides anything by itself.
//!
//! `KEYWARD_SHIM_MODULE` is the real module, `KEYWARD_SHIM_LOG` the log: `<hex CKA_ID> <hex signed data>` for a signature,
//! `login` for a C_Login (whatever came of it). `KEYWARD_SHIM_SOCKET` and `KEYWARD_SHIM_SCRIPT`: see `control.rs`.
#![allow(unsafe_code, reason = "PKCS#11 is a C interface")]
#![allow(non_snake_case, reason = "PKCS#11 names its functions")]

mod book;
mod control;
mod device;
mod faults;
mod functions;
mod memory;
mod real;

use cryptoki_sys::{
    CK_ATTRIBUTE, CK_BBOOL, CK_BYTE, CK_FLAGS, CK_FUNCTION_LIST, CK_INFO, CK_MECHANISM, CK_MECHANISM_INFO, CK_MECHANISM_TYPE,
    CK_NOTIFY, CK_OBJECT_HANDLE, CK_RV, CK_SESSION_HANDLE, CK_SESSION_INFO, CK_SLOT_ID, CK_SLOT_INFO, CK_TOKEN_INFO, CK_ULONG,
    CK_USER_TYPE, CK_UTF8CHAR, CK_VOID_PTR, CKR_ARGUMENTS_BAD, CKR_FUNCTION_NOT_SUPPORTED, CKR_GENERAL_ERROR,
    CKR_KEY_HANDLE_INVALID, CKR_OK, CKU_USER,
};

use functions::Function;

/// Hands out the hooked function list (PKCS#11 2.40 §5.4). A script that cannot be carried out is an error here.
///
/// # Safety
/// `list` is null or writable, as PKCS#11 asks.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn C_GetFunctionList(list: *mut *mut CK_FUNCTION_LIST) -> CK_RV {
    static STARTED: std::sync::OnceLock<bool> = std::sync::OnceLock::new();
    if list.is_null() {
        return CKR_ARGUMENTS_BAD;
    }
    let Some(hooked) = real::hooked(hook) else { return CKR_GENERAL_ERROR };
    if !STARTED.get_or_init(|| control::start().is_ok()) {
        return CKR_GENERAL_ERROR;
    }
    // SAFETY: checked to be non-null; the caller promises it is writable.
    unsafe { *list = hooked };
    CKR_OK
}

/// Every hooked call goes through here on its way to the real module.
fn pass(function: Function, call: impl FnOnce(&'static CK_FUNCTION_LIST) -> Option<CK_RV>) -> CK_RV {
    pass_answer(function, true, call, || {})
}

/// The same for a call that hands out a signature, or asks only for its length. `falsify` flips a bit of it.
fn pass_answer(
    function: Function,
    answers: bool,
    call: impl FnOnce(&'static CK_FUNCTION_LIST) -> Option<CK_RV>,
    falsify: impl FnOnce(),
) -> CK_RV {
    function.count();
    let real = || real::call(call).unwrap_or(CKR_FUNCTION_NOT_SUPPORTED);
    if !faults::is_armed() {
        return real();
    }
    let plan = faults::plan(function, answers);
    if plan.abort {
        std::process::abort();
    }
    if plan.hang {
        faults::park();
    }
    let _turn = (plan.in_turn && !plan.gone).then(faults::turn);
    if !plan.delay.is_zero() {
        faults::sleep(plan.delay);
    }
    // It may have gone meanwhile.
    if faults::is_gone() {
        // A library can be closed without its device; nothing else can be done.
        if function == Function::C_Finalize {
            real();
        }
        return function.without_device();
    }
    if let Some(code) = plan.before {
        return code;
    }
    let rv = real();
    if plan.corrupt && rv == CKR_OK {
        falsify();
    }
    plan.after.unwrap_or(rv)
}

/// Hooks that only hand on, and the list that names all hooks.
macro_rules! hooks {
    (ours { $($own:ident = $hook:ident;)* } theirs { $($name:ident($($argument:ident: $kind:ty),*);)* }) => {
        /// Which functions are ours.
        fn hook(list: &mut CK_FUNCTION_LIST) {
            list.C_GetFunctionList = Some(C_GetFunctionList);
            $(list.$own = Some($hook);)*
            $(list.$name = list.$name.and(Some(theirs::$name));)*
        }

        mod theirs {
            use super::*;

            $(pub unsafe extern "C" fn $name($($argument: $kind),*) -> CK_RV {
                // SAFETY: the caller's arguments, handed on.
                pass(Function::$name, |real| Some(unsafe { real.$name?($($argument),*) }))
            })*
        }
    };
}

hooks! {
    ours {
        C_Finalize = finalize;
        C_GetTokenInfo = get_token_info;
        C_OpenSession = open_session;
        C_CloseSession = close_session;
        C_CloseAllSessions = close_all_sessions;
        C_Login = login;
        C_CreateObject = create_object;
        C_DestroyObject = destroy_object;
        C_SignInit = sign_init;
        C_Sign = sign;
        C_SignUpdate = sign_update;
        C_SignFinal = sign_final;
        C_GenerateKey = generate_key;
        C_GenerateKeyPair = generate_key_pair;
        C_UnwrapKey = unwrap_key;
    }
    theirs {
        C_Initialize(arguments: CK_VOID_PTR);
        C_GetInfo(info: *mut CK_INFO);
        C_GetSlotList(present: CK_BBOOL, slots: *mut CK_SLOT_ID, count: *mut CK_ULONG);
        C_GetSlotInfo(slot: CK_SLOT_ID, info: *mut CK_SLOT_INFO);
        C_GetMechanismList(slot: CK_SLOT_ID, list: *mut CK_MECHANISM_TYPE, count: *mut CK_ULONG);
        C_GetMechanismInfo(slot: CK_SLOT_ID, kind: CK_MECHANISM_TYPE, info: *mut CK_MECHANISM_INFO);
        C_InitToken(slot: CK_SLOT_ID, pin: *mut CK_UTF8CHAR, pin_len: CK_ULONG, label: *mut CK_UTF8CHAR);
        C_InitPIN(session: CK_SESSION_HANDLE, pin: *mut CK_UTF8CHAR, pin_len: CK_ULONG);
        C_SetPIN(session: CK_SESSION_HANDLE, old: *mut CK_UTF8CHAR, old_len: CK_ULONG, new: *mut CK_UTF8CHAR, new_len: CK_ULONG);
        C_GetSessionInfo(session: CK_SESSION_HANDLE, info: *mut CK_SESSION_INFO);
        C_Logout(session: CK_SESSION_HANDLE);
        C_CopyObject(
            session: CK_SESSION_HANDLE, object: CK_OBJECT_HANDLE, template: *mut CK_ATTRIBUTE, count: CK_ULONG,
            copy: *mut CK_OBJECT_HANDLE
        );
        C_GetAttributeValue(
            session: CK_SESSION_HANDLE, object: CK_OBJECT_HANDLE, template: *mut CK_ATTRIBUTE, count: CK_ULONG
        );
        C_SetAttributeValue(
            session: CK_SESSION_HANDLE, object: CK_OBJECT_HANDLE, template: *mut CK_ATTRIBUTE, count: CK_ULONG
        );
        C_FindObjectsInit(session: CK_SESSION_HANDLE, template: *mut CK_ATTRIBUTE, count: CK_ULONG);
        C_FindObjects(session: CK_SESSION_HANDLE, objects: *mut CK_OBJECT_HANDLE, most: CK_ULONG, count: *mut CK_ULONG);
        C_FindObjectsFinal(session: CK_SESSION_HANDLE);
        C_EncryptInit(session: CK_SESSION_HANDLE, mechanism: *mut CK_MECHANISM, key: CK_OBJECT_HANDLE);
        C_Encrypt(session: CK_SESSION_HANDLE, data: *mut CK_BYTE, len: CK_ULONG, out: *mut CK_BYTE, out_len: *mut CK_ULONG);
        C_EncryptUpdate(session: CK_SESSION_HANDLE, data: *mut CK_BYTE, len: CK_ULONG, out: *mut CK_BYTE, out_len: *mut CK_ULONG);
        C_EncryptFinal(session: CK_SESSION_HANDLE, out: *mut CK_BYTE, out_len: *mut CK_ULONG);
        C_DecryptInit(session: CK_SESSION_HANDLE, mechanism: *mut CK_MECHANISM, key: CK_OBJECT_HANDLE);
        C_Decrypt(session: CK_SESSION_HANDLE, data: *mut CK_BYTE, len: CK_ULONG, out: *mut CK_BYTE, out_len: *mut CK_ULONG);
        C_DecryptUpdate(session: CK_SESSION_HANDLE, data: *mut CK_BYTE, len: CK_ULONG, out: *mut CK_BYTE, out_len: *mut CK_ULONG);
        C_DecryptFinal(session: CK_SESSION_HANDLE, out: *mut CK_BYTE, out_len: *mut CK_ULONG);
        C_DigestInit(session: CK_SESSION_HANDLE, mechanism: *mut CK_MECHANISM);
        C_Digest(session: CK_SESSION_HANDLE, data: *mut CK_BYTE, len: CK_ULONG, out: *mut CK_BYTE, out_len: *mut CK_ULONG);
        C_DigestUpdate(session: CK_SESSION_HANDLE, data: *mut CK_BYTE, len: CK_ULONG);
        C_DigestKey(session: CK_SESSION_HANDLE, key: CK_OBJECT_HANDLE);
        C_DigestFinal(session: CK_SESSION_HANDLE, out: *mut CK_BYTE, out_len: *mut CK_ULONG);
        C_VerifyInit(session: CK_SESSION_HANDLE, mechanism: *mut CK_MECHANISM, key: CK_OBJECT_HANDLE);
        C_Verify(session: CK_SESSION_HANDLE, data: *mut CK_BYTE, len: CK_ULONG, signature: *mut CK_BYTE, signature_len: CK_ULONG);
        C_VerifyUpdate(session: CK_SESSION_HANDLE, data: *mut CK_BYTE, len: CK_ULONG);
        C_VerifyFinal(session: CK_SESSION_HANDLE, signature: *mut CK_BYTE, signature_len: CK_ULONG);
        C_WrapKey(
            session: CK_SESSION_HANDLE, mechanism: *mut CK_MECHANISM, by: CK_OBJECT_HANDLE, key: CK_OBJECT_HANDLE,
            wrapped: *mut CK_BYTE, wrapped_len: *mut CK_ULONG
        );
        C_DeriveKey(
            session: CK_SESSION_HANDLE, mechanism: *mut CK_MECHANISM, from: CK_OBJECT_HANDLE, template: *mut CK_ATTRIBUTE,
            count: CK_ULONG, key: *mut CK_OBJECT_HANDLE
        );
        C_SeedRandom(session: CK_SESSION_HANDLE, seed: *mut CK_BYTE, len: CK_ULONG);
        C_GenerateRandom(session: CK_SESSION_HANDLE, random: *mut CK_BYTE, len: CK_ULONG);
    }
}

// --- logging in and signing ------------------------------------------------------------------------------------------------

unsafe extern "C" fn login(session: CK_SESSION_HANDLE, user: CK_USER_TYPE, pin: *mut CK_UTF8CHAR, pin_len: CK_ULONG) -> CK_RV {
    book::login();
    pass(Function::C_Login, |real| {
        let mut real_pin = device::real_pin();
        let (pin, pin_len) =
            real_pin.as_mut().map_or((pin, pin_len), |real| (real.as_mut_ptr(), CK_ULONG::try_from(real.len()).unwrap_or(0)));
        // SAFETY: the caller's arguments, handed on, or another PIN that lives as long as the call.
        let log_in = || Some(unsafe { real.C_Login?(session, user, pin, pin_len) });
        if user == CKU_USER { device::log_in(session, log_in) } else { log_in() }
    })
}

unsafe extern "C" fn sign_init(session: CK_SESSION_HANDLE, mechanism: *mut CK_MECHANISM, key: CK_OBJECT_HANDLE) -> CK_RV {
    pass(Function::C_SignInit, |real| {
        let mut key = key;
        if faults::remaps() {
            faults::injected(1);
            let Some(other) = real::another_key(real, session, key) else { return Some(CKR_KEY_HANDLE_INVALID) };
            key = other;
        }
        // SAFETY: the caller's arguments, handed on.
        let rv = unsafe { real.C_SignInit?(session, mechanism, key) };
        if rv == CKR_OK {
            book::begin(session, key, || real::key_id(real, session, key));
        }
        Some(rv)
    })
}

unsafe extern "C" fn sign(
    session: CK_SESSION_HANDLE,
    data: *mut CK_BYTE,
    data_len: CK_ULONG,
    signature: *mut CK_BYTE,
    signature_len: *mut CK_ULONG,
) -> CK_RV {
    // A null buffer only asks for the length: nothing is signed.
    let signs = !signature.is_null();
    let call = |real: &'static CK_FUNCTION_LIST| {
        // SAFETY: the caller's arguments, handed on.
        let rv = unsafe { real.C_Sign?(session, data, data_len, signature, signature_len) };
        if rv == CKR_OK && signs {
            // SAFETY: the real module has just read these bytes.
            book::signed(session, unsafe { real::bytes(data, data_len) });
        }
        Some(rv)
    };
    // SAFETY: the real module has just written these bytes.
    pass_answer(Function::C_Sign, signs, call, || unsafe { real::flip(signature, signature_len) })
}

unsafe extern "C" fn sign_update(session: CK_SESSION_HANDLE, part: *mut CK_BYTE, part_len: CK_ULONG) -> CK_RV {
    pass(Function::C_SignUpdate, |real| {
        // SAFETY: the caller's arguments, handed on.
        let rv = unsafe { real.C_SignUpdate?(session, part, part_len) };
        if rv == CKR_OK {
            // SAFETY: the real module has just read these bytes.
            book::part(session, unsafe { real::bytes(part, part_len) });
        }
        Some(rv)
    })
}

unsafe extern "C" fn sign_final(session: CK_SESSION_HANDLE, signature: *mut CK_BYTE, signature_len: *mut CK_ULONG) -> CK_RV {
    let signs = !signature.is_null();
    let call = |real: &'static CK_FUNCTION_LIST| {
        // SAFETY: the caller's arguments, handed on.
        let rv = unsafe { real.C_SignFinal?(session, signature, signature_len) };
        if rv == CKR_OK && signs {
            book::signed(session, &[]);
        }
        Some(rv)
    };
    // SAFETY: the real module has just written these bytes.
    pass_answer(Function::C_SignFinal, signs, call, || unsafe { real::flip(signature, signature_len) })
}

// --- sessions and objects: handles may name other things afterwards, so what the book remembers of them is dropped ------------

unsafe extern "C" fn finalize(reserved: CK_VOID_PTR) -> CK_RV {
    pass(Function::C_Finalize, |real| {
        book::forget();
        device::closed_all(None);
        // SAFETY: the caller's arguments, handed on.
        Some(unsafe { real.C_Finalize?(reserved) })
    })
}

unsafe extern "C" fn get_token_info(slot: CK_SLOT_ID, info: *mut CK_TOKEN_INFO) -> CK_RV {
    pass(Function::C_GetTokenInfo, |real| {
        // SAFETY: the caller's arguments, handed on.
        let rv = unsafe { real.C_GetTokenInfo?(slot, info) };
        if rv == CKR_OK {
            // SAFETY: the real module has just written it.
            device::describe(slot, unsafe { &mut *info });
        }
        Some(rv)
    })
}

unsafe extern "C" fn open_session(
    slot: CK_SLOT_ID,
    flags: CK_FLAGS,
    application: CK_VOID_PTR,
    notify: CK_NOTIFY,
    session: *mut CK_SESSION_HANDLE,
) -> CK_RV {
    pass(Function::C_OpenSession, |real| {
        let open = || {
            // SAFETY: the caller's arguments, handed on.
            Some(unsafe { real.C_OpenSession?(slot, flags, application, notify, session) })
        };
        device::open_session(slot, flags, session, open)
    })
}

unsafe extern "C" fn close_session(session: CK_SESSION_HANDLE) -> CK_RV {
    pass(Function::C_CloseSession, |real| {
        book::forget_session(session);
        device::closed(session);
        // SAFETY: the caller's arguments, handed on.
        Some(unsafe { real.C_CloseSession?(session) })
    })
}

unsafe extern "C" fn close_all_sessions(slot: CK_SLOT_ID) -> CK_RV {
    pass(Function::C_CloseAllSessions, |real| {
        book::forget();
        device::closed_all(Some(slot));
        // SAFETY: the caller's arguments, handed on.
        Some(unsafe { real.C_CloseAllSessions?(slot) })
    })
}

unsafe extern "C" fn destroy_object(session: CK_SESSION_HANDLE, object: CK_OBJECT_HANDLE) -> CK_RV {
    pass(Function::C_DestroyObject, |real| {
        book::forget_key(object);
        // SAFETY: the caller's arguments, handed on.
        Some(unsafe { real.C_DestroyObject?(session, object) })
    })
}

unsafe extern "C" fn create_object(
    session: CK_SESSION_HANDLE,
    template: *mut CK_ATTRIBUTE,
    count: CK_ULONG,
    object: *mut CK_OBJECT_HANDLE,
) -> CK_RV {
    pass(Function::C_CreateObject, |real| {
        // SAFETY: the caller's template.
        let refused = device::refuses(real, session, unsafe { device::template(template, count) });
        // SAFETY: the caller's arguments, handed on.
        refused.or_else(|| Some(unsafe { real.C_CreateObject?(session, template, count, object) }))
    })
}

unsafe extern "C" fn generate_key(
    session: CK_SESSION_HANDLE,
    mechanism: *mut CK_MECHANISM,
    template: *mut CK_ATTRIBUTE,
    count: CK_ULONG,
    key: *mut CK_OBJECT_HANDLE,
) -> CK_RV {
    pass(Function::C_GenerateKey, |real| {
        // SAFETY: the caller's template.
        let refused = device::refuses(real, session, unsafe { device::template(template, count) });
        // SAFETY: the caller's arguments, handed on.
        refused.or_else(|| Some(unsafe { real.C_GenerateKey?(session, mechanism, template, count, key) }))
    })
}

#[allow(clippy::too_many_arguments, reason = "as PKCS#11 has it")]
unsafe extern "C" fn generate_key_pair(
    session: CK_SESSION_HANDLE,
    mechanism: *mut CK_MECHANISM,
    public: *mut CK_ATTRIBUTE,
    public_count: CK_ULONG,
    private: *mut CK_ATTRIBUTE,
    private_count: CK_ULONG,
    public_key: *mut CK_OBJECT_HANDLE,
    private_key: *mut CK_OBJECT_HANDLE,
) -> CK_RV {
    pass(Function::C_GenerateKeyPair, |real| {
        let halves = [(public, public_count), (private, private_count)];
        // SAFETY: the caller's templates.
        let mut templates = halves.map(|(template, count)| unsafe { device::template(template, count) }).into_iter();
        let refused = templates.find_map(|template| device::refuses(real, session, template));
        refused.or_else(|| {
            let generate = real.C_GenerateKeyPair?;
            // SAFETY: the caller's arguments, handed on.
            Some(unsafe { generate(session, mechanism, public, public_count, private, private_count, public_key, private_key) })
        })
    })
}

#[allow(clippy::too_many_arguments, reason = "as PKCS#11 has it")]
unsafe extern "C" fn unwrap_key(
    session: CK_SESSION_HANDLE,
    mechanism: *mut CK_MECHANISM,
    by: CK_OBJECT_HANDLE,
    wrapped: *mut CK_BYTE,
    wrapped_len: CK_ULONG,
    template: *mut CK_ATTRIBUTE,
    count: CK_ULONG,
    key: *mut CK_OBJECT_HANDLE,
) -> CK_RV {
    pass(Function::C_UnwrapKey, |real| {
        // SAFETY: the caller's template.
        let refused = device::refuses(real, session, unsafe { device::template(template, count) });
        // SAFETY: the caller's arguments, handed on.
        refused.or_else(|| {
            let unwrap = real.C_UnwrapKey?;
            // SAFETY: the caller's arguments, handed on.
            Some(unsafe { unwrap(session, mechanism, by, wrapped, wrapped_len, template, count, key) })
        })
    })
}

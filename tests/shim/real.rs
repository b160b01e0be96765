//! The real module: loaded once, never unloaded.

use std::ptr::addr_of_mut;
use std::sync::OnceLock;

use cryptoki_sys::{
    CK_ATTRIBUTE, CK_BYTE, CK_C_GetFunctionList, CK_FUNCTION_LIST, CK_OBJECT_HANDLE, CK_SESSION_HANDLE, CK_ULONG, CKA_ID, CKR_OK,
};

struct Module {
    real: &'static CK_FUNCTION_LIST,
    hooked: *mut CK_FUNCTION_LIST,
}

// SAFETY: both lists are written before they are shared, and only read afterwards; the functions in them are thread-safe
// as far as the real module's are (PKCS#11 §5.6.1, CKF_OS_LOCKING_OK).
unsafe impl Send for Module {}
// SAFETY: as above.
unsafe impl Sync for Module {}

static MODULE: OnceLock<Option<Module>> = OnceLock::new();

/// The list for the caller, made at the first call.
pub fn hooked(hook: fn(&mut CK_FUNCTION_LIST)) -> Option<*mut CK_FUNCTION_LIST> {
    MODULE.get_or_init(|| load(hook)).as_ref().map(|module| module.hooked)
}

/// The real list.
pub fn list() -> Option<&'static CK_FUNCTION_LIST> {
    MODULE.get()?.as_ref().map(|module| module.real)
}

fn load(hook: fn(&mut CK_FUNCTION_LIST)) -> Option<Module> {
    let path = std::env::var_os("KEYWARD_SHIM_MODULE")?;
    // SAFETY: loading runs the constructors of the module that the test named.
    let library = Box::leak(Box::new(unsafe { libloading::Library::new(path) }.ok()?));
    // SAFETY: the type is the one PKCS#11 gives this symbol.
    let get = unsafe { library.get::<CK_C_GetFunctionList>(b"C_GetFunctionList\0") }.ok()?;
    let mut list = std::ptr::null_mut();
    // SAFETY: a writable pointer, as the function asks.
    if unsafe { (*get)?(&raw mut list) } != CKR_OK || list.is_null() {
        return None;
    }
    // SAFETY: the module keeps its list for as long as it is loaded, which is for ever.
    let real: &'static CK_FUNCTION_LIST = unsafe { &*list };
    let copy = Box::leak(Box::new(*real));
    hook(copy);
    Some(Module { real, hooked: addr_of_mut!(*copy) })
}

/// CKA_ID of a key, empty if it has none.
pub fn key_id(session: CK_SESSION_HANDLE, key: CK_OBJECT_HANDLE) -> Vec<u8> {
    let mut id = [0_u8; 64];
    let mut wanted = CK_ATTRIBUTE { type_: CKA_ID, pValue: id.as_mut_ptr().cast(), ulValueLen: 64 };
    let Some(get) = list().and_then(|real| real.C_GetAttributeValue) else { return Vec::new() };
    // SAFETY: one attribute, whose buffer is as long as it says.
    let rv = unsafe { get(session, key, &raw mut wanted, 1) };
    let length = usize::try_from(wanted.ulValueLen).unwrap_or(usize::MAX);
    if rv == CKR_OK { id.get(..length).unwrap_or_default().to_vec() } else { Vec::new() }
}

/// The bytes of a caller's buffer.
///
/// # Safety
/// `data` is null or readable for `length` bytes while the result lives.
pub unsafe fn bytes<'a>(data: *const CK_BYTE, length: CK_ULONG) -> &'a [u8] {
    if data.is_null() {
        return &[];
    }
    // SAFETY: the caller's promise.
    unsafe { std::slice::from_raw_parts(data, usize::try_from(length).unwrap_or_default()) }
}

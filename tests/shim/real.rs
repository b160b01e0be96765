//! The real module: loaded once, never unloaded; and who is inside it.

use std::ptr::addr_of_mut;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use cryptoki_sys::{
    CK_ATTRIBUTE, CK_BYTE, CK_C_GetFunctionList, CK_FUNCTION_LIST, CK_OBJECT_HANDLE, CK_SESSION_HANDLE, CK_ULONG, CKA_CLASS,
    CKA_ID, CKA_KEY_TYPE, CKA_SIGN, CKO_PRIVATE_KEY, CKR_OK,
};

/// How long all calls may take to come out of the module.
const COME_OUT: Duration = Duration::from_secs(5);
/// Objects that a search looks at.
const FOUND_MAX: usize = 256;

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
fn list() -> Option<&'static CK_FUNCTION_LIST> {
    MODULE.get()?.as_ref().map(|module| module.real)
}

/// Calls that are inside.
static INSIDE: AtomicUsize = AtomicUsize::new(0);
/// Whether nobody may go in.
static CLOSED: AtomicBool = AtomicBool::new(false);
/// Held while it is closed.
static CLOSER: Mutex<()> = Mutex::new(());

struct Inside;

impl Drop for Inside {
    fn drop(&mut self) {
        INSIDE.fetch_sub(1, Ordering::SeqCst);
    }
}

/// A call of the real module; `None` if there is none, or if it lacks the function.
pub fn call<R>(call: impl FnOnce(&'static CK_FUNCTION_LIST) -> Option<R>) -> Option<R> {
    let real = list()?;
    loop {
        INSIDE.fetch_add(1, Ordering::SeqCst);
        let inside = Inside;
        // Counted before asked: whoever closes sees this call, or this call sees that it is closed.
        if !CLOSED.load(Ordering::SeqCst) {
            return call(real);
        }
        drop(inside);
        drop(CLOSER.lock().unwrap_or_else(PoisonError::into_inner));
    }
}

/// Something that no call may be inside for.
pub fn alone<R>(work: impl FnOnce(&'static CK_FUNCTION_LIST) -> Result<R, String>) -> Result<R, String> {
    struct Opens;
    impl Drop for Opens {
        fn drop(&mut self) {
            CLOSED.store(false, Ordering::SeqCst);
        }
    }
    let real = list().ok_or("no module")?;
    let _closer = CLOSER.lock().unwrap_or_else(PoisonError::into_inner);
    CLOSED.store(true, Ordering::SeqCst);
    let _opens = Opens;
    let until = Instant::now() + COME_OUT;
    while INSIDE.load(Ordering::SeqCst) > 0 {
        if Instant::now() >= until {
            return Err(format!("a call is inside the module for {COME_OUT:?}"));
        }
        std::thread::yield_now();
    }
    work(real)
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
pub fn key_id(real: &CK_FUNCTION_LIST, session: CK_SESSION_HANDLE, key: CK_OBJECT_HANDLE) -> Vec<u8> {
    let mut id = [0_u8; 64];
    let mut wanted = CK_ATTRIBUTE { type_: CKA_ID, pValue: id.as_mut_ptr().cast(), ulValueLen: 64 };
    let Some(get) = real.C_GetAttributeValue else { return Vec::new() };
    // SAFETY: one attribute, whose buffer is as long as it says.
    let rv = unsafe { get(session, key, &raw mut wanted, 1) };
    let length = usize::try_from(wanted.ulValueLen).unwrap_or(usize::MAX);
    if rv == CKR_OK { id.get(..length).unwrap_or_default().to_vec() } else { Vec::new() }
}

/// Another private key of the token that signs with the same mechanism.
pub fn another_key(real: &CK_FUNCTION_LIST, session: CK_SESSION_HANDLE, key: CK_OBJECT_HANDLE) -> Option<CK_OBJECT_HANDLE> {
    let (mut class, mut kind, mut yes): (CK_ULONG, CK_ULONG, u8) = (CKO_PRIVATE_KEY, 0, 1);
    let long = |type_, value: &mut CK_ULONG| CK_ATTRIBUTE {
        type_,
        pValue: std::ptr::from_mut(value).cast(),
        ulValueLen: size_of::<CK_ULONG>() as CK_ULONG,
    };
    let mut wanted = long(CKA_KEY_TYPE, &mut kind);
    // SAFETY: one attribute, whose buffer is as long as it says.
    if unsafe { real.C_GetAttributeValue?(session, key, &raw mut wanted, 1) } != CKR_OK {
        return None;
    }
    let signs = CK_ATTRIBUTE { type_: CKA_SIGN, pValue: std::ptr::from_mut(&mut yes).cast(), ulValueLen: 1 };
    let alike = [long(CKA_CLASS, &mut class), long(CKA_KEY_TYPE, &mut kind), signs];
    find(real, session, &alike).into_iter().find(|other| *other != key)
}

/// Objects that fit. The session must not be searching.
pub fn find(real: &CK_FUNCTION_LIST, session: CK_SESSION_HANDLE, template: &[CK_ATTRIBUTE]) -> Vec<CK_OBJECT_HANDLE> {
    let (Some(init), Some(next), Some(end)) = (real.C_FindObjectsInit, real.C_FindObjects, real.C_FindObjectsFinal) else {
        return Vec::new();
    };
    let mut found: Vec<CK_OBJECT_HANDLE> = vec![0; FOUND_MAX];
    let mut count: CK_ULONG = 0;
    let mut template = template.to_vec();
    // SAFETY: the template and the buffer are as long as is said; a search that began is ended.
    let rv = unsafe {
        if init(session, template.as_mut_ptr(), template.len() as CK_ULONG) != CKR_OK {
            return Vec::new();
        }
        let rv = next(session, found.as_mut_ptr(), FOUND_MAX as CK_ULONG, &raw mut count);
        end(session);
        rv
    };
    found.truncate(if rv == CKR_OK { usize::try_from(count).unwrap_or_default() } else { 0 });
    found
}

/// Flips a bit of an answer.
///
/// # Safety
/// `bytes` is writable for `length` bytes.
pub unsafe fn flip(bytes: *mut CK_BYTE, length: *const CK_ULONG) {
    // SAFETY: the caller's promise.
    unsafe {
        let middle = usize::try_from(*length).unwrap_or_default() / 2;
        if *length > 0 {
            *bytes.add(middle) ^= 1;
        }
    }
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

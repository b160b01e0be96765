//! What was signed and how often somebody logged in, one line each.

use std::collections::HashMap;
use std::fs::{File, OpenOptions};
use std::io::Write as _;
use std::sync::{LazyLock, Mutex, MutexGuard, OnceLock, PoisonError};

use cryptoki_sys::{CK_OBJECT_HANDLE, CK_SESSION_HANDLE};

/// What a session is signing with, and the parts it was given so far.
struct Signing {
    key: CK_OBJECT_HANDLE,
    id: Vec<u8>,
    parts: Vec<u8>,
}

static SIGNING: LazyLock<Mutex<HashMap<CK_SESSION_HANDLE, Signing>>> = LazyLock::new(Mutex::default);
static LOG: OnceLock<Option<File>> = OnceLock::new();

fn signing() -> MutexGuard<'static, HashMap<CK_SESSION_HANDLE, Signing>> {
    SIGNING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// A C_Login is about to be tried.
pub fn login() {
    append("login\n");
}

/// A session starts to sign with `key`; its id is asked for only if the session used another key before.
pub fn begin(session: CK_SESSION_HANDLE, key: CK_OBJECT_HANDLE, id: impl FnOnce() -> Vec<u8>) {
    if let Some(known) = signing().get_mut(&session).filter(|known| known.key == key) {
        known.parts.clear();
        return;
    }
    let id = id();
    signing().insert(session, Signing { key, id, parts: Vec::new() });
}

/// A part of what will be signed.
pub fn part(session: CK_SESSION_HANDLE, data: &[u8]) {
    if let Some(known) = signing().get_mut(&session) {
        known.parts.extend_from_slice(data);
    }
}

/// A signature over the parts and `data` was made. The line is in the file before the caller has the signature.
pub fn signed(session: CK_SESSION_HANDLE, data: &[u8]) {
    let mut line = String::with_capacity(256);
    if let Some(known) = signing().get_mut(&session) {
        hex(&mut line, &known.id);
        line.push(' ');
        hex(&mut line, &known.parts);
        known.parts.clear();
    } else {
        line.push_str("? ");
    }
    hex(&mut line, data);
    line.push('\n');
    append(&line);
}

/// Sessions and keys were lost as a whole.
pub fn forget() {
    signing().clear();
}

/// A session is closed.
pub fn forget_session(session: CK_SESSION_HANDLE) {
    signing().remove(&session);
}

/// A key is destroyed.
pub fn forget_key(key: CK_OBJECT_HANDLE) {
    signing().retain(|_, known| known.key != key);
}

/// One write for one line: appends of several threads and processes do not mix.
fn append(line: &str) {
    let log = LOG.get_or_init(|| {
        let path = std::env::var_os("KEYWARD_SHIM_LOG")?;
        OpenOptions::new().create(true).append(true).open(path).ok()
    });
    if let Some(mut log) = log.as_ref() {
        let _ = log.write_all(line.as_bytes());
    }
}

fn hex(text: &mut String, bytes: &[u8]) {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    for byte in bytes {
        text.extend([byte >> 4, byte & 15].map(|half| char::from(DIGITS[usize::from(half)])));
    }
}

//! Which descriptors are of the state directory, and what was written through them since the last sync.

use std::collections::HashMap;
use std::fs::{self, File};
use std::mem::ManuallyDrop;
use std::os::fd::FromRawFd;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{LazyLock, Mutex, MutexGuard, PoisonError};

use libc::c_int;

use crate::control::inside;
use crate::shadow::Key;

/// Descriptors above this are not watched; the daemon's limit is lower.
const DESCRIPTORS: usize = 65_536;
/// Beyond this many separate ranges the whole file is copied.
const RANGES_MAX: usize = 4_096;

const UNKNOWN: u8 = 0;
const OTHER: u8 = 1;
const STATE: u8 = 2;

static KINDS: [AtomicU8; DESCRIPTORS] = [const { AtomicU8::new(UNKNOWN) }; DESCRIPTORS];
static ROOT: LazyLock<Option<PathBuf>> = LazyLock::new(|| std::env::var_os("KEYWARD_PRELOAD_STATE").map(PathBuf::from));

/// What was written to a file since its last sync.
pub enum Unsynced {
    /// Not known (first seen, or changed in a way that is not followed): all of it.
    Whole,
    /// `from..to`, growing by joining neighbours.
    Ranges(Vec<(u64, u64)>),
}

#[derive(Default)]
struct Watched {
    keys: HashMap<c_int, Key>,
    unsynced: HashMap<Key, Unsynced>,
}

static WATCHED: LazyLock<Mutex<Watched>> = LazyLock::new(Mutex::default);

fn watched() -> MutexGuard<'static, Watched> {
    WATCHED.lock().unwrap_or_else(PoisonError::into_inner)
}

fn kind(fd: c_int) -> Option<&'static AtomicU8> {
    KINDS.get(usize::try_from(fd).ok()?)
}

/// Whether a descriptor is of a file or directory at or below the state directory.
pub fn is_state(fd: c_int) -> bool {
    let Some(kind) = kind(fd) else { return false };
    match kind.load(Ordering::Relaxed) {
        STATE => true,
        OTHER => false,
        _ => inside(|| classify(fd, kind)).unwrap_or(false),
    }
}

fn classify(fd: c_int, kind: &AtomicU8) -> bool {
    let ours =
        ROOT.as_ref().is_some_and(|root| fs::read_link(format!("/proc/self/fd/{fd}")).is_ok_and(|path| path.starts_with(root)));
    if ours && let Some(key) = key_of(fd) {
        watched().keys.insert(fd, key);
    }
    kind.store(if ours { STATE } else { OTHER }, Ordering::Relaxed);
    ours
}

fn key_of(fd: c_int) -> Option<Key> {
    borrowed(fd).metadata().ok().map(|meta| Key::of(&meta))
}

/// The caller's file. Never closed by us: closing any descriptor of a file drops the process's locks on it, SQLite's too.
pub fn borrowed(fd: c_int) -> ManuallyDrop<File> {
    // SAFETY: the descriptor is open while its caller is in the call we stand in, and it is not closed here.
    ManuallyDrop::new(unsafe { File::from_raw_fd(fd) })
}

/// A descriptor was handed out: it may have been another file's before.
pub fn opened(fd: c_int) -> c_int {
    forget(fd);
    fd
}

/// A descriptor is closed.
pub fn forget(fd: c_int) {
    if let Some(kind) = kind(fd) {
        kind.store(UNKNOWN, Ordering::Relaxed);
    }
}

/// `from..to` of a state file was written.
pub fn wrote(fd: c_int, from: u64, to: u64) {
    let mut watched = watched();
    let Some(key) = watched.keys.get(&fd).cloned() else { return };
    let unsynced = watched.unsynced.entry(key).or_insert(Unsynced::Whole);
    if let Unsynced::Ranges(ranges) = unsynced {
        let full = ranges.len() >= RANGES_MAX;
        match ranges.last_mut() {
            Some(last) if last.1 == from => last.1 = to,
            Some(last) if last.0 <= from && to <= last.1 => {}
            _ if full => *unsynced = Unsynced::Whole,
            _ => ranges.push((from, to)),
        }
    }
}

/// A file was changed in a way that is not followed byte by byte.
pub fn rewritten(fd: c_int) {
    if is_state(fd) {
        inside(|| rewritten_inside(fd));
    }
}

/// The same for what is known to be a state file. Call inside.
pub fn rewritten_inside(fd: c_int) {
    let mut watched = watched();
    if let Some(key) = watched.keys.get(&fd).cloned() {
        watched.unsynced.insert(key, Unsynced::Whole);
    }
}

/// Whether a path is below the state directory.
pub fn is_below(path: &Path) -> bool {
    ROOT.as_ref().is_some_and(|root| path.starts_with(root))
}

/// Takes what is unsynced of a state file, for a sync that begins.
pub fn take(fd: c_int) -> Option<(Key, Unsynced)> {
    let mut watched = watched();
    let key = watched.keys.get(&fd)?.clone();
    let unsynced = watched.unsynced.insert(key.clone(), Unsynced::Ranges(Vec::new())).unwrap_or(Unsynced::Whole);
    Some((key, unsynced))
}

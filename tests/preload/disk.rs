//! Writing, truncating, removing and syncing state files, on a disk that may be full, broken, or lose its power.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{LazyLock, Mutex, PoisonError};

use libc::{c_char, c_int, off_t, size_t, ssize_t};

use crate::control::{self, Control, Fsync, inside};
use crate::shadow::{Key, Shadow};
use crate::watch::{self, Unsynced, borrowed, is_state};
use crate::{fail, system_call};

/// Bytes that were given up since the disk became full, by control version.
static FREE: AtomicI64 = AtomicI64::new(0);
static FREE_VERSION: AtomicU64 = AtomicU64::new(0);
/// Syncs counted and failures spent since the control file's version.
static SYNCS: Mutex<(u64, u64, bool)> = Mutex::new((0, 0, false));
/// One sync at a time: when it returns, the shadow has its bytes.
static SYNCING: Mutex<()> = Mutex::new(());
static SHADOW: LazyLock<Option<Shadow>> =
    LazyLock::new(|| std::env::var_os("KEYWARD_PRELOAD_SHADOW").and_then(|path| Shadow::at(Path::new(&path)).ok()));

/// A write of `count` bytes at `at`, or at the descriptor's own position.
pub fn write(fd: c_int, at: Option<off_t>, count: size_t, real: impl FnOnce() -> ssize_t) -> ssize_t {
    if !is_state(fd) {
        return real();
    }
    let end = |from: u64| from.saturating_add(count as u64);
    let start = inside(|| {
        let from = at.map_or_else(|| position(fd), |at| u64::try_from(at).unwrap_or_default());
        (from, has_room(fd, end(from)))
    });
    let Some((from, has_room)) = start else { return real() };
    if !has_room {
        return fail(libc::ENOSPC) as ssize_t;
    }
    let done = real();
    if let Ok(done) = u64::try_from(done) {
        inside(|| watch::wrote(fd, from, from + done));
    }
    done
}

/// Space is set aside.
pub fn allocate(fd: c_int, at: off_t, length: off_t, real: impl FnOnce() -> c_int) -> c_int {
    let end = u64::try_from(at.saturating_add(length)).unwrap_or_default();
    if is_state(fd) && inside(|| has_room(fd, end)) == Some(false) {
        return fail(libc::ENOSPC);
    }
    let done = real();
    watch::rewritten(fd);
    done
}

/// A file is cut or grown (without taking space).
pub fn truncate(fd: c_int, real: impl FnOnce() -> c_int) -> c_int {
    if !is_state(fd) {
        return real();
    }
    let space = || borrowed(fd).metadata().map_or(0, |meta| meta.blocks() * 512);
    let before = inside(space).unwrap_or_default();
    let done = real();
    inside(|| {
        give_up(before.saturating_sub(space()));
        // Bytes cut off and grown again are zeroes, which no range tells of.
        watch::rewritten_inside(fd);
    });
    done
}

/// A name goes; so does its file, if that was the last one.
pub fn unlink(path: *const c_char, real: impl FnOnce() -> c_int) -> c_int {
    let space = inside(|| {
        // SAFETY: a string that ends with a zero byte, as the caller must give.
        let path = PathBuf::from(unsafe { CStr::from_ptr(path) }.to_string_lossy().into_owned());
        let meta = fs::symlink_metadata(&path).ok().filter(|meta| meta.is_file() && meta.nlink() == 1)?;
        watch::is_below(&path).then(|| meta.blocks() * 512)
    });
    let done = real();
    if let (0, Some(Some(space))) = (done, space) {
        inside(|| give_up(space));
    }
    done
}

/// fsync or fdatasync: the moment at which bytes and names begin to survive.
pub fn sync(fd: c_int, real: impl FnOnce() -> c_int) -> c_int {
    if !is_state(fd) {
        return real();
    }
    let Some(plan) = inside(|| plan(control::read())) else { return real() };
    if plan.kill_before {
        die();
    }
    if plan.fail {
        // As Linux does it: the pages count as clean from here on, so a second fsync succeeds without them.
        inside(|| watch::take(fd));
        return fail(libc::EIO);
    }
    let syncing = SYNCING.lock().unwrap_or_else(PoisonError::into_inner);
    let taken = inside(|| watch::take(fd)).flatten();
    let done = real();
    if done == 0
        && let Some((key, unsynced)) = taken
    {
        inside(|| keep(fd, &key, &unsynced));
    }
    drop(syncing);
    if plan.kill_after {
        die();
    }
    done
}

fn keep(fd: c_int, key: &Key, unsynced: &Unsynced) {
    let Some(shadow) = SHADOW.as_ref() else { return };
    let through = PathBuf::from(format!("/proc/self/fd/{fd}"));
    let file = borrowed(fd);
    let kept = if file.metadata().is_ok_and(|meta| meta.is_dir()) {
        shadow.keep_names(key, &through)
    } else if write_only(fd) {
        // To read it, it is opened (and closed) once more: SQLite's files never are, they are opened for both.
        File::open(through).and_then(|file| keep_bytes(shadow, key, &file, unsynced))
    } else {
        keep_bytes(shadow, key, &file, unsynced)
    };
    if kept.is_err() {
        // A shadow that lies would make tests pass or fail for nothing.
        std::process::abort();
    }
}

fn keep_bytes(shadow: &Shadow, key: &Key, file: &File, unsynced: &Unsynced) -> io::Result<()> {
    match unsynced {
        Unsynced::Whole => shadow.keep_whole(key, file),
        Unsynced::Ranges(ranges) => shadow.keep_ranges(key, file, ranges),
    }
}

struct Plan {
    fail: bool,
    kill_before: bool,
    kill_after: bool,
}

fn plan(control: Control) -> Plan {
    let mut counted = SYNCS.lock().unwrap_or_else(PoisonError::into_inner);
    if counted.0 != control.version {
        *counted = (control.version, 0, false);
    }
    counted.1 += 1;
    let fail = control.fsync == Fsync::Fails || (control.fsync == Fsync::FailsOnce && !counted.2);
    counted.2 |= fail;
    Plan { fail, kill_before: counted.1 == control.kill_before_sync, kill_after: counted.1 == control.kill_after_sync }
}

fn die() {
    // SAFETY: ends this process, which is what the test asked for.
    unsafe { libc::kill(libc::getpid(), libc::SIGKILL) };
}

/// Whether a state file may grow to `end`.
fn has_room(fd: c_int, end: u64) -> bool {
    let control = control::read();
    if !control.disk_full {
        return true;
    }
    if FREE_VERSION.swap(control.version, Ordering::Relaxed) != control.version {
        FREE.store(0, Ordering::Relaxed);
    }
    let size = borrowed(fd).metadata().map_or(0, |meta| meta.len());
    let wanted = i64::try_from(end.saturating_sub(size)).unwrap_or(i64::MAX);
    wanted == 0 || FREE.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |free| (free >= wanted).then(|| free - wanted)).is_ok()
}

fn give_up(bytes: u64) {
    FREE.fetch_add(i64::try_from(bytes).unwrap_or_default(), Ordering::Relaxed);
}

/// Where the next write(2) goes.
fn position(fd: c_int) -> u64 {
    // SAFETY: asks for flags only.
    let appends = unsafe { libc::fcntl(fd, libc::F_GETFL) } & libc::O_APPEND != 0;
    if appends {
        return borrowed(fd).metadata().map_or(0, |meta| meta.len());
    }
    u64::try_from(system_call!(SYS_lseek, fd, 0, libc::SEEK_CUR)).unwrap_or_default()
}

fn write_only(fd: c_int) -> bool {
    // SAFETY: asks for flags only.
    unsafe { libc::fcntl(fd, libc::F_GETFL) & libc::O_ACCMODE == libc::O_WRONLY }
}

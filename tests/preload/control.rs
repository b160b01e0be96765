//! What the test asks for at the moment.

use std::cell::Cell;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::PathBuf;
use std::sync::{LazyLock, Mutex, PoisonError};

/// What the control file says.
#[derive(Clone, Copy, Default)]
pub struct Control {
    pub fsync: Fsync,
    pub disk_full: bool,
    pub realtime_offset_ms: i64,
    pub kill_before_sync: u64,
    pub kill_after_sync: u64,
    /// How often the file has changed: counters start anew with each version.
    pub version: u64,
}

#[derive(Clone, Copy, Default, PartialEq, Eq)]
pub enum Fsync {
    #[default]
    Works,
    FailsOnce,
    Fails,
}

struct File {
    stamp: (i64, i64, u64, u64),
    control: Control,
}

static PATH: LazyLock<Option<PathBuf>> = LazyLock::new(|| std::env::var_os("KEYWARD_PRELOAD_CONTROL").map(PathBuf::from));
static FILE: Mutex<Option<File>> = Mutex::new(None);

thread_local! {
    static INSIDE: Cell<bool> = const { Cell::new(false) };
}

/// Runs `work` of our own, whose calls of libc are not looked at. `None` when this thread is inside already, or ending.
pub fn inside<T>(work: impl FnOnce() -> T) -> Option<T> {
    if INSIDE.try_with(|inside| inside.replace(true)).unwrap_or(true) {
        return None;
    }
    // SAFETY: the calling thread's errno; our own calls must not change what the caller sees.
    let errno = unsafe { *libc::__errno_location() };
    let result = work();
    // SAFETY: as above.
    unsafe { *libc::__errno_location() = errno };
    let _ = INSIDE.try_with(|inside| inside.set(false));
    Some(result)
}

/// The newest version of the file. Call inside.
pub fn read() -> Control {
    let Some(path) = PATH.as_ref() else { return Control::default() };
    let Ok(meta) = fs::metadata(path) else { return Control::default() };
    // The inode too: a test replaces the file by renaming a new one over it.
    let stamp = (meta.mtime(), meta.mtime_nsec(), meta.size(), meta.ino());
    let mut file = FILE.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(known) = file.as_ref().filter(|known| known.stamp == stamp) {
        return known.control;
    }
    let version = file.as_ref().map_or(1, |known| known.control.version + 1);
    let control = parse(&fs::read_to_string(path).unwrap_or_default(), version);
    *file = Some(File { stamp, control });
    control
}

fn parse(text: &str, version: u64) -> Control {
    let mut control = Control { version, ..Control::default() };
    for (key, value) in text.lines().filter_map(|line| line.trim().split_once('=')) {
        match (key, value) {
            ("fsync", "EIO") => control.fsync = Fsync::FailsOnce,
            ("fsync", "EIO_ALL") => control.fsync = Fsync::Fails,
            ("write", "ENOSPC") => control.disk_full = true,
            ("realtime_offset_ms", ms) => control.realtime_offset_ms = ms.parse().unwrap_or_default(),
            ("kill_before_sync", count) => control.kill_before_sync = count.parse().unwrap_or_default(),
            ("kill_after_sync", count) => control.kill_after_sync = count.parse().unwrap_or_default(),
            _ => {}
        }
    }
    control
}

//! For LD_PRELOAD: cuts the power, fails fsync, fills the disk, moves the clock, for one process and one state directory.
//!
//! Owns: libc's calls that write, truncate, remove, sync and tell the time. Promises: whatever the control file does not ask
//! for behaves as before. Never: touches a file outside the state directory, and its own shadow.
//! Sees only what goes through libc (Rust's std and SQLite do); raw system calls pass unseen.
//!
//! - `KEYWARD_PRELOAD_STATE`: the state directory, canonical. `KEYWARD_PRELOAD_SHADOW`: keeps what a power cut would leave
//!   (see [`shadow`]); without it none is kept.
//! - `KEYWARD_PRELOAD_CONTROL`: a file of lines, read again when it changes:
//!   `fsync=EIO` the next sync of a state file fails, and its unsynced bytes are lost (as Linux does it); `fsync=EIO_ALL` each one;
//!   `write=ENOSPC` the disk is full: only space given up since can be written; `realtime_offset_ms=N` moves the wall clock;
//!   `kill_before_sync=N`, `kill_after_sync=N` SIGKILL at the N-th sync of a state file from now on.
#![allow(unsafe_code, reason = "replaces functions of libc")]

mod clock;
mod control;
mod disk;
mod shadow;
mod watch;

use libc::{c_char, c_int, c_void, iovec, off_t, size_t, ssize_t};

// Each hook does what libc's function does by the system call itself: nothing to look up, nothing to recurse into.

macro_rules! system_call {
    ($number:ident $(, $argument:expr)*) => {
        // SAFETY: the caller's arguments, handed on to the kernel, which checks them.
        unsafe { libc::syscall(libc::$number $(, $argument)*) }
    };
}
pub(crate) use system_call;

fn fail(errno: c_int) -> c_int {
    // SAFETY: the calling thread's errno.
    unsafe { *libc::__errno_location() = errno };
    -1
}

/// # Safety
/// As write(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn write(fd: c_int, data: *const c_void, count: size_t) -> ssize_t {
    disk::write(fd, None, count, || system_call!(SYS_write, fd, data, count) as ssize_t)
}

/// # Safety
/// As pwrite(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwrite(fd: c_int, data: *const c_void, count: size_t, at: off_t) -> ssize_t {
    disk::write(fd, Some(at), count, || system_call!(SYS_pwrite64, fd, data, count, at) as ssize_t)
}

/// # Safety
/// As pwrite64(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn pwrite64(fd: c_int, data: *const c_void, count: size_t, at: off_t) -> ssize_t {
    disk::write(fd, Some(at), count, || system_call!(SYS_pwrite64, fd, data, count, at) as ssize_t)
}

/// # Safety
/// As writev(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn writev(fd: c_int, parts: *const iovec, count: c_int) -> ssize_t {
    let bytes = if watch::is_state(fd) && count > 0 {
        // SAFETY: `count` readable iovecs, as the caller must give.
        unsafe { std::slice::from_raw_parts(parts, count as usize) }.iter().map(|part| part.iov_len).sum()
    } else {
        0
    };
    disk::write(fd, None, bytes, || system_call!(SYS_writev, fd, parts, count) as ssize_t)
}

/// # Safety
/// As copy_file_range(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn copy_file_range(
    from: c_int,
    from_at: *mut i64,
    to: c_int,
    to_at: *mut i64,
    count: size_t,
    flags: u32,
) -> ssize_t {
    watch::rewritten(to);
    system_call!(SYS_copy_file_range, from, from_at, to, to_at, count, flags) as ssize_t
}

/// # Safety
/// As sendfile(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn sendfile(to: c_int, from: c_int, at: *mut off_t, count: size_t) -> ssize_t {
    watch::rewritten(to);
    system_call!(SYS_sendfile, to, from, at, count) as ssize_t
}

/// # Safety
/// As fallocate(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fallocate(fd: c_int, mode: c_int, at: off_t, length: off_t) -> c_int {
    disk::allocate(fd, at, length, || system_call!(SYS_fallocate, fd, mode, at, length) as c_int)
}

/// # Safety
/// As fallocate64(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fallocate64(fd: c_int, mode: c_int, at: off_t, length: off_t) -> c_int {
    disk::allocate(fd, at, length, || system_call!(SYS_fallocate, fd, mode, at, length) as c_int)
}

/// # Safety
/// As posix_fallocate(3), which returns the error.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_fallocate(fd: c_int, at: off_t, length: off_t) -> c_int {
    let done = disk::allocate(fd, at, length, || system_call!(SYS_fallocate, fd, 0, at, length) as c_int);
    // SAFETY: the calling thread's errno.
    if done == 0 { 0 } else { unsafe { *libc::__errno_location() } }
}

/// # Safety
/// As posix_fallocate64(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn posix_fallocate64(fd: c_int, at: off_t, length: off_t) -> c_int {
    // SAFETY: the same function.
    unsafe { posix_fallocate(fd, at, length) }
}

/// # Safety
/// As ftruncate(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ftruncate(fd: c_int, length: off_t) -> c_int {
    disk::truncate(fd, || system_call!(SYS_ftruncate, fd, length) as c_int)
}

/// # Safety
/// As ftruncate64(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn ftruncate64(fd: c_int, length: off_t) -> c_int {
    // SAFETY: the same function.
    unsafe { ftruncate(fd, length) }
}

/// # Safety
/// As unlink(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn unlink(path: *const c_char) -> c_int {
    disk::unlink(path, || system_call!(SYS_unlinkat, libc::AT_FDCWD, path, 0) as c_int)
}

/// # Safety
/// As fsync(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fsync(fd: c_int) -> c_int {
    disk::sync(fd, || system_call!(SYS_fsync, fd) as c_int)
}

/// # Safety
/// As fdatasync(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn fdatasync(fd: c_int) -> c_int {
    disk::sync(fd, || system_call!(SYS_fdatasync, fd) as c_int)
}

/// # Safety
/// As close(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn close(fd: c_int) -> c_int {
    watch::forget(fd);
    system_call!(SYS_close, fd) as c_int
}

/// # Safety
/// As open(2). The mode is variadic there; the calling conventions of Linux pass it alike.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open(path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int {
    watch::opened(system_call!(SYS_openat, libc::AT_FDCWD, path, flags, mode) as c_int)
}

/// # Safety
/// As open64(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn open64(path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int {
    watch::opened(system_call!(SYS_openat, libc::AT_FDCWD, path, flags | libc::O_LARGEFILE, mode) as c_int)
}

/// # Safety
/// As openat(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat(folder: c_int, path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int {
    watch::opened(system_call!(SYS_openat, folder, path, flags, mode) as c_int)
}

/// # Safety
/// As openat64(3).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn openat64(folder: c_int, path: *const c_char, flags: c_int, mode: libc::mode_t) -> c_int {
    watch::opened(system_call!(SYS_openat, folder, path, flags | libc::O_LARGEFILE, mode) as c_int)
}

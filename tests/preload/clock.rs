//! The wall clock, moved. Monotonic clocks are left alone.

use std::mem::transmute;
use std::sync::OnceLock;

use libc::{c_int, c_void, clockid_t, time_t, timespec, timeval};

use crate::control;

type ClockGettime = unsafe extern "C" fn(clockid_t, *mut timespec) -> c_int;

/// libc's own function, which needs no system call.
fn real() -> Option<ClockGettime> {
    static REAL: OnceLock<Option<ClockGettime>> = OnceLock::new();
    *REAL.get_or_init(|| {
        // SAFETY: a name that ends with a zero byte.
        let found = unsafe { libc::dlsym(libc::RTLD_NEXT, c"clock_gettime".as_ptr()) };
        // SAFETY: the symbol has this type in every libc.
        (!found.is_null()).then(|| unsafe { transmute::<*mut c_void, ClockGettime>(found) })
    })
}

/// # Safety
/// As clock_gettime(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn clock_gettime(clock: clockid_t, time: *mut timespec) -> c_int {
    let done = match real() {
        // SAFETY: the caller's arguments, handed on.
        Some(real) => unsafe { real(clock, time) },
        None => crate::system_call!(SYS_clock_gettime, clock, time) as c_int,
    };
    if done != 0 || (clock != libc::CLOCK_REALTIME && clock != libc::CLOCK_REALTIME_COARSE) {
        return done;
    }
    let offset = control::inside(|| control::read().realtime_offset_ms).unwrap_or_default();
    if offset != 0 {
        // SAFETY: the call before has written it.
        let time = unsafe { &mut *time };
        let nanos = time.tv_nsec + (offset % 1000) * 1_000_000;
        time.tv_sec += offset / 1000 + nanos.div_euclid(1_000_000_000);
        time.tv_nsec = nanos.rem_euclid(1_000_000_000);
    }
    0
}

fn now() -> timespec {
    let mut time = timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: a writable timespec.
    unsafe { clock_gettime(libc::CLOCK_REALTIME, &raw mut time) };
    time
}

/// # Safety
/// As gettimeofday(2); the time zone is not filled in.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn gettimeofday(time: *mut timeval, _zone: *mut c_void) -> c_int {
    let now = now();
    if !time.is_null() {
        // SAFETY: not null, so writable.
        unsafe { *time = timeval { tv_sec: now.tv_sec, tv_usec: now.tv_nsec / 1000 } };
    }
    0
}

/// # Safety
/// As time(2).
#[unsafe(no_mangle)]
pub unsafe extern "C" fn time(seconds: *mut time_t) -> time_t {
    let now = now();
    if !seconds.is_null() {
        // SAFETY: not null, so writable.
        unsafe { *seconds = now.tv_sec };
    }
    now.tv_sec
}

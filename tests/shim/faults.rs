//! What is armed, and what a call meets because of it.
//!
//! One relaxed load of [`is_armed`] is all that a call pays while nothing is. Otherwise a call asks for its [`Plan`] under a
//! lock that is never held while anybody sleeps, parks, or is in the real module.

use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Condvar, LazyLock, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use cryptoki_sys::{
    CK_RV, CKR_ARGUMENTS_BAD, CKR_BUFFER_TOO_SMALL, CKR_CRYPTOKI_NOT_INITIALIZED, CKR_DATA_LEN_RANGE, CKR_DEVICE_ERROR,
    CKR_DEVICE_MEMORY, CKR_DEVICE_REMOVED, CKR_FUNCTION_CANCELED, CKR_FUNCTION_FAILED, CKR_GENERAL_ERROR, CKR_HOST_MEMORY,
    CKR_KEY_EXHAUSTED, CKR_KEY_FUNCTION_NOT_PERMITTED, CKR_KEY_HANDLE_INVALID, CKR_MECHANISM_INVALID, CKR_OBJECT_HANDLE_INVALID,
    CKR_OPERATION_ACTIVE, CKR_OPERATION_NOT_INITIALIZED, CKR_SESSION_CLOSED, CKR_SESSION_COUNT, CKR_SESSION_HANDLE_INVALID,
    CKR_TOKEN_NOT_PRESENT, CKR_TOKEN_NOT_RECOGNIZED, CKR_TOKEN_RESOURCE_EXCEEDED, CKR_USER_NOT_LOGGED_IN, CKR_VENDOR_DEFINED,
};

use crate::functions::{COUNT, Function};

/// Directed faults that may wait at once.
const RULES_MAX: usize = 1024;
/// How long `await` waits.
pub const AWAIT: Duration = Duration::from_secs(30);

/// What a directed fault does to the calls it meets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Deed {
    /// The real function is not called.
    Fail(CK_RV),
    /// The real function is called, its answer is lost. Calls that only ask for a length are not counted: they have no answer to lose.
    Lose(CK_RV),
    /// A bit of the signature is flipped. Counted like [`Deed::Lose`].
    Corrupt,
    /// The call parks until it is released.
    Hang,
    /// The process aborts.
    Abort,
}

/// A directed fault.
#[derive(Debug)]
pub struct Rule {
    /// `None`: any function.
    pub on: Option<Function>,
    pub deed: Deed,
    /// Calls that pass before the first it meets.
    pub skip: u64,
    /// Calls it meets; `None`: all.
    pub left: Option<u64>,
}

/// What one call meets.
#[derive(Debug, Default)]
pub struct Plan {
    /// The device is gone: nothing else is met.
    pub gone: bool,
    pub abort: bool,
    pub hang: bool,
    /// Only one call at a time.
    pub in_turn: bool,
    pub delay: Duration,
    /// Answered instead of the real call.
    pub before: Option<CK_RV>,
    pub corrupt: bool,
    /// Answered whatever the real call answered.
    pub after: Option<CK_RV>,
}

/// Faults by chance, the same for the same seed and order of calls (splitmix64).
struct Dice {
    state: u64,
    per_mille: u64,
}

impl Dice {
    fn roll(&mut self) -> u64 {
        self.state = self.state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.state;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
}

/// What a token may say when nobody expects it. None is about the PIN: those would cost a try, or an operator's attention.
const CODES: [CK_RV; 26] = [
    CKR_HOST_MEMORY,
    CKR_GENERAL_ERROR,
    CKR_FUNCTION_FAILED,
    CKR_ARGUMENTS_BAD,
    CKR_DATA_LEN_RANGE,
    CKR_DEVICE_ERROR,
    CKR_DEVICE_MEMORY,
    CKR_DEVICE_REMOVED,
    CKR_FUNCTION_CANCELED,
    CKR_KEY_HANDLE_INVALID,
    CKR_KEY_FUNCTION_NOT_PERMITTED,
    CKR_MECHANISM_INVALID,
    CKR_OBJECT_HANDLE_INVALID,
    CKR_OPERATION_ACTIVE,
    CKR_OPERATION_NOT_INITIALIZED,
    CKR_SESSION_CLOSED,
    CKR_SESSION_COUNT,
    CKR_SESSION_HANDLE_INVALID,
    CKR_TOKEN_NOT_PRESENT,
    CKR_TOKEN_NOT_RECOGNIZED,
    CKR_USER_NOT_LOGGED_IN,
    CKR_BUFFER_TOO_SMALL,
    CKR_CRYPTOKI_NOT_INITIALIZED,
    CKR_TOKEN_RESOURCE_EXCEEDED,
    CKR_KEY_EXHAUSTED,
    CKR_VENDOR_DEFINED + 1,
];

#[derive(Default)]
struct Armed {
    rules: Vec<Rule>,
    delays: Delays,
    dice: Option<Dice>,
    in_turn: bool,
    gone: bool,
    remap: bool,
}

/// How much longer calls of a function take, and whether those that only ask for a length do too.
struct Delays([(Duration, bool); COUNT]);

impl Default for Delays {
    fn default() -> Self {
        Self([(Duration::ZERO, false); COUNT])
    }
}

impl Delays {
    fn of(&self, function: Function, answers: bool) -> Duration {
        let (delay, queries) = self.0[function as usize];
        if answers || queries { delay } else { Duration::ZERO }
    }
}

static ARMED: AtomicBool = AtomicBool::new(false);
static STATE: LazyLock<Mutex<Armed>> = LazyLock::new(Mutex::default);
static INJECTED: AtomicU64 = AtomicU64::new(0);

fn state() -> MutexGuard<'static, Armed> {
    STATE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether a call has to ask for its plan.
pub fn is_armed() -> bool {
    ARMED.load(Ordering::Relaxed)
}

fn change(how: impl FnOnce(&mut Armed)) {
    let mut state = state();
    how(&mut state);
    note_armed(&state);
}

fn note_armed(state: &Armed) {
    let delays = state.delays.0.iter().any(|(delay, _)| !delay.is_zero());
    let armed = !state.rules.is_empty() || delays || state.dice.is_some() || state.in_turn || state.gone || state.remap;
    ARMED.store(armed, Ordering::Relaxed);
}

/// One more directed fault.
pub fn direct(rule: Rule) -> Result<(), String> {
    let mut state = state();
    if state.rules.len() >= RULES_MAX {
        return Err(format!("{RULES_MAX} faults are armed already"));
    }
    state.rules.push(rule);
    note_armed(&state);
    Ok(())
}

/// From now on calls of a function (`None`: of all) take so much longer; those that only ask for a length if `queries`.
pub fn delay(on: Option<Function>, by: Duration, queries: bool) {
    change(|state| match on {
        Some(function) => state.delays.0[function as usize] = (by, queries),
        None => state.delays.0 = [(by, queries); COUNT],
    });
}

/// From now on calls meet faults by chance.
pub fn roll_dice(seed: u64, per_mille: u64) {
    change(|state| state.dice = (per_mille > 0).then_some(Dice { state: seed, per_mille }));
}

/// From now on the device does one thing at a time.
pub fn take_turns() {
    change(|state| state.in_turn = true);
}

/// From now on the device is gone, or back.
pub fn set_gone(gone: bool) {
    change(|state| state.gone = gone);
}

/// From now on private key handles name other keys.
pub fn remap() {
    change(|state| state.remap = true);
}

/// Whether they do.
pub fn remaps() -> bool {
    is_armed() && state().remap
}

/// Nothing is armed any more; what was parked goes on.
pub fn clear() {
    change(|state| *state = Armed::default());
    release();
}

/// So many faults were injected.
pub fn injected(faults: u64) {
    INJECTED.fetch_add(faults, Ordering::Relaxed);
    // Whoever waits either sees the new number before it sleeps, or is woken.
    drop(parking());
    CHANGED.notify_all();
}

/// How many were, since the module was loaded.
pub fn count() -> u64 {
    INJECTED.load(Ordering::Relaxed)
}

/// What this call meets. `answers`: it hands something out, and does not only ask for a length.
pub fn plan(function: Function, answers: bool) -> Plan {
    let state = &mut *state();
    if state.gone {
        return Plan { gone: true, ..Plan::default() };
    }
    let mut plan = Plan { in_turn: state.in_turn, delay: state.delays.of(function, answers), ..Plan::default() };
    let mut met = 0;
    state.rules.retain_mut(|rule| {
        let counted = answers || !matches!(rule.deed, Deed::Lose(_) | Deed::Corrupt);
        if rule.on.is_some_and(|on| on != function) || !counted {
            return true;
        }
        if rule.skip > 0 {
            rule.skip -= 1;
            return true;
        }
        // Where an earlier one has had this call, this one waits for the next.
        if !plan.take(rule.deed) {
            return true;
        }
        met += 1;
        rule.left = rule.left.map(|left| left - 1);
        rule.left != Some(0)
    });
    if met == 0
        && let Some(dice) = &mut state.dice
        && dice.roll() % 1000 < dice.per_mille
    {
        met += 1;
        let signs = matches!(function, Function::C_Sign | Function::C_SignFinal) && answers;
        let code = CODES[usize::try_from(dice.roll()).unwrap_or(0) % CODES.len()];
        match dice.roll() % 10 {
            0 => plan.delay += Duration::from_micros(500 + dice.roll() % 20_000),
            1 | 2 if signs => plan.corrupt = true,
            3..=6 if answers => plan.after = Some(code),
            _ => plan.before = Some(code),
        }
    }
    if met > 0 {
        injected(met);
        note_armed(state);
    }
    plan
}

impl Plan {
    /// Whether there is room for this deed.
    fn take(&mut self, deed: Deed) -> bool {
        let answered = self.before.is_some() || self.after.is_some();
        match deed {
            Deed::Fail(code) if !answered && !self.corrupt => self.before = Some(code),
            Deed::Lose(code) if !answered => self.after = Some(code),
            Deed::Corrupt if !self.corrupt && self.before.is_none() => self.corrupt = true,
            Deed::Hang if !self.hang => self.hang = true,
            Deed::Abort => self.abort = true,
            _ => return false,
        }
        true
    }
}

/// Whether the device is gone by now.
pub fn is_gone() -> bool {
    state().gone
}

/// The one turn of a device that does one thing at a time.
pub fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Sleeps as long as asked and not much longer: the kernel may round a sleep up by the thread's timer slack, 50 µs by default.
pub fn sleep(time: Duration) {
    let _ = rustix::thread::set_current_timer_slack(std::num::NonZeroU64::new(1));
    std::thread::sleep(time);
}

#[derive(Default)]
struct Parking {
    parked: usize,
    releases: u64,
}

static PARKING: LazyLock<Mutex<Parking>> = LazyLock::new(Mutex::default);
static CHANGED: Condvar = Condvar::new();

fn parking() -> MutexGuard<'static, Parking> {
    PARKING.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Parks until the next release.
pub fn park() {
    let mut parking = parking();
    let before = parking.releases;
    parking.parked += 1;
    CHANGED.notify_all();
    let mut parking = CHANGED.wait_while(parking, |parking| parking.releases == before).unwrap_or_else(PoisonError::into_inner);
    parking.parked -= 1;
    CHANGED.notify_all();
}

/// All that are parked go on.
pub fn release() {
    parking().releases += 1;
    CHANGED.notify_all();
}

/// How many are parked.
pub fn parked() -> usize {
    parking().parked
}

/// Waits until so many are parked; how many there are when the time is up.
pub fn await_parked(wanted: usize) -> Result<(), usize> {
    wait(|parking| parking.parked < wanted).map_err(|parking| parking.parked)
}

/// Waits until so many faults were injected; how many there are when the time is up.
pub fn await_injected(wanted: u64) -> Result<(), u64> {
    wait(|_| count() < wanted).map_err(|_| count())
}

fn wait(not_yet: impl FnMut(&mut Parking) -> bool) -> Result<(), MutexGuard<'static, Parking>> {
    let (parking, late) = CHANGED.wait_timeout_while(parking(), AWAIT, not_yet).unwrap_or_else(PoisonError::into_inner);
    if late.timed_out() { Err(parking) } else { Ok(()) }
}

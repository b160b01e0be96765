//! Time: what the wall says, checked against what has passed.

use std::fmt;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// A wall-clock instant, in microseconds since the Unix epoch.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Debug, Default)]
pub struct UnixTime(pub u64);

impl UnixTime {
    /// From whole seconds.
    #[must_use]
    pub const fn from_seconds(seconds: u64) -> Self {
        Self(seconds.saturating_mul(1_000_000))
    }

    /// Whole seconds, rounded down.
    #[must_use]
    pub const fn seconds(self) -> u64 {
        self.0 / 1_000_000
    }

    /// Microseconds.
    #[must_use]
    pub const fn micros(self) -> u64 {
        self.0
    }

    /// Later by `seconds`.
    #[must_use]
    pub const fn plus_seconds(self, seconds: u64) -> Self {
        Self(self.0.saturating_add(seconds.saturating_mul(1_000_000)))
    }

    /// Earlier by `seconds`.
    #[must_use]
    pub const fn minus_seconds(self, seconds: u64) -> Self {
        Self(self.0.saturating_sub(seconds.saturating_mul(1_000_000)))
    }

    /// What the wall clock of this machine says, unchecked: for clients and offline tools.
    #[must_use]
    pub fn wall() -> Self {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        Self(u64::try_from(since.as_micros()).unwrap_or(u64::MAX))
    }
}

impl fmt::Display for UnixTime {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let stamp = i64::try_from(self.seconds()).ok().and_then(|s| time::OffsetDateTime::from_unix_timestamp(s).ok());
        match stamp.and_then(|at| at.format(&time::format_description::well_known::Rfc3339).ok()) {
            Some(text) => f.write_str(&text),
            None => write!(f, "{}s", self.seconds()),
        }
    }
}

/// The wall clock jumped, or stands before the ledger's last entry.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("the wall clock deviates by {deviation_micros} µs from the daemon's own reckoning")]
pub struct ClockUntrusted {
    /// Wall clock minus reckoning.
    pub deviation_micros: i64,
}

/// The daemon's clock: the wall time at start plus the monotonic time since (CLOCK_BOOTTIME counts suspend, CLOCK_MONOTONIC
/// does not; a suspended daemon therefore distrusts its clock until an operator accepts it or it agrees again).
///
/// `now` refuses while the wall deviates by more than [`Clock::DEVIATION_MICROS_MAX`]; it trusts again by itself once the
/// wall is back. `reckoned` always answers and never goes backwards: it stamps ledger entries and denials.
pub struct Clock {
    base: Mutex<(UnixTime, Instant)>,
    distrusted: AtomicBool,
    deviation: AtomicI64,
}

impl Clock {
    /// Five seconds.
    pub const DEVIATION_MICROS_MAX: i64 = 5_000_000;

    /// Starts now. `last_entry` is the time of the ledger's newest entry: a wall clock before it is not trusted.
    #[must_use]
    pub fn start(last_entry: Option<UnixTime>) -> Self {
        let wall = UnixTime::wall();
        let start = last_entry.map_or(wall, |last| wall.max(last));
        let clock =
            Self { base: Mutex::new((start, Instant::now())), distrusted: AtomicBool::new(false), deviation: AtomicI64::new(0) };
        let _ = clock.now();
        clock
    }

    /// The time, if it can be trusted.
    ///
    /// # Errors
    /// While the wall clock deviates by more than five seconds.
    pub fn now(&self) -> Result<UnixTime, ClockUntrusted> {
        let reckoned = self.reckoned();
        let deviation = signed_difference(UnixTime::wall(), reckoned);
        self.deviation.store(deviation, Ordering::Relaxed);
        if deviation.abs() > Self::DEVIATION_MICROS_MAX {
            if !self.distrusted.swap(true, Ordering::Relaxed) {
                tracing::error!(
                    deviation_micros = deviation,
                    "the wall clock is not trusted; issuing stops until it returns or `keyward clock accept`"
                );
            }
            return Err(ClockUntrusted { deviation_micros: deviation });
        }
        if self.distrusted.swap(false, Ordering::Relaxed) {
            tracing::info!(deviation_micros = deviation, "the wall clock agrees again");
        }
        Ok(reckoned)
    }

    /// The daemon's own reckoning; never goes backwards between two calls of `accept`, and `accept` never sets it back.
    #[must_use]
    pub fn reckoned(&self) -> UnixTime {
        let (start, since) = *self.base.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        UnixTime(start.0.saturating_add(u64::try_from(since.elapsed().as_micros()).unwrap_or(u64::MAX)))
    }

    /// Wall minus reckoning at the last look.
    #[must_use]
    pub fn deviation_micros(&self) -> i64 {
        self.deviation.load(Ordering::Relaxed)
    }

    /// Takes the wall clock as the truth from now on. A wall behind the reckoning is followed as well (that is what the
    /// operator asks for); ledger entries still never go back, because the sequencer holds their times up.
    pub fn accept(&self) -> i64 {
        let wall = UnixTime::wall();
        let deviation = signed_difference(wall, self.reckoned());
        *self.base.lock().unwrap_or_else(std::sync::PoisonError::into_inner) = (wall, Instant::now());
        deviation
    }
}

fn signed_difference(a: UnixTime, b: UnixTime) -> i64 {
    let magnitude = i64::try_from(a.0.abs_diff(b.0)).unwrap_or(i64::MAX);
    if a >= b { magnitude } else { -magnitude }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_start_before_the_last_entry_is_not_trusted_until_accepted() {
        let ahead = UnixTime::wall().plus_seconds(3600);
        let clock = Clock::start(Some(ahead));
        assert!(clock.now().is_err());
        assert!(clock.reckoned() >= ahead);
        assert!(clock.accept() < -3_500_000_000);
        assert!(clock.now().is_ok());
    }

    #[test]
    fn an_undisturbed_clock_is_trusted() {
        let clock = Clock::start(Some(UnixTime::wall().minus_seconds(10)));
        assert!(clock.now().is_ok());
        assert_eq!(UnixTime::from_seconds(0).to_string(), "1970-01-01T00:00:00Z");
    }
}

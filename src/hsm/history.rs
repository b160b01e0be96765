//! What went wrong lately: the last few different faults of a token, for `keyward hsm status`.

use std::sync::{Mutex, PoisonError};

use super::error::Error;
use crate::model::UnixTime;

/// As many different faults are kept; the one that was last seen longest ago makes room.
const KEPT: usize = 8;
/// Longest text of one, in characters.
const TEXT_MAX: usize = 200;

/// A fault that was met, once or more often.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FaultSeen {
    /// Which call, what it answered.
    pub fault: String,
    /// How often.
    pub count: u64,
    /// When last.
    pub last: UnixTime,
}

/// The faults of one token.
#[derive(Default)]
pub(super) struct History(Mutex<Vec<FaultSeen>>);

impl History {
    pub(super) fn note(&self, error: &Error) {
        let fault: String = error.to_string().chars().take(TEXT_MAX).collect();
        let last = UnixTime::wall();
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = seen.iter_mut().find(|known| known.fault == fault) {
            (known.count, known.last) = (known.count + 1, last);
            return;
        }
        if seen.len() >= KEPT
            && let Some(oldest) = seen.iter().enumerate().min_by_key(|(_, known)| known.last).map(|(at, _)| at)
        {
            seen.swap_remove(oldest);
        }
        seen.push(FaultSeen { fault, count: 1, last });
    }

    /// The newest first.
    pub(super) fn newest_first(&self) -> Vec<FaultSeen> {
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner).clone();
        seen.sort_by_key(|known| std::cmp::Reverse(known.last));
        seen
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_fault_is_counted_and_the_oldest_makes_room() {
        let history = History::default();
        for _ in 0..3 {
            history.note(&Error::QueueFull);
        }
        assert_eq!(history.newest_first().iter().map(|seen| seen.count).collect::<Vec<_>>(), [3]);
        for number in 0..20 {
            history.note(&Error::Unusable(number.to_string()));
        }
        let seen = history.newest_first();
        assert_eq!(seen.len(), KEPT);
        assert!(!seen.iter().any(|seen| seen.fault == Error::QueueFull.to_string()));
    }
}

//! What went wrong lately: the last few different faults of a token, for `keyward hsm status`.

use std::fmt::Display;
use std::sync::{Mutex, PoisonError};

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

/// The faults of one token, the newest last.
#[derive(Default)]
pub(super) struct History(Mutex<Vec<FaultSeen>>);

impl History {
    pub(super) fn note(&self, fault: impl Display) {
        let fault: String = fault.to_string().chars().take(TEXT_MAX).collect();
        let mut seen = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let known = seen.iter().position(|known| known.fault == fault).map(|at| seen.remove(at));
        if seen.len() >= KEPT {
            seen.remove(0);
        }
        seen.push(FaultSeen { fault, count: known.map_or(0, |known| known.count) + 1, last: UnixTime::wall() });
    }

    /// The newest first.
    pub(super) fn newest_first(&self) -> Vec<FaultSeen> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().rev().cloned().collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hsm::Error;

    #[test]
    fn the_same_fault_is_counted_and_the_oldest_makes_room() {
        let history = History::default();
        for _ in 0..3 {
            history.note(Error::QueueFull);
        }
        assert_eq!(history.newest_first().iter().map(|seen| seen.count).collect::<Vec<_>>(), [3]);
        for number in 0..20 {
            history.note(Error::Unusable(number.to_string()));
        }
        let seen = history.newest_first();
        assert_eq!((seen.len(), &seen[0].fault), (KEPT, &Error::Unusable("19".into()).to_string()));
        assert!(!seen.iter().any(|seen| seen.fault == Error::QueueFull.to_string()));
    }
}

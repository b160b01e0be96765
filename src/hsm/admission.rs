//! Admission: who would wait too long is turned away before anything was recorded or computed for them.
//!
//! A burst is taken in: it is worked off within [`BURST`]. A queue that *stands*, because more is asked for than the token makes, is
//! of no use to anybody: it is cut to about [`WAIT`], so that those who are admitted are served as if there were no crowd.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::faults::Error;

/// A queue that has not been empty for this long, and for four times the token's pace, stands.
const STANDS: Duration = Duration::from_millis(100);
/// Longest wait in a queue that stands, or once the token's pace if that is longer.
const WAIT: Duration = Duration::from_millis(10);
/// Longest wait in a burst.
const BURST: Duration = Duration::from_millis(250);

/// Signatures in a round.
const ROUND: u64 = 64;

/// Acts on their way to a signature and back, and the token's pace.
pub(super) struct Admission {
    lanes: usize,
    /// Most that may wait, whatever their wait.
    queue: usize,
    started: Instant,
    inside: AtomicUsize,
    /// Microseconds since `started` when somebody last found a free lane.
    calm_at: AtomicU64,
    /// Nanoseconds of the fastest signature of this and of the last round: what a busy machine adds to the others is not the token's.
    fastest: [AtomicU64; 2],
    signatures: AtomicU64,
    turned_away: AtomicU64,
}

impl Admission {
    pub(super) fn new(lanes: usize, queue: usize) -> Self {
        Self {
            lanes: lanes.max(1),
            queue,
            started: Instant::now(),
            inside: AtomicUsize::new(0),
            calm_at: AtomicU64::new(0),
            fastest: [const { AtomicU64::new(u64::MAX) }; 2],
            signatures: AtomicU64::new(0),
            turned_away: AtomicU64::new(0),
        }
    }

    /// One more, or [`Error::QueueFull`] at once. Whoever is admitted has to [`Admission::leave`].
    pub(super) fn enter(&self) -> Result<(), Error> {
        let inside = self.inside.fetch_add(1, Ordering::AcqRel) + 1;
        if inside <= self.lanes {
            self.calm_at.store(self.now(), Ordering::Relaxed);
        }
        let room = self.room_for(inside);
        if room.is_err() {
            self.leave();
        }
        room
    }

    /// One more, whatever the crowd.
    pub(super) fn enter_anyway(&self) {
        self.inside.fetch_add(1, Ordering::AcqRel);
    }

    /// Whether one more would be admitted now. Takes no place.
    pub(super) fn look(&self) -> Result<(), Error> {
        self.room_for(self.inside.load(Ordering::Acquire) + 1)
    }

    fn room_for(&self, inside: usize) -> Result<(), Error> {
        let unrest = Duration::from_micros(self.now().saturating_sub(self.calm_at.load(Ordering::Relaxed)));
        if inside <= self.lanes || inside <= self.most(unrest) {
            return Ok(());
        }
        self.turned_away.fetch_add(1, Ordering::Relaxed);
        Err(Error::QueueFull)
    }

    /// Microseconds since `started`.
    fn now(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX)
    }

    pub(super) fn leave(&self) {
        self.inside.fetch_sub(1, Ordering::AcqRel);
    }

    /// How many may be inside when nobody has found a free lane for so long.
    fn most(&self, unrest: Duration) -> usize {
        let pace = self.pace();
        let wait = if unrest > STANDS.max(pace * 4) { WAIT } else { BURST };
        let rounds =
            wait.as_nanos().checked_div(pace.as_nanos()).map_or(usize::MAX, |rounds| rounds.try_into().unwrap_or(usize::MAX));
        self.lanes.saturating_add(self.lanes.saturating_mul(rounds.max(1)).min(self.queue))
    }

    /// A signature took so long.
    pub(super) fn note(&self, took: Duration) {
        let [this, last] = &self.fastest;
        this.fetch_min(u64::try_from(took.as_nanos()).unwrap_or(u64::MAX), Ordering::Relaxed);
        if self.signatures.fetch_add(1, Ordering::Relaxed) % ROUND == ROUND - 1 {
            last.store(this.swap(u64::MAX, Ordering::Relaxed), Ordering::Relaxed);
        }
    }

    /// The token was connected anew: its pace has to be learnt again.
    pub(super) fn forget_pace(&self) {
        for round in &self.fastest {
            round.store(u64::MAX, Ordering::Relaxed);
        }
    }

    /// What one signature takes the token, zero before the first.
    pub(super) fn pace(&self) -> Duration {
        let fastest = self.fastest.iter().map(|round| round.load(Ordering::Relaxed)).min().unwrap_or(u64::MAX);
        if fastest == u64::MAX { Duration::ZERO } else { Duration::from_nanos(fastest) }
    }

    pub(super) fn turned_away(&self) -> u64 {
        self.turned_away.load(Ordering::Relaxed)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of_pace(lanes: usize, pace: Duration) -> Admission {
        let admission = Admission::new(lanes, 1024);
        admission.note(pace);
        admission
    }

    #[test]
    fn a_burst_is_taken_in_and_a_queue_that_stands_is_cut() {
        let slow = of_pace(8, Duration::from_millis(10));
        assert_eq!(slow.most(Duration::from_millis(50)), 8 + 8 * 25);
        assert_eq!(slow.most(Duration::from_millis(150)), 8 + 8);
        let fast = of_pace(4, Duration::from_micros(100));
        assert_eq!(fast.most(Duration::from_millis(50)), 4 + 1024);
        assert_eq!(fast.most(Duration::from_millis(150)), 4 + 4 * 100);
    }

    #[test]
    fn a_device_of_a_second_still_admits_one_more_for_each_lane() {
        let slow = of_pace(2, Duration::from_secs(1));
        assert_eq!(slow.most(Duration::from_secs(3)), 4);
        assert_eq!(slow.most(Duration::from_secs(9)), 4);
    }

    #[test]
    fn who_is_turned_away_is_counted_and_takes_no_place() {
        let slow = of_pace(1, Duration::from_secs(1));
        assert!(slow.enter().is_ok() && slow.enter().is_ok());
        assert!(matches!(slow.enter(), Err(Error::QueueFull)));
        assert!(matches!(slow.look(), Err(Error::QueueFull)));
        assert_eq!(slow.turned_away(), 2);
        slow.leave();
        assert!(slow.look().is_ok() && slow.look().is_ok());
        assert!(slow.enter().is_ok());
    }

    #[test]
    fn the_pace_is_that_of_the_fastest_of_the_last_rounds() {
        let admission = of_pace(1, Duration::from_millis(1));
        for _ in 0..2 * ROUND - 2 {
            admission.note(Duration::from_millis(65));
            assert_eq!(admission.pace(), Duration::from_millis(1));
        }
        admission.note(Duration::from_millis(65));
        assert_eq!(admission.pace(), Duration::from_millis(65));
        admission.note(Duration::from_micros(100));
        assert_eq!(admission.pace(), Duration::from_micros(100));
    }
}

//! Admission: who would wait too long is turned away before anything was recorded or computed for them.
//!
//! A burst is taken in: it is worked off within [`BURST`]. A queue that *stands*, because more is asked for than the token makes, is
//! of no use to anybody: it is cut to about [`WAIT`], so that those who are admitted are served as if there were no crowd. A crowd is
//! over when nobody had to be turned away for [`OVER`]: a free lane now and then, because the disk paused, does not let in a burst
//! upon a burst.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use super::error::Error;

/// A queue that has not been empty for this long, and for four times the token's pace, stands.
const STANDS: Duration = Duration::from_millis(100);
/// Longest wait in a queue that stands, or once the token's pace if that is longer.
const WAIT: Duration = Duration::from_millis(10);
/// Longest wait in a burst. Those who wait in the first one are served late: fewer than one in a hundred of a crowd that stays.
const BURST: Duration = Duration::from_millis(100);
/// As many may always wait: no one agent, with the few renewals that it may have under way, takes all the places of a token of few lanes.
const WAITING_MIN: usize = 8;
/// Longer than those who are turned away are told to stay away, so that a crowd that comes back is the same crowd.
const OVER: Duration = Duration::from_secs(1);

/// Signatures in a round.
const ROUND: u64 = 64;

/// Acts on their way to a signature and back, and the token's pace.
pub(super) struct Admission {
    /// That sign: as configured, until the token's session limit is known.
    lanes: AtomicUsize,
    /// Most that may wait, whatever their wait.
    queue: usize,
    /// Longest wait after which there is still time for the signature.
    patience: Duration,
    started: Instant,
    inside: AtomicUsize,
    /// Microseconds since `started` when somebody last found a free lane.
    calm_at: AtomicU64,
    /// Microseconds since `started` when somebody was last turned away; zero: nobody yet.
    turned_away_at: AtomicU64,
    /// Nanoseconds of the fastest signature of this and of the last round: what a busy machine adds to the others is not the token's.
    fastest: [AtomicU64; 2],
    signatures: AtomicU64,
    turned_away: AtomicU64,
}

impl Admission {
    pub(super) fn new(lanes: usize, queue: usize, sign_deadline: Duration) -> Self {
        Self {
            lanes: AtomicUsize::new(lanes.max(1)),
            queue,
            patience: sign_deadline / 2,
            started: Instant::now(),
            inside: AtomicUsize::new(0),
            calm_at: AtomicU64::new(0),
            turned_away_at: AtomicU64::new(0),
            fastest: [const { AtomicU64::new(u64::MAX) }; 2],
            signatures: AtomicU64::new(0),
            turned_away: AtomicU64::new(0),
        }
    }

    /// So many lanes sign: the token allows no more sessions.
    pub(super) fn set_lanes(&self, lanes: usize) {
        self.lanes.store(lanes.max(1), Ordering::Relaxed);
    }

    /// Lanes that sign.
    pub(super) fn lanes(&self) -> usize {
        self.lanes.load(Ordering::Relaxed)
    }

    /// One more, or [`Error::QueueFull`] at once. Whoever is admitted has to [`Admission::leave`].
    pub(super) fn enter(&self) -> Result<(), Error> {
        let room = self.room_for(self.inside.fetch_add(1, Ordering::AcqRel) + 1);
        if room.is_err() {
            self.leave();
        }
        room
    }

    /// Whether one more would be admitted now. Takes no place.
    pub(super) fn look(&self) -> Result<(), Error> {
        self.room_for(self.inside.load(Ordering::Acquire) + 1)
    }

    fn room_for(&self, inside: usize) -> Result<(), Error> {
        let now = u64::try_from(self.started.elapsed().as_micros()).unwrap_or(u64::MAX);
        if inside <= self.lanes() {
            self.calm_at.store(now, Ordering::Relaxed);
            return Ok(());
        }
        if inside <= self.most(self.stands(now)) {
            return Ok(());
        }
        self.turned_away_at.store(now.max(1), Ordering::Relaxed);
        self.turned_away.fetch_add(1, Ordering::Relaxed);
        Err(Error::QueueFull)
    }

    /// Whether anybody is on the way to a signature.
    pub(super) fn is_entered(&self) -> bool {
        self.inside.load(Ordering::Acquire) > 0
    }

    pub(super) fn leave(&self) {
        self.inside.fetch_sub(1, Ordering::AcqRel);
    }

    /// Whether there is a crowd: nobody has found a free lane for a while, or somebody was turned away a short while ago.
    fn stands(&self, now: u64) -> bool {
        let since = |at: u64| Duration::from_micros(now.saturating_sub(at));
        let turned_away_at = self.turned_away_at.load(Ordering::Relaxed);
        let crowd = turned_away_at > 0 && since(turned_away_at) < OVER;
        crowd || since(self.calm_at.load(Ordering::Relaxed)) > STANDS.max(self.pace() * 4)
    }

    /// How many may be inside.
    fn most(&self, stands: bool) -> usize {
        let (lanes, pace) = (self.lanes(), self.pace());
        let within = |wait: Duration| {
            let rounds = wait.as_nanos().checked_div(pace.as_nanos()).and_then(|rounds| usize::try_from(rounds).ok());
            lanes.saturating_mul(rounds.unwrap_or(usize::MAX))
        };
        let waiting = within(if stands { WAIT } else { BURST }).max(lanes).max(WAITING_MIN);
        lanes.saturating_add(waiting.min(within(self.patience).max(lanes)).min(self.queue))
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
        let admission = Admission::new(lanes, 1024, Duration::from_secs(5));
        admission.note(pace);
        admission
    }

    const MILLI: u64 = 1000;

    #[test]
    fn a_burst_is_taken_in_and_a_queue_that_stands_is_cut() {
        let slow = of_pace(8, Duration::from_millis(10));
        assert!(!slow.stands(50 * MILLI) && slow.stands(150 * MILLI));
        assert_eq!((slow.most(false), slow.most(true)), (8 + 8 * 10, 8 + 8));
        let fast = of_pace(4, Duration::from_micros(100));
        assert_eq!((fast.most(false), fast.most(true)), (4 + 1024, 4 + 4 * 100));
    }

    #[test]
    fn a_crowd_is_over_when_nobody_is_turned_away_any_more_and_not_at_the_first_free_lane() {
        let slow = of_pace(8, Duration::from_millis(10));
        slow.turned_away_at.store(200 * MILLI, Ordering::Relaxed);
        slow.calm_at.store(300 * MILLI, Ordering::Relaxed);
        assert!(slow.stands(310 * MILLI));
        slow.calm_at.store(1250 * MILLI, Ordering::Relaxed);
        assert!(!slow.stands(1260 * MILLI));
    }

    #[test]
    fn a_slow_device_admits_a_few_and_never_more_than_it_can_serve_in_time() {
        let slow = of_pace(2, Duration::from_millis(200));
        assert!(!slow.stands(700 * MILLI) && slow.stands(900 * MILLI));
        assert_eq!((slow.most(false), slow.most(true)), (2 + 8, 2 + 8));
        let slower = of_pace(2, Duration::from_secs(1));
        assert_eq!((slower.most(false), slower.most(true)), (2 + 4, 2 + 4));
        let too_slow = of_pace(2, Duration::from_secs(3));
        assert_eq!(too_slow.most(true), 2 + 2);
    }

    #[test]
    fn a_token_that_allows_fewer_sessions_admits_as_many_as_its_lanes_serve() {
        let wide = of_pace(16, Duration::from_millis(10));
        assert_eq!(wide.most(true), 16 + 16);
        wide.set_lanes(2);
        assert_eq!((wide.most(false), wide.most(true)), (2 + 2 * 10, 2 + 8));
    }

    #[test]
    fn who_is_turned_away_is_counted_and_takes_no_place() {
        let slow = of_pace(1, Duration::from_secs(3));
        assert!(slow.enter().is_ok() && slow.enter().is_ok());
        assert!(matches!(slow.enter(), Err(Error::QueueFull)));
        assert_eq!(slow.turned_away(), 1);
        slow.leave();
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

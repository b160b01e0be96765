//! What was accepted, for as long as it could be accepted again.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::model::{Digest, Reason, Refusal, UnixTime};

/// The names of accepted messages, each until it has expired for good.
///
/// Bounded in count, in all and for one key, and through [`super::Window`] in time. It never forgets early: when it is full,
/// or one key has used up its share, new messages are refused as `OVERLOADED` with the time after which there is room.
/// It lives in memory: after a restart, messages made before it are refused as `REPLAYED`, because nobody remembers them.
/// (A signer whose clock runs ahead can be replayed once across a restart, for as long as the skew that was allowed it.)
pub struct ReplayCache {
    since: u64,
    names_max: usize,
    names_per_key_max: usize,
    seen: Mutex<Seen>,
}

#[derive(Default)]
struct Seen {
    /// SHA-256 of (kid, name).
    names: HashSet<Digest>,
    /// The same by the second in which they may go, with the digest of their key's kid.
    ends: BTreeMap<(u64, Digest), Digest>,
    /// How many names of each key are remembered; keys without any are not here.
    per_key: HashMap<Digest, usize>,
    /// Everything that ended before was forgotten. A clock that is set back must not bring it to life again.
    forgotten_before: u64,
}

impl ReplayCache {
    /// Remembers at most `names_max` messages (about 250 bytes each), `names_per_key_max` of one key. `now` is the start of its memory.
    #[must_use]
    pub fn new(names_max: usize, names_per_key_max: usize, now: UnixTime) -> Self {
        Self { since: now.seconds(), names_max, names_per_key_max, seen: Mutex::default() }
    }

    /// Takes a message that was found good in every other respect: the first time `kid` says `name`, and never again before the second
    /// `end`, in which the message itself is over. `made` and `end` are seconds since 1970.
    ///
    /// # Errors
    /// `REPLAYED`; `OVERLOADED` when there is no room to remember it.
    pub(super) fn accept(&self, kid: &str, name: &str, made: u64, end: u64, now: UnixTime) -> Result<(), Refusal> {
        let replayed = |advice: &str| Err(Refusal::new(Reason::Replayed, advice));
        if made < self.since {
            return replayed("the message was made before this verifier's memory begins; make a new one");
        }
        let key = Digest::of(kid.as_bytes());
        // A digest first: no kid and name run into each other.
        let digest = Digest::of_parts(&[&key.0, name.as_bytes()]);
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.forget(now.seconds());
        if seen.names.contains(&digest) {
            return replayed("the message was accepted before; make a new one");
        }
        if end < seen.forgotten_before {
            return replayed("the message may have been accepted before; make a new one");
        }
        let of_key = seen.per_key.get(&key).copied().unwrap_or_default();
        if seen.names.len() >= self.names_max || of_key >= self.names_per_key_max {
            let first = seen.ends.first_key_value().map_or(0, |((end, _), _)| *end);
            let wait = Duration::from_secs(first.saturating_sub(now.seconds()).max(1));
            let advice = "too many messages are remembered; come back later, or make messages that live shorter";
            return Err(Refusal::new(Reason::Overloaded, advice).retry_after(wait));
        }
        seen.names.insert(digest);
        seen.ends.insert((end, digest), key);
        *seen.per_key.entry(key).or_default() += 1;
        Ok(())
    }

    /// How many messages are remembered.
    #[must_use]
    pub fn len(&self) -> usize {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).names.len()
    }

    /// Whether none is.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Seen {
    /// Lets go of what can no longer be accepted at `now`.
    fn forget(&mut self, now: u64) {
        while let Some(first) = self.ends.first_entry() {
            if first.key().0 > now {
                break;
            }
            let ((_, digest), key) = first.remove_entry();
            self.names.remove(&digest);
            if let Some(count) = self.per_key.get_mut(&key) {
                *count -= 1;
                if *count == 0 {
                    self.per_key.remove(&key);
                }
            }
            self.forgotten_before = self.forgotten_before.max(now.saturating_add(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: u64) -> UnixTime {
        UnixTime::from_seconds(seconds)
    }

    fn reason(result: Result<(), Refusal>) -> Option<Reason> {
        result.err().map(|refusal| refusal.reason)
    }

    #[test]
    fn a_name_is_taken_once_by_each_key() {
        let cache = ReplayCache::new(10, 10, at(100));
        assert_eq!(reason(cache.accept("k", "n", 100, 160, at(100))), None);
        assert_eq!(reason(cache.accept("k", "n", 100, 160, at(159))), Some(Reason::Replayed));
        assert_eq!(reason(cache.accept("kn", "", 100, 160, at(100))), None);
        assert_eq!(reason(cache.accept("other", "n", 100, 160, at(100))), None);
        assert_eq!(cache.len(), 3);
    }

    #[test]
    fn what_was_made_before_its_memory_is_refused() {
        let cache = ReplayCache::new(10, 10, at(100));
        assert_eq!(reason(cache.accept("k", "n", 99, 160, at(100))), Some(Reason::Replayed));
        assert!(cache.is_empty());
    }

    #[test]
    fn a_full_memory_refuses_and_says_when_to_come_back() {
        let cache = ReplayCache::new(3, 2, at(100));
        assert_eq!(reason(cache.accept("k", "1", 100, 130, at(100))), None);
        assert_eq!(reason(cache.accept("k", "2", 100, 140, at(100))), None);
        assert_eq!(reason(cache.accept("k", "3", 100, 150, at(100))), Some(Reason::Overloaded), "the share of one key");
        assert_eq!(reason(cache.accept("l", "1", 100, 150, at(100))), None, "another key has room");
        let full = cache.accept("m", "1", 100, 150, at(110)).unwrap_err();
        assert_eq!((full.reason, full.retry_after), (Reason::Overloaded, Some(Duration::from_secs(20))));
        assert_eq!(reason(cache.accept("k", "1", 100, 130, at(129))), Some(Reason::Replayed), "nothing was forgotten for it");
        assert_eq!(reason(cache.accept("m", "1", 100, 150, at(130))), None);
    }

    #[test]
    fn a_clock_set_back_brings_nothing_forgotten_to_life() {
        let cache = ReplayCache::new(10, 10, at(100));
        assert_eq!(reason(cache.accept("k", "n", 100, 160, at(100))), None);
        assert_eq!(reason(cache.accept("k", "later", 200, 260, at(200))), None);
        assert_eq!(cache.len(), 1);
        assert_eq!(reason(cache.accept("k", "n", 100, 160, at(120))), Some(Reason::Replayed));
    }

    proptest! {
        #[test]
        fn nothing_is_ever_accepted_twice(steps in prop::collection::vec((0_u8..3, 0_u8..4, 0_u64..40, 0_u64..50), 1..200)) {
            let cache = ReplayCache::new(8, 4, at(0));
            let mut accepted = HashSet::new();
            for (kid, name, made, now) in steps {
                // As the verifier does: a message counts from when it was made for ten seconds.
                let end = made + 10;
                if end <= now || made > now {
                    continue;
                }
                let (kid, name) = (kid.to_string(), format!("{name}/{made}"));
                match cache.accept(&kid, &name, made, end, at(now)) {
                    Ok(()) => prop_assert!(accepted.insert((kid, name))),
                    Err(refusal) => prop_assert!(matches!(refusal.reason, Reason::Replayed | Reason::Overloaded)),
                }
                prop_assert!(cache.len() <= 8);
            }
        }
    }
}

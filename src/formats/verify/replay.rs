//! What was accepted, for as long as it could be accepted again.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::model::{Digest, Reason, Refusal, UnixTime};

/// The names of accepted messages, each until it has expired for good.
///
/// Bounded in count, in all, for one reader and for one signer's messages to it, and through [`super::Window`] in time. It never forgets
/// early: when it is full, or somebody has used up their share, new messages are refused as `OVERLOADED` with the time after which
/// something is forgotten. It lives in memory: after a restart, messages made before it are refused as `REPLAYED`, because nobody remembers them.
/// (A signer whose clock runs ahead can be replayed once across a restart, for as long as the skew that was allowed it.)
pub struct ReplayCache {
    since: u64,
    bounds: Bounds,
    seen: Mutex<Seen>,
}

/// Audiences whose open messages are forgotten apart from the others'.
const AUDIENCES_MAX: usize = 1024;

/// How many messages are remembered at most (about 400 bytes each).
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// In all.
    pub all: usize,
    /// For one reader.
    pub of_reader: usize,
    /// For one reader where less is left than that four times over, down to this: a quarter of what is left. It takes a crowd to take the
    /// memory of the others.
    pub of_reader_scarce: usize,
    /// For one reader by one signer: nobody takes the memory of those they write to, however many keys they have.
    pub of_signer: usize,
}

/// What one reader remembers of one signer's messages.
#[derive(Clone, Copy)]
pub struct Memory<'a> {
    cache: &'a ReplayCache,
    audience: &'a str,
    reader: &'a str,
    signer: &'a str,
}

/// When a message is over. In seconds since 1970.
#[derive(Clone, Copy)]
pub(super) struct Over {
    /// When it was made.
    pub made: u64,
    /// From then on it is not accepted any more.
    pub end: u64,
    /// Who says so.
    pub by: Ends,
}

/// Who has a message end.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Ends {
    /// It ends for every reader at once.
    ForEverybody,
    /// It says so itself: another reader may have had it end sooner.
    ByItself,
    /// This reader: for another one it may end later, and is open when it is forgotten here.
    ByItsReader,
}

/// What goes when a message is forgotten.
struct Kept {
    /// Those whose share it takes.
    shares: [Digest; 2],
    /// Of an open one: its audience, and when it was made.
    open: Option<(Digest, u64)>,
}

#[derive(Default)]
struct Seen {
    /// SHA-256 of (audience, kid, name).
    names: HashSet<Digest>,
    /// The same by the second in which they may go.
    ends: BTreeMap<(u64, Digest), Kept>,
    /// How much there is of each reader, and of each signer for it; who has nothing is not here.
    shares: HashMap<Digest, usize>,
    /// Everything that ended before was forgotten. A clock that is set back must not bring it to life again.
    forgotten_before: u64,
    /// Of each audience: a message that was made before may have been accepted and forgotten while it was open. Where its readers agree on how
    /// long one counts, such a message is over anyway.
    open_before: HashMap<Digest, u64>,
    /// The same of every audience.
    all_open_before: u64,
}

impl ReplayCache {
    /// `now` is the start of its memory.
    #[must_use]
    pub fn new(bounds: Bounds, now: UnixTime) -> Self {
        Self { since: now.seconds(), bounds, seen: Mutex::default() }
    }

    /// For `reader` to read a message of `signer`'s. Readers of one `audience` remember together: what one of them has accepted is no
    /// news to another. Those of different ones do not: nobody uses up what was said to somebody else.
    #[must_use]
    pub fn of<'a>(&'a self, audience: &'a str, reader: &'a str, signer: &'a str) -> Memory<'a> {
        Memory { cache: self, audience, reader, signer }
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

impl Memory<'_> {
    /// Takes a message that was found good in every other respect: the first time `kid` says `name`, and never again.
    ///
    /// # Errors
    /// `REPLAYED`; `OVERLOADED` when there is no room to remember it.
    pub(super) fn accept(&self, kid: &str, name: &str, over: Over, now: UnixTime) -> Result<(), Refusal> {
        let Over { made, end, by } = over;
        let replayed = |advice: &str| Err(Refusal::new(Reason::Replayed, advice));
        let cache = self.cache;
        if made < cache.since {
            return replayed("the message was made before this verifier's memory begins; make a new one");
        }
        // Digests first: no two texts run into each other.
        let [audience, kid] = [self.audience, kid].map(|text| Digest::of(text.as_bytes()));
        let digest = Digest::of_parts(&[&audience.0, &kid.0, name.as_bytes()]);
        let reader = Digest::of(self.reader.as_bytes());
        let signer = Digest::of_parts(&[&reader.0, self.signer.as_bytes()]);
        let mut seen = cache.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.forget(now.seconds());
        if seen.names.contains(&digest) {
            return replayed("the message was accepted before; make a new one");
        }
        if end < seen.forgotten_before {
            return replayed("the message may have been accepted before; make a new one");
        }
        if by != Ends::ForEverybody && made < seen.open_before(&audience) {
            return replayed("the message may have been accepted before; make a new one that expires sooner");
        }
        let has = |who: &Digest| seen.shares.get(who).copied().unwrap_or_default();
        let Bounds { all, of_reader, of_reader_scarce, of_signer } = cache.bounds;
        let of_reader = of_reader.min((all.saturating_sub(seen.names.len()) / 4).max(of_reader_scarce));
        if seen.names.len() >= all || has(&reader) >= of_reader || has(&signer) >= of_signer {
            let first = seen.ends.first_key_value().map_or(0, |((end, _), _)| *end);
            let wait = Duration::from_secs(first.saturating_sub(now.seconds()).max(1));
            let advice = "too many messages are remembered; come back later, or make messages that live shorter";
            return Err(Refusal::new(Reason::Overloaded, advice).retry_after(wait));
        }
        seen.names.insert(digest);
        let open = (by == Ends::ByItsReader).then_some((audience, made));
        seen.ends.insert((end, digest), Kept { shares: [reader, signer], open });
        for who in [reader, signer] {
            *seen.shares.entry(who).or_default() += 1;
        }
        Ok(())
    }
}

impl Seen {
    /// Lets go of what can no longer be accepted at `now`.
    fn forget(&mut self, now: u64) {
        while let Some(first) = self.ends.first_entry() {
            if first.key().0 > now {
                break;
            }
            let ((_, digest), kept) = first.remove_entry();
            self.names.remove(&digest);
            if let Some((audience, made)) = kept.open {
                self.forget_open(audience, made);
            }
            for who in kept.shares {
                if let Some(count) = self.shares.get_mut(&who) {
                    *count -= 1;
                    if *count == 0 {
                        self.shares.remove(&who);
                    }
                }
            }
            self.forgotten_before = self.forgotten_before.max(now.saturating_add(1));
        }
    }

    fn forget_open(&mut self, audience: Digest, made: u64) {
        if self.open_before.len() >= AUDIENCES_MAX && !self.open_before.contains_key(&audience) {
            // Too many to be kept apart: more is refused, and nothing accepted twice.
            let newest = self.open_before.drain().map(|(_, before)| before).max();
            self.all_open_before = self.all_open_before.max(newest.unwrap_or_default());
        }
        let before = self.open_before.entry(audience).or_default();
        *before = made.saturating_add(1).max(*before);
    }

    fn open_before(&self, audience: &Digest) -> u64 {
        self.open_before.get(audience).copied().unwrap_or_default().max(self.all_open_before)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(seconds: u64) -> UnixTime {
        UnixTime::from_seconds(seconds)
    }

    fn cache(all: usize, of_reader: usize, of_signer: usize, since: u64) -> ReplayCache {
        ReplayCache::new(Bounds { all, of_reader, of_reader_scarce: of_reader, of_signer }, at(since))
    }

    /// What the reader `tools/1` makes of a message of `s`.
    fn accept(cache: &ReplayCache, kid: &str, name: &str, made: u64, end: u64, now: UnixTime) -> Result<(), Refusal> {
        cache.of("tools", "tools/1", "s").accept(kid, name, over(made, end), now)
    }

    fn over(made: u64, end: u64) -> Over {
        Over { made, end, by: Ends::ForEverybody }
    }

    fn open(made: u64, end: u64) -> Over {
        Over { made, end, by: Ends::ByItsReader }
    }

    fn reason(result: Result<(), Refusal>) -> Option<Reason> {
        result.err().map(|refusal| refusal.reason)
    }

    #[test]
    fn a_name_is_taken_once_by_each_key() {
        let cache = cache(10, 10, 10, 100);
        assert_eq!(reason(accept(&cache, "k", "n", 100, 160, at(100))), None);
        assert_eq!(reason(accept(&cache, "k", "n", 100, 160, at(159))), Some(Reason::Replayed));
        assert_eq!(reason(accept(&cache, "kn", "", 100, 160, at(100))), None);
        assert_eq!(reason(accept(&cache, "other", "n", 100, 160, at(100))), None);
        assert_eq!(cache.len(), 3);
    }

    #[test]
    fn what_was_made_before_its_memory_is_refused() {
        let cache = cache(10, 10, 10, 100);
        assert_eq!(reason(accept(&cache, "k", "n", 99, 160, at(100))), Some(Reason::Replayed));
        assert!(cache.is_empty());
    }

    #[test]
    fn a_full_memory_refuses_and_says_when_to_come_back() {
        let cache = cache(3, 10, 10, 100);
        for (name, end) in [("1", 130), ("2", 140), ("3", 150)] {
            assert_eq!(reason(accept(&cache, "k", name, 100, end, at(100))), None);
        }
        let full = cache.of("others", "others/1", "t").accept("m", "1", over(100, 150), at(110)).unwrap_err();
        assert_eq!((full.reason, full.retry_after), (Reason::Overloaded, Some(Duration::from_secs(20))));
        assert_eq!(reason(accept(&cache, "k", "1", 100, 130, at(129))), Some(Reason::Replayed), "nothing was forgotten for it");
        assert_eq!(reason(accept(&cache, "m", "1", 100, 150, at(130))), None);
    }

    #[test]
    fn nobody_takes_the_memory_of_another_however_many_keys_they_have() {
        let cache = cache(10, 3, 2, 100);
        let take = |reader: &str, signer: &str, kid: &str| {
            reason(cache.of("tools", reader, signer).accept(kid, &format!("{reader} {signer}"), over(100, 150), at(100)))
        };
        assert_eq!([take("tools/1", "s", "k1"), take("tools/1", "s", "k2")], [None, None]);
        assert_eq!(take("tools/1", "s", "k3"), Some(Reason::Overloaded), "the share of a signer");
        assert_eq!(take("tools/1", "t", "l1"), None, "another signer has room");
        assert_eq!(take("tools/1", "u", "m1"), Some(Reason::Overloaded), "the share of a reader");
        assert_eq!(take("tools/2", "s", "k1"), None, "another reader has room");
    }

    #[test]
    fn a_few_who_take_all_that_they_may_leave_as_much_to_the_others() {
        let cache = ReplayCache::new(Bounds { all: 64, of_reader: 16, of_reader_scarce: 1, of_signer: 64 }, at(100));
        let take = |reader: usize, name: usize| {
            let (reader, name) = (reader.to_string(), name.to_string());
            cache.of("tools", &reader, "s").accept("k", &format!("{reader} {name}"), over(100, 3700), at(100)).is_ok()
        };
        let taken = |reader: usize| (0..64).take_while(|name| take(reader, *name)).count();
        assert_eq!((0..5).map(taken).collect::<Vec<_>>(), [13, 10, 8, 6, 5]);
        assert!(!take(0, 64), "no more than is left to the others");
        assert!((5..16).all(|reader| taken(reader) > 0));
    }

    #[test]
    fn a_message_is_news_to_another_audience_and_to_nobody_of_the_same() {
        let cache = cache(10, 10, 10, 100);
        let read = |audience, reader| reason(cache.of(audience, reader, "s").accept("k", "n", over(100, 160), at(100)));
        assert_eq!(read("gateway", "gateway/1"), None);
        assert_eq!(read("tools", "tools/1"), None);
        assert_eq!(read("tools", "tools/2"), Some(Reason::Replayed));
    }

    #[test]
    fn a_clock_set_back_brings_nothing_forgotten_to_life() {
        let cache = cache(10, 10, 10, 100);
        assert_eq!(reason(accept(&cache, "k", "n", 100, 160, at(100))), None);
        assert_eq!(reason(accept(&cache, "k", "later", 200, 260, at(200))), None);
        assert_eq!(cache.len(), 1);
        assert_eq!(reason(accept(&cache, "k", "n", 100, 160, at(120))), Some(Reason::Replayed));
    }

    #[test]
    fn an_open_message_is_accepted_once_however_long_another_reader_has_it_count() {
        let cache = cache(10, 10, 10, 100);
        let read = |audience, over, now| reason(cache.of(audience, "tools/1", "s").accept("k", "n", over, at(now)));
        assert_eq!(read("tools", open(100, 161), 100), None);
        assert_eq!(read("tools", open(100, 460), 162), Some(Reason::Replayed));
        assert_eq!(read("others", open(100, 460), 163), None, "another audience has not heard it");
        let says_so = Over { made: 100, end: 460, by: Ends::ByItself };
        assert_eq!(read("tools", says_so, 164), Some(Reason::Replayed), "it ended sooner for the reader before");
        assert_eq!(read("tools", over(100, 460), 165), None, "of another kind: that ends for everybody at once");
        assert_eq!(reason(cache.of("tools", "tools/1", "s").accept("k", "new", open(101, 460), at(165))), None);
    }

    #[test]
    fn more_audiences_than_are_kept_apart_are_refused_more_and_never_less() {
        let all = AUDIENCES_MAX + 2;
        let cache = cache(all, all, all, 100);
        let read = |audience: usize, name, over, now| {
            reason(cache.of(&audience.to_string(), "tools/1", "s").accept("k", name, over, at(now)))
        };
        for audience in 0..all {
            assert_eq!(read(audience, "n", open(100, 161), 100), None);
        }
        for audience in 0..all {
            assert_eq!(read(audience, "n", open(100, 460), 200), Some(Reason::Replayed));
        }
        assert!(cache.seen.lock().unwrap().open_before.len() <= AUDIENCES_MAX);
        assert_eq!(read(all, "n", open(100, 460), 200), Some(Reason::Replayed), "put together with the others");
        assert_eq!(read(all, "n", open(101, 460), 200), None);
    }

    proptest! {
        #[test]
        fn nothing_is_ever_accepted_twice(
            steps in prop::collection::vec((0_u8..3, 0_u8..4, 0_u64..40, 0_u64..50, prop::option::of(1_u64..30)), 1..200)
        ) {
            let cache = cache(8, 6, 4, 0);
            let mut accepted = HashSet::new();
            for (kid, name, made, now, lifetime) in steps {
                // As the verifier does: a message counts from when it was made for ten seconds, or for as long as its reader says, if it
                // does not end by itself before.
                let by_itself = made + u64::from(name) * 8;
                let over = match lifetime {
                    None => over(made, made + 10),
                    Some(lifetime) if by_itself > made && by_itself <= made + lifetime => {
                        Over { made, end: by_itself, by: Ends::ByItself }
                    }
                    Some(lifetime) => open(made, made + lifetime),
                };
                if over.end <= now || made > now {
                    continue;
                }
                let (kid, name) = (kid.to_string(), format!("{name}/{made}/{}", lifetime.is_some()));
                let signer = format!("{kid}'s");
                match cache.of("tools", "tools/1", &signer).accept(&kid, &name, over, at(now)) {
                    Ok(()) => prop_assert!(accepted.insert((kid, name))),
                    Err(refusal) => prop_assert!(matches!(refusal.reason, Reason::Replayed | Reason::Overloaded)),
                }
                prop_assert!(cache.len() <= 8);
            }
        }
    }
}

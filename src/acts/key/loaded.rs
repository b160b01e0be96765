//! The keys in memory: bounded, and one of each. What is decided about a key holds for all who use it, so none leaves memory while
//! anybody uses it or anything of it waits for the disk.

use std::collections::{HashMap, VecDeque};
use std::hash::BuildHasher as _;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::hsm;
use crate::ledger::{AgentKey, KeyOf, Ledger};
use crate::model::{KeyId, Refusal};

/// Keys that are looked at when one more is loaded, at most: those in use stay, and memory is above its bound by them for a while.
const LOOKS_MAX: usize = 64;
/// Kinds of names, by a hash that nobody outside knows: the leaving of one key voids what is being read of others of its kind, and of no
/// more, so that many who load at once do not have one another read again and again.
const KINDS: usize = 4096;

/// A version, by its number, and the wrapping key that it is under.
type BoundOf = (u32, Option<KeyId>);

/// A key in use.
pub(super) struct Loaded {
    pub(super) key: Arc<AgentKey>,
    signer: Mutex<Option<(BoundOf, hsm::AgentKey)>>,
    /// Taken by whoever changes the key: one change at a time.
    pub(super) changing: Arc<tokio::sync::Mutex<()>>,
    /// Read by whoever signs, written while a new version comes into force.
    pub(super) signing: Arc<tokio::sync::RwLock<()>>,
    /// Used since it was last looked at.
    touched: AtomicBool,
}

impl Loaded {
    pub(super) fn new(key: AgentKey) -> Self {
        Self {
            key: Arc::new(key),
            signer: Mutex::default(),
            changing: Arc::default(),
            signing: Arc::default(),
            touched: AtomicBool::new(true),
        }
    }

    /// The version that signs, bound; made by `bind` the first time.
    pub(super) fn signer(
        &self,
        version: BoundOf,
        bind: impl FnOnce() -> Result<hsm::AgentKey, Refusal>,
    ) -> Result<hsm::AgentKey, Refusal> {
        let mut signer = self.signer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((bound, key)) = &*signer
            && *bound == version
        {
            return Ok(key.clone());
        }
        let key = bind()?;
        *signer = Some((version, key.clone()));
        Ok(key)
    }

    /// Forgets how it was bound: what was bound is being destroyed.
    pub(super) fn unbind(&self) {
        *self.signer.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }
}

/// Second-chance eviction: what was used since it was last looked at stays.
pub(super) struct LoadedKeys {
    inner: Mutex<Inner>,
    max: usize,
}

struct Inner {
    by_name: HashMap<KeyOf, Arc<Loaded>>,
    ring: VecDeque<KeyOf>,
    /// How many keys of each kind have left memory: whoever read a row before its key did reads again.
    left: Vec<u64>,
}

impl LoadedKeys {
    pub(super) fn new(max: usize) -> Self {
        let inner = Inner { by_name: HashMap::new(), ring: VecDeque::new(), left: vec![0; KINDS] };
        Self { inner: Mutex::new(inner), max }
    }

    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The key, or what to hand to [`LoadedKeys::insert`] after its row was read.
    pub(super) fn get(&self, of: &KeyOf) -> Result<Arc<Loaded>, u64> {
        let inner = self.lock();
        match inner.by_name.get(of) {
            Some(loaded) => {
                loaded.touched.store(true, Ordering::Relaxed);
                Ok(Arc::clone(loaded))
            }
            None => Err(inner.left[inner.kind(of)]),
        }
    }

    /// Takes a key in whose row was read at `generation`. Who was first stays; `None`: read it again.
    pub(super) fn insert(&self, loaded: Arc<Loaded>, generation: u64, ledger: &Ledger) -> Option<Arc<Loaded>> {
        let mut inner = self.lock();
        if let Some(there) = inner.by_name.get(loaded.key.of()) {
            return Some(Arc::clone(there));
        }
        if inner.left[inner.kind(loaded.key.of())] != generation {
            return None;
        }
        let of = loaded.key.of().clone();
        inner.by_name.insert(of.clone(), Arc::clone(&loaded));
        inner.ring.push_back(of);
        for _ in 0..LOOKS_MAX {
            if inner.by_name.len() <= self.max {
                break;
            }
            inner.look(ledger);
        }
        Some(loaded)
    }

    /// The key has no row any more: it leaves memory, whoever uses it. What was read of it before is out of date.
    pub(super) fn forget(&self, of: &KeyOf) {
        let mut inner = self.lock();
        inner.by_name.remove(of);
        inner.ring.retain(|other| other != of);
        inner.has_left(of);
    }

    /// What to hand to [`LoadedKeys::pass`] with rows that are read after this.
    pub(super) fn generations(&self) -> Vec<u64> {
        self.lock().left.clone()
    }

    /// The keys of rows that were read at `generations`, for somebody who passes by all there are: those that were not in memory leave it
    /// again with him, unless somebody used them meanwhile. Those of which a row may be out of date are not among them.
    pub(super) fn pass(&self, keys: Vec<AgentKey>, generations: &[u64]) -> Passing<'_> {
        let mut inner = self.lock();
        let mut passing = Passing { keys: self, here: Vec::new(), brought: Vec::new() };
        for key in keys {
            let kind = inner.kind(key.of());
            if let Some(there) = inner.by_name.get(key.of()) {
                passing.here.push(Arc::clone(there));
            } else if generations.get(kind) == inner.left.get(kind) {
                let brought = Arc::new(Loaded { touched: AtomicBool::new(false), ..Loaded::new(key) });
                inner.by_name.insert(brought.key.of().clone(), Arc::clone(&brought));
                passing.brought.push(brought.key.of().clone());
                passing.here.push(brought);
            }
        }
        passing
    }

    /// Keys with open blocks of signatures.
    pub(super) fn with_reservations(&self) -> Vec<Arc<Loaded>> {
        self.lock().by_name.values().filter(|loaded| loaded.key.has_reserved()).cloned().collect()
    }
}

/// Keys that are held in passing.
pub(super) struct Passing<'a> {
    keys: &'a LoadedKeys,
    pub(super) here: Vec<Arc<Loaded>>,
    brought: Vec<KeyOf>,
}

impl Drop for Passing<'_> {
    fn drop(&mut self) {
        self.here.clear();
        let mut inner = self.keys.lock();
        for of in self.brought.drain(..) {
            let Some(loaded) = inner.by_name.get(&of) else { continue };
            let used = loaded.touched.load(Ordering::Relaxed) || loaded.key.has_reserved();
            if used || Arc::strong_count(loaded) > 1 || Arc::strong_count(&loaded.key) > 1 {
                inner.ring.push_back(of);
            } else {
                inner.by_name.remove(&of);
                inner.has_left(&of);
            }
        }
    }
}

impl Inner {
    /// The key that was looked at longest ago leaves, or goes to the end of the line.
    fn look(&mut self, ledger: &Ledger) {
        let Some(of) = self.ring.pop_front() else { return };
        let Some(loaded) = self.by_name.get(&of) else { return };
        let used = loaded.touched.swap(false, Ordering::Relaxed) || Arc::strong_count(loaded) > 1;
        // Entries on their way to the disk hold the key.
        if used || Arc::strong_count(&loaded.key) > 1 {
            self.ring.push_back(of);
        } else if loaded.key.has_reserved() {
            ledger.seal_signatures(&loaded.key);
            self.ring.push_back(of);
        } else {
            self.by_name.remove(&of);
            self.has_left(&of);
        }
    }

    fn kind(&self, of: &KeyOf) -> usize {
        usize::try_from(self.by_name.hasher().hash_one(of) % KINDS as u64).unwrap_or(0)
    }

    fn has_left(&mut self, of: &KeyOf) {
        let kind = self.kind(of);
        self.left[kind] += 1;
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::ledger::{self, KeyTerms, Settings, StoredKey, Token};
    use crate::model::{AgentId, KeyName, TokenId, TrustDomain};
    use crate::proto::{self, KeyAccounting, KeyAlgorithm, KeyPurpose, KeyState, KeyStorage};

    /// Each loads a key of its own while memory is full: one that leaves for another voids what few of them have read.
    #[tokio::test]
    async fn who_loads_beside_many_reads_his_row_once_and_never_keeps_one_that_left_meanwhile() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        ledger::create(&state, &TrustDomain::parse("example.org").unwrap(), [1; 16]).unwrap();
        let settings = Settings { state, runtime: directory.path().into(), queue_max: 64, live_max: 8, forget_seconds: 3600 };
        let ledger = Ledger::open(&settings, Arc::default()).unwrap().ledger;
        let expires = ledger.clock().reckoned().plus_seconds(600);
        let token = Token { id: TokenId::random(), public_key: [7; 32], expires, spent_for: None };
        let agent = AgentId::parse("builder/1").unwrap();
        let limits = proto::Limits { ttl_seconds_max: 600, rejoin_seconds: 0 };
        ledger.enrol(&agent, limits, proto::Operator::default(), token).await.unwrap();
        let terms = KeyTerms {
            purpose: KeyPurpose::Jws,
            algorithm: KeyAlgorithm::P256,
            storage_asked: KeyStorage::Wrapped,
            accounting: KeyAccounting::Recorded,
            signatures_max: 0,
            ttl_seconds: 600,
        };
        let of = |number: usize| KeyOf { agent: agent.clone(), epoch: 1, name: KeyName::parse(&format!("k-{number}")).unwrap() };
        let read = |of: KeyOf| {
            let row = StoredKey { of, terms, state: KeyState::Active, used: 0, versions: Vec::new(), created: None };
            Arc::new(Loaded { touched: AtomicBool::new(false), ..Loaded::new(ledger.restore_key(row).unwrap()) })
        };
        let keys = LoadedKeys::new(8);
        // All of them read, and only then does the first take its key in.
        let begun: Vec<_> = (0..300).map(|number| (of(number), keys.get(&of(number)).err().unwrap())).collect();
        let again = begun.iter().filter(|(of, generation)| keys.insert(read(of.clone()), *generation, &ledger).is_none()).count();
        assert!(again < 60, "{again} of 300 had to read again");
        // One that came and left while its row was being read is read again, by whichever way it left.
        let (mine, pages) = (keys.get(&of(0)).err().unwrap(), keys.generations());
        assert!(keys.insert(read(of(0)), mine, &ledger).is_some());
        keys.forget(&of(0));
        assert!(keys.insert(read(of(0)), mine, &ledger).is_none());
        let stale = ledger.restore_key(StoredKey {
            of: of(0),
            terms,
            state: KeyState::Active,
            used: 0,
            versions: Vec::new(),
            created: None,
        });
        assert!(keys.pass(vec![stale.unwrap()], &pages).here.is_empty());
        ledger.finish(Duration::from_secs(5)).await;
    }
}

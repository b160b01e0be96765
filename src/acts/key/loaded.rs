//! The keys in memory: bounded, and one of each. What is decided about a key holds for all who use it, so none leaves memory while
//! anybody uses it or anything of it waits for the disk.

use std::collections::{HashMap, VecDeque};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::hsm;
use crate::ledger::{AgentKey, KeyOf, Ledger};
use crate::model::{KeyId, Refusal};

/// Keys that are looked at when one more is loaded, at most: those in use stay, and memory is above its bound by them for a while.
const LOOKS_MAX: usize = 64;

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

#[derive(Default)]
struct Inner {
    by_name: HashMap<KeyOf, Arc<Loaded>>,
    ring: VecDeque<KeyOf>,
    /// How many keys have left memory: whoever read a row before one did reads again.
    evicted: u64,
}

impl LoadedKeys {
    pub(super) fn new(max: usize) -> Self {
        Self { inner: Mutex::default(), max }
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
            None => Err(inner.evicted),
        }
    }

    /// Takes a key in whose row was read at `generation`. Who was first stays; `None`: read it again.
    pub(super) fn insert(&self, loaded: Arc<Loaded>, generation: u64, ledger: &Ledger) -> Option<Arc<Loaded>> {
        let mut inner = self.lock();
        if let Some(there) = inner.by_name.get(loaded.key.of()) {
            return Some(Arc::clone(there));
        }
        if inner.evicted != generation {
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
        inner.evicted += 1;
    }

    /// What to hand to [`LoadedKeys::pass`] with rows that are read after this.
    pub(super) fn generation(&self) -> u64 {
        self.lock().evicted
    }

    /// The keys of rows that were read at `generation`, for somebody who passes by all there are: those that were not in memory leave it
    /// again with him, unless somebody used them meanwhile. Those of which a row may be out of date are not among them.
    pub(super) fn pass(&self, keys: Vec<AgentKey>, generation: u64) -> Passing<'_> {
        let mut inner = self.lock();
        let mut passing = Passing { keys: self, here: Vec::new(), brought: Vec::new() };
        for key in keys {
            if let Some(there) = inner.by_name.get(key.of()) {
                passing.here.push(Arc::clone(there));
            } else if inner.evicted == generation {
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
        let mut gone = 0;
        for of in self.brought.drain(..) {
            let Some(loaded) = inner.by_name.get(&of) else { continue };
            let used = loaded.touched.load(Ordering::Relaxed) || loaded.key.has_reserved();
            if used || Arc::strong_count(loaded) > 1 || Arc::strong_count(&loaded.key) > 1 {
                inner.ring.push_back(of);
            } else {
                inner.by_name.remove(&of);
                gone += 1;
            }
        }
        inner.evicted += gone;
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
            self.evicted += 1;
        }
    }
}

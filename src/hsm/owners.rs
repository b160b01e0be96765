//! Owners of session objects: agents' keys that live in sessions. An owner is a thread with one session, in which it creates and unwraps
//! objects; it never signs, so nothing that happens at a signature spoils that session. Lanes sign with its objects by their handles.
//! A session that dies takes its objects along: what was wrapped is unwrapped again, the rest is lost. Each owner has a shard of the keys.
//!
//! An object in use is never destroyed: who signs with it holds it, and the last to let go leaves it to its owner to be buried.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Instant;

use cryptoki::object::ObjectHandle;
use cryptoki::session::Session;
use tokio::sync::{Semaphore, SemaphorePermit};

use super::admin::Errand;
use super::error::Error;
use super::faults::Outcome;
use super::keyring::{Bound, Keyring};
use super::lanes::{self, Hold};
use super::queue::{Mark, Queue};
use super::token::Token;
use super::{objects, wrapping};
use crate::model::{Algorithm, KeyId};

/// Owners of a token for keys that are quickly made. Making a key is more than its generation alone: two keep two cores busy.
const QUICK_SHARDS: usize = 2;
/// With the one for keys that are slow to make, RSA's: nobody else's key waits while one is made.
pub(super) const SHARDS: usize = QUICK_SHARDS + 1;
/// A token of fewer sessions has them for its lanes, and no keys in sessions.
pub(super) const SESSIONS_MIN: usize = 8;
/// Errands that may wait at each owner.
const ERRANDS_MAX: usize = 1024;
/// Unwrapped keys that stay in sessions (SoftHSM: about 8 KiB each).
const UNWRAPPED_MAX: usize = 4096;
/// Keys of the class `session`, which nothing brings back.
const SESSION_KEYS_MAX: usize = 16_384;
/// Keys that are slow to make, waited for or being made, at once: one at a time is made.
const SLOW_MAX: usize = 16;
/// Resident keys whose place in the token is remembered.
const RESIDENTS_MAX: usize = 1024;
/// Wrapping keys whose place in the token is remembered: a few generations.
const WRAPPING_KEYS_MAX: usize = 16;

/// What the owners of one token share.
pub(super) struct Owners {
    shards: [Arc<Shard>; SHARDS],
    /// Agents' keys that somebody holds, or whose object is there.
    pub(super) keys: Keyring,
    residents: Mutex<VecDeque<Arc<Bound>>>,
    unwrapped_max: AtomicUsize,
    /// Places to wait for a turn, and the one turn.
    slow: [Semaphore; 2],
    /// Where wrapping keys are, by epoch.
    wrapping: tokio::sync::Mutex<HashMap<KeyId, (u64, ObjectHandle)>>,
}

/// Whether its keys take long to make: primes are looked for until two are found.
pub(super) fn is_slow(algorithm: Algorithm) -> bool {
    algorithm == Algorithm::Ps256
}

/// One owner's objects.
pub(super) struct Shard {
    pub(super) errands: Queue<Errand>,
    /// Which of its sessions is the present one; 0: none.
    life: AtomicU64,
    lives: AtomicU64,
    kept: Mutex<Kept>,
    doomed: Mutex<Vec<Doomed>>,
}

#[derive(Default)]
struct Kept {
    /// In the order in which they came; one that was used since is passed over once.
    unwrapped: VecDeque<Arc<Object>>,
    session: HashMap<KeyId, Arc<Object>>,
}

/// An object that nobody signs with any more.
struct Doomed {
    id: KeyId,
    handle: ObjectHandle,
    life: u64,
}

/// A private key in an owner's session.
pub(super) struct Object {
    key: Arc<Bound>,
    shard: Arc<Shard>,
    pub(super) handle: ObjectHandle,
    life: u64,
    /// The epoch in which the handle was last known to be this object's; 0: in doubt.
    epoch: AtomicU64,
    used: AtomicBool,
    /// A signature of it has verified.
    proven: AtomicBool,
}

impl Object {
    pub(super) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// Its owner makes sure of it before it is used again.
    pub(super) fn doubt(&self) {
        self.epoch.store(0, Ordering::Release);
    }

    /// A signature of it has verified.
    pub(super) fn prove(&self) {
        if !self.proven.swap(true, Ordering::AcqRel)
            && let Some(owned) = &self.key.owned
        {
            owned.doubted.store(false, Ordering::Release);
        }
    }

    /// Its first signature does not verify: another key came out of the blob. `false`: it is the right key, and something else is wrong.
    pub(super) fn is_another_key(&self) -> bool {
        if self.proven.load(Ordering::Acquire) {
            return false;
        }
        if let Some(owned) = &self.key.owned {
            owned.doubted.store(true, Ordering::Release);
            owned.forget();
        }
        self.shard.let_go(self.key.id);
        true
    }

    fn is_alive(&self) -> bool {
        self.life == self.shard.life()
    }
}

impl Drop for Object {
    fn drop(&mut self) {
        if self.is_alive() {
            let doomed = Doomed { id: self.key.id, handle: self.handle, life: self.life };
            self.shard.doomed.lock().unwrap_or_else(PoisonError::into_inner).push(doomed);
        }
    }
}

/// A key wrapped by the token.
#[derive(Clone)]
pub(super) struct Blob {
    pub(super) bytes: Arc<[u8]>,
    /// The wrapping key.
    pub(super) by: KeyId,
}

/// What a key that lives in a session needs to be found.
pub(super) struct Owned {
    shard: Arc<Shard>,
    /// `None`: of the class `session`.
    blob: Mutex<Option<Blob>>,
    object: Mutex<Weak<Object>>,
    /// The blob has given another key: what comes out of it next is tried with a test signature first.
    doubted: AtomicBool,
}

impl Owned {
    /// With the blob that it is unwrapped from, wherever the key is rewrapped.
    pub(super) fn set_blob(&self, blob: Blob) {
        *self.blob.lock().unwrap_or_else(PoisonError::into_inner) = Some(blob);
    }

    fn blob(&self) -> Option<Blob> {
        self.blob.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn forget(&self) {
        *self.object.lock().unwrap_or_else(PoisonError::into_inner) = Weak::new();
    }

    /// Its object, if that still is in the present session of its owner.
    pub(super) fn object(&self) -> Option<Arc<Object>> {
        self.object.lock().unwrap_or_else(PoisonError::into_inner).upgrade().filter(|object| object.is_alive())
    }
}

impl Shard {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            errands: Queue::new(ERRANDS_MAX),
            life: AtomicU64::new(0),
            lives: AtomicU64::new(0),
            kept: Mutex::default(),
            doomed: Mutex::default(),
        })
    }

    fn life(&self) -> u64 {
        self.life.load(Ordering::Acquire)
    }

    fn kept(&self) -> MutexGuard<'_, Kept> {
        self.kept.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A session begins. Only its owner says so.
    fn begins(&self) {
        self.life.store(self.lives.fetch_add(1, Ordering::AcqRel) + 1, Ordering::Release);
    }

    /// The session is gone, and what was in it.
    fn ends(&self) {
        self.life.store(0, Ordering::Release);
        let lost = std::mem::take(&mut *self.kept());
        if !lost.session.is_empty() {
            tracing::warn!(keys = lost.session.len(), "an owner's session ended: keys of the class session are lost");
        }
        drop(lost);
        self.doomed.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Whether one more key of the class `session` may be made.
    pub(super) fn has_room(&self) -> Result<(), Error> {
        let full = self.kept().session.len() >= SESSION_KEYS_MAX / QUICK_SHARDS;
        if full { Err(Error::SessionKeysFull(SESSION_KEYS_MAX)) } else { Ok(()) }
    }

    /// An object of `key` was made in the present session. The oldest that was not used since makes room.
    pub(super) fn keep(
        self: &Arc<Self>,
        key: &Arc<Bound>,
        handle: ObjectHandle,
        epoch: u64,
        most: usize,
        proven: bool,
    ) -> Arc<Object> {
        let object = Arc::new(Object {
            key: Arc::clone(key),
            shard: Arc::clone(self),
            handle,
            life: self.life(),
            epoch: AtomicU64::new(epoch),
            used: AtomicBool::new(false),
            proven: AtomicBool::new(proven),
        });
        let Some(owned) = &key.owned else { return object };
        let mut evicted = Vec::new();
        let mut kept = self.kept();
        if owned.blob().is_some() {
            while kept.unwrapped.len() >= most.max(1) {
                let Some(oldest) = kept.unwrapped.pop_front() else { break };
                if oldest.used.swap(false, Ordering::Relaxed) {
                    kept.unwrapped.push_back(oldest);
                } else {
                    evicted.push(oldest);
                }
            }
            kept.unwrapped.push_back(Arc::clone(&object));
        } else {
            evicted.extend(kept.session.insert(key.id, Arc::clone(&object)));
        }
        drop(kept);
        *owned.object.lock().unwrap_or_else(PoisonError::into_inner) = Arc::downgrade(&object);
        object
    }

    /// Forgets the objects of this id; who signs with one finishes. With how many there were.
    pub(super) fn let_go(&self, id: KeyId) -> usize {
        let mut kept = self.kept();
        let (gone, rest) = kept.unwrapped.drain(..).partition::<VecDeque<_>, _>(|object| object.key.id == id);
        kept.unwrapped = rest;
        let session = kept.session.remove(&id);
        drop(kept);
        let count = gone.len() + usize::from(session.is_some());
        for object in gone.into_iter().chain(session) {
            if let Some(owned) = &object.key.owned {
                owned.forget();
            }
        }
        count
    }

    /// Destroys what nobody signs with any more; on its owner's thread. A handle may name something else by now: looked at first.
    fn bury(&self, session: &Session) {
        let doomed = std::mem::take(&mut *self.doomed.lock().unwrap_or_else(PoisonError::into_inner));
        for Doomed { id, handle, .. } in doomed.into_iter().filter(|doomed| doomed.life == self.life()) {
            let gone = objects::is_in_session(session, handle, id)
                .and_then(|ours| if ours { objects::destroy_object(session, handle) } else { Ok(()) });
            if let Err(error) = gone {
                tracing::debug!(%error, key = %id, "an object stays until its session ends");
            }
        }
    }
}

impl Owners {
    pub(super) fn new() -> Self {
        Self {
            shards: std::array::from_fn(|_| Shard::new()),
            keys: Keyring::default(),
            residents: Mutex::default(),
            unwrapped_max: AtomicUsize::new(UNWRAPPED_MAX),
            slow: [SLOW_MAX, 1].map(Semaphore::new),
            wrapping: tokio::sync::Mutex::default(),
        }
    }

    /// One after the other makes a key that is slow to make, and between them whoever else waits for the same thread has a turn.
    ///
    /// # Errors
    /// `QueueFull` at once where too many wait; `Deadline`.
    pub(super) async fn turn(&self, deadline: Instant) -> Result<[SemaphorePermit<'_>; 2], Error> {
        let [places, turn] = &self.slow;
        let place = places.try_acquire().map_err(|_| Error::QueueFull)?;
        let turn = tokio::time::timeout_at(deadline.into(), turn.acquire()).await;
        Ok([place, turn.ok().and_then(Result::ok).ok_or(Error::Deadline)?])
    }

    pub(super) fn shards(&self) -> &[Arc<Shard>; SHARDS] {
        &self.shards
    }

    /// The shard of a key. Ids are random.
    pub(super) fn shard(&self, id: KeyId, algorithm: Algorithm) -> &Arc<Shard> {
        let [quick, slow] = self.shards_of(id);
        if is_slow(algorithm) { slow } else { quick }
    }

    /// The shards that a key may be in, whatever its algorithm.
    pub(super) fn shards_of(&self, id: KeyId) -> [&Arc<Shard>; 2] {
        [&self.shards[usize::from(id.0[15]) % QUICK_SHARDS], &self.shards[QUICK_SHARDS]]
    }

    /// What a key that lives in a session is bound with.
    pub(super) fn owned(&self, id: KeyId, algorithm: Algorithm, blob: Option<Blob>) -> Owned {
        let shard = Arc::clone(self.shard(id, algorithm));
        Owned { shard, blob: Mutex::new(blob), object: Mutex::default(), doubted: AtomicBool::new(false) }
    }

    /// Keeps a resident key bound, so that it is looked up once and not for each signature.
    pub(super) fn keep_resident(&self, key: &Arc<Bound>) {
        let mut residents = self.residents.lock().unwrap_or_else(PoisonError::into_inner);
        if !residents.iter().any(|known| Arc::ptr_eq(known, key)) {
            if residents.len() >= RESIDENTS_MAX {
                residents.pop_front();
            }
            residents.push_back(Arc::clone(key));
        }
    }

    pub(super) fn forget_resident(&self, id: KeyId) {
        self.residents.lock().unwrap_or_else(PoisonError::into_inner).retain(|key| key.id != id);
    }

    pub(super) fn set_unwrapped_max(&self, most: usize) {
        self.unwrapped_max.store(most, Ordering::Relaxed);
    }

    /// Where these wrapping keys are is looked up again.
    pub(super) async fn forget_wrapping(&self, ids: &[KeyId]) {
        self.wrapping.lock().await.retain(|id, _| !ids.contains(id));
    }

    /// Unwrapped objects that one shard keeps: of RSA keys half as many as of all others, beside those.
    pub(super) fn unwrapped_max(&self) -> usize {
        self.unwrapped_max.load(Ordering::Relaxed).div_ceil(QUICK_SHARDS)
    }

    pub(super) fn session_keys(&self) -> HashSet<KeyId> {
        self.shards.iter().flat_map(|shard| shard.kept().session.keys().copied().collect::<Vec<_>>()).collect()
    }

    /// Sessions that are open.
    pub(super) fn sessions(&self) -> usize {
        self.shards.iter().filter(|shard| shard.life() != 0).count()
    }
}

/// An owner's working life: one term of its queue.
pub(super) fn serve(token: &Token, shard: usize, term: u64, mark: &Mark) {
    /// Also where the module makes the wrapper panic: a session that nobody has any more is no life.
    struct Ends<'a>(&'a Shard);
    impl Drop for Ends<'_> {
        fn drop(&mut self) {
            self.0.ends();
        }
    }
    let shard = &token.owners.shards[shard];
    let ends = Ends(shard);
    let mut session: Option<Session> = None;
    while let Some(errand) = shard.errands.next(term) {
        if session.is_none() {
            match mark.inside(|| token.open_session(false)) {
                Ok(opened) => {
                    shard.begins();
                    session = Some(opened);
                }
                Err(error) => {
                    token.report(&error);
                    errand(token, Err(error));
                    continue;
                }
            }
        }
        let Some(open) = session.as_ref() else { continue };
        let alive = mark.inside(|| {
            let alive = errand(token, Ok(open));
            if alive {
                shard.bury(open);
            }
            alive
        });
        if !alive && let Some(dead) = session.take() {
            shard.ends();
            mark.inside(|| Token::discard(dead));
        }
    }
    drop(ends);
    token.leave(mark, session);
}

impl Token {
    /// Runs `work` on the owner of `shard`; once more in a new session if the present one turns out to be dead.
    pub(super) async fn owner_errand<R: Send + 'static>(
        self: &Arc<Self>,
        shard: &Shard,
        deadline: Instant,
        work: impl Fn(&Session) -> Result<R, Error> + Send + Sync + 'static,
    ) -> Result<R, Error> {
        let work = Arc::new(work);
        let run = || {
            let work = Arc::clone(&work);
            self.errand_on(&shard.errands, deadline, |error| !error.is_of_the_session(), move |session| work(session))
        };
        match run().await {
            Err(error) if error.is_of_the_session() => run().await,
            other => other,
        }
    }

    /// The object of a key, known to be its own in this epoch: looked at, or unwrapped, by its owner if it was not at hand.
    pub(super) async fn object_of(
        self: &Arc<Self>,
        key: &Arc<Bound>,
        owned: &Owned,
        deadline: Instant,
    ) -> Result<Arc<Object>, Error> {
        let at_hand = |epoch| owned.object().filter(|object| object.epoch() == epoch);
        let known = match at_hand(self.epoch()) {
            Some(object) => object,
            None => {
                let _only = tokio::time::timeout_at(deadline.into(), key.lookup.lock()).await.map_err(|_| Error::Deadline)?;
                let epoch = self.epoch();
                match at_hand(epoch) {
                    Some(object) => object,
                    None => self.fetch(key, owned, epoch, deadline).await?,
                }
            }
        };
        known.used.store(true, Ordering::Relaxed);
        Ok(known)
    }

    async fn fetch(
        self: &Arc<Self>,
        key: &Arc<Bound>,
        owned: &Owned,
        epoch: u64,
        deadline: Instant,
    ) -> Result<Arc<Object>, Error> {
        if let Some(object) = owned.object() {
            let (id, handle) = (key.id, object.handle);
            let looked =
                self.owner_errand(&owned.shard, deadline, move |session| objects::is_in_session(session, handle, id)).await?;
            // Its session may have turned out to be dead: in a new one the same number means nothing.
            if looked && object.is_alive() {
                object.epoch.store(epoch, Ordering::Release);
                return Ok(object);
            }
            owned.shard.let_go(key.id);
        }
        let Some(blob) = owned.blob() else { return Err(Error::KeyLost(key.id)) };
        let object = match self.unwrap(key, owned, &blob, epoch, deadline).await {
            // The wrapping key may be elsewhere by now.
            Err(error) if error.verdict().outcome == Outcome::Resolve => {
                self.owners.forget_wrapping(&[blob.by]).await;
                self.unwrap(key, owned, &blob, epoch, deadline).await?
            }
            other => other?,
        };
        if owned.doubted.load(Ordering::Acquire) {
            self.prove(key, &object, deadline).await?;
        }
        Ok(object)
    }

    async fn unwrap(
        self: &Arc<Self>,
        key: &Arc<Bound>,
        owned: &Owned,
        blob: &Blob,
        epoch: u64,
        deadline: Instant,
    ) -> Result<Arc<Object>, Error> {
        let way = self.wrapping_way()?;
        let by = self.wrapping_handle(blob.by, deadline).await?;
        let (token, wanted, bytes, shard) =
            (Arc::clone(self), Arc::clone(key), Arc::clone(&blob.bytes), Arc::clone(&owned.shard));
        self.owner_errand(&owned.shard, deadline, move |session| {
            let name = (wanted.id, wanted.public.algorithm());
            let handle = wrapping::unwrap(session, way, by, &bytes, name, false)?;
            Ok(shard.keep(&wanted, handle, epoch, token.owners.unwrapped_max(), false))
        })
        .await
    }

    /// A test signature: nothing else is signed by what came out of a blob that was wrong before.
    async fn prove(self: &Arc<Self>, key: &Arc<Bound>, object: &Arc<Object>, deadline: Instant) -> Result<(), Error> {
        let hold = Hold::of(Arc::clone(object));
        let answers = lanes::ask(self, key, &hold, vec![objects::test_input(key).into()], deadline).await;
        answers.into_iter().next().map_or(Err(Error::Deadline), |answer| answer.map(drop).map_err(|failed| failed.error))
    }

    /// How the token wraps.
    pub(super) fn wrapping_way(&self) -> Result<wrapping::Wrapping, Error> {
        let way = self.capabilities().and_then(|able| able.wrapping);
        way.ok_or_else(|| Error::Incapable { label: self.settings.token.label.clone(), what: "wrapped keys" })
    }

    /// Where a wrapping key is in this epoch; looked up on the admin lane if that is not known.
    pub(super) async fn wrapping_handle(self: &Arc<Self>, id: KeyId, deadline: Instant) -> Result<ObjectHandle, Error> {
        let mut known =
            tokio::time::timeout_at(deadline.into(), self.owners.wrapping.lock()).await.map_err(|_| Error::Deadline)?;
        let epoch = self.epoch();
        if let Some((_, handle)) = known.get(&id).filter(|(at, _)| *at == epoch) {
            return Ok(*handle);
        }
        let mut found = self.errand(deadline, move |session| wrapping::resolve(session, id)).await;
        if found.as_ref().is_err_and(Error::is_of_the_session) {
            found = self.errand(deadline, move |session| wrapping::resolve(session, id)).await;
        }
        let handle = found?;
        known.retain(|_, (at, _)| *at == epoch);
        if known.len() < WRAPPING_KEYS_MAX {
            known.insert(id, (epoch, handle));
        }
        Ok(handle)
    }
}

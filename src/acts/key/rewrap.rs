//! Agents' wrapped keys follow their wrapping key. One that has been replaced is retired when nothing is under it any more: each key is wrapped
//! under the active one, in the background; an object that the token has unwrapped stays what it is, so whoever signs notices nothing.
//!
//! A taint is another matter. Whoever has the wrapping key and any copy of a row, from a backup say, has the key in it, and no wrapping
//! undoes that. So nothing that was ever under a tainted key is rewrapped: what may sign gets a new version at once, and the versions before
//! are in the row no longer: they neither sign nor verify.
//!
//! Rows and the entry that tells of them are one transaction: after a crash each key is under the one wrapping key or the other, both of
//! which are there, and the next pass goes on with those that are left.

use std::collections::{BTreeMap, BTreeSet};
use std::error::Error as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::hsm;
use crate::ledger::{KeyVersion, Rewrapped, StoredKey};
use crate::model::{KeyId, Reason, Refusal};
use crate::proto::{AuthorityState as State, KeyState, Purpose};

use super::loaded::Loaded;
use super::{Acts, KeyToken, key_refusal};

/// Keys that one entry tells of, at most.
const PAGE: u32 = 64;
/// While others are served, each rewrapped key is followed by a rest of so many times what it took …
const REST_TIMES: u32 = 3;
/// … and of at least this.
const REST_MIN: Duration = Duration::from_millis(1);
/// Token or ledger are away for so many one after the other: they are asked again later. What is wrong with one key is not counted.
const FAILURES_MAX: usize = 8;

/// What came of a pass over all keys.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rewrap {
    /// There was nothing to do.
    Idle,
    /// What there was is done, or has changed meanwhile.
    Done,
    /// So many could not be rewrapped now.
    Left(u64),
}

/// How far it has got. A start counts anew.
#[derive(Default)]
pub(super) struct Rewrapping(Mutex<Progress>);

#[derive(Default)]
struct Progress {
    /// Wrapping keys that nothing is under any more; with a taint: that nothing was ever under.
    freed: Vec<(KeyId, bool)>,
    /// Keys still to be taken from under each.
    left: BTreeMap<KeyId, u64>,
}

impl Rewrapping {
    fn lock(&self) -> MutexGuard<'_, Progress> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Wrapping keys, and what is to become of what is under them.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Task {
    active: KeyId,
    /// Those before it that are in the token still.
    before: Vec<KeyId>,
    tainted: Vec<KeyId>,
    /// Those that are to be freed, and whether they are tainted.
    open: Vec<(KeyId, bool)>,
}

impl Task {
    fn is_exposed(&self, version: &KeyVersion) -> bool {
        let mut under = version.wrapped.iter().map(|(_, by)| by).chain(&version.wrapped_before);
        under.any(|by| self.tainted.contains(by))
    }

    /// Whether it is a wrapping key that a pass takes.
    fn takes(&self, id: KeyId) -> bool {
        id == self.active || self.before.contains(&id)
    }

    /// Under a wrapping key that is not active any more.
    fn is_stale(&self, version: &KeyVersion) -> bool {
        version.wrapped.as_ref().is_some_and(|(_, by)| self.before.contains(by))
    }

    /// Which of the open ones hold anything of these versions.
    fn held_by<'a>(&'a self, versions: &'a [KeyVersion]) -> impl Iterator<Item = KeyId> + 'a {
        let holds = |(id, tainted): &(KeyId, bool)| {
            versions.iter().any(|version| {
                version.wrapped.as_ref().is_some_and(|(_, by)| by == id) || (*tainted && version.wrapped_before.contains(id))
            })
        };
        self.open.iter().filter(move |one| holds(one)).map(|(id, _)| *id)
    }

    /// The same of a row: one that cannot be read may be under any of them.
    fn held_by_row(&self, key: &StoredKey) -> Vec<KeyId> {
        if key.is_unreadable() { self.open.iter().map(|(id, _)| *id).collect() } else { self.held_by(&key.versions).collect() }
    }
}

/// A blob as it was, and as it is to be.
type Again = (Arc<[u8]>, Arc<[u8]>);

/// One pass.
struct Pass<'a> {
    task: &'a Task,
    token: Arc<KeyToken>,
    /// Wrapped anew, not yet entered.
    again: BTreeMap<KeyId, Again>,
    /// Wrapping keys that the token was found not to have as they were made: what takes one of them is not tried again in this pass.
    lost: BTreeSet<KeyId>,
    failures: usize,
}

impl super::AgentKeys {
    /// Wrapping keys that nothing is under any more, and whether that was so with their taint.
    pub(in crate::acts) fn freed(&self) -> Vec<(KeyId, bool)> {
        self.rewrapping.lock().freed.clone()
    }
}

impl Acts {
    /// Agents' keys still to be taken from under a wrapping key; zero also before they have been counted.
    #[must_use]
    pub fn keys_left_under(&self, wrapping: KeyId) -> u64 {
        self.keys.rewrapping.lock().left.get(&wrapping).copied().unwrap_or_default()
    }

    /// The same of all of them together.
    #[must_use]
    pub fn keys_to_rewrap(&self) -> u64 {
        self.keys.rewrapping.lock().left.values().sum()
    }

    /// What there is to do now.
    fn rewrapping(&self) -> Option<Task> {
        let (generations, _) = self.ledger.generations();
        let wrapping = || generations.iter().filter(|found| found.purpose == Purpose::Wrapping);
        let active = wrapping().find(|found| found.state == State::Active && !found.tainted)?.key_id;
        let before: Vec<_> = wrapping().filter(|found| matches!(found.state, State::Retiring | State::Retired)).collect();
        let (freed, paused) = (self.keys.freed(), self.is_rotation_paused());
        let is_open = |found: &crate::ledger::Generation| {
            let due = found.tainted || (found.state == State::Retiring && !paused);
            due && !freed.contains(&(found.key_id, found.tainted))
        };
        let open: Vec<_> = before.iter().filter(|found| is_open(found)).map(|found| (found.key_id, found.tainted)).collect();
        if open.is_empty() {
            return None;
        }
        let tainted = wrapping().filter(|found| found.tainted).map(|found| found.key_id).collect();
        Some(Task { active, before: before.iter().map(|found| found.key_id).collect(), tainted, open })
    }

    /// Every wrapping key, how far it is and whether it is tainted: what a pass goes by.
    #[must_use]
    pub fn wrapping_keys(&self) -> Vec<(KeyId, State, bool)> {
        let (generations, _) = self.ledger.generations();
        let wrapping = generations.iter().filter(|found| found.purpose == Purpose::Wrapping);
        wrapping.map(|found| (found.key_id, found.state, found.tainted)).collect()
    }

    /// One pass over all keys, where a wrapping key has been replaced. Signing does not wait for it: while anybody is served it rests most of
    /// the time.
    ///
    /// # Errors
    /// `HSM_UNAVAILABLE`, `LEDGER_UNAVAILABLE`: the next pass goes on with what is left.
    pub async fn rewrap_due(&self) -> Result<Rewrap, Refusal> {
        let Some(task) = self.rewrapping() else { return Ok(Rewrap::Idle) };
        // The book knows which wrapping key is active before the disk does: what was decided to come under the one before it is durable
        // from here on, and rows are read after this. Else a key on its way would be taken for none, and lost with the wrapping key.
        self.ledger.edge().await?;
        let (began, keys) = (Instant::now(), self.count_under(&task).await?);
        if task.open.iter().any(|(_, tainted)| *tainted) {
            tracing::warn!(keys, "agents' keys were under a tainted wrapping key: they are replaced, and verify no more");
        }
        let mut pass =
            Pass { task: &task, token: self.keys.token()?, again: BTreeMap::new(), lost: BTreeSet::new(), failures: 0 };
        let (mut after, mut left) = (None, BTreeMap::<KeyId, u64>::new());
        loop {
            // An operator has held it up, or another one is active by now.
            if self.rewrapping().as_ref() != Some(&task) {
                return Ok(Rewrap::Done);
            }
            let generations = self.keys.loaded.generations();
            let from = after.clone();
            let mut page = self.read(move |reader| reader.all_agent_keys(from.as_ref(), PAGE)).await?;
            let Some(last) = page.last() else { break };
            after = Some(last.of.clone());
            page.retain(|key| !task.held_by_row(key).is_empty());
            // What is not as recorded is not made so: it stays where it is until an operator destroys it.
            let ledger = self.ledger.clone();
            let (mut page, odd) = self.read(move |_| ledger.odd_keys(&page).map(|odd| (page, odd))).await?;
            for at in odd.into_iter().rev() {
                for id in task.held_by_row(&page.remove(at)) {
                    *left.entry(id).or_default() += 1;
                }
            }
            if page.is_empty() {
                continue;
            }
            for (id, (was, is)) in self.rewrap_page(&mut pass, page, &generations).await? {
                let mut progress = self.keys.rewrapping.lock();
                if let Some(left) = progress.left.get_mut(&id) {
                    *left = left.saturating_sub(was.saturating_sub(is));
                }
                *left.entry(id).or_default() += is;
            }
        }
        let mut progress = self.keys.rewrapping.lock();
        for (id, tainted) in &task.open {
            let left = left.get(id).copied().unwrap_or_default();
            progress.left.insert(*id, left);
            if left == 0 {
                progress.left.remove(id);
                progress.freed.retain(|(freed, _)| freed != id);
                progress.freed.push((*id, *tainted));
            }
        }
        drop(progress);
        let left: u64 = left.values().sum();
        let seconds = began.elapsed().as_secs_f64();
        if left == 0 {
            tracing::info!(keys, seconds, "agents' keys are under the active wrapping key");
        }
        Ok(if left == 0 { Rewrap::Done } else { Rewrap::Left(left) })
    }

    /// Gives all of them together.
    async fn count_under(&self, task: &Task) -> Result<u64, Refusal> {
        let (mut after, mut left) = (None, BTreeMap::<KeyId, u64>::new());
        loop {
            let from = after.clone();
            let page = self.read(move |reader| reader.all_agent_keys(from.as_ref(), PAGE)).await?;
            let Some(last) = page.last() else { break };
            after = Some(last.of.clone());
            for id in page.iter().flat_map(|key| task.held_by_row(key)) {
                *left.entry(id).or_default() += 1;
            }
        }
        let all = left.values().sum();
        self.keys.rewrapping.lock().left = left;
        Ok(all)
    }

    /// Gives for each wrapping key how many of the page it held before and holds now.
    async fn rewrap_page(
        &self,
        pass: &mut Pass<'_>,
        page: Vec<StoredKey>,
        generations: &[u64],
    ) -> Result<BTreeMap<KeyId, (u64, u64)>, Refusal> {
        let mut held = BTreeMap::<KeyId, (u64, u64)>::new();
        for id in page.iter().flat_map(|key| pass.task.held_by(&key.versions)) {
            held.entry(id).or_default().0 += 1;
        }
        let under = |key: &StoredKey| pass.task.held_by(&key.versions).collect::<Vec<_>>();
        let names: Vec<_> = page.iter().map(|key| (key.of.clone(), under(key))).collect();
        let keys = page.into_iter().map(|key| self.ledger.restore_key(key)).collect::<Result<_, _>>()?;
        let mut passing = self.keys.loaded.pass(keys, generations);
        for (of, under) in names {
            if passing.here.iter().any(|loaded| *loaded.key.of() == of) {
                continue;
            }
            // Others came and went meanwhile: its row may be out of date.
            match self.load_key(&of).await {
                Ok(loaded) => passing.here.push(loaded),
                Err(gone) if gone.reason == Reason::KeyNotFound => {}
                Err(left) if matches!(left.reason, Reason::KeyNotAsRecorded | Reason::RequestInProgress) => {
                    for id in under {
                        held.entry(id).or_default().1 += 1;
                    }
                }
                Err(refusal) => return Err(refusal),
            }
        }
        for loaded in &passing.here {
            self.rewrap_one(pass, loaded).await?;
        }
        self.enter_rewrapped(pass, &passing.here).await?;
        for loaded in &passing.here {
            for id in pass.task.held_by(&loaded.key.versions()) {
                held.entry(id).or_default().1 += 1;
            }
        }
        Ok(held)
    }

    /// What the token has to do for a key: nothing for one that never signs again.
    async fn rewrap_one(&self, pass: &mut Pass<'_>, loaded: &Loaded) -> Result<(), Refusal> {
        let Ok(newest) = loaded.key.newest() else { return Ok(()) };
        if self.ledger.admits_key(&loaded.key).is_err() || pass.lost.contains(&pass.task.active) {
            return Ok(());
        }
        let began = Instant::now();
        let done = if pass.task.is_exposed(&newest) {
            self.replace_version(loaded, &newest, self.trusted_now()?).await.map(drop)
        } else if pass.task.is_stale(&newest)
            && let Some((blob, by)) = newest.wrapped
            && !pass.lost.contains(&by)
        {
            let key = (newest.key_id, newest.public.algorithm());
            let again = pass.token.hsm.rewrap_agent_key(key, Arc::clone(&blob), by, pass.task.active).await;
            again.map(|again| drop(pass.again.insert(newest.key_id, (blob, again.into())))).map_err(key_refusal)
        } else {
            return Ok(());
        };
        match done {
            Ok(()) => pass.failures = 0,
            Err(refusal) => {
                // For one that stays where it is the others do not have to wait.
                let amiss = refusal.source().and_then(|cause| cause.downcast_ref()).and_then(hsm::Error::key_amiss);
                if let Some(wrapping) = amiss.filter(|id| pass.task.takes(*id)) {
                    if self.keys.is_news(&format!("wrapping key {wrapping}")) {
                        tracing::error!(
                            %wrapping, ?refusal,
                            "the token has not this wrapping key as it was made: while it is active, `keyward ca rotate wrapping --now` \
                             makes another; what is under it waits for `key rotate`, or for `keyward ca taint`, after which nothing it signed verifies"
                        );
                    }
                    pass.lost.insert(wrapping);
                    return Ok(());
                }
                tracing::warn!(key = ?loaded.key, ?refusal, "an agent's key stays under the wrapping key before");
                if !matches!(refusal.reason, Reason::HsmUnavailable | Reason::LedgerUnavailable) {
                    return Ok(());
                }
                pass.failures += 1;
                if pass.failures >= FAILURES_MAX {
                    return Err(refusal);
                }
            }
        }
        if pass.token.hsm.is_busy() {
            tokio::time::sleep((began.elapsed() * REST_TIMES).max(REST_MIN)).await;
        }
        Ok(())
    }

    /// One entry for all of them, with their rows. Each is held against what it is by now: who changes one meanwhile goes first.
    async fn enter_rewrapped(&self, pass: &mut Pass<'_>, here: &[Arc<Loaded>]) -> Result<(), Refusal> {
        let again = std::mem::take(&mut pass.again);
        let (mut changed, mut changing) = (Vec::new(), Vec::new());
        for loaded in here {
            let Ok(alone) = Arc::clone(&loaded.changing).try_lock_owned() else { continue };
            let one = rewrapped(pass.task, loaded, self.ledger.never_signs(&loaded.key), &again);
            if !one.is_empty() {
                changed.push(one);
                changing.push(alone);
            }
        }
        if changed.is_empty() {
            return Ok(());
        }
        // A crash before it is durable: the keys are where they were. What was wrapped anew is of use to nobody else.
        self.ledger.rewrap_keys(pass.task.active, changed, changing).await.map(drop)
    }
}

/// What becomes of a key's versions.
fn rewrapped(task: &Task, loaded: &Loaded, never_signs: bool, again: &BTreeMap<KeyId, Again>) -> Rewrapped {
    let versions = loaded.key.versions();
    let newest = versions.last().map(|newest| newest.key_id);
    let mut one = Rewrapped::new(Arc::clone(&loaded.key));
    for version in versions.iter() {
        let (is_newest, key_id) = (newest == Some(version.key_id), version.key_id);
        match (task.is_exposed(version), task.is_stale(version)) {
            // It is to be replaced first.
            (true, _) if is_newest && !never_signs => {}
            // Expired, or its agent is denied: it verifies no more, and the next version follows upon its number.
            (true, _) => one.end(key_id, is_newest && loaded.key.state() == KeyState::Active),
            (false, true) if is_newest && !never_signs => {
                let was = |blob: &Arc<[u8]>| version.wrapped.as_ref().is_some_and(|(now, _)| Arc::ptr_eq(now, blob));
                if let Some((_, wrapped)) = again.get(&key_id).filter(|(before, _)| was(before)) {
                    one.rewrap(key_id, Arc::clone(wrapped), task.active);
                }
            }
            (false, true) => one.forget(key_id),
            (false, false) => {}
        }
    }
    one
}

#[cfg(test)]
mod tests {
    use super::super::super::Crl;
    use super::*;
    use crate::config::Config;
    use crate::ledger::{self, Ledger, Settings};
    use crate::model::TrustDomain;
    use crate::proto::{AuthorityActivated, AuthorityStepped, entry::Body};

    const CONFIG: &str = r#"
        [trust]
        domain = "example.org"
        [hsm.authority]
        module = "/usr/lib/softhsm/libsofthsm2.so"
        token = "keyward-authority"
        pin_file = "/etc/keyward/authority.pin"
    "#;

    fn step(key: KeyId, to: State, replaces: Option<KeyId>) -> Body {
        Body::AuthorityStepped(AuthorityStepped {
            purpose: Purpose::Wrapping.into(),
            key_id: key.0.to_vec(),
            to: to.into(),
            replaces: replaces.map(|key| key.0.to_vec()).unwrap_or_default(),
            ..AuthorityStepped::default()
        })
    }

    /// A key that was decided to come under the wrapping key before is in no row yet.
    #[test]
    fn a_pass_looks_at_no_row_before_what_was_decided_is_durable() {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        ledger::create(&state, &TrustDomain::parse("example.org").unwrap(), [1; 16]).unwrap();
        let settings =
            Settings { state: state.clone(), runtime: directory.path().into(), queue_max: 64, live_max: 8, forget_seconds: 3600 };
        let ledger = Ledger::open(&settings, Arc::default()).unwrap().ledger;
        let acts = Arc::new(Acts::new(&Config::parse(CONFIG).unwrap(), ledger.clone(), Crl::open(&state), Arc::default()));
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let (old, new) = (KeyId::random(), KeyId::random());
        let first =
            AuthorityActivated { purpose: Purpose::Wrapping.into(), key_id: old.0.to_vec(), ..AuthorityActivated::default() };
        for body in [Body::AuthorityActivated(first), step(new, State::Planned, None), step(new, State::Prepublished, None)] {
            runtime.block_on(ledger.record(body)).unwrap();
        }
        // The writer waits for this lock as it would for a disk that does not answer.
        let other = rusqlite::Connection::open(Ledger::file(&state)).unwrap();
        other.execute_batch("BEGIN IMMEDIATE").unwrap();
        let stepping = ledger.clone();
        let active = runtime.spawn(async move { stepping.record(step(new, State::Active, Some(old))).await });
        let until = Instant::now() + Duration::from_secs(1);
        while !acts.wrapping_keys().contains(&(new, State::Active, false)) {
            assert!(Instant::now() < until, "the writer has not decided");
            std::thread::yield_now();
        }
        let passing = Arc::clone(&acts);
        let mut pass = runtime.spawn(async move { passing.rewrap_due().await });
        let early = runtime.block_on(async { tokio::time::timeout(Duration::from_millis(300), &mut pass).await });
        assert!(early.is_err(), "rows were looked at: {early:?}");
        other.execute_batch("ROLLBACK").unwrap();
        runtime.block_on(active).unwrap().unwrap();
        // Here is no token: that is found out after the rows.
        assert_eq!(runtime.block_on(pass).unwrap().unwrap_err().reason, Reason::HsmUnavailable);
        assert_eq!(acts.keys.freed(), []);
    }
}

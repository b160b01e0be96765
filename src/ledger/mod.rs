//! The one ordered book.
//!
//! Owns: the order of everything that happens, the gate through which a signature leaves, and the state that follows from
//! the entries. Promises: an acknowledged entry is durable; ledger order is decision order; a denial is in force the moment
//! `quarantine` has taken the gate, durable when it answers; every intent ends in exactly one outcome. Never: signs, talks
//! to a token, or goes on after a failed fsync.

mod agent;
mod agent_keys;
mod book;
mod generation;
mod hsm_keys;
mod intent;
pub mod merkle;
pub mod note;
mod pending;
mod recover;
mod refusals;
mod reserve;
mod row;
mod sequencer;
mod standing;
mod store;
pub mod verify;
mod views;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::{oneshot, watch};

use crate::model::{AgentId, Clock, Digest, Meter, Outage, Reason, Refusal};
use crate::proto::{self, entry::Body};

pub use agent::{Evidence, Live, Quarantine, Token};
pub use agent_keys::{
    AgentKey, Ends, KeyOf, KeyPage, KeyTerms, KeyVersion, Reserved, ResidentKey, Rewrapped, StoredKey, VERSIONS_MAX,
    key_not_found,
};
pub use generation::{Generation, Pause, outside_id};
pub use intent::{Decided, Intent, Intention, Subject};
pub use recover::{Opened, create};
pub use standing::Standing;
pub use store::{KeyRow, Reader, StoreError};
pub use views::{AgentView, BoundKeys};

use book::Book;
use intent::Outcome;
use pending::PendingDenials;
use reserve::Reserve;
use sequencer::{Answer, Command};
use store::Row;

/// How long anybody waits for a commit.
const COMMIT_DEADLINE: Duration = Duration::from_secs(5);
/// How long a quarantine waits before it says that it is enforced but not durable.
const QUARANTINE_DEADLINE: Duration = Duration::from_secs(2);

/// What the ledger needs to know.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The state directory.
    pub state: PathBuf,
    /// The runtime directory.
    pub runtime: PathBuf,
    /// Intents queued or open at once, at most.
    pub queue_max: usize,
    /// Unexpired certificates an agent may have.
    pub live_max: usize,
    /// How long an expired certificate is remembered for the CRL, in seconds.
    pub forget_seconds: u64,
}

/// How far the book has got.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Progress {
    /// Durable entries.
    pub size: u64,
    /// Transactions since start.
    pub commits: u64,
}

/// Whether the book can be written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Writable {
    Yes = 0,
    /// The disk is full: quarantines and outcomes go on, issuing does not.
    Full = 1,
    /// A write or an fsync failed: nothing is written in this process's life any more.
    Failed = 2,
}

/// The writer works, waits for anything, or has outcomes and waits for company.
const AWAKE: u8 = 0;
const ASLEEP: u8 = 1;
const LINGERING: u8 = 2;

/// Decisions and the queue, under one short lock.
struct Gate {
    book: Book,
    queue: VecDeque<Command>,
    /// Intents queued or open. Each has the place of its outcome reserved by this count.
    intents: usize,
    /// No intent is begun any more: those that are open come to their end.
    settling: bool,
    closing: bool,
}

impl Gate {
    fn push(&mut self, command: Command) {
        self.queue.push_back(command);
    }
}

struct Shared {
    gate: Mutex<Gate>,
    wake: Condvar,
    /// What the writer does. Set under the gate; a condition variable notified for nothing is a system call.
    writer: AtomicU8,
    clock: Arc<Clock>,
    meter: Arc<Meter>,
    reader: Reader,
    pending: PendingDenials,
    reserve: Arc<Reserve>,
    refusals: refusals::Counts,
    /// Rows that are not as recorded: each is told once.
    odd: Mutex<Outage>,
    writable: AtomicU8,
    failure: watch::Sender<Option<String>>,
    progress: watch::Sender<Progress>,
    denials: watch::Sender<u64>,
    stopped: watch::Sender<bool>,
    path: PathBuf,
    queue_max: usize,
    live_max: usize,
    forget_seconds: u64,
    deployment: Vec<u8>,
    _lock: std::fs::File,
}

/// The book. Cheap to clone.
#[derive(Clone)]
pub struct Ledger(Arc<Shared>);

fn unavailable() -> Refusal {
    Refusal::new(Reason::LedgerUnavailable, "the ledger cannot be written now; ask again later")
        .retry_after(Duration::from_secs(1))
}

fn overloaded() -> Refusal {
    Refusal::new(Reason::Overloaded, "too many requests are waiting; ask again in a moment").retry_after(Refusal::SOON)
}

fn draining() -> Refusal {
    Refusal::new(Reason::Draining, "the daemon is stopping; ask again when it is back").retry_after(Duration::from_secs(1))
}

/// Waits for an answer of the sequencer, not for ever.
async fn answered<T>(answer: oneshot::Receiver<Result<T, Refusal>>, deadline: Duration) -> Result<T, Refusal> {
    match tokio::time::timeout(deadline, answer).await {
        Ok(Ok(result)) => result,
        Ok(Err(_)) => Err(draining()),
        Err(_) => Err(unavailable()),
    }
}

/// A turn that somebody may have until his entry is durable: whoever comes after him waits no longer than for a commit of his own.
///
/// # Errors
/// `LEDGER_UNAVAILABLE`.
pub async fn in_time<T>(turn: impl Future<Output = T>) -> Result<T, Refusal> {
    tokio::time::timeout(COMMIT_DEADLINE, turn).await.map_err(|_| unavailable())
}

impl Ledger {
    /// The ledger's file below a state directory.
    #[must_use]
    pub fn file(state: &Path) -> PathBuf {
        state.join("keyward.db")
    }

    /// The clock that stamps the entries.
    #[must_use]
    pub fn clock(&self) -> &Arc<Clock> {
        &self.0.clock
    }

    /// Where figures are kept.
    #[must_use]
    pub fn meter(&self) -> &Arc<Meter> {
        &self.0.meter
    }

    /// Reads beside the writer. Blocking: page from a thread that may block.
    #[must_use]
    pub fn reader(&self) -> &Reader {
        &self.0.reader
    }

    /// How far it has got, as it goes.
    #[must_use]
    pub fn progress(&self) -> watch::Receiver<Progress> {
        self.0.progress.subscribe()
    }

    /// Counts denials taking force, for who has to act on them.
    #[must_use]
    pub fn denials(&self) -> watch::Receiver<u64> {
        self.0.denials.subscribe()
    }

    /// Set once the disk cannot be trusted any more.
    #[must_use]
    pub fn failure(&self) -> watch::Receiver<Option<String>> {
        self.0.failure.subscribe()
    }

    /// Whether issuing is on as far as the ledger is concerned.
    #[must_use]
    pub fn is_writable(&self) -> bool {
        self.0.writable.load(Ordering::Acquire) == Writable::Yes as u8
    }

    fn gate(&self) -> MutexGuard<'_, Gate> {
        self.0.gate.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Wakes the writer, if it sleeps: somebody waits for what was queued. Called after the gate was let go.
    fn wake(&self) {
        if self.0.writer.swap(AWAKE, Ordering::AcqRel) != AWAKE {
            self.0.wake.notify_one();
        }
    }

    /// As `wake`, for an outcome, which nobody waits for: a writer that lingers for company is left alone.
    fn wake_for_outcome(&self) {
        if self.0.writer.compare_exchange(ASLEEP, AWAKE, Ordering::AcqRel, Ordering::Acquire).is_ok() {
            self.0.wake.notify_one();
        }
    }

    /// The writer waits until it is woken or `at_most` has passed; true: it has.
    fn wait<'g>(&self, gate: MutexGuard<'g, Gate>, how: u8, at_most: Duration) -> (MutexGuard<'g, Gate>, bool) {
        // Whoever queues something takes the gate after this and sees it.
        self.0.writer.store(how, Ordering::Release);
        let (gate, timeout) = self.0.wake.wait_timeout(gate, at_most).unwrap_or_else(PoisonError::into_inner);
        self.0.writer.store(AWAKE, Ordering::Release);
        (gate, timeout.timed_out())
    }

    fn has_failed(&self) -> bool {
        self.0.writable.load(Ordering::Acquire) == Writable::Failed as u8
    }

    fn fail(&self, error: &StoreError) {
        tracing::error!(%error, "the ledger cannot be written: issuing is off for the life of this process");
        self.0.writable.store(Writable::Failed as u8, Ordering::Release);
        self.0.failure.send_replace(Some(error.to_string()));
    }

    fn disk_full(&self) {
        self.0.writable.store(Writable::Full as u8, Ordering::Release);
    }

    /// After a full disk: takes the reserve back if there is room again, and goes on issuing.
    pub fn try_resume(&self) {
        if self.0.writable.load(Ordering::Acquire) != Writable::Full as u8 {
            return;
        }
        match self.0.reserve.hold() {
            Ok(()) => {
                let full = Writable::Full as u8;
                if self.0.writable.compare_exchange(full, Writable::Yes as u8, Ordering::AcqRel, Ordering::Acquire).is_ok() {
                    tracing::info!("there is room on the disk again: issuing goes on");
                }
            }
            Err(error) => tracing::debug!(%error, "the disk is still full"),
        }
    }

    fn stopped(&self) {
        let mut gate = self.gate();
        gate.closing = true;
        gate.queue.clear();
        drop(gate);
        self.0.stopped.send_replace(true);
    }

    /// Queues a command whose answer is awaited.
    fn ask<T>(&self, command: impl FnOnce(Answer<T>) -> Command) -> Result<oneshot::Receiver<Result<T, Refusal>>, Refusal> {
        if self.gate().closing {
            return Err(draining());
        }
        self.ask_at_last(command)
    }

    /// As `ask`, also after the last entry: what seals the book.
    fn ask_at_last<T>(
        &self,
        command: impl FnOnce(Answer<T>) -> Command,
    ) -> Result<oneshot::Receiver<Result<T, Refusal>>, Refusal> {
        let (answer, receiver) = oneshot::channel();
        let mut gate = self.gate();
        if gate.queue.len() > self.0.queue_max.saturating_mul(2) {
            return Err(Refusal::new(Reason::Overloaded, "the ledger's queue is full; ask again in a moment"));
        }
        gate.push(command(answer));
        drop(gate);
        self.wake();
        Ok(receiver)
    }

    /// Makes a wish to sign durable, if the book admits it. From the answer on the intent has to end.
    ///
    /// # Errors
    /// Any refusal of the book (quarantined, stale epoch, spent token, sequence, rate …), `OVERLOADED` at once when the queue is
    /// full, `LEDGER_UNAVAILABLE` when it cannot be written in time.
    pub async fn intend(&self, intention: Intention) -> Result<Decided, Refusal> {
        self.queue_intent(|answer| Command::Intend { intention: Box::new(intention), answer }).await
    }

    /// Queues an intent, with a place for its outcome, and waits until it is durable or refused.
    async fn queue_intent<T>(&self, command: impl FnOnce(Answer<T>) -> Command) -> Result<T, Refusal> {
        if !self.is_writable() {
            return Err(unavailable());
        }
        let (answer, receiver) = oneshot::channel();
        {
            let mut gate = self.gate();
            if gate.settling || gate.closing {
                return Err(draining());
            }
            if gate.intents >= self.0.queue_max {
                return Err(overloaded());
            }
            gate.intents += 1;
            gate.push(command(answer));
        }
        self.wake();
        answered(receiver, COMMIT_DEADLINE).await
    }

    fn close_intent(&self, intent: u64, outcome: Outcome) {
        let mut gate = self.gate();
        if gate.closing {
            // The start after this one closes it as unknown.
            return;
        }
        gate.push(Command::Close { intent, outcome });
        drop(gate);
        self.wake_for_outcome();
    }

    /// Denies an agent: in force in memory when this has taken the gate, acknowledged when durable. Repeating it is harmless.
    ///
    /// # Errors
    /// `AGENT_UNKNOWN`; `ENFORCED_NOT_DURABLE` when it is in force but could not be made durable in time.
    pub async fn quarantine(
        &self,
        agent: &AgentId,
        by: Option<proto::Operator>,
        cause: proto::QuarantineCause,
        detail: &str,
    ) -> Result<Denied, Refusal> {
        let (answer, receiver) = oneshot::channel();
        let mut noted = None;
        let (epoch, already) = loop {
            // An index is given before the commit: the entry counts once the commit has returned. (Looked up before the gate is
            // taken: `settled` takes them in this order as well.)
            let durable = self.0.progress.borrow().size;
            let mut gate = self.gate();
            let (slot, found) = gate.book.named(agent)?;
            let epoch = found.epoch;
            let already = found.quarantine.as_ref().and_then(|found| found.index).filter(|index| *index < durable);
            gate.book.denied(slot, cause, detail.to_owned());
            if already.is_some() {
                break (epoch, already);
            }
            if noted != Some(epoch) {
                // In force already, so that no disk stands before it; noted before the command is queued. Again, should a release
                // have come in between: a line counts for its epoch alone.
                drop(gate);
                self.0.pending.add(agent, epoch);
                noted = Some(epoch);
                continue;
            }
            if !gate.closing {
                gate.push(Command::Quarantine { slot, epoch, by, cause, detail: detail.to_owned(), answer: Some(answer) });
            }
            break (epoch, None);
        };
        self.wake();
        self.0.denials.send_modify(|count| *count += 1);
        if let Some(index) = already {
            self.0.pending.durable(usize::from(noted.is_some()));
            return Ok(Denied { index, epoch, already: true });
        }
        match answered(receiver, QUARANTINE_DEADLINE).await {
            Ok(index) => Ok(Denied { index, epoch, already: false }),
            Err(cause) => Err(Refusal::new(
                Reason::EnforcedNotDurable,
                "the quarantine is in force, but it is not durable yet: repeat the call until it is acknowledged",
            )
            .because(cause)
            .retry_after(Refusal::SOON)),
        }
    }

    /// Lifts a quarantine: epoch + 1 and a new token. Answers with the entry's index and the new epoch.
    ///
    /// # Errors
    /// `AGENT_UNKNOWN`, `NOT_QUARANTINED` (also when a new quarantine was asked for meanwhile), `LEDGER_UNAVAILABLE`.
    pub async fn reinstate(&self, agent: &AgentId, by: proto::Operator, token: Token) -> Result<(u64, u32), Refusal> {
        let denials = {
            let gate = self.gate();
            let (_, found) = gate.book.named(agent)?;
            match &found.quarantine {
                None => return Err(Refusal::new(Reason::NotQuarantined, "the agent is not quarantined")),
                Some(quarantine) if quarantine.index.is_none() => {
                    return Err(unavailable());
                }
                Some(_) => found.denials,
            }
        };
        let receiver = self.ask(|answer| Command::Reinstate { agent: agent.clone(), denials, by, token, answer })?;
        answered(receiver, COMMIT_DEADLINE).await
    }

    /// A new agent with its first token.
    ///
    /// # Errors
    /// `AGENT_EXISTS`, `LEDGER_UNAVAILABLE`.
    pub async fn enrol(&self, agent: &AgentId, limits: proto::Limits, by: proto::Operator, token: Token) -> Result<u64, Refusal> {
        if !self.is_writable() {
            return Err(unavailable());
        }
        let receiver = self.ask(|answer| Command::Enrol { agent: agent.clone(), limits, by, token, answer })?;
        answered(receiver, COMMIT_DEADLINE).await
    }

    /// An entry that needs no decision, with the rows that follow from it.
    ///
    /// # Errors
    /// `LEDGER_UNAVAILABLE` when it cannot be made durable in time.
    pub async fn record(&self, body: Body) -> Result<u64, Refusal> {
        let rows = rows_of(&body);
        let receiver = self.ask(|answer| Command::Record { body, rows, answer: Some(answer) })?;
        answered(receiver, COMMIT_DEADLINE).await
    }

    /// Size and root of the tree, durable.
    ///
    /// # Errors
    /// `LEDGER_UNAVAILABLE`.
    pub async fn edge(&self) -> Result<(u64, Digest), Refusal> {
        let receiver = self.ask_at_last(|answer| Command::Edge { answer })?;
        answered(receiver, COMMIT_DEADLINE).await
    }

    /// Keeps the newest signed checkpoint.
    ///
    /// # Errors
    /// `LEDGER_UNAVAILABLE`.
    pub async fn keep_checkpoint(&self, note: String) -> Result<(), Refusal> {
        let receiver = self.ask_at_last(|answer| Command::Keep { row: Row::Fact("checkpoint", note.into_bytes()), answer })?;
        answered(receiver, COMMIT_DEADLINE).await
    }

    /// Lets no other intent begin, and waits until none is queued or open, at most for `deadline`; answers whether that is so.
    pub async fn settle(&self, deadline: Duration) -> bool {
        self.gate().settling = true;
        let mut progress = self.progress();
        let none_left = async {
            while self.gate().intents > 0 {
                // An intent that is refused leaves no entry to wait for.
                let _ = tokio::time::timeout(Duration::from_millis(20), progress.changed()).await;
            }
        };
        tokio::time::timeout(deadline, none_left).await.is_ok()
    }

    /// The last entry: everything queued before it is committed first, what comes after is refused as draining. Only a checkpoint
    /// may follow.
    ///
    /// # Errors
    /// `LEDGER_UNAVAILABLE`: the next start will find the intents open.
    pub async fn stop(&self, cause: &str) -> Result<(), Refusal> {
        let (answer, receiver) = oneshot::channel();
        {
            let mut gate = self.gate();
            if gate.closing {
                return Err(draining());
            }
            gate.closing = true;
            gate.push(Command::Stop { cause: cause.to_owned(), answer });
        }
        self.wake();
        answered(receiver, COMMIT_DEADLINE).await
    }

    /// Ends the writer. Waits at most `deadline`; answers whether it has ended.
    pub async fn finish(&self, deadline: Duration) -> bool {
        let mut stopped = self.0.stopped.subscribe();
        {
            let mut gate = self.gate();
            gate.closing = true;
            gate.push(Command::Finish);
        }
        self.wake();
        tokio::time::timeout(deadline, stopped.wait_for(|stopped| *stopped)).await.is_ok()
    }
}

/// A denial that is in force.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Denied {
    /// Its ledger entry.
    pub index: u64,
    /// This epoch and all before.
    pub epoch: u32,
    /// It was in force before.
    pub already: bool,
}

/// The rows that an entry brings along.
fn rows_of(body: &Body) -> Vec<Row> {
    match body {
        Body::KeyIntended(key) => vec![Row::KeyIntended(key.clone())],
        Body::KeyActivated(key) => vec![Row::KeyActivated(key.clone())],
        Body::KeyAbandoned(key) => vec![Row::KeyAbandoned(key.key_id.clone())],
        _ => Vec::new(),
    }
}

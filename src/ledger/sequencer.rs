//! The one writer: decides commands in the order in which they were queued, gives each entry its index, makes a whole batch
//! durable in one transaction, then answers.

use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message as _;
use tokio::sync::oneshot;

use crate::model::{AgentId, Digest, Reason, Refusal, TokenId, UnixTime, thread_cpu_nanos};
use crate::proto::{self, entry::Body};

use super::agent::{Agent, Ending, Evidence, Token, Verdict};
use super::agent_keys::commands::KeyCommand;
use super::book::{Book, Wanted};
use super::intent::{Decided, Intent, Intention, Outcome};
use super::merkle::{Tree, leaf_hash};
use super::reserve::Reserve;
use super::row::AgentRow;
use super::store::{Row, Store, StoreError};
use super::{ASLEEP, Gate, LINGERING, Ledger, Progress};

/// Commands decided and committed in one go, at most.
const BATCH_MAX: usize = 1024;
/// Agents' rows written beside a batch, at most: a snapshot is spread so that no commit waits for all of it.
const SNAPSHOT_ROWS_PER_BATCH: usize = 256;
/// A commit that meets another process's lock waits two seconds; it is tried again as often.
const BUSY_TRIES: usize = 15;
/// Outcomes alone wait as long for company.
const OUTCOMES_WAIT: Duration = Duration::from_millis(4);
/// A snapshot is begun after as many entries …
const SNAPSHOT_ENTRIES: u64 = 10_000;
/// … or after as long, if anything changed.
const SNAPSHOT_EVERY: Duration = Duration::from_secs(10);

pub(super) type Answer<T> = oneshot::Sender<Result<T, Refusal>>;

/// What the sequencer is asked to do. All of them wait in one queue.
pub(super) enum Command {
    Intend {
        intention: Box<Intention>,
        answer: Answer<Decided>,
    },
    Close {
        intent: u64,
        outcome: Outcome,
    },
    Quarantine {
        slot: u32,
        epoch: u32,
        by: Option<proto::Operator>,
        cause: proto::QuarantineCause,
        detail: String,
        answer: Option<Answer<u64>>,
    },
    /// Two copies of an agent are about: denied already, recorded here, behind every release that came through the gate before.
    Suspect {
        slot: u32,
        detail: String,
        answer: Answer<Decided>,
    },
    Reinstate {
        agent: AgentId,
        denials: u32,
        by: proto::Operator,
        token: Token,
        answer: Answer<(u64, u32)>,
    },
    Enrol {
        agent: AgentId,
        limits: proto::Limits,
        by: proto::Operator,
        token: Token,
        answer: Answer<u64>,
    },
    Record {
        body: Body,
        rows: Vec<Row>,
        answer: Option<Answer<u64>>,
    },
    /// About an agent's signing key.
    Key(Box<KeyCommand>),
    Edge {
        answer: Answer<(u64, Digest)>,
    },
    Keep {
        row: Row,
        answer: Answer<()>,
    },
    /// The last entry.
    Stop {
        cause: String,
        answer: Answer<()>,
    },
    /// The end of the writer.
    Finish,
}

/// What a batch does once it is durable, or cannot be.
pub(super) type After = Box<dyn FnOnce(Result<(), Refusal>) + Send>;

pub(super) struct Batch {
    first: u64,
    entries: Vec<proto::Entry>,
    pub(super) rows: Vec<Row>,
    pub(super) after: Vec<After>,
    edge: Vec<Answer<(u64, Digest)>>,
    denials: usize,
    /// Every agent's row is due now.
    snapshot: bool,
    finish: bool,
}

impl Batch {
    /// Of the entry that comes next.
    pub(super) fn next_index(&self) -> u64 {
        self.first + self.entries.len() as u64
    }

    pub(super) fn entry(&mut self, time: UnixTime, body: Body) -> u64 {
        let index = self.next_index();
        self.entries.push(proto::Entry { index, time_unix_micros: time.micros(), body: Some(body) });
        index
    }

    pub(super) fn then<T: Send + 'static>(&mut self, answer: Answer<T>, value: T) {
        self.after.push(Box::new(move |durable| {
            let _ = answer.send(durable.map(|()| value));
        }));
    }
}

/// A snapshot under way: agents still to be written, and the entry from which a start would replay.
struct Snapshot {
    from: u64,
    slots: Vec<u32>,
}

pub(super) struct Sequencer {
    pub ledger: Ledger,
    pub store: Store,
    pub tree: Tree,
    pub reserve: Arc<Reserve>,
    pub last_time: UnixTime,
    snapshot: Option<Snapshot>,
    snapshot_at: (u64, Instant),
    commits: u64,
}

impl Sequencer {
    pub(super) fn new(ledger: Ledger, store: Store, tree: Tree, reserve: Arc<Reserve>, last_time: UnixTime) -> Self {
        let size = tree.size();
        Self { ledger, store, tree, reserve, last_time, snapshot: None, snapshot_at: (size, Instant::now()), commits: 0 }
    }

    /// The writer thread's life.
    pub(super) fn run(mut self) {
        loop {
            let mut batch = self.gather();
            let meter = Arc::clone(&self.ledger.0.meter);
            let before = thread_cpu_nanos();
            let committed = self.commit(&mut batch);
            meter.ledger.add(thread_cpu_nanos().saturating_sub(before));
            match committed {
                Ok(()) => {
                    self.publish(&batch);
                    for after in batch.after {
                        after(Ok(()));
                    }
                    for answer in batch.edge {
                        let _ = answer.send(Ok((self.tree.size(), self.tree.root())));
                    }
                    if batch.finish {
                        return self.ledger.stopped();
                    }
                }
                Err(error) => {
                    self.ledger.fail(&error);
                    for after in batch.after {
                        after(Err(super::unavailable()));
                    }
                    return self.refuse_for_ever(batch.finish);
                }
            }
        }
    }

    /// Waits for commands and decides them. The gate is held while deciding: what is decided here is the ledger's order.
    fn gather(&mut self) -> Batch {
        let ledger = self.ledger.clone();
        // Where cores are short, who is about to queue something does so first: a fuller batch for the same fsync. Where
        // they are not, this returns at once.
        std::thread::yield_now();
        let mut gate = ledger.gate();
        while gate.queue.is_empty() {
            let (guard, timed_out) = ledger.wait(gate, ASLEEP, SNAPSHOT_EVERY);
            gate = guard;
            if self.snapshot.is_some() || (timed_out && !gate.book.dirty.is_empty()) {
                break;
            }
        }
        if !gate.queue.is_empty() && !gate.closing && gate.queue.iter().all(|command| matches!(command, Command::Close { .. })) {
            // Nobody waits for an outcome: what is asked for within a few milliseconds shares its commit. A crash in this time finds
            // the intents open and closes them as unknown, as at any moment before.
            (gate, _) = ledger.wait(gate, LINGERING, OUTCOMES_WAIT);
        }
        let first = self.tree.size();
        let mut batch = Batch {
            first,
            entries: Vec::new(),
            rows: Vec::new(),
            after: Vec::new(),
            edge: Vec::new(),
            denials: 0,
            snapshot: false,
            finish: false,
        };
        let now = self.ledger.0.clock.reckoned().max(self.last_time);
        self.last_time = now;
        let take = gate.queue.len().min(BATCH_MAX);
        let commands: Vec<Command> = gate.queue.drain(..take).collect();
        let gate = &mut *gate;
        for command in commands {
            self.decide(command, now, gate, &mut batch);
        }
        self.add_snapshot_rows(&mut gate.book, &mut batch);
        batch
    }

    fn decide(&self, command: Command, now: UnixTime, gate: &mut Gate, batch: &mut Batch) {
        let book = &mut gate.book;
        match command {
            Command::Intend { intention, answer } => self.decide_intent(*intention, answer, now, gate, batch),
            Command::Close { intent, outcome } => {
                gate.intents = gate.intents.saturating_sub(1);
                let (ending, body) = match outcome {
                    Outcome::Released(signature) => (Ending::Released, Body::Released(proto::Released { intent, signature })),
                    Outcome::Withheld(reason) => {
                        (Ending::Nothing, Body::Withheld(proto::Withheld { intent, reason: reason.into() }))
                    }
                    Outcome::Failed(reason) => (Ending::Nothing, Body::Failed(proto::Failed { intent, reason: reason.into() })),
                    Outcome::Unknown(cause) => (Ending::Unknown, Body::Unknown(proto::Unknown { intent, cause })),
                };
                let index = batch.entry(now, body);
                book.ended(index, intent, ending);
            }
            Command::Quarantine { slot, epoch, by, cause, detail, answer } => {
                let agent = book.agent(slot).id.to_string();
                let body =
                    Body::Quarantined(proto::Quarantined { by, agent, epoch, cause: cause.into(), detail: detail.clone() });
                let index = batch.entry(now, body);
                book.quarantined(index, now, slot, cause, detail);
                batch.rows.push(agent_row(book, slot));
                batch.denials += 1;
                if let Some(answer) = answer {
                    batch.then(answer, index);
                }
            }
            Command::Suspect { slot, detail, answer } => {
                let (agent, epoch) = (book.agent(slot).id.to_string(), book.agent(slot).epoch);
                let cause = proto::QuarantineCause::CloneSuspected;
                tracing::warn!(%agent, %detail, "two copies of an agent are suspected; quarantined");
                let entry = proto::Quarantined { by: None, agent, epoch, cause: cause.into(), detail: detail.clone() };
                let index = batch.entry(now, Body::Quarantined(entry));
                book.quarantined(index, now, slot, cause, detail);
                batch.rows.push(agent_row(book, slot));
                let advice = "two copies of this agent hold its keys; it is quarantined until an operator releases it";
                let refusal = Refusal::new(Reason::CloneSuspected, advice).recorded_at(index);
                refuse(answer, &mut gate.intents, batch, refusal);
            }
            Command::Reinstate { agent, denials, by, token, answer } => {
                reinstate(agent, denials, by, token, answer, now, book, batch)
            }
            Command::Enrol { agent, limits, by, token, answer } => enrol(agent, limits, by, token, answer, now, book, batch),
            // By the clock as it is, too: what an authority waits for is not to be a year away after the clock was set back a year.
            // Where the clock was not set back, that is the entry's own time: what follows from the entry can be told from it.
            Command::Record { body, rows, answer } => {
                match book.generations.fold(batch.next_index(), self.ledger.0.clock.reckoned().min(now), &body) {
                    Ok(more) => {
                        let index = batch.entry(now, body);
                        batch.rows.extend(rows.into_iter().chain(more));
                        if let Some(answer) = answer {
                            batch.then(answer, index);
                        }
                    }
                    Err(refusal) => drop(answer.map(|answer| answer.send(Err(refusal)))),
                }
            }
            Command::Key(command) => command.decide(now, &self.ledger, gate, batch),
            Command::Edge { answer } => batch.edge.push(answer),
            Command::Keep { row, answer } => {
                batch.rows.push(row);
                batch.then(answer, ());
            }
            Command::Stop { cause, answer } => {
                batch.entry(now, Body::Stopped(proto::Stopped { cause }));
                batch.snapshot = true;
                batch.then(answer, ());
            }
            Command::Finish => batch.finish = true,
        }
    }

    /// An intent: refused, repeated, or an entry. A token is spent and a sequence claimed here, in order.
    fn decide_intent(&self, intention: Intention, answer: Answer<Decided>, now: UnixTime, gate: &mut Gate, batch: &mut Batch) {
        let tbs = Digest::of(&intention.tbs);
        let (book, intents) = (&mut gate.book, &mut gate.intents);
        let mut body = proto::Intended {
            kind: intention.kind.into(),
            key_id: intention.key_id.0.to_vec(),
            tbs: intention.tbs.to_vec(),
            ..proto::Intended::default()
        };
        if !book.generations.may_sign(intention.kind, &intention.key_id) {
            let advice = "another authority signs by now; ask again";
            return refuse(answer, intents, batch, Refusal::new(Reason::AuthoritySuperseded, advice));
        }
        let Some(subject) = intention.subject else {
            let index = batch.entry(now, Body::Intended(body));
            book.intended(index);
            batch.then(answer, Decided::Intent(Intent::new(self.ledger.clone(), index, None, 0, tbs)));
            return;
        };
        let Some(slot) = book.slot(&subject.agent) else {
            return refuse(answer, intents, batch, Refusal::new(Reason::AgentUnknown, "no such agent is enrolled here"));
        };
        let mut wanted = Wanted {
            sequence: 0,
            epoch: subject.epoch,
            evidence: subject.evidence,
            key: subject.key,
            serial: subject.serial,
            not_before: subject.not_before,
            not_after: subject.not_after,
            request_hash: subject.request_hash,
            idempotency_hash: subject.idempotency_hash,
        };
        // Weighed by the clock as it is: entries' times never go back, also after an operator accepted a clock that did.
        match book.weigh(slot, &wanted, self.ledger.0.clock.reckoned(), self.ledger.0.live_max) {
            Verdict::Refuse(refusal) => refuse(answer, intents, batch, refusal),
            Verdict::Repeat { intent } => {
                *intents = intents.saturating_sub(1);
                let next_sequence = book.agent(slot).sequence;
                batch.then(answer, Decided::Repeat { intent, next_sequence });
            }
            Verdict::Clone { .. } if gate.closing => refuse(answer, intents, batch, super::draining()),
            Verdict::Clone { detail } => {
                // The denial takes force now, while the gate is held; its entry goes behind the releases that came through the
                // gate before and wait in the queue: ledger order is decision order. A crash in between loses both the denial
                // and the answer; the copy's next claim is weighed the same.
                book.denied(slot, proto::QuarantineCause::CloneSuspected, detail.clone());
                gate.queue.push_back(Command::Suspect { slot, detail, answer });
                self.ledger.0.denials.send_modify(|count| *count += 1);
            }
            Verdict::Accept { sequence } => {
                wanted.sequence = sequence;
                body.agent = subject.agent.to_string();
                body.epoch = wanted.epoch;
                body.sequence = sequence;
                body.request_hash = wanted.request_hash.0.to_vec();
                body.idempotency_hash = wanted.idempotency_hash.to_vec();
                body.appraised = Some(appraised(&wanted.evidence, subject.fresh_until));
                let epoch = wanted.epoch;
                let index = batch.entry(now, Body::Intended(body));
                book.intended_for(index, slot, wanted, self.ledger.0.forget_seconds);
                let intent = Intent::new(self.ledger.clone(), index, Some((slot, epoch)), sequence, tbs);
                batch.then(answer, Decided::Intent(intent));
            }
        }
    }

    fn commit(&mut self, batch: &mut Batch) -> Result<(), StoreError> {
        if batch.entries.is_empty() && batch.rows.is_empty() {
            return Ok(());
        }
        let mut tiles = Vec::new();
        let mut encoded = Vec::with_capacity(batch.entries.len());
        for entry in batch.entries.drain(..) {
            let bytes = entry.encode_to_vec();
            self.tree.push(leaf_hash(&bytes), &mut tiles);
            encoded.push(bytes);
        }
        self.commits += 1;
        let mut first = self.store.commit(batch.first, &encoded, &tiles, &batch.rows);
        for _ in 0..BUSY_TRIES {
            // Somebody else's lock on the file (a backup, a look with sqlite3) is no failure of the disk.
            if !first.as_ref().is_err_and(is_busy) {
                break;
            }
            tracing::warn!("another process holds a lock on the ledger's file");
            first = self.store.commit(batch.first, &encoded, &tiles, &batch.rows);
        }
        let Err(error) = first else { return Ok(()) };
        if !is_full(&error) {
            return Err(error);
        }
        // Nothing of the batch is durable (the transaction was rolled back). With the reserve given up it fits; issuing is off
        // from here on, so that what is left serves quarantines and the stop.
        tracing::error!(%error, "the disk is full: issuing stops, the reserve is given up");
        self.ledger.disk_full();
        self.reserve.give_up();
        self.store.commit(batch.first, &encoded, &tiles, &batch.rows)
    }

    fn publish(&self, batch: &Batch) {
        if batch.denials > 0 {
            self.ledger.0.pending.durable(batch.denials);
        }
        let progress = Progress { size: self.tree.size(), commits: self.commits };
        self.ledger.0.progress.send_if_modified(|current| {
            let moved = current.size != progress.size;
            *current = progress;
            moved
        });
    }

    /// Rows of a snapshot under way; begins one when it is time.
    fn add_snapshot_rows(&mut self, book: &mut Book, batch: &mut Batch) {
        let size = batch.first + batch.entries.len() as u64;
        if self.snapshot.is_none() {
            let due =
                size - self.snapshot_at.0 >= SNAPSHOT_ENTRIES || self.snapshot_at.1.elapsed() >= SNAPSHOT_EVERY || batch.snapshot;
            if !due || (book.dirty.is_empty() && size == self.snapshot_at.0) {
                return;
            }
            // A start replays from the oldest intent that has not ended, so that its outcome finds it.
            let from = book.open.keys().next().copied().unwrap_or(size).min(size);
            let mut slots = std::mem::take(&mut book.dirty);
            // Neighbours share pages of the table: a batch of rows then writes a few pages, not one for each row.
            slots.sort_unstable_by(|a, b| book.agent(*a).id.cmp(&book.agent(*b).id));
            self.snapshot = Some(Snapshot { from, slots });
            for slot in self.snapshot.iter().flat_map(|snapshot| &snapshot.slots) {
                book.agents[*slot as usize].dirty = false;
            }
        }
        let Some(snapshot) = &mut self.snapshot else { return };
        let keep = if batch.snapshot { 0 } else { snapshot.slots.len().saturating_sub(SNAPSHOT_ROWS_PER_BATCH) };
        for slot in snapshot.slots.drain(keep..) {
            batch.rows.push(agent_row(book, slot));
        }
        if snapshot.slots.is_empty() {
            batch.rows.push(Row::Fact("snapshot", snapshot.from.to_be_bytes().to_vec()));
            self.snapshot = None;
            self.snapshot_at = (size, Instant::now());
        }
    }

    /// The disk cannot be trusted: nothing more is written, everything queued is answered.
    fn refuse_for_ever(self, stopping: bool) {
        if stopping {
            return self.ledger.stopped();
        }
        loop {
            let mut gate = self.ledger.gate();
            while gate.queue.is_empty() {
                (gate, _) = self.ledger.wait(gate, ASLEEP, SNAPSHOT_EVERY);
            }
            let commands: Vec<Command> = gate.queue.drain(..).collect();
            gate.intents = 0;
            drop(gate);
            for command in commands {
                if matches!(command, Command::Finish) {
                    return self.ledger.stopped();
                }
                refuse_unwritten(command);
            }
        }
    }
}

/// Refuses a wish to sign, once what the decision rests on is durable.
pub(super) fn refuse<T: Send + 'static>(answer: Answer<T>, intents: &mut usize, batch: &mut Batch, refusal: Refusal) {
    *intents = intents.saturating_sub(1);
    batch.after.push(Box::new(move |durable| {
        let _ = answer.send(durable.and(Err(refusal)));
    }));
}

fn refuse_unwritten(command: Command) {
    match command {
        Command::Intend { answer, .. } | Command::Suspect { answer, .. } => drop(answer.send(Err(super::unavailable()))),
        Command::Quarantine { answer: Some(answer), .. }
        | Command::Enrol { answer, .. }
        | Command::Record { answer: Some(answer), .. } => drop(answer.send(Err(super::unavailable()))),
        Command::Reinstate { answer, .. } => drop(answer.send(Err(super::unavailable()))),
        Command::Key(command) => command.refuse_unwritten(),
        Command::Edge { answer } => drop(answer.send(Err(super::unavailable()))),
        Command::Keep { answer, .. } | Command::Stop { answer, .. } => drop(answer.send(Err(super::unavailable()))),
        Command::Quarantine { answer: None, .. }
        | Command::Record { answer: None, .. }
        | Command::Close { .. }
        | Command::Finish => {}
    }
}

#[expect(clippy::too_many_arguments, reason = "the fields of one command, taken apart")]
fn reinstate(
    agent: AgentId,
    denials: u32,
    by: proto::Operator,
    token: Token,
    answer: Answer<(u64, u32)>,
    now: UnixTime,
    book: &mut Book,
    batch: &mut Batch,
) {
    let slot = match book.named(&agent) {
        // A quarantine asked for after this release was is stronger than it.
        Ok((slot, found)) if found.quarantine.is_some() && found.denials == denials => slot,
        Ok(_) => {
            let refusal =
                Refusal::new(Reason::NotQuarantined, "the agent is not quarantined, or was quarantined again meanwhile");
            return drop(answer.send(Err(refusal)));
        }
        Err(refusal) => return drop(answer.send(Err(refusal))),
    };
    let epoch = book.agent(slot).epoch + 1;
    let body = proto::Reinstated {
        by: Some(by),
        agent: agent.to_string(),
        epoch,
        token_id: token.id.0.to_vec(),
        token_public_key: token.public_key.to_vec(),
        token_expires_unix_seconds: token.expires.seconds(),
    };
    let index = batch.entry(now, Body::Reinstated(body));
    book.reinstated(index, slot, epoch, token);
    batch.rows.push(agent_row(book, slot));
    batch.then(answer, (index, epoch));
}

#[expect(clippy::too_many_arguments, reason = "the fields of one command, taken apart")]
fn enrol(
    agent: AgentId,
    limits: proto::Limits,
    by: proto::Operator,
    token: Token,
    answer: Answer<u64>,
    now: UnixTime,
    book: &mut Book,
    batch: &mut Batch,
) {
    if book.slot(&agent).is_some() || book.knows_token(&token.id) {
        let refusal = Refusal::new(
            Reason::AgentExists,
            "an instance is never reused: choose another name, or release it if it is quarantined",
        );
        return drop(answer.send(Err(refusal)));
    }
    let epoch = 1;
    let body = proto::Enrolled {
        by: Some(by),
        agent: agent.to_string(),
        epoch,
        limits: Some(limits),
        token_id: token.id.0.to_vec(),
        token_public_key: token.public_key.to_vec(),
        token_expires_unix_seconds: token.expires.seconds(),
    };
    let index = batch.entry(now, Body::Enrolled(body));
    let slot = book.enrolled(index, Agent::new(agent, epoch, limits.ttl_seconds_max, limits.rejoin_seconds, token));
    batch.rows.push(agent_row(book, slot));
    batch.then(answer, index);
}

fn agent_row(book: &Book, slot: u32) -> Row {
    let agent = book.agent(slot);
    Row::Agent(Box::new(AgentRow::from(agent)), agent.id.to_string())
}

fn appraised(evidence: &Evidence, fresh_until: UnixTime) -> proto::Appraised {
    let (kind, evidence_id, channel_proved) = match evidence {
        Evidence::JoinToken(TokenId(id)) => (proto::EvidenceKind::JoinToken, id.to_vec(), false),
        Evidence::BoundKey { prover, channel_proved, .. } => (proto::EvidenceKind::BoundKey, prover.0.to_vec(), *channel_proved),
    };
    proto::Appraised { kind: kind.into(), evidence_id, fresh_until_unix_seconds: fresh_until.seconds(), channel_proved }
}

fn is_busy(error: &StoreError) -> bool {
    use rusqlite::ErrorCode::{DatabaseBusy, DatabaseLocked};
    matches!(error, StoreError::Sqlite(rusqlite::Error::SqliteFailure(code, _)) if matches!(code.code, DatabaseBusy | DatabaseLocked))
}

fn is_full(error: &StoreError) -> bool {
    match error {
        StoreError::Sqlite(rusqlite::Error::SqliteFailure(code, _)) => code.code == rusqlite::ErrorCode::DiskFull,
        StoreError::Io(error) => error.kind() == std::io::ErrorKind::StorageFull,
        _ => false,
    }
}

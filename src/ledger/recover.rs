//! Making a book, and opening one: what a crash left behind is put in order before anything is served.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::Path;
use std::sync::atomic::AtomicU8;
use std::sync::{Arc, Condvar, Mutex};

use prost::Message as _;
use rustix::fs::{FlockOperation, flock};
use tokio::sync::watch;
use x509_parser::certificate::TbsCertificate;
use x509_parser::prelude::FromDer;

use crate::model::{AgentId, Clock, Digest, Meter, PublicKey, Serial, TokenId, TrustDomain, UnixTime};
use crate::proto::{self, entry::Body};

use super::agent::{Agent, Ending, Evidence, Token};
use super::book::{Book, Wanted};
use super::intent::Outcome;
use super::pending::PendingDenials;
use super::reserve::Reserve;
use super::sequencer::{Command, Sequencer};
use super::store::{Reader, Store, StoreError};
use super::{Gate, Ledger, Progress, Settings, Shared, refusals};

/// An opened book.
pub struct Opened {
    /// The book.
    pub ledger: Ledger,
    /// Intents that a crash left open; they have been closed as unknown.
    pub closed_unknown: usize,
    /// Denials of an earlier daemon that had not become durable; they are in force and durable now, or about to be.
    pub merged_denials: usize,
    /// How the book began.
    pub genesis: proto::Genesis,
}

/// A new book: the file, and its first entry.
///
/// # Errors
/// When there is one already, or the disk says no.
pub fn create(state: &Path, domain: &TrustDomain, deployment: [u8; 16]) -> Result<(), StoreError> {
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(state)?;
    let path = Ledger::file(state);
    // A crash between the file and its first entry leaves a file without entries: then it is made anew.
    if path.exists() && Store::open(&path)?.size()? == 0 {
        std::fs::remove_file(&path)?;
    }
    let mut store = Store::create(&path)?;
    let genesis = proto::Genesis { trust_domain: domain.to_string(), deployment: deployment.to_vec(), schema: 1 };
    let entry = proto::Entry { index: 0, time_unix_micros: UnixTime::wall().micros(), body: Some(Body::Genesis(genesis)) };
    store.commit(0, &[entry.encode_to_vec()], &[], &[])?;
    File::open(state)?.sync_all()?;
    Ok(())
}

impl Ledger {
    /// Opens the book of a state directory: takes its lock, replays the tail, closes what a crash left open, puts pending
    /// denials in force, and starts the writer.
    ///
    /// # Errors
    /// When another daemon has it, it is missing, damaged, or of a newer keyward.
    pub fn open(settings: &Settings, meter: Arc<Meter>) -> Result<Opened, StoreError> {
        let lock = lock(&settings.state)?;
        let path = Self::file(&settings.state);
        let mut store = Store::open(&path)?;
        let tree = store.tree()?;
        if tree.size() == 0 {
            return Err(StoreError::Missing(path));
        }
        let replayed = replay(&mut store, settings.forget_seconds)?;
        let Replayed { book, genesis, last_time } = replayed;
        let reserve = Arc::new(Reserve::new(&settings.state));
        let writable = match reserve.hold() {
            Ok(()) => super::Writable::Yes,
            Err(error) => {
                tracing::error!(%error, "no room for the reserve: issuing is off until there is");
                super::Writable::Full
            }
        };
        let (pending, left) = PendingDenials::open(&settings.runtime.join("pending-denials"))?;
        let open: Vec<u64> = book.open.keys().copied().collect();
        let shared = Shared {
            gate: Mutex::new(Gate {
                book,
                queue: std::collections::VecDeque::new(),
                intents: open.len(),
                settling: false,
                closing: false,
            }),
            wake: Condvar::new(),
            writer: AtomicU8::new(super::AWAKE),
            clock: Arc::new(Clock::start(Some(last_time))),
            meter,
            reader: Reader::open(&path)?,
            pending,
            reserve: Arc::clone(&reserve),
            refusals: refusals::Counts::default(),
            odd: Mutex::default(),
            writable: AtomicU8::new(writable as u8),
            failure: watch::Sender::new(None),
            progress: watch::Sender::new(Progress { size: tree.size(), commits: 0 }),
            denials: watch::Sender::new(0),
            stopped: watch::Sender::new(false),
            path,
            queue_max: settings.queue_max,
            live_max: settings.live_max,
            forget_seconds: settings.forget_seconds,
            deployment: genesis.deployment.clone(),
            _lock: lock,
        };
        let ledger = Self(Arc::new(shared));
        let merged_denials = ledger.put_in_order(&open, left);
        let sequencer = Sequencer::new(ledger.clone(), store, tree, reserve, last_time);
        let guard = Guard(ledger.clone());
        std::thread::Builder::new().name("ledger".to_owned()).spawn(move || {
            let guard = guard;
            sequencer.run();
            drop(guard);
        })?;
        Ok(Opened { ledger, closed_unknown: open.len(), merged_denials, genesis })
    }

    /// Queued before the writer starts, so they are its first batch.
    fn put_in_order(&self, open: &[u64], left: Vec<(AgentId, u32)>) -> usize {
        let mut gate = self.gate();
        for intent in open {
            // Never signed again: the token may have signed, the signature may have been handed out.
            let outcome = Outcome::Unknown("open when the daemon started".to_owned());
            gate.push(Command::Close { intent: *intent, outcome });
        }
        let (mut merged, left_count) = (0, left.len());
        for (agent, epoch) in left {
            let Some(slot) = gate.book.slot(&agent) else { continue };
            let found = gate.book.agent(slot);
            if found.epoch != epoch || found.quarantine.is_some() {
                continue;
            }
            let (cause, detail) = (proto::QuarantineCause::Operator, "denied before a restart".to_owned());
            gate.book.denied(slot, cause, detail.clone());
            gate.push(Command::Quarantine { slot, epoch, by: None, cause, detail, answer: None });
            merged += 1;
        }
        // Lines of denials that are durable already, or of an epoch that has passed, have done their work: left counted, the file
        // would grow until its end is not read back any more.
        self.0.pending.durable(left_count - merged);
        merged
    }

    /// The ledger file's size on disk, WAL included, in bytes.
    #[must_use]
    pub fn file_bytes(&self) -> u64 {
        let size = |path: &Path| path.metadata().map_or(0, |found| found.len());
        let mut wal = self.0.path.clone().into_os_string();
        wal.push("-wal");
        size(&self.0.path) + size(Path::new(&wal))
    }
}

impl Ledger {
    /// Free bytes on the ledger's file system; 0 if that cannot be told.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        rustix::fs::statvfs(&self.0.path).map_or(0, |found| found.f_bavail.saturating_mul(found.f_frsize))
    }
}

/// Should the writer thread die by a panic, issuing is off as after a failed fsync.
struct Guard(Ledger);

impl Drop for Guard {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(&StoreError::Damaged("the writer thread died".to_owned()));
            self.0.stopped();
        }
    }
}

/// One daemon, one state directory.
fn lock(state: &Path) -> Result<File, StoreError> {
    if !state.is_dir() {
        return Err(StoreError::Missing(Ledger::file(state)));
    }
    let file = OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(state.join("lock"))?;
    flock(&file, FlockOperation::NonBlockingLockExclusive).map_err(|_| {
        std::io::Error::new(std::io::ErrorKind::ResourceBusy, "another keyward runs on this state directory; stop it first")
    })?;
    Ok(file)
}

struct Replayed {
    book: Book,
    genesis: proto::Genesis,
    last_time: UnixTime,
}

fn replay(store: &mut Store, forget_seconds: u64) -> Result<Replayed, StoreError> {
    let mut book = Book::default();
    // Their rows go with their entries: there is nothing to replay, but nothing is believed that the entries do not say.
    book.generations = store.generations()?;
    store.hold(&mut book.generations)?;
    store.agents(|agent| book.restore(agent))?;
    let from = match store.fact("snapshot")? {
        Some(bytes) => {
            bytes.try_into().map(u64::from_be_bytes).map_err(|_| StoreError::Damaged("the snapshot's index".to_owned()))?
        }
        None => 0,
    };
    let mut last_time = UnixTime::default();
    let mut genesis = None;
    let mut fold = |index: u64, bytes: &[u8]| -> Result<(), StoreError> {
        let entry = proto::Entry::decode(bytes).map_err(|_| StoreError::Damaged(format!("entry {index}")))?;
        last_time = UnixTime(entry.time_unix_micros);
        apply(&mut book, index, entry, forget_seconds, &mut genesis).ok_or_else(|| StoreError::Damaged(format!("entry {index}")))
    };
    if from > 0 {
        // The last entry is always looked at (for its time), and the first (for the genesis).
        fold(0, &store.first()?)?;
    }
    store.replay(from.min(store.size()?.saturating_sub(1)), &mut fold)?;
    let genesis = genesis.ok_or_else(|| StoreError::Damaged("it has no genesis".to_owned()))?;
    Ok(Replayed { book, genesis, last_time })
}

/// Folds one entry in, as the sequencer did when it was written. An agent's row may hold it already.
fn apply(
    book: &mut Book,
    index: u64,
    entry: proto::Entry,
    forget_seconds: u64,
    genesis: &mut Option<proto::Genesis>,
) -> Option<()> {
    let time = UnixTime(entry.time_unix_micros);
    match entry.body? {
        Body::Genesis(found) => *genesis = Some(found),
        Body::Intended(intended) if intended.agent.is_empty() => book.intended(index),
        Body::Intended(intended) => {
            let slot = book.slot(&AgentId::parse(&intended.agent).ok()?)?;
            if book.agent(slot).as_of >= index {
                book.open.insert(index, Some(slot));
            } else {
                book.intended_for(index, slot, wanted_of(&intended)?, forget_seconds);
            }
        }
        Body::SignIntended(_) => book.intended(index),
        Body::Released(outcome) => ended(book, index, outcome.intent, Ending::Released),
        Body::Withheld(outcome) => ended(book, index, outcome.intent, Ending::Nothing),
        Body::Failed(outcome) => ended(book, index, outcome.intent, Ending::Nothing),
        Body::Unknown(outcome) => ended(book, index, outcome.intent, Ending::Unknown),
        Body::Enrolled(enrolled) => {
            let id = AgentId::parse(&enrolled.agent).ok()?;
            if book.slot(&id).is_none() {
                let limits = enrolled.limits?;
                let token = token_of(&enrolled.token_id, &enrolled.token_public_key, enrolled.token_expires_unix_seconds)?;
                book.enrolled(index, Agent::new(id, enrolled.epoch, limits.ttl_seconds_max, limits.rejoin_seconds, token));
            }
        }
        Body::Quarantined(quarantined) => {
            let slot = book.slot(&AgentId::parse(&quarantined.agent).ok()?)?;
            if book.agent(slot).as_of < index {
                book.quarantined(index, time, slot, quarantined.cause(), quarantined.detail);
            }
        }
        Body::Reinstated(reinstated) => {
            let slot = book.slot(&AgentId::parse(&reinstated.agent).ok()?)?;
            if book.agent(slot).as_of < index {
                let token = token_of(&reinstated.token_id, &reinstated.token_public_key, reinstated.token_expires_unix_seconds)?;
                book.reinstated(index, slot, reinstated.epoch, token);
            }
        }
        _ => {}
    }
    Some(())
}

fn ended(book: &mut Book, index: u64, intent: u64, ending: Ending) {
    match book.open.get(&intent) {
        Some(Some(slot)) if book.agent(*slot).as_of >= index => drop(book.open.remove(&intent)),
        _ => book.ended(index, intent, ending),
    }
}

fn token_of(id: &[u8], public_key: &[u8], expires: u64) -> Option<Token> {
    Some(Token {
        id: TokenId::from_slice(id)?,
        public_key: public_key.try_into().ok()?,
        expires: UnixTime::from_seconds(expires),
        spent_for: None,
    })
}

fn wanted_of(intended: &proto::Intended) -> Option<Wanted> {
    let (_, tbs) = TbsCertificate::from_der(&intended.tbs).ok()?;
    let appraised = intended.appraised.as_ref()?;
    let evidence = match appraised.kind() {
        proto::EvidenceKind::JoinToken => Evidence::JoinToken(TokenId::from_slice(&appraised.evidence_id)?),
        proto::EvidenceKind::BoundKey => Evidence::BoundKey {
            prover: Digest::from_slice(&appraised.evidence_id)?,
            sequence: intended.sequence,
            channel_proved: appraised.channel_proved,
        },
        proto::EvidenceKind::Unspecified => return None,
    };
    let seconds = |time: i64| u64::try_from(time).ok().map(UnixTime::from_seconds);
    Some(Wanted {
        sequence: intended.sequence,
        epoch: intended.epoch,
        evidence,
        key: PublicKey::from_spki(tbs.subject_pki.raw).ok()?,
        serial: Serial::from_slice(tbs.raw_serial())?,
        not_before: seconds(tbs.validity.not_before.timestamp())?,
        not_after: seconds(tbs.validity.not_after.timestamp())?,
        request_hash: Digest::from_slice(&intended.request_hash)?,
        idempotency_hash: intended.idempotency_hash.as_slice().try_into().ok()?,
    })
}

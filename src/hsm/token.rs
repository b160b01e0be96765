//! One token: its connection, the threads that serve it, and whether it is usable. What its threads do is in `lanes.rs` (signatures),
//! `admin.rs` (objects) and `health.rs` (the watch and recovery).

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use cryptoki::session::Session;
use cryptoki::slot::{Slot, TokenInfo};
use tokio::sync::{Notify, watch};

use super::Settings;
use super::admin::{self, Errand};
use super::admission::Admission;
use super::error::Error;
use super::faults::{Place, Remedy};
use super::history::History;
use super::keyring::{Bound, Keyring};
use super::lanes::{self, Job};
use super::login::Login;
use super::modules::{Lifecycle, Module};
use super::owners::{self, Owners};
use super::probe::{self, Capabilities};
use super::queue::{Crew, Mark, Post, Queue};
use crate::model::Meter;

/// Errands that may wait at once.
const ERRANDS_MAX: usize = 1024;
/// As many vague errors in a row, without a signature between them, are a lost token.
const SUSPICIONS_MAX: u32 = 3;
/// As many lanes may hang inside the module and be replaced. One more, and only a new process helps.
const ABANDONED_MAX: usize = 2;

/// A session is held open for ever: when the last one closes, the login and all handles go.
struct Connection {
    slot: Slot,
    read_only_sessions: bool,
    anchor: Session,
}

/// Whether signatures can be had, and why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// Signatures can be had.
    pub usable: bool,
    /// The newest fault; stays after it has passed.
    pub fault: Option<String>,
    /// A call hangs inside the module: recovery in process is not possible, the daemon has to be restarted.
    pub stuck: bool,
    /// No login is tried until an operator says so.
    pub locked: bool,
    /// A key in use that is gone or wrong, while the token serves the others.
    pub key: Option<String>,
}

/// The fault of a token that is closed on purpose.
const SHUT_DOWN: &str = "shut down";

/// What the threads of one token share.
pub(super) struct Token {
    pub(super) settings: Settings,
    pub(super) module: Arc<Module>,
    pub(super) meter: Arc<Meter>,
    pub(super) jobs: Queue<Job>,
    pub(super) errands: Queue<Errand>,
    pub(super) keyring: Keyring,
    pub(super) owners: Owners,
    pub(super) canary: Mutex<Option<Arc<Bound>>>,
    pub(super) alarm: Notify,
    pub(super) watchman: Arc<Crew>,
    pub(super) crew: Arc<Crew>,
    /// How often it came into service: the first time when it was opened.
    pub(super) resumed: AtomicU64,
    pub(super) admission: Admission,
    pub(super) history: History,
    /// A login on new sessions is not enough to come back.
    restart: AtomicBool,
    capabilities: OnceLock<Capabilities>,
    serial: OnceLock<String>,
    login: Login,
    connection: Mutex<Option<Connection>>,
    generation: AtomicU64,
    term: AtomicU64,
    epoch: AtomicU64,
    suspicions: AtomicU32,
    signatures: AtomicU64,
    started: Instant,
    signed_at_ms: AtomicU64,
    health: watch::Sender<Health>,
    stopping: AtomicBool,
}

impl Token {
    pub(super) fn new(module: Arc<Module>, settings: Settings, meter: Arc<Meter>) -> Arc<Self> {
        Arc::new(Self {
            jobs: Queue::new(settings.queue),
            errands: Queue::new(ERRANDS_MAX),
            login: Login::new(&settings),
            module,
            meter,
            keyring: Keyring::default(),
            owners: Owners::new(),
            canary: Mutex::new(None),
            alarm: Notify::new(),
            watchman: Crew::new(),
            crew: Crew::new(),
            resumed: AtomicU64::new(0),
            admission: Admission::new(settings.token.lanes, settings.queue, settings.sign_deadline),
            history: History::default(),
            restart: AtomicBool::new(false),
            settings,
            capabilities: OnceLock::new(),
            serial: OnceLock::new(),
            connection: Mutex::new(None),
            generation: AtomicU64::new(0),
            term: AtomicU64::new(0),
            epoch: AtomicU64::new(1),
            suspicions: AtomicU32::new(0),
            signatures: AtomicU64::new(0),
            started: Instant::now(),
            signed_at_ms: AtomicU64::new(0),
            health: watch::Sender::new(Health { usable: false, fault: None, stuck: false, locked: false, key: None }),
            stopping: AtomicBool::new(false),
        })
    }

    fn connection(&self) -> MutexGuard<'_, Option<Connection>> {
        self.connection.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // --- connecting ---------------------------------------------------------------------------------------------------

    /// Opens the anchor session on the token that was found, logs in once, probes it the first time, and starts its threads. The caller
    /// holds the module's lifecycle.
    pub(super) fn connect(self: &Arc<Self>, found: (Slot, TokenInfo)) -> Result<(), Error> {
        let (slot, info) = found;
        self.generation.store(self.module.generation(), Ordering::Release);
        let context = self.module.context();
        let anchor = context.open_rw_session_no_drop(slot).map_err(|error| Error::at(Place::OpenSession, error))?;
        let read_only_sessions =
            match self.login.log_in(context, &anchor, slot, &info).and_then(|()| self.probe_once(&anchor, slot, &info)) {
                Ok(capabilities) => capabilities.read_only_sessions,
                Err(error) => {
                    Self::discard(anchor);
                    return Err(error);
                }
            };
        let _ = self.serial.set(info.serial_number().into());
        // Not before the new one is logged in: the last session to close takes the login along.
        let old = self.connection().replace(Connection { slot, read_only_sessions, anchor });
        // C_CloseSession may hang: nobody who asks for the connection waits for it.
        if let Some(old) = old {
            Self::discard(old.anchor);
        }
        self.start_threads()
    }

    /// Found out at the first connection; the token stays what it is.
    fn probe_once(&self, anchor: &Session, slot: Slot, info: &TokenInfo) -> Result<&Capabilities, Error> {
        if let Some(known) = self.capabilities.get() {
            return Ok(known);
        }
        let probed = self.probe(anchor, slot, info)?;
        Ok(self.capabilities.get_or_init(|| probed))
    }

    fn probe(&self, anchor: &Session, slot: Slot, info: &TokenInfo) -> Result<Capabilities, Error> {
        let capabilities =
            probe::capabilities(&self.module, &self.settings.token.label, anchor, slot, info, self.settings.for_agents)?;
        let Capabilities { session_keys, read_only_sessions, sessions_max, .. } = capabilities;
        tracing::info!(token = %self.settings.token.label, ed25519 = capabilities.ed25519, ps256 = capabilities.ps256,
            session_keys, read_only_sessions, sessions_max,
            mechanisms = capabilities.mechanisms.len(), "token probed");
        let (wanted, lanes) = (self.settings.token.lanes, self.lanes_of(sessions_max));
        self.admission.set_lanes(lanes);
        if lanes < wanted {
            tracing::warn!(token = %self.settings.token.label, wanted, lanes, sessions_max,
                "fewer lanes than configured: the token allows no more sessions");
        }
        Ok(capabilities)
    }

    // --- threads and sessions -----------------------------------------------------------------------------------------

    fn start_threads(self: &Arc<Self>) -> Result<(), Error> {
        let term = self.term.fetch_add(1, Ordering::AcqRel) + 1;
        self.suspicions.store(0, Ordering::Relaxed);
        // Before anybody can use a handle of the connection that was lost.
        self.epoch_ends(self.epoch());
        // What made it slow, or fast, may not be what it was.
        self.admission.forget_pace();
        self.errands.open(term);
        self.jobs.open(term);
        for shard in self.owners.shards() {
            shard.errands.open(term);
        }
        self.top_up()
    }

    /// As many as configured, and as the token's sessions allow beside the anchor, the admin lane, the owners and one in reserve.
    fn lanes_of(&self, sessions_max: Option<usize>) -> usize {
        let others = if sessions_max.is_some_and(|most| most < owners::SESSIONS_MIN) { 3 } else { 3 + owners::SHARDS };
        let most = sessions_max.map_or(usize::MAX, |most| most.saturating_sub(others));
        self.settings.token.lanes.min(most).max(1)
    }

    /// Replaces threads that have died or were given up, while no more than [`ABANDONED_MAX`] hang.
    pub(super) fn top_up(self: &Arc<Self>) -> Result<(), Error> {
        let (term, count, lanes) = (self.term.load(Ordering::Acquire), self.crew.count(), self.admission.lanes());
        if count.hanging > ABANDONED_MAX {
            return Err(Error::Stuck);
        }
        for _ in count.serving..lanes {
            let token = Arc::clone(self);
            self.crew.hire("hsm-sign", Post::Sign, move |mark| lanes::serve(&token, term, mark)).map_err(Error::Thread)?;
        }
        if count.singles == 0 {
            let token = Arc::clone(self);
            self.crew.hire("hsm-admin", Post::Single, move |mark| admin::serve(&token, term, mark)).map_err(Error::Thread)?;
        }
        for shard in (0..owners::SHARDS).filter(|shard| !self.crew.has(Post::Owner(*shard))) {
            let token = Arc::clone(self);
            let work = move |mark: &Mark| owners::serve(&token, shard, term, mark);
            self.crew.hire("hsm-owner", Post::Owner(shard), work).map_err(Error::Thread)?;
        }
        Ok(())
    }

    /// A session of the current connection; not closed when dropped.
    pub(super) fn open_session(&self, read_write: bool) -> Result<Session, Error> {
        let Some((slot, read_only)) = self.connection().as_ref().map(|at| (at.slot, at.read_only_sessions && !read_write)) else {
            return Err(self.unusable());
        };
        let context = self.module.context();
        let opened = if read_only { context.open_ro_session_no_drop(slot) } else { context.open_rw_session_no_drop(slot) };
        opened.map_err(|error| Error::at(Place::OpenSession, error))
    }

    /// The anchor, one for each lane, and one for each owner that has begun.
    pub(super) fn sessions_open(&self) -> usize {
        let count = self.crew.count();
        if self.connection().is_some() { 1 + count.serving + count.hanging + count.singles + self.owners.sessions() } else { 0 }
    }

    /// Closes a session that is of no more use. If that fails there is nothing else to do with it.
    pub(super) fn discard(session: Session) {
        if let Err(error) = session.close() {
            tracing::debug!(?error, "C_CloseSession");
        }
    }

    /// A thread goes home. Its session is closed if the module stays: devices have few. It is forgotten where the module is being
    /// finalized, since its number may soon name another.
    pub(super) fn leave(&self, mark: &Mark, session: Option<Session>) {
        if self.remedy() == Remedy::LogIn
            && !self.is_stopping()
            && let Some(session) = session
        {
            mark.inside(|| Self::discard(session));
        }
    }

    /// Of the newest attempt to connect: what has to be restarted if that connection is lost.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn wait_until_out(&self, patience: Duration) -> bool {
        self.crew.wait_until_gone(patience)
    }

    pub(super) fn forget_sessions(&self) {
        *self.connection() = None;
    }

    // --- health -------------------------------------------------------------------------------------------------------

    pub(super) fn is_usable(&self) -> bool {
        self.health.borrow().usable
    }

    /// Whether one more would be admitted to wait for a signature.
    pub(super) fn has_room(&self) -> Result<(), Error> {
        if self.is_usable() { self.admission.look() } else { Err(self.unusable()) }
    }

    pub(super) fn health(&self) -> watch::Receiver<Health> {
        self.health.subscribe()
    }

    /// In service (again), unless another token has had the module restarted meanwhile, or this one was suspended again. The caller holds
    /// the lifecycle.
    pub(super) fn resume(&self, _held: &Lifecycle) -> Result<(), Error> {
        if self.generation() != self.module.generation() || self.is_stopping() {
            return Err(self.unusable());
        }
        // Whoever suspends shuts the queue before he tells so: what is told here is never newer than what he tells.
        let resumed = self.health.send_if_modified(|health| {
            let open = self.jobs.is_open();
            if open {
                (health.usable, health.stuck, health.locked) = (true, false, false);
                // Before anybody sees that it serves.
                self.resumed.fetch_add(1, Ordering::Relaxed);
                self.restart.store(false, Ordering::Release);
            }
            open
        });
        if resumed { Ok(()) } else { Err(self.unusable()) }
    }

    /// Out of service at once: what waits is answered, threads go home, the watch starts recovery.
    pub(super) fn suspend(&self, fault: &str, remedy: Remedy) {
        if !self.take_out(fault, remedy) {
            return;
        }
        if fault == SHUT_DOWN {
            tracing::info!(token = %self.label(), "the token is closed");
        } else {
            self.history.note(fault);
            tracing::error!(token = %self.label(), fault, "the token is out of service");
        }
    }

    /// The same for a token that is well, as far as anybody knows: another one behind the same module is not.
    pub(super) fn stand_aside(&self, fault: &str, remedy: Remedy) {
        if self.take_out(fault, remedy) {
            self.history.note(fault);
            tracing::warn!(token = %self.label(), because = fault, "the token is out of service for a moment");
        }
    }

    /// Whether it was in service.
    fn take_out(&self, fault: &str, remedy: Remedy) -> bool {
        if remedy == Remedy::Restart {
            self.restart.store(true, Ordering::Release);
        }
        let waiting = self.jobs.shut();
        let mut was_usable = false;
        // Why it went out of service stays the fault, until recovery meets another.
        self.health.send_modify(|health| {
            was_usable = std::mem::replace(&mut health.usable, false);
            if was_usable || health.fault.is_none() {
                health.fault = Some(fault.into());
            }
        });
        for job in waiting {
            job.turn_away(fault);
        }
        drop(self.errands.shut());
        for shard in self.owners.shards() {
            drop(shard.errands.shut());
        }
        self.alarm.notify_one();
        was_usable
    }

    /// CK_TOKEN_INFO label.
    pub(super) fn label(&self) -> &str {
        &self.settings.token.label
    }

    /// Whether [`Token::tell_of_keys`] has something new to say of a key that is not there.
    pub(super) fn has_news_of_keys(&self) -> bool {
        let key = self.troubled_key();
        key.is_some() && self.health.borrow().key != key
    }

    fn troubled_key(&self) -> Option<String> {
        self.keyring.all().iter().find_map(|key| key.trouble())
    }

    /// Says which key in use is not there, if that is news.
    pub(super) fn tell_of_keys(&self) {
        let key = self.troubled_key();
        self.health.send_if_modified(|health| {
            let news = health.key != key;
            if news {
                health.key = key;
            }
            news
        });
    }

    /// The key that tells the token's health.
    pub(super) fn canary(&self) -> Option<Arc<Bound>> {
        self.canary.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// What recovery has to begin with.
    pub(super) fn remedy(&self) -> Remedy {
        if self.restart.load(Ordering::Acquire) { Remedy::Restart } else { Remedy::LogIn }
    }

    pub(super) fn note_fault(&self, error: &Error) {
        // A hang is over when the token serves again, not when somebody else has a fault to tell.
        self.health.send_modify(|health| {
            (health.usable, health.fault) = (false, Some(error.to_string()));
            health.stuck |= matches!(error, Error::Stuck);
            health.locked = error.awaits_unlock();
        });
    }

    pub(super) fn unusable(&self) -> Error {
        if self.is_stopping() {
            return Error::ShutDown;
        }
        let health = self.health.borrow();
        if health.stuck {
            return Error::Stuck;
        }
        let fault = health.fault.clone().unwrap_or_else(|| "it is being connected".into());
        if health.locked { Error::Locked(fault) } else { Error::Unusable(fault) }
    }

    /// Whether this vague error is one too many.
    pub(super) fn suspect_again(&self) -> bool {
        self.suspicions.fetch_add(1, Ordering::AcqRel) + 1 >= SUSPICIONS_MAX
    }

    pub(super) fn report_signature(&self, took: Duration) {
        self.admission.note(took);
        self.suspicions.store(0, Ordering::Relaxed);
        self.signatures.fetch_add(1, Ordering::Relaxed);
        self.signed_at_ms.store(self.now_ms(), Ordering::Relaxed);
    }

    fn now_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    pub(super) fn idle_for(&self) -> Duration {
        Duration::from_millis(self.now_ms().saturating_sub(self.signed_at_ms.load(Ordering::Relaxed)))
    }

    pub(super) fn signatures(&self) -> u64 {
        self.signatures.load(Ordering::Relaxed)
    }

    // --- epochs, facts ------------------------------------------------------------------------------------------------

    pub(super) fn epoch(&self) -> u64 {
        self.epoch.load(Ordering::Acquire)
    }

    /// All handles of `epoch` are dropped; once, however many lanes met the same dead handle.
    pub(super) fn epoch_ends(&self, epoch: u64) {
        let _ = self.epoch.compare_exchange(epoch, epoch + 1, Ordering::AcqRel, Ordering::Acquire);
    }

    pub(super) fn capabilities(&self) -> Option<&Capabilities> {
        self.capabilities.get()
    }

    pub(super) fn serial(&self) -> &str {
        self.serial.get().map_or("", String::as_str)
    }

    /// A login that failed holds the next one back. While one is under way the marker is there, too, and nothing is known of it yet.
    pub(super) fn pin_pending(&self) -> bool {
        self.health.borrow().locked && self.login.is_pending()
    }

    pub(super) fn is_stopping(&self) -> bool {
        self.stopping.load(Ordering::Acquire)
    }

    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Release);
        self.suspend(SHUT_DOWN, Remedy::LogIn);
    }
}

/// What recovery does under the module's lifecycle lock. Blocks, for ever where the module does.
pub(super) fn reconnect(token: &Arc<Token>, seen: u64, remedy: Remedy) -> Result<(), Error> {
    token.login.check_not_pending()?;
    // Whoever asks from here on hears of a login under way, not of the one before it.
    token.health.send_if_modified(|health| std::mem::take(&mut health.locked));
    let mut lifecycle = token.module.lifecycle();
    let lifecycle: &mut Lifecycle = &mut lifecycle;
    match remedy {
        Remedy::Restart => token.module.restart(lifecycle, seen, token.label())?,
        Remedy::LogIn => token.module.come_out(token)?,
    }
    // Noted before the token is looked for: what is not there now may be there after another restart, and only then.
    token.generation.store(token.module.generation(), Ordering::Release);
    token.connect(token.module.find(&token.settings.token)?)
}

//! Loaded modules: one C_Initialize each, and recovery, which is a matter of the whole module.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, TryLockError, Weak};
use std::time::{Duration, Instant};

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::error::{Error as Cryptoki, RvError};
use cryptoki::slot::{Slot, TokenInfo};
use rustix::process::{DumpableBehavior, Resource, Rlimit, set_dumpable_behavior, setrlimit};

use super::error::Error;
use super::faults::{Place, Remedy, name};
use super::token::Token;
use crate::config;

/// Where other tokens behind the same module are in service, it is restarted under them only after as long a time again as the one that
/// needs it has been away, between these two: who was away for a short time is back in a short time, and who stays away is no burden.
pub(super) const RESTART_SHARED: (Duration, Duration) = (Duration::from_secs(1), Duration::from_secs(30));

/// How long recovery waits for lanes to come out of the module before it calls them stuck.
const COME_OUT: Duration = Duration::from_secs(2);

/// Bytes after which a message names no more of the tokens that a module shows.
const FOUND_MAX: usize = 1024;

/// Keeps PINs and keys out of core dumps and away from debuggers of the same user: PR_SET_DUMPABLE = 0, RLIMIT_CORE = 0.
/// Loading a module does it; the daemon does it earlier still.
///
/// # Errors
/// When the kernel refuses.
pub fn harden() -> Result<(), Error> {
    set_dumpable_behavior(DumpableBehavior::NotDumpable).map_err(|error| Error::Harden(error.into()))?;
    setrlimit(Resource::Core, Rlimit { current: Some(0), maximum: Some(0) }).map_err(|error| Error::Harden(error.into()))
}

/// The modules loaded in this process, one C_Initialize each: built once by the daemon and passed to `Hsm::open`. Two tokens may
/// share a module. A module is never unloaded: libraries with threads and exit handlers of their own do not survive that.
pub struct Modules {
    loaded: Mutex<HashMap<PathBuf, Arc<Module>>>,
    /// Whose environment tells them where their tokens are.
    whose: &'static str,
}

impl Default for Modules {
    fn default() -> Self {
        Self { loaded: Mutex::default(), whose: THIS_COMMAND }
    }
}

/// Of a process that an operator has started and looks at.
const THIS_COMMAND: &str = "this command's environment";

impl Modules {
    /// None yet, in the process of a command.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// The same in the daemon, whose environment is not that of whoever reads what it says.
    #[must_use]
    pub fn of_the_daemon() -> Self {
        Self { whose: "the daemon's environment", ..Self::default() }
    }

    pub(super) fn load(&self, path: &Path) -> Result<Arc<Module>, Error> {
        let failed = |cause: String| Error::Module { path: path.into(), cause };
        let real = path.canonicalize().map_err(|error| failed(error.to_string()))?;
        let mut loaded = self.loaded.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(module) = loaded.get(&real) {
            return Ok(Arc::clone(module));
        }
        check_owner(&real).map_err(failed)?;
        harden()?;
        let context = Pkcs11::new(&real).map_err(|error| failed(error.to_string()))?;
        // The last clone to be dropped would unload it, under threads whose ends still run in it.
        std::mem::forget(context.clone());
        initialize(&context).map_err(|error| not_started(&real, self.whose, &error))?;
        if let Ok(info) = context.get_library_info() {
            tracing::info!(module = %real.display(), library = %info.library_description(), manufacturer = %info.manufacturer_id(),
                "PKCS#11 module loaded");
        }
        let module = Arc::new(Module {
            context,
            path: real.clone(),
            whose: self.whose,
            generation: AtomicU64::new(1),
            lifecycle: Mutex::new(Lifecycle { initialized: true, stale: false, missing: None }),
            objects: Mutex::new(()),
            tokens: Mutex::new(Vec::new()),
        });
        loaded.insert(real, Arc::clone(&module));
        Ok(module)
    }
}

/// Where a module looks for its tokens, if only its environment tells: what to look at when they are not there, for whoever runs a
/// command.
#[must_use]
pub fn finds_tokens_by(module: &Path) -> Option<String> {
    finds_tokens_in(module, THIS_COMMAND)
}

fn finds_tokens_in(module: &Path, whose: &str) -> Option<String> {
    let file = module.file_name()?.to_string_lossy();
    let known = [("softhsm", "SOFTHSM2_CONF"), ("kryoptic", "KRYOPTIC_CONF")];
    let (_, variable) = known.into_iter().find(|(part, _)| file.contains(part))?;
    Some(match std::env::var_os(variable) {
        Some(value) => format!("it finds its tokens by {variable}, which is {} in {whose}", value.display()),
        None => format!("it finds its tokens by {variable}, which is not set in {whose}"),
    })
}

/// A module's constructors run in our address space as soon as it is loaded: whoever may write it is us.
fn check_owner(path: &Path) -> Result<(), String> {
    let metadata = path.metadata().map_err(|error| error.to_string())?;
    let owner = metadata.uid();
    if owner != 0 && owner != rustix::process::geteuid().as_raw() {
        return Err(format!("it belongs to uid {owner}, neither root nor this daemon"));
    }
    if metadata.mode() & 0o002 != 0 {
        return Err("everybody may write it".into());
    }
    Ok(())
}

/// C_Initialize has failed, at the start or in the middle of a life.
fn not_started(module: &Path, whose: &str, error: &Cryptoki) -> Error {
    let cause = match error {
        Cryptoki::Pkcs11(code, _) => format!("C_Initialize answered {}", name(*code)),
        other => other.to_string(),
    };
    let cause = finds_tokens_in(module, whose).into_iter().fold(cause, |cause, hint| format!("{cause}; {hint}"));
    Error::Module { path: module.into(), cause }
}

fn initialize(context: &Pkcs11) -> Result<(), Cryptoki> {
    match context.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)) {
        Err(Cryptoki::Pkcs11(RvError::CryptokiAlreadyInitialized, _)) => Ok(()),
        other => other,
    }
}

/// One loaded module.
pub(super) struct Module {
    context: Pkcs11,
    path: PathBuf,
    whose: &'static str,
    generation: AtomicU64,
    /// Held while connecting a token and while recovering: the two must never overlap.
    lifecycle: Mutex<Lifecycle>,
    /// Held around creating, destroying and searching token objects: SoftHSM 2.6 and 2.7 corrupt themselves otherwise.
    objects: Mutex<()>,
    tokens: Mutex<Vec<Weak<Token>>>,
}

/// Proof that nobody else connects or recovers.
pub(super) struct Lifecycle {
    initialized: bool,
    /// A PIN was refused, or a token gave way while it was opened: the next try is made on what is there then, not on what the module
    /// remembers.
    stale: bool,
    missing: Option<Missing>,
}

/// A token that could not be opened while others are in service.
struct Missing {
    since: Instant,
    /// When the module was last restarted for it.
    restarted: Instant,
}

impl Lifecycle {
    /// The next look for a token begins with a restart.
    pub(super) fn forget(&mut self) {
        self.stale = true;
    }

    /// The token that was wanted is in service.
    pub(super) fn settle(&mut self) {
        self.missing = None;
    }

    /// Whether the module may be restarted under those who use it, for a token that is not there.
    fn is_restart_due(&mut self) -> bool {
        let now = Instant::now();
        let missing = self.missing.get_or_insert(Missing { since: now, restarted: now });
        let patience = (missing.restarted - missing.since).clamp(RESTART_SHARED.0, RESTART_SHARED.1);
        let due = now - missing.restarted >= patience;
        if due {
            missing.restarted = now;
        }
        due
    }
}

impl Module {
    pub(super) fn context(&self) -> &Pkcs11 {
        &self.context
    }

    /// How often the module has been initialised. Sessions and handles of another generation are dead.
    pub(super) fn generation(&self) -> u64 {
        self.generation.load(Ordering::Acquire)
    }

    pub(super) fn objects(&self) -> MutexGuard<'_, ()> {
        self.objects.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn lifecycle(&self) -> MutexGuard<'_, Lifecycle> {
        self.lifecycle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tokens(&self) -> Vec<Arc<Token>> {
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.retain(|token| token.strong_count() > 0);
        tokens.iter().filter_map(Weak::upgrade).collect()
    }

    pub(super) fn join(&self, token: &Arc<Token>) {
        self.tokens.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::downgrade(token));
    }

    /// Lanes of all its tokens.
    pub(super) fn lanes(&self) -> usize {
        self.tokens().iter().map(|token| token.admission.lanes()).sum()
    }

    /// Whether another token of this module is in service.
    pub(super) fn serves_besides(&self, token: *const Token) -> bool {
        self.tokens().iter().any(|other| Arc::as_ptr(other) != token && other.is_usable())
    }

    /// `first` lost its login: every token of the module makes sure of its own.
    pub(super) fn suspend_all(&self, first: &Token, fault: &str) {
        first.suspend(fault, Remedy::LogIn);
        for token in self.tokens().iter().filter(|token| !std::ptr::eq(Arc::as_ptr(token), first)) {
            token.stand_aside(&format!("token {:?} of the same module lost its login", first.label()), Remedy::LogIn);
        }
    }

    /// Starts the module afresh, unless that happened since `seen`: C_Finalize with a call in flight is undefined, so every token's
    /// threads come out first. Afterwards every token has to be connected again by its own watch, which is told to. `sake` is the label of
    /// the one that needs it.
    pub(super) fn restart(&self, lifecycle: &mut Lifecycle, seen: u64, sake: &str) -> Result<(), Error> {
        if self.generation() != seen && lifecycle.initialized {
            return Ok(());
        }
        let tokens = self.tokens();
        for token in &tokens {
            token.stand_aside(&format!("the PKCS#11 module is restarted for the sake of token {sake:?}"), Remedy::Restart);
        }
        let deadline = Instant::now() + COME_OUT;
        for token in &tokens {
            if !token.wait_until_out(deadline.saturating_duration_since(Instant::now())) {
                return Err(Error::Stuck);
            }
        }
        for token in &tokens {
            token.forget_sessions();
        }
        self.generation.fetch_add(1, Ordering::AcqRel);
        self.reinitialize(lifecycle)
    }

    /// The token's threads come out of the module: what a new login on a module that stays needs.
    pub(super) fn come_out(&self, token: &Arc<Token>) -> Result<(), Error> {
        if token.wait_until_out(COME_OUT) { Ok(()) } else { Err(Error::Stuck) }
    }

    /// C_Finalize, C_Initialize. A failure of the first is no news (the library may have lost itself); the second decides.
    fn reinitialize(&self, lifecycle: &mut Lifecycle) -> Result<(), Error> {
        if let Err(error) = self.context.clone().finalize() {
            tracing::debug!(?error, "C_Finalize");
        }
        lifecycle.initialized = false;
        initialize(&self.context).map_err(|error| not_started(&self.path, self.whose, &error))?;
        lifecycle.initialized = true;
        Ok(())
    }

    /// C_Finalize for good, when `leaving` was the last token. Nobody of it may be inside. Somebody who is connecting right now may hang
    /// for ever: nothing is finalized under him.
    pub(super) fn leave(&self, leaving: &Arc<Token>) {
        let mut lifecycle = match self.lifecycle.try_lock() {
            Ok(lifecycle) => lifecycle,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return,
        };
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.retain(|token| token.strong_count() > 0 && token.as_ptr() != Arc::as_ptr(leaving));
        if tokens.is_empty() && lifecycle.initialized {
            // The context stays good for another C_Initialize, should a token be opened again.
            if let Err(error) = self.context.clone().finalize() {
                tracing::debug!(?error, "C_Finalize at the end");
            }
            lifecycle.initialized = false;
            self.generation.fetch_add(1, Ordering::AcqRel);
        }
    }

    /// The one slot whose token has this label (and serial). Slot ids are no names: SoftHSM derives them anew.
    pub(super) fn find(&self, wanted: &config::Token) -> Result<(Slot, TokenInfo), Error> {
        let slots = self.context.get_slots_with_token().map_err(|error| Error::at(Place::Slots, error))?;
        let mut found = String::new();
        let mut fitting = Vec::new();
        for slot in slots {
            // One token that cannot be described must not hide the others.
            let Ok(info) = self.context.get_token_info(slot) else { continue };
            if !info.token_initialized() {
                continue;
            }
            if found.len() < FOUND_MAX {
                let separator = if found.is_empty() { "" } else { ", " };
                let _ = write!(found, "{separator}{:?} (serial {:?})", info.label(), info.serial_number());
            }
            if info.label() == wanted.label && wanted.serial.as_ref().is_none_or(|serial| info.serial_number() == serial) {
                fitting.push((slot, info));
            }
        }
        match (fitting.pop(), fitting.len()) {
            (Some(only), 0) => Ok(only),
            (last, more) => Err(Error::TokenNotFound {
                label: wanted.label.clone(),
                serial: wanted.serial.as_ref().map(|serial| format!(" with serial {serial:?}")).unwrap_or_default(),
                matches: more + usize::from(last.is_some()),
                found: match finds_tokens_in(&wanted.module, self.whose) {
                    _ if !found.is_empty() => found,
                    Some(hint) => format!("no token; {hint}"),
                    None => "no token".into(),
                },
            }),
        }
    }

    /// [`Module::find`], after a fresh start if the token is not there: SoftHSM and others look for tokens only at C_Initialize. Where
    /// others are using the module that is done seldom ([`RESTART_SHARED`]).
    pub(super) fn find_afresh(&self, lifecycle: &mut Lifecycle, wanted: &config::Token) -> Result<(Slot, TokenInfo), Error> {
        if !lifecycle.initialized {
            self.reinitialize(lifecycle)?;
        }
        let found = self.find(wanted);
        let afresh = match &found {
            Err(Error::TokenNotFound { .. } | Error::Token { .. }) => self.may_restart(lifecycle),
            _ => std::mem::take(&mut lifecycle.stale),
        };
        if afresh {
            self.restart(lifecycle, self.generation(), &wanted.label)?;
            return self.find(wanted);
        }
        found
    }

    /// Whether it may be restarted for a token that cannot be opened.
    pub(super) fn may_restart(&self, lifecycle: &mut Lifecycle) -> bool {
        !self.tokens().iter().any(|token| token.is_usable()) || lifecycle.is_restart_due()
    }
}

//! The PKCS#11 token.
//!
//! Owns: loaded modules, sessions, threads that call into a module, handles, the login, what to do about a CKR code. Promises:
//! keys are generated in the token, SENSITIVE, LOCAL, NEVER_EXTRACTABLE, read back (what agents' `wrapped` keys promise instead:
//! `wrapping.rs`); an agent's key and an authority's are never taken for each other; no signature leaves unverified; a caller
//! knows for certain whether C_Sign may have been reached; a full queue answers at once; a token that comes back is in service
//! again by itself; one wrong PIN costs one try. Never: searches or opens a session on the hot path, repeats a C_Sign, calls
//! C_Logout, destroys a token object unasked, shows a PIN.

mod admin;
mod admission;
mod agent_keys;
mod der;
mod error;
mod faults;
mod health;
mod history;
mod inspect;
mod keyring;
mod lanes;
mod login;
mod modules;
mod objects;
mod owners;
mod pin;
mod probe;
mod queue;
mod token;
mod wrapping;

use std::path::PathBuf;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::watch;

pub use agent_keys::{AgentKey, MadeKey};
pub use error::{Error, SignError};
pub use faults::Place;
pub use history::FaultSeen;
pub use inspect::{Check, SlotSeen, Status, TokenSeen};
pub use modules::{Modules, finds_tokens_by, harden};
pub use pin::{Unlock, ask_to_unlock, asked_to_unlock, pin_pending, unlock};
pub use probe::Capabilities;
pub use token::Health;

use crate::config;
use crate::model::{Algorithm, InvalidKey, KeyId, Meter, PublicKey};
use crate::proto::TokenRole;
use keyring::Bound;
use objects::Wanted;
use token::Token;

/// How long generating or destroying a key may take: some devices need seconds.
const ADMIN_DEADLINE: Duration = Duration::from_secs(30);

/// What a token is opened with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Module, label, serial, PIN source, lanes.
    pub token: config::Token,
    /// Names the `pin-pending` marker.
    pub role: TokenRole,
    /// Whether agents' keys live there: what they alone need is tried then.
    pub for_agents: bool,
    /// Directory of the `pin-pending` marker.
    pub state: PathBuf,
    /// Signatures that may wait at once.
    pub queue: usize,
    /// From queueing to the verified signature.
    pub sign_deadline: Duration,
}

/// One object of a CKA_ID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// CKO_PRIVATE_KEY.
    pub private: bool,
    /// The key of a CKO_PUBLIC_KEY, if it is of a kind that is accepted.
    pub public: Option<PublicKey>,
}

/// What a token holds under one CKA_ID and one CKA_LABEL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Held {
    /// CKA_ID, of whatever length; empty where an object has none.
    pub id: Vec<u8>,
    /// CKA_LABEL; empty where an object has none.
    pub label: String,
    /// How many.
    pub objects: u32,
}

/// One token, logged in to. Clones share it; it serves until [`Hsm::shut_down`], whatever is dropped.
#[derive(Clone)]
pub struct Hsm(Arc<Token>);

impl Hsm {
    /// Loads the module, finds the token by its label, logs in once, probes it, starts its threads. Blocks.
    ///
    /// # Errors
    /// Quickly, and with nothing left behind but the `pin-pending` marker if the login failed. No login is tried while that marker is
    /// there ([`unlock`]) or the token warns of a locked PIN.
    pub fn open(modules: &Modules, settings: Settings, meter: Arc<Meter>) -> Result<Self, Error> {
        let module = modules.load(&settings.token.module)?;
        let mut lifecycle = module.lifecycle();
        let found = module.find_afresh(&mut lifecycle, &settings.token)?;
        let token = Token::new(Arc::clone(&module), settings, meter);
        let hsm = Self(Arc::clone(&token));
        let opened = token.connect(found).and_then(|()| {
            module.join(&token);
            token.resume(&lifecycle)?;
            health::start(&token)
        });
        if let Err(error) = opened {
            token.stop();
            // The module may go on with a token that is gone.
            let is_gone = matches!(error, Error::Token { .. }) && module.may_restart(&mut lifecycle);
            if is_gone || error.awaits_unlock() {
                lifecycle.forget();
            }
            return Err(error);
        }
        lifecycle.settle();
        Ok(hsm)
    }

    /// Makes a key pair in the token, reads back what promise 1 says (SENSITIVE, not EXTRACTABLE, NEVER_EXTRACTABLE, LOCAL, SIGN),
    /// and has it sign a tagged test message. `label` is CKA_LABEL, cut to 32 characters.
    ///
    /// # Errors
    /// After any error, also [`Error::Deadline`], objects with this id may exist: find or destroy them by `id`. Never repeat it with the
    /// same id.
    pub async fn generate(&self, id: KeyId, algorithm: Algorithm, label: &str) -> Result<PublicKey, Error> {
        if algorithm == Algorithm::Ps256 {
            return Err(self.incapable("RSA for authorities"));
        }
        self.generate_as(id, algorithm, label, Bound::new).await
    }

    async fn generate_as(
        &self,
        id: KeyId,
        algorithm: Algorithm,
        label: &str,
        bind: fn(KeyId, PublicKey) -> Result<Bound, InvalidKey>,
    ) -> Result<PublicKey, Error> {
        let params = self.params(algorithm)?;
        let label: String = label.chars().take(32).collect();
        self.errand(ADMIN_DEADLINE, move |session| {
            let wanted = Wanted { algorithm, params, id: &id.0, label: &label, durable: true, extractable: false };
            let (public, private) = wanted.generate(session)?;
            let key = bind(id, objects::read_public(session, public)?)?;
            objects::check_private(session, private, (id, algorithm))?;
            objects::test_sign(session, private, &key)?;
            Ok(key.public)
        })
        .await
    }

    /// CKA_EC_PARAMS, if the token has such keys; nothing for RSA.
    fn params(&self, algorithm: Algorithm) -> Result<&'static [u8], Error> {
        let able = self.capabilities();
        match algorithm {
            Algorithm::P256 => Ok(&der::P256_PARAMS),
            Algorithm::P384 if able.p384 => Ok(&der::P384_PARAMS),
            Algorithm::P384 => Err(self.incapable("P-384")),
            Algorithm::Ps256 if able.ps256 => Ok(&[]),
            Algorithm::Ps256 => Err(self.incapable("RSA-PSS")),
            Algorithm::Ed25519 => able.ed25519_params.ok_or_else(|| self.incapable("Ed25519")),
        }
    }

    fn incapable(&self, what: &'static str) -> Error {
        Error::Incapable { label: self.0.settings.token.label.clone(), what }
    }

    /// All token objects with this CKA_ID, for reconciliation.
    ///
    /// # Errors
    /// When the token cannot be asked.
    pub async fn find(&self, id: KeyId) -> Result<Vec<Found>, Error> {
        self.errand(ADMIN_DEADLINE, move |session| objects::find(session, id)).await
    }

    /// Whether the token has nothing under this CKA_ID any more, for certain: it serves, its canary has just signed, and a session that is
    /// opened for this shows the canary's key and finds nothing of the id. `false` where that is not known.
    ///
    /// # Errors
    /// When the token cannot be asked: what is away is not gone.
    pub async fn is_gone(&self, id: KeyId) -> Result<bool, Error> {
        self.check_usable()?;
        let Some(canary) = self.0.canary() else { return Ok(false) };
        health::sing(&self.0, &canary, self.0.settings.sign_deadline).await.map_err(|error| match error {
            SignError::NotSigned(error) | SignError::Unknown(error) => error,
        })?;
        let (token, canary) = (Arc::clone(&self.0), canary.id);
        self.errand(ADMIN_DEADLINE, move |_| {
            let session = token.open_session(false)?;
            let gone = objects::shows_but(&session, canary, id);
            Token::discard(session);
            gone
        })
        .await
    }

    /// All token objects, for reconciliation: one for each CKA_ID and CKA_LABEL. A device may need seconds.
    ///
    /// # Errors
    /// When the token cannot be asked.
    pub async fn inventory(&self) -> Result<Vec<Held>, Error> {
        self.errand(ADMIN_DEADLINE, objects::inventory).await
    }

    /// Destroys all token objects with this CKA_ID and returns how many there were.
    ///
    /// # Errors
    /// When the token cannot be asked or refuses; some objects may be gone then.
    pub async fn destroy(&self, id: KeyId) -> Result<u32, Error> {
        self.0.owners.forget_wrapping(&[id]).await;
        self.errand(ADMIN_DEADLINE, move |session| objects::destroy(session, id)).await
    }

    /// The same of those with this CKA_LABEL alone.
    ///
    /// # Errors
    /// As [`Hsm::destroy`].
    pub async fn destroy_labelled(&self, id: KeyId, label: &str) -> Result<u32, Error> {
        let label = label.to_owned();
        self.errand(ADMIN_DEADLINE, move |session| objects::destroy_labelled(session, id, &label)).await
    }

    /// Looks a key up once and makes sure that it is the pinned one: the token's public key, the private key's attributes, a verified
    /// test signature.
    ///
    /// # Errors
    /// `KeyLost`, `KeyAmbiguous`, `KeyMismatch`, `Attribute`, or the token cannot be asked.
    pub async fn key(&self, id: KeyId, pinned: PublicKey) -> Result<SigningKey, Error> {
        self.check_usable()?;
        if self.0.owners.keys.knows(id, Some(&pinned)) {
            return Err(Error::KeyMismatch(id));
        }
        let key = self.0.keyring.bind(id, pinned, Bound::new)?;
        // An explicit question is worth a new look, also at a key that was missing before.
        key.set_location(keyring::Location::Unknown);
        self.0.handle_of(&key, Instant::now() + self.0.settings.sign_deadline).await?;
        Ok(SigningKey { token: Arc::clone(&self.0), key })
    }

    /// From now on the token's health is this key's: it signs a tagged message every 200 ms while nothing else is signed.
    pub fn set_canary(&self, key: SigningKey) {
        *self.0.canary.lock().unwrap_or_else(PoisonError::into_inner) = Some(key.key);
    }

    /// Its role and its label.
    #[must_use]
    pub fn name(&self) -> (TokenRole, String) {
        (self.0.settings.role, self.0.settings.token.label.clone())
    }

    /// Follows the token's health.
    #[must_use]
    pub fn health(&self) -> watch::Receiver<Health> {
        self.0.health()
    }

    /// What this token can do.
    #[must_use]
    pub fn capabilities(&self) -> &Capabilities {
        static NONE: Capabilities = Capabilities {
            ed25519: false,
            p384: false,
            ps256: false,
            wrapped_keys: false,
            wrapped_ed25519: false,
            wrapped_ps256: false,
            session_keys: false,
            read_only_sessions: false,
            sessions_max: None,
            mechanisms: Vec::new(),
            ed25519_params: None,
            wrapping: None,
        };
        // An opened token has been probed.
        self.0.capabilities().unwrap_or(&NONE)
    }

    /// Answers what waits, sends the threads home and waits for them until `deadline` has passed; finalizes the module when this was
    /// its last token and nobody hangs in it. Blocks. Nothing can be asked of the token afterwards.
    pub fn shut_down(&self, deadline: Duration) {
        let until = Instant::now() + deadline;
        self.0.stop();
        let watch_gone = self.0.watchman.wait_until_gone(deadline);
        // Recovery may have opened another term before it saw the stop.
        self.0.stop();
        let lanes_gone = self.0.wait_until_out(until.saturating_duration_since(Instant::now()));
        if watch_gone && lanes_gone {
            self.0.module.leave(&self.0);
        } else {
            tracing::error!(token = %self.0.settings.token.label, "a thread hangs inside the PKCS#11 module; it is not finalized");
        }
    }

    /// Whether anything can be asked of the token now: looked at before something is recorded that the token has to follow.
    ///
    /// # Errors
    /// When it is out of service.
    pub fn check_usable(&self) -> Result<(), Error> {
        if self.0.is_usable() { Ok(()) } else { Err(self.0.unusable()) }
    }

    async fn errand<R: Send + 'static>(
        &self,
        time: Duration,
        work: impl FnOnce(&cryptoki::session::Session) -> Result<R, Error> + Send + 'static,
    ) -> Result<R, Error> {
        self.check_usable()?;
        self.0.errand(Instant::now() + time, work).await
    }
}

/// A place on the way to a signature, given back when dropped.
#[must_use = "dropped at once, it admits nobody"]
pub struct Admitted(Arc<Token>);

impl Admitted {
    fn to(token: &Arc<Token>) -> Result<Self, Error> {
        if !token.is_usable() {
            return Err(token.unusable());
        }
        token.admission.enter()?;
        Ok(Self(Arc::clone(token)))
    }
}

impl Drop for Admitted {
    fn drop(&mut self) {
        self.0.admission.leave();
    }
}

/// A key in the token, bound to its pinned public key.
#[derive(Clone)]
pub struct SigningKey {
    token: Arc<Token>,
    key: Arc<Bound>,
}

impl SigningKey {
    /// CKA_ID.
    #[must_use]
    pub fn id(&self) -> KeyId {
        self.key.id
    }

    /// The pinned public key.
    #[must_use]
    pub fn public(&self) -> &PublicKey {
        &self.key.public
    }

    /// Whether [`SigningKey::admit`] would find a place now: asked before anything is computed for somebody who may be turned away, and
    /// who may turn out to want no signature.
    ///
    /// # Errors
    /// `QueueFull`, or the token is not usable.
    pub fn has_room(&self) -> Result<(), Error> {
        self.token.has_room()
    }

    /// A place among those who want signatures of this token. Asked for before anything is recorded: who would wait too long hears so
    /// at once, at no cost to those who wait.
    ///
    /// # Errors
    /// `QueueFull`, or the token is not usable.
    pub fn admit(&self) -> Result<Admitted, Error> {
        Admitted::to(&self.token)
    }

    /// A signature over `message`, verified against the pinned key. P-256: ECDSA-Sig-Value in DER over SHA-256 (RFC 5758 §3.2);
    /// Ed25519: 64 bytes (RFC 8032). Needs a tokio runtime with time.
    ///
    /// # Errors
    /// `NotSigned` when it is certain that C_Sign was not reached; `Unknown` otherwise, also when the deadline passed after a lane had begun.
    /// A future that is dropped before a lane begins asks for nothing.
    pub async fn sign(&self, message: Arc<[u8]>) -> Result<Vec<u8>, SignError> {
        if !self.token.is_usable() {
            return Err(SignError::NotSigned(self.token.unusable()));
        }
        lanes::sign(&self.token, &self.key, &message, Instant::now() + self.token.settings.sign_deadline).await
    }
}

//! Keys that are in use: pinned public key, verifier, and the handle of the current epoch.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use aws_lc_rs::signature::ParsedPublicKey;
use cryptoki::object::ObjectHandle;

use super::owners::Owned;
use crate::model::{InvalidKey, KeyId, PublicKey, RawVerifier};

/// The two forms of a signature.
pub(super) enum Form {
    /// Of a message; ECDSA in DER: what certificates hold. Authority keys.
    Der(ParsedPublicKey),
    /// Of what [`crate::model::Algorithm::input`] makes of a message; ECDSA as `r ‖ s`. Agents' keys.
    Raw(RawVerifier),
}

/// A key bound to its pinned public key. Its handle is good for one epoch only: after a restart of the module the same number may
/// name another key.
pub(super) struct Bound {
    pub(super) id: KeyId,
    pub(super) public: PublicKey,
    pub(super) form: Form,
    /// Session objects have an owner; `None`: a token object, found by its id.
    pub(super) owned: Option<Owned>,
    location: Mutex<Location>,
    /// What the newest lookup found wrong with the key itself.
    trouble: Mutex<Option<String>>,
    /// One lookup at a time: the rest of a burst waits for its result.
    pub(super) lookup: tokio::sync::Mutex<()>,
}

/// Where a key is, as far as this process knows.
#[derive(Debug, Clone, Copy)]
pub(super) enum Location {
    /// Not looked up yet.
    Unknown,
    /// Found in this epoch.
    At { epoch: u64, handle: ObjectHandle },
    /// Looked up in this epoch, and not there. Not looked up again before the next.
    Lost { epoch: u64 },
}

impl Bound {
    /// A token object whose signatures are those of certificates.
    pub(super) fn new(id: KeyId, public: PublicKey) -> Result<Self, InvalidKey> {
        let verifier = public.verifier().ok_or(InvalidKey::NotOnCurve)?;
        Ok(Self::of(id, public, Form::Der(verifier), None))
    }

    /// An agent's key.
    pub(super) fn agents(id: KeyId, public: PublicKey, owned: Option<Owned>) -> Result<Self, InvalidKey> {
        let verifier = public.raw_verifier().ok_or(InvalidKey::NotOnCurve)?;
        Ok(Self::of(id, public, Form::Raw(verifier), owned))
    }

    fn of(id: KeyId, public: PublicKey, form: Form, owned: Option<Owned>) -> Self {
        let location = Mutex::new(Location::Unknown);
        Self { id, public, form, owned, location, trouble: Mutex::default(), lookup: tokio::sync::Mutex::new(()) }
    }

    pub(super) fn location(&self) -> Location {
        *self.location.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_location(&self, location: Location) {
        *self.location.lock().unwrap_or_else(PoisonError::into_inner) = location;
    }

    pub(super) fn trouble(&self) -> Option<String> {
        self.trouble.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn set_trouble(&self, trouble: Option<String>) {
        *self.trouble.lock().unwrap_or_else(PoisonError::into_inner) = trouble;
    }

    /// Whether `signature` is the pinned key's over `input`.
    pub(super) fn verifies(&self, input: &[u8], signature: &[u8]) -> bool {
        match &self.form {
            Form::Der(key) => key.verify_sig(input, signature).is_ok(),
            Form::Raw(key) => key.verifies(input, signature),
        }
    }

    /// What this key is given to sign so that it signs `message`.
    pub(super) fn input(&self, message: Vec<u8>) -> Vec<u8> {
        match self.form {
            Form::Der(_) => message,
            Form::Raw(_) => self.public.algorithm().input(&message),
        }
    }
}

/// The bound keys of one token that somebody still holds.
#[derive(Default)]
pub(super) struct Keyring {
    keys: Mutex<HashMap<(KeyId, PublicKey), Weak<Bound>>>,
}

impl Keyring {
    fn lock(&self) -> MutexGuard<'_, HashMap<(KeyId, PublicKey), Weak<Bound>>> {
        self.keys.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The key already bound under this id and public key, or the one that `make` makes.
    pub(super) fn bind(
        &self,
        id: KeyId,
        public: PublicKey,
        make: impl FnOnce(KeyId, PublicKey) -> Result<Bound, InvalidKey>,
    ) -> Result<Arc<Bound>, InvalidKey> {
        let mut keys = self.lock();
        let name = (id, public);
        if let Some(bound) = keys.get(&name).and_then(Weak::upgrade) {
            return Ok(bound);
        }
        let bound = Arc::new(make(id, name.1.clone())?);
        // Swept when it would grow: each binding pays a constant share.
        if keys.len() == keys.capacity() {
            keys.retain(|_, key| key.strong_count() > 0);
        }
        keys.insert(name, Arc::downgrade(&bound));
        Ok(bound)
    }

    /// Whether a key in use has this id or this public key.
    pub(super) fn knows(&self, id: KeyId, public: Option<&PublicKey>) -> bool {
        let keys = self.lock();
        keys.iter().any(|((known, key), held)| (*known == id || Some(key) == public) && held.strong_count() > 0)
    }

    pub(super) fn all(&self) -> Vec<Arc<Bound>> {
        self.lock().values().filter_map(Weak::upgrade).collect()
    }
}

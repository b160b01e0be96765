//! Keys that are in use: pinned public key, verifier, and the handle of the current epoch.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};

use aws_lc_rs::signature::ParsedPublicKey;
use cryptoki::object::ObjectHandle;

use crate::model::{InvalidKey, KeyId, PublicKey};

/// A key bound to its pinned public key. Its handle is good for one epoch only: after a restart of the module the same number may
/// name another key.
pub(super) struct Bound {
    pub(super) id: KeyId,
    pub(super) public: PublicKey,
    verifier: ParsedPublicKey,
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
    pub(super) fn new(id: KeyId, public: PublicKey) -> Result<Self, InvalidKey> {
        let verifier = public.verifier().ok_or(InvalidKey::NotOnCurve)?;
        Ok(Self {
            id,
            public,
            verifier,
            location: Mutex::new(Location::Unknown),
            trouble: Mutex::default(),
            lookup: tokio::sync::Mutex::new(()),
        })
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

    /// Whether `signature` is the pinned key's over `message`.
    pub(super) fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        self.verifier.verify_sig(message, signature).is_ok()
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

    /// The key already bound under this id and public key, or a new one.
    pub(super) fn bind(&self, id: KeyId, public: PublicKey) -> Result<Arc<Bound>, InvalidKey> {
        let mut keys = self.lock();
        let name = (id, public);
        if let Some(bound) = keys.get(&name).and_then(Weak::upgrade) {
            return Ok(bound);
        }
        let bound = Arc::new(Bound::new(id, name.1.clone())?);
        // Swept when it would grow: each binding pays a constant share.
        if keys.len() == keys.capacity() {
            keys.retain(|_, key| key.strong_count() > 0);
        }
        keys.insert(name, Arc::downgrade(&bound));
        Ok(bound)
    }

    pub(super) fn all(&self) -> Vec<Arc<Bound>> {
        self.lock().values().filter_map(Weak::upgrade).collect()
    }
}

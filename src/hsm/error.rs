//! What went wrong in the HSM room, as callers and operators hear it. What follows from it is in `faults.rs`.

use std::path::PathBuf;

use cryptoki::context::Function;
use cryptoki::error::{Error as Cryptoki, RvError};

use super::faults::{Class, Condition, Outcome, Place, Verdict, class, name, verdict};
use crate::model::{InvalidKey, KeyId};

/// What went wrong in the HSM room. Never holds a PIN.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The module could not be loaded, or not be started (again).
    #[error("the PKCS#11 module {path} cannot be loaded: {cause}")]
    Module {
        /// As configured.
        path: PathBuf,
        /// Why.
        cause: String,
    },
    /// The process could not be hardened before the module was loaded.
    #[error("the process cannot be kept from dumping core: {0}")]
    Harden(std::io::Error),
    /// No token, or more than one, fits the configured label and serial.
    #[error("{} labelled {label:?}{serial}; the module shows: {found}", if *matches == 0 { "no token is".into() } else { format!("{matches} tokens are") })]
    TokenNotFound {
        /// As configured.
        label: String,
        /// ` with serial "…"`, or empty.
        serial: String,
        /// How many fit.
        matches: usize,
        /// What is there instead.
        found: String,
    },
    /// The PIN source cannot be read, or is not private.
    #[error("the PIN cannot be taken from {from}: {cause}")]
    PinSource {
        /// Where it was to come from.
        from: String,
        /// Why not.
        cause: String,
    },
    /// An earlier login did not succeed, or did not end. No login is tried until an operator says so.
    #[error("an earlier login to token {label:?} failed ({path} is there); check the PIN, then `keyward hsm unlock`")]
    PinPending {
        /// Token label.
        label: String,
        /// The marker file.
        path: PathBuf,
    },
    /// The token refused the PIN. It is not tried again until an operator says so.
    #[error("token {label:?} refused the PIN; correct it, then `keyward hsm unlock`")]
    PinIncorrect {
        /// Token label.
        label: String,
    },
    /// The token itself says that a login would be the last one, or is not possible.
    #[error("token {label:?}: {state}; no login is tried")]
    PinState {
        /// Token label.
        label: String,
        /// What the token's flags say.
        state: &'static str,
    },
    /// The marker file could not be written: without it no login is tried.
    #[error("the marker {path} cannot be written: {cause}")]
    PinMarker {
        /// The file.
        path: PathBuf,
        /// Why not.
        cause: std::io::Error,
    },
    /// A PKCS#11 call failed.
    #[error("{place} answered {}", name(*code))]
    Token {
        /// Which call.
        place: Place,
        /// What it answered.
        code: RvError,
    },
    /// The wrapper around PKCS#11 could not make sense of an answer.
    #[error("{place}: {cause}")]
    Answer {
        /// Which call.
        place: Place,
        /// What is wrong.
        cause: String,
    },
    /// The token has no such key.
    #[error("key {0} is not in the token")]
    KeyLost(KeyId),
    /// The token has none of the keys that it had: it is away, or emptied.
    #[error("the token does not show its keys")]
    KeysLost,
    /// The token has several private keys of that id.
    #[error("key {id} is in the token {count} times")]
    KeyAmbiguous {
        /// CKA_ID.
        id: KeyId,
        /// How many private keys have it.
        count: usize,
    },
    /// The key in the token is not the pinned one.
    #[error("key {0} in the token is not the pinned key")]
    KeyMismatch(KeyId),
    /// An attribute is not what the room promises.
    #[error("key {id}: {attribute} is {found}, wanted {wanted}")]
    Attribute {
        /// CKA_ID.
        id: KeyId,
        /// CKA_…
        attribute: &'static str,
        /// What the token says; `None`: nothing.
        found: String,
        /// What it has to be.
        wanted: bool,
    },
    /// The token's public key is not one that is accepted.
    #[error("the token's public key: {0}")]
    InvalidKey(#[from] InvalidKey),
    /// The token cannot make or use such keys.
    #[error("token {label:?} has no {what}")]
    Incapable {
        /// Token label.
        label: String,
        /// What it lacks.
        what: &'static str,
    },
    /// The signature does not verify against the pinned key. It was thrown away.
    #[error("the token's signature does not verify against the pinned key {0}")]
    Corrupt(KeyId),
    /// The token does not unwrap this blob: it was touched, or wrapped under another key.
    #[error("the token does not unwrap key {id}: it answered {}", name(*code))]
    NotUnwrapped {
        /// CKA_ID.
        id: KeyId,
        /// What C_UnwrapKey answered.
        code: RvError,
    },
    /// The id or the public key is that of a key which is not an agent's.
    #[error("key {0} is not an agent's")]
    NotAgents(KeyId),
    /// Exactly so many bytes are signed by a key of this algorithm.
    #[error("key {id} signs {bytes} bytes, no more and no less")]
    Input {
        /// CKA_ID.
        id: KeyId,
        /// Size of the digest.
        bytes: usize,
    },
    /// As many keys live in sessions as may.
    #[error("{0} keys live in sessions of the token: as many as may")]
    SessionKeysFull(usize),
    /// Not asked for, because an earlier signature of the same batch could not be made.
    #[error("an earlier signature of the batch could not be made")]
    BatchEnded,
    /// As many requests wait as may.
    #[error("the queue to the token is full")]
    QueueFull,
    /// Not done in time.
    #[error("the token did not answer in time")]
    Deadline,
    /// The token is not usable at present.
    #[error("the token is not usable: {0}")]
    Unusable(String),
    /// The token is not usable, and no login is tried until an operator says so.
    #[error("the token is not usable: {0}")]
    Locked(String),
    /// A call hangs inside the module: nothing but a new process helps.
    #[error("a call hangs inside the module; the process has to be restarted")]
    Stuck,
    /// The room is closed.
    #[error("the HSM room is shut down")]
    ShutDown,
    /// The system would not give a thread.
    #[error("no thread for the token: {0}")]
    Thread(std::io::Error),
}

impl Error {
    /// Whether it is a matter of load alone: the token is well, the caller came at a bad moment.
    #[must_use]
    pub fn is_overload(&self) -> bool {
        matches!(self, Self::QueueFull | Self::SessionKeysFull(_)) || self.verdict().outcome == Outcome::Shed
    }

    /// Whether the token can never do what it was asked for: another mechanism, key or token is needed, not another try.
    #[must_use]
    pub fn is_permanent(&self) -> bool {
        match self {
            Self::Token { code, .. } => class(*code) == Class::Permanent,
            Self::Incapable { .. } => true,
            _ => false,
        }
    }

    /// From the wrapper's error of a call other than C_Sign.
    pub(super) fn at(place: Place, error: Cryptoki) -> Self {
        match error {
            Cryptoki::Pkcs11(code, _) => Self::Token { place, code },
            other => Self::Answer { place, cause: other.to_string() },
        }
    }

    /// From the error of the wrapper's `sign`, which tells C_SignInit from C_Sign. What it does not tell is taken as C_Sign.
    pub(super) fn signing(error: Cryptoki) -> Self {
        match error {
            Cryptoki::Pkcs11(code, Function::SignInit) => Self::Token { place: Place::SignInit, code },
            other => Self::at(Place::Sign, other),
        }
    }

    /// What the table says. Errors without a code: those of C_Sign are unknown, the rest is final.
    pub(super) fn verdict(&self) -> Verdict {
        match self {
            Self::Token { place, code } => verdict(*place, *code),
            Self::Answer { place: Place::Sign, .. } | Self::Corrupt(_) => {
                Verdict { outcome: Outcome::Unknown, token: Condition::Suspect, keep_session: false }
            }
            Self::NotUnwrapped { code, .. } => verdict(Place::Unwrap, *code),
            Self::Answer { .. } => Verdict { outcome: Outcome::NotSigned, token: Condition::Suspect, keep_session: false },
            _ => Verdict { outcome: Outcome::NotSigned, token: Condition::Fine, keep_session: true },
        }
    }

    /// Whether the session itself is dead, and with it every object that it made.
    pub(super) fn is_of_the_session(&self) -> bool {
        matches!(self, Self::Token { code, .. } if class(*code) == Class::Session)
    }

    /// Whether it is the key that is missing or wrong, and not the token that cannot be asked.
    pub(super) fn is_of_the_key(&self) -> bool {
        matches!(
            self,
            Self::KeyLost(_)
                | Self::KeyMismatch(_)
                | Self::KeyAmbiguous { .. }
                | Self::Attribute { .. }
                | Self::NotUnwrapped { .. }
        )
    }

    /// The key that the token has not, not once, or not as it was made; it may be another than the one that was asked for.
    #[must_use]
    pub fn key_amiss(&self) -> Option<KeyId> {
        match self {
            Self::KeyLost(id) | Self::KeyAmbiguous { id, .. } | Self::Attribute { id, .. } => Some(*id),
            _ => None,
        }
    }

    /// Whether what the token has of a key is two, or not as it was made: asking again finds the same. Not a signature that does not verify,
    /// nor a refusal to unwrap that may be the token's: those a token gets over.
    #[must_use]
    pub fn is_not_as_recorded(&self) -> bool {
        match self {
            Self::KeyAmbiguous { .. } | Self::Attribute { .. } | Self::NotAgents(_) => true,
            Self::NotUnwrapped { code, .. } => matches!(code, RvError::WrappedKeyInvalid | RvError::WrappedKeyLenRange),
            _ => false,
        }
    }

    /// Whether trying again by itself could cost a PIN try or cannot help: an operator has to act.
    #[must_use]
    pub fn needs_operator(&self) -> bool {
        self.awaits_unlock() || matches!(self, Self::PinState { .. })
    }

    /// Whether no login is tried until `keyward hsm unlock`.
    #[must_use]
    pub fn awaits_unlock(&self) -> bool {
        matches!(self, Self::PinPending { .. } | Self::PinIncorrect { .. } | Self::Locked(_))
    }
}

/// A signature that was not returned.
#[derive(Debug, thiserror::Error)]
pub enum SignError {
    /// Certain that C_Sign was not reached: nothing was signed.
    #[error("not signed: {0}")]
    NotSigned(#[source] Error),
    /// C_Sign was or may have been reached: a signature may exist.
    #[error("may have been signed: {0}")]
    Unknown(#[source] Error),
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wrapper_tells_c_sign_init_from_c_sign() {
        let init = Error::signing(Cryptoki::Pkcs11(RvError::GeneralError, Function::SignInit));
        assert_eq!(init.verdict().outcome, Outcome::Resolve);
        let sign = Error::signing(Cryptoki::Pkcs11(RvError::GeneralError, Function::Sign));
        assert_eq!(sign.verdict().outcome, Outcome::Unknown);
        let unclear = Error::signing(Cryptoki::InvalidValue);
        assert_eq!(unclear.verdict().outcome, Outcome::Unknown);
    }

    #[test]
    fn what_the_token_can_never_do_is_told_from_what_passes() {
        let at_sign_init = |code| Error::Token { place: Place::SignInit, code };
        for code in [RvError::MechanismInvalid, RvError::KeyTypeInconsistent, RvError::UnknownErrorCode(0x203)] {
            assert!(at_sign_init(code).is_permanent() && !at_sign_init(code).is_overload(), "{code:?}");
        }
        for code in [RvError::DeviceError, RvError::GeneralError, RvError::PinIncorrect, RvError::DeviceMemory] {
            assert!(!at_sign_init(code).is_permanent(), "{code:?}");
        }
    }

    #[test]
    fn what_a_token_gets_over_is_not_said_to_be_the_key() {
        let id = KeyId([1; 16]);
        let unwrapped = |code| Error::NotUnwrapped { id, code };
        for error in [Error::KeyAmbiguous { id, count: 2 }, Error::NotAgents(id), unwrapped(RvError::WrappedKeyInvalid)] {
            assert!(error.is_not_as_recorded(), "{error}");
        }
        let passing = [Error::KeyMismatch(id), Error::Corrupt(id), unwrapped(RvError::MechanismInvalid), Error::Deadline];
        assert!(passing.iter().all(|error| !error.is_not_as_recorded()));
    }

    #[test]
    fn a_device_that_is_full_is_overload_until_c_sign_was_reached() {
        let full = |place| Error::Token { place, code: RvError::DeviceMemory };
        assert!(full(Place::SignInit).is_overload() && full(Place::OpenSession).is_overload());
        assert!(!full(Place::Sign).is_overload());
        assert!(!Error::Token { place: Place::SignInit, code: RvError::DeviceError }.is_overload());
    }
}

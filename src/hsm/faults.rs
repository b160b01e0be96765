//! What to do about a CKR code: one table, code → class, and (place, class) → verdict.

use std::path::PathBuf;

use cryptoki::context::Function;
use cryptoki::error::{Error as Cryptoki, RvError};

use crate::model::{InvalidKey, KeyId};

/// Which call failed. A code means another thing after C_Sign than before it: whatever C_Sign answers, the token may have signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// C_Initialize, C_Finalize, C_GetSlotList, C_GetTokenInfo.
    Module,
    /// C_OpenSession.
    OpenSession,
    /// C_Login.
    Login,
    /// C_FindObjects*, C_GetAttributeValue.
    Search,
    /// C_GenerateKeyPair: what it made has to be reconciled by CKA_ID, whatever it answered.
    Generate,
    /// C_DestroyObject.
    Destroy,
    /// C_SignInit: nothing is signed yet.
    SignInit,
    /// C_Sign: something may have been signed.
    Sign,
}

/// What a code says about the world.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Class {
    /// This session is of no more use; another one will do.
    Session,
    /// The handle names nothing (any more).
    Handle,
    /// The token is there, the login is not: a device that restarted, another process that logged out.
    Login,
    /// The token or the library is gone.
    Token,
    /// Anything may be meant. Three in a row without a signature between them: the token is gone.
    Vague,
    /// The device is full or busy.
    Capacity,
    /// The PIN. Never tried again unasked.
    Pin,
    /// This request can never succeed.
    Permanent,
}

/// What follows for the request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// Certain that nothing was signed; one more attempt on a fresh session is allowed.
    Again,
    /// Certain that nothing was signed; one more attempt after the key's handle is looked up anew.
    Resolve,
    /// Certain that nothing was signed; no other attempt.
    NotSigned,
    /// It may have been signed. Never asked again.
    Unknown,
}

/// What follows for the token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Health {
    /// Nothing.
    Fine,
    /// Counted; the third in a row is `Lost`.
    Suspect,
    /// Recovery starts at once, with one login on new sessions.
    LoggedOut,
    /// Recovery starts at once, with the module initialised anew.
    Lost,
}

/// How a token that is out of service comes back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Remedy {
    /// New sessions and one login; the module and the other tokens behind it are left alone.
    LogIn,
    /// C_Finalize and C_Initialize first.
    Restart,
}

/// The whole answer of the table. The session that met the error is closed, except after `Class::Capacity` before C_Sign.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) outcome: Outcome,
    pub(super) token: Health,
    pub(super) keep_session: bool,
}

/// The class of a code. PKCS#11 3.x codes that cryptoki does not know arrive as numbers.
pub(super) fn class(code: RvError) -> Class {
    use RvError as R;
    match code {
        R::SessionHandleInvalid | R::SessionClosed | R::OperationActive | R::OperationNotInitialized | R::SessionReadOnly => {
            Class::Session
        }
        R::ObjectHandleInvalid | R::KeyHandleInvalid => Class::Handle,
        R::DeviceError
        | R::DeviceRemoved
        | R::TokenNotPresent
        | R::TokenNotRecognized
        | R::SlotIdInvalid
        | R::CryptokiNotInitialized => Class::Token,
        R::UserNotLoggedIn => Class::Login,
        R::SessionCount | R::DeviceMemory | R::HostMemory | R::UnknownErrorCode(0x201) => Class::Capacity,
        R::PinIncorrect
        | R::PinInvalid
        | R::PinLenRange
        | R::PinExpired
        | R::PinLocked
        | R::UserPinNotInitialized
        | R::UserAnotherAlreadyLoggedIn => Class::Pin,
        R::ActionProhibited
        | R::AttributeReadOnly
        | R::AttributeSensitive
        | R::AttributeTypeInvalid
        | R::AttributeValueInvalid
        | R::CurveNotSupported
        | R::DataInvalid
        | R::DataLenRange
        | R::DomainParamsInvalid
        | R::FunctionNotSupported
        | R::KeyFunctionNotPermitted
        | R::KeySizeRange
        | R::KeyTypeInconsistent
        | R::MechanismInvalid
        | R::MechanismParamInvalid
        | R::TemplateIncomplete
        | R::TemplateInconsistent
        | R::TokenWriteProtected => Class::Permanent,
        _ => Class::Vague,
    }
}

/// The table.
pub(super) fn verdict(place: Place, code: RvError) -> Verdict {
    let class = class(code);
    let token = match class {
        Class::Token => Health::Lost,
        Class::Login => Health::LoggedOut,
        Class::Vague => Health::Suspect,
        Class::Session | Class::Handle | Class::Capacity | Class::Pin | Class::Permanent => Health::Fine,
    };
    let outcome = match (place, class) {
        (Place::Sign, _) => Outcome::Unknown,
        (_, Class::Handle) => Outcome::Resolve,
        // Some answer so where the handle is dead (Kryoptic: CKR_GENERAL_ERROR).
        (Place::SignInit, Class::Vague) => Outcome::Resolve,
        (_, Class::Session | Class::Vague) => Outcome::Again,
        (_, Class::Login | Class::Token | Class::Capacity | Class::Pin | Class::Permanent) => Outcome::NotSigned,
    };
    Verdict { outcome, token, keep_session: class == Class::Capacity && place != Place::Sign }
}

/// What went wrong in the HSM room. Never holds a PIN.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The module could not be loaded.
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
    #[error("{matches} tokens are labelled {label:?}{serial}; the module shows: {found}")]
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
    #[error("{place:?}: {code:?}")]
    Token {
        /// Which call.
        place: Place,
        /// What it answered.
        code: RvError,
    },
    /// The wrapper around PKCS#11 could not make sense of an answer.
    #[error("{place:?}: {cause}")]
    Answer {
        /// Which call.
        place: Place,
        /// What is wrong.
        cause: String,
    },
    /// The token has no such key.
    #[error("key {0} is not in the token")]
    KeyLost(KeyId),
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
    /// As many requests wait as may.
    #[error("the queue to the token is full")]
    QueueFull,
    /// Not done in time.
    #[error("the token did not answer in time")]
    Deadline,
    /// The token is not usable at present.
    #[error("the token is not usable: {0}")]
    Unusable(String),
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
        matches!(self, Self::QueueFull)
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
                Verdict { outcome: Outcome::Unknown, token: Health::Suspect, keep_session: false }
            }
            Self::Answer { .. } => Verdict { outcome: Outcome::NotSigned, token: Health::Suspect, keep_session: false },
            _ => Verdict { outcome: Outcome::NotSigned, token: Health::Fine, keep_session: true },
        }
    }

    /// Whether it is the key that is missing or wrong, and not the token that cannot be asked.
    pub(super) fn is_of_the_key(&self) -> bool {
        matches!(self, Self::KeyLost(_) | Self::KeyMismatch(_) | Self::KeyAmbiguous { .. } | Self::Attribute { .. })
    }

    /// Whether trying again by itself could cost a PIN try or cannot help: an operator has to act.
    #[must_use]
    pub fn needs_operator(&self) -> bool {
        matches!(self, Self::PinPending { .. } | Self::PinIncorrect { .. } | Self::PinState { .. })
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

    const CODES: &[(RvError, Class)] = &[
        (RvError::SessionHandleInvalid, Class::Session),
        (RvError::SessionClosed, Class::Session),
        (RvError::OperationActive, Class::Session),
        (RvError::OperationNotInitialized, Class::Session),
        (RvError::SessionReadOnly, Class::Session),
        (RvError::ObjectHandleInvalid, Class::Handle),
        (RvError::KeyHandleInvalid, Class::Handle),
        (RvError::DeviceError, Class::Token),
        (RvError::DeviceRemoved, Class::Token),
        (RvError::TokenNotPresent, Class::Token),
        (RvError::TokenNotRecognized, Class::Token),
        (RvError::SlotIdInvalid, Class::Token),
        (RvError::CryptokiNotInitialized, Class::Token),
        (RvError::UserNotLoggedIn, Class::Login),
        (RvError::GeneralError, Class::Vague),
        (RvError::FunctionFailed, Class::Vague),
        (RvError::FunctionCanceled, Class::Vague),
        (RvError::ArgumentsBad, Class::Vague),
        (RvError::VendorDefined(0x8000_0001), Class::Vague),
        (RvError::UnknownErrorCode(0x204), Class::Vague),
        (RvError::SessionCount, Class::Capacity),
        (RvError::DeviceMemory, Class::Capacity),
        (RvError::HostMemory, Class::Capacity),
        (RvError::UnknownErrorCode(0x201), Class::Capacity),
        (RvError::PinIncorrect, Class::Pin),
        (RvError::PinLocked, Class::Pin),
        (RvError::PinExpired, Class::Pin),
        (RvError::PinInvalid, Class::Pin),
        (RvError::PinLenRange, Class::Pin),
        (RvError::UserPinNotInitialized, Class::Pin),
        (RvError::MechanismInvalid, Class::Permanent),
        (RvError::TemplateInconsistent, Class::Permanent),
        (RvError::TemplateIncomplete, Class::Permanent),
        (RvError::AttributeValueInvalid, Class::Permanent),
        (RvError::KeyFunctionNotPermitted, Class::Permanent),
        (RvError::DataLenRange, Class::Permanent),
        (RvError::KeySizeRange, Class::Permanent),
    ];

    #[test]
    fn every_code_has_its_class() {
        for (code, expected) in CODES {
            assert_eq!(class(*code), *expected, "{code:?}");
        }
    }

    #[test]
    fn whatever_c_sign_answers_the_outcome_is_unknown_and_the_session_goes() {
        for (code, _) in CODES {
            let verdict = verdict(Place::Sign, *code);
            assert_eq!(verdict.outcome, Outcome::Unknown, "{code:?}");
            assert!(!verdict.keep_session, "{code:?}");
        }
    }

    #[test]
    fn before_c_sign_a_session_or_vague_error_is_tried_again_and_a_dead_handle_looked_up() {
        for (code, class) in CODES {
            for place in [Place::OpenSession, Place::Search, Place::SignInit] {
                let expected = match class {
                    Class::Vague if place == Place::SignInit => Outcome::Resolve,
                    Class::Session | Class::Vague => Outcome::Again,
                    Class::Handle => Outcome::Resolve,
                    Class::Login | Class::Token | Class::Capacity | Class::Pin | Class::Permanent => Outcome::NotSigned,
                };
                assert_eq!(verdict(place, *code).outcome, expected, "{place:?} {code:?}");
            }
        }
    }

    #[test]
    fn a_lost_login_costs_one_login_and_a_lost_token_a_restart_of_the_module() {
        for (code, class) in CODES {
            let expected = match class {
                Class::Token => Health::Lost,
                Class::Login => Health::LoggedOut,
                Class::Vague => Health::Suspect,
                _ => Health::Fine,
            };
            for place in [Place::SignInit, Place::Sign, Place::Search, Place::Generate, Place::OpenSession] {
                assert_eq!(verdict(place, *code).token, expected, "{place:?} {code:?}");
            }
        }
    }

    #[test]
    fn the_wrapper_tells_c_sign_init_from_c_sign() {
        let init = Error::signing(Cryptoki::Pkcs11(RvError::GeneralError, Function::SignInit));
        assert_eq!(init.verdict().outcome, Outcome::Resolve);
        let sign = Error::signing(Cryptoki::Pkcs11(RvError::GeneralError, Function::Sign));
        assert_eq!(sign.verdict().outcome, Outcome::Unknown);
        let unclear = Error::signing(Cryptoki::InvalidValue);
        assert_eq!(unclear.verdict().outcome, Outcome::Unknown);
    }
}

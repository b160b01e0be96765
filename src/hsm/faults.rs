//! What to do about a CKR code: one table, to be held against PKCS#11 2.40 §5.1 line by line.
//!
//! A row holds the codes that say the same of the world. Its columns are what follows for the request, where it was met before
//! C_SignInit and at C_SignInit, for the session, and for the token. C_Sign has no column: whatever it answers, a signature may exist, so
//! nobody asks again ([`Outcome::Unknown`]) and the session is closed.
//!
//! An owner's session (`owners.rs`) holds keys that nothing else has: it is given up for the codes of the row `Session` alone.
//!
//! Two faults have no code. A call that does not come back: its lane is given up and replaced, and once too many hang only a new process
//! helps ([`super::Error::Stuck`], exit 75). A signature that does not verify: as C_Sign with a vague code, and all handles are looked
//! up anew.

use std::fmt;

use cryptoki::error::RvError;

/// Which call failed. A code means another thing after C_Sign than before it: whatever C_Sign answers, the token may have signed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// C_GetSlotList.
    Slots,
    /// C_GetTokenInfo.
    Describe,
    /// C_GetMechanismList.
    Mechanisms,
    /// C_OpenSession.
    OpenSession,
    /// C_Login.
    Login,
    /// C_FindObjects*, C_GetAttributeValue.
    Search,
    /// C_GenerateKeyPair: what it made has to be reconciled by CKA_ID, whatever it answered.
    Generate,
    /// C_GenerateKey: the same.
    GenerateKey,
    /// C_WrapKey.
    Wrap,
    /// C_UnwrapKey. What is unwrapped comes from a table: a vague answer says nothing of the token.
    Unwrap,
    /// C_DestroyObject.
    Destroy,
    /// C_SignInit: nothing is signed yet.
    SignInit,
    /// C_Sign: something may have been signed.
    Sign,
}

impl fmt::Display for Place {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str(match self {
            Self::Slots => "C_GetSlotList",
            Self::Describe => "C_GetTokenInfo",
            Self::Mechanisms => "C_GetMechanismList",
            Self::OpenSession => "C_OpenSession",
            Self::Login => "C_Login",
            Self::Search => "the search for a key",
            Self::Generate => "C_GenerateKeyPair",
            Self::GenerateKey => "C_GenerateKey",
            Self::Wrap => "C_WrapKey",
            Self::Unwrap => "C_UnwrapKey",
            Self::Destroy => "C_DestroyObject",
            Self::SignInit => "C_SignInit",
            Self::Sign => "C_Sign",
        })
    }
}

/// A code by the name that PKCS#11 gives it, and by its number where cryptoki knows no name: what a vendor's manual can be searched for.
pub(super) fn name(code: RvError) -> String {
    match code {
        RvError::VendorDefined(number) | RvError::UnknownErrorCode(number) => format!("CKR {number:#x}"),
        known => format!("{known:?}").chars().fold("CKR".to_owned(), |mut name, letter| {
            if letter.is_ascii_uppercase() {
                name.push('_');
            }
            name.push(letter.to_ascii_uppercase());
            name
        }),
    }
}

/// What a code says about the world: the name of a row.
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
    /// Retry: certain that nothing was signed; one more attempt on another session is allowed.
    Again,
    /// Retry: certain that nothing was signed; one more attempt after the key's handle is looked up anew.
    Resolve,
    /// Shed: certain that nothing was signed; the token is well, the caller is told to come back.
    Shed,
    /// Refuse: certain that nothing was signed; no other attempt.
    NotSigned,
    /// Never retry: it may have been signed.
    Unknown,
}

/// What follows for the token.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Condition {
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

/// One row of the table.
struct Row {
    class: Class,
    codes: &'static [RvError],
    /// For the request, where the call came before C_SignInit.
    before: Outcome,
    /// For the request, at C_SignInit.
    sign_init: Outcome,
    /// Whether the session that met it is still good.
    keep_session: bool,
    token: Condition,
}

/// CKR_TOKEN_RESOURCE_EXCEEDED of PKCS#11 3.1, of which cryptoki knows the number alone.
const TOKEN_RESOURCE_EXCEEDED: RvError = RvError::UnknownErrorCode(0x201);

/// CKR_KEY_EXHAUSTED of PKCS#11 3.1: a key that may sign so often, and has.
const KEY_EXHAUSTED: RvError = RvError::UnknownErrorCode(0x203);

/// The table.
const TABLE: [Row; 7] = [
    Row {
        class: Class::Session,
        codes: &[
            RvError::SessionHandleInvalid,
            RvError::SessionClosed,
            RvError::SessionReadOnly,
            RvError::OperationActive,
            RvError::OperationNotInitialized,
        ],
        before: Outcome::Again,
        sign_init: Outcome::Again,
        keep_session: false,
        token: Condition::Fine,
    },
    Row {
        class: Class::Handle,
        codes: &[
            RvError::ObjectHandleInvalid,
            RvError::KeyHandleInvalid,
            RvError::WrappingKeyHandleInvalid,
            RvError::UnwrappingKeyHandleInvalid,
        ],
        before: Outcome::Resolve,
        sign_init: Outcome::Resolve,
        keep_session: false,
        token: Condition::Fine,
    },
    Row {
        class: Class::Login,
        codes: &[RvError::UserNotLoggedIn],
        before: Outcome::NotSigned,
        sign_init: Outcome::NotSigned,
        keep_session: false,
        token: Condition::LoggedOut,
    },
    Row {
        class: Class::Token,
        codes: &[
            RvError::DeviceError,
            RvError::DeviceRemoved,
            RvError::TokenNotPresent,
            RvError::TokenNotRecognized,
            RvError::SlotIdInvalid,
            RvError::CryptokiNotInitialized,
        ],
        before: Outcome::NotSigned,
        sign_init: Outcome::NotSigned,
        keep_session: false,
        token: Condition::Lost,
    },
    Row {
        class: Class::Capacity,
        codes: &[RvError::SessionCount, RvError::DeviceMemory, RvError::HostMemory, TOKEN_RESOURCE_EXCEEDED],
        before: Outcome::Shed,
        sign_init: Outcome::Shed,
        keep_session: true,
        token: Condition::Fine,
    },
    Row {
        class: Class::Pin,
        codes: &[
            RvError::PinIncorrect,
            RvError::PinInvalid,
            RvError::PinLenRange,
            RvError::PinExpired,
            RvError::PinLocked,
            RvError::UserPinNotInitialized,
            RvError::UserAnotherAlreadyLoggedIn,
        ],
        before: Outcome::NotSigned,
        sign_init: Outcome::NotSigned,
        keep_session: false,
        token: Condition::Fine,
    },
    Row {
        class: Class::Permanent,
        codes: &[
            RvError::ActionProhibited,
            RvError::AttributeReadOnly,
            RvError::AttributeSensitive,
            RvError::AttributeTypeInvalid,
            RvError::AttributeValueInvalid,
            RvError::CurveNotSupported,
            RvError::DataInvalid,
            RvError::DataLenRange,
            RvError::DomainParamsInvalid,
            RvError::FunctionNotSupported,
            KEY_EXHAUSTED,
            RvError::KeyFunctionNotPermitted,
            RvError::KeyNotWrappable,
            RvError::KeySizeRange,
            RvError::KeyTypeInconsistent,
            RvError::KeyUnextractable,
            RvError::MechanismInvalid,
            RvError::MechanismParamInvalid,
            RvError::TemplateIncomplete,
            RvError::TemplateInconsistent,
            RvError::TokenWriteProtected,
            RvError::UnwrappingKeySizeRange,
            RvError::UnwrappingKeyTypeInconsistent,
            RvError::WrappedKeyInvalid,
            RvError::WrappedKeyLenRange,
            RvError::WrappingKeySizeRange,
            RvError::WrappingKeyTypeInconsistent,
        ],
        before: Outcome::NotSigned,
        sign_init: Outcome::NotSigned,
        keep_session: false,
        token: Condition::Fine,
    },
];

/// The last row: these, and every code that no other row names, a vendor's own among them.
const VAGUE: Row = Row {
    class: Class::Vague,
    codes: &[RvError::GeneralError, RvError::FunctionFailed, RvError::FunctionCanceled, RvError::ArgumentsBad],
    before: Outcome::Again,
    // Some answer so where the handle is dead (Kryoptic: CKR_GENERAL_ERROR).
    sign_init: Outcome::Resolve,
    keep_session: false,
    token: Condition::Suspect,
};

fn row(code: RvError) -> &'static Row {
    TABLE.iter().find(|row| row.codes.contains(&code)).unwrap_or(&VAGUE)
}

/// The row of a code.
pub(super) fn class(code: RvError) -> Class {
    row(code).class
}

/// What follows from a code, by where it was met.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Verdict {
    pub(super) outcome: Outcome,
    pub(super) token: Condition,
    pub(super) keep_session: bool,
}

/// What the table says.
pub(super) fn verdict(place: Place, code: RvError) -> Verdict {
    let row = row(code);
    if place == Place::Unwrap && row.class == Class::Vague {
        // Whoever could write blobs could take the token out of service otherwise, three at a time.
        return Verdict { outcome: Outcome::NotSigned, token: Condition::Fine, keep_session: row.keep_session };
    }
    let outcome = match place {
        Place::Sign => Outcome::Unknown,
        Place::SignInit => row.sign_init,
        Place::Slots
        | Place::Describe
        | Place::Mechanisms
        | Place::OpenSession
        | Place::Login
        | Place::Search
        | Place::Generate
        | Place::GenerateKey
        | Place::Wrap
        | Place::Unwrap
        | Place::Destroy => row.before,
    };
    Verdict { outcome, token: row.token, keep_session: row.keep_session && place != Place::Sign }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PLACES: [Place; 13] = [
        Place::Slots,
        Place::Describe,
        Place::Mechanisms,
        Place::OpenSession,
        Place::Login,
        Place::Search,
        Place::Generate,
        Place::GenerateKey,
        Place::Wrap,
        Place::Unwrap,
        Place::Destroy,
        Place::SignInit,
        Place::Sign,
    ];

    fn codes() -> impl Iterator<Item = RvError> {
        TABLE.iter().chain([&VAGUE]).flat_map(|row| row.codes).copied()
    }

    #[test]
    fn no_code_is_in_two_rows() {
        for code in codes() {
            assert_eq!(codes().filter(|other| *other == code).count(), 1, "{code:?}");
        }
    }

    #[test]
    fn a_code_that_no_row_names_may_mean_anything() {
        for code in [RvError::VendorDefined(0x8000_0001), RvError::UnknownErrorCode(0x204), RvError::MutexBad] {
            assert_eq!(class(code), Class::Vague, "{code:?}");
        }
    }

    #[test]
    fn whatever_c_sign_answers_the_outcome_is_unknown_and_the_session_goes() {
        for code in codes() {
            let verdict = verdict(Place::Sign, code);
            assert_eq!(verdict.outcome, Outcome::Unknown, "{code:?}");
            assert!(!verdict.keep_session, "{code:?}");
        }
    }

    #[test]
    fn nothing_is_tried_again_on_a_token_that_is_gone_or_asks_for_a_pin_or_can_never_do_it() {
        let hopeless = [Class::Login, Class::Token, Class::Pin, Class::Permanent];
        for code in codes().filter(|code| hopeless.contains(&class(*code))) {
            for place in PLACES.into_iter().filter(|place| *place != Place::Sign) {
                assert_eq!(verdict(place, code).outcome, Outcome::NotSigned, "{place:?} {code:?}");
            }
        }
    }

    #[test]
    fn a_lost_login_costs_one_login_and_a_lost_token_a_restart_of_the_module_wherever_it_was_met() {
        for code in codes() {
            let expected = match class(code) {
                Class::Token => Condition::Lost,
                Class::Login => Condition::LoggedOut,
                Class::Vague => Condition::Suspect,
                Class::Session | Class::Handle | Class::Capacity | Class::Pin | Class::Permanent => Condition::Fine,
            };
            for place in PLACES.into_iter().filter(|place| *place != Place::Unwrap) {
                assert_eq!(verdict(place, code).token, expected, "{place:?} {code:?}");
            }
            let of_a_blob = if class(code) == Class::Vague { Condition::Fine } else { expected };
            assert_eq!(verdict(Place::Unwrap, code).token, of_a_blob, "{code:?}");
        }
    }

    #[test]
    fn a_blob_that_is_not_unwrapped_is_not_tried_again_unless_a_handle_or_a_session_was_dead() {
        for code in codes() {
            let expected = match class(code) {
                Class::Session => Outcome::Again,
                Class::Handle => Outcome::Resolve,
                Class::Capacity => Outcome::Shed,
                Class::Login | Class::Token | Class::Vague | Class::Pin | Class::Permanent => Outcome::NotSigned,
            };
            assert_eq!(verdict(Place::Unwrap, code).outcome, expected, "{code:?}");
        }
    }

    #[test]
    fn a_code_is_told_by_the_name_that_pkcs11_gives_it() {
        assert_eq!(name(RvError::DeviceError), "CKR_DEVICE_ERROR");
        assert_eq!(name(RvError::SlotIdInvalid), "CKR_SLOT_ID_INVALID");
        assert_eq!(name(RvError::UnknownErrorCode(0x201)), "CKR 0x201");
        assert_eq!(name(RvError::VendorDefined(0x8000_0001)), "CKR 0x80000001");
    }
}

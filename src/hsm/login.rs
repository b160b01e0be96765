//! The login: one C_Login for a connection, and none that could cost a second PIN try.

use std::sync::atomic::{AtomicBool, Ordering};

use cryptoki::context::Pkcs11;
use cryptoki::error::{Error as Cryptoki, RvError};
use cryptoki::session::{Session, SessionState, UserType};
use cryptoki::slot::{Slot, TokenInfo};

use super::Settings;
use super::error::Error;
use super::faults::{Class, Place, class};
use super::pin::{Marker, Pin};
use crate::config;
use crate::proto::TokenRole;

/// A token's PIN and its `pin-pending` marker.
pub(super) struct Login {
    label: String,
    role: TokenRole,
    pin: Pin,
    marker: Marker,
    /// The newest login failed without a word about the PIN, and what the token has counted is not known.
    unclear: AtomicBool,
}

impl Login {
    pub(super) fn new(settings: &Settings) -> Self {
        Self {
            label: settings.token.label.clone(),
            role: settings.role,
            pin: Pin::new(settings.token.pin.clone()),
            marker: Marker::new(&settings.state, settings.role),
            unclear: AtomicBool::new(false),
        }
    }

    /// Whether no login is tried until an operator says so.
    pub(super) fn is_pending(&self) -> bool {
        self.marker.is_set()
    }

    /// The same as an error.
    pub(super) fn check_not_pending(&self) -> Result<(), Error> {
        if self.is_pending() { Err(self.pending()) } else { Ok(()) }
    }

    fn pending(&self) -> Error {
        Error::PinPending { label: self.label.clone(), path: self.marker.path().into() }
    }

    /// Told at once, and once for each try: from here on everything waits for an operator.
    fn refused(&self, error: Error) -> Error {
        tracing::error!(token = %self.label, section = config::section(self.role), %error,
            "the login failed and a PIN try is spent; no other is made until the PIN is corrected and `keyward hsm unlock` called");
        error
    }

    fn mark(&self, info: &TokenInfo) -> Result<(), Error> {
        self.marker.set(info.label(), info.serial_number()).map_err(|cause| match cause.kind() {
            std::io::ErrorKind::AlreadyExists => self.pending(),
            _ => Error::PinMarker { path: self.marker.path().into(), cause },
        })
    }

    /// One C_Login, and none at all while an earlier one has not succeeded or the token warns.
    pub(super) fn log_in(&self, context: &Pkcs11, anchor: &Session, slot: Slot, info: &TokenInfo) -> Result<(), Error> {
        let logged_in = anchor.get_session_info().map_err(|error| Error::at(Place::OpenSession, error))?;
        if matches!(logged_in.session_state(), SessionState::RoUser | SessionState::RwUser) {
            return Ok(());
        }
        self.check_not_pending()?;
        let flags = [
            (!info.user_pin_initialized(), "the user PIN is not initialised"),
            (info.user_pin_locked(), "the user PIN is locked"),
            (info.user_pin_final_try(), "one more wrong PIN would lock it"),
            (info.user_pin_to_be_changed(), "the user PIN has to be changed first"),
        ];
        if let Some((_, state)) = flags.iter().find(|(set, _)| *set) {
            return Err(Error::PinState { label: self.label.clone(), state });
        }
        if self.unclear.load(Ordering::Acquire) && info.user_pin_count_low() {
            self.mark(info)?;
            return Err(self.pending());
        }
        let pin = self.pin.read()?;
        self.mark(info)?;
        // A crash from here on leaves the marker: the try may have been counted.
        let answer = anchor.login_with_raw(UserType::User, &pin);
        drop(pin);
        let judged = match answer {
            Ok(()) | Err(Cryptoki::Pkcs11(RvError::UserAlreadyLoggedIn, _)) => Ok(()),
            Err(Cryptoki::Pkcs11(RvError::PinIncorrect, _)) => {
                return Err(self.refused(Error::PinIncorrect { label: self.label.clone() }));
            }
            Err(Cryptoki::Pkcs11(code, _)) if class(code) == Class::Pin => {
                return Err(self.refused(Error::Token { place: Place::Login, code }));
            }
            // Not a word about the PIN. But an answer gets lost, and some modules have no better one: a try that was counted is not
            // repeated. A token that cannot be asked now is asked before the next login.
            Err(other) => match context.get_token_info(slot) {
                Ok(now) if now.user_pin_count_low() || now.user_pin_final_try() || now.user_pin_locked() => {
                    return Err(self.refused(Error::at(Place::Login, other)));
                }
                asked => {
                    self.unclear.store(asked.is_err(), Ordering::Release);
                    Err(Error::at(Place::Login, other))
                }
            },
        };
        if judged.is_ok() {
            self.unclear.store(false, Ordering::Release);
        }
        self.marker.clear().map_err(|cause| Error::PinMarker { path: self.marker.path().into(), cause })?;
        judged
    }
}

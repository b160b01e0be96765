//! Why a command ends without success, and with which code.

use std::fmt;
use std::io;
use std::process::ExitCode;

use crate::client::{self, Refused};
use crate::model::Reason;

/// An error that has no code of its own.
const EXIT_ERROR: u8 = 1;
/// Wrong usage; clap's code for it as well.
const EXIT_USAGE: u8 = 2;
/// The daemon refused.
pub const EXIT_REFUSED: u8 = 3;
/// What was named is not there.
pub const EXIT_NOT_FOUND: u8 = 4;
/// Daemon, token or ledger cannot be reached, or cannot answer now.
pub const EXIT_UNAVAILABLE: u8 = 5;
/// What was to be verified is not what it claims to be.
pub const EXIT_VERIFICATION_FAILED: u8 = 6;

/// A message for standard error and an exit code.
#[derive(Debug)]
pub struct Failure {
    code: u8,
    message: String,
}

impl Failure {
    /// With `code`.
    pub fn new(code: u8, message: impl Into<String>) -> Self {
        Self { code, message: message.into() }
    }

    /// An error without a code of its own: 1.
    pub fn error(message: impl Into<String>) -> Self {
        Self::new(EXIT_ERROR, message)
    }

    /// Wrong usage: 2.
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(EXIT_USAGE, message)
    }

    /// With what followed from it.
    #[must_use]
    pub fn and_then_said(mut self, consequence: &str) -> Self {
        self.message = format!("{}; {consequence}", self.message);
        self
    }

    /// With another code.
    #[must_use]
    pub fn with_code(mut self, code: u8) -> Self {
        self.code = code;
        self
    }

    /// The code.
    #[must_use]
    pub fn exit_code(&self) -> ExitCode {
        ExitCode::from(self.code)
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "keyward: {}", self.message)
    }
}

impl From<client::Error> for Failure {
    fn from(error: client::Error) -> Self {
        let code = match &error {
            client::Error::Refused(refused) => code_of(refused),
            client::Error::Unreachable { .. } => EXIT_UNAVAILABLE,
            client::Error::Rejected { .. } => EXIT_REFUSED,
            client::Error::Untrusted { .. } => EXIT_VERIFICATION_FAILED,
            client::Error::Store(client::StoreError::Empty { .. }) => EXIT_NOT_FOUND,
            _ => EXIT_ERROR,
        };
        Self::new(code, error.to_string())
    }
}

impl From<client::StoreError> for Failure {
    fn from(error: client::StoreError) -> Self {
        client::Error::from(error).into()
    }
}

impl From<client::JoinFileError> for Failure {
    fn from(error: client::JoinFileError) -> Self {
        client::Error::from(error).into()
    }
}

impl From<io::Error> for Failure {
    fn from(error: io::Error) -> Self {
        // `keyward … | head` is no failure worth a message, yet the work is not all done.
        Self::error(if error.kind() == io::ErrorKind::BrokenPipe { "the reader went away".into() } else { error.to_string() })
    }
}

fn code_of(refused: &Refused) -> u8 {
    match refused.reason {
        Reason::NotFound | Reason::AgentUnknown | Reason::KeyNotFound => EXIT_NOT_FOUND,
        Reason::HsmUnavailable
        | Reason::HsmRefused
        | Reason::LedgerUnavailable
        | Reason::EnforcedNotDurable
        | Reason::ClockUntrusted
        | Reason::Overloaded
        | Reason::Draining
        | Reason::WatchesTaken
        | Reason::SignatureUnknown => EXIT_UNAVAILABLE,
        Reason::SignatureInvalid
        | Reason::AlgorithmRefused
        | Reason::KidUnknown
        | Reason::AudienceMismatch
        | Reason::OutsideTimeWindow
        | Reason::MessageExpired
        | Reason::Replayed
        | Reason::BindingMismatch => EXIT_VERIFICATION_FAILED,
        Reason::Internal | Reason::KeyNotAsRecorded => EXIT_ERROR,
        _ => EXIT_REFUSED,
    }
}

//! What a call can end in besides an answer.

use std::error::Error as StdError;
use std::fmt;
use std::time::Duration;

use rustls::AlertDescription;
use tonic::{Code, Status};
use tonic_types::StatusExt;

use super::{JoinFileError, StoreError};
use crate::model::{Reason, UnixTime};

/// The domain of our google.rpc.ErrorInfo.
const DOMAIN: &str = "keyward";
/// The ErrorInfo metadata key that names the ledger entry.
const LEDGER_INDEX: &str = "ledger_index";

/// The daemon said no, and why.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refused {
    /// The stable code; `REASON_UNSPECIFIED` for one that this client is too old to know.
    pub reason: Reason,
    /// The code as it was sent.
    pub code: String,
    /// What to do about it.
    pub advice: String,
    /// When to come back, where coming back helps.
    pub retry_after: Option<Duration>,
    /// The index of the ledger entry that tells of it.
    pub entry: Option<u64>,
}

impl Refused {
    /// Decodes google.rpc.ErrorInfo and RetryInfo; none for a status that is not a refusal of keyward.
    #[must_use]
    pub fn of(status: &Status) -> Option<Self> {
        let details = status.get_error_details();
        let info = details.error_info().filter(|info| info.domain == DOMAIN)?;
        Some(Self {
            reason: Reason::from_str_name(&info.reason).unwrap_or(Reason::Unspecified),
            code: info.reason.clone(),
            advice: status.message().to_owned(),
            retry_after: details.retry_info().and_then(|retry| retry.retry_delay),
            entry: info.metadata.get(LEDGER_INDEX).and_then(|index| index.parse().ok()),
        })
    }

    /// Whether the same request may be granted later without the agent doing anything. What an operator has to mend at the daemon is
    /// no reason to end an agent whose certificate is good.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        matches!(
            self.reason,
            Reason::HsmUnavailable
                | Reason::HsmRefused
                | Reason::LedgerUnavailable
                | Reason::EnforcedNotDurable
                | Reason::ClockUntrusted
                | Reason::Overloaded
                | Reason::Draining
                | Reason::SignatureUnknown
                | Reason::RateLimited
                | Reason::WatchesTaken
                | Reason::RequestInProgress
                | Reason::ChallengeExpired
                | Reason::AuthoritySuperseded
                | Reason::AuthorityExpired
                | Reason::Internal
        )
    }

    /// Whether the daemon refused the request for what is in it, so that it will never be accepted and another may be made
    /// in its place. False wherever an earlier sending of the same bytes may have been accepted: another key under the same
    /// sequence would look like a clone.
    #[must_use]
    pub fn is_of_the_request(&self) -> bool {
        matches!(
            self.reason,
            Reason::MalformedRequest
                | Reason::RequestTooLarge
                | Reason::CsrMalformed
                | Reason::CsrSignatureInvalid
                | Reason::KeyUnsupported
                | Reason::WishBeyondGrant
                | Reason::KeyInUse
        )
    }
}

impl fmt::Display for Refused {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "refused: {}", self.code)?;
        // A server may repeat its code at the head of the message; it is told once.
        let advice =
            self.advice.strip_prefix(&self.code).map_or(self.advice.as_str(), |rest| rest.trim_start_matches([':', ' ']));
        if !advice.is_empty() {
            write!(f, ": {advice}")?;
        }
        if let Some(entry) = self.entry {
            write!(f, " (ledger entry {entry})")?;
        }
        Ok(())
    }
}

impl StdError for Refused {}

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The daemon refused.
    #[error(transparent)]
    Refused(#[from] Refused),
    /// No connection, or it broke, or it was too slow.
    #[error("cannot reach keyward at {place}: {cause}")]
    Unreachable {
        /// Address or socket.
        place: String,
        /// What went wrong.
        cause: String,
    },
    /// Somebody answered who is not the keyward of this trust domain.
    #[error("{place} is not the keyward that is trusted here: {cause}")]
    Untrusted {
        /// Address.
        place: String,
        /// What TLS said.
        cause: String,
    },
    /// The keyward of this trust domain does not take our certificate: the authority that signed it is not trusted any more.
    #[error("keyward at {place} does not take this certificate: {cause}")]
    Rejected {
        /// Address.
        place: String,
        /// What TLS said.
        cause: String,
    },
    /// The daemon answered against the protocol.
    #[error("keyward answered against its protocol: {0}")]
    Answer(String),
    /// The agent's directory.
    #[error(transparent)]
    Store(#[from] StoreError),
    /// The join file.
    #[error(transparent)]
    Join(#[from] JoinFileError),
    /// The join file is past its time.
    #[error("the join file expired at {0}; ask the operator for another")]
    JoinExpired(UnixTime),
    /// A key or a request could not be made or used.
    #[error("cannot make the request: {0}")]
    Crypto(String),
}

impl Error {
    /// Sorts a status: a refusal of keyward, a broken connection, or neither.
    #[must_use]
    pub fn of_status(status: &Status, place: &str) -> Self {
        if let Some(refused) = Refused::of(status) {
            return Self::Refused(refused);
        }
        let broken = matches!(status.code(), Code::Unavailable | Code::DeadlineExceeded | Code::Cancelled);
        if broken || status.source().is_some() {
            // A channel that has lost its connection makes another one.
            if let Some(verdict) = status.source().and_then(rustls_error) {
                return Self::of_tls(verdict, place);
            }
            let cause = status.source().map_or_else(|| status.message().to_owned(), chain);
            return Self::Unreachable { place: place.to_owned(), cause };
        }
        Self::Answer(format!("{}: {}", status.code(), status.message()))
    }

    /// Sorts a failed connection: TLS saying no is not the same as nobody being there.
    #[must_use]
    pub fn of_connection(error: &(dyn StdError + 'static), place: &str) -> Self {
        match rustls_error(error) {
            Some(verdict) => Self::of_tls(verdict, place),
            // tonic's own "transport error" says nothing.
            None => Self::Unreachable { place: place.to_owned(), cause: chain(error.source().unwrap_or(error)) },
        }
    }

    /// Who said no to whom: we to the server, or it to us, and whether for our certificate (RFC 8446 §6.2).
    pub(super) fn of_tls(verdict: &rustls::Error, place: &str) -> Self {
        let (place, cause) = (place.to_owned(), verdict.to_string());
        match verdict {
            rustls::Error::AlertReceived(
                // Another key under the name of its issuer makes a signature that does not verify.
                AlertDescription::DecryptError
                | AlertDescription::BadCertificate
                | AlertDescription::UnsupportedCertificate
                | AlertDescription::CertificateRevoked
                | AlertDescription::CertificateExpired
                | AlertDescription::CertificateUnknown
                | AlertDescription::UnknownCA
                | AlertDescription::CertificateRequired,
            ) => Self::Rejected { place, cause },
            // Its own trouble, told by whoever is there: no verdict on anybody.
            rustls::Error::AlertReceived(_) => Self::Unreachable { place, cause },
            _ => Self::Untrusted { place, cause },
        }
    }

    /// Whether asking again later may help without anybody doing anything.
    #[must_use]
    pub fn is_passing(&self) -> bool {
        match self {
            Self::Refused(refused) => refused.is_passing(),
            Self::Unreachable { .. } | Self::Store(StoreError::Busy { .. }) => true,
            _ => false,
        }
    }

    /// Whether it is our certificate that does not count: the bound key may still do.
    #[must_use]
    pub fn is_of_the_certificate(&self) -> bool {
        match self {
            Self::Rejected { .. } => true,
            Self::Refused(refused) => refused.reason == Reason::Unauthenticated,
            _ => false,
        }
    }

    /// The refusal, if it is one.
    #[must_use]
    pub fn refused(&self) -> Option<&Refused> {
        match self {
            Self::Refused(refused) => Some(refused),
            _ => None,
        }
    }
}

/// An error and what is behind it, in one line; a link that says nothing new is left out.
fn chain(error: &(dyn StdError + 'static)) -> String {
    let mut text = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let told = cause.to_string();
        if !text.contains(&told) {
            text = format!("{text}: {told}");
        }
        next = cause.source();
    }
    text
}

/// The verdict of TLS within `error`, if that is what it is. An `io::Error` hides its payload from `source`.
pub(super) fn rustls_error<'e>(error: &'e (dyn StdError + 'static)) -> Option<&'e rustls::Error> {
    let mut next = Some(error);
    while let Some(error) = next {
        if let Some(verdict) = error.downcast_ref::<rustls::Error>() {
            return Some(verdict);
        }
        let payload = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref);
        next = payload.map(|payload| payload as &(dyn StdError + 'static)).or_else(|| error.source());
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashMap;
    use tonic_types::ErrorDetails;

    #[test]
    fn a_refusal_is_decoded_whole() {
        let mut details = ErrorDetails::with_error_info(
            "AGENT_QUARANTINED",
            DOMAIN,
            HashMap::from([(LEDGER_INDEX.to_owned(), "42".to_owned())]),
        );
        details.set_retry_info(Some(Duration::from_secs(3)));
        let status = Status::with_error_details(Code::PermissionDenied, "ask the operator", details);
        let Error::Refused(refused) = Error::of_status(&status, "here") else { panic!("a refusal") };
        assert_eq!(refused.reason, Reason::AgentQuarantined);
        assert_eq!((refused.retry_after, refused.entry), (Some(Duration::from_secs(3)), Some(42)));
        assert_eq!(refused.to_string(), "refused: AGENT_QUARANTINED: ask the operator (ledger entry 42)");
    }

    #[test]
    fn a_code_newer_than_this_client_is_kept_as_text() {
        let details = ErrorDetails::with_error_info("FROM_THE_FUTURE", DOMAIN, HashMap::new());
        let refused = Refused::of(&Status::with_error_details(Code::Aborted, "wait", details)).expect("a refusal");
        assert_eq!((refused.reason, refused.code.as_str()), (Reason::Unspecified, "FROM_THE_FUTURE"));
    }

    /// As it comes from a connection: within an `io::Error`, within what the transport makes of that.
    fn said(verdict: rustls::Error) -> std::io::Error {
        std::io::Error::other(std::io::Error::new(std::io::ErrorKind::InvalidData, verdict))
    }

    #[test]
    fn a_rejected_certificate_is_known_by_the_alert_and_not_by_its_text() {
        for alert in [AlertDescription::UnknownCA, AlertDescription::CertificateExpired, AlertDescription::BadCertificate] {
            let error = said(rustls::Error::AlertReceived(alert));
            assert!(matches!(Error::of_connection(&error, "here"), Error::Rejected { .. }), "{alert:?}");
            assert!(Error::of_status(&Status::from_error(Box::new(error)), "here").is_of_the_certificate(), "{alert:?}");
        }
        // Trouble of the server's own says nothing about anybody's certificate.
        for alert in [AlertDescription::InternalError, AlertDescription::HandshakeFailure, AlertDescription::AccessDenied] {
            let error = Error::of_connection(&said(rustls::Error::AlertReceived(alert)), "here");
            assert!(matches!(error, Error::Unreachable { .. }), "{alert:?}");
        }
        let ours = rustls::Error::InvalidCertificate(rustls::CertificateError::UnknownIssuer);
        assert!(matches!(Error::of_connection(&said(ours), "here"), Error::Untrusted { .. }));
        // Words prove nothing.
        let status = Status::unavailable("received fatal alert: UnknownCA");
        assert!(matches!(Error::of_status(&status, "here"), Error::Unreachable { .. }));
    }

    #[test]
    fn somebody_elses_error_is_not_a_refusal() {
        let details = ErrorDetails::with_error_info("AGENT_QUARANTINED", "example.com", HashMap::new());
        assert!(Refused::of(&Status::with_error_details(Code::Aborted, "", details)).is_none());
        assert!(matches!(Error::of_status(&Status::unavailable("gone"), "here"), Error::Unreachable { .. }));
        assert!(matches!(Error::of_status(&Status::unimplemented("what"), "here"), Error::Answer(_)));
    }
}

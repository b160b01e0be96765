//! A refusal as a gRPC status: code, ErrorInfo (domain `keyward`), RetryInfo. Only here.

use std::collections::HashMap;

use tonic::{Code, Status};
use tonic_types::{ErrorDetails, StatusExt as _};

use crate::model::{Reason, Refusal};

/// The status that a caller sees. The log has the chain.
#[must_use]
pub fn status_of(refusal: &Refusal) -> Status {
    let code = code_of(refusal.reason);
    if code == Code::Internal {
        tracing::error!(?refusal, "internal error");
    }
    let mut metadata = HashMap::new();
    if let Some(entry) = refusal.entry {
        metadata.insert("ledger_index".to_owned(), entry.to_string());
    }
    let mut details = ErrorDetails::with_error_info(refusal.reason.as_str_name(), "keyward", metadata);
    if let Some(wait) = refusal.retry_after {
        details.set_retry_info(Some(wait));
    }
    Status::with_error_details(code, refusal.advice.clone(), details)
}

/// Every transient condition is UNAVAILABLE or RESOURCE_EXHAUSTED: clients give up on INVALID_ARGUMENT for good.
fn code_of(reason: Reason) -> Code {
    match reason {
        Reason::MalformedRequest
        | Reason::RequestTooLarge
        | Reason::CsrMalformed
        | Reason::CsrSignatureInvalid
        | Reason::KeyUnsupported
        | Reason::WishBeyondGrant
        | Reason::IdempotencyMismatch
        | Reason::KeyInUse
        | Reason::AlgorithmUnsupported
        | Reason::AlgorithmRefused
        | Reason::ProfileMismatch
        | Reason::DigestLengthInvalid
        | Reason::CertificateUnfit => Code::InvalidArgument,
        Reason::Unauthenticated | Reason::TokenUnknown | Reason::ProofInvalid | Reason::ChallengeExpired => Code::Unauthenticated,
        Reason::CallerNotAllowed
        | Reason::TokenExpired
        | Reason::TokenSpent
        | Reason::AgentUnknown
        | Reason::AgentQuarantined
        | Reason::EpochStale
        | Reason::CloneSuspected
        | Reason::RejoinExpired
        | Reason::DeniedMeanwhile
        | Reason::SignatureInvalid
        | Reason::KidUnknown
        | Reason::AudienceMismatch
        | Reason::MessageExpired
        | Reason::Replayed
        | Reason::BindingMismatch => Code::PermissionDenied,
        Reason::SequenceAhead
        | Reason::NotQuarantined
        | Reason::HsmRefused
        | Reason::OutsideTimeWindow
        | Reason::KeyDisabled
        | Reason::KeyDestroyed
        | Reason::KeyExpired
        | Reason::KeyLost
        | Reason::RotationPaused
        | Reason::RotationUnderWay
        | Reason::NoSuchAuthorityHere => Code::FailedPrecondition,
        Reason::AgentExists | Reason::KeyExists => Code::AlreadyExists,
        Reason::NotFound | Reason::KeyNotFound | Reason::AuthorityUnknown => Code::NotFound,
        Reason::RateLimited | Reason::Overloaded | Reason::WatchesTaken | Reason::KeyBudgetSpent | Reason::KeysTooMany => {
            Code::ResourceExhausted
        }
        Reason::RequestInProgress
        | Reason::HsmUnavailable
        | Reason::LedgerUnavailable
        | Reason::EnforcedNotDurable
        | Reason::ClockUntrusted
        | Reason::Draining
        | Reason::AuthoritySuperseded
        | Reason::AuthorityExpired
        | Reason::SignatureUnknown => Code::Unavailable,
        Reason::KeyNotAsRecorded => Code::DataLoss,
        Reason::Internal | Reason::Unspecified => Code::Internal,
    }
}

//! A refusal: two faces of one error.

use std::error::Error;
use std::fmt;
use std::time::Duration;

use super::Reason;

/// Why a call is refused. The caller is told the reason code and one sentence on what to do; the log gets the whole chain.
pub struct Refusal {
    /// The stable code.
    pub reason: Reason,
    /// One sentence for the caller: what to do. Never holds a secret, nor what another caller did.
    pub advice: String,
    /// When to come back, where coming back helps.
    pub retry_after: Option<Duration>,
    /// The ledger entry that tells of it, if there is one.
    pub entry: Option<u64>,
    cause: Option<Box<dyn Error + Send + Sync>>,
}

impl Refusal {
    /// When whoever is turned away for what passes by itself, a full queue or a token that recovers, may ask again.
    pub const SOON: Duration = Duration::from_millis(500);

    /// A refusal with its advice.
    pub fn new(reason: Reason, advice: impl Into<String>) -> Self {
        Self { reason, advice: advice.into(), retry_after: None, entry: None, cause: None }
    }

    /// An error of the daemon itself. The caller learns nothing but that.
    pub fn internal(cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        Self::new(Reason::Internal, "the daemon failed; its log has the cause").because(cause)
    }

    /// With the error behind it, for the log.
    #[must_use]
    pub fn because(mut self, cause: impl Into<Box<dyn Error + Send + Sync>>) -> Self {
        self.cause = Some(cause.into());
        self
    }

    /// With the time after which asking again makes sense.
    #[must_use]
    pub fn retry_after(mut self, wait: Duration) -> Self {
        self.retry_after = Some(wait);
        self
    }

    /// With the index of the ledger entry that tells of it.
    #[must_use]
    pub fn recorded_at(mut self, index: u64) -> Self {
        self.entry = Some(index);
        self
    }
}

impl fmt::Display for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.reason.as_str_name(), self.advice)
    }
}

impl fmt::Debug for Refusal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")?;
        let mut source = self.source();
        while let Some(cause) = source {
            write!(f, " <- {cause}")?;
            source = cause.source();
        }
        Ok(())
    }
}

impl Error for Refusal {
    fn source(&self) -> Option<&(dyn Error + 'static)> {
        self.cause.as_deref().map(|cause| cause as _)
    }
}

//! What was accepted, for as long as it could be accepted again.

/// later
pub struct ReplayCache;

//! A local peer, as the kernel knows it (SO_PEERCRED, taken when it connected).

use crate::config;
use crate::proto;

/// The uid that stands for "nobody we can name" (user namespaces map unknown users to it).
const OVERFLOW_ID: u32 = 65534;

/// An operator: made only from a peer that the configuration admits.
#[derive(Debug, Clone, Copy)]
pub struct Operator {
    uid: u32,
}

/// A local peer that is no operator.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error("uid {uid} (gid {gid}) is not an operator: add it to [operator] in the configuration")]
pub struct OperatorRefused {
    /// Its user id.
    pub uid: u32,
    /// Its primary group id.
    pub gid: u32,
}

impl Operator {
    /// The daemon's own user and root are operators; others as configured; the overflow ids never.
    ///
    /// # Errors
    /// For everybody else.
    pub fn admit(uid: u32, gid: u32, config: &config::Operator) -> Result<Self, OperatorRefused> {
        let own = rustix::process::geteuid().as_raw();
        let listed = config.uids.contains(&uid) || (config.gids.contains(&gid) && gid != OVERFLOW_ID);
        if uid != OVERFLOW_ID && (uid == 0 || uid == own || listed) {
            return Ok(Self { uid });
        }
        Err(OperatorRefused { uid, gid })
    }

    /// How the ledger names it, with its reason cut to 256 characters.
    #[must_use]
    pub fn signs(&self, reason: &str) -> proto::Operator {
        proto::Operator { uid: self.uid, reason: reason.chars().take(256).collect() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_overflow_user_is_never_an_operator() {
        let config = config::Operator { uids: vec![65534, 7], gids: vec![65534, 8] };
        assert!(Operator::admit(65534, 8, &config).is_err());
        assert!(Operator::admit(5, 65534, &config).is_err());
        assert!(Operator::admit(7, 1, &config).is_ok());
        assert!(Operator::admit(5, 8, &config).is_ok());
        assert!(Operator::admit(5, 9, &config).is_err());
        assert!(Operator::admit(0, 0, &config).is_ok());
    }
}

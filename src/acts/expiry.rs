//! Whether the authority that signs lasts: nothing under it is good for longer, and of an outside root only an operator has the next one.

use crate::proto::{AuthorityState as State, Purpose};

use super::{Acts, due};

impl Acts {
    /// Why agents are about to hear `AUTHORITY_EXPIRED`, and what to do: the certificate of the active issuing authority, or of its root, has
    /// ended, or ends sooner than a certificate under it would. Nothing before the token was there.
    #[must_use]
    pub fn authority_ends(&self) -> Option<String> {
        let (now, (_, end)) = (self.clock().reckoned(), self.authorities().ok()?.in_force()?);
        let what = match () {
            () if end <= now => format!("ended at {end}"),
            () if end <= now.plus_seconds(self.ttl_seconds_longest().into()) => {
                format!("ends at {end}, sooner than the longest certificate under it")
            }
            () => return None,
        };
        let mend = self.operator_mends().unwrap_or("it is being replaced, see `keyward ca list`");
        Some(format!("authority: the active issuing authority {what}: {mend}"))
    }

    /// That the active issuing authority ends and nothing replaces it until an operator has done something: from the moment on when a
    /// successor is due by its end.
    #[must_use]
    pub fn end_waits_for_an_operator(&self) -> Option<String> {
        let (from, end) = self.authorities().ok()?.in_force()?;
        let told_from = end.minus_seconds(due::rest_seconds(from, end));
        let mend = self.operator_mends().filter(|_| told_from <= self.clock().reckoned())?;
        Some(format!("the active issuing authority ends at {end}: {mend}"))
    }

    /// What an operator has to do before another issuing authority signs, if it takes one.
    fn operator_mends(&self) -> Option<&'static str> {
        let (all, _) = self.ledger.generations();
        let is = |purpose, state| all.iter().find(move |found| found.purpose == purpose && found.state == state);
        match () {
            () if self.is_rotation_paused() => Some("the rotation is paused; `keyward ca resume`"),
            () if is(Purpose::Issuing, State::Prepublished).is_some() => None,
            () if is(Purpose::Root, State::Active).is_some_and(|root| root.is_outside()) => Some(
                "`keyward ca show --csr`, have it signed, `keyward ca adopt`; with `--root-certificate` where the root ends as well",
            ),
            () => None,
        }
    }

    /// The longest lifetime that a certificate may have, in seconds.
    pub(super) fn ttl_seconds_longest(&self) -> u32 {
        self.ledger.ttl_seconds_longest().max(self.limits.ttl_seconds_default)
    }
}

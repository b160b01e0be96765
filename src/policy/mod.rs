//! The decision: standing, appraisal and wish become a grant, or a refusal.
//!
//! Owns: [`Grant`], which nothing else can make. Promises: pure, the same arguments give the same answer; a certificate
//! never outlives the appraisal it rests on, nor the lifetime the agent was enrolled for; whatever cannot be granted
//! in full is refused, not cut down, except where the appraisal ends. Never: a clock, a lock, a look at the ledger.

use std::time::Duration;

use crate::ledger::Standing;
use crate::model::{AgentId, Reason, Refusal, UnixTime};

/// How far back notBefore lies, in seconds: for peers whose clock is behind.
pub const NOT_BEFORE_SECONDS: u64 = 30;
/// A certificate that would expire sooner than this is not issued, in seconds: it would be of no use to anyone.
pub const LIFETIME_SECONDS_MIN: u64 = 5;

/// What the caller would like.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Wish {
    /// Lifetime in seconds; `None` for whatever the enrolment grants.
    pub ttl_seconds: Option<u32>,
}

/// What the caller gets: one certificate for this agent and epoch, over this time.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub struct Grant {
    agent: AgentId,
    epoch: u32,
    ttl_seconds: u32,
    not_before: UnixTime,
    not_after: UnixTime,
}

impl Grant {
    /// To whom.
    #[must_use]
    pub fn agent(&self) -> &AgentId {
        &self.agent
    }

    /// In which epoch; of no use once that one is denied.
    #[must_use]
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// Seconds from the decision to `not_after`.
    #[must_use]
    pub fn ttl_seconds(&self) -> u32 {
        self.ttl_seconds
    }

    /// In whole seconds, as a certificate has it (RFC 5280 §4.1.2.5).
    #[must_use]
    pub fn not_before(&self) -> UnixTime {
        self.not_before
    }

    /// In whole seconds, as a certificate has it (RFC 5280 §4.1.2.5).
    #[must_use]
    pub fn not_after(&self) -> UnixTime {
        self.not_after
    }

    /// The same, no longer than the authority that signs is in force: verifiers look at the whole chain.
    ///
    /// # Errors
    /// `AUTHORITY_EXPIRED`: that is too soon for a certificate of use.
    pub fn within(&self, authority_until: UnixTime) -> Result<Self, Refusal> {
        let granted_at = self.not_before.plus_seconds(NOT_BEFORE_SECONDS);
        let not_after = self.not_after.min(authority_until);
        let ttl_seconds = u32::try_from(not_after.seconds().saturating_sub(granted_at.seconds())).unwrap_or(u32::MAX);
        if u64::from(ttl_seconds) < LIFETIME_SECONDS_MIN {
            let advice =
                "the issuing authority's certificate has ended, or is about to; an operator has to look (`keyward ca list`)";
            return Err(Refusal::new(Reason::AuthorityExpired, advice));
        }
        Ok(Self { not_after, ttl_seconds: ttl_seconds.min(self.ttl_seconds), ..self.clone() })
    }
}

/// Decides at `now` on a certificate for the agent of `standing`, whose appraisal holds until `fresh_until`. Of an agent
/// at most `live_certificates_max` certificates are unexpired at once.
///
/// # Errors
/// - `WISH_BEYOND_GRANT`: the wish exceeds what the agent was enrolled for.
/// - `MALFORMED_REQUEST`: the wish is too short for a certificate of use.
/// - `RATE_LIMITED`: too many certificates are live; says when the first of them expires.
/// - `REJOIN_EXPIRED`: the appraisal ends too soon, or has ended.
pub fn decide(
    standing: &Standing,
    fresh_until: UnixTime,
    wish: Wish,
    live_certificates_max: usize,
    now: UnixTime,
) -> Result<Grant, Refusal> {
    let ttl_seconds_max = standing.ttl_seconds_max;
    let wished = wish.ttl_seconds.unwrap_or(ttl_seconds_max);
    if wished > ttl_seconds_max {
        let advice = format!("wish for at most {ttl_seconds_max} seconds, or have the agent enrolled for more");
        return Err(Refusal::new(Reason::WishBeyondGrant, advice));
    }
    // Whole seconds, rounded down: up to one second of the wish is lost, and nothing is won.
    let whole = |time: UnixTime| UnixTime::from_seconds(time.seconds());
    let soonest = now.plus_seconds(LIFETIME_SECONDS_MIN);
    let wished_until = whole(now.plus_seconds(wished.into()));
    if wished_until < soonest {
        let advice = format!("wish for a lifetime of more than {LIFETIME_SECONDS_MIN} seconds");
        return Err(Refusal::new(Reason::MalformedRequest, advice));
    }
    if standing.live_certificates >= live_certificates_max {
        return Err(too_many(standing, live_certificates_max, now));
    }
    let not_after = wished_until.min(whole(fresh_until));
    if not_after < soonest {
        return Err(Refusal::new(Reason::RejoinExpired, "the evidence is too old; attest again with new evidence"));
    }
    Ok(Grant {
        agent: standing.agent.clone(),
        epoch: standing.epoch,
        ttl_seconds: u32::try_from(not_after.seconds().saturating_sub(now.seconds())).map_or(wished, |ttl| ttl.min(wished)),
        not_before: whole(now.minus_seconds(NOT_BEFORE_SECONDS)),
        not_after,
    })
}

fn too_many(standing: &Standing, live_certificates_max: usize, now: UnixTime) -> Refusal {
    let advice = format!("{live_certificates_max} certificates of this agent are live; use one, or wait for one to expire");
    let refusal = Refusal::new(Reason::RateLimited, advice);
    match standing.oldest_live_not_after {
        // Up to a second more: a fraction of one would be of no help to a caller that counts in seconds.
        Some(expires) => {
            let seconds = expires.micros().saturating_sub(now.micros()).div_ceil(1_000_000).max(1);
            refusal.retry_after(Duration::from_secs(seconds))
        }
        None => refusal,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: UnixTime = UnixTime(1_800_000_000_700_000);

    fn standing() -> Standing {
        Standing {
            agent: AgentId::parse("builder/7").unwrap(),
            epoch: 3,
            ttl_seconds_max: 600,
            live_certificates: 0,
            oldest_live_not_after: None,
        }
    }

    fn wish(seconds: u32) -> Wish {
        Wish { ttl_seconds: Some(seconds) }
    }

    fn reason(result: Result<Grant, Refusal>) -> Reason {
        result.unwrap_err().reason
    }

    #[test]
    fn no_wish_gets_what_the_enrolment_grants() {
        let grant = decide(&standing(), NOW.plus_seconds(86_400), Wish::default(), 8, NOW).unwrap();
        assert_eq!((grant.agent().as_str(), grant.epoch(), grant.ttl_seconds()), ("builder/7", 3, 600));
        assert_eq!(grant.not_before(), UnixTime::from_seconds(1_799_999_970));
        assert_eq!(grant.not_after(), UnixTime::from_seconds(1_800_000_600));
    }

    #[test]
    fn a_wish_beyond_the_enrolment_is_refused_and_not_cut_down() {
        let fresh = NOW.plus_seconds(86_400);
        assert_eq!(reason(decide(&standing(), fresh, wish(601), 8, NOW)), Reason::WishBeyondGrant);
        assert_eq!(decide(&standing(), fresh, wish(600), 8, NOW).unwrap().ttl_seconds(), 600);
        assert_eq!(decide(&standing(), fresh, wish(60), 8, NOW).unwrap().ttl_seconds(), 60);
    }

    #[test]
    fn the_appraisal_ends_the_certificate() {
        let grant = decide(&standing(), NOW.plus_seconds(90), Wish::default(), 8, NOW).unwrap();
        assert_eq!((grant.ttl_seconds(), grant.not_after()), (90, UnixTime::from_seconds(1_800_000_090)));
        for gone in [NOW.plus_seconds(5), NOW, NOW.minus_seconds(1), UnixTime(0)] {
            assert_eq!(reason(decide(&standing(), gone, Wish::default(), 8, NOW)), Reason::RejoinExpired);
        }
        assert!(decide(&standing(), NOW.plus_seconds(6), Wish::default(), 8, NOW).is_ok());
    }

    #[test]
    fn a_wish_too_short_to_be_of_use_is_refused() {
        for seconds in [0, 1, 4, 5] {
            assert_eq!(reason(decide(&standing(), NOW.plus_seconds(900), wish(seconds), 8, NOW)), Reason::MalformedRequest);
        }
        assert!(decide(&standing(), NOW.plus_seconds(900), wish(6), 8, NOW).is_ok());
    }

    #[test]
    fn too_many_live_certificates_wait_for_the_first_to_expire() {
        let mut standing = standing();
        standing.live_certificates = 7;
        standing.oldest_live_not_after = Some(UnixTime::from_seconds(NOW.seconds() + 42));
        assert!(decide(&standing, NOW.plus_seconds(900), Wish::default(), 8, NOW).is_ok());
        standing.live_certificates = 8;
        let refusal = decide(&standing, NOW.plus_seconds(900), Wish::default(), 8, NOW).unwrap_err();
        assert_eq!((refusal.reason, refusal.retry_after), (Reason::RateLimited, Some(Duration::from_secs(42))));
        standing.oldest_live_not_after = Some(NOW);
        let refusal = decide(&standing, NOW.plus_seconds(900), Wish::default(), 8, NOW).unwrap_err();
        assert_eq!(refusal.retry_after, Some(Duration::from_secs(1)));
    }

    proptest! {
        #[test]
        fn a_grant_never_exceeds_the_appraisal_the_wish_or_the_enrolment(
            now in 0_u64..4_000_000_000_000_000,
            fresh_for in -100_000_000_i64..1_000_000_000_000,
            ttl_seconds_max in 0_u32..100_000,
            ttl_seconds in prop::option::of(0_u32..120_000),
            live_certificates in 0_usize..12,
        ) {
            let now = UnixTime(now);
            let fresh_until = UnixTime(now.0.saturating_add_signed(fresh_for));
            let standing = Standing { ttl_seconds_max, live_certificates, ..standing() };
            match decide(&standing, fresh_until, Wish { ttl_seconds }, 8, now) {
                Ok(grant) => {
                    let ttl = ttl_seconds.unwrap_or(ttl_seconds_max);
                    prop_assert!(ttl <= ttl_seconds_max && live_certificates < 8);
                    prop_assert!(grant.not_after() <= fresh_until);
                    prop_assert!(grant.not_after() <= now.plus_seconds(ttl.into()));
                    prop_assert!(grant.ttl_seconds() <= ttl);
                    prop_assert!(grant.not_after() >= now.plus_seconds(LIFETIME_SECONDS_MIN));
                    prop_assert!(grant.not_before() <= now.minus_seconds(NOT_BEFORE_SECONDS));
                    prop_assert_eq!(grant.not_after().micros() % 1_000_000, 0);
                    prop_assert_eq!(grant.not_before().micros() % 1_000_000, 0);
                    // Nothing that was wished for is kept back either.
                    let kept = grant.not_after().plus_seconds(1);
                    prop_assert!(kept > fresh_until || kept > now.plus_seconds(ttl.into()));
                }
                Err(refusal) => prop_assert!(
                    ttl_seconds.is_some_and(|ttl| ttl > ttl_seconds_max)
                        || live_certificates >= 8
                        || fresh_for < 6_000_000
                        || ttl_seconds.unwrap_or(ttl_seconds_max) < 6,
                    "{refusal}"
                ),
            }
        }
    }
}

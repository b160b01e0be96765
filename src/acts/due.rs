//! When which arrow of an authority's life is due. Pure: generations and terms in, arrows out.

use crate::config::Rotation;
use crate::ledger::Generation;
use crate::model::{KeyId, UnixTime};
use crate::proto::{AuthorityState as State, Purpose};

use super::authorities::REFRESH_HINT_SECONDS;
use super::certify;

/// A root or a token-signing key is in the bundle for so long before it signs, in seconds: three refresh hints (SPIFFE Trust Domain and
/// Bundle asks for three to five), so that who follows the hint has it twice over. A root for as long as the longest certificate lasts, if
/// that is longer ([`signs_from`]): there are agents that take the bundle with their renewals alone.
pub(super) const PREPUBLISH_SECONDS: u64 = 3 * REFRESH_HINT_SECONDS as u64;
/// Two ledger keys sign checkpoints for so long, and tokens outlive their key by no more, in seconds.
const OVERLAP_SECONDS: u64 = 3_600;
/// What is under a tainted authority has so long to be renewed, in seconds: within it, whoever follows the bundle has come by, and a
/// certificate of the default lifetime has been renewed.
const TAINT_SECONDS: u64 = 900;
/// Clocks differ: a certificate is over for everybody so long after its end, in seconds.
pub(super) const SLACK_SECONDS: u64 = 60;
/// An authority's successor is made at the latest so long before its certificate ends, in seconds; of one that is not good for longer than
/// that three times over, a third of its life before.
const CERTIFICATE_REST_SECONDS: u64 = 14 * 86_400;
/// A wrapping key waits no longer for the one before the active one to have nothing under it, in seconds: what is under one that the token has
/// lost stays there until its agent rotates it, which may be never.
const REWRAP_SECONDS: u64 = 86_400;

/// What the arrows are weighed by.
pub(super) struct Terms<'a> {
    pub rotation: &'a Rotation,
    /// The longest lifetime that any agent was enrolled for.
    pub ttl_seconds_longest: u32,
    /// Nothing moves but what a taint moves.
    pub paused: bool,
    /// By the daemon's clock.
    pub now: UnixTime,
    /// Wrapping keys that nothing is under any more; with a taint, that nothing has ever been under.
    pub freed: Vec<(KeyId, bool)>,
}

/// What a generation waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Arrow {
    /// Where it leads. From active to retiring: a successor is to be planned.
    pub to: State,
    /// When; `None`: when something else has happened.
    pub at: Option<UnixTime>,
    /// It follows from a taint.
    pub urgent: bool,
    /// It is taken with another's, or after it: nothing is to be done for it now.
    pub passive: bool,
}

impl Arrow {
    /// Whether it is to be taken now.
    pub(super) fn is_due(&self, terms: &Terms<'_>) -> bool {
        !self.passive && self.at.is_some_and(|at| at <= terms.now) && (self.urgent || !terms.paused)
    }
}

fn arrow(to: State, at: Option<UnixTime>, urgent: bool) -> Arrow {
    Arrow { to, at, urgent, passive: false }
}

/// The next arrow of one generation among all.
pub(super) fn next(of: &Generation, all: &[Generation], terms: &Terms<'_>) -> Option<Arrow> {
    let active = |purpose| all.iter().find(move |found| found.purpose == purpose && found.state == State::Active);
    let root = active(Purpose::Root);
    match of.state {
        State::Planned => {
            let at = match (of.purpose, root) {
                // The outside root's turn, or that of a new root.
                (Purpose::Issuing, Some(root)) if root.is_outside() || root.tainted || !is_in_force(root, terms.now) => None,
                _ => Some(of.since),
            };
            let replaced = active(of.purpose).is_some_and(|before| before.tainted);
            if of.tainted {
                return Some(arrow(State::Destroyed, Some(of.since), true));
            }
            Some(arrow(State::Prepublished, at, replaced))
        }
        // Given up: its key may be in other hands, or its root has been replaced before it came to sign.
        State::Prepublished if of.tainted || root_of(of, all).is_some_and(|root| root.state == State::Retiring) => {
            Some(arrow(State::Retired, Some(of.since), of.tainted))
        }
        State::Prepublished => Some(activation(of, all, terms)),
        State::Active => Some(succession(of, all, terms)),
        State::Retiring => Some(retirement(of, all, terms)),
        // What was under it is to be replaced first.
        State::Retired if of.purpose == Purpose::Wrapping && of.tainted => Some(arrow(State::Destroyed, freed(of, terms), true)),
        State::Retired => {
            let kept = if of.tainted { 0 } else { terms.rotation.destroy_days * 86_400 };
            Some(arrow(State::Destroyed, Some(of.since.plus_seconds(kept)), of.tainted))
        }
        State::Destroyed | State::Unspecified => None,
    }
}

/// Whether a first one is to be planned: `init` has not always made token-signing keys.
pub(super) fn lacks_token_signing(all: &[Generation]) -> bool {
    !all.iter().any(|found| found.purpose == Purpose::TokenSigning && (found.state == State::Active || found.is_coming()))
}

fn activation(of: &Generation, all: &[Generation], terms: &Terms<'_>) -> Arrow {
    let urgent = all.iter().any(|found| found.purpose == of.purpose && found.state == State::Active && found.tainted);
    let overlap = match of.purpose {
        Purpose::TokenSigning => PREPUBLISH_SECONDS,
        _ => 0,
    };
    // At most two sign checkpoints: it follows when the one before them is retired.
    let retiring = |found: &&Generation| found.purpose == Purpose::Ledger && found.state == State::Retiring;
    let before = all.iter().find(retiring).filter(|_| of.purpose == Purpose::Ledger && !urgent);
    let at = match of.purpose {
        _ if urgent => Some(of.since),
        Purpose::Ledger => before.map_or(Some(of.since), |before| retirement(before, all, terms).at),
        // What is under the one before comes under the active one, and not under one after the other.
        Purpose::Wrapping if !of.now => {
            // One that retires only in the future does so by a clock that has been set back since.
            let retires = |found: &&Generation| found.state == State::Retiring && found.since <= terms.now;
            let retiring = all.iter().filter(|found| found.purpose == of.purpose).filter(retires);
            retiring.map(|found| found.since.plus_seconds(REWRAP_SECONDS)).chain([of.since]).max()
        }
        Purpose::Root => Some(signs_from(of, all, terms)),
        _ => Some(of.since.plus_seconds(overlap)),
    };
    let at = match terms.rotation.window {
        Some(window) if !of.now && !urgent && !certifies_no_more(of, all, terms) => at.map(|at| window.next(at)),
        _ => at,
    };
    let root_is_coming = root_of(of, all).is_some_and(Generation::is_coming);
    Arrow { passive: before.is_some(), ..arrow(State::Active, at.filter(|_| !root_is_coming), urgent) }
}

/// What signs until `of` does. Under an outside root the next issuing authority comes with a new root, and with the one before it goes what
/// was under that one; under a root of ours it comes by itself, and is waited for by nobody.
fn before<'a>(of: &Generation, all: &'a [Generation]) -> impl Iterator<Item = &'a Generation> + use<'a> {
    let active = |found: &&Generation| found.state == State::Active;
    let outside = all.iter().filter(active).any(|found| found.purpose == Purpose::Root && found.is_outside());
    let (purpose, issuing) = (of.purpose, of.purpose == Purpose::Root && outside);
    all.iter().filter(active).filter(move |found| found.purpose == purpose || (issuing && found.purpose == Purpose::Issuing))
}

/// Nobody takes a certificate of what signs until `of` does: nothing is gained by waiting.
fn certifies_no_more(of: &Generation, all: &[Generation], terms: &Terms<'_>) -> bool {
    before(of, all).any(|before| !is_in_force(before, terms.now))
}

/// When a new root has been in the bundle for long enough. It does not wait until what signs before it is too old to certify for the longest
/// lifetime, nor at all where that certifies no more.
fn signs_from(of: &Generation, all: &[Generation], terms: &Terms<'_>) -> UnixTime {
    if certifies_no_more(of, all, terms) {
        return of.since;
    }
    let longest = terms.ttl_seconds_longest.into();
    let (soonest, latest) = (of.since.plus_seconds(PREPUBLISH_SECONDS), of.since.plus_seconds(PREPUBLISH_SECONDS.max(longest)));
    match before(of, all).filter_map(|before| certify::validity(&before.certificate)).map(|(_, end)| end).min() {
        Some(end) => latest.min(end.minus_seconds(longest)).max(soonest).min(end),
        None => latest,
    }
}

fn succession(of: &Generation, all: &[Generation], terms: &Terms<'_>) -> Arrow {
    let to = State::Retiring;
    if let Some(coming) = all.iter().find(|found| found.purpose == of.purpose && found.is_coming()) {
        // Nothing to plan any more: it retires when that one is active.
        let at = if coming.state == State::Prepublished { activation(coming, all, terms).at } else { None };
        return Arrow { passive: true, ..arrow(to, at, of.tainted) };
    }
    if of.is_outside() {
        return arrow(to, None, of.tainted);
    }
    if of.tainted || its_root_goes(of, all) || !is_in_force(of, terms.now) {
        return arrow(to, Some(of.since), of.tainted);
    }
    let days = match of.purpose {
        Purpose::Root => terms.rotation.root_days,
        Purpose::Issuing => terms.rotation.issuing_days,
        Purpose::TokenSigning => terms.rotation.token_signing_days,
        Purpose::Wrapping => terms.rotation.wrapping_days,
        _ => terms.rotation.ledger_days,
    };
    let by_age = of.since.plus_seconds(days * 86_400 + jitter(of.key_id, terms.rotation.jitter_seconds));
    let at = match certify::validity(&of.certificate) {
        Some((from, end)) => by_age.min(end.minus_seconds(rest_seconds(from, end))),
        None => by_age,
    };
    arrow(to, Some(terms.rotation.window.map_or(at, |window| window.next(at))), false)
}

fn retirement(of: &Generation, all: &[Generation], terms: &Terms<'_>) -> Arrow {
    let after = |seconds: u64| Some(of.since.plus_seconds(seconds));
    let at = match of.purpose {
        Purpose::Issuing if of.tainted => leaves(of),
        Purpose::TokenSigning if of.tainted => after(TAINT_SECONDS),
        Purpose::Issuing => after(u64::from(terms.ttl_seconds_longest) + SLACK_SECONDS),
        Purpose::Root => {
            let used = all.iter().any(|found| found.issuer == Some(of.key_id) && found.is_trusted());
            after(0).filter(|_| !used)
        }
        Purpose::Ledger if of.tainted => after(0),
        Purpose::Wrapping => freed(of, terms),
        _ => after(OVERLAP_SECONDS),
    };
    arrow(State::Retired, at, of.tainted)
}

/// When a tainted issuing authority is trusted no more, if another signs in its place already: certificates under it are to be renewed before.
pub(super) fn leaves(of: &Generation) -> Option<UnixTime> {
    let is_leaving = of.purpose == Purpose::Issuing && of.tainted && of.state == State::Retiring;
    is_leaving.then(|| of.since.plus_seconds(TAINT_SECONDS))
}

fn freed(of: &Generation, terms: &Terms<'_>) -> Option<UnixTime> {
    Some(of.since.min(terms.now)).filter(|_| terms.freed.contains(&(of.key_id, of.tainted)))
}

fn root_of<'a>(of: &Generation, all: &'a [Generation]) -> Option<&'a Generation> {
    all.iter().find(|root| of.issuer == Some(root.key_id))
}

/// Whether verifiers take its certificate now, if it has one: it may have expired while the daemon was away, or be of a clock that ran ahead.
pub(super) fn is_in_force(of: &Generation, now: UnixTime) -> bool {
    certify::validity(&of.certificate).is_none_or(|(from, end)| from <= now && now < end)
}

/// How long before the end of a certificate its successor is made at the latest, in seconds.
pub(super) fn rest_seconds(from: UnixTime, end: UnixTime) -> u64 {
    (end.seconds().saturating_sub(from.seconds()) / 3).min(CERTIFICATE_REST_SECONDS)
}

/// Whether another root is active than the one over it.
pub(super) fn its_root_goes(of: &Generation, all: &[Generation]) -> bool {
    root_of(of, all).is_some_and(|root| root.state == State::Retiring)
}

/// Different for each key, the same at every look.
fn jitter(key: KeyId, at_most: u64) -> u64 {
    u64::from(u16::from_be_bytes([key.0[0], key.0[1]])) * at_most / u64::from(u16::MAX)
}

#[cfg(test)]
#[path = "due_tests.rs"]
mod tests;

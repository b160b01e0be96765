//! The agents of the ledger: their epochs, quarantines and live certificates.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;

use super::At;
use crate::model::{AgentId, Serial, UnixTime};
use crate::proto::{Enrolled, Quarantined, Reinstated};

/// An agent's place in [`Agents`].
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Slot(usize);

struct Agent {
    name: Arc<str>,
    epoch: u32,
    quarantined: bool,
    /// Highest epoch that is denied.
    denied: Option<u32>,
    /// Of the newest release in this epoch.
    sequence: Option<u64>,
    /// Of the newest certificate with an unknown outcome after it: it may have been delivered, and built upon.
    maybe: Option<u64>,
    live: Vec<Live>,
}

impl Agent {
    /// Whether a request for `sequence` follows the newest release, or the newest certificate with an unknown outcome after it: that one is
    /// asked for again, or was delivered and is built upon.
    fn may_follow(&self, sequence: u64) -> bool {
        match (self.maybe, self.sequence) {
            (Some(maybe), _) => sequence == maybe || Some(sequence) == maybe.checked_add(1),
            (None, Some(before)) => Some(sequence) == before.checked_add(1),
            (None, None) => true,
        }
    }
}

struct Live {
    serial: Serial,
    not_after_seconds: u64,
    epoch: u32,
}

/// A certificate that may have been handed out, or is about to be.
pub(super) struct Candidate {
    pub(super) slot: Slot,
    pub(super) epoch: u32,
    pub(super) sequence: u64,
    pub(super) serial: Option<Serial>,
    pub(super) not_after_seconds: u64,
}

struct Denied {
    since: u64,
    not_after_seconds: u64,
}

#[derive(Default)]
pub(super) struct Agents {
    by_name: HashMap<Arc<str>, Slot>,
    agents: Vec<Agent>,
    /// Certificates that are denied and have not expired.
    denied: HashMap<Serial, Denied>,
    quarantines: u64,
    reinstatements: u64,
}

impl Agents {
    pub(super) fn enrolled(&mut self, enrolled: &Enrolled, at: &mut At<'_>) {
        let name = match AgentId::parse(&enrolled.agent) {
            Ok(agent) => Arc::<str>::from(agent.as_str()),
            Err(error) => return at.violates("enrolled", format_args!("{error}")),
        };
        if self.by_name.contains_key(&name) {
            return at.violates("enrolled", format_args!("{name} is enrolled again"));
        }
        self.by_name.insert(Arc::clone(&name), Slot(self.agents.len()));
        let epoch = enrolled.epoch;
        self.agents.push(Agent { name, epoch, quarantined: false, denied: None, sequence: None, maybe: None, live: Vec::new() });
    }

    pub(super) fn quarantined(&mut self, quarantined: &Quarantined, at: &mut At<'_>) {
        let Some(&slot) = self.by_name.get(quarantined.agent.as_str()) else {
            return at.violates("quarantined", format_args!("the agent is not enrolled"));
        };
        let agent = &mut self.agents[slot.0];
        if quarantined.epoch != agent.epoch {
            let detail = format_args!("{} is in epoch {}, epoch {} is denied", agent.name, agent.epoch, quarantined.epoch);
            at.violates("quarantined", detail);
        }
        self.quarantines += u64::from(!agent.quarantined);
        agent.quarantined = true;
        agent.denied = agent.denied.max(Some(quarantined.epoch));
        agent.live.retain(|live| {
            let now_denied = Some(live.epoch) <= agent.denied;
            if now_denied {
                let denied = Denied { since: at.index, not_after_seconds: live.not_after_seconds };
                self.denied.entry(live.serial).or_insert(denied);
            }
            !now_denied
        });
    }

    pub(super) fn reinstated(&mut self, reinstated: &Reinstated, at: &mut At<'_>) {
        let Some(&slot) = self.by_name.get(reinstated.agent.as_str()) else {
            return at.violates("reinstated", format_args!("the agent is not enrolled"));
        };
        let agent = &mut self.agents[slot.0];
        if !agent.quarantined {
            at.violates("reinstated", format_args!("{} is not in quarantine", agent.name));
        }
        let expected = agent.denied.map_or(agent.epoch, |denied| denied.saturating_add(1));
        if reinstated.epoch != expected {
            let detail = format_args!("{} enters epoch {} instead of {expected}", agent.name, reinstated.epoch);
            at.violates("reinstated", detail);
        }
        self.reinstatements += 1;
        agent.quarantined = false;
        (agent.sequence, agent.maybe) = (None, None);
        agent.epoch = reinstated.epoch;
    }

    pub(super) fn find(&self, name: &str) -> Option<Slot> {
        self.by_name.get(name).copied()
    }

    pub(super) fn epoch(&self, slot: Slot) -> u32 {
        self.agents[slot.0].epoch
    }

    /// A certificate was handed out: promise 5, and the order of releases.
    pub(super) fn released(&mut self, candidate: &Candidate, at: &mut At<'_>) {
        self.released_to(candidate.slot, candidate.epoch, at);
        let agent = &mut self.agents[candidate.slot.0];
        // A new epoch counts on from wherever its first release is.
        if !agent.may_follow(candidate.sequence) {
            let before = agent.sequence.unwrap_or_default();
            let detail = format_args!("release {} of {} follows {before}", candidate.sequence, agent.name);
            at.violates("sequence", detail);
        }
        agent.sequence = agent.sequence.max(Some(candidate.sequence));
        agent.maybe = None;
        self.live(candidate, at);
    }

    /// Something was handed out: promise 5.
    pub(super) fn released_to(&self, slot: Slot, epoch: u32, at: &mut At<'_>) {
        let agent = &self.agents[slot.0];
        if agent.quarantined {
            at.violates("released-quarantined", format_args!("{} is in quarantine", agent.name));
        }
        if Some(epoch) <= agent.denied {
            at.violates("released-denied", format_args!("epoch {epoch} of {} is denied", agent.name));
        }
    }

    /// Whether an agent may do anything in this epoch.
    pub(super) fn admits(&self, slot: Slot, epoch: u32) -> bool {
        let agent = &self.agents[slot.0];
        !agent.quarantined && agent.epoch == epoch
    }

    /// A certificate may have been handed out: what was asked for next may build upon it.
    pub(super) fn unknown(&mut self, candidate: &Candidate, at: &mut At<'_>) {
        let agent = &mut self.agents[candidate.slot.0];
        if agent.may_follow(candidate.sequence) {
            agent.maybe = Some(candidate.sequence);
        }
        self.live(candidate, at);
    }

    /// A certificate exists, or may exist.
    pub(super) fn live(&mut self, candidate: &Candidate, at: &mut At<'_>) {
        let Some(serial) = candidate.serial else { return };
        let agent = &mut self.agents[candidate.slot.0];
        let not_after_seconds = candidate.not_after_seconds;
        if Some(candidate.epoch) <= agent.denied {
            self.denied.insert(serial, Denied { since: at.index, not_after_seconds });
            return;
        }
        // Only when it would grow: each release costs the same however many a ledger claims to be live.
        if agent.live.len() == agent.live.capacity() {
            let now = at.time.seconds();
            agent.live.retain(|live| live.not_after_seconds > now);
        }
        agent.live.push(Live { serial, not_after_seconds, epoch: candidate.epoch });
    }

    /// A CRL prepared when the ledger had `size` entries lists `serials`: all that was denied by then and has not expired?
    pub(super) fn crl(&mut self, size: u64, serials: &HashSet<Serial>, now: UnixTime, at: &mut At<'_>) {
        self.denied.retain(|_, denied| denied.not_after_seconds > now.seconds());
        for (serial, denied) in &self.denied {
            if denied.since < size && !serials.contains(serial) {
                at.violates("crl-incomplete", format_args!("{serial} is denied since entry {}", denied.since));
            }
        }
    }

    pub(super) fn count(&self) -> u64 {
        u64::try_from(self.agents.len()).unwrap_or(u64::MAX)
    }

    pub(super) fn quarantines(&self) -> u64 {
        self.quarantines
    }

    pub(super) fn reinstatements(&self) -> u64 {
        self.reinstatements
    }
}

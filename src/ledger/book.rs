//! What follows from the entries: the state in memory. Changed by applying an entry, live and at start alike.

use std::collections::{BTreeMap, HashMap};
use std::num::NonZeroU64;

use crate::model::{AgentId, Digest, KeyTag, PublicKey, Reason, Refusal, Serial, TokenId, UnixTime};
use crate::proto::QuarantineCause;

use super::agent::{Agent, Asked, Bound, Certified, Ending, Evidence, Live, Quarantine, Token, Verdict};
use super::generation::Generations;

/// Room for as many more certificates of an agent is made at once.
const LIVE_GROWS_BY: usize = 4;

/// What an intent for an agent adds to the book.
#[derive(Debug, Clone)]
pub(super) struct Wanted {
    pub sequence: u64,
    pub epoch: u32,
    pub evidence: Evidence,
    pub key: PublicKey,
    pub serial: Serial,
    pub not_before: UnixTime,
    pub not_after: UnixTime,
    pub request_hash: Digest,
    pub idempotency_hash: [u8; 16],
}

/// All agents, and the intents that have not ended.
#[derive(Default)]
pub(super) struct Book {
    pub agents: Vec<Agent>,
    by_name: BTreeMap<AgentId, u32>,
    by_token: HashMap<TokenId, u32>,
    by_key: HashMap<KeyTag, u32>,
    /// Intents without an outcome, and whose they are.
    pub open: BTreeMap<u64, Option<u32>>,
    /// Agents changed since their row was written.
    pub dirty: Vec<u32>,
    pub quarantined: usize,
    /// The longest lifetime that any agent was enrolled for.
    pub ttl_seconds_longest: u32,
    pub generations: Generations,
}

impl Book {
    pub(super) fn slot(&self, id: &AgentId) -> Option<u32> {
        self.by_name.get(id).copied()
    }

    pub(super) fn agent(&self, slot: u32) -> &Agent {
        &self.agents[slot as usize]
    }

    pub(super) fn named(&self, id: &AgentId) -> Result<(u32, &Agent), Refusal> {
        let slot = self.slot(id).ok_or_else(|| Refusal::new(Reason::AgentUnknown, "no such agent is enrolled here"))?;
        Ok((slot, self.agent(slot)))
    }

    pub(super) fn with_token(&self, id: &TokenId) -> Option<&Agent> {
        self.by_token.get(id).map(|slot| self.agent(*slot))
    }

    /// Agents by name, after `after`.
    pub(super) fn page<'a>(&'a self, after: &AgentId, all: bool) -> impl Iterator<Item = &'a Agent> + 'a {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = if all { Unbounded } else { Excluded(after.clone()) };
        self.by_name.range((from, Unbounded)).map(|(_, slot)| self.agent(*slot))
    }

    /// Decides whether `wanted` may become an intent now. Nothing is changed.
    pub(super) fn weigh(&self, slot: u32, wanted: &Wanted, now: UnixTime, live_max: usize) -> Verdict {
        let agent = self.agent(slot);
        if let Err(refusal) = agent.admits(wanted.epoch) {
            return Verdict::Refuse(refusal);
        }
        let key = wanted.key.digest();
        if self.by_key.get(&key.tag()).is_some_and(|owner| *owner != slot) {
            return Verdict::Refuse(Refusal::new(Reason::KeyInUse, "this key is certified for another agent; make a new one"));
        }
        agent.weigh(&wanted.evidence, &key, &wanted.request_hash, &wanted.idempotency_hash, now, live_max)
    }

    fn touch(&mut self, slot: u32, index: u64) -> &mut Agent {
        touch(&mut self.agents, &mut self.dirty, slot, index)
    }

    /// A loaded row.
    pub(super) fn restore(&mut self, agent: Agent) {
        let slot = self.add(agent);
        let agent = &self.agents[slot as usize];
        if let Some(token) = &agent.token {
            self.by_token.insert(token.id, slot);
        }
        for live in agent.live() {
            self.by_key.insert(live.key, slot);
        }
        self.quarantined += usize::from(agent.quarantine.is_some());
    }

    fn add(&mut self, agent: Agent) -> u32 {
        let slot = u32::try_from(self.agents.len()).unwrap_or(u32::MAX);
        self.ttl_seconds_longest = self.ttl_seconds_longest.max(agent.ttl_seconds_max);
        self.by_name.insert(agent.id.clone(), slot);
        self.agents.push(agent);
        slot
    }

    pub(super) fn enrolled(&mut self, index: u64, agent: Agent) -> u32 {
        if let Some(token) = &agent.token {
            let id = token.id;
            let slot = self.add(agent);
            self.by_token.insert(id, slot);
            self.touch(slot, index);
            return slot;
        }
        self.add(agent)
    }

    /// An intent of the daemon's own: server certificate, CRL, authority.
    pub(super) fn intended(&mut self, index: u64) {
        self.open.insert(index, None);
    }

    /// An intent for an agent: its token is spent, its certificate counts as live from here on. Certificates that had
    /// expired `forget_seconds` before this one begins are of no interest to a CRL any more. (Before it begins, not before the entry:
    /// entries' times are held up after the clock was set back, and what is live must not be forgotten then.)
    pub(super) fn intended_for(&mut self, index: u64, slot: u32, wanted: Wanted, forget_seconds: u64) {
        let forget = wanted.not_before.minus_seconds(forget_seconds);
        self.open.insert(index, Some(slot));
        let key = wanted.key.digest();
        let agent = touch(&mut self.agents, &mut self.dirty, slot, index);
        if let Evidence::JoinToken(_) = wanted.evidence
            && let Some(token) = &mut agent.token
        {
            token.spent_for = Some(key);
        }
        let bound = agent.bound.get_or_insert_default();
        // A key whose answer may have been delivered has just been proved, or given up for good.
        if let Some(asked) = bound.asked.take()
            && asked.ending == Ending::Unknown
            && wanted.sequence > asked.sequence
        {
            bound.previous = bound.newest.take().map(|certified| certified.key);
            bound.newest = Some(Certified { key: asked.key, not_after: asked.not_after });
            agent.sequence = asked.sequence + 1;
        }
        if bound.live.len() == bound.live.capacity() {
            // Not doubled: this is most of what an agent costs in memory.
            bound.live.reserve_exact(LIVE_GROWS_BY);
        }
        bound.live.push(Live {
            serial: wanted.serial,
            key: key.tag(),
            not_after: wanted.not_after,
            epoch: wanted.epoch,
            intent: index,
            denied: None,
        });
        bound.asked = Some(Asked {
            sequence: wanted.sequence,
            key: wanted.key,
            not_after: wanted.not_after,
            request_hash: wanted.request_hash,
            idempotency_hash: wanted.idempotency_hash,
            intent: index,
            ending: Ending::Pending,
        });
        let by_key = &mut self.by_key;
        by_key.insert(key.tag(), slot);
        bound.live.retain(|live| {
            let keep = live.not_after >= forget;
            if !keep {
                by_key.remove(&live.key);
            }
            keep
        });
    }

    /// The outcome of `intent`.
    pub(super) fn ended(&mut self, index: u64, intent: u64, ending: Ending) {
        let Some(Some(slot)) = self.open.remove(&intent) else { return };
        let by_key = &mut self.by_key;
        let agent = touch(&mut self.agents, &mut self.dirty, slot, index);
        let Some(bound) = &mut agent.bound else { return };
        if ending == Ending::Nothing {
            bound.live.retain(|live| live.intent != intent);
            if let Some(asked) = bound.asked.as_ref().filter(|asked| asked.intent == intent) {
                let key = asked.key.digest().tag();
                if !bound.live.iter().any(|live| live.key == key) {
                    by_key.remove(&key);
                }
            }
        }
        let Some(asked) = bound.asked.as_mut().filter(|asked| asked.intent == intent) else { return };
        asked.ending = ending;
        if ending == Ending::Released {
            bound.previous = bound.newest.take().map(|certified| certified.key);
            bound.newest = Some(Certified { key: asked.key.clone(), not_after: asked.not_after });
            agent.sequence = asked.sequence + 1;
            agent.reattest = false;
        }
    }

    /// The denial takes force. `index` follows when it is durable.
    pub(super) fn denied(&mut self, slot: u32, cause: QuarantineCause, detail: String) {
        let agent = &mut self.agents[slot as usize];
        agent.denials = agent.denials.wrapping_add(1);
        if agent.quarantine.is_none() {
            agent.quarantine = Some(Box::new(Quarantine { index: None, cause, detail }));
            self.quarantined += 1;
        }
    }

    pub(super) fn quarantined(&mut self, index: u64, time: UnixTime, slot: u32, cause: QuarantineCause, detail: String) {
        if self.agent(slot).quarantine.is_none() {
            self.denied(slot, cause, detail);
        }
        let agent = self.touch(slot, index);
        if let Some(quarantine) = &mut agent.quarantine {
            quarantine.index = Some(index);
        }
        for live in agent.bound.iter_mut().flat_map(|bound| &mut bound.live) {
            live.denied = live.denied.or(NonZeroU64::new(time.micros()));
        }
        // An unspent token of a quarantined agent is void; a spent one has done its work.
        if let Some(token) = agent.token.take() {
            self.by_token.remove(&token.id);
        }
    }

    /// Epoch + 1, a new token, nothing bound; what was live before stays denied.
    pub(super) fn reinstated(&mut self, index: u64, slot: u32, epoch: u32, token: Token) {
        self.by_token.insert(token.id, slot);
        self.quarantined = self.quarantined.saturating_sub(1);
        let agent = self.touch(slot, index);
        agent.epoch = epoch;
        agent.quarantine = None;
        agent.reattest = true;
        agent.token = Some(Box::new(token));
        if let Some(bound) = &mut agent.bound {
            **bound = Bound { live: std::mem::take(&mut bound.live), ..Bound::default() };
        }
    }

    /// Whether a token of the same id exists already.
    pub(super) fn knows_token(&self, id: &TokenId) -> bool {
        self.by_token.contains_key(id)
    }
}

/// Folds up to `index` are in; the row is due.
fn touch<'a>(agents: &'a mut [Agent], dirty: &mut Vec<u32>, slot: u32, index: u64) -> &'a mut Agent {
    let agent = &mut agents[slot as usize];
    agent.as_of = index;
    if !agent.dirty {
        agent.dirty = true;
        dirty.push(slot);
    }
    agent
}

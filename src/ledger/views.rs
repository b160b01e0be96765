//! What the other rooms may see of the book: copies, taken under the gate's short lock.

use crate::model::{AgentId, Digest, KeyId, KeyTag, PublicKey, Reason, Refusal, Serial, TokenId, UnixTime};
use crate::proto::{self, AgentState};

use super::agent::{Agent, Ending, Live, Quarantine, Token};
use super::{Generation, Ledger, Pause, Standing};

/// An agent, for people.
#[derive(Debug, Clone)]
pub struct AgentView {
    /// Who.
    pub id: AgentId,
    /// Where it stands.
    pub state: AgentState,
    /// Its epoch.
    pub epoch: u32,
    /// What its next renewal has to claim.
    pub sequence: u64,
    /// notAfter of its newest certificate.
    pub not_after: Option<UnixTime>,
    /// Its limits.
    pub limits: proto::Limits,
    /// Its certificates that have not expired, with whether each is denied.
    pub live: Vec<(Live, bool)>,
    /// The quarantine in force.
    pub quarantine: Option<Quarantine>,
    /// Expiry of an unspent token.
    pub token_expires: Option<UnixTime>,
}

/// Against which keys a bound-key claim may be proved.
#[derive(Debug, Clone)]
pub struct BoundKeys {
    /// The agent's epoch.
    pub epoch: u32,
    /// The likeliest first: one that may have been certified, the newest, the one before.
    pub keys: Vec<PublicKey>,
    /// notAfter of the newest certificate.
    pub not_after: Option<UnixTime>,
    /// How long after that a rejoin is welcome.
    pub rejoin_seconds: u32,
}

impl Ledger {
    /// Where an agent stands, if it may ask for anything.
    ///
    /// # Errors
    /// `AGENT_UNKNOWN`, `AGENT_QUARANTINED`, `EPOCH_STALE`.
    pub fn standing(&self, agent: &AgentId, epoch: u32) -> Result<Standing, Refusal> {
        let now = self.0.clock.reckoned();
        let gate = self.gate();
        let (_, found) = gate.book.named(agent)?;
        found.admits(epoch)?;
        Ok(Standing {
            agent: found.id.clone(),
            epoch: found.epoch,
            ttl_seconds_max: found.ttl_seconds_max,
            live_certificates: found.live_keys(now),
            oldest_live_not_after: found.live_at(now).map(|live| live.not_after).min(),
        })
    }

    /// Whether an agent may call with a credential of `epoch`.
    ///
    /// # Errors
    /// `AGENT_UNKNOWN`, `AGENT_QUARANTINED`, `EPOCH_STALE`.
    pub fn admits(&self, agent: &AgentId, epoch: u32) -> Result<(), Refusal> {
        self.gate().book.named(agent)?.1.admits(epoch)
    }

    /// Whether an agent may call with this very certificate: one that the book tells of. What somebody has made with a stolen issuing
    /// key is none.
    ///
    /// # Errors
    /// `AGENT_UNKNOWN`, `AGENT_QUARANTINED`, `EPOCH_STALE`; `UNAUTHENTICATED` for a certificate that the book does not know.
    pub fn admits_with(&self, agent: &AgentId, epoch: u32, serial: &Serial, key: &KeyTag) -> Result<(), Refusal> {
        let gate = self.gate();
        let (_, found) = gate.book.named(agent)?;
        found.admits(epoch)?;
        let is_it = |live: &Live| live.serial == *serial && live.key == *key && live.epoch == epoch;
        if found.live().iter().any(is_it) {
            return Ok(());
        }
        let advice = "keyward's ledger does not know this certificate; attest with the bound key";
        Err(Refusal::new(Reason::Unauthenticated, advice))
    }

    /// A token, its agent and the agent's epoch.
    #[must_use]
    pub fn token(&self, id: &TokenId) -> Option<(AgentId, u32, Token)> {
        let gate = self.gate();
        let agent = gate.book.with_token(id)?;
        let token = agent.token.as_deref().filter(|token| token.id == *id)?;
        Some((agent.id.clone(), agent.epoch, token.clone()))
    }

    /// The keys an agent is bound to.
    ///
    /// # Errors
    /// `AGENT_UNKNOWN`.
    pub fn bound_keys(&self, agent: &AgentId) -> Result<BoundKeys, Refusal> {
        let gate = self.gate();
        let (_, found) = gate.book.named(agent)?;
        Ok(BoundKeys {
            epoch: found.epoch,
            keys: found.bound_keys().cloned().collect(),
            not_after: last_not_after(found),
            rejoin_seconds: found.rejoin_seconds,
        })
    }

    /// One agent, for people.
    ///
    /// # Errors
    /// `AGENT_UNKNOWN`.
    pub fn agent(&self, agent: &AgentId) -> Result<AgentView, Refusal> {
        let now = self.0.clock.reckoned();
        Ok(view(self.gate().book.named(agent)?.1, now))
    }

    /// A page of agents by name, and where the next one starts.
    #[must_use]
    pub fn agents(&self, after: Option<&AgentId>, limit: usize, state: Option<AgentState>) -> (Vec<AgentView>, Option<AgentId>) {
        let now = self.0.clock.reckoned();
        let gate = self.gate();
        let start = AgentId::parse("a/a").ok();
        let Some(from) = after.or(start.as_ref()) else { return (Vec::new(), None) };
        let mut page = Vec::new();
        // The gate is a short lock: at most 10,000 agents are looked at in one go, matching or not.
        let mut last = None;
        for agent in gate.book.page(from, after.is_none()).take(10_000) {
            last = Some(agent.id.clone());
            if state.is_none_or(|wanted| wanted == state_of(agent)) {
                page.push(view(agent, now));
                if page.len() == limit {
                    break;
                }
            }
        }
        let more = last.filter(|last| gate.book.page(last, false).next().is_some());
        (page, more)
    }

    /// The generations of all authorities that are not destroyed, and the sequence of the bundle that follows from them.
    #[must_use]
    pub fn generations(&self) -> (Vec<Generation>, u64) {
        let gate = self.gate();
        (gate.book.generations.all(), gate.book.generations.bundle_sequence())
    }

    /// The deployment's own 16 random bytes, from the genesis.
    #[must_use]
    pub fn deployment(&self) -> &[u8] {
        &self.0.deployment
    }

    /// Whether an operator holds up the rotation.
    #[must_use]
    pub fn is_rotation_paused(&self) -> bool {
        self.gate().book.generations.paused().is_some()
    }

    /// Which operator holds it up, since when and why.
    #[must_use]
    pub fn rotation_pause(&self) -> Option<Pause> {
        self.gate().book.generations.paused().cloned()
    }

    /// The longest lifetime that any agent was enrolled for, in seconds: no certificate signed by now lives longer.
    #[must_use]
    pub fn ttl_seconds_longest(&self) -> u32 {
        self.gate().book.ttl_seconds_longest
    }

    /// How many agents there are, how many of them quarantined, how many intents are open.
    #[must_use]
    pub fn counts(&self) -> (usize, usize, usize) {
        let gate = self.gate();
        (gate.book.agents.len(), gate.book.quarantined, gate.book.open.len())
    }

    /// Denied certificates that a CRL has to list at `now`: until one period after their notAfter. With the time of the denial.
    #[must_use]
    pub fn denied_certificates(&self, now: UnixTime) -> Vec<(Serial, UnixTime)> {
        let forget = now.minus_seconds(self.0.forget_seconds);
        let gate = self.gate();
        let mut denied = Vec::new();
        for agent in &gate.book.agents {
            for live in agent.live() {
                if agent.denies(live) && live.not_after >= forget {
                    denied.push((live.serial, live.denied.map_or(now, |since| UnixTime(since.get()))));
                }
            }
        }
        denied
    }

    /// Whether this very request was answered last: its intent, and what to claim next.
    #[must_use]
    pub fn answered(&self, agent: &AgentId, request_hash: &Digest) -> Option<(u64, u64)> {
        let gate = self.gate();
        let (_, found) = gate.book.named(agent).ok()?;
        let asked = found.bound.as_ref()?.asked.as_ref()?;
        (asked.request_hash == *request_hash && asked.ending == Ending::Released).then_some((asked.intent, found.sequence))
    }

    /// The stored answer to a repeated request, if there is one: rebuilt from the entries, never signed again. What was signed, the
    /// signature, and the key that signed. Blocking.
    ///
    /// # Errors
    /// `INTERNAL` when the entries are not what the book says.
    pub fn answer(&self, intent: u64) -> Result<(Vec<u8>, Vec<u8>, KeyId), Refusal> {
        use prost::Message as _;
        let damaged = || Refusal::internal(format!("entry {intent} is not the intent of a released certificate"));
        let bytes = self.0.reader.entry(intent).map_err(Refusal::internal)?.ok_or_else(damaged)?;
        let entry = proto::Entry::decode(&bytes[..]).map_err(Refusal::internal)?;
        let Some(proto::entry::Body::Intended(intended)) = entry.body else { return Err(damaged()) };
        // The outcome follows its intent closely; pages bound the search. The first is small: who repeats is not to cost much.
        let (mut from, mut limit) = (intent + 1, 64);
        loop {
            let page = self.0.reader.entries(from, limit).map_err(Refusal::internal)?;
            if page.is_empty() {
                return Err(Refusal::new(
                    Reason::RequestInProgress,
                    "the same request is being worked on; repeat it in a moment",
                ));
            }
            (from, limit) = (from + page.len() as u64, 1000);
            for bytes in page {
                let entry = proto::Entry::decode(&bytes[..]).map_err(Refusal::internal)?;
                if let Some(proto::entry::Body::Released(released)) = entry.body
                    && released.intent == intent
                {
                    let key = KeyId::from_slice(&intended.key_id).ok_or_else(damaged)?;
                    return Ok((intended.tbs, released.signature, key));
                }
            }
        }
    }
}

/// notAfter of the newest certificate that was handed out, or may have been.
pub(super) fn last_not_after(agent: &Agent) -> Option<UnixTime> {
    let bound = agent.bound.as_ref()?;
    let maybe = bound.asked.as_ref().filter(|asked| asked.ending != Ending::Nothing).map(|asked| asked.not_after);
    bound.newest.as_ref().map(|newest| newest.not_after).max(maybe)
}

fn state_of(agent: &Agent) -> AgentState {
    if agent.quarantine.is_some() {
        AgentState::Quarantined
    } else if agent.reattest {
        AgentState::Reattest
    } else if agent.bound.as_ref().is_some_and(|bound| bound.newest.is_some()) {
        AgentState::Active
    } else {
        AgentState::Enrolled
    }
}

fn view(agent: &Agent, now: UnixTime) -> AgentView {
    AgentView {
        id: agent.id.clone(),
        state: state_of(agent),
        epoch: agent.epoch,
        sequence: agent.sequence,
        not_after: last_not_after(agent),
        limits: proto::Limits { ttl_seconds_max: agent.ttl_seconds_max, rejoin_seconds: agent.rejoin_seconds },
        live: agent.live().iter().filter(|live| live.not_after > now).map(|live| (*live, agent.denies(live))).collect(),
        quarantine: agent.quarantine.as_deref().cloned(),
        token_expires: agent.token.as_deref().filter(|token| token.spent_for.is_none()).map(|token| token.expires),
    }
}

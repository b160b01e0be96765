//! Keys that are being made: no two under one name, and each counted before it is there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::ledger::KeyOf;
use crate::model::{AgentId, Reason, Refusal};
use crate::proto::{KeyAlgorithm, KeyStorage};

use super::in_progress;

type Names = Mutex<BTreeMap<KeyOf, KeyStorage>>;

/// By name, with where each will live: unspecified until that is known.
#[derive(Default)]
pub(super) struct BeingMade(Arc<Names>);

fn lock(names: &Names) -> MutexGuard<'_, BTreeMap<KeyOf, KeyStorage>> {
    names.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BeingMade {
    /// Takes a name, unless it is being made already. Gives how many others of its agent are, too.
    pub(super) fn make(&self, of: &KeyOf) -> Result<(Arc<Making>, usize), Refusal> {
        let mut names = lock(&self.0);
        if names.contains_key(of) {
            return Err(in_progress());
        }
        let others = names.keys().filter(|other| other.agent == of.agent).count();
        names.insert(of.clone(), KeyStorage::Unspecified);
        Ok((Arc::new(Making { names: Arc::clone(&self.0), of: of.clone() }), others))
    }
}

/// A name that nobody else makes a key under until this is dropped.
pub(super) struct Making {
    names: Arc<Names>,
    of: KeyOf,
}

impl Making {
    /// It will live there. Gives how many others that are being made will: of its agent, and in all. Whoever counts those that are there,
    /// too, does so after this: what is in neither count is not made yet.
    pub(super) fn lives(&self, storage: KeyStorage) -> (usize, usize) {
        let mut names = lock(&self.names);
        names.insert(self.of.clone(), storage);
        let others = names.iter().filter(|(of, lives)| **lives == storage && **of != self.of);
        others.fold((0, 0), |(own, all), (of, _)| (own + usize::from(of.agent == self.of.agent), all + 1))
    }
}

impl Drop for Making {
    fn drop(&mut self) {
        lock(&self.names).remove(&self.of);
    }
}

/// Agents for whom an RSA key is being made. They are slow to make, one at a time for all: an agent that asks for many is behind
/// everybody else that asks for one. What the daemon replaces by itself takes no agent's turn.
#[derive(Default)]
pub(super) struct RsaBeingMade(Arc<Mutex<BTreeSet<AgentId>>>);

impl RsaBeingMade {
    /// Takes the agent's turn, where there are turns.
    ///
    /// # Errors
    /// `RATE_LIMITED` when it has it already.
    pub(super) fn make(&self, agent: &AgentId, algorithm: KeyAlgorithm) -> Result<Option<MakingRsa>, Refusal> {
        if algorithm != KeyAlgorithm::Ps256 {
            return Ok(None);
        }
        if !self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(agent.clone()) {
            let advice = "ask for one PS256 key at a time: they are slow to make";
            return Err(Refusal::new(Reason::RateLimited, advice).retry_after(Duration::from_secs(1)));
        }
        Ok(Some(MakingRsa { agents: Arc::clone(&self.0), agent: agent.clone() }))
    }
}

/// Its agent has no other RSA key made until this is dropped.
pub(super) struct MakingRsa {
    agents: Arc<Mutex<BTreeSet<AgentId>>>,
    agent: AgentId,
}

impl Drop for MakingRsa {
    fn drop(&mut self) {
        self.agents.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.agent);
    }
}

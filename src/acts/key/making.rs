//! Keys that are being made: no two under one name, and each counted before it is there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::ledger::KeyOf;
use crate::model::{AgentId, KeyId, Reason, Refusal};
use crate::proto::{KeyAlgorithm, KeyStorage};

use super::in_progress;

type Names = Mutex<BTreeMap<KeyOf, Made>>;

/// Where it will live, unspecified until that is known; the key pair that it is to get, once there is to be one; and whether its name
/// is new.
struct Made {
    lives: KeyStorage,
    pair: Option<KeyId>,
    is_new: bool,
}

/// By name.
#[derive(Default)]
pub(super) struct BeingMade(Arc<Names>);

fn lock(names: &Names) -> MutexGuard<'_, BTreeMap<KeyOf, Made>> {
    names.lock().unwrap_or_else(PoisonError::into_inner)
}

impl BeingMade {
    /// Takes a name, new or of a key that gets another version, unless it is taken already. Gives how many other new ones of its agent are.
    pub(super) fn make(&self, of: &KeyOf, is_new: bool) -> Result<(Arc<Making>, usize), Refusal> {
        let mut names = lock(&self.0);
        if names.contains_key(of) {
            return Err(in_progress());
        }
        let others = names.iter().filter(|(other, made)| made.is_new && other.agent == of.agent).count();
        names.insert(of.clone(), Made { lives: KeyStorage::Unspecified, pair: None, is_new });
        Ok((Arc::new(Making { names: Arc::clone(&self.0), of: of.clone() }), others))
    }

    /// Whether a key pair is being made, or one that was made may still be put to use.
    pub(super) fn has(&self, pair: KeyId) -> bool {
        lock(&self.0).values().any(|made| made.pair == Some(pair))
    }
}

/// A name that nobody else makes a key under until this is dropped.
pub(super) struct Making {
    names: Arc<Names>,
    of: KeyOf,
}

impl Making {
    /// The key that it is for.
    pub(super) fn of(&self) -> &KeyOf {
        &self.of
    }

    /// It is to get this key pair, and none that it was to get before. Said before anybody else can know of the pair.
    pub(super) fn gets(&self, pair: KeyId) {
        if let Some(made) = lock(&self.names).get_mut(&self.of) {
            made.pair = Some(pair);
        }
    }

    /// It will live there. Gives how many others that are being made will: of its agent, and in all. Whoever counts those that are there,
    /// too, does so after this: what is in neither count is not made yet.
    pub(super) fn lives(&self, storage: KeyStorage) -> (usize, usize) {
        let mut names = lock(&self.names);
        if let Some(made) = names.get_mut(&self.of) {
            made.lives = storage;
        }
        let others = names.iter().filter(|(of, made)| made.lives == storage && **of != self.of);
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::KeyName;

    #[test]
    fn a_name_is_taken_once_and_one_that_is_only_rotated_is_no_new_one() {
        let of = |name| KeyOf { agent: AgentId::parse("builder/1").unwrap(), epoch: 1, name: KeyName::parse(name).unwrap() };
        let being_made = BeingMade::default();
        let (_rotating, others) = being_made.make(&of("old"), false).unwrap();
        assert_eq!(others, 0);
        let (_first, others) = being_made.make(&of("first"), true).unwrap();
        assert_eq!(others, 0, "a key that is there already is counted with those that are");
        let (second, others) = being_made.make(&of("second"), true).unwrap();
        assert_eq!(others, 1);
        assert!(being_made.make(&of("second"), true).is_err() && being_made.make(&of("old"), true).is_err());
        let pair = KeyId::random();
        second.gets(pair);
        assert!(being_made.has(pair));
        drop(second);
        assert!(!being_made.has(pair));
        assert_eq!(being_made.make(&of("second"), true).unwrap().1, 1);
    }
}

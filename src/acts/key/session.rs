//! Keys of the class `session` are few in all, and stay in the token until somebody destroys them: those that never sign again make room.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::model::{AgentId, KeyId, UnixTime};
use crate::proto::KeyStorage;

use super::Acts;

/// Whose they are, of which epoch, and until when each may sign. No more than the token has, but for those that went since the last look.
#[derive(Default)]
pub(super) struct SessionKeys(Mutex<HashMap<KeyId, (AgentId, u32, UnixTime)>>);

impl SessionKeys {
    fn lock(&self) -> MutexGuard<'_, HashMap<KeyId, (AgentId, u32, UnixTime)>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The token has just made it.
    pub(super) fn made(&self, id: KeyId, agent: &AgentId, epoch: u32, expires: UnixTime) {
        self.lock().insert(id, (agent.clone(), epoch, expires));
    }

    /// It has been destroyed.
    pub(super) fn gone(&self, id: KeyId) {
        self.lock().remove(&id);
    }

    /// Whether it is there, or went since the last look.
    pub(super) fn has(&self, id: KeyId) -> bool {
        self.lock().contains_key(&id)
    }

    /// How many an agent has, those among them that went since the last look.
    pub(super) fn count(&self, agent: &AgentId) -> usize {
        self.lock().values().filter(|(of, _, _)| of == agent).count()
    }
}

impl Acts {
    /// Destroys session keys that have expired, and those of denied agents: their epoch never signs again. Their rows say the rest.
    pub async fn end_session_keys(&self) {
        let Ok(token) = self.keys.token() else { return };
        let known: Vec<_> = {
            // Held from before the token is looked at: what is made meanwhile is noted after.
            let mut known = self.keys.session.lock();
            let there = token.hsm.session_keys();
            known.retain(|id, _| there.contains(id));
            known.iter().map(|(id, of)| (*id, of.clone())).collect()
        };
        let now = self.ledger.clock().reckoned();
        let admitted = self.ledger.admitted(known.iter().map(|(_, (agent, epoch, _))| (agent, *epoch)));
        let ended = known.iter().zip(admitted).filter(|((_, (_, _, expires)), admitted)| !admitted || *expires <= now);
        for ((id, _), _) in ended {
            if let Err(error) = token.hsm.destroy_agent_key(*id, KeyStorage::Session).await {
                tracing::debug!(key = %id, %error, "a session key that has ended stays for a while");
            }
        }
    }
}

//! What is over leaves nothing behind but its entries: objects in the token that nothing signs with any more, or ever did, and the rows of
//! epochs that are past. A little at a time, round and round.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};

use crate::ledger::{KeyOf, Reader, ResidentKey, in_time};
use crate::model::{AgentId, KeyId, Refusal, UnixTime};
use crate::proto::{KeyOver, KeyState, KeyStorage};

use super::super::keys::{abandon, ended, open_intents};
use super::{Acts, KeyToken};

/// Resident keys that are looked at in one go.
const KEYS: u32 = 256;
/// Agents and epochs that are looked at in one go.
const EPOCHS: usize = 64;
/// Rows that go with one entry.
const ROWS: u32 = 64;
/// A key that has expired, or whose agent cannot come back, keeps its object for so long, in seconds: a clock may have been wrong.
const GRACE_SECONDS: u64 = 3600;

/// How far a round has come.
#[derive(Debug, Default)]
pub struct Round {
    resident: Option<KeyId>,
    epoch: Option<(AgentId, u32)>,
}

/// Resident keys of which rows say something, and whether the entries say so, too, which is looked up once for each.
#[derive(Debug, Default)]
pub(super) struct LookedUp(Mutex<BTreeMap<KeyId, bool>>);

impl LookedUp {
    /// Those of the keys in `rows` of which the entries say so, too. `look_up` is asked for those that are new.
    async fn so(
        &self,
        mut rows: Vec<KeyId>,
        look_up: impl AsyncFnOnce(Vec<KeyId>) -> Result<BTreeSet<KeyId>, Refusal>,
    ) -> Result<Vec<KeyId>, Refusal> {
        let known = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let all = BTreeSet::from_iter(rows.iter().copied());
        known().retain(|id, _| all.contains(id));
        let new: Vec<_> = rows.iter().filter(|id| !known().contains_key(id)).copied().collect();
        if !new.is_empty() {
            let so = look_up(new.clone()).await?;
            known().extend(new.into_iter().map(|id| (id, so.contains(&id))));
        }
        let known = known();
        rows.retain(|id| known.get(id).is_some_and(|so| *so));
        Ok(rows)
    }

    /// Whether the entries were found not to say so.
    fn is_not(&self, id: KeyId) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).get(&id) == Some(&false)
    }

    /// Something may have happened to it since it was found not to be so: then it is looked up again.
    pub(super) fn may_be(&self, id: KeyId) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).retain(|known, so| *so || *known != id);
    }
}

impl Acts {
    /// A step of the round: resident keys whose epoch is over or that have expired lose their objects, as do those whose making came to no
    /// end; of epochs that are over the rows go. Whoever signs or verifies meets none of them any more. Each is an entry first: what a crash
    /// or a token that is away leaves undone is done in a later round.
    ///
    /// # Errors
    /// `CLOCK_UNTRUSTED`: then nothing is ended by it; `HSM_UNAVAILABLE`, `LEDGER_UNAVAILABLE`.
    pub async fn end_what_is_over(&self, round: &mut Round) -> Result<(), Refusal> {
        self.finish_what_ended().await?;
        let now = self.trusted_now()?;
        self.end_objects(round, now).await?;
        self.forget_epochs(round, now).await
    }

    /// Objects of keys that ended, and that could not be destroyed then; and of those that nobody made to the end. By no clock.
    async fn finish_what_ended(&self) -> Result<(), Refusal> {
        let token = self.keys.token()?;
        let left = self.read(Reader::keys_being_destroyed).await?;
        let left = self.keys.ended.so(left, async |new| ended(&self.ledger, new).await).await?;
        // A token that is away destroys nothing, and gives nothing up.
        if token.hsm.check_usable().is_err() {
            return Ok(());
        }
        self.destroy_objects(&token, left.into_iter().map(|id| (id, KeyStorage::Resident)).collect()).await;
        for id in self.left_in_the_making().await? {
            if let Err(refusal) = self.give_up_left(&token, id).await {
                tracing::debug!(key = %id, ?refusal, "a key that was never used stays for a while");
            }
        }
        Ok(())
    }

    async fn end_objects(&self, round: &mut Round, now: UnixTime) -> Result<(), Refusal> {
        let after = round.resident;
        let mut found = self.read(move |reader| reader.resident_keys(after, KEYS)).await?;
        round.resident = found.last().filter(|_| found.len() == KEYS as usize).map(|last| last.id);
        // A row that lies keeps no key from its end.
        found.retain(|key| !key.ending || self.keys.ended.is_not(key.id));
        let over = self.ledger.over(found.iter().map(|key| (&key.of.agent, key.of.epoch)), now, GRACE_SECONDS);
        for (key, over) in found.into_iter().zip(over) {
            let expired = key.expires.plus_seconds(GRACE_SECONDS) < now;
            let Some(cause) = over.or(expired.then_some(KeyOver::Expired)) else { continue };
            if let Err(refusal) = self.end_object(key, cause, now).await {
                tracing::debug!(?refusal, "a resident key that is over stays for a while");
            }
        }
        Ok(())
    }

    /// Resident keys that were intended, by the entries as well, and that nobody makes: the token went away before they could be given up, or
    /// the ledger did not answer in time.
    pub(super) async fn left_in_the_making(&self) -> Result<Vec<KeyId>, Refusal> {
        let intended = || self.read(Reader::keys_intended);
        let mut left = intended().await?;
        left.retain(|id| !self.keys.making.has(*id));
        if left.is_empty() {
            return Ok(left);
        }
        // A pair is among those that are being made from before its intent until the entry that puts it to use is durable, or never will be.
        // So what was intended first, was not being made then, and is intended still, is never put to use. One look at the rows is not
        // enough: between it and the look at what is being made the entry may have come. Nor is a row of before what was decided: it may
        // have been given up.
        self.ledger.edge().await?;
        let still = intended().await?;
        left.retain(|id| still.contains(id));
        let look_up = async |new| open_intents(&self.ledger, new).await.map(|intents| intents.into_keys().collect());
        self.keys.intended.so(left, look_up).await
    }

    /// A crash after the object is gone leaves the intent: there is nothing to destroy the next time.
    async fn give_up_left(&self, token: &KeyToken, id: KeyId) -> Result<(), Refusal> {
        let destroyed = token.hsm.destroy_agent_key(id, KeyStorage::Resident).await.map_err(super::hsm_refusal)?;
        abandon(&self.ledger, id, "its making was interrupted", destroyed).await
    }

    async fn end_object(&self, ResidentKey { id, of, .. }: ResidentKey, cause: KeyOver, now: UnixTime) -> Result<(), Refusal> {
        let token = self.keys.token()?;
        let loaded = self.load_key(&of).await?;
        // It may be rotated or destroyed right now: then its object goes with that.
        let _changing = in_time(Arc::clone(&loaded.changing).lock_owned()).await?;
        if loaded.key.state() == KeyState::Destroyed {
            return Ok(());
        }
        let newest = loaded.key.newest()?;
        // As it was recorded, and not as it is listed.
        let expired = newest.expires.plus_seconds(GRACE_SECONDS) < now;
        if newest.key_id != id || (cause == KeyOver::Expired && !expired) {
            return Ok(());
        }
        tracing::info!(agent = %of.agent, epoch = of.epoch, key = %of.name, cause = cause.as_str_name(), "a resident key is over");
        self.keys.ended.may_be(id);
        self.ledger.end_key_object(&loaded.key, id, cause).await?;
        self.ledger.seal_signatures(&loaded.key);
        loaded.unbind();
        self.destroy_objects(&token, vec![(id, KeyStorage::Resident)]).await;
        Ok(())
    }

    async fn forget_epochs(&self, round: &mut Round, now: UnixTime) -> Result<(), Refusal> {
        let after = round.epoch.clone();
        let found = self.read(move |reader| reader.key_epochs(after.as_ref(), EPOCHS)).await?;
        round.epoch = found.last().filter(|_| found.len() == EPOCHS).cloned();
        let over = self.ledger.over(found.iter().map(|(agent, epoch)| (agent, *epoch)), now, GRACE_SECONDS);
        for ((agent, epoch), over) in found.into_iter().zip(over) {
            if let Some(cause) = over {
                self.forget(agent, epoch, cause, now).await?;
            }
        }
        Ok(())
    }

    async fn forget(&self, agent: AgentId, epoch: u32, cause: KeyOver, now: UnixTime) -> Result<(), Refusal> {
        let whose = agent.clone();
        let mut keys = self.read(move |reader| reader.keys_without_object(&whose, epoch, ROWS)).await?;
        // Where the epoch is not past, messages verify by what was signed in it.
        let verifies = |of: &KeyOf, expires: UnixTime| self.ledger.admits(&of.agent, of.epoch).is_ok() && expires > now;
        keys.retain(|key| !key.versions.iter().any(|version| verifies(&key.of, version.expires)));
        // One that is being changed right now is looked at in a later round.
        let mut here = Vec::new();
        keys.retain(|key| {
            let Ok(loaded) = self.keys.loaded.get(&key.of) else { return true };
            let alone = Arc::clone(&loaded.changing).try_lock_owned();
            alone.map(|alone| here.push((loaded, alone))).is_ok()
        });
        if keys.is_empty() {
            return Ok(());
        }
        for (loaded, _) in &here {
            self.ledger.seal_signatures(&loaded.key);
        }
        tracing::info!(%agent, epoch, keys = keys.len(), cause = cause.as_str_name(), "keys of an epoch that is over are forgotten");
        let in_use = here.iter().map(|(loaded, _)| Arc::clone(&loaded.key)).collect();
        self.ledger.forget_keys(&agent, epoch, &keys, cause, in_use).await?;
        for key in keys {
            self.keys.loaded.forget(&key.of);
        }
        Ok(())
    }
}

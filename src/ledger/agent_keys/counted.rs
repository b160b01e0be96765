//! Counted keys: a block of signatures is reserved durably before the first of them is made, the number used is sealed after. What a
//! crash leaves unsealed counts as made: the ledger's sum is never below the token's.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tokio::sync::oneshot;

use crate::model::{KeyId, Reason, Refusal};

use super::super::sequencer::Command;
use super::super::{COMMIT_DEADLINE, Ledger, answered, in_time, unavailable};
use super::commands::KeyCommand;
use super::{AgentKey, KeyVersion};

/// Signatures in a block. The next one is reserved when half of it is used.
const BLOCK: u64 = 4096;

/// Signatures that were taken from a block, and are made or lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Reserved {
    /// The entry that reserved them.
    pub index: u64,
}

/// A block that may be used from.
#[derive(Debug, Clone, Copy)]
pub(in crate::ledger) struct Block {
    pub reservation: u64,
    pub key_id: KeyId,
    pub count: u64,
    pub used: u64,
}

impl Block {
    fn left(&self) -> u64 {
        self.count - self.used
    }
}

#[derive(Default)]
struct Held {
    current: Option<Block>,
    next: Option<Block>,
}

/// The blocks of one key.
#[derive(Default)]
pub(super) struct Blocks {
    held: Mutex<Held>,
    /// One reservation at a time.
    pub(super) reserving: Arc<tokio::sync::Mutex<()>>,
    /// One is under way, or the budget has no more.
    ahead: AtomicBool,
}

impl Blocks {
    fn held(&self) -> MutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What [`Held::take`] found.
struct Taken {
    reserved: Option<Reserved>,
    /// Done with.
    spent: Option<Block>,
    /// Half of the block is used and no other is there.
    low: bool,
}

impl Held {
    fn take(&mut self, count: u64, key_id: KeyId) -> Taken {
        let fits = |block: &Option<Block>| block.is_some_and(|block| block.key_id == key_id && block.left() >= count);
        let mut spent = None;
        if !fits(&self.current) && fits(&self.next) {
            spent = std::mem::replace(&mut self.current, self.next.take());
        }
        if !fits(&self.current) {
            return Taken { reserved: None, spent, low: false };
        }
        let Some(block) = &mut self.current else { return Taken { reserved: None, spent, low: false } };
        block.used += count;
        let low = self.next.is_none() && block.left() < block.count / 2;
        Taken { reserved: Some(Reserved { index: block.reservation }), spent, low }
    }
}

impl Ledger {
    /// `count` signatures of a counted key, taken from a block that is durable. Waits for the disk only where there is none: the next is
    /// reserved ahead of need.
    ///
    /// # Errors
    /// As the agent's standing and the key's state; `KEY_BUDGET_SPENT`, `LEDGER_UNAVAILABLE`.
    pub async fn reserve_signatures(&self, key: &Arc<AgentKey>, version: &KeyVersion, count: u64) -> Result<Reserved, Refusal> {
        // A block that is durable would last for a while yet: what it was used for could not be sealed.
        if !self.is_writable() {
            return Err(unavailable());
        }
        if let Some(reserved) = self.take(key, version.key_id, count) {
            return Ok(reserved);
        }
        let _one = in_time(key.blocks.reserving.lock()).await?;
        // Somebody else's reservation may do.
        if let Some(reserved) = self.take(key, version.key_id, count) {
            return Ok(reserved);
        }
        // What is left in the old blocks goes back to the budget first.
        self.seal_signatures(key);
        let block = self.reserve(key, version.key_id, count, BLOCK.max(count)).await?;
        key.blocks.held().current = Some(Block { used: count, ..block });
        Ok(Reserved { index: block.reservation })
    }

    fn take(&self, key: &Arc<AgentKey>, key_id: KeyId, count: u64) -> Option<Reserved> {
        let Taken { reserved, spent, low } = key.blocks.held().take(count, key_id);
        if let Some(spent) = spent {
            self.seal(key, &spent);
        }
        if low && !key.blocks.ahead.swap(true, Ordering::AcqRel) {
            let (ledger, key) = (self.clone(), Arc::clone(key));
            tokio::spawn(async move { ledger.reserve_ahead(&key, key_id).await });
        }
        reserved
    }

    async fn reserve_ahead(&self, key: &Arc<AgentKey>, key_id: KeyId) {
        let _one = key.blocks.reserving.lock().await;
        if key.newest().is_ok_and(|newest| newest.key_id != key_id) {
            // Rotated meanwhile: nothing is reserved for what signs no more.
            key.blocks.ahead.store(false, Ordering::Release);
            return;
        }
        match self.reserve(key, key_id, 1, BLOCK).await {
            Ok(block) => {
                let before = key.blocks.held().next.replace(block);
                if let Some(before) = before {
                    self.seal(key, &before);
                }
                key.blocks.ahead.store(false, Ordering::Release);
            }
            // Not tried again at every signature: the last block is used up first.
            Err(refusal) if refusal.reason == Reason::KeyBudgetSpent => {}
            Err(refusal) => {
                tracing::debug!(?key, ?refusal, "no block of signatures could be reserved ahead");
                key.blocks.ahead.store(false, Ordering::Release);
            }
        }
    }

    async fn reserve(&self, key: &Arc<AgentKey>, key_id: KeyId, least: u64, most: u64) -> Result<Block, Refusal> {
        if !self.is_writable() {
            return Err(unavailable());
        }
        let (key, ledger) = (Arc::clone(key), self.clone());
        let receiver: oneshot::Receiver<_> =
            ledger.ask(|answer| Command::Key(Box::new(KeyCommand::Reserve { key, key_id, least, most, answer })))?;
        answered(receiver, COMMIT_DEADLINE).await
    }

    /// Seals the open blocks of a key: at its rotation, when it leaves memory, at a quarantine, at the stop. Waits for nothing: a crash
    /// before the entries are durable leaves blocks that count whole.
    pub fn seal_signatures(&self, key: &Arc<AgentKey>) {
        let held = std::mem::take(&mut *key.blocks.held());
        key.blocks.ahead.store(false, Ordering::Release);
        for block in [held.current, held.next].into_iter().flatten() {
            self.seal(key, &block);
        }
    }

    fn seal(&self, key: &Arc<AgentKey>, block: &Block) {
        let mut gate = self.gate();
        if gate.closing {
            return;
        }
        gate.push(Command::Key(Box::new(KeyCommand::Seal { key: Arc::clone(key), block: *block })));
        drop(gate);
        self.wake_for_outcome();
    }
}

impl AgentKey {
    /// Whether blocks of signatures are open.
    #[must_use]
    pub fn has_reserved(&self) -> bool {
        let held = self.blocks.held();
        held.current.is_some() || held.next.is_some()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn block(reservation: u64, count: u64) -> Block {
        Block { reservation, key_id: KeyId([1; 16]), count, used: 0 }
    }

    #[test]
    fn no_more_is_taken_from_a_block_than_it_has_and_the_next_follows_without_a_wait() {
        let mut held = Held { current: Some(block(1, 4)), next: None };
        let key = KeyId([1; 16]);
        assert_eq!(held.take(2, key).reserved, Some(Reserved { index: 1 }));
        assert!(held.take(1, key).low, "less than half is left");
        assert_eq!(held.take(2, key).reserved, None, "one is left");
        held.next = Some(block(2, 4));
        let taken = held.take(2, key);
        assert_eq!(taken.reserved, Some(Reserved { index: 2 }));
        assert_eq!(taken.spent.map(|spent| (spent.reservation, spent.used)), Some((1, 3)));
    }

    #[test]
    fn a_block_is_of_one_version() {
        let mut held = Held { current: Some(block(1, 4)), next: None };
        assert_eq!(held.take(1, KeyId([2; 16])).reserved, None);
    }
}

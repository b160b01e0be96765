//! What the sequencer decides about agents' keys, in order.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use crate::model::{Digest, KeyId, UnixTime};
use crate::proto::{self, entry::Body};

use super::super::intent::Intent;
use super::super::sequencer::{Answer, Batch, refuse};
use super::super::store::Row;
use super::super::{Gate, Ledger, unavailable};
use super::counted::Block;
use super::{AgentKey, Then};
use crate::model::{Reason, Refusal};

pub(in crate::ledger) enum KeyCommand {
    /// An entry that tells of a key, with its rows; for an agent that has to be admitted then, or for an operator.
    Record { body: Box<Body>, rows: Vec<Row>, admitted: Option<(u32, u32)>, then: Then, answer: Answer<u64> },
    /// An intent to sign.
    Sign { key: Arc<AgentKey>, key_id: KeyId, digests: Vec<Vec<u8>>, answer: Answer<Intent> },
    /// At least and at most so many signatures.
    Reserve { key: Arc<AgentKey>, key_id: KeyId, least: u64, most: u64, answer: Answer<Block> },
    /// A block is done with.
    Seal { key: Arc<AgentKey>, block: Block },
}

impl KeyCommand {
    pub(in crate::ledger) fn decide(self, now: UnixTime, ledger: &Ledger, gate: &mut Gate, batch: &mut Batch) {
        match self {
            Self::Record { body, mut rows, admitted, then, answer } => {
                let admits = admitted.map_or(Ok(()), |(slot, epoch)| gate.book.agent(slot).admits(epoch));
                if let Err(refusal) = admits.and_then(|()| wraps(&body, gate)) {
                    return drop(answer.send(Err(refusal)));
                }
                let index = batch.next_index();
                for row in &mut rows {
                    match (row, &*body) {
                        (Row::AgentKey(row), Body::AgentKeyCreated(_) | Body::AgentKeyRotated(_)) => row.2.told_by(index),
                        (Row::AgentKeyVersions(row), Body::AgentKeysRewrapped(told)) => row.1.rewrapped_by(index, &told.versions),
                        _ => {}
                    }
                }
                batch.entry(now, *body);
                batch.rows.extend(rows);
                batch.after.push(Box::new(move |durable| {
                    if durable.is_ok() {
                        then(index);
                    }
                    let _ = answer.send(durable.map(|()| index));
                }));
            }
            Self::Sign { key, key_id, digests, answer } => {
                if let Err(refusal) = admits(&key, digests.len() as u64, ledger, gate) {
                    return refuse(answer, &mut gate.intents, batch, refusal);
                }
                if key.terms.signatures_max > 0 {
                    key.used.fetch_add(digests.len() as u64, Ordering::AcqRel);
                    batch.rows.push(used(&key));
                }
                let tbs = Digest::of(&digests.concat());
                let body = proto::SignIntended {
                    agent: key.of.agent.to_string(),
                    epoch: key.of.epoch,
                    name: key.of.name.to_string(),
                    key_id: key_id.0.to_vec(),
                    profile: key.terms.purpose.into(),
                    digests,
                };
                let index = batch.entry(now, Body::SignIntended(body));
                // Nobody's row: what follows from it is in the key's.
                gate.book.intended(index);
                let standing = Some((key.slot, key.of.epoch));
                let intent = Intent::new(ledger.clone(), index, standing, 0, tbs).of_key(key);
                batch.then(answer, intent);
            }
            Self::Reserve { key, key_id, least, most, answer } => {
                if let Err(refusal) = admits(&key, least, ledger, gate) {
                    return drop(answer.send(Err(refusal)));
                }
                let max = key.terms.signatures_max;
                let count = if max == 0 { most } else { most.min(max - key.used()) };
                key.used.fetch_add(count, Ordering::AcqRel);
                batch.rows.push(used(&key));
                let body = proto::SignaturesReserved {
                    agent: key.of.agent.to_string(),
                    epoch: key.of.epoch,
                    name: key.of.name.to_string(),
                    key_id: key_id.0.to_vec(),
                    count,
                };
                let reservation = batch.entry(now, Body::SignaturesReserved(body));
                let block = Block { reservation, key_id, count, used: 0 };
                batch.after.push(Box::new(move |durable| {
                    let _ = answer.send(durable.map(|()| block));
                    drop(key);
                }));
            }
            Self::Seal { key, block } => {
                key.used.fetch_sub(block.count - block.used, Ordering::AcqRel);
                batch.rows.push(used(&key));
                let body = proto::SignaturesSealed { reservation: block.reservation, used: block.used };
                batch.entry(now, Body::SignaturesSealed(body));
                // Held until its row is durable: it may be read again after that, and not before.
                batch.after.push(Box::new(move |_| drop(key)));
            }
        }
    }

    /// The disk cannot be trusted: nothing more is written.
    pub(in crate::ledger) fn refuse_unwritten(self) {
        match self {
            Self::Record { answer, .. } => drop(answer.send(Err(unavailable()))),
            Self::Sign { answer, .. } => drop(answer.send(Err(unavailable()))),
            Self::Reserve { answer, .. } => drop(answer.send(Err(unavailable()))),
            Self::Seal { .. } => {}
        }
    }
}

/// Nothing comes under a wrapping key that is not the active one: a key that retires has its last row before the next one wraps.
fn wraps(body: &Body, gate: &Gate) -> Result<(), Refusal> {
    let (Body::AgentKeyCreated(proto::AgentKeyCreated { version, .. })
    | Body::AgentKeyRotated(proto::AgentKeyRotated { version, .. })) = body
    else {
        let Body::AgentKeysRewrapped(rewrapped) = body else { return Ok(()) };
        return wraps_now(&rewrapped.wrapping_key_id, gate);
    };
    match version {
        Some(version) if !version.wrapping_key_id.is_empty() => wraps_now(&version.wrapping_key_id, gate),
        _ => Ok(()),
    }
}

fn wraps_now(wrapping: &[u8], gate: &Gate) -> Result<(), Refusal> {
    if gate.book.generations.wraps(wrapping) {
        return Ok(());
    }
    Err(Refusal::new(Reason::AuthoritySuperseded, "another wrapping key is active by now; ask again"))
}

/// Weighed by the clock as it is, as every wish is.
fn admits(key: &AgentKey, count: u64, ledger: &Ledger, gate: &Gate) -> Result<(), Refusal> {
    gate.book.agent(key.slot).admits(key.of.epoch)?;
    key.admits_at(ledger.0.clock.reckoned())?;
    key.has_budget(count)
}

fn used(key: &AgentKey) -> Row {
    Row::AgentKeyUsed(Box::new((key.of.clone(), key.used())))
}

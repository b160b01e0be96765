//! Refusals as entries: of a known identity one each, of strangers (and of floods) counted per second.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::{Mutex, PoisonError};

use crate::model::{AgentId, Reason, Refusal};
use crate::proto::{self, entry::Body};

use super::sequencer::Command;
use super::{COMMIT_DEADLINE, Ledger, answered};

/// Sources counted one by one in a second; the rest share one count.
const SOURCES_MAX: usize = 64;
/// Entries of one agent's refusals in a second.
const PER_AGENT_PER_SECOND: u8 = 5;

/// Refusals not yet sealed: per reason and source.
#[derive(Default)]
pub(super) struct Counts(Mutex<HashMap<(Reason, Option<IpAddr>), u64>>);

impl Counts {
    fn add(&self, reason: Reason, source: Option<IpAddr>) {
        self.add_many(reason, source, 1);
    }

    fn add_many(&self, reason: Reason, source: Option<IpAddr>, more: u64) {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let source = source.filter(|_| counts.len() < SOURCES_MAX || counts.contains_key(&(reason, source)));
        *counts.entry((reason, source)).or_default() += more;
    }

    fn take(&self) -> HashMap<(Reason, Option<IpAddr>), u64> {
        std::mem::take(&mut *self.0.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

impl Ledger {
    /// A stranger was refused.
    pub fn refused_stranger(&self, reason: Reason, source: Option<IpAddr>) {
        self.0.refusals.add(reason, source);
    }

    /// A known agent was refused: an entry, or a count past five a second. Gives the refusal its index.
    pub async fn refused(&self, agent: &AgentId, method: &str, refusal: Refusal) -> Refusal {
        if refusal.entry.is_some() && refusal.reason == Reason::CloneSuspected {
            return refusal;
        }
        let second = self.0.clock.reckoned().seconds();
        let admitted = {
            let mut gate = self.gate();
            match gate.book.slot(agent) {
                None => false,
                Some(slot) => {
                    let agent = &mut gate.book.agents[slot as usize];
                    if agent.refusals.0 != second {
                        agent.refusals = (second, 0);
                    }
                    agent.refusals.1 = agent.refusals.1.saturating_add(1);
                    agent.refusals.1 <= PER_AGENT_PER_SECOND
                }
            }
        };
        // A full disk is kept for quarantines and outcomes: refusals are counted then, and sealed when there is room.
        if !admitted || !self.is_writable() {
            self.0.refusals.add(refusal.reason, None);
            return refusal;
        }
        let body = Body::Refused(proto::Refused {
            agent: agent.to_string(),
            method: method.to_owned(),
            reason: refusal.reason.into(),
            detail: refusal.advice.chars().take(200).collect(),
        });
        let asked = self.ask(|answer| Command::Record { body, rows: Vec::new(), answer: Some(answer) });
        match asked {
            Ok(receiver) => match answered(receiver, COMMIT_DEADLINE).await {
                Ok(index) if refusal.entry.is_none() => refusal.recorded_at(index),
                _ => refusal,
            },
            Err(_) => refusal,
        }
    }

    /// Seals what was counted since the last call into one entry. Called once a second.
    ///
    /// # Errors
    /// `LEDGER_UNAVAILABLE`; the counts are kept for the next call then.
    pub async fn seal_refusals(&self) -> Result<(), Refusal> {
        if !self.is_writable() {
            return Err(super::unavailable());
        }
        let counts = self.0.refusals.take();
        if counts.is_empty() {
            return Ok(());
        }
        let body = Body::RefusalsCounted(proto::RefusalsCounted {
            counts: counts
                .iter()
                .map(|((reason, source), count)| proto::refusals_counted::Count {
                    reason: (*reason).into(),
                    source: source.map_or_else(|| "other".to_owned(), |source| source.to_string()),
                    count: *count,
                })
                .collect(),
        });
        let sealed = self.record(body).await.map(drop);
        if sealed.is_err() {
            for ((reason, source), count) in counts {
                self.0.refusals.add_many(reason, source, count);
            }
        }
        sealed
    }
}

//! From a wish to sign, through a durable intent, to exactly one outcome.

use std::sync::Arc;

use crate::model::{AgentId, Digest, KeyId, PublicKey, Reason, Refusal, Serial, UnixTime};
use crate::proto;

use super::agent::Evidence;
use super::agent_keys::AgentKey;
use super::{Command, Ledger};

/// What is about to be signed, whole.
#[derive(Debug, Clone)]
pub struct Intention {
    /// What it will be.
    pub kind: proto::IntentKind,
    /// The authority key that will sign.
    pub key_id: KeyId,
    /// The to-be-signed DER.
    pub tbs: Arc<[u8]>,
    /// Whose certificate it will be; `None` for the daemon's own.
    pub subject: Option<Subject>,
}

/// The agent's side of an intention.
#[derive(Debug, Clone)]
pub struct Subject {
    /// Who.
    pub agent: AgentId,
    /// In which epoch.
    pub epoch: u32,
    /// On which evidence.
    pub evidence: Evidence,
    /// How long that evidence is fresh.
    pub fresh_until: UnixTime,
    /// The key being certified.
    pub key: PublicKey,
    /// Under which serial.
    pub serial: Serial,
    /// From when.
    pub not_before: UnixTime,
    /// Until when.
    pub not_after: UnixTime,
    /// SHA-256 of the request as received.
    pub request_hash: Digest,
    /// First 16 bytes of SHA-256 of the idempotency key.
    pub idempotency_hash: [u8; 16],
}

/// What became of a wish to sign.
#[derive(Debug)]
pub enum Decided {
    /// It is durable: sign it, once.
    Intent(Intent),
    /// The same request was answered before, under this intent.
    Repeat {
        /// Index of the intent.
        intent: u64,
        /// What the agent has to claim next.
        next_sequence: u64,
    },
}

/// How an intent ends.
#[derive(Debug)]
pub(super) enum Outcome {
    Released(Vec<u8>),
    Withheld(Reason),
    Failed(Reason),
    Unknown(String),
}

/// A durable intent that has not ended. Ends itself when dropped: failed if the token was not asked, unknown if it was.
#[must_use = "an intent has to end in an outcome"]
pub struct Intent {
    ledger: Ledger,
    index: u64,
    slot_epoch: Option<(u32, u32)>,
    sequence: u64,
    tbs: Digest,
    asked: bool,
    ended: bool,
    /// The agent's key that signs, where it is one.
    key: Option<Arc<AgentKey>>,
}

impl std::fmt::Debug for Intent {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Intent({})", self.index)
    }
}

impl Intent {
    pub(super) fn new(ledger: Ledger, index: u64, slot_epoch: Option<(u32, u32)>, sequence: u64, tbs: Digest) -> Self {
        Self { ledger, index, slot_epoch, sequence, tbs, asked: false, ended: false, key: None }
    }

    /// Released only while this key may sign, too.
    pub(super) fn of_key(mut self, key: Arc<AgentKey>) -> Self {
        self.key = Some(key);
        self
    }

    /// Its ledger index.
    #[must_use]
    pub fn index(&self) -> u64 {
        self.index
    }

    /// What the agent has to claim after this one.
    #[must_use]
    pub fn next_sequence(&self) -> u64 {
        self.sequence + 1
    }

    /// Says that the token is about to be asked to sign `tbs`; from here on a lost answer is `unknown`.
    ///
    /// # Errors
    /// When these are not the bytes that were recorded.
    pub fn asking(&mut self, tbs: &[u8]) -> Result<(), Refusal> {
        if Digest::of(tbs) != self.tbs {
            return Err(Refusal::internal("what is to be signed is not what was recorded"));
        }
        self.asked = true;
        Ok(())
    }

    /// The gate. Hands the signature out, unless the agent has been denied meanwhile: then it is withheld for good.
    ///
    /// # Errors
    /// `DENIED_MEANWHILE` when a quarantine came first; `LEDGER_UNAVAILABLE` when issuing is off; `DRAINING`
    /// after the last entry.
    pub fn release(mut self, signature: &[u8]) -> Result<u64, Refusal> {
        self.ended = true;
        let mut gate = self.ledger.gate();
        let admitted = match self.slot_epoch {
            Some((slot, epoch)) => gate.book.agent(slot).admits(epoch),
            None => Ok(()),
        };
        let admitted = admitted.and_then(|()| self.key.as_ref().map_or(Ok(()), |key| key.admits()));
        if self.ledger.has_failed() {
            return Err(Refusal::new(
                Reason::LedgerUnavailable,
                "the ledger cannot be written; ask again when the daemon is back",
            ));
        }
        if gate.closing {
            // The last entry has been queued. The next start closes this intent as unknown.
            return Err(super::draining());
        }
        match admitted {
            Ok(()) => {
                gate.push(Command::Close { intent: self.index, outcome: Outcome::Released(signature.to_vec()) });
                drop(gate);
                self.ledger.wake_for_outcome();
                Ok(self.index)
            }
            Err(refusal) => {
                gate.push(Command::Close { intent: self.index, outcome: Outcome::Withheld(refusal.reason) });
                drop(gate);
                self.ledger.wake_for_outcome();
                Err(Refusal::new(
                    Reason::DeniedMeanwhile,
                    "the agent was denied while this was being signed; nothing was handed out",
                )
                .because(refusal))
            }
        }
    }

    /// The token was not asked, or refused before it could have signed.
    pub fn fail(self, reason: Reason) {
        self.end(Outcome::Failed(reason));
    }

    /// The token may have signed.
    pub fn unknown(self, cause: String) {
        self.end(Outcome::Unknown(cause));
    }

    fn end(mut self, outcome: Outcome) {
        self.ended = true;
        self.ledger.close_intent(self.index, outcome);
    }
}

impl Drop for Intent {
    fn drop(&mut self) {
        if !self.ended {
            let outcome = if self.asked {
                Outcome::Unknown("the act ended without an outcome".to_owned())
            } else {
                Outcome::Failed(Reason::Internal)
            };
            self.ledger.close_intent(self.index, outcome);
        }
    }
}

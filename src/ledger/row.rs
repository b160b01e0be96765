//! An agent's row: its state as of one entry, so that a start need not replay the whole book.

use std::num::NonZeroU64;

use crate::model::{AgentId, Digest, KeyTag, PublicKey, Serial, TokenId, UnixTime};
use crate::proto::QuarantineCause;

use super::agent::{Agent, Asked, Bound, Certified, Ending, Live, Quarantine, Token};

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct AgentRow {
    #[prost(string, tag = "1")]
    id: String,
    #[prost(uint32, tag = "2")]
    epoch: u32,
    #[prost(uint32, tag = "3")]
    ttl_seconds_max: u32,
    #[prost(uint32, tag = "4")]
    rejoin_seconds: u32,
    #[prost(uint64, tag = "5")]
    sequence: u64,
    #[prost(message, optional, tag = "6")]
    token: Option<TokenRow>,
    #[prost(message, optional, tag = "7")]
    quarantine: Option<QuarantineRow>,
    #[prost(message, optional, tag = "8")]
    bound: Option<BoundRow>,
    #[prost(bool, tag = "9")]
    reattest: bool,
    #[prost(uint64, tag = "10")]
    as_of: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct TokenRow {
    #[prost(bytes = "vec", tag = "1")]
    id: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    public_key: Vec<u8>,
    #[prost(uint64, tag = "3")]
    expires_seconds: u64,
    #[prost(bytes = "vec", optional, tag = "4")]
    spent_for: Option<Vec<u8>>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct QuarantineRow {
    #[prost(uint64, tag = "1")]
    index: u64,
    #[prost(enumeration = "QuarantineCause", tag = "2")]
    cause: i32,
    #[prost(string, tag = "3")]
    detail: String,
}

#[derive(Clone, PartialEq, prost::Message)]
struct BoundRow {
    #[prost(message, optional, tag = "1")]
    newest: Option<CertifiedRow>,
    #[prost(bytes = "vec", optional, tag = "2")]
    previous: Option<Vec<u8>>,
    #[prost(message, optional, tag = "3")]
    asked: Option<AskedRow>,
    #[prost(message, repeated, tag = "4")]
    live: Vec<LiveRow>,
}

#[derive(Clone, PartialEq, prost::Message)]
struct CertifiedRow {
    #[prost(bytes = "vec", tag = "1")]
    point: Vec<u8>,
    #[prost(uint64, tag = "2")]
    not_after_seconds: u64,
}

#[derive(Clone, PartialEq, prost::Message)]
struct AskedRow {
    #[prost(uint64, tag = "1")]
    sequence: u64,
    #[prost(bytes = "vec", tag = "2")]
    point: Vec<u8>,
    #[prost(uint64, tag = "3")]
    not_after_seconds: u64,
    #[prost(bytes = "vec", tag = "4")]
    request_hash: Vec<u8>,
    #[prost(bytes = "vec", tag = "5")]
    idempotency_hash: Vec<u8>,
    #[prost(uint64, tag = "6")]
    intent: u64,
    #[prost(uint32, tag = "7")]
    ending: u32,
}

#[derive(Clone, PartialEq, prost::Message)]
struct LiveRow {
    #[prost(bytes = "vec", tag = "1")]
    serial: Vec<u8>,
    #[prost(bytes = "vec", tag = "2")]
    key: Vec<u8>,
    #[prost(uint64, tag = "3")]
    not_after_seconds: u64,
    #[prost(uint32, tag = "4")]
    epoch: u32,
    #[prost(uint64, tag = "5")]
    intent: u64,
    #[prost(uint64, optional, tag = "6")]
    denied_micros: Option<u64>,
}

impl From<&Agent> for AgentRow {
    fn from(agent: &Agent) -> Self {
        Self {
            id: agent.id.as_str().to_owned(),
            epoch: agent.epoch,
            ttl_seconds_max: agent.ttl_seconds_max,
            rejoin_seconds: agent.rejoin_seconds,
            sequence: agent.sequence,
            token: agent.token.as_deref().map(|token| TokenRow {
                id: token.id.0.to_vec(),
                public_key: token.public_key.to_vec(),
                expires_seconds: token.expires.seconds(),
                spent_for: token.spent_for.map(|key| key.0.to_vec()),
            }),
            // A denial that is not an entry yet is no part of the row: the ledger could not account for it.
            quarantine: agent.quarantine.as_deref().and_then(|quarantine| {
                quarantine.index.map(|index| QuarantineRow {
                    index,
                    cause: quarantine.cause.into(),
                    detail: quarantine.detail.clone(),
                })
            }),
            bound: agent.bound.as_deref().map(BoundRow::from),
            reattest: agent.reattest,
            as_of: agent.as_of,
        }
    }
}

impl From<&Bound> for BoundRow {
    fn from(bound: &Bound) -> Self {
        Self {
            newest: bound
                .newest
                .as_ref()
                .map(|newest| CertifiedRow { point: newest.key.raw().to_vec(), not_after_seconds: newest.not_after.seconds() }),
            previous: bound.previous.as_ref().map(|key| key.raw().to_vec()),
            asked: bound.asked.as_ref().map(|asked| AskedRow {
                sequence: asked.sequence,
                point: asked.key.raw().to_vec(),
                not_after_seconds: asked.not_after.seconds(),
                request_hash: asked.request_hash.0.to_vec(),
                idempotency_hash: asked.idempotency_hash.to_vec(),
                intent: asked.intent,
                ending: match asked.ending {
                    Ending::Pending => 0,
                    Ending::Released => 1,
                    Ending::Unknown => 2,
                    Ending::Nothing => 3,
                },
            }),
            live: bound
                .live
                .iter()
                .map(|live| LiveRow {
                    serial: live.serial.0.to_vec(),
                    key: live.key.0.to_vec(),
                    not_after_seconds: live.not_after.seconds(),
                    epoch: live.epoch,
                    intent: live.intent,
                    denied_micros: live.denied.map(NonZeroU64::get),
                })
                .collect(),
        }
    }
}

impl AgentRow {
    /// Back to the state; `None` if the row breaks a rule (then the file was tampered with or is damaged).
    pub(super) fn restore(self) -> Option<Agent> {
        let token = match self.token {
            Some(row) => Some(Box::new(Token {
                id: TokenId::from_slice(&row.id)?,
                public_key: row.public_key.try_into().ok()?,
                expires: UnixTime::from_seconds(row.expires_seconds),
                spent_for: match row.spent_for {
                    Some(key) => Some(Digest::from_slice(&key)?),
                    None => None,
                },
            })),
            None => None,
        };
        let bound = match self.bound {
            Some(row) => Some(Box::new(row.restore()?)),
            None => None,
        };
        Some(Agent {
            id: AgentId::parse(&self.id).ok()?,
            epoch: self.epoch,
            ttl_seconds_max: self.ttl_seconds_max,
            rejoin_seconds: self.rejoin_seconds,
            sequence: self.sequence,
            token,
            quarantine: self
                .quarantine
                .map(|row| Box::new(Quarantine { index: Some(row.index), cause: row.cause(), detail: row.detail })),
            bound,
            reattest: self.reattest,
            as_of: self.as_of,
            denials: 0,
            dirty: false,
            refusals: (0, 0),
        })
    }
}

impl BoundRow {
    fn restore(self) -> Option<Bound> {
        let point = |raw: &[u8]| PublicKey::stored_p256(raw);
        let newest = match self.newest {
            Some(row) => Some(Certified { key: point(&row.point)?, not_after: UnixTime::from_seconds(row.not_after_seconds) }),
            None => None,
        };
        let previous = match self.previous {
            Some(raw) => Some(point(&raw)?),
            None => None,
        };
        let asked = match self.asked {
            Some(row) => Some(Asked {
                sequence: row.sequence,
                key: point(&row.point)?,
                not_after: UnixTime::from_seconds(row.not_after_seconds),
                request_hash: Digest::from_slice(&row.request_hash)?,
                idempotency_hash: row.idempotency_hash.try_into().ok()?,
                intent: row.intent,
                ending: match row.ending {
                    0 => Ending::Pending,
                    1 => Ending::Released,
                    2 => Ending::Unknown,
                    3 => Ending::Nothing,
                    _ => return None,
                },
            }),
            None => None,
        };
        let live = self.live.into_iter().map(LiveRow::restore).collect::<Option<Vec<_>>>()?;
        Some(Bound { newest, previous, asked, live })
    }
}

impl LiveRow {
    fn restore(self) -> Option<Live> {
        Some(Live {
            serial: Serial::from_slice(&self.serial)?,
            // Rows of schema 1 hold the whole digest.
            key: KeyTag::from_slice(self.key.get(..16)?)?,
            not_after: UnixTime::from_seconds(self.not_after_seconds),
            epoch: self.epoch,
            intent: self.intent,
            denied: self.denied_micros.and_then(NonZeroU64::new),
        })
    }
}

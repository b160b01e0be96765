//! What a key's standing costs to look at: the gate and memory alone, in this process, with a ledger of its own.

use std::path::Path;
use std::sync::Arc;
use std::time::Instant;

use super::Failed;
use crate::formats::Jwk;
use crate::ledger::{self, KeyOf, KeyTerms, KeyVersion, Ledger, Settings, Token};
use crate::model::{AgentId, Algorithm, KeyId, KeyName, Meter, PublicKey, TokenId, TrustDomain};
use crate::proto::{self, KeyAccounting, KeyAlgorithm, KeyPurpose, KeyStorage};

/// Agents that are in the book besides.
const AGENTS: usize = 1000;
const LOOKS: u32 = 1_000_000;

/// Nanoseconds of one look.
pub(super) async fn check_ns(work: &Path) -> Result<f64, Failed> {
    let dir = work.join(format!("standing-{}", std::process::id()));
    let measured = measure(&dir).await;
    let _ = std::fs::remove_dir_all(&dir);
    measured
}

async fn measure(dir: &Path) -> Result<f64, Failed> {
    let settings =
        Settings { state: dir.join("state"), runtime: dir.to_path_buf(), queue_max: 64, live_max: 8, forget_seconds: 3600 };
    ledger::create(&settings.state, &TrustDomain::parse("bench.example")?, [0; 16])?;
    let ledger = Ledger::open(&settings, Arc::new(Meter::default()))?.ledger;
    let limits = proto::Limits { ttl_seconds_max: 600, rejoin_seconds: 0 };
    for number in 0..AGENTS {
        let token = Token {
            id: TokenId::random(),
            public_key: [7; 32],
            expires: ledger.clock().reckoned().plus_seconds(600),
            spent_for: None,
        };
        ledger.enrol(&AgentId::parse(&format!("bench/{number}"))?, limits, proto::Operator::default(), token).await?;
    }
    let pair = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256)?;
    let public = PublicKey::from_raw(Algorithm::P256, rcgen::PublicKeyData::der_bytes(&pair))?;
    let version = KeyVersion {
        number: 1,
        key_id: KeyId::random(),
        kid: Jwk::thumbprint(&public).into(),
        public,
        storage: KeyStorage::Session,
        wrapped: None,
        wrapped_before: Vec::new(),
        expires: ledger.clock().reckoned().plus_seconds(600),
        told_by: None,
        rewrapped_by: None,
    };
    let terms = KeyTerms {
        purpose: KeyPurpose::RawDigest,
        algorithm: KeyAlgorithm::P256,
        storage_asked: KeyStorage::Session,
        accounting: KeyAccounting::Recorded,
        signatures_max: 0,
        ttl_seconds: 600,
    };
    let of = KeyOf { agent: AgentId::parse("bench/500")?, epoch: 1, name: KeyName::parse("a")? };
    let (_, key) = ledger.create_key(of, terms, version, ()).await?;
    let from = Instant::now();
    for _ in 0..LOOKS {
        ledger.admits_key(std::hint::black_box(&key))?;
    }
    let took = from.elapsed();
    ledger.finish(std::time::Duration::from_secs(5)).await;
    Ok(took.as_secs_f64() * 1e9 / f64::from(LOOKS))
}

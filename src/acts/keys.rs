//! HSM keys are made in two phases, so that a crash between them leaves nothing that nobody knows of.

use std::collections::{BTreeMap, BTreeSet};

use crate::hsm::{Hsm, SigningKey};
use crate::ledger::{KeyRow, Ledger, StoreError};
use crate::model::{Algorithm, KeyId, PublicKey, Refusal};
use crate::proto::{self, AuthorityState, KeyAlgorithm, Purpose, TokenRole, entry::Body};

use super::hsm_refusal;
use super::label::label;

/// The two tokens, by role. One for both is allowed: then they are the same.
#[derive(Clone)]
pub struct Tokens {
    /// Root, issuing, token-signing, ledger and canary keys.
    pub authority: Hsm,
    /// Agents' keys, and a canary of its own where it is another token.
    pub agents: Hsm,
    /// Whether both are one.
    pub shared: bool,
}

impl Tokens {
    pub(super) fn of(&self, role: TokenRole) -> &Hsm {
        match role {
            TokenRole::Agents => &self.agents,
            TokenRole::Authority | TokenRole::Unspecified => &self.authority,
        }
    }
}

/// Puts key intents in order that were left open, by a crash or by a token that went away: whatever objects they made are destroyed (nobody
/// has used them), and the intent is abandoned. Only objects of our own open intents are ever destroyed unasked, and what is open the entries
/// say: a row that says so alone is told, and left. Gives how many there were.
/// For a time when nobody makes keys: one that is being made has an open intent, too. Agents' keys that ended before a crash, and whose objects
/// are there yet, are the round's (`key/over.rs`): what is looked up for them may be far back.
///
/// # Errors
/// When the token or the ledger is not available.
pub async fn reconcile(ledger: &Ledger, tokens: &Tokens) -> Result<usize, Refusal> {
    let mut abandoned = 0;
    let open = rows(ledger).await?.into_iter().filter(|row| !row.active).map(|row| row.id).collect();
    for (id, intent) in open_intents(ledger, open).await? {
        give_up_intended(ledger, tokens, id, &intent).await?;
        abandoned += 1;
    }
    Ok(abandoned)
}

/// A key whose making was interrupted: nobody has used what there is of it.
///
/// # Errors
/// `KEY_NOT_AS_RECORDED`: its row alone says so, and nothing is destroyed; `HSM_UNAVAILABLE`, `LEDGER_UNAVAILABLE`.
pub(super) async fn give_up(ledger: &Ledger, tokens: &Tokens, row: &KeyRow) -> Result<(), Refusal> {
    let intent = open_intents(ledger, vec![row.id]).await?.remove(&row.id).ok_or_else(|| ledger.unread(not_intended(row.id)))?;
    give_up_intended(ledger, tokens, row.id, &intent).await
}

async fn give_up_intended(ledger: &Ledger, tokens: &Tokens, id: KeyId, intent: &proto::KeyIntended) -> Result<(), Refusal> {
    let destroyed = tokens.of(intent.token()).destroy(id).await.map_err(hsm_refusal)?;
    abandon(ledger, id, "its making was interrupted", destroyed).await
}

/// Of keys that rows call intended those that were, and never entered: what there is of them may be destroyed. The others are told.
pub(super) async fn open_intents(ledger: &Ledger, keys: Vec<KeyId>) -> Result<BTreeMap<KeyId, proto::KeyIntended>, Refusal> {
    if keys.is_empty() {
        return Ok(BTreeMap::new());
    }
    let (size, _) = ledger.edge().await?;
    let (reader, sought) = (ledger.clone(), keys.clone());
    let found = tokio::task::spawn_blocking(move || reader.reader().open_key_intents(&sought, size)).await;
    let found = found.map_err(Refusal::internal)?.map_err(Refusal::internal)?;
    for odd in keys.into_iter().filter(|key| !found.contains_key(key)) {
        let _told = ledger.unread(not_intended(odd));
    }
    Ok(found)
}

fn not_intended(key: KeyId) -> StoreError {
    StoreError::NotAsRecorded(format!("key {key} is not one in the making, as its row says"))
}

/// Of keys that rows call ended those that have: their objects may be destroyed. The others are told.
pub(super) async fn ended(ledger: &Ledger, keys: Vec<KeyId>) -> Result<BTreeSet<KeyId>, Refusal> {
    if keys.is_empty() {
        return Ok(BTreeSet::new());
    }
    let (size, _) = ledger.edge().await?;
    let (reader, sought) = (ledger.clone(), keys.clone());
    let found = tokio::task::spawn_blocking(move || reader.reader().ended_keys(&sought, size)).await;
    let found = found.map_err(Refusal::internal)?.map_err(Refusal::internal)?;
    // One whose object has gone meanwhile has no row any more.
    let still = being_destroyed(ledger).await?;
    for odd in keys.into_iter().filter(|key| !found.contains(key) && still.contains(key)) {
        let _told = ledger.unread(StoreError::NotAsRecorded(format!("key {odd} has not ended, as its row says")));
    }
    Ok(found)
}

/// Agents' resident keys that have ended by their rows, and whose objects may be there yet.
pub(super) async fn being_destroyed(ledger: &Ledger) -> Result<Vec<KeyId>, Refusal> {
    let ledger = ledger.clone();
    let read = tokio::task::spawn_blocking(move || ledger.reader().keys_being_destroyed()).await;
    read.map_err(Refusal::internal)?.map_err(Refusal::internal)
}

pub(super) async fn abandon(ledger: &Ledger, id: KeyId, cause: &str, objects_destroyed: u32) -> Result<(), Refusal> {
    tracing::warn!(key = %id, cause, objects_destroyed, "a key that was never used is given up");
    let body = proto::KeyAbandoned { key_id: id.0.to_vec(), cause: cause.to_owned(), objects_destroyed };
    ledger.record(Body::KeyAbandoned(body)).await.map(drop)
}

/// The keys of the ledger that are being made or are there.
pub(super) async fn rows(ledger: &Ledger) -> Result<Vec<KeyRow>, Refusal> {
    let ledger = ledger.clone();
    tokio::task::spawn_blocking(move || ledger.reader().keys()).await.map_err(Refusal::internal)?.map_err(Refusal::internal)
}

/// The key of a purpose, the active one if there are several; made now if there is none: for `init`.
pub(super) async fn ensure(ledger: &Ledger, tokens: &Tokens, purpose: Purpose, role: TokenRole) -> Result<SigningKey, Refusal> {
    let (generations, _) = ledger.generations();
    let active = generations.iter().find(|found| found.purpose == purpose && found.state == AuthorityState::Active);
    let is_it = |row: &KeyRow| row.purpose == purpose && row.token == role && active.is_none_or(|active| active.key_id == row.id);
    let known = rows(ledger).await?.into_iter().find(is_it);
    let (id, public) = match known {
        Some(KeyRow { id, public: Some(public), .. }) => (id, public),
        _ => {
            let id = KeyId::random();
            (id, make(ledger, tokens, purpose, role, id).await?)
        }
    };
    tokens.of(role).key(id, public).await.map_err(hsm_refusal)
}

/// A new key under an id that nothing was ever made under.
pub(super) async fn make(
    ledger: &Ledger,
    tokens: &Tokens,
    purpose: Purpose,
    role: TokenRole,
    id: KeyId,
) -> Result<PublicKey, Refusal> {
    let hsm = tokens.of(role);
    // Ed25519 for checkpoints where the token has it (C2SP signed-note type 0x01); JWT and WIT-SVID rule it out elsewhere.
    let ed25519 = purpose == Purpose::Ledger && hsm.capabilities().ed25519;
    let (algorithm, named) =
        if ed25519 { (Algorithm::Ed25519, KeyAlgorithm::Ed25519) } else { (Algorithm::P256, KeyAlgorithm::P256) };
    let intent =
        proto::KeyIntended { key_id: id.0.to_vec(), purpose: purpose.into(), algorithm: named.into(), token: role.into() };
    ledger.record(Body::KeyIntended(intent)).await?;
    // A crash from here on leaves objects with this id, which the next start destroys.
    let public = match hsm.generate(id, algorithm, &label(purpose, ledger.deployment(), id)).await {
        Ok(public) => public,
        Err(error) => {
            let destroyed = hsm.destroy(id).await.map_err(hsm_refusal)?;
            abandon(ledger, id, "the token could not make it", destroyed).await?;
            return Err(hsm_refusal(error));
        }
    };
    let active = proto::KeyActivated { key_id: id.0.to_vec(), spki: public.spki().to_vec() };
    ledger.record(Body::KeyActivated(active)).await?;
    Ok(public)
}

/// The key that agents' keys are wrapped under: the active generation, or the first, made now; `None` where the token cannot wrap. One that
/// an earlier keyward made, or whose making a crash cut off from its first entry as a generation, is taken up as the first.
pub(super) async fn ensure_wrapping(ledger: &Ledger, tokens: &Tokens) -> Result<Option<KeyId>, Refusal> {
    if !tokens.agents.capabilities().wrapped_keys {
        return Ok(None);
    }
    let (mut generations, _) = ledger.generations();
    generations.retain(|found| found.purpose == Purpose::Wrapping);
    if !generations.is_empty() {
        return Ok(generations.iter().find(|found| found.state == AuthorityState::Active).map(|active| active.key_id));
    }
    let made = rows(ledger).await?.into_iter().find(|row| row.purpose == Purpose::Wrapping && row.active);
    let id = match made {
        Some(row) => row.id,
        None => {
            let id = KeyId::random();
            make_wrapping(ledger, tokens, id).await?;
            id
        }
    };
    let first = proto::AuthorityActivated { purpose: Purpose::Wrapping.into(), key_id: id.0.to_vec(), ..Default::default() };
    ledger.record(Body::AuthorityActivated(first)).await?;
    Ok(Some(id))
}

/// A new wrapping key under an id that nothing was ever made under.
pub(super) async fn make_wrapping(ledger: &Ledger, tokens: &Tokens, id: KeyId) -> Result<(), Refusal> {
    let intent = proto::KeyIntended {
        key_id: id.0.to_vec(),
        purpose: Purpose::Wrapping.into(),
        algorithm: KeyAlgorithm::Unspecified.into(),
        token: TokenRole::Agents.into(),
    };
    ledger.record(Body::KeyIntended(intent)).await?;
    // A crash from here on leaves an object with this id, which the next start destroys.
    let label = label(Purpose::Wrapping, ledger.deployment(), id);
    if let Err(error) = tokens.agents.generate_wrapping(id, &label).await {
        let destroyed = tokens.agents.destroy(id).await.map_err(hsm_refusal)?;
        abandon(ledger, id, "the token could not make it", destroyed).await?;
        return Err(hsm_refusal(error));
    }
    // It has no public half.
    ledger.record(Body::KeyActivated(proto::KeyActivated { key_id: id.0.to_vec(), spki: Vec::new() })).await.map(drop)
}

/// Which token a purpose's keys are in.
pub(super) fn role_of(purpose: Purpose) -> TokenRole {
    if purpose == Purpose::Wrapping { TokenRole::Agents } else { TokenRole::Authority }
}

/// What a purpose is called in labels, refusals and logs.
pub(super) fn name(purpose: Purpose) -> &'static str {
    match purpose {
        Purpose::Root => "root",
        Purpose::Issuing => "issuing",
        Purpose::Ledger => "ledger",
        Purpose::Canary => "canary",
        Purpose::TokenSigning => "token-signing",
        Purpose::Wrapping => "wrapping",
        Purpose::Agent => "agent",
        Purpose::Unspecified => "key",
    }
}

/// From now on the tokens' health is that of their canaries.
pub(super) async fn set_canaries(tokens: &Tokens, rows: &[KeyRow]) -> Result<(), Refusal> {
    let canary = async |role: TokenRole| {
        let found = rows.iter().find(|row| row.purpose == Purpose::Canary && row.token == role);
        match found.and_then(|row| Some((row.id, row.public.clone()?))) {
            Some((id, public)) => {
                let hsm = tokens.of(role);
                hsm.set_canary(hsm.key(id, public).await.map_err(hsm_refusal)?);
                Ok(true)
            }
            None => Ok(false),
        }
    };
    if !canary(TokenRole::Authority).await? {
        return Err(Refusal::internal("the ledger knows no canary key: run `keyward init`"));
    }
    if !tokens.shared {
        canary(TokenRole::Agents).await?;
    }
    Ok(())
}

//! HSM keys are made in two phases, so that a crash between them leaves nothing that nobody knows of.

use crate::hsm::{Hsm, SigningKey};
use crate::ledger::{KeyRow, Ledger};
use crate::model::{Algorithm, KeyId, PublicKey, Refusal, hex};
use crate::proto::{self, KeyAlgorithm, KeyStorage, Purpose, TokenRole, entry::Body};

use super::hsm_refusal;

/// The two tokens, by role. One for both is allowed: then they are the same.
#[derive(Clone)]
pub struct Tokens {
    /// Root, issuing, ledger and canary keys.
    pub authority: Hsm,
    /// Agents' keys, and a canary of its own where it is another token.
    pub agents: Hsm,
    /// Whether both are one.
    pub shared: bool,
}

impl Tokens {
    fn of(&self, role: TokenRole) -> &Hsm {
        match role {
            TokenRole::Agents => &self.agents,
            TokenRole::Authority | TokenRole::Unspecified => &self.authority,
        }
    }
}

/// The keys in use, each looked up once and bound to its pinned public key.
#[derive(Clone)]
pub struct Keys {
    /// Signs issuing certificates; absent with an outside root.
    pub root: Option<SigningKey>,
    /// Signs everything an agent gets.
    pub issuing: SigningKey,
    /// Signs checkpoints.
    pub ledger: SigningKey,
}

/// Puts key intents in order that a crash left open: whatever objects they made are destroyed (nobody has used them), and the intent
/// is abandoned. Only objects of our own open intents are ever destroyed unasked. Gives how many there were.
///
/// # Errors
/// When the token or the ledger is not available.
pub async fn reconcile(ledger: &Ledger, tokens: &Tokens) -> Result<usize, Refusal> {
    let mut abandoned = 0;
    for row in rows(ledger).await?.into_iter().filter(|row| !row.active) {
        let destroyed = tokens.of(row.token).destroy(row.id).await.map_err(hsm_refusal)?;
        abandon(ledger, row.id, "open when the daemon started", destroyed).await?;
        abandoned += 1;
    }
    for id in being_destroyed(ledger).await? {
        // An agent's resident key whose end was recorded: a crash came before the object was gone.
        // By its label it has to be an agent's: no row makes the daemon destroy an authority's.
        tokens.agents.destroy_agent_key(id, KeyStorage::Resident).await.map_err(hsm_refusal)?;
        ledger.key_object_destroyed(id).await?;
    }
    Ok(abandoned)
}

async fn being_destroyed(ledger: &Ledger) -> Result<Vec<KeyId>, Refusal> {
    let ledger = ledger.clone();
    let read = tokio::task::spawn_blocking(move || ledger.reader().keys_being_destroyed()).await;
    read.map_err(Refusal::internal)?.map_err(Refusal::internal)
}

pub(super) async fn abandon(ledger: &Ledger, id: KeyId, cause: &str, objects_destroyed: u32) -> Result<(), Refusal> {
    tracing::warn!(key = %id, cause, objects_destroyed, "a key that was never used is given up");
    let body = proto::KeyAbandoned { key_id: id.0.to_vec(), cause: cause.to_owned(), objects_destroyed };
    ledger.record(Body::KeyAbandoned(body)).await.map(drop)
}

async fn rows(ledger: &Ledger) -> Result<Vec<KeyRow>, Refusal> {
    let ledger = ledger.clone();
    tokio::task::spawn_blocking(move || ledger.reader().keys()).await.map_err(Refusal::internal)?.map_err(Refusal::internal)
}

/// The active key of a purpose, made now if there is none.
pub(super) async fn ensure(ledger: &Ledger, tokens: &Tokens, purpose: Purpose, role: TokenRole) -> Result<SigningKey, Refusal> {
    let hsm = tokens.of(role);
    let known = rows(ledger).await?.into_iter().find(|row| row.purpose == purpose && row.token == role);
    if let Some(KeyRow { id, public: Some(public), .. }) = known {
        return hsm.key(id, public).await.map_err(hsm_refusal);
    }
    let id = KeyId::random();
    // Ed25519 for checkpoints where the token has it (C2SP signed-note type 0x01); JWT and WIT-SVID rule it out elsewhere.
    let ed25519 = purpose == Purpose::Ledger && hsm.capabilities().ed25519;
    let (algorithm, named) =
        if ed25519 { (Algorithm::Ed25519, KeyAlgorithm::Ed25519) } else { (Algorithm::P256, KeyAlgorithm::P256) };
    let intent =
        proto::KeyIntended { key_id: id.0.to_vec(), purpose: purpose.into(), algorithm: named.into(), token: role.into() };
    ledger.record(Body::KeyIntended(intent)).await?;
    // A crash from here on leaves objects with this id, which the next start destroys.
    let label = format!("keyward/{}/{}", name(purpose), hex(&id.0[..4]));
    let public = match hsm.generate(id, algorithm, &label).await {
        Ok(public) => public,
        Err(error) => {
            let destroyed = hsm.destroy(id).await.map_err(hsm_refusal)?;
            abandon(ledger, id, "the token could not make it", destroyed).await?;
            return Err(hsm_refusal(error));
        }
    };
    let active = proto::KeyActivated { key_id: id.0.to_vec(), spki: public.spki().to_vec() };
    ledger.record(Body::KeyActivated(active)).await?;
    hsm.key(id, public).await.map_err(hsm_refusal)
}

/// The key that agents' keys are wrapped under, made now if there is none; `None` where the token cannot wrap.
///
/// # Errors
/// When the token or the ledger is not available.
pub async fn ensure_wrapping(ledger: &Ledger, tokens: &Tokens) -> Result<Option<KeyId>, Refusal> {
    if !tokens.agents.capabilities().wrapped_keys {
        return Ok(None);
    }
    let known = rows(ledger).await?.into_iter().find(|row| row.purpose == Purpose::Wrapping && row.active);
    if let Some(row) = known {
        return Ok(Some(row.id));
    }
    let id = KeyId::random();
    let intent = proto::KeyIntended {
        key_id: id.0.to_vec(),
        purpose: Purpose::Wrapping.into(),
        algorithm: KeyAlgorithm::Unspecified.into(),
        token: TokenRole::Agents.into(),
    };
    ledger.record(Body::KeyIntended(intent)).await?;
    // A crash from here on leaves an object with this id, which the next start destroys.
    let label = format!("keyward/{}/{}", name(Purpose::Wrapping), hex(&id.0[..4]));
    if let Err(error) = tokens.agents.generate_wrapping(id, &label).await {
        let destroyed = tokens.agents.destroy(id).await.map_err(hsm_refusal)?;
        abandon(ledger, id, "the token could not make it", destroyed).await?;
        return Err(hsm_refusal(error));
    }
    // It has no public half.
    ledger.record(Body::KeyActivated(proto::KeyActivated { key_id: id.0.to_vec(), spki: Vec::new() })).await?;
    Ok(Some(id))
}

fn name(purpose: Purpose) -> &'static str {
    match purpose {
        Purpose::Root => "root",
        Purpose::Issuing => "issuing",
        Purpose::Ledger => "ledger",
        Purpose::Canary => "canary",
        Purpose::Wrapping => "wrapping",
        Purpose::Agent => "agent",
        Purpose::Unspecified => "key",
    }
}

impl Keys {
    /// Binds the active keys, and sets the canaries that health goes by.
    ///
    /// # Errors
    /// When the ledger knows no such key (`keyward init` did not finish), or the token does not have it.
    pub async fn bind(ledger: &Ledger, tokens: &Tokens) -> Result<Self, Refusal> {
        let rows = rows(ledger).await?;
        let pinned = |purpose: Purpose, role: TokenRole| -> Option<(KeyId, PublicKey)> {
            rows.iter()
                .find(|row| row.purpose == purpose && row.token == role)
                .and_then(|row| Some((row.id, row.public.clone()?)))
        };
        let required = |purpose: Purpose| {
            pinned(purpose, TokenRole::Authority)
                .ok_or_else(|| Refusal::internal(format!("the ledger knows no {} key: run `keyward init`", name(purpose))))
        };
        let bind = async |hsm: &Hsm, (id, public): (KeyId, PublicKey)| hsm.key(id, public).await.map_err(hsm_refusal);
        let root = match pinned(Purpose::Root, TokenRole::Authority) {
            Some(found) => Some(bind(&tokens.authority, found).await?),
            None => None,
        };
        let issuing = bind(&tokens.authority, required(Purpose::Issuing)?).await?;
        let ledger_key = bind(&tokens.authority, required(Purpose::Ledger)?).await?;
        tokens.authority.set_canary(bind(&tokens.authority, required(Purpose::Canary)?).await?);
        if !tokens.shared
            && let Some(found) = pinned(Purpose::Canary, TokenRole::Agents)
        {
            tokens.agents.set_canary(bind(&tokens.agents, found).await?);
        }
        Ok(Self { root, issuing, ledger: ledger_key })
    }
}

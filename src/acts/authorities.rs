//! The authorities in force, and the bundle that peers trust.

use std::collections::BTreeMap;
use std::sync::Arc;

use rustls::pki_types::CertificateDer;

use crate::hsm::SigningKey;
use crate::ledger::{Generation, KeyRow, Ledger};
use crate::model::{KeyId, PublicKey, Refusal, UnixTime};
use crate::proto::{self, AuthorityState as State, Purpose};

use super::certificate::Authority;
use super::keys::{self, Tokens};
use super::{certify, due, hsm_refusal};

/// How long a peer may keep a bundle before it asks again, in seconds.
pub(super) const REFRESH_HINT_SECONDS: u32 = 300;

/// What signs, and under what it is trusted: the generations of the ledger that are trusted, each bound to its key.
pub struct Authorities {
    tokens: Tokens,
    generations: Vec<Generation>,
    keys: BTreeMap<KeyId, SigningKey>,
    /// Trusted, not active, and not bound: the token could not find them when it was asked. Of a token-signing key what its entry says is kept.
    missing: BTreeMap<KeyId, Option<PublicKey>>,
    /// Of all trusted issuing authorities, the active one first.
    issuing: Vec<Arc<Authority>>,
    /// From when until when the active issuing authority and its root both are.
    in_force: Option<(UnixTime, UnixTime)>,
    /// None with an outside root.
    root: Option<Arc<Authority>>,
    /// The active one first, then those that it follows.
    ledger_keys: Vec<SigningKey>,
    bundle: proto::Bundle,
}

impl Authorities {
    /// From what the ledger says. Keys that `before` has bound are taken from it.
    ///
    /// # Errors
    /// When `keyward init` has not finished, or the token does not have a key that is active.
    pub async fn load(ledger: &Ledger, tokens: Tokens, before: Option<&Self>) -> Result<Self, Refusal> {
        let (generations, sequence) = ledger.generations();
        let rows = keys::rows(ledger).await?;
        if before.is_none() {
            keys::set_canaries(&tokens, &rows).await?;
        }
        let (mut keys, mut missing) = (BTreeMap::<_, SigningKey>::new(), BTreeMap::new());
        // A wrapping key signs nothing: agents' keys find it by its id.
        let signs = |found: &&Generation| found.is_trusted() && !found.is_outside() && found.purpose != Purpose::Wrapping;
        for generation in generations.iter().filter(signs) {
            let bound = before.and_then(|before| before.keys.get(&generation.key_id).cloned());
            let bound = match bound {
                Some(bound) => Ok(bound),
                None => bind(&tokens, &rows, generation).await,
            };
            match bound {
                Ok(key) => drop(keys.insert(generation.key_id, key)),
                Err(refusal) if generation.state == State::Active => return Err(refusal),
                // What it still had to sign stays as it is; the others are not to wait for it. It is asked for again.
                Err(refusal) => {
                    let told = match before.and_then(|before| before.missing.get(&generation.key_id)) {
                        Some(told) => told.clone(),
                        None => {
                            tracing::error!(key = %generation.key_id, ?refusal, "a key that is not active cannot be used");
                            recorded(ledger, generation).await?
                        }
                    };
                    missing.insert(generation.key_id, told);
                }
            }
        }
        let unfinished =
            || Refusal::internal("`keyward init` has not finished: run it, or give it the certificates of the outside root");
        let sorted = |purpose| in_order(&generations, purpose);
        let authority = |found: &Generation| match keys.get(&found.key_id) {
            Some(key) => Authority::new(key.clone(), found.certificate.clone()).map(Arc::new).map(Some),
            None => Ok(None),
        };
        let mut issuing = Vec::new();
        for found in sorted(Purpose::Issuing) {
            issuing.extend(authority(found)?);
        }
        if sorted(Purpose::Issuing).first().is_none_or(|first| first.state != State::Active) {
            return Err(unfinished());
        }
        let roots = sorted(Purpose::Root);
        let active_root = roots.first().filter(|root| root.state == State::Active).ok_or_else(unfinished)?;
        let root = authority(active_root)?;
        // One to come vouches for nothing yet, but in the checkpoint that it comes into service with.
        let signing = sorted(Purpose::Ledger).into_iter().filter(|found| found.state != State::Prepublished);
        let ledger_keys: Vec<_> = signing.filter_map(|found| keys.get(&found.key_id).cloned()).collect();
        if sorted(Purpose::Ledger).first().is_none_or(|first| first.state != State::Active) {
            return Err(unfinished());
        }
        // What a key signed before it was lost is trusted still. By no row: a public key in there may be anybody's.
        let public = |found: &Generation| match keys.get(&found.key_id) {
            Some(key) => Some(key.public().clone()),
            None => missing.get(&found.key_id)?.clone(),
        };
        let token_signing = sorted(Purpose::TokenSigning).into_iter().filter_map(public);
        let bundle = proto::Bundle {
            authorities: roots.iter().map(|root| root.certificate.clone()).collect(),
            sequence,
            refresh_hint_seconds: REFRESH_HINT_SECONDS,
            token_signing_keys: token_signing.map(|key| key.spki().to_vec()).collect(),
        };
        let in_force = in_force(&generations);
        Ok(Self { tokens, generations, keys, missing, issuing, in_force, root, ledger_keys, bundle })
    }

    /// What signs leaves.
    #[must_use]
    pub fn issuing(&self) -> Arc<Authority> {
        Arc::clone(&self.issuing[0])
    }

    /// All issuing authorities that are trusted, each with a CRL of its own; the active one first.
    #[must_use]
    pub fn issuing_trusted(&self) -> &[Arc<Authority>] {
        &self.issuing
    }

    /// What signs the server's own certificate: the newest issuing authority under the oldest root that is in service, so that whoever was
    /// away while a root was replaced still knows the server.
    #[must_use]
    pub fn issuing_for_server(&self) -> Arc<Authority> {
        let mut roots = in_order(&self.generations, Purpose::Root);
        roots.sort_by_key(|root| (root.state != State::Retiring, root.since));
        let newest_under = |root: &&Generation| {
            let under = in_order(&self.generations, Purpose::Issuing);
            let mut under =
                under.into_iter().filter(|found| found.issuer == Some(root.key_id) && found.state != State::Prepublished);
            under.next().and_then(|found| self.issuing.iter().find(|authority| authority.key().id() == found.key_id))
        };
        Arc::clone(roots.iter().find_map(newest_under).unwrap_or(&self.issuing[0]))
    }

    /// What clients' certificates may hang from.
    #[must_use]
    pub fn anchors(&self) -> Vec<CertificateDer<'static>> {
        let trusted = in_order(&self.generations, Purpose::Issuing);
        trusted.into_iter().map(|found| found.certificate.clone().into()).collect()
    }

    /// From when until when what signs leaves is in force, its root included; none where a certificate does not parse.
    #[must_use]
    pub fn in_force(&self) -> Option<(UnixTime, UnixTime)> {
        self.in_force
    }

    /// The names, DER, of tainted issuing authorities that another signs in place of, and until when each is trusted.
    #[must_use]
    pub fn leaving(&self) -> Vec<(Vec<u8>, UnixTime)> {
        let leaving = self.generations.iter().filter_map(|found| {
            let until = due::leaves(found)?;
            let (_, parsed) = x509_parser::parse_x509_certificate(&found.certificate).ok()?;
            Some((parsed.subject().as_raw().to_vec(), until))
        });
        leaving.collect()
    }

    /// What signs issuing authorities; none with an outside root.
    #[must_use]
    pub fn root(&self) -> Option<Arc<Authority>> {
        self.root.clone()
    }

    /// What peers trust.
    #[must_use]
    pub fn bundle(&self) -> proto::Bundle {
        self.bundle.clone()
    }

    /// What signs checkpoints.
    #[must_use]
    pub fn ledger_key(&self) -> &SigningKey {
        &self.ledger_keys[0]
    }

    /// All that sign checkpoints, the active one first, then those that it follows.
    #[must_use]
    pub fn ledger_keys(&self) -> &[SigningKey] {
        &self.ledger_keys
    }

    /// The key of a trusted generation.
    #[must_use]
    pub fn key(&self, id: &KeyId) -> Option<&SigningKey> {
        self.keys.get(id)
    }

    /// Where the keys are.
    #[must_use]
    pub fn tokens(&self) -> &Tokens {
        &self.tokens
    }

    /// Whether every trusted key is bound.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.missing.is_empty()
    }

    /// Whether it is no other than `before`.
    #[must_use]
    pub fn is_as(&self, before: &Self) -> bool {
        self.generations == before.generations && self.missing == before.missing
    }

    /// What the ledger said when this was loaded.
    #[must_use]
    pub fn generations(&self) -> &[Generation] {
        &self.generations
    }
}

fn in_force(generations: &[Generation]) -> Option<(UnixTime, UnixTime)> {
    let active = generations.iter().find(|found| found.purpose == Purpose::Issuing && found.state == State::Active)?;
    let (from, end) = certify::validity(&active.certificate)?;
    let root = generations.iter().find(|root| active.issuer == Some(root.key_id));
    let root_end = root.and_then(|root| certify::validity(&root.certificate)).map_or(end, |(_, end)| end);
    Some((from, end.min(root_end)))
}

/// The trusted generations of a purpose: the active one, the one to come, those before from the newest on.
fn in_order(generations: &[Generation], purpose: Purpose) -> Vec<&Generation> {
    let mut found: Vec<_> = generations.iter().filter(|found| found.purpose == purpose && found.is_trusted()).collect();
    let rank = |state| match state {
        State::Active => 0,
        State::Prepublished => 1,
        _ => 2,
    };
    found.sort_by_key(|found| (rank(found.state), std::cmp::Reverse(found.since)));
    found
}

/// The public key of a token-signing key that the token does not have, as its entry has it.
async fn recorded(ledger: &Ledger, generation: &Generation) -> Result<Option<PublicKey>, Refusal> {
    if generation.purpose != Purpose::TokenSigning {
        return Ok(None);
    }
    let (ledger, id, size) = (ledger.clone(), generation.key_id, ledger.progress().borrow().size);
    let found = tokio::task::spawn_blocking(move || ledger.reader().activated_key(&id, size)).await;
    found.map_err(Refusal::internal)?.map_err(Refusal::internal)
}

/// A generation's key, looked up once and bound to its pinned public key.
pub(super) async fn bind(tokens: &Tokens, rows: &[KeyRow], generation: &Generation) -> Result<SigningKey, Refusal> {
    let row = rows.iter().find(|row| row.id == generation.key_id);
    let pinned = row.and_then(|row| Some((row.token, row.public.clone()?)));
    let (role, public) = pinned.ok_or_else(|| {
        Refusal::internal(format!("the ledger knows no {} key {}", keys::name(generation.purpose), generation.key_id))
    })?;
    tokens.of(role).key(generation.key_id, public).await.map_err(hsm_refusal)
}

//! An agent gets a key that it can use and never hold.

use std::sync::Arc;
use std::time::Duration;

use crate::authn::Connection;
use crate::ledger::{KeyOf, KeyTerms, KeyVersion, Reader, StoreError, StoredKey};
use crate::model::{Algorithm, KeyId, KeyName, Reason, Refusal, UnixTime};
use crate::proto::{self, KeyAccounting, KeyAlgorithm, KeyPurpose, KeyState, KeyStorage, Purpose, TokenRole, entry::Body};

use super::super::label::label;
use super::making::Making;
use super::{Acts, KeyShown, KeyToken, algorithm_of, key_refusal, making_refusal};
use crate::formats::Jwk;
use crate::hsm::{Error, MadeKey};

/// Life of a version where none is wished for: 30 days.
const TTL_SECONDS_DEFAULT: u32 = 2_592_000;
/// Wrapping keys do not change more often than this while one key is made.
pub(super) const TRIES_MAX: u32 = 3;
/// The longest.
const TTL_SECONDS_MAX: u32 = 31_536_000;
/// The same of a key that dies with the daemon, and is for a task of minutes: an hour.
const SESSION_TTL_SECONDS_DEFAULT: u32 = 3600;
/// The longest.
const SESSION_TTL_SECONDS_MAX: u32 = 86_400;

/// What an agent would like.
#[derive(Debug, Clone)]
pub struct KeyWish {
    /// Its name for it.
    pub name: String,
    /// The one thing that it will sign.
    pub purpose: KeyPurpose,
    /// What it signs with; unspecified: P-256.
    pub algorithm: KeyAlgorithm,
    /// Where it lives; unspecified: wrapped, or else resident.
    pub storage: KeyStorage,
    /// How its signatures are accounted for; unspecified: recorded.
    pub accounting: KeyAccounting,
    /// 0: no budget.
    pub signatures_max: u64,
    /// Of each version; 0: 30 days, or an hour where it is to live in a session.
    pub ttl_seconds: u32,
}

impl KeyWish {
    fn terms(&self) -> Result<KeyTerms, Refusal> {
        let malformed = |advice: &str| Refusal::new(Reason::MalformedRequest, advice);
        if self.purpose == KeyPurpose::Unspecified {
            return Err(malformed("say what the key is for: it signs nothing else"));
        }
        // Of what is wished for: a key that lives elsewhere because the token has no such class has the same life.
        let (ttl_seconds, longest) = match self.storage {
            KeyStorage::Session => (SESSION_TTL_SECONDS_DEFAULT, SESSION_TTL_SECONDS_MAX),
            _ => (TTL_SECONDS_DEFAULT, TTL_SECONDS_MAX),
        };
        if self.ttl_seconds > longest {
            return Err(malformed(&format!("choose a lifetime of at most {longest} seconds for a key of this storage")));
        }
        if i64::try_from(self.signatures_max).is_err() {
            return Err(malformed("choose a smaller budget, or none"));
        }
        let algorithm = if self.algorithm == KeyAlgorithm::Unspecified { KeyAlgorithm::P256 } else { self.algorithm };
        if self.purpose == KeyPurpose::RawDigest && algorithm == KeyAlgorithm::Ed25519 {
            return Err(Refusal::new(
                Reason::AlgorithmRefused,
                "use a P-256, P-384 or RSA key for raw digests: Ed25519 signs messages",
            ));
        }
        if self.purpose == KeyPurpose::HttpMessageSignature && algorithm == KeyAlgorithm::Ps256 {
            return Err(Refusal::new(
                Reason::AlgorithmRefused,
                "use a P-256, P-384 or Ed25519 key for HTTP message signatures: RFC 9421 knows RSA-PSS with SHA-512 alone",
            ));
        }
        Ok(KeyTerms {
            purpose: self.purpose,
            algorithm,
            storage_asked: self.storage,
            accounting: match self.accounting {
                KeyAccounting::Unspecified => KeyAccounting::Recorded,
                chosen => chosen,
            },
            signatures_max: self.signatures_max,
            ttl_seconds: if self.ttl_seconds == 0 { ttl_seconds } else { self.ttl_seconds },
        })
    }
}

impl Acts {
    /// A key of the calling agent's own. The same wish again is answered the same.
    ///
    /// # Errors
    /// `MALFORMED_REQUEST`, `KEY_EXISTS` (of that name, with other terms), `KEYS_TOO_MANY`, `KEY_LOST` (the one that was made lived in a session
    /// that is gone), `ALGORITHM_UNSUPPORTED`, `ALGORITHM_REFUSED`; as the agent's standing; `HSM_UNAVAILABLE`, `OVERLOADED`, `RATE_LIMITED`, `LEDGER_UNAVAILABLE`, `REQUEST_IN_PROGRESS`.
    pub async fn create_key(&self, source: &Arc<Connection>, wish: KeyWish) -> Result<KeyShown, Refusal> {
        let created = self.create(source, &wish).await;
        self.refused_key_call("CreateKey", source, created).await
    }

    async fn create(&self, source: &Connection, wish: &KeyWish) -> Result<KeyShown, Refusal> {
        let caller = source.agent(&self.ledger)?;
        let now = self.trusted_now()?;
        self.keys.rates.change(caller.agent(), now.seconds())?;
        if !self.ledger.is_writable() {
            let advice = "the ledger cannot be written now; ask again later";
            return Err(Refusal::new(Reason::LedgerUnavailable, advice).retry_after(Duration::from_secs(1)));
        }
        let name = KeyName::parse(&wish.name).map_err(|error| {
            Refusal::new(Reason::MalformedRequest, "name a key with 1 to 64 characters of a-z, 0-9 and -").because(error)
        })?;
        let of = KeyOf { agent: caller.agent().clone(), epoch: caller.epoch(), name };
        let terms = wish.terms()?;
        // From here on nobody else makes this name, until its entry is durable or will never be.
        let (making, others) = self.keys.making.make(&of, true)?;
        let (found, count) = self.look(&of).await?;
        if let Some(found) = found {
            return self.same(found, &terms);
        }
        // One that was forgotten may be in memory still, where nobody heard that its entry is durable.
        if self.keys.loaded.get(&of).is_ok() {
            self.keys.loaded.forget(&of);
        }
        if count as usize + others >= self.keys.per_agent_max {
            let advice = format!("destroy a key first: an agent has at most {}", self.keys.per_agent_max);
            return Err(Refusal::new(Reason::KeysTooMany, advice));
        }
        self.has_room(&*self.keys.token()?, &making, &terms, None).await?;
        let _turn = self.keys.making_rsa.make(&of.agent, terms.algorithm)?;
        for tries_left in (0..TRIES_MAX).rev() {
            let token = self.keys.token()?;
            let version = self.make_version(&token, &making, &terms, 1, now).await?;
            let (key_id, storage) = (version.key_id, version.storage);
            match self.ledger.create_key(of.clone(), terms, version, Arc::clone(&making)).await {
                Ok((_, key)) => return Ok(self.shown(super::stored(&key))),
                Err(refusal) => self.not_entered(refusal, &token, key_id, storage, tries_left).await?,
            }
        }
        Err(super::in_progress())
    }

    /// The key of this name, and how many its agent has.
    async fn look(&self, of: &KeyOf) -> Result<(Option<StoredKey>, u64), Refusal> {
        let (ledger, of) = (self.ledger.clone(), of.clone());
        let read = move || {
            let found = match ledger.reader().agent_key(&of) {
                // Destroyed by an operator because it was not as recorded: its name is taken all the same.
                Err(odd @ StoreError::NotAsRecorded(_)) => {
                    let bare = ledger.reader().bare_agent_key(&of)?;
                    Some(bare.filter(|bare| bare.state == KeyState::Destroyed).ok_or(odd)?)
                }
                found => found?,
            };
            let count = if found.is_some() { 0 } else { ledger.reader().agent_key_count(&of.agent, of.epoch)? };
            Ok::<_, StoreError>((found, count))
        };
        tokio::task::spawn_blocking(read).await.map_err(Refusal::internal)?.map_err(|error| self.ledger.unread(error))
    }

    /// What the token has to keep is little: nobody fills it. A key that is there still is replaced by the new one, and makes room for it.
    pub(super) async fn has_room(
        &self,
        token: &KeyToken,
        making: &Making,
        terms: &KeyTerms,
        replaced: Option<KeyId>,
    ) -> Result<(), Refusal> {
        let (of, algorithm) = (making.of(), algorithm_of(terms.algorithm).unwrap_or(Algorithm::P256));
        let storage = token.storage(terms.storage_asked, algorithm);
        // Before those that are there are counted.
        let (own_made, all_made) = making.lives(storage);
        let (there, own, own_max, all, all_max) = match storage {
            KeyStorage::Session => {
                let there = replaced.is_some_and(|id| self.keys.session.has(id));
                (there, self.keys.session.count(&of.agent), self.keys.session_max, 0, usize::MAX)
            }
            KeyStorage::Resident => {
                // Whose they were nobody knows any more.
                if self.left_in_the_making().await?.len() >= self.keys.resident_max {
                    let advice = "keys that were never used have to leave the token first; ask again in a moment";
                    return Err(Refusal::new(Reason::HsmUnavailable, advice).retry_after(Duration::from_secs(1)));
                }
                let agent = of.agent.clone();
                let look = move |reader: &Reader| {
                    let there = replaced.map_or(Ok(false), |id| reader.has_object(id))?;
                    Ok((there, reader.resident_key_counts(&agent)?))
                };
                let (there, (own, all)) = self.read(look).await?;
                (there, own, self.keys.resident_max, all, self.keys.residents_max)
            }
            KeyStorage::Wrapped | KeyStorage::Unspecified => return Ok(()),
        };
        let more = usize::from(!there);
        if own + own_made + more > own_max {
            let advice = format!("choose another storage, or destroy a key first: {own_max} keys of an agent live in the token");
            return Err(Refusal::new(Reason::KeysTooMany, advice));
        }
        if all + all_made + more > all_max {
            let advice = "choose another storage: as many keys live in the token as it may hold";
            return Err(Refusal::new(Reason::KeysTooMany, advice));
        }
        Ok(())
    }

    fn same(&self, found: StoredKey, terms: &KeyTerms) -> Result<KeyShown, Refusal> {
        if found.terms == *terms && found.state != KeyState::Destroyed {
            // Whoever asks for it again after a restart is not to hear of it at its first signature.
            let signs = |newest: &&KeyVersion| found.state == KeyState::Active && newest.expires > self.ledger.clock().reckoned();
            let there = |id| self.keys.token().is_ok_and(|token| token.hsm.session_keys().contains(&id));
            return match found.versions.last().filter(signs) {
                Some(newest) if newest.storage == KeyStorage::Session && !there(newest.key_id) => {
                    Err(key_refusal(Error::KeyLost(newest.key_id)))
                }
                _ => Ok(self.shown(found)),
            };
        }
        Err(Refusal::new(Reason::KeyExists, "a key of this name was made with other terms, or is gone; choose another name"))
    }

    /// A key pair in the token. A resident one in two phases: a crash between them leaves an object that the next start destroys, and a
    /// token that goes away one that a later round does; of the others nothing is left.
    pub(super) async fn make_version(
        &self,
        token: &KeyToken,
        making: &Making,
        terms: &KeyTerms,
        number: u32,
        now: UnixTime,
    ) -> Result<KeyVersion, Refusal> {
        let unsupported = || Refusal::new(Reason::AlgorithmUnsupported, "choose P-256, P-384, Ed25519 or PS256");
        let algorithm = algorithm_of(terms.algorithm).ok_or_else(unsupported)?;
        let storage = token.storage(terms.storage_asked, algorithm);
        // What is away makes nothing: then there is nothing to record, and to give up.
        token.hsm.check_usable().map_err(key_refusal)?;
        let (of, key_id) = (making.of(), KeyId::random());
        making.gets(key_id);
        if storage == KeyStorage::Resident {
            let intent = proto::KeyIntended {
                key_id: key_id.0.to_vec(),
                purpose: Purpose::Agent.into(),
                algorithm: terms.algorithm.into(),
                token: TokenRole::Agents.into(),
            };
            self.ledger.record(Body::KeyIntended(intent)).await?;
        }
        let wrapping = token.wrapping.filter(|_| storage == KeyStorage::Wrapped);
        let label = label(Purpose::Agent, self.ledger.deployment(), key_id);
        let MadeKey { public, wrapped } = match token.hsm.make_agent_key(key_id, algorithm, storage, wrapping, &label).await {
            Ok(made) => made,
            Err(error) => {
                self.give_up(token, key_id, storage, "the token could not make it").await;
                tracing::warn!(agent = %of.agent, %error, "an agent's key could not be made");
                return Err(making_refusal(error, wrapping));
            }
        };
        let kid = Jwk::thumbprint(&public);
        let named = kid.clone();
        if self.read(move |reader| reader.agent_key_by_kid(&named)).await?.is_some() {
            // Two agents' messages could not be told apart.
            self.give_up(token, key_id, storage, "the token made a key that there is already").await;
            return Err(Refusal::internal(format!("the token made key {kid} twice: its random numbers are none")));
        }
        let expires = UnixTime::from_seconds(now.seconds()).plus_seconds(terms.ttl_seconds.into());
        if storage == KeyStorage::Session {
            self.keys.session.made(key_id, &of.agent, of.epoch, expires);
        }
        Ok(KeyVersion {
            number,
            key_id,
            kid: kid.into(),
            public,
            storage,
            wrapped: wrapped.map(Arc::from).zip(wrapping),
            wrapped_before: Vec::new(),
            expires,
            told_by: None,
            rewrapped_by: None,
        })
    }

    /// What becomes of a key pair whose entry was refused. Where the ledger did not answer, the entry may be made yet: then nothing is
    /// destroyed, and of a resident key without an entry a later round takes care (`over.rs`). Another pair is to be made where another
    /// wrapping key has become active meanwhile.
    pub(super) async fn not_entered(
        &self,
        refusal: Refusal,
        token: &KeyToken,
        key_id: KeyId,
        storage: KeyStorage,
        tries_left: u32,
    ) -> Result<(), Refusal> {
        if !matches!(refusal.reason, Reason::LedgerUnavailable | Reason::Draining) {
            self.give_up(token, key_id, storage, "its agent or its key was denied meanwhile").await;
        }
        if refusal.reason != Reason::AuthoritySuperseded || tries_left == 0 {
            return Err(refusal);
        }
        self.keys.wrap_under_the_active(&self.ledger.generations().0);
        Ok(())
    }

    /// Nobody has used it: what there may be of it goes. What cannot be done now, a later round does (`over.rs`), or the next start.
    pub(super) async fn give_up(&self, token: &KeyToken, key_id: KeyId, storage: KeyStorage, cause: &str) {
        let destroyed = match token.hsm.destroy_agent_key(key_id, storage).await {
            Ok(destroyed) => destroyed,
            Err(error) => return tracing::warn!(key = %key_id, %error, "a key that was never used may be left in the token"),
        };
        self.keys.session.gone(key_id);
        if storage == KeyStorage::Resident
            && let Err(refusal) = super::super::keys::abandon(&self.ledger, key_id, cause, destroyed).await
        {
            tracing::warn!(key = %key_id, ?refusal, "a key that was never used is given up later");
        }
    }
}

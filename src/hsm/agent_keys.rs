//! Agents' signing keys: what they are made, bound, used and destroyed by. Three classes of storage, one face. An authority key is never
//! reached from here: these are bound under a type of their own, an id or public key of another key is refused, and a token object is an
//! agent's only if its label says so.
//!
//! What a key signs besides what it is asked for are trials: over a tag and random bytes (`objects.rs`), which no profile's message begins
//! with, and good for nothing. A resident key has one when it is made, and one each time that it is looked for: once in each epoch of the
//! token that it signs in, or more often where there are more of them than are remembered. A key in a session has one only after its blob
//! gave another key. They are in nobody's book: the ledger's sum is that of messages, and a token's own counter of signatures, where it has
//! one, is at most trials above it.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Instant;

use cryptoki::object::Attribute;
use cryptoki::session::Session;
use tokio::task::JoinSet;

use super::error::{Error, SignError};
use super::faults::Outcome;
use super::keyring::Bound;
use super::objects::{self, Wanted};
use super::owners::{self, Blob, SESSIONS_MIN};
use super::token::Token;
use super::wrapping::{self, BLOB_BYTES_MAX, Wrapping};
use super::{ADMIN_DEADLINE, Admitted, Hsm, der, lanes};
use crate::model::{Algorithm, KeyId, PublicKey};
use crate::proto::KeyStorage;

/// How CKA_LABEL of every resident agent key begins, and of no other key.
pub(super) const LABEL: &str = "keyward/agent/";
/// Signatures of a batch that a lane makes at one go: what it costs to hand them over is shared.
const CHUNK_MAX: usize = 16;

/// A key that was just made.
#[derive(Debug, Clone)]
pub struct MadeKey {
    /// As the token told it.
    pub public: PublicKey,
    /// The private key as the token wrapped it; of the class `wrapped` alone. To be kept: the token has no other copy for good.
    pub wrapped: Option<Vec<u8>>,
}

/// An agent's key, bound to its pinned public key.
#[derive(Clone)]
pub struct AgentKey {
    token: Arc<Token>,
    key: Arc<Bound>,
}

impl Hsm {
    /// The classes of storage that this token has for keys of an algorithm; none if it does not have such keys. What is missing is named
    /// by [`super::Status::off`].
    #[must_use]
    pub fn storages(&self, algorithm: Algorithm) -> Vec<KeyStorage> {
        let able = self.capabilities();
        let enough = able.sessions_max.is_none_or(|most| most >= SESSIONS_MIN);
        let wrapped = match algorithm {
            Algorithm::P256 | Algorithm::P384 => able.wrapped_keys,
            Algorithm::Ed25519 => able.wrapped_ed25519,
            Algorithm::Ps256 => able.wrapped_ps256,
        };
        let classes = [
            (able.session_keys && enough, KeyStorage::Session),
            (wrapped && enough, KeyStorage::Wrapped),
            (true, KeyStorage::Resident),
        ];
        let has = self.params(algorithm).is_ok();
        classes.into_iter().filter(|(class, _)| has && *class).map(|(_, storage)| storage).collect()
    }

    /// How many unwrapped keys stay in sessions of this token, and half as many RSA keys beside them; 4,096 if nobody says so.
    pub fn set_unwrapped_max(&self, most: usize) {
        self.0.owners.set_unwrapped_max(most);
    }

    /// Makes an AES-256 key in the token to wrap agents' keys under, reads back what it may do (`wrapping.rs`), and has it wrap and unwrap
    /// a key that is used for nothing else. `label` is CKA_LABEL, cut to 32 characters.
    ///
    /// # Errors
    /// As [`Hsm::generate`]; `Incapable` where the token does not wrap.
    pub async fn generate_wrapping(&self, id: KeyId, label: &str) -> Result<(), Error> {
        let way = self.0.wrapping_way()?;
        let label: String = label.chars().take(32).collect();
        self.errand(ADMIN_DEADLINE, move |session| {
            let key = wrapping::generate(session, id, &label, true)?;
            wrapping::check(session, key, id)?;
            wrapping::round_trip(session, way, key, Algorithm::P256, &der::P256_PARAMS)
        })
        .await
    }

    /// Whether the token has this wrapping key, as it has to be. Looked up anew.
    ///
    /// # Errors
    /// `KeyLost`, `KeyAmbiguous`, `Attribute`, or the token cannot be asked.
    pub async fn find_wrapping(&self, id: KeyId) -> Result<(), Error> {
        self.errand(ADMIN_DEADLINE, move |session| wrapping::resolve(session, id).map(drop)).await
    }

    /// Whether somebody is being served or waits: what can wait lets them go first.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        let token = &self.0;
        token.admission.is_entered() || token.owners.shards().iter().any(|shard| shard.errands.waiting() > 0)
    }

    /// Makes an agent's key pair. `session`: dies with its session. `wrapped`: the same, and handed out wrapped under the key `wrapping`.
    /// `resident`: a token object, as [`Hsm::generate`] makes it, with this CKA_LABEL, which begins with `keyward/agent/`.
    ///
    /// # Errors
    /// `Incapable` for a class or an algorithm that the token lacks. After any error, also [`Error::Deadline`], the key may exist:
    /// [`Hsm::destroy_agent_key`]. Never repeat it with the same id.
    pub async fn make_agent_key(
        &self,
        id: KeyId,
        algorithm: Algorithm,
        storage: KeyStorage,
        wrapping: Option<KeyId>,
        label: &str,
    ) -> Result<MadeKey, Error> {
        self.check_usable()?;
        self.check_free(id, None)?;
        let params = self.params(algorithm)?;
        let deadline = Instant::now() + ADMIN_DEADLINE;
        let _turn = if owners::is_slow(algorithm) { Some(self.0.owners.turn(deadline).await?) } else { None };
        if storage == KeyStorage::Resident {
            if !label.starts_with(LABEL) {
                return Err(Error::NotAgents(id));
            }
            let public = self.generate_as(id, algorithm, label, |id, public| Bound::agents(id, public, None)).await?;
            return Ok(MadeKey { public, wrapped: None });
        }
        self.check_has(storage, algorithm)?;
        let (token, shard) = (Arc::clone(&self.0), Arc::clone(self.0.owners.shard(id, algorithm)));
        let wrapping = match (storage, wrapping) {
            (KeyStorage::Wrapped, Some(by)) => Some((self.0.wrapping_way()?, self.0.wrapping_handle(by, deadline).await?, by)),
            (KeyStorage::Wrapped, None) => return Err(self.incapable("wrapped keys without a wrapping key")),
            _ => {
                shard.has_room()?;
                None
            }
        };
        let epoch = self.0.epoch();
        let owner = Arc::clone(&shard);
        self.0
            .owner_errand(&shard, deadline, move |session| {
                let extractable = wrapping.is_some();
                let wanted = Wanted { algorithm, params, id: &id.0, label: LABEL, durable: false, extractable };
                let (public_object, private) = wanted.generate(session)?;
                let made = objects::read_public(session, public_object).and_then(|public| {
                    let blob = match wrapping {
                        Some((way, handle, by)) => {
                            let bytes: Arc<[u8]> = wrapping::wrap(session, way, handle, private)?.into();
                            Some(Blob { bytes, by })
                        }
                        None => objects::check_private(session, private, (id, algorithm)).map(|()| None)?,
                    };
                    Ok((public, blob))
                });
                if let Err(error) = objects::destroy_object(session, public_object) {
                    tracing::debug!(%error, key = %id, "a public key stays until its session ends");
                }
                let bind = |public: PublicKey, blob: Option<Blob>| {
                    let owned = token.owners.owned(id, algorithm, blob);
                    token.owners.keys.bind(id, public, |id, public| Bound::agents(id, public, Some(owned)))
                };
                match made.and_then(|(public, blob)| Ok((bind(public, blob.clone())?, blob))) {
                    Ok((key, blob)) => {
                        // What can still be extracted is not kept: its blob gives an object that cannot.
                        if blob.is_none() || seal(session, private, (id, algorithm)) {
                            owner.keep(&key, private, epoch, token.owners.unwrapped_max(), true);
                        } else if let Err(error) = objects::destroy_object(session, private) {
                            tracing::debug!(%error, key = %id, "an extractable object stays until its session ends");
                        }
                        Ok(MadeKey { public: key.public.clone(), wrapped: blob.map(|blob| blob.bytes.to_vec()) })
                    }
                    Err(error) => objects::destroy_object(session, private).and(Err(error)),
                }
            })
            .await
    }

    /// Binds an agent's key for use; nothing is asked of the token. Binding it again is cheap as long as it is in use. A `wrapped` key needs
    /// its blob and the wrapping key; the newest ones given are used when it is unwrapped next.
    ///
    /// # Errors
    /// `KeyLost` for a `session` key whose session is gone; `NotAgents` if the id or the public key is an authority's.
    pub fn agent_key(
        &self,
        id: KeyId,
        public: PublicKey,
        storage: KeyStorage,
        wrapped: Option<Arc<[u8]>>,
        wrapping: Option<KeyId>,
    ) -> Result<AgentKey, Error> {
        self.check_free(id, Some(&public))?;
        let owners = &self.0.owners;
        let blob = match (storage, wrapped, wrapping) {
            (KeyStorage::Wrapped, Some(bytes), Some(by)) if bytes.len() <= BLOB_BYTES_MAX => Some(Blob { bytes, by }),
            (KeyStorage::Wrapped, ..) => return Err(self.incapable("wrapped keys without their blob")),
            _ => None,
        };
        let bound = owners.keys.bind(id, public, |id, public| {
            let owned = (storage != KeyStorage::Resident).then(|| owners.owned(id, public.algorithm(), blob.clone()));
            Bound::agents(id, public, owned)
        })?;
        match (&bound.owned, blob) {
            (None, _) => owners.keep_resident(&bound),
            (Some(owned), Some(blob)) => owned.set_blob(blob),
            (Some(owned), None) => drop(owned.object().ok_or(Error::KeyLost(id))?),
        }
        Ok(AgentKey { token: Arc::clone(&self.0), key: bound })
    }

    /// Destroys what the token has of an agent's key, and says how many objects that were; who signs with one finishes. A key that is
    /// still bound would be unwrapped again: its blob and its bindings are the caller's to forget first.
    ///
    /// # Errors
    /// When the token cannot be asked; `NotAgents` for another's key.
    pub async fn destroy_agent_key(&self, id: KeyId, storage: KeyStorage) -> Result<u32, Error> {
        self.check_free(id, None)?;
        if storage == KeyStorage::Resident {
            self.0.owners.forget_resident(id);
            return self
                .errand(ADMIN_DEADLINE, move |session| {
                    objects::check_labels(session, id)?;
                    objects::destroy(session, id)
                })
                .await;
        }
        let [quick, slow] = self.0.owners.shards_of(id);
        let (of_quick, of_slow) = (quick.let_go(id), slow.let_go(id));
        let shard = if of_slow > 0 { slow } else { quick };
        // On its way home the owner buries them.
        self.0.owner_errand(shard, Instant::now() + ADMIN_DEADLINE, |_| Ok(())).await?;
        Ok(u32::try_from(of_quick + of_slow).unwrap_or(u32::MAX))
    }

    /// Signatures that the token makes in a second at its best of late, all lanes at work; `None` before the first.
    #[must_use]
    pub fn signatures_per_second(&self) -> Option<u64> {
        let admission = &self.0.admission;
        let each = u64::try_from(admission.pace().as_nanos()).unwrap_or(u64::MAX);
        1_000_000_000_u64.checked_div(each).map(|one| one.max(1).saturating_mul(admission.lanes() as u64))
    }

    /// The keys of the class `session` that the token has now.
    #[must_use]
    pub fn session_keys(&self) -> HashSet<KeyId> {
        self.0.owners.session_keys()
    }

    /// The same key wrapped under another wrapping key. It is extractable for as long as this takes.
    ///
    /// # Errors
    /// `NotUnwrapped` if the blob was touched; when the token cannot be asked.
    pub async fn rewrap_agent_key(
        &self,
        (id, algorithm): (KeyId, Algorithm),
        blob: Arc<[u8]>,
        from: KeyId,
        to: KeyId,
    ) -> Result<Vec<u8>, Error> {
        self.check_usable()?;
        self.check_has(KeyStorage::Wrapped, algorithm)?;
        let deadline = Instant::now() + ADMIN_DEADLINE;
        let way: Wrapping = self.0.wrapping_way()?;
        let (unwraps, wraps) = (self.0.wrapping_handle(from, deadline).await?, self.0.wrapping_handle(to, deadline).await?);
        let again = self
            .0
            .owner_errand(self.0.owners.shard(id, algorithm), deadline, move |session| {
                let private = wrapping::unwrap(session, way, unwraps, &blob, (id, algorithm), true)?;
                let wrapped = wrapping::wrap(session, way, wraps, private);
                objects::destroy_object(session, private).and(wrapped)
            })
            .await;
        if again.as_ref().is_err_and(|error| error.verdict().outcome == Outcome::Resolve) {
            // The wrapping keys may be elsewhere by now.
            self.0.owners.forget_wrapping(&[from, to]).await;
        }
        again
    }

    /// Neither the id nor the public key of an authority key.
    fn check_free(&self, id: KeyId, public: Option<&PublicKey>) -> Result<(), Error> {
        if self.0.keyring.knows(id, public) { Err(Error::NotAgents(id)) } else { Ok(()) }
    }

    fn check_has(&self, storage: KeyStorage, algorithm: Algorithm) -> Result<(), Error> {
        if self.storages(algorithm).contains(&storage) {
            return Ok(());
        }
        Err(self.incapable(if storage == KeyStorage::Wrapped { "wrapped keys" } else { "session keys" }))
    }
}

/// Makes a wrapped key's object what an unwrapped one is. `false` where the token does not let it.
fn seal(session: &Session, private: cryptoki::object::ObjectHandle, key: (KeyId, Algorithm)) -> bool {
    let sealed = session.update_attributes(private, &[Attribute::Extractable(false)]).is_ok();
    sealed && objects::check_unextractable(session, private, key).is_ok()
}

impl AgentKey {
    /// Its id, which its CKA_ID is.
    #[must_use]
    pub fn id(&self) -> KeyId {
        self.key.id
    }

    /// The pinned public key.
    #[must_use]
    pub fn public(&self) -> &PublicKey {
        &self.key.public
    }

    /// As [`super::SigningKey::has_room`].
    ///
    /// # Errors
    /// `QueueFull`, or the token is not usable.
    pub fn has_room(&self) -> Result<(), Error> {
        self.token.has_room()
    }

    /// As [`super::SigningKey::admit`]; one place for a whole batch.
    ///
    /// # Errors
    /// `QueueFull`, or the token is not usable.
    pub fn admit(&self) -> Result<Admitted, Error> {
        Admitted::to(&self.token)
    }

    /// A signature over a digest ([`Algorithm::input`]; Ed25519: over the message itself), verified against the pinned key. ECDSA:
    /// `r ‖ s` (RFC 7518 §3.4); Ed25519: 64 bytes (RFC 8032). Needs a tokio runtime with time.
    ///
    /// # Errors
    /// As [`super::SigningKey::sign`]. `KeyMismatch` if another key came out of the blob; `NotUnwrapped` if none did; `KeyLost` for a
    /// `session` key whose session is gone; `Input` for a digest of the wrong size.
    pub async fn sign_digest(&self, digest: Arc<[u8]>) -> Result<Vec<u8>, SignError> {
        let deadline = Instant::now() + self.token.settings.sign_deadline;
        self.check(&digest)?;
        let answer = lanes::sign_all(&self.token, &self.key, vec![digest], deadline).await.pop();
        answer.unwrap_or_else(|| Err(SignError::Unknown(self.token.unusable())))
    }

    /// Signatures over many digests, in their order, by one deadline for all of them. Each has an outcome of its own: what was made is
    /// handed out, whatever became of the rest.
    pub async fn sign_digests(&self, digests: Vec<Arc<[u8]>>) -> Vec<Result<Vec<u8>, SignError>> {
        let deadline = Instant::now() + self.token.settings.sign_deadline;
        let count = digests.len();
        if let Some(Err(error)) = digests.iter().map(|digest| self.check(digest)).find(Result::is_err) {
            let first = std::iter::once(Err(error));
            return first.chain((1..count).map(|_| Err(SignError::NotSigned(Error::BatchEnded)))).collect();
        }
        let most = self.token.settings.token.lanes.max(1) * 2;
        let mut answers: Vec<_> = (0..count).map(|_| None).collect();
        let size = self.chunk();
        let mut chunks = digests.chunks(size).enumerate();
        let mut at_work = JoinSet::new();
        loop {
            while at_work.len() < most
                && let Some((number, chunk)) = chunks.next()
            {
                let (token, key, chunk) = (Arc::clone(&self.token), Arc::clone(&self.key), chunk.to_vec());
                // A task for each: they are verified on as many threads as there are.
                at_work.spawn(async move { (number, lanes::sign_all(&token, &key, chunk, deadline).await) });
            }
            let Some(done) = at_work.join_next().await else { break };
            let Ok((number, made)) = done else { continue };
            for (answer, made) in answers.iter_mut().skip(number * size).zip(made) {
                *answer = Some(made);
            }
        }
        answers.into_iter().map(|answer| answer.unwrap_or_else(|| Err(SignError::Unknown(self.token.unusable())))).collect()
    }

    fn check(&self, digest: &[u8]) -> Result<(), SignError> {
        if !self.token.is_usable() {
            return Err(SignError::NotSigned(self.token.unusable()));
        }
        match self.key.public.algorithm().digest_size() {
            Some(bytes) if bytes != digest.len() => Err(SignError::NotSigned(Error::Input { id: self.key.id, bytes })),
            _ => Ok(()),
        }
    }

    /// Signatures of one chunk.
    fn chunk(&self) -> usize {
        let pace = self.token.admission.pace().as_nanos();
        lanes::CHUNK_TIME
            .as_nanos()
            .checked_div(pace)
            .and_then(|fit| usize::try_from(fit).ok())
            .unwrap_or(CHUNK_MAX)
            .clamp(1, CHUNK_MAX)
    }
}

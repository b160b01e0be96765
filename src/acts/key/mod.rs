//! Agents' signing keys: made, used, rotated, ended, published. An agent names a key of its own, so a key that is another's and a key that
//! is nobody's are the same thing to it: not found.

mod create;
mod end;
mod list;
mod loaded;
mod making;
mod over;
mod places;
mod rates;
mod rewrap;
mod rotate;
mod session;
mod sign;
mod verify;

use std::error::Error as _;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwapOption;

use crate::authn::{AgentConnection, Connection};
use crate::config::Limits;
use crate::formats::{Bounds, Profile, ReplayCache};
use crate::hsm::{self, Hsm};
use crate::ledger::{AgentKey, Generation, KeyOf, KeyVersion, StoredKey};
use crate::model::{AgentId, Algorithm, Clock, KeyId, KeyName, Outage, Reason, Refusal};
use crate::proto::{AuthorityState, KeyAlgorithm, KeyPurpose, KeyStorage, Purpose};

use super::{Acts, hsm_refusal};
use loaded::{Loaded, LoadedKeys};
use making::{BeingMade, RsaBeingMade};
use places::Places;
use rates::Rates;
use rewrap::Rewrapping;
use session::SessionKeys;

pub use create::KeyWish;
pub use list::{JwksOf, KeyShown};
use over::LookedUp;
pub use over::Round;
pub use rewrap::Rewrap;
pub use sign::{Content, SignaturesMade};
pub use verify::{Message, Signer};

/// Messages that `verify` remembers: 25 MiB at most.
const REPLAYS: Bounds = Bounds { all: 65_536, of_reader: 16_384, of_reader_scarce: 1024, of_signer: 8192 };
/// What a page of keys costs, in signatures, of what an agent may ask for in a second.
const PAGE_COSTS: usize = 100;
/// Looks at a key's row for one call, should others of its kind leave memory during each.
const READS_MAX: usize = 16;

/// The token that agents' keys live in.
pub struct KeyToken {
    hsm: Hsm,
    wrapping: Option<KeyId>,
}

impl KeyToken {
    /// With the key that wraps, where the token can.
    #[must_use]
    pub fn new(hsm: Hsm, wrapping: Option<KeyId>) -> Self {
        Self { hsm, wrapping }
    }

    /// Where a key will live: as wished, or else in the next class that the token has. The answer says so.
    fn storage(&self, wished: KeyStorage, algorithm: Algorithm) -> KeyStorage {
        let has = self.hsm.storages(algorithm);
        let can = |storage: &KeyStorage| has.contains(storage) && (*storage != KeyStorage::Wrapped || self.wrapping.is_some());
        let order: &[KeyStorage] = match wished {
            KeyStorage::Session => &[KeyStorage::Session, KeyStorage::Wrapped],
            KeyStorage::Wrapped | KeyStorage::Unspecified => &[KeyStorage::Wrapped],
            KeyStorage::Resident => &[],
        };
        order.iter().copied().find(can).unwrap_or(KeyStorage::Resident)
    }
}

/// What is in memory of agents' keys.
pub struct AgentKeys {
    token: ArcSwapOption<KeyToken>,
    loaded: LoadedKeys,
    making: BeingMade,
    making_rsa: RsaBeingMade,
    rates: Rates,
    seen: ReplayCache,
    places: Places,
    session: SessionKeys,
    intended: LookedUp,
    ended: LookedUp,
    rewrapping: Rewrapping,
    /// Objects of the token that are not as they were made, as the log has told.
    odd: Mutex<Outage>,
    per_agent_max: usize,
    session_max: usize,
    resident_max: usize,
    /// Of all agents.
    residents_max: usize,
}

impl AgentKeys {
    pub(super) fn new(limits: &Limits, clock: &Clock) -> Self {
        Self {
            token: ArcSwapOption::empty(),
            loaded: LoadedKeys::new(limits.keys_cached),
            making: BeingMade::default(),
            making_rsa: RsaBeingMade::default(),
            rates: Rates::new(limits.signatures_per_second, limits.key_changes_per_second),
            seen: ReplayCache::new(REPLAYS, clock.reckoned()),
            places: Places::new(),
            session: SessionKeys::default(),
            intended: LookedUp::default(),
            ended: LookedUp::default(),
            rewrapping: Rewrapping::default(),
            odd: Mutex::default(),
            per_agent_max: limits.keys_per_agent,
            session_max: limits.session_keys_per_agent,
            resident_max: limits.resident_keys_per_agent,
            residents_max: limits.resident_keys,
        }
    }

    /// Whether what is wrong with an object in the token was not told yet, and there is room to remember that it was.
    fn is_news(&self, what: &str) -> bool {
        self.odd.lock().unwrap_or_else(PoisonError::into_inner).awaits_a_person(what)
    }

    fn token(&self) -> Result<Arc<KeyToken>, Refusal> {
        self.token.load_full().ok_or_else(|| {
            Refusal::new(Reason::HsmUnavailable, "the token is not available; ask again later")
                .retry_after(Duration::from_secs(1))
        })
    }

    /// New keys are wrapped under the generation that is active.
    pub(super) fn wrap_under_the_active(&self, generations: &[Generation]) {
        let is_it = |found: &&Generation| found.purpose == Purpose::Wrapping && found.state == AuthorityState::Active;
        let active = generations.iter().find(is_it).map(|active| active.key_id);
        if let Some(token) = self.token.load_full()
            && active.is_some()
            && token.wrapping != active
        {
            self.token.store(Some(Arc::new(KeyToken { hsm: token.hsm.clone(), wrapping: active })));
        }
    }

    /// What the token makes in a second, as far as that is known.
    fn capacity(&self) -> Option<u64> {
        self.token.load().as_ref().and_then(|token| token.hsm.signatures_per_second())
    }
}

fn in_progress() -> Refusal {
    let advice = "the same key is being worked on; repeat the request in a moment";
    Refusal::new(Reason::RequestInProgress, advice).retry_after(Duration::from_millis(200))
}

impl Acts {
    /// The token is there: agents' keys can be made and used.
    pub fn set_key_token(&self, token: KeyToken) {
        self.keys.token.store(Some(Arc::new(token)));
    }

    /// Seals what the keys of denied agents have reserved; with `all`, of every agent: before the last entry.
    pub fn seal_signatures(&self, all: bool) {
        for loaded in self.keys.loaded.with_reservations() {
            if all || self.ledger.admits_key(&loaded.key).is_err() {
                self.ledger.seal_signatures(&loaded.key);
            }
        }
    }

    /// The key of this name, of the epoch that the caller is in.
    fn own_key(caller: &AgentConnection, name: &str) -> Result<KeyOf, Refusal> {
        // A name that cannot be is one that is not there.
        let name = KeyName::parse(name).map_err(|_| crate::ledger::key_not_found())?;
        Ok(KeyOf { agent: caller.agent().clone(), epoch: caller.epoch(), name })
    }

    /// A key in use, loaded if it is not. What is destroyed is loaded as well: it says so.
    async fn load_key(&self, of: &KeyOf) -> Result<Arc<Loaded>, Refusal> {
        for _ in 0..READS_MAX {
            let generation = match self.keys.loaded.get(of) {
                Ok(loaded) => return Ok(loaded),
                Err(generation) => generation,
            };
            let (ledger, wanted) = (self.ledger.clone(), of.clone());
            let read = tokio::task::spawn_blocking(move || ledger.load_key(&wanted)).await;
            let key = read.map_err(Refusal::internal)??.ok_or_else(crate::ledger::key_not_found)?;
            // None: what was read may be out of date.
            if let Some(loaded) = self.keys.loaded.insert(Arc::new(Loaded::new(key)), generation, &self.ledger) {
                return Ok(loaded);
            }
        }
        Err(in_progress())
    }

    /// A key's newest version, bound to its object.
    fn signer(&self, loaded: &Loaded, version: &KeyVersion) -> Result<hsm::AgentKey, Refusal> {
        let token = self.keys.token()?;
        // Wrapped anew, it is bound with what it is wrapped in now; its object stays.
        let bound = (version.number, version.wrapped.as_ref().map(|(_, wrapping)| *wrapping));
        loaded.signer(bound, || {
            let (wrapped, wrapping) = version.wrapped.clone().unzip();
            let bound = token.hsm.agent_key(version.key_id, version.public.clone(), version.storage, wrapped, wrapping);
            bound.map_err(key_refusal)
        })
    }

    /// Who asks for what there is to see, and may: of `agent`'s keys, which are its own or none. What a message is refused for is no refusal
    /// of its reader; this is, and recorded as one.
    async fn may_look<'a>(
        &self,
        method: &str,
        source: &'a Connection,
        agent: &str,
        cost: usize,
    ) -> Result<&'a AgentConnection, Refusal> {
        let caller = source.agent(&self.ledger).and_then(|caller| {
            self.keys.rates.look(caller.agent(), cost, self.ledger.clock().reckoned().seconds())?;
            Self::is_own(caller, agent)?;
            Ok(caller)
        });
        self.refused_key_call(method, source, caller).await
    }

    /// An agent may name itself; whoever else it names has no keys that it could see.
    fn is_own(caller: &AgentConnection, agent: &str) -> Result<(), Refusal> {
        if agent.is_empty() || caller.agent().as_str() == agent { Ok(()) } else { Err(crate::ledger::key_not_found()) }
    }

    /// As the ledger records refusals of a known identity.
    async fn refused_key_call<T>(&self, method: &str, source: &Connection, result: Result<T, Refusal>) -> Result<T, Refusal> {
        match result {
            Ok(done) => Ok(done),
            Err(refusal) => {
                self.tell_odd_object(&refusal, source.named());
                match source.named() {
                    // What passes by itself is load, not an attempt at anything.
                    Some(agent) if !is_passing(refusal.reason) => Err(self.ledger.refused(agent, method, refusal).await),
                    _ => {
                        self.ledger.refused_stranger(refusal.reason, Some(source.source()));
                        Err(refusal)
                    }
                }
            }
        }
    }

    /// Once, however often its key is asked for.
    fn tell_odd_object(&self, refusal: &Refusal, agent: Option<&AgentId>) {
        if refusal.reason == Reason::KeyNotAsRecorded
            && let Some(error) = refusal.source().and_then(|cause| cause.downcast_ref::<hsm::Error>())
            && self.keys.is_news(&error.to_string())
        {
            tracing::error!(
                agent = agent.map(AgentId::as_str), %error,
                "the token does not have an agent's key, or the wrapping key that it is under, as it was made: it signs no more"
            );
        }
    }
}

fn is_passing(reason: Reason) -> bool {
    matches!(
        reason,
        Reason::HsmUnavailable
            | Reason::LedgerUnavailable
            | Reason::Overloaded
            | Reason::RateLimited
            | Reason::Draining
            | Reason::RequestInProgress
            | Reason::SignatureUnknown
    )
}

/// What an agent is told when its key could not be asked.
fn key_refusal(error: hsm::Error) -> Refusal {
    if error.is_not_as_recorded() {
        let advice =
            "the token does not have this key as it was made: rotate it, or use another; the daemon's log says what was found";
        return Refusal::new(Reason::KeyNotAsRecorded, advice).because(error);
    }
    match error {
        hsm::Error::KeyLost(_) => {
            let advice = "this key lived in a session, or in a token, that is gone; rotate it, or make one under another name";
            Refusal::new(Reason::KeyLost, advice).because(error)
        }
        other => making_refusal(other, None),
    }
}

/// What an agent is told when its key could not be made, under this wrapping key if it was to be wrapped.
fn making_refusal(error: hsm::Error, wrapping: Option<KeyId>) -> Refusal {
    if wrapping.is_some() && error.key_amiss() == wrapping {
        let advice =
            "the token has no good key to wrap agents' keys under: have an operator run `keyward ca rotate wrapping --now`";
        return Refusal::new(Reason::HsmRefused, advice).because(error);
    }
    match error {
        hsm::Error::Incapable { .. } => {
            Refusal::new(Reason::AlgorithmUnsupported, "the token does not have this; choose another algorithm").because(error)
        }
        other => hsm_refusal(other),
    }
}

/// The profile of what a key signs.
fn profile_of(purpose: KeyPurpose) -> Option<Profile> {
    match purpose {
        KeyPurpose::Jws => Some(Profile::Jws),
        KeyPurpose::HttpMessageSignature => Some(Profile::HttpMessageSignature),
        KeyPurpose::Dpop => Some(Profile::Dpop),
        KeyPurpose::RawDigest => Some(Profile::RawDigest),
        KeyPurpose::Tls => Some(Profile::Tls),
        KeyPurpose::Unspecified => None,
    }
}

/// A purpose as whoever makes a key says it.
#[must_use]
pub fn key_purpose_name(purpose: KeyPurpose) -> &'static str {
    match purpose {
        KeyPurpose::Jws => "jws",
        KeyPurpose::HttpMessageSignature => "http-message-signature",
        KeyPurpose::Dpop => "dpop",
        KeyPurpose::RawDigest => "raw-digest",
        KeyPurpose::Tls => "tls",
        KeyPurpose::Unspecified => "unknown",
    }
}

fn algorithm_of(algorithm: KeyAlgorithm) -> Option<Algorithm> {
    match algorithm {
        KeyAlgorithm::P256 => Some(Algorithm::P256),
        KeyAlgorithm::Ed25519 => Some(Algorithm::Ed25519),
        KeyAlgorithm::P384 => Some(Algorithm::P384),
        KeyAlgorithm::Ps256 => Some(Algorithm::Ps256),
        KeyAlgorithm::Unspecified => None,
    }
}

/// A key in use as its row has it.
fn stored(key: &AgentKey) -> StoredKey {
    StoredKey {
        of: key.of().clone(),
        terms: *key.terms(),
        state: key.state(),
        used: key.used(),
        versions: key.versions().to_vec(),
        created: key.created(),
    }
}

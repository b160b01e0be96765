//! Looking at a token on an operator's request: its state, what a module shows, and whether a token does what it is there for.

use std::path::{Path, PathBuf};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::error::{Error, SignError};
use super::faults::Place;
use super::history::FaultSeen;
use super::keyring::Location;
use super::modules::Modules;
use super::probe::Capabilities;
use super::{ADMIN_DEADLINE, Hsm, health, objects};
use crate::model::{Algorithm, KeyId};
use crate::proto::{KeyStorage, TokenRole};

/// A token's state, for `keyward status`.
#[derive(Debug, Clone)]
pub struct Status {
    /// As opened.
    pub role: TokenRole,
    /// As configured.
    pub module: PathBuf,
    /// CK_TOKEN_INFO label.
    pub label: String,
    /// CK_TOKEN_INFO serialNumber.
    pub serial: String,
    /// Signatures can be had.
    pub usable: bool,
    /// The newest of `faults`; stays after it has passed.
    pub fault: Option<String>,
    /// Sign lanes that serve.
    pub lanes: usize,
    /// Lanes given up: hanging inside the module.
    pub hanging: usize,
    /// Sessions at most in use: one per thread, and the one that keeps the login.
    pub sessions: usize,
    /// Signatures waiting for a lane.
    pub queued: usize,
    /// Names of the mechanisms, CKM_…
    pub mechanisms: Vec<String>,
    /// Signatures made and verified since start, canaries among them.
    pub signatures: u64,
    /// How often the token was lost and came back.
    pub reconnects: u64,
    /// A login is held back until `keyward hsm unlock`.
    pub pin_pending: bool,
    /// Features switched off because of this token.
    pub off: Vec<String>,
    /// What one signature takes the token, at its best of late; zero before the first.
    pub pace: Duration,
    /// Requests that were turned away because too many waited.
    pub turned_away: u64,
    /// The last few different faults, the newest first.
    pub faults: Vec<FaultSeen>,
    /// As probed when the token was opened.
    pub capabilities: Capabilities,
}

/// A slot as its module shows it (CK_SLOT_INFO, CK_TOKEN_INFO).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotSeen {
    /// CK_SLOT_ID: no name, many modules derive it anew.
    pub id: u64,
    /// CK_SLOT_INFO slotDescription.
    pub description: String,
    /// The token in it; why not, where it cannot be described.
    pub token: Result<TokenSeen, String>,
}

/// A token as its module shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TokenSeen {
    /// CK_TOKEN_INFO label: what `[hsm.*] token` names.
    pub label: String,
    /// CK_TOKEN_INFO serialNumber.
    pub serial: String,
    /// manufacturerID and model.
    pub model: String,
    /// CKF_TOKEN_INITIALIZED and CKF_USER_PIN_INITIALIZED.
    pub initialised: bool,
    /// What the token says of its user PIN, if that is worth a word.
    pub pin: Option<&'static str>,
}

/// One question put to a token.
#[derive(Debug)]
pub struct Check {
    /// What was asked.
    pub name: String,
    /// Of which key.
    pub key: Option<KeyId>,
    /// How long it took, or what is wrong.
    pub outcome: Result<Duration, Error>,
}

impl Modules {
    /// What the module at `path` shows. Loads it; logs in to nothing. Blocks.
    ///
    /// # Errors
    /// When the module cannot be loaded or lists no slots.
    pub fn slots(&self, path: &Path) -> Result<Vec<SlotSeen>, Error> {
        let module = self.load(path)?;
        let _held = module.lifecycle();
        let context = module.context();
        let slots = context.get_slots_with_token().map_err(|error| Error::at(Place::Slots, error))?;
        let seen = slots.into_iter().map(|slot| SlotSeen {
            id: slot.id(),
            description: context.get_slot_info(slot).map(|info| info.slot_description().to_owned()).unwrap_or_default(),
            token: match context.get_token_info(slot) {
                Ok(info) => Ok(TokenSeen {
                    label: info.label().to_owned(),
                    serial: info.serial_number().to_owned(),
                    model: format!("{} {}", info.manufacturer_id(), info.model()),
                    initialised: info.token_initialized() && info.user_pin_initialized(),
                    pin: match () {
                        () if info.user_pin_locked() => Some("locked"),
                        () if info.user_pin_final_try() => Some("one try left"),
                        () if info.user_pin_to_be_changed() => Some("to be changed"),
                        () if info.user_pin_count_low() => Some("wrong at least once"),
                        () => None,
                    },
                }),
                Err(error) => Err(Error::at(Place::Describe, error).to_string()),
            },
        });
        Ok(seen.collect())
    }
}

impl Hsm {
    /// The token's state now.
    #[must_use]
    pub fn status(&self) -> Status {
        let (token, usable) = (&self.0, self.0.is_usable());
        let capabilities = self.capabilities();
        let has = |storage| self.storages(Algorithm::P256).contains(&storage);
        let off = [
            (capabilities.ed25519, "ed25519"),
            (capabilities.p384, "p384"),
            (capabilities.ps256 || !token.settings.for_agents, "ps256"),
            (has(KeyStorage::Session), "session-keys"),
            (has(KeyStorage::Wrapped), "wrapped-keys"),
        ];
        // Before the faults: what it was locked by is among them then.
        let pin_pending = token.pin_pending();
        let (count, faults) = (token.crew.count(), token.history.newest_first());
        Status {
            role: token.settings.role,
            module: token.settings.token.module.clone(),
            label: token.settings.token.label.clone(),
            serial: token.serial().into(),
            usable,
            fault: faults.first().map(|newest| newest.fault.clone()),
            lanes: count.serving,
            hanging: count.hanging,
            sessions: token.sessions_open(),
            queued: token.jobs.waiting(),
            mechanisms: capabilities.mechanisms.clone(),
            signatures: token.signatures(),
            reconnects: token.resumed.load(Ordering::Relaxed).saturating_sub(1),
            pin_pending,
            off: off.iter().filter(|(has, _)| !has).map(|(_, name)| (*name).into()).collect(),
            pace: token.admission.pace(),
            turned_away: token.admission.turned_away(),
            faults,
            capabilities: capabilities.clone(),
        }
    }

    /// Has the token do what it is there for: `signatures` canaries through the lanes, and every key that is in use looked up anew,
    /// with its attributes read back and a test signature. The longest canary is the one that is told. Of a token that is out of service
    /// that alone is told, and nothing of its keys.
    pub async fn test(&self, signatures: usize) -> Vec<Check> {
        let token = &self.0;
        if let Err(error) = self.check_usable() {
            return vec![Check { name: "in service".into(), key: None, outcome: Err(error) }];
        }
        let mut checks = Vec::new();
        if let Some(canary) = token.canary() {
            let mut longest = Ok(Duration::ZERO);
            for _ in 0..signatures {
                let from = Instant::now();
                match health::sing(token, &canary, token.settings.sign_deadline).await {
                    Ok(()) => longest = longest.map(|longest: Duration| longest.max(from.elapsed())),
                    Err(SignError::NotSigned(error) | SignError::Unknown(error)) => {
                        longest = Err(error);
                        break;
                    }
                }
            }
            checks.push(Check { name: format!("{signatures} signatures"), key: None, outcome: longest });
        }
        let mut keys = token.keyring.all();
        keys.sort_by_key(|key| key.id.0);
        for key in keys {
            let (from, wanted) = (Instant::now(), key.clone());
            let found = token.errand(from + ADMIN_DEADLINE, move |session| objects::resolve(session, &wanted)).await;
            if matches!(found, Err(Error::KeyLost(_))) {
                key.set_location(Location::Lost { epoch: token.epoch() });
            }
            if let Err(error) = found.as_ref()
                && error.is_of_the_key()
            {
                key.set_trouble(Some(error.to_string()));
            }
            checks.push(Check { name: format!("key {}", key.id), key: Some(key.id), outcome: found.map(|_| from.elapsed()) });
        }
        if checks.is_empty() {
            let session = token.errand(Instant::now() + ADMIN_DEADLINE, |_| Ok(())).await;
            checks.push(Check { name: "a session".into(), key: None, outcome: session.map(|()| Duration::ZERO) });
        }
        checks
    }
}

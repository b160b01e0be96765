//! What a token can do, found out by doing it: what a mechanism list says is believed only where it cannot be tried.

use std::time::{Duration, Instant};

use cryptoki::mechanism::MechanismType;
use cryptoki::session::Session;
use cryptoki::slot::{Limit, Slot, TokenInfo};

use super::der;
use super::error::Error;
use super::faults::Place;
use super::keyring::Bound;
use super::modules::Module;
use super::objects::{self, Wanted};
use super::token::Token;
use super::wrapping::{self, Wrapping};
use crate::model::{Algorithm, KeyId};

/// A device that takes longer to make and use a P-256 key would need minutes for RSA's, and is not asked for them.
const QUICK: Duration = Duration::from_secs(1);

/// What a token can do, found out when it was opened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Capabilities {
    /// Ed25519 key pairs: tried with a session key pair; where those are refused, as the mechanism list says.
    pub ed25519: bool,
    /// P-384 key pairs: tried with a session key pair; where those are refused, not used.
    pub p384: bool,
    /// RSA key pairs of 2048 bits and RSASSA-PSS: tried with a session key pair where agents' keys live; where those are refused or slow to
    /// make, not used.
    pub ps256: bool,
    /// Private keys wrapped under an AES key of the token, and unwrapped: tried with session objects.
    pub wrapped_keys: bool,
    /// Ed25519 keys, too (SoftHSM 2.6 wraps none).
    pub wrapped_ed25519: bool,
    /// RSA keys, too.
    pub wrapped_ps256: bool,
    /// Key pairs that die with their session.
    pub session_keys: bool,
    /// Read-only sessions (CloudHSM has none).
    pub read_only_sessions: bool,
    /// Sessions at once, where the token names a limit (CK_TOKEN_INFO ulMaxSessionCount).
    pub sessions_max: Option<usize>,
    /// Names of the mechanisms, CKM_…
    pub mechanisms: Vec<String>,
    /// The form of CKA_EC_PARAMS that this token takes for Ed25519.
    pub(super) ed25519_params: Option<&'static [u8]>,
    /// How it wraps.
    pub(super) wrapping: Option<Wrapping>,
}

/// Asks the token, and tries with keys that die with their session.
///
/// # Errors
/// `Incapable` without ECDSA on P-256; when the mechanisms are not told.
pub(super) fn capabilities(
    module: &Module,
    label: &str,
    anchor: &Session,
    slot: Slot,
    info: &TokenInfo,
    for_agents: bool,
) -> Result<Capabilities, Error> {
    let context = module.context();
    // CloudHSM has no read-only sessions.
    let read_only_sessions = context.open_ro_session_no_drop(slot).map(Token::discard).is_ok();
    let list = context.get_mechanism_list(slot).map_err(|error| Error::at(Place::Mechanisms, error))?;
    let has = |kind: MechanismType| list.contains(&kind);
    if !has(MechanismType::ECDSA) || !has(MechanismType::ECC_KEY_PAIR_GEN) {
        return Err(Error::Incapable { label: label.into(), what: "ECDSA on P-256" });
    }
    let from = Instant::now();
    let session_keys = try_algorithm(module, anchor, Algorithm::P256, &der::P256_PARAMS);
    let quick = from.elapsed() < QUICK;
    let p384 = session_keys && try_algorithm(module, anchor, Algorithm::P384, &der::P384_PARAMS);
    let listed = has(MechanismType::EDDSA) && has(MechanismType::ECC_EDWARDS_KEY_PAIR_GEN);
    let forms = [&der::ED25519_PARAMS[..], &der::ED25519_PARAMS_NAME[..]];
    let form = match (listed, session_keys) {
        (false, _) => None,
        (true, true) => forms.into_iter().find(|form| try_algorithm(module, anchor, Algorithm::Ed25519, form)),
        (true, false) => Some(forms[0]), // cannot be tried without leaving something behind: believed
    };
    let curves = [Some((Algorithm::P256, &der::P256_PARAMS[..])), form.map(|form| (Algorithm::Ed25519, form))];
    let wrapping = if session_keys { try_wrapping(module, anchor, &curves, has) } else { None };
    let listed = has(MechanismType::RSA_PKCS_PSS) && has(MechanismType::RSA_PKCS_KEY_PAIR_GEN);
    let (ps256, wrapped_ps256) = if for_agents && session_keys && listed && quick {
        try_ps256(module, anchor, wrapping.map(|(way, _)| way))
    } else {
        (false, false)
    };
    let mut mechanisms: Vec<String> = list.iter().map(ToString::to_string).collect();
    mechanisms.sort_unstable();
    mechanisms.dedup();
    let sessions_max = match info.max_session_count() {
        Limit::Max(most) => usize::try_from(most).ok(),
        Limit::Unavailable | Limit::Infinite => None,
    };
    Ok(Capabilities {
        ed25519: form.is_some(),
        p384,
        ps256,
        wrapped_keys: wrapping.is_some(),
        wrapped_ed25519: wrapping.is_some_and(|(_, ed25519)| ed25519),
        wrapped_ps256,
        session_keys,
        read_only_sessions,
        sessions_max,
        mechanisms,
        ed25519_params: form,
        wrapping: wrapping.map(|(way, _)| way),
    })
}

/// Whether the token has such keys, and whether one that is wrapped comes back as it was. One key pair tells both, as a rule: it takes a while
/// to make.
fn try_ps256(module: &Module, session: &Session, way: Option<Wrapping>) -> (bool, bool) {
    let wrapped = way.is_some_and(|way| {
        let _objects = module.objects();
        let Ok(by) = wrapping::generate(session, KeyId::random(), "keyward/probe", false) else { return false };
        let tried = wrapping::round_trip(session, way, by, Algorithm::Ps256, &[]);
        tracing::debug!(?way, ?tried, "wrapping of RSA keys tried");
        if let Err(error) = session.destroy_object(by) {
            tracing::debug!(?error, "a probe key stays until its session ends");
        }
        tried.is_ok()
    });
    (wrapped || try_algorithm(module, session, Algorithm::Ps256, &[]), wrapped)
}

/// The first way of wrapping by which a P-256 key comes back as it was, and whether an Ed25519 key does.
fn try_wrapping(
    module: &Module,
    session: &Session,
    curves: &[Option<(Algorithm, &[u8])>; 2],
    has: impl Fn(MechanismType) -> bool,
) -> Option<(Wrapping, bool)> {
    let _objects = module.objects();
    let id = KeyId::random();
    let by = wrapping::generate(session, id, "keyward/probe", false).ok()?;
    let works = |way: Wrapping, curve: Option<(Algorithm, &[u8])>| {
        curve.is_some_and(|(algorithm, params)| {
            let tried = wrapping::round_trip(session, way, by, algorithm, params);
            tracing::debug!(?way, ?algorithm, ?tried, "wrapping tried");
            tried.is_ok()
        })
    };
    let way = Wrapping::ALL.into_iter().find(|way| has(way.kind()) && works(*way, curves[0]));
    let found = way.map(|way| (way, works(way, curves[1])));
    if let Err(error) = session.destroy_object(by) {
        tracing::debug!(?error, "a probe key stays until its session ends");
    }
    found
}

/// Generate, sign, verify, destroy: with a session key pair.
fn try_algorithm(module: &Module, session: &Session, algorithm: Algorithm, params: &[u8]) -> bool {
    let id = KeyId::random();
    let wanted = Wanted { algorithm, params, id: &id.0, label: "keyward/probe", durable: false, extractable: false };
    let _objects = module.objects();
    let Ok((public, private)) = wanted.generate(session) else { return false };
    let works = objects::read_public(session, public)
        .and_then(|public| Ok(Bound::agents(id, public, None)?))
        .and_then(|key| objects::test_sign(session, private, &key));
    for object in [private, public] {
        if let Err(error) = session.destroy_object(object) {
            tracing::debug!(?error, "a probe key stays until its session ends");
        }
    }
    works.is_ok()
}

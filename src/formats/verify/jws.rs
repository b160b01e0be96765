//! A received JWS: compact, or with the payload beside it.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value};

use super::{Ends, Memory, Over, SignedBytes, VerifyingKey, Window, missing, named_algorithm, unknown_kid};
use crate::formats::algorithm::SIGNATURE_BYTES_MAX;
use crate::formats::jws::{HEADER_BYTES_MAX, refuse_reserved};
use crate::formats::signing::Profile;
use crate::formats::{NAME_BYTES_MAX, PAYLOAD_BYTES_MAX, algorithm, check_name, json, malformed, too_large};
use crate::model::{Algorithm, Reason, Refusal};

/// Most audiences of one token.
const AUDIENCES_MAX: usize = 64;

/// A JWS whose signature nobody has looked at.
pub struct Received {
    signed: SignedBytes,
    typ: Option<String>,
    payload: Vec<u8>,
}

/// What the claims have to say (RFC 7519). Without this a payload is bytes, and nothing is said about time or audience.
#[derive(Clone, Copy)]
pub struct Expected<'a> {
    /// `aud` is this text, or a list with this text in it. There is no way to accept any audience.
    pub audience: &'a str,
    /// `exp` has to be there; `nbf` and `iat` hold where they are.
    pub window: Window,
    /// With it `jti` and `iat` have to be there, and the token is accepted once.
    pub once: Option<Memory<'a>>,
}

/// A JWS that is its key's.
#[derive(Debug, Clone, PartialEq)]
pub struct Verified {
    /// The key.
    pub kid: String,
    /// `typ`, where the header has one.
    pub typ: Option<String>,
    /// The payload as it was signed.
    pub payload: Vec<u8>,
    /// The claims, where they were expected.
    pub claims: Option<Map<String, Value>>,
}

impl Received {
    /// Takes `token` apart; `detached` is the payload of a `header..signature`.
    ///
    /// # Errors
    /// `REQUEST_TOO_LARGE`, `MALFORMED_REQUEST` (also for `crit` and `b64`), `ALGORITHM_REFUSED`, `KID_UNKNOWN` without a kid,
    /// `PROFILE_MISMATCH` for a type that a JWS key never signs.
    pub fn parse(token: &str, detached: Option<&[u8]>) -> Result<Self, Refusal> {
        let parts = Parts::of(token)?;
        let header = json::object("header", &parts.header)?;
        let algorithm = signature_algorithm(&header)?;
        let kid = match json::text(&header, "kid")? {
            Some(kid) if check_name("kid", kid).is_ok() => kid.to_owned(),
            _ => return Err(unknown_kid()),
        };
        let typ = json::text(&header, "typ")?.map(str::to_owned);
        if let Some(typ) = &typ {
            refuse_reserved(typ)?;
        }
        let (message, payload) = match detached {
            None => (parts.message.to_owned(), parts.payload),
            Some(_) if !parts.payload.is_empty() => {
                return Err(malformed("send either a payload within the JWS or one beside it"));
            }
            Some(payload) if payload.len() > PAYLOAD_BYTES_MAX => return Err(payload_too_large()),
            Some(payload) => (format!("{}{}", parts.message, URL_SAFE_NO_PAD.encode(payload)), payload.to_vec()),
        };
        let signed = SignedBytes { kid, algorithm: Some(algorithm), message: message.into_bytes(), signature: parts.signature };
        Ok(Self { signed, typ, payload })
    }

    /// The key that the message names.
    #[must_use]
    pub fn kid(&self) -> &str {
        &self.signed.kid
    }

    /// Verifies with the key that [`Received::kid`] named, then reads the claims where some are expected.
    ///
    /// # Errors
    /// `PROFILE_MISMATCH`, `KID_UNKNOWN`, `ALGORITHM_REFUSED`, `SIGNATURE_INVALID`; for the claims `MALFORMED_REQUEST`,
    /// `AUDIENCE_MISMATCH`, `MESSAGE_EXPIRED`, `OUTSIDE_TIME_WINDOW`, `REPLAYED`, `OVERLOADED`.
    pub fn check(self, key: &VerifyingKey, expected: Option<&Expected<'_>>) -> Result<Verified, Refusal> {
        key.check(Profile::Jws, &self.signed).map_err(|refusal| match refusal.reason {
            Reason::SignatureInvalid if self.payload.is_empty() => {
                let advice = "the signature does not fit an empty payload; where the payload is detached, send it as well";
                Refusal::new(Reason::SignatureInvalid, advice)
            }
            _ => refusal,
        })?;
        let claims = expected.map(|expected| expected.check(&self.signed.kid, &self.payload)).transpose()?;
        Ok(Verified { kid: self.signed.kid, typ: self.typ, payload: self.payload, claims })
    }
}

impl Expected<'_> {
    fn check(&self, kid: &str, payload: &[u8]) -> Result<Map<String, Value>, Refusal> {
        let claims = json::object("payload", payload)?;
        if !self.is_for_audience(&claims)? {
            return Err(Refusal::new(Reason::AudienceMismatch, "the message is for another audience"));
        }
        let made = json::seconds(&claims, "iat")?;
        let end = json::seconds(&claims, "exp")?.ok_or_else(|| missing("exp"))?;
        for from in [made, json::seconds(&claims, "nbf")?].into_iter().flatten() {
            self.window.check_made(from)?;
        }
        self.window.check_end(end)?;
        if let Some(once) = self.once {
            let jti = json::text(&claims, "jti")?.ok_or_else(|| missing("jti"))?;
            let made = made.ok_or_else(|| missing("iat"))?;
            let over = Over { made, end: self.window.last_second(end), by: Ends::ForEverybody };
            once.accept(kid, check_name("jti", jti)?, over, self.window.now)?;
        }
        Ok(claims)
    }

    fn is_for_audience(&self, claims: &Map<String, Value>) -> Result<bool, Refusal> {
        match claims.get("aud") {
            Some(Value::String(audience)) => Ok(audience == self.audience),
            Some(Value::Array(audiences)) if audiences.len() <= AUDIENCES_MAX => {
                Ok(audiences.iter().any(|audience| audience == self.audience))
            }
            Some(_) => Err(malformed("aud is a text or a short list of texts")),
            None => Err(missing("aud")),
        }
    }
}

/// A compact serialisation, decoded.
pub(super) struct Parts<'a> {
    pub(super) header: Vec<u8>,
    pub(super) payload: Vec<u8>,
    pub(super) signature: Vec<u8>,
    /// What was signed: everything before the last dot.
    pub(super) message: &'a str,
}

impl<'a> Parts<'a> {
    /// # Errors
    /// `REQUEST_TOO_LARGE`, and `MALFORMED_REQUEST` unless it is three parts of base64url in its one canonical form.
    pub(super) fn of(token: &'a str) -> Result<Self, Refusal> {
        let malformed = || malformed("send a JWS in compact serialisation: header.payload.signature");
        let (message, signature) = token.rsplit_once('.').ok_or_else(malformed)?;
        let (header, payload) = message.split_once('.').ok_or_else(malformed)?;
        // Twice what may be signed: there are members that keyward sets.
        if header.len() > 2 * HEADER_BYTES_MAX + 2 * NAME_BYTES_MAX {
            return Err(too_large("send a JWS with a shorter header"));
        }
        if payload.len() > PAYLOAD_BYTES_MAX.div_ceil(3) * 4 || signature.len() > SIGNATURE_BYTES_MAX.div_ceil(3) * 4 {
            return Err(payload_too_large());
        }
        let decode = |part: &str| URL_SAFE_NO_PAD.decode(part).map_err(|error| malformed().because(error));
        Ok(Self { header: decode(header)?, payload: decode(payload)?, signature: decode(signature)?, message })
    }
}

/// The algorithm, in a header that changes nothing about how it is verified.
pub(super) fn signature_algorithm(header: &Map<String, Value>) -> Result<Algorithm, Refusal> {
    let named = json::text(header, "alg")?.ok_or_else(|| missing("alg"))?;
    let algorithm = named_algorithm(named, |known| Some(algorithm::jws_name(known)))?;
    match ["crit", "b64", "zip", "enc"].iter().find(|name| header.contains_key(**name)) {
        Some(name) => Err(malformed(format!("send a JWS without {name}: no extension is understood here"))),
        None => Ok(algorithm),
    }
}

fn payload_too_large() -> Refusal {
    too_large(format!("send a JWS with a payload of at most {PAYLOAD_BYTES_MAX} bytes"))
}

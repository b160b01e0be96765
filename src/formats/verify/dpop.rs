//! A received DPoP proof (RFC 9449 §4.3).

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::Value;

use super::jws::{Parts, signature_algorithm};
use super::{Ends, Memory, Over, SignedBytes, VerifyingKey, Window, elsewhere, missing};
use crate::formats::dpop::{Request, TYP, canonical_uri};
use crate::formats::jwk::Jwk;
use crate::formats::signing::Profile;
use crate::formats::{check_name, json};
use crate::model::{Reason, Refusal};

/// A proof whose signature nobody has looked at.
pub struct Received {
    signed: SignedBytes,
    claims: Vec<u8>,
}

/// What the request says that the proof came with.
#[derive(Clone, Copy)]
pub struct Expected<'a> {
    /// Method, URI (query and fragment cut off), the digest of the access token where one came along, the nonce where one was
    /// given out.
    pub request: Request<'a>,
    /// A proof counts from its `iat` for `lifetime_seconds_max`.
    pub window: Window,
    /// A proof counts once.
    pub once: Memory<'a>,
}

/// A proof that is its key's, for this request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// The thumbprint of the key (`jkt`), to be compared with the access token's `cnf`.
    pub kid: String,
    /// The name of the proof.
    pub jti: String,
}

impl Received {
    /// Takes a proof apart.
    ///
    /// # Errors
    /// `REQUEST_TOO_LARGE`, `MALFORMED_REQUEST`, `ALGORITHM_REFUSED`, `KEY_UNSUPPORTED`, `PROFILE_MISMATCH` unless `typ` is `dpop+jwt`.
    pub fn parse(proof: &str) -> Result<Self, Refusal> {
        let parts = Parts::of(proof)?;
        let header = json::object("header", &parts.header)?;
        if json::text(&header, "typ")? != Some(TYP) {
            return Err(Refusal::new(Reason::ProfileMismatch, "send a DPoP proof: a JWS with the typ dpop+jwt"));
        }
        let algorithm = signature_algorithm(&header)?;
        let jwk = header.get("jwk").and_then(Value::as_object).ok_or_else(|| missing("jwk"))?;
        let kid = Jwk::thumbprint(&Jwk::parse(jwk)?);
        let signed = SignedBytes { kid, algorithm: Some(algorithm), message: parts.message.into(), signature: parts.signature };
        Ok(Self { signed, claims: parts.payload })
    }

    /// The thumbprint of the key in the proof: look up the key that is known under it.
    #[must_use]
    pub fn kid(&self) -> &str {
        &self.signed.kid
    }

    /// Verifies with the known key, then compares the proof with the request.
    ///
    /// # Errors
    /// `PROFILE_MISMATCH`, `KID_UNKNOWN`, `ALGORITHM_REFUSED`, `SIGNATURE_INVALID`; for the claims `MALFORMED_REQUEST`, `BINDING_MISMATCH`,
    /// `MESSAGE_EXPIRED`, `OUTSIDE_TIME_WINDOW`, `REPLAYED`, `OVERLOADED`.
    pub fn check(self, key: &VerifyingKey, expected: &Expected<'_>) -> Result<Verified, Refusal> {
        key.check(Profile::Dpop, &self.signed)?;
        let claims = json::object("payload", &self.claims)?;
        let text = |name| json::text(&claims, name)?.ok_or_else(|| missing(name));
        let Expected { request, window, once } = expected;
        if text("htm")? != request.method {
            return Err(elsewhere("htm"));
        }
        if canonical_uri(text("htu")?)? != canonical_uri(request.uri)? {
            return Err(elsewhere("htu"));
        }
        if let Some(digest) = request.token_digest
            && json::text(&claims, "ath")? != Some(URL_SAFE_NO_PAD.encode(digest.0).as_str())
        {
            return Err(elsewhere("ath"));
        }
        if let Some(nonce) = request.nonce
            && json::text(&claims, "nonce")? != Some(nonce)
        {
            return Err(elsewhere("nonce"));
        }
        let made = json::seconds(&claims, "iat")?.ok_or_else(|| missing("iat"))?;
        let end = made.saturating_add(window.lifetime_seconds_max);
        window.check_made(made)?;
        window.check_end(end)?;
        let jti = check_name("jti", text("jti")?)?.to_owned();
        let over = Over { made, end: window.last_second(end), by: Ends::ForEverybody };
        once.accept(&self.signed.kid, &jti, over, window.now)?;
        Ok(Verified { kid: self.signed.kid, jti })
    }
}

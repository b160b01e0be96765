//! A public key as JSON (RFC 7517, RFC 7518 §6.2 and §6.3, RFC 8037 §2), and its name (RFC 7638).

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Map, Value, json};

use super::signing::Profile;
use super::{algorithm, json, malformed};
use crate::model::{Algorithm, Digest, PublicKey, Reason, Refusal};

/// The exponent 65537.
const EXPONENT: &str = "AQAB";

/// A public key as a JSON Web Key.
#[derive(Debug, Clone, PartialEq)]
pub struct Jwk(Map<String, Value>);

impl Jwk {
    /// The members that make the key, and no others: `kty`, `crv`, `x`, `y`, or `kty`, `n`, `e`. This is what a DPoP proof carries.
    #[must_use]
    pub fn bare(key: &PublicKey) -> Self {
        let (kty, crv) = algorithm::key_type(key.algorithm());
        let mut members = Map::new();
        members.insert("kty".into(), kty.into());
        let raw = key.raw();
        if !crv.is_empty() {
            members.insert("crv".into(), crv.into());
        }
        match key.algorithm() {
            Algorithm::Ps256 => {
                members.insert("n".into(), URL_SAFE_NO_PAD.encode(raw).into());
                members.insert("e".into(), EXPONENT.into());
            }
            Algorithm::Ed25519 => {
                members.insert("x".into(), URL_SAFE_NO_PAD.encode(raw).into());
            }
            // An uncompressed point: 4, x, y.
            Algorithm::P256 | Algorithm::P384 => {
                let (x, y) = raw[1..].split_at((raw.len() - 1) / 2);
                members.insert("x".into(), URL_SAFE_NO_PAD.encode(x).into());
                members.insert("y".into(), URL_SAFE_NO_PAD.encode(y).into());
            }
        }
        Self(members)
    }

    /// As it stands in a JWKS: with `kid` (the thumbprint), `use` and `alg`. `None` for a key of a profile whose signatures must
    /// never be looked for in a JWKS: a raw digest may be the digest of anything, a TLS key is known by its
    /// certificate, a DPoP key by the proof.
    #[must_use]
    pub fn published(profile: Profile, key: &PublicKey) -> Option<Self> {
        match profile {
            Profile::Jws | Profile::HttpMessageSignature => {}
            Profile::Dpop | Profile::RawDigest | Profile::Tls => return None,
        }
        let mut jwk = Self::bare(key);
        jwk.0.insert("kid".into(), Self::thumbprint(key).into());
        jwk.0.insert("use".into(), "sig".into());
        jwk.0.insert("alg".into(), algorithm::jws_name(key.algorithm()).into());
        Some(jwk)
    }

    /// Parses a public key; members that do not make the key may be there.
    ///
    /// # Errors
    /// `KEY_UNSUPPORTED` for another kind of key or a point off its curve; `MALFORMED_REQUEST` for a private or symmetric
    /// key, and for `use`, `alg` or `key_ops` that are not those of a signature key of this algorithm.
    pub fn parse(members: &Map<String, Value>) -> Result<PublicKey, Refusal> {
        if ["d", "p", "q", "dp", "dq", "qi", "oth", "k"].iter().any(|private| members.contains_key(*private)) {
            return Err(malformed("send the public key alone; this private key is no secret any more"));
        }
        let unsupported = || Refusal::new(Reason::KeyUnsupported, "use a JWK on P-256, P-384 or Ed25519, or RSA of 2048 bits");
        let named = (json::text(members, "kty")?.unwrap_or_default(), json::text(members, "crv")?.unwrap_or_default());
        let algorithm = algorithm::ALL.into_iter().find(|known| algorithm::key_type(*known) == named).ok_or_else(unsupported)?;
        let coordinate = |name| -> Result<Vec<u8>, Refusal> {
            let text = json::text(members, name)?.ok_or_else(unsupported)?;
            URL_SAFE_NO_PAD.decode(text).map_err(|error| unsupported().because(error))
        };
        let raw = match algorithm {
            Algorithm::Ed25519 => coordinate("x")?,
            Algorithm::Ps256 if json::text(members, "e")? != Some(EXPONENT) => return Err(unsupported()),
            Algorithm::Ps256 => coordinate("n")?,
            Algorithm::P256 | Algorithm::P384 => {
                let (x, y) = (coordinate("x")?, coordinate("y")?);
                if x.len() != y.len() {
                    return Err(unsupported());
                }
                [&[4], &x[..], &y[..]].concat()
            }
        };
        let fits = json::text(members, "use")?.is_none_or(|purpose| purpose == "sig")
            && json::text(members, "alg")?.is_none_or(|alg| alg == algorithm::jws_name(algorithm))
            && members.get("key_ops").is_none_or(|ops| ops.as_array().is_some_and(|ops| ops.contains(&json!("verify"))));
        if !fits {
            return Err(malformed("send a key whose use, alg and key_ops are those of a signature"));
        }
        PublicKey::from_raw(algorithm, &raw).map_err(|error| unsupported().because(error))
    }

    /// The name of a key: its RFC 7638 SHA-256 thumbprint in base64url.
    #[must_use]
    pub fn thumbprint(key: &PublicKey) -> String {
        // RFC 7638 §3.3: the required members alone, in lexicographic order, without white space. None needs escaping.
        let members = Self::bare(key).0;
        let ordered: Vec<String> = ["crv", "e", "kty", "n", "x", "y"]
            .iter()
            .filter_map(|name| Some(format!("\"{name}\":\"{}\"", members.get(*name)?.as_str()?)))
            .collect();
        URL_SAFE_NO_PAD.encode(Digest::of(format!("{{{}}}", ordered.join(",")).as_bytes()).0)
    }

    /// Its members.
    #[must_use]
    pub fn members(&self) -> &Map<String, Value> {
        &self.0
    }
}

/// A JWK Set (RFC 7517 §5). An empty one is valid and says that nothing is to be trusted.
#[must_use]
pub fn jwks(keys: impl IntoIterator<Item = Jwk>) -> String {
    json!({ "keys": keys.into_iter().map(|key| Value::Object(key.0)).collect::<Vec<_>>() }).to_string()
}

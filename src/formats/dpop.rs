//! Demonstrating Proof of Possession (RFC 9449): a JWT that binds one HTTP request to a key.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use http::Uri;
use serde_json::json;

use super::jwk::Jwk;
use super::signing::{Assembly, Profile, SigningInput};
use super::{algorithm, check_name, malformed, too_large};
use crate::model::{Digest, PublicKey, Refusal, UnixTime};

/// `typ` of a proof.
pub(super) const TYP: &str = "dpop+jwt";

/// Longest request URI, in bytes.
const URI_BYTES_MAX: usize = 2048;

/// The one request a proof is for.
#[derive(Debug, Clone, Copy)]
pub struct Request<'a> {
    /// `htm`: the HTTP method.
    pub method: &'a str,
    /// `htu`: the URI of the target, http or https, without query and fragment.
    pub uri: &'a str,
    /// `ath`: SHA-256 of the access token that is shown with the proof. The token itself never comes here.
    pub token_digest: Option<Digest>,
    /// `nonce`: what the server gave.
    pub nonce: Option<&'a str>,
}

/// A proof by `key`. `jti` names it among all of this key's proofs (≥ 96 random bits); `now` is its `iat`.
///
/// # Errors
/// `MALFORMED_REQUEST`, `REQUEST_TOO_LARGE`.
pub fn prepare(key: &PublicKey, request: &Request<'_>, jti: &str, now: UnixTime) -> Result<SigningInput, Refusal> {
    check_method(request.method)?;
    canonical_uri(request.uri)?;
    let header = json!({ "typ": TYP, "alg": algorithm::jws_name(key.algorithm()), "jwk": Jwk::bare(key).members() });
    let mut claims = json!({
        "jti": check_name("jti", jti)?,
        "htm": request.method,
        "htu": request.uri,
        "iat": now.seconds(),
    });
    if let Some(digest) = request.token_digest {
        claims["ath"] = URL_SAFE_NO_PAD.encode(digest.0).into();
    }
    if let Some(nonce) = request.nonce {
        claims["nonce"] = check_name("nonce", nonce)?.into();
    }
    let message = format!("{}.{}", URL_SAFE_NO_PAD.encode(header.to_string()), URL_SAFE_NO_PAD.encode(claims.to_string()));
    Ok(SigningInput::of_message(Profile::Dpop, key.algorithm(), message.as_bytes(), Assembly::Compact(message.clone())))
}

fn check_method(method: &str) -> Result<(), Refusal> {
    if method.is_empty() || method.len() > 32 || !method.bytes().all(|byte| byte.is_ascii_alphabetic() || byte == b'-') {
        return Err(malformed("give htm as an HTTP method, for example POST"));
    }
    Ok(())
}

/// `htu` as it is compared: scheme and host in lower case, no default port, at least `/` as the path (RFC 9449 §4.3 no. 9,
/// RFC 3986 §6.2.2.1 and §6.2.3). Paths are compared byte for byte.
///
/// # Errors
/// `MALFORMED_REQUEST` unless it is an http or https URI with a host and without user, query and fragment.
pub(super) fn canonical_uri(text: &str) -> Result<String, Refusal> {
    if text.len() > URI_BYTES_MAX {
        return Err(too_large(format!("give a URI of at most {URI_BYTES_MAX} bytes")));
    }
    let wrong = || malformed("give htu as an http or https URI without user, query and fragment");
    let uri: Uri = text.parse().map_err(|error: http::uri::InvalidUri| wrong().because(error))?;
    let (Some(scheme), Some(authority)) = (uri.scheme_str(), uri.authority()) else { return Err(wrong()) };
    let scheme = scheme.to_ascii_lowercase();
    let default_port = match scheme.as_str() {
        "https" => 443,
        "http" => 80,
        _ => return Err(wrong()),
    };
    if text.contains(['?', '#']) || !text.is_ascii() || authority.as_str().contains('@') || authority.host().is_empty() {
        return Err(wrong());
    }
    // There is no user, so the port is what follows the host; http::Uri itself overlooks one that is too large.
    let port = match authority.as_str().strip_prefix(authority.host()).and_then(|rest| rest.strip_prefix(':')) {
        None => String::new(),
        Some(port) if !port.bytes().all(|byte| byte.is_ascii_digit()) => return Err(wrong()),
        Some(port) => match port.parse::<u16>().map_err(|error| wrong().because(error))? {
            port if port == default_port => String::new(),
            port => format!(":{port}"),
        },
    };
    let host = authority.host().to_ascii_lowercase();
    Ok(format!("{scheme}://{host}{port}{}", uri.path()))
}

//! JSON Web Signatures: compact, and with detached content (RFC 7515, its appendix F).
//!
//! Detached means that the payload does not travel; it is encoded and signed all the same. The unencoded payload of RFC 7797
//! (`b64: false`) is not offered: a verifier that overlooks `crit` would read other bytes than were signed.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::Map;

use super::signing::{Assembly, Profile, SigningInput};
use super::{NAME_BYTES_MAX, PAYLOAD_BYTES_MAX, algorithm, check_name, json, malformed, too_large};
use crate::model::{Algorithm, Reason, Refusal};

/// Most bytes of further header members, as JSON.
pub const HEADER_BYTES_MAX: usize = 2048;

/// Most further header members.
const HEADER_MEMBERS_MAX: usize = 16;

/// Types that say more than "the holder of this key said so": proofs of possession, which have a profile of their own or
/// will have one, and what only an issuer states. A key for JWS signs none of them.
pub const RESERVED_TYPES: [&str; 9] = [
    "dpop+jwt",
    "wpt+jwt",
    "kb+jwt",
    "wit+jwt",
    "at+jwt",
    "secevent+jwt",
    "logout+jwt",
    "token-introspection+jwt",
    "entity-statement+jwt",
];

/// Members that keyward sets, that would change what is verified, or that would offer a verifier another key, there or to be fetched: the
/// key that signs would then say of any other that it is the agent's. In whatever case: readers that do not mind it are about. In lower case
/// here.
const RESERVED_MEMBERS: [&str; 17] = [
    "alg",
    "kid",
    "typ",
    "crit",
    "b64",
    "jku",
    "jwk",
    "jwks",
    "x5c",
    "x5u",
    "x5t",
    "x5t#s256",
    "trust_chain",
    "peer_trust_chain",
    "enc",
    "zip",
    "epk",
];

/// What the caller may say in the protected header.
#[derive(Debug, Clone, Copy, Default)]
pub struct Header<'a> {
    /// `typ`: a media type, `application/` left out or not.
    pub typ: Option<&'a str>,
    /// Further members as a JSON object, for example `{"cty":"json","iss":"…"}`; empty for none.
    pub extra: &'a [u8],
}

/// A JWS by the key `kid`. With `detached` the answer is `header..signature`.
///
/// # Errors
/// `REQUEST_TOO_LARGE`; `MALFORMED_REQUEST` for header members that are not the caller's; `PROFILE_MISMATCH` for a reserved type.
pub fn prepare(
    algorithm: Algorithm,
    kid: &str,
    header: &Header<'_>,
    payload: &[u8],
    detached: bool,
) -> Result<SigningInput, Refusal> {
    if payload.len() > PAYLOAD_BYTES_MAX {
        return Err(too_large(format!("sign a payload of at most {PAYLOAD_BYTES_MAX} bytes")));
    }
    let mut members = extra_members(header.extra)?;
    if let Some(typ) = header.typ {
        refuse_reserved(typ)?;
        members.insert("typ".into(), typ.into());
    }
    members.insert("alg".into(), algorithm::jws_name(algorithm).into());
    members.insert("kid".into(), check_name("kid", kid)?.into());
    let header = URL_SAFE_NO_PAD.encode(serde_json::Value::Object(members).to_string());
    let message = format!("{header}.{}", URL_SAFE_NO_PAD.encode(payload));
    let assembly = if detached { Assembly::Detached { header } } else { Assembly::Compact(message.clone()) };
    Ok(SigningInput::of_message(Profile::Jws, algorithm, message.as_bytes(), assembly))
}

/// A type that a key for JWS may neither sign nor be believed with.
pub(super) fn refuse_reserved(typ: &str) -> Result<(), Refusal> {
    let characters = |c: char| c.is_ascii_alphanumeric() || "!#$&-^_.+/".contains(c);
    if typ.is_empty() || typ.len() > NAME_BYTES_MAX || !typ.chars().all(characters) {
        return Err(malformed("give a typ that is a media type without parameters"));
    }
    // RFC 7515 §4.1.9: letter case says nothing, and "application/" is left out where nothing else has a slash. Any
    // part that is reserved is refused, so that no reader's own way of shortening finds one.
    let lower = typ.to_ascii_lowercase();
    if lower.split('/').any(|part| RESERVED_TYPES.contains(&part)) {
        return Err(Refusal::new(Reason::ProfileMismatch, "sign this type with a key of its own purpose; a jws key never does"));
    }
    Ok(())
}

fn extra_members(text: &[u8]) -> Result<Map<String, serde_json::Value>, Refusal> {
    if text.is_empty() {
        return Ok(Map::new());
    }
    if text.len() > HEADER_BYTES_MAX {
        return Err(too_large(format!("give at most {HEADER_BYTES_MAX} bytes of further header members")));
    }
    let members = json::object("header", text)?;
    if members.len() > HEADER_MEMBERS_MAX {
        return Err(too_large(format!("give at most {HEADER_MEMBERS_MAX} further header members")));
    }
    // K and S have a second capital each beyond ASCII, which some readers take for them.
    if members.keys().any(|name| name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_graphic())) {
        return Err(malformed("name further header members in visible ASCII"));
    }
    match members.keys().find(|name| RESERVED_MEMBERS.contains(&name.to_ascii_lowercase().as_str())) {
        Some(reserved) => Err(malformed(format!("leave {reserved} out of the further header members"))),
        None => Ok(members),
    }
}

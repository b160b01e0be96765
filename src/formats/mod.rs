//! What a signature of an agent's key is over, and how it travels.
//!
//! Owns: the five profiles that an agent's key may sign ([`Profile`]), for each the exact bytes that are signed
//! ([`SigningInput`], made only here from the caller's parts) and the assembled answer ([`Signed`]); public keys as JWK,
//! thumbprint and JWKS; the bundle as SPIFFE tells it; and the checks of a received signature, with the memory of what was accepted ([`ReplayCache`]).
//!
//! Promises: a key signs one profile, and no bytes of one profile are bytes of another. A JWS and a DPoP proof begin with
//! `eyJ` and are told apart by `typ`, which a JWS key may not choose among the reserved ([`jws::RESERVED_TYPES`]); the base of an
//! HTTP signature begins with a quotation mark; what TLS signs begins with 64 spaces; what a key is tried with by the token's room begins
//! with `keyward/`, which none of these does. A raw digest could be the digest of anything:
//! its keys, like those of TLS and DPoP, are in no JWKS ([`Jwk::published`]), and a verifier here asks which profile a key is for.
//! Every size is bounded; a JSON member that occurs twice is refused; a received message is verified before its claims are read.
//!
//! Never: a private key, the token, the ledger; who may sign or whose key it is; a network look-up (`jku`, `x5u`), nor a
//! key taken from the message it verifies.

mod algorithm;
pub mod dpop;
pub mod http_signature;
mod json;
mod jwk;
pub mod jws;
pub mod raw_digest;
mod signing;
mod spiffe_bundle;
pub mod tls;
pub mod verify;

pub use jwk::{Jwk, jwks};
pub use signing::{Profile, Signed, SigningInput};
pub use spiffe_bundle::{SpiffeBundle, UnknownAuthority};
pub use verify::{Bounds, Memory, ReplayCache, VerifyingKey, Window};

use crate::model::{Reason, Refusal};

/// Largest payload that is signed or verified, in bytes: of a JWS before base64, of all values that an HTTP signature covers.
pub const PAYLOAD_BYTES_MAX: usize = 65_536;

/// Longest `kid`, `jti`, nonce, tag, label and the like, in bytes.
pub const NAME_BYTES_MAX: usize = 256;

fn malformed(advice: impl Into<String>) -> Refusal {
    Refusal::new(Reason::MalformedRequest, advice)
}

fn too_large(advice: impl Into<String>) -> Refusal {
    Refusal::new(Reason::RequestTooLarge, advice)
}

/// A name that stands in a header: visible ASCII, not empty, bounded.
fn check_name<'a>(what: &str, name: &'a str) -> Result<&'a str, Refusal> {
    if name.len() > NAME_BYTES_MAX {
        return Err(too_large(format!("give a {what} of at most {NAME_BYTES_MAX} bytes")));
    }
    if name.is_empty() || !name.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(malformed(format!("give a {what} of visible ASCII characters without spaces")));
    }
    Ok(name)
}

#[cfg(test)]
mod tests;

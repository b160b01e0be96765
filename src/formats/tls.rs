//! The CertificateVerify of TLS 1.3 (RFC 8446 §4.4.3): a TLS library whose key is here hands over its transcript hash.

use super::signing::{Assembly, Profile, SigningInput};
use crate::model::{Algorithm, Reason, Refusal};

/// Which side of the handshake signs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// The one that connects.
    Client,
    /// The one that is connected to.
    Server,
}

/// The signed content: 64 spaces, the context of the role, a zero, the transcript hash (SHA-256 or SHA-384, by the cipher suite
/// and not by the key).
///
/// # Errors
/// `DIGEST_LENGTH_INVALID` for a hash that is neither 32 nor 48 bytes.
pub fn prepare(algorithm: Algorithm, role: Role, transcript_hash: &[u8]) -> Result<SigningInput, Refusal> {
    if !matches!(transcript_hash.len(), 32 | 48) {
        return Err(Refusal::new(Reason::DigestLengthInvalid, "send the transcript hash of the handshake: 32 or 48 bytes"));
    }
    let message = content(role, transcript_hash);
    Ok(SigningInput::of_message(Profile::Tls, algorithm, &message, Assembly::Bare))
}

pub(super) fn content(role: Role, transcript_hash: &[u8]) -> Vec<u8> {
    let context: &[u8] = match role {
        Role::Client => b"TLS 1.3, client CertificateVerify",
        Role::Server => b"TLS 1.3, server CertificateVerify",
    };
    [&[b' '; 64], context, &[0], transcript_hash].concat()
}

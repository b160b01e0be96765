//! What differs between algorithms: their names in each format, the digest the token gets, the form of a signature.

use std::sync::Arc;

use aws_lc_rs::digest;
use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ED25519, UnparsedPublicKey, VerificationAlgorithm};

use crate::model::{Algorithm, PublicKey, ecdsa_sig_value};

/// `alg` of a JWS (RFC 7518 §3.1, RFC 8037 §3.1).
pub(super) fn jws_name(algorithm: Algorithm) -> &'static str {
    match algorithm {
        Algorithm::P256 => "ES256",
        Algorithm::P384 => "ES384",
        Algorithm::Ed25519 => "EdDSA",
    }
}

/// `alg` of an HTTP signature (RFC 9421 §6.2.2).
pub(super) fn http_name(algorithm: Algorithm) -> &'static str {
    match algorithm {
        Algorithm::P256 => "ecdsa-p256-sha256",
        Algorithm::P384 => "ecdsa-p384-sha384",
        Algorithm::Ed25519 => "ed25519",
    }
}

/// `kty` and `crv` of a JWK (RFC 7518 §6.2.1, RFC 8037 §2).
pub(super) fn key_type(algorithm: Algorithm) -> (&'static str, &'static str) {
    match algorithm {
        Algorithm::P256 => ("EC", "P-256"),
        Algorithm::P384 => ("EC", "P-384"),
        Algorithm::Ed25519 => ("OKP", "Ed25519"),
    }
}

/// Those that keyward knows.
pub(super) const ALL: [Algorithm; 3] = [Algorithm::P256, Algorithm::P384, Algorithm::Ed25519];

/// Bytes of `r ‖ s`, or of an Ed25519 signature.
pub(super) fn signature_size(algorithm: Algorithm) -> usize {
    match algorithm {
        Algorithm::P256 | Algorithm::Ed25519 => 64,
        Algorithm::P384 => 96,
    }
}

/// The hash of an ECDSA algorithm; `None` for Ed25519, which signs messages.
pub(super) fn hash(algorithm: Algorithm) -> Option<&'static digest::Algorithm> {
    match algorithm {
        Algorithm::P256 => Some(&digest::SHA256),
        Algorithm::P384 => Some(&digest::SHA384),
        Algorithm::Ed25519 => None,
    }
}

/// What the token signs: the digest, or for Ed25519 the message itself.
pub(super) fn for_token(algorithm: Algorithm, message: &[u8]) -> Arc<[u8]> {
    match hash(algorithm) {
        Some(hash) => digest::digest(hash, message).as_ref().into(),
        None => message.into(),
    }
}

/// Whether `signature` (`r ‖ s`, RFC 7518 §3.4, or Ed25519's 64 bytes) is `key`'s over `message`.
pub(super) fn verifies(key: &PublicKey, message: &[u8], signature: &[u8]) -> bool {
    let algorithm: &'static dyn VerificationAlgorithm = match key.algorithm() {
        Algorithm::P256 => &ECDSA_P256_SHA256_FIXED,
        Algorithm::P384 => &ECDSA_P384_SHA384_FIXED,
        Algorithm::Ed25519 => &ED25519,
    };
    UnparsedPublicKey::new(algorithm, key.raw()).verify(message, signature).is_ok()
}

/// `r ‖ s` as ECDSA-Sig-Value in DER, which TLS and most libraries want; Ed25519 signatures stay as they are. `None` for another size.
pub(super) fn in_der(algorithm: Algorithm, signature: &[u8]) -> Option<Vec<u8>> {
    if hash(algorithm).is_none() {
        return Some(signature.to_vec());
    }
    ecdsa_sig_value(signature, signature.len() / 2)
}

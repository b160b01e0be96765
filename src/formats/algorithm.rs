//! What differs between algorithms: their names in each format, the digest the token gets, the form of a signature.

use std::sync::Arc;

use aws_lc_rs::digest;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_FIXED, ED25519, RSA_PSS_2048_8192_SHA256, UnparsedPublicKey, VerificationAlgorithm,
};

use crate::model::{Algorithm, PublicKey, ecdsa_sig_value};

/// `alg` of a JWS (RFC 7518 §3.1, RFC 8037 §3.1). For RSA that is a choice: a key of ours is for RSASSA-PSS alone.
pub(super) fn jws_name(algorithm: Algorithm) -> &'static str {
    match algorithm {
        Algorithm::P256 => "ES256",
        Algorithm::P384 => "ES384",
        Algorithm::Ed25519 => "EdDSA",
        Algorithm::Ps256 => "PS256",
    }
}

/// `alg` of an HTTP signature (RFC 9421 §6.2.2). The only RSASSA-PSS there is with SHA-512 and a salt of 64 bytes: no key makes those.
pub(super) fn http_name(algorithm: Algorithm) -> Option<&'static str> {
    match algorithm {
        Algorithm::P256 => Some("ecdsa-p256-sha256"),
        Algorithm::P384 => Some("ecdsa-p384-sha384"),
        Algorithm::Ed25519 => Some("ed25519"),
        Algorithm::Ps256 => None,
    }
}

/// `kty` and `crv` of a JWK (RFC 7518 §6.2.1 and §6.3, RFC 8037 §2); RSA has no curve.
pub(super) fn key_type(algorithm: Algorithm) -> (&'static str, &'static str) {
    match algorithm {
        Algorithm::P256 => ("EC", "P-256"),
        Algorithm::P384 => ("EC", "P-384"),
        Algorithm::Ed25519 => ("OKP", "Ed25519"),
        Algorithm::Ps256 => ("RSA", ""),
    }
}

/// Those that keyward knows.
pub(super) const ALL: [Algorithm; 4] = [Algorithm::P256, Algorithm::P384, Algorithm::Ed25519, Algorithm::Ps256];

/// Bytes of the longest signature.
pub(super) const SIGNATURE_BYTES_MAX: usize = 256;

/// Bytes of `r ‖ s`, or of an Ed25519 or RSA signature.
pub(super) fn signature_size(algorithm: Algorithm) -> usize {
    match algorithm {
        Algorithm::P256 | Algorithm::Ed25519 => 64,
        Algorithm::P384 => 96,
        Algorithm::Ps256 => 256,
    }
}

/// The hash of an algorithm; `None` for Ed25519, which signs messages.
pub(super) fn hash(algorithm: Algorithm) -> Option<&'static digest::Algorithm> {
    match algorithm {
        Algorithm::P256 | Algorithm::Ps256 => Some(&digest::SHA256),
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

/// Whether `signature` (`r ‖ s`, RFC 7518 §3.4, Ed25519's 64 bytes or RSASSA-PSS) is `key`'s over `message`.
pub(super) fn verifies(key: &PublicKey, message: &[u8], signature: &[u8]) -> bool {
    let algorithm: &'static dyn VerificationAlgorithm = match key.algorithm() {
        Algorithm::P256 => &ECDSA_P256_SHA256_FIXED,
        Algorithm::P384 => &ECDSA_P384_SHA384_FIXED,
        Algorithm::Ed25519 => &ED25519,
        Algorithm::Ps256 => &RSA_PSS_2048_8192_SHA256,
    };
    UnparsedPublicKey::new(algorithm, key.for_verifying()).verify(message, signature).is_ok()
}

/// `r ‖ s` as ECDSA-Sig-Value in DER, which TLS and most libraries want; other signatures stay as they are. `None` for another size.
pub(super) fn in_der(algorithm: Algorithm, signature: &[u8]) -> Option<Vec<u8>> {
    match algorithm {
        Algorithm::P256 | Algorithm::P384 => ecdsa_sig_value(signature, signature.len() / 2),
        Algorithm::Ed25519 | Algorithm::Ps256 => Some(signature.to_vec()),
    }
}

//! The join token's key: derived from the token's seed, which only the join file holds. The server keeps the public half,
//! so a stolen ledger redeems nothing.

use aws_lc_rs::hkdf::{HKDF_SHA256, KeyType, Salt};
use aws_lc_rs::signature::{Ed25519KeyPair, KeyPair};
use zeroize::Zeroizing;

use super::{Digest, SecretBytes};

/// The HKDF info (RFC 5869 §2.3) that sets this key apart from any other made of the same seed.
const INFO: &[u8] = b"keyward/join/v1";

struct Ed25519Seed;

impl KeyType for Ed25519Seed {
    fn len(&self) -> usize {
        32
    }
}

/// The Ed25519 public key of a join token's `seed`.
#[must_use]
pub fn join_public_key(seed: &SecretBytes) -> [u8; 32] {
    let mut key = [0; 32];
    key.copy_from_slice(key_pair(seed).public_key().as_ref());
    key
}

/// The Ed25519 signature (RFC 8032) of a join token's key over `binder`.
#[must_use]
pub fn join_sign(seed: &SecretBytes, binder: &Digest) -> [u8; 64] {
    let mut signature = [0; 64];
    signature.copy_from_slice(key_pair(seed).sign(&binder.0).as_ref());
    signature
}

/// HKDF-SHA256(salt "", ikm = seed, info [`INFO`]) → 32 bytes → the key pair (RFC 8032 §5.1.5).
fn key_pair(seed: &SecretBytes) -> Ed25519KeyPair {
    let mut bytes = Zeroizing::new([0; 32]);
    let prk = Salt::new(HKDF_SHA256, &[]).extract(seed.reveal());
    #[expect(clippy::expect_used, reason = "32 bytes are below HKDF's limit and are what Ed25519 takes, whatever the seed")]
    let pair = prk
        .expand(&[INFO], Ed25519Seed)
        .and_then(|okm| okm.fill(&mut bytes[..]))
        .ok()
        .and_then(|()| Ed25519KeyPair::from_seed_unchecked(&bytes[..]).ok())
        .expect("a key of a 32-byte seed");
    pair
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Algorithm, PublicKey, hex};

    #[test]
    fn the_server_verifies_with_the_public_key_alone() {
        let seed = SecretBytes::new(vec![3; 32]);
        let public = PublicKey::from_raw(Algorithm::Ed25519, &join_public_key(&seed)).expect("a key");
        let binder = Digest::of(b"binder");
        assert!(public.verifies(&binder.0, &join_sign(&seed, &binder)));
        assert!(!public.verifies(&Digest::of(b"other").0, &join_sign(&seed, &binder)));
        let other = SecretBytes::new(vec![4; 32]);
        assert!(!public.verifies(&binder.0, &join_sign(&other, &binder)));
    }

    /// Computed from RFC 5869 and the reference code of RFC 8032 §6 in Python: an implementation that is not ours.
    #[test]
    fn the_derivation_agrees_with_another_implementation() {
        let seed = SecretBytes::new(vec![3; 32]);
        assert_eq!(hex(&join_public_key(&seed)), "4fc4fb406de282feb148393d28ce496ff6c71377224a1b3b779aaf3417f307c8");
    }
}

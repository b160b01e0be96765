//! Public keys and how they are named.

use std::fmt;

use aws_lc_rs::digest::{Digest as Hashed, SHA256, SHA384};
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_ASN1, ECDSA_P384_SHA384_FIXED, ED25519, ParsedPublicKey,
    VerificationAlgorithm,
};

use super::Digest;
use super::number::{hex, number, random};

number!(
    /// CKA_ID of an HSM key: 16 random bytes, written in the ledger before the key exists.
    KeyId, 16
);

impl KeyId {
    /// A new random id.
    #[must_use]
    pub fn random() -> Self {
        Self(random())
    }
}

/// What a key signs with.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Algorithm {
    /// ECDSA on P-256 with SHA-256; signatures in DER.
    P256,
    /// ECDSA on P-384 with SHA-384; signatures in DER. Agents' keys only.
    P384,
    /// Ed25519; signatures of 64 bytes.
    Ed25519,
}

impl Algorithm {
    /// Bytes of the digest that is signed; `None` where the message itself is (RFC 8032 §4).
    #[must_use]
    pub fn digest_size(self) -> Option<usize> {
        match self {
            Self::P256 => Some(SHA256.output_len()),
            Self::P384 => Some(SHA384.output_len()),
            Self::Ed25519 => None,
        }
    }

    /// What is signed for `message`: its digest, or the message itself.
    #[must_use]
    pub fn input(self, message: &[u8]) -> Vec<u8> {
        let hash = match self {
            Self::P256 => &SHA256,
            Self::P384 => &SHA384,
            Self::Ed25519 => return message.to_vec(),
        };
        aws_lc_rs::digest::digest(hash, message).as_ref().to_vec()
    }
}

/// Everything before the point in a P-256 SubjectPublicKeyInfo (RFC 5480 §2): named curve, uncompressed.
const P256_SPKI_PREFIX: [u8; 26] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03,
    0x01, 0x07, 0x03, 0x42, 0x00,
];
/// The same for P-384.
const P384_SPKI_PREFIX: [u8; 23] = [
    0x30, 0x76, 0x30, 0x10, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22, 0x03,
    0x62, 0x00,
];
/// Everything before the key in an Ed25519 SubjectPublicKeyInfo (RFC 8410 §4).
const ED25519_SPKI_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];

/// Not a key that is accepted here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidKey {
    /// Another algorithm, another curve, a compressed point, or not a SubjectPublicKeyInfo.
    #[error("only P-256 and P-384 with an uncompressed point and Ed25519 are accepted")]
    Unsupported,
    /// The point is not on the curve.
    #[error("the point is not on the curve")]
    NotOnCurve,
}

/// A public key: P-256, P-384 or Ed25519, checked to be a point of its curve.
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct PublicKey {
    algorithm: Algorithm,
    spki: Box<[u8]>,
}

impl PublicKey {
    /// From a SubjectPublicKeyInfo, byte for byte in the one encoding that is accepted.
    ///
    /// # Errors
    /// For any other algorithm, curve or encoding, and for a point off the curve.
    pub fn from_spki(spki: &[u8]) -> Result<Self, InvalidKey> {
        let key = Self::from_spki_unchecked(spki)?;
        key.check_on_curve().map(|()| key)
    }

    /// As [`PublicKey::from_spki`], but the point is not checked to be on the curve: for a key that has to verify a signature
    /// at once, which no point off the curve does.
    ///
    /// # Errors
    /// For any other algorithm or encoding.
    pub(crate) fn from_spki_unchecked(spki: &[u8]) -> Result<Self, InvalidKey> {
        let algorithm = if spki.len() == P256_SPKI_PREFIX.len() + 65 && spki.starts_with(&P256_SPKI_PREFIX) && spki[26] == 4 {
            Algorithm::P256
        } else if spki.len() == P384_SPKI_PREFIX.len() + 97 && spki.starts_with(&P384_SPKI_PREFIX) && spki[23] == 4 {
            Algorithm::P384
        } else if spki.len() == ED25519_SPKI_PREFIX.len() + 32 && spki.starts_with(&ED25519_SPKI_PREFIX) {
            Algorithm::Ed25519
        } else {
            return Err(InvalidKey::Unsupported);
        };
        Ok(Self { algorithm, spki: spki.into() })
    }

    /// # Errors
    /// When it is not.
    pub(crate) fn check_on_curve(&self) -> Result<(), InvalidKey> {
        self.verifier().map(drop).ok_or(InvalidKey::NotOnCurve)
    }

    /// From the raw point (65 or 97 bytes, uncompressed) or the raw Ed25519 key (32 bytes).
    ///
    /// # Errors
    /// As [`PublicKey::from_spki`].
    pub fn from_raw(algorithm: Algorithm, raw: &[u8]) -> Result<Self, InvalidKey> {
        let prefix: &[u8] = match algorithm {
            Algorithm::P256 => &P256_SPKI_PREFIX,
            Algorithm::P384 => &P384_SPKI_PREFIX,
            Algorithm::Ed25519 => &ED25519_SPKI_PREFIX,
        };
        Self::from_spki(&[prefix, raw].concat())
    }

    /// From a row of our own that was checked when it was written: 65 bytes of a P-256 point. Not checked to be on the
    /// curve again; a point that is not verifies nothing.
    #[must_use]
    pub(crate) fn stored_p256(raw: &[u8]) -> Option<Self> {
        (raw.len() == 65).then(|| Self { algorithm: Algorithm::P256, spki: [&P256_SPKI_PREFIX[..], raw].concat().into() })
    }

    /// What it verifies.
    #[must_use]
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// SubjectPublicKeyInfo, DER.
    #[must_use]
    pub fn spki(&self) -> &[u8] {
        &self.spki
    }

    /// The point, or the raw Ed25519 key.
    #[must_use]
    pub fn raw(&self) -> &[u8] {
        match self.algorithm {
            Algorithm::P256 => &self.spki[P256_SPKI_PREFIX.len()..],
            Algorithm::P384 => &self.spki[P384_SPKI_PREFIX.len()..],
            Algorithm::Ed25519 => &self.spki[ED25519_SPKI_PREFIX.len()..],
        }
    }

    /// SHA-256 of the SubjectPublicKeyInfo.
    #[must_use]
    pub fn digest(&self) -> Digest {
        Digest::of(&self.spki)
    }

    /// Whether `signature` is this key's over `message`.
    #[must_use]
    pub fn verifies(&self, message: &[u8], signature: &[u8]) -> bool {
        self.verifier().is_some_and(|key| key.verify_sig(message, signature).is_ok())
    }

    /// The key ready for many verifications.
    #[must_use]
    pub fn verifier(&self) -> Option<ParsedPublicKey> {
        let algorithm: &'static dyn VerificationAlgorithm = match self.algorithm {
            Algorithm::P256 => &ECDSA_P256_SHA256_ASN1,
            Algorithm::P384 => &ECDSA_P384_SHA384_ASN1,
            Algorithm::Ed25519 => &ED25519,
        };
        ParsedPublicKey::new(algorithm, self.raw()).ok()
    }

    /// The key ready for many verifications of raw signatures.
    #[must_use]
    pub fn raw_verifier(&self) -> Option<RawVerifier> {
        let algorithm: &'static dyn VerificationAlgorithm = match self.algorithm {
            Algorithm::P256 => &ECDSA_P256_SHA256_FIXED,
            Algorithm::P384 => &ECDSA_P384_SHA384_FIXED,
            Algorithm::Ed25519 => &ED25519,
        };
        Some(RawVerifier { algorithm: self.algorithm, key: ParsedPublicKey::new(algorithm, self.raw()).ok()? })
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({:?} {})", self.algorithm, hex(&self.digest().0[..8]))
    }
}

/// Verifies what agents' keys make: `r ‖ s` over a digest for ECDSA (RFC 7518 §3.4), Ed25519 over the message itself.
pub struct RawVerifier {
    algorithm: Algorithm,
    key: ParsedPublicKey,
}

impl RawVerifier {
    /// Whether `signature` is this key's over `input`, which is [`Algorithm::input`] of the message.
    #[must_use]
    pub fn verifies(&self, input: &[u8], signature: &[u8]) -> bool {
        let hash = match self.algorithm {
            Algorithm::P256 => &SHA256,
            Algorithm::P384 => &SHA384,
            Algorithm::Ed25519 => return self.key.verify_sig(input, signature).is_ok(),
        };
        Hashed::import_less_safe(input, hash).is_ok_and(|digest| self.key.verify_digest_sig(&digest, signature).is_ok())
    }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, KeyPair as _};

    use super::*;

    #[test]
    fn a_raw_signature_verifies_over_the_digest_of_its_message_alone() {
        for (algorithm, signing, size) in
            [(Algorithm::P256, &ECDSA_P256_SHA256_FIXED_SIGNING, 32), (Algorithm::P384, &ECDSA_P384_SHA384_FIXED_SIGNING, 48)]
        {
            let pair = EcdsaKeyPair::generate(signing).expect("a key");
            let public = PublicKey::from_raw(algorithm, pair.public_key().as_ref()).expect("a point");
            assert_eq!(PublicKey::from_spki(public.spki()).expect("the same").algorithm(), algorithm);
            let signature = pair.sign(&SystemRandom::new(), b"message").expect("a signature");
            let (key, digest) = (public.raw_verifier().expect("a key"), algorithm.input(b"message"));
            assert_eq!((digest.len(), algorithm.digest_size()), (size, Some(size)));
            assert!(key.verifies(&digest, signature.as_ref()));
            assert!(!key.verifies(&algorithm.input(b"another"), signature.as_ref()));
            assert!(!key.verifies(b"message", signature.as_ref()) && !key.verifies(&digest[1..], signature.as_ref()));
            assert!(!public.verifies(b"message", signature.as_ref()), "that would be DER");
        }
    }
}

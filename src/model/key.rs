//! Public keys and how they are named.

use std::fmt;

use aws_lc_rs::digest::{Digest as Hashed, SHA256, SHA384};
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_FIXED, ECDSA_P384_SHA384_ASN1, ECDSA_P384_SHA384_FIXED, ED25519, ParsedPublicKey,
    RSA_PSS_2048_8192_SHA256, VerificationAlgorithm,
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
    /// RSASSA-PSS with SHA-256, MGF1 with SHA-256 and a salt of 32 bytes (RFC 7518 §3.5), on a modulus of 2048 bits; signatures of 256
    /// bytes. Agents' keys only: versions of a key do not live for as long as an authority.
    Ps256,
}

impl Algorithm {
    /// Bytes of the digest that is signed; `None` where the message itself is (RFC 8032 §4).
    #[must_use]
    pub fn digest_size(self) -> Option<usize> {
        match self {
            Self::P256 | Self::Ps256 => Some(SHA256.output_len()),
            Self::P384 => Some(SHA384.output_len()),
            Self::Ed25519 => None,
        }
    }

    /// What is signed for `message`: its digest, or the message itself.
    #[must_use]
    pub fn input(self, message: &[u8]) -> Vec<u8> {
        let hash = match self {
            Self::P256 | Self::Ps256 => &SHA256,
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
/// Everything before the modulus in the SubjectPublicKeyInfo of an RSA key of 2048 bits (RFC 3279 §2.3.1).
const RSA_SPKI_PREFIX: [u8; 33] = [
    0x30, 0x82, 0x01, 0x22, 0x30, 0x0d, 0x06, 0x09, 0x2a, 0x86, 0x48, 0x86, 0xf7, 0x0d, 0x01, 0x01, 0x01, 0x05, 0x00, 0x03, 0x82,
    0x01, 0x0f, 0x00, 0x30, 0x82, 0x01, 0x0a, 0x02, 0x82, 0x01, 0x01, 0x00,
];
/// And after it: the exponent 65537.
const RSA_SPKI_SUFFIX: [u8; 5] = [0x02, 0x03, 0x01, 0x00, 0x01];
/// Where RSAPublicKey begins in it.
const RSA_PUBLIC_KEY_AT: usize = 24;
/// Bytes of a modulus.
const RSA_MODULUS_BYTES: usize = 256;

/// Whether it has the full 2048 bits, and is odd.
fn is_modulus(bytes: &[u8]) -> bool {
    bytes.len() == RSA_MODULUS_BYTES && bytes[0] & 0x80 != 0 && bytes[RSA_MODULUS_BYTES - 1] & 1 == 1
}

/// Not a key that is accepted here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidKey {
    /// Another algorithm, another curve, a compressed point, or not a SubjectPublicKeyInfo.
    #[error(
        "only P-256 and P-384 with an uncompressed point, Ed25519, and RSA of 2048 bits with the exponent 65537 are accepted"
    )]
    Unsupported,
    /// The point is not on the curve.
    #[error("the point is not on the curve")]
    NotOnCurve,
}

/// A public key: P-256, P-384 or Ed25519, checked to be a point of its curve, or RSA of 2048 bits.
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
        } else if spki.strip_prefix(&RSA_SPKI_PREFIX).and_then(|rest| rest.strip_suffix(&RSA_SPKI_SUFFIX)).is_some_and(is_modulus)
        {
            Algorithm::Ps256
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

    /// From the raw point (65 or 97 bytes, uncompressed), the raw Ed25519 key (32 bytes) or the modulus (256 bytes).
    ///
    /// # Errors
    /// As [`PublicKey::from_spki`].
    pub fn from_raw(algorithm: Algorithm, raw: &[u8]) -> Result<Self, InvalidKey> {
        let prefix: &[u8] = match algorithm {
            Algorithm::P256 => &P256_SPKI_PREFIX,
            Algorithm::P384 => &P384_SPKI_PREFIX,
            Algorithm::Ed25519 => &ED25519_SPKI_PREFIX,
            Algorithm::Ps256 => return Self::from_spki(&[&RSA_SPKI_PREFIX, raw, &RSA_SPKI_SUFFIX].concat()),
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

    /// The point, the raw Ed25519 key, or the modulus.
    #[must_use]
    pub fn raw(&self) -> &[u8] {
        match self.algorithm {
            Algorithm::P256 => &self.spki[P256_SPKI_PREFIX.len()..],
            Algorithm::P384 => &self.spki[P384_SPKI_PREFIX.len()..],
            Algorithm::Ed25519 => &self.spki[ED25519_SPKI_PREFIX.len()..],
            Algorithm::Ps256 => &self.spki[RSA_SPKI_PREFIX.len()..][..RSA_MODULUS_BYTES],
        }
    }

    /// As it is given to those who verify: RSAPublicKey (RFC 8017 A.1.1), else as [`PublicKey::raw`].
    #[must_use]
    pub fn for_verifying(&self) -> &[u8] {
        match self.algorithm {
            Algorithm::Ps256 => &self.spki[RSA_PUBLIC_KEY_AT..],
            Algorithm::P256 | Algorithm::P384 | Algorithm::Ed25519 => self.raw(),
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
            Algorithm::Ps256 => &RSA_PSS_2048_8192_SHA256,
        };
        ParsedPublicKey::new(algorithm, self.for_verifying()).ok()
    }

    /// The key ready for many verifications of raw signatures.
    #[must_use]
    pub fn raw_verifier(&self) -> Option<RawVerifier> {
        let algorithm: &'static dyn VerificationAlgorithm = match self.algorithm {
            Algorithm::P256 => &ECDSA_P256_SHA256_FIXED,
            Algorithm::P384 => &ECDSA_P384_SHA384_FIXED,
            Algorithm::Ed25519 => &ED25519,
            Algorithm::Ps256 => &RSA_PSS_2048_8192_SHA256,
        };
        Some(RawVerifier { algorithm: self.algorithm, key: ParsedPublicKey::new(algorithm, self.for_verifying()).ok()? })
    }
}

impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({:?} {})", self.algorithm, hex(&self.digest().0[..8]))
    }
}

/// Verifies what agents' keys make: over a digest `r ‖ s` for ECDSA (RFC 7518 §3.4) or RSASSA-PSS, Ed25519 over the message itself.
pub struct RawVerifier {
    algorithm: Algorithm,
    key: ParsedPublicKey,
}

impl RawVerifier {
    /// Whether `signature` is this key's over `input`, which is [`Algorithm::input`] of the message.
    #[must_use]
    pub fn verifies(&self, input: &[u8], signature: &[u8]) -> bool {
        let hash = match self.algorithm {
            Algorithm::P256 | Algorithm::Ps256 => &SHA256,
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

    #[test]
    fn an_rsa_key_has_2048_bits_and_the_usual_exponent_and_its_signature_the_usual_salt() {
        use aws_lc_rs::encoding::AsDer as _;
        use aws_lc_rs::rsa::{KeySize, PublicKey as RsaPublicKey};
        use aws_lc_rs::signature::{RSA_PKCS1_SHA256, RSA_PSS_SHA256, RsaEncoding, RsaKeyPair};

        let spki_of = |pair: &RsaKeyPair| {
            let public: &RsaPublicKey = pair.public_key();
            public.as_der().expect("a key").as_ref().to_vec()
        };
        let pair = RsaKeyPair::generate(KeySize::Rsa2048).expect("a key");
        let spki = spki_of(&pair);
        let public = PublicKey::from_spki(&spki).expect("a key");
        assert_eq!(public, PublicKey::from_raw(Algorithm::Ps256, public.raw()).expect("the same"));
        assert_eq!(public.for_verifying(), pair.public_key().as_ref());
        let signed = |encoding: &'static dyn RsaEncoding| {
            let mut signature = vec![0; pair.public_modulus_len()];
            pair.sign(encoding, &SystemRandom::new(), b"message", &mut signature).expect("a signature");
            signature
        };
        let (key, digest) = (public.raw_verifier().expect("a key"), Algorithm::Ps256.input(b"message"));
        let signature = signed(&RSA_PSS_SHA256);
        assert!(key.verifies(&digest, &signature) && public.verifies(b"message", &signature));
        assert!(!key.verifies(&Algorithm::Ps256.input(b"another"), &signature) && !key.verifies(b"message", &signature));
        assert!(!key.verifies(&digest, &signed(&RSA_PKCS1_SHA256)), "another padding");
        assert!(PublicKey::from_spki(&spki_of(&RsaKeyPair::generate(KeySize::Rsa3072).expect("a key"))).is_err());
        for (at, byte) in [(33, 0x7f), (288, spki[288] & !1), (293, 3), (15, 0x02)] {
            let mut other = spki.clone();
            other[at] = byte;
            assert_eq!(PublicKey::from_spki(&other), Err(InvalidKey::Unsupported), "byte {at}");
        }
        assert_eq!(PublicKey::from_spki(&[&spki[..], &[0]].concat()), Err(InvalidKey::Unsupported));
    }
}

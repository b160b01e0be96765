//! The exact bytes that will be signed, and what they become.

use std::fmt;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};

use super::algorithm;
use crate::model::{Algorithm, Digest, Refusal, hex};

/// What a key signs, and nothing else in its life.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Profile {
    /// JSON Web Signatures, compact or detached (RFC 7515).
    Jws,
    /// HTTP Message Signatures (RFC 9421).
    HttpMessageSignature,
    /// Proofs of possession for OAuth (RFC 9449).
    Dpop,
    /// Digests the caller made. Nobody can say of what: such a key is never published.
    RawDigest,
    /// The CertificateVerify of TLS 1.3 (RFC 8446 §4.4.3).
    Tls,
}

/// What will be signed. Made only in this room, so that a key cannot be asked to sign bytes that are not of its profile.
pub struct SigningInput {
    profile: Profile,
    algorithm: Algorithm,
    for_token: Arc<[u8]>,
    recorded: Arc<[u8]>,
    assembly: Assembly,
}

/// What the signature is put into.
pub(super) enum Assembly {
    /// What stands before the last dot.
    Compact(String),
    /// As above, the payload left out.
    Detached { header: String },
    /// The label and its member of Signature-Input.
    Http { label: String, member: String },
    /// Nothing.
    Bare,
}

/// A signature in the form its profile travels in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Signed {
    /// Compact serialisation: `header.payload.signature`, detached `header..signature`.
    Jws(String),
    /// The values of the fields Signature-Input and Signature.
    HttpMessageSignature {
        /// `label=("@method" …);created=…`
        signature_input: String,
        /// `label=:base64:`
        signature: String,
    },
    /// The value of the field DPoP.
    Dpop(String),
    /// ECDSA-Sig-Value in DER, or RSA's 256 bytes.
    RawDigest(Vec<u8>),
    /// The `signature` of CertificateVerify: ECDSA-Sig-Value in DER, Ed25519's 64 bytes, or RSA's 256 (`rsa_pss_rsae_sha256`).
    Tls(Vec<u8>),
}

impl SigningInput {
    /// Over a message that is hashed here where the algorithm hashes.
    pub(super) fn of_message(profile: Profile, algorithm: Algorithm, message: &[u8], assembly: Assembly) -> Self {
        let for_token = algorithm::for_token(algorithm, message);
        let recorded = match algorithm::hash(algorithm) {
            Some(_) => Arc::clone(&for_token),
            None => Arc::from(Digest::of(message).0),
        };
        Self { profile, algorithm, for_token, recorded, assembly }
    }

    /// Over a digest that was made elsewhere; its length was checked.
    pub(super) fn of_digest(algorithm: Algorithm, digest: &[u8]) -> Self {
        let digest: Arc<[u8]> = digest.into();
        Self {
            profile: Profile::RawDigest,
            algorithm,
            for_token: Arc::clone(&digest),
            recorded: digest,
            assembly: Assembly::Bare,
        }
    }

    /// The one profile of these bytes: only a key of the same may sign them.
    #[must_use]
    pub fn profile(&self) -> Profile {
        self.profile
    }

    /// The algorithm that these bytes name: only a key of the same may sign them.
    #[must_use]
    pub fn algorithm(&self) -> Algorithm {
        self.algorithm
    }

    /// What the token is given: SHA-256 for ES256 and PS256, SHA-384 for ES384, the message itself for EdDSA.
    #[must_use]
    pub fn for_token(&self) -> Arc<[u8]> {
        Arc::clone(&self.for_token)
    }

    /// What the ledger keeps: the digest that the token signs; for EdDSA, whose message may be long, its SHA-256.
    #[must_use]
    pub fn recorded(&self) -> Arc<[u8]> {
        Arc::clone(&self.recorded)
    }

    /// Puts the signature (`r ‖ s`, or Ed25519's 64 or RSA's 256 bytes) into the form of the profile.
    ///
    /// # Errors
    /// `INTERNAL` for a signature of another length than the algorithm's: the HSM room never gives one.
    pub fn finish(self, signature: &[u8]) -> Result<Signed, Refusal> {
        let misfit = || Refusal::internal(format!("a signature of {} bytes for {:?}", signature.len(), self.algorithm));
        if signature.len() != algorithm::signature_size(self.algorithm) {
            return Err(misfit());
        }
        let in_der = || algorithm::in_der(self.algorithm, signature).ok_or_else(misfit);
        let compact = |before: String| format!("{before}.{}", URL_SAFE_NO_PAD.encode(signature));
        Ok(match (self.assembly, self.profile) {
            (Assembly::Compact(before), Profile::Dpop) => Signed::Dpop(compact(before)),
            (Assembly::Compact(before), _) => Signed::Jws(compact(before)),
            (Assembly::Detached { header }, _) => Signed::Jws(compact(header + ".")),
            (Assembly::Http { label, member }, _) => Signed::HttpMessageSignature {
                signature_input: format!("{label}={member}"),
                signature: format!("{label}=:{}:", STANDARD.encode(signature)),
            },
            (Assembly::Bare, Profile::Tls) => Signed::Tls(in_der()?),
            (Assembly::Bare, _) => Signed::RawDigest(in_der()?),
        })
    }
}

impl fmt::Debug for SigningInput {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SigningInput({:?} {:?} {})", self.profile, self.algorithm, hex(&self.recorded))
    }
}

#[cfg(test)]
pub(super) use tests::Signer;

#[cfg(test)]
mod tests {
    use aws_lc_rs::digest::Digest as Hashed;
    use aws_lc_rs::encoding::AsDer as _;
    use aws_lc_rs::rsa::KeySize;
    use aws_lc_rs::signature::{
        ECDSA_P256_SHA256_FIXED_SIGNING, ECDSA_P384_SHA384_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _,
        RSA_PSS_SHA256, RsaKeyPair,
    };

    use super::*;
    use crate::formats::{Jwk, VerifyingKey, raw_digest, tls};
    use crate::model::PublicKey;

    /// A key in memory that signs what a token would be given.
    pub(in crate::formats) enum Signer {
        Ecdsa(Algorithm, EcdsaKeyPair),
        Ed25519(Ed25519KeyPair),
        Rsa(RsaKeyPair),
    }

    impl Signer {
        pub(in crate::formats) fn new(algorithm: Algorithm) -> Self {
            match algorithm {
                Algorithm::Ed25519 => Self::Ed25519(Ed25519KeyPair::generate().unwrap()),
                Algorithm::P256 => Self::Ecdsa(algorithm, EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap()),
                Algorithm::P384 => Self::Ecdsa(algorithm, EcdsaKeyPair::generate(&ECDSA_P384_SHA384_FIXED_SIGNING).unwrap()),
                Algorithm::Ps256 => Self::Rsa(RsaKeyPair::generate(KeySize::Rsa2048).unwrap()),
            }
        }

        pub(in crate::formats) fn public(&self) -> PublicKey {
            match self {
                Self::Ecdsa(algorithm, pair) => PublicKey::from_raw(*algorithm, pair.public_key().as_ref()).unwrap(),
                Self::Ed25519(pair) => PublicKey::from_raw(Algorithm::Ed25519, pair.public_key().as_ref()).unwrap(),
                Self::Rsa(pair) => PublicKey::from_spki(pair.public_key().as_der().unwrap().as_ref()).unwrap(),
            }
        }

        pub(in crate::formats) fn kid(&self) -> String {
            Jwk::thumbprint(&self.public())
        }

        pub(in crate::formats) fn verifying(&self, profile: Profile) -> VerifyingKey {
            VerifyingKey::new(profile, self.public())
        }

        /// As the token signs: a digest for ECDSA and RSA, a message for Ed25519.
        pub(in crate::formats) fn raw(&self, input: &[u8]) -> Vec<u8> {
            match self {
                Self::Ecdsa(algorithm, pair) => {
                    let digest = Hashed::import_less_safe(input, algorithm::hash(*algorithm).unwrap()).unwrap();
                    pair.sign_digest(&digest).unwrap().as_ref().to_vec()
                }
                Self::Ed25519(pair) => pair.sign(input).as_ref().to_vec(),
                Self::Rsa(pair) => {
                    let digest = Hashed::import_less_safe(input, algorithm::hash(Algorithm::Ps256).unwrap()).unwrap();
                    let mut signature = vec![0; pair.public_modulus_len()];
                    pair.sign_digest(&RSA_PSS_SHA256, &digest, &mut signature).unwrap();
                    signature
                }
            }
        }

        /// A message of the tests' own making.
        pub(in crate::formats) fn message(&self, message: &[u8]) -> Vec<u8> {
            self.raw(&algorithm::for_token(self.public().algorithm(), message))
        }

        pub(in crate::formats) fn finish(&self, input: SigningInput) -> Signed {
            assert_eq!(input.algorithm(), self.public().algorithm());
            let signature = self.raw(&input.for_token());
            input.finish(&signature).unwrap()
        }

        /// A compact JWS or a DPoP proof.
        pub(in crate::formats) fn compact(&self, input: SigningInput) -> String {
            match self.finish(input) {
                Signed::Jws(text) | Signed::Dpop(text) => text,
                other => panic!("no compact serialisation: {other:?}"),
            }
        }

        /// Signature-Input and Signature.
        pub(in crate::formats) fn fields(&self, input: SigningInput) -> (String, String) {
            match self.finish(input) {
                Signed::HttpMessageSignature { signature_input, signature } => (signature_input, signature),
                other => panic!("no HTTP signature: {other:?}"),
            }
        }
    }

    #[test]
    fn what_tls_and_raw_digests_get_verifies_in_the_encoding_of_x509() {
        for algorithm in algorithm::ALL {
            let signer = Signer::new(algorithm);
            // Enough of them that leading zeros and set high bits occur.
            for n in 0..64_u8 {
                let content = tls::content(tls::Role::Server, &[n; 32]);
                let input = tls::prepare(algorithm, tls::Role::Server, &[n; 32]).unwrap();
                let Signed::Tls(signature) = signer.finish(input) else { panic!() };
                assert!(signer.public().verifies(&content, &signature));
                let Ok(input) = raw_digest::prepare(algorithm, &algorithm::for_token(algorithm, &content)) else { continue };
                let Signed::RawDigest(signature) = signer.finish(input) else { panic!() };
                assert!(signer.public().verifies(&content, &signature));
            }
        }
    }

    #[test]
    fn a_signature_of_another_length_is_never_assembled() {
        for size in [0, 63, 65, 72, 96] {
            let input = raw_digest::prepare(Algorithm::P256, &[7; 32]).unwrap();
            assert_eq!(input.finish(&vec![1; size]).unwrap_err().reason, crate::model::Reason::Internal);
        }
    }

    #[test]
    fn the_ledger_keeps_what_the_token_signs_or_its_digest() {
        for algorithm in algorithm::ALL {
            let input = tls::prepare(algorithm, tls::Role::Client, &[7; 48]).unwrap();
            if algorithm::hash(algorithm).is_some() {
                assert_eq!(input.recorded(), input.for_token());
            } else {
                assert_eq!(*input.recorded(), Digest::of(&input.for_token()).0);
            }
        }
    }
}

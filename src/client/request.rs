//! A key, and the request for its certificate.

use aws_lc_rs::rand::{self, SystemRandom};
use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, KeyPair};
use prost::Message;
use rustls::pki_types::PrivatePkcs8KeyDer;
use zeroize::Zeroizing;

use super::Error;
use crate::model::{Algorithm, Digest, PublicKey, SecretBytes, hex};
use crate::proto::{Ask, ask};

/// A fresh or stored P-256 key: its PKCS#8 and the means to sign.
pub struct Key {
    pkcs8: SecretBytes,
    pair: EcdsaKeyPair,
    public: PublicKey,
}

impl Key {
    /// A new random key.
    ///
    /// # Errors
    /// When the random source fails.
    pub fn generate() -> Result<Self, Error> {
        let pkcs8 = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new())
            .map_err(|_| Error::Crypto("no P-256 key could be generated".into()))?;
        Self::from_pkcs8(SecretBytes::new(pkcs8.as_ref().to_vec()))
    }

    /// From PKCS#8 DER (RFC 5208).
    ///
    /// # Errors
    /// When it is not a P-256 key.
    pub fn from_pkcs8(pkcs8: SecretBytes) -> Result<Self, Error> {
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, pkcs8.reveal())
            .map_err(|_| Error::Crypto("not a P-256 private key in PKCS#8".into()))?;
        let public =
            PublicKey::from_raw(Algorithm::P256, pair.public_key().as_ref()).map_err(|error| Error::Crypto(error.to_string()))?;
        Ok(Self { pkcs8, pair, public })
    }

    /// From PKCS#8 PEM (RFC 7468 §10).
    ///
    /// # Errors
    /// As [`Key::from_pkcs8`].
    pub fn from_pem(text: &[u8]) -> Result<Self, Error> {
        let parsed = pem::parse(text).map_err(|_| Error::Crypto("not a PEM private key".into()))?;
        if parsed.tag() != "PRIVATE KEY" {
            return Err(Error::Crypto("not a PKCS#8 private key".into()));
        }
        Self::from_pkcs8(SecretBytes::new(parsed.into_contents()))
    }

    /// PKCS#8 PEM. Secret.
    #[must_use]
    pub fn to_pem(&self) -> Zeroizing<String> {
        let block = pem::Pem::new("PRIVATE KEY", self.pkcs8.reveal());
        let text = Zeroizing::new(pem::encode_config(&block, pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF)));
        drop(Zeroizing::new(block.into_contents()));
        text
    }

    /// As rustls takes it; rustls keeps a copy of its own.
    #[must_use]
    pub fn to_rustls(&self) -> PrivatePkcs8KeyDer<'static> {
        PrivatePkcs8KeyDer::from(self.pkcs8.reveal().to_vec())
    }

    /// The public half.
    #[must_use]
    pub fn public(&self) -> &PublicKey {
        &self.public
    }

    /// ECDSA P-256 SHA-256 in DER over the 32 bytes of `binder`.
    ///
    /// # Errors
    /// When the random source fails.
    pub fn sign(&self, binder: &Digest) -> Result<Vec<u8>, Error> {
        let signature = self.pair.sign(&SystemRandom::new(), &binder.0);
        signature.map(|bytes| bytes.as_ref().to_vec()).map_err(|_| Error::Crypto("signing failed".into()))
    }
}

impl rcgen::PublicKeyData for Key {
    fn der_bytes(&self) -> &[u8] {
        self.public.raw()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}

impl rcgen::SigningKey for Key {
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rcgen::Error> {
        let signature = self.pair.sign(&SystemRandom::new(), message).map_err(|_| rcgen::Error::RemoteKeyError)?;
        Ok(signature.as_ref().to_vec())
    }
}

/// The bytes of an [`Ask`] for `key`: an empty-subject CSR (RFC 2986), a fresh idempotency key, the claim. They are kept
/// and sent again as they are, because a CSR made anew has another signature.
///
/// # Errors
/// When the CSR cannot be made.
pub fn ask(key: &Key, ttl_seconds: u32, claim: ask::Claim) -> Result<Vec<u8>, Error> {
    let mut parameters = rcgen::CertificateParams::default();
    parameters.distinguished_name = rcgen::DistinguishedName::new();
    let csr = parameters.serialize_request(key).map_err(|error| Error::Crypto(error.to_string()))?;
    let mut idempotency_key = [0; 16];
    rand::fill(&mut idempotency_key).map_err(|_| Error::Crypto("no random bytes".into()))?;
    let ask = Ask { csr: csr.der().to_vec(), idempotency_key: hex(&idempotency_key), ttl_seconds, claim: Some(claim) };
    Ok(ask.encode_to_vec())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{Csr, Meter};

    #[test]
    fn the_csr_is_one_the_server_takes() {
        let key = Key::generate().expect("a key");
        let bytes = ask(&key, 60, ask::Claim::Join(crate::proto::JoinClaim { token_id: vec![1; 16] })).expect("an ask");
        let parsed = Ask::decode(bytes.as_slice()).expect("decodes");
        assert!(bytes.len() <= 6144);
        assert_eq!(parsed.idempotency_key.len(), 32);
        let csr = Csr::parse(&parsed.csr, &Meter::default()).expect("a CSR");
        assert_eq!(csr.key(), key.public());
    }

    #[test]
    fn a_key_comes_back_from_its_pem() {
        let key = Key::generate().expect("a key");
        let again = Key::from_pem(key.to_pem().as_bytes()).expect("parsed");
        assert_eq!(again.public(), key.public());
        let signature = again.sign(&Digest::of(b"x")).expect("signed");
        assert!(key.public().verifies(&Digest::of(b"x").0, &signature));
    }
}

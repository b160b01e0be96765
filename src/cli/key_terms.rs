//! The terms of a key as they are said on the command line.

use clap::ValueEnum;

use crate::proto::{KeyAlgorithm, KeyPurpose, KeyStorage};

/// What a key signs.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Purpose {
    /// JSON Web Signatures (RFC 7515).
    Jws,
    /// HTTP Message Signatures (RFC 9421).
    HttpMessageSignature,
    /// Proofs of possession (RFC 9449).
    Dpop,
    /// Digests that the caller answers for.
    RawDigest,
    /// CertificateVerify of TLS 1.3.
    Tls,
}

/// What it signs with.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Algorithm {
    /// ECDSA on P-256.
    Es256,
    /// ECDSA on P-384.
    Es384,
    /// Ed25519.
    Eddsa,
    /// RSA-PSS on 2048 bits, for those who know nothing else: slow to make and to sign with.
    Ps256,
}

/// Where it lives.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Storage {
    /// Dies with the daemon.
    Session,
    /// Kept outside the token under its wrapping key.
    Wrapped,
    /// A token object; few.
    Resident,
}

impl From<Purpose> for KeyPurpose {
    fn from(purpose: Purpose) -> Self {
        match purpose {
            Purpose::Jws => Self::Jws,
            Purpose::HttpMessageSignature => Self::HttpMessageSignature,
            Purpose::Dpop => Self::Dpop,
            Purpose::RawDigest => Self::RawDigest,
            Purpose::Tls => Self::Tls,
        }
    }
}

impl From<Algorithm> for KeyAlgorithm {
    fn from(algorithm: Algorithm) -> Self {
        match algorithm {
            Algorithm::Es256 => Self::P256,
            Algorithm::Es384 => Self::P384,
            Algorithm::Eddsa => Self::Ed25519,
            Algorithm::Ps256 => Self::Ps256,
        }
    }
}

impl From<Storage> for KeyStorage {
    fn from(storage: Storage) -> Self {
        match storage {
            Storage::Session => Self::Session,
            Storage::Wrapped => Self::Wrapped,
            Storage::Resident => Self::Resident,
        }
    }
}

//! A digest that the caller made. Only for ECDSA and RSA: Ed25519 signs messages, and a digest taken for one would be a signature that
//! no standard names.

use super::algorithm;
use super::signing::SigningInput;
use crate::model::{Algorithm, Reason, Refusal};

/// The digest as it is.
///
/// # Errors
/// `ALGORITHM_REFUSED` for Ed25519; `DIGEST_LENGTH_INVALID` unless it is exactly as long as the algorithm's hash.
pub fn prepare(algorithm: Algorithm, digest: &[u8]) -> Result<SigningInput, Refusal> {
    let hash = algorithm::hash(algorithm)
        .ok_or_else(|| Refusal::new(Reason::AlgorithmRefused, "use a P-256, P-384 or RSA key for raw digests"))?;
    if digest.len() != hash.output_len() {
        let advice = format!("send a digest of exactly {} bytes for this key", hash.output_len());
        return Err(Refusal::new(Reason::DigestLengthInvalid, advice));
    }
    Ok(SigningInput::of_digest(algorithm, digest))
}

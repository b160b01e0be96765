//! Bytes that must not be seen.

use zeroize::Zeroizing;

/// Secret bytes: no `Debug`, no `Clone`, overwritten when dropped. What must be shown is taken out with `reveal`, which
/// can be grepped for.
pub struct SecretBytes(Zeroizing<Vec<u8>>);

impl SecretBytes {
    /// Takes the bytes over; the vector must not have been grown in place before (a reallocation leaves a copy).
    #[must_use]
    pub fn new(bytes: Vec<u8>) -> Self {
        Self(Zeroizing::new(bytes))
    }

    /// `size` random bytes.
    #[must_use]
    pub fn random<const N: usize>() -> Self {
        Self::new(super::number::random::<N>().to_vec())
    }

    /// The bytes themselves.
    #[must_use]
    pub fn reveal(&self) -> &[u8] {
        &self.0
    }
}

//! Fixed-size numbers: digests, serials, ids.

use std::fmt;

use aws_lc_rs::{digest, rand};

/// Lower-case hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    const DIGITS: &[u8; 16] = b"0123456789abcdef";
    let mut text = String::with_capacity(bytes.len() * 2);
    for byte in bytes {
        text.push(DIGITS[usize::from(byte >> 4)] as char);
        text.push(DIGITS[usize::from(byte & 15)] as char);
    }
    text
}

/// The bytes of a hexadecimal text of either case; `None` for anything else.
#[must_use]
pub fn unhex(text: &str) -> Option<Vec<u8>> {
    if !text.is_ascii() || !text.len().is_multiple_of(2) {
        return None;
    }
    (0..text.len())
        .step_by(2)
        .map(|at| nibble(text.as_bytes()[at]).zip(nibble(text.as_bytes()[at + 1])).map(|(high, low)| high << 4 | low))
        .collect()
}

fn nibble(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).and_then(|value| u8::try_from(value).ok())
}

/// Random bytes from the process's CSPRNG.
///
/// # Panics
/// Never in practice: the generator fails only if the kernel has no entropy source at all.
pub(super) fn random<const N: usize>() -> [u8; N] {
    let mut bytes = [0; N];
    #[expect(clippy::expect_used, reason = "without randomness nothing here may go on")]
    rand::fill(&mut bytes).expect("the kernel's random source");
    bytes
}

macro_rules! number {
    ($(#[$doc:meta])* $name:ident, $size:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub struct $name(pub [u8; $size]);

        impl $name {
            /// From exactly as many bytes as it has.
            #[must_use]
            pub fn from_slice(bytes: &[u8]) -> Option<Self> {
                bytes.try_into().ok().map(Self)
            }

            /// Its bytes.
            #[must_use]
            pub fn as_bytes(&self) -> &[u8; $size] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex(&self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, concat!(stringify!($name), "({})"), hex(&self.0))
            }
        }
    };
}
pub(super) use number;

number!(
    /// A SHA-256 digest.
    Digest, 32
);

number!(
    /// A certificate's serial number: 128 random bits, the top one clear and the next set, so that the DER INTEGER always
    /// has 16 content bytes (RFC 5280 §4.1.2.2 wants it positive and at most 20).
    Serial, 16
);

number!(
    /// A join token's public name. Not a secret.
    TokenId, 16
);

number!(
    /// The first half of a public key's digest: names a live key among all others. There is one for each live certificate, and 128 bits of
    /// SHA-256 tell keys apart as well as 256.
    KeyTag, 16
);

impl Digest {
    /// Of the SHA-256 of a SubjectPublicKeyInfo, what names the key among others.
    #[must_use]
    pub fn tag(&self) -> KeyTag {
        let mut tag = KeyTag([0; 16]);
        tag.0.copy_from_slice(&self.0[..16]);
        tag
    }

    /// SHA-256 of `bytes`.
    #[must_use]
    pub fn of(bytes: &[u8]) -> Self {
        Self::of_parts(&[bytes])
    }

    /// SHA-256 of the concatenation of `parts`.
    #[must_use]
    pub fn of_parts(parts: &[&[u8]]) -> Self {
        let mut context = digest::Context::new(&digest::SHA256);
        for part in parts {
            context.update(part);
        }
        let mut bytes = [0; 32];
        bytes.copy_from_slice(context.finish().as_ref());
        Self(bytes)
    }
}

impl Serial {
    /// A new random serial.
    #[must_use]
    pub fn random() -> Self {
        let mut bytes = random::<16>();
        bytes[0] = bytes[0] & 0x7f | 0x40;
        Self(bytes)
    }
}

impl TokenId {
    /// A new random id.
    #[must_use]
    pub fn random() -> Self {
        Self(random())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hex_goes_both_ways() {
        assert_eq!(hex(&[0x00, 0xab, 0xff]), "00abff");
        assert_eq!(unhex("00ABff"), Some(vec![0x00, 0xab, 0xff]));
        assert_eq!(unhex("0"), None);
        assert_eq!(unhex("zz"), None);
        assert_eq!(unhex("+1"), None);
    }

    #[test]
    fn a_serial_always_has_sixteen_content_bytes() {
        for _ in 0..1000 {
            let first = Serial::random().0[0];
            assert!((0x40..0x80).contains(&first));
        }
    }

    #[test]
    fn parts_hash_as_their_concatenation() {
        assert_eq!(Digest::of(b"abc"), Digest::of_parts(&[b"a", b"", b"bc"]));
        assert_eq!(hex(&Digest::of(b"abc").0[..4]), "ba7816bf");
    }
}

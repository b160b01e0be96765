//! What an agent calls one of its keys.

use std::fmt;

/// 1 to 64 of a-z, 0-9 and hyphen.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct KeyName(Box<str>);

/// Not a name for a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a key's name has 1 to 64 characters of a-z, 0-9 and -")]
pub struct InvalidKeyName;

impl KeyName {
    /// # Errors
    /// When it is not one.
    pub fn parse(text: &str) -> Result<Self, InvalidKeyName> {
        let fits = (1..=64).contains(&text.len());
        let allowed = text.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || byte == b'-');
        if fits && allowed { Ok(Self(text.into())) } else { Err(InvalidKeyName) }
    }

    /// As text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for KeyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for KeyName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "KeyName({})", self.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_short_and_plain() {
        assert_eq!(KeyName::parse("wallet-7").unwrap().as_str(), "wallet-7");
        for bad in ["", "A", "a b", "a/b", "ä", "a_b", &"a".repeat(65)] {
            assert_eq!(KeyName::parse(bad), Err(InvalidKeyName), "{bad:?}");
        }
    }
}

//! Where the next page of a key set starts. It is the name of somebody's key, which may be denied or of a purpose that is not published: only
//! the daemon that gave it out can read it, as long as it runs.

use aws_lc_rs::aead::{AES_256_GCM, Aad, NONCE_LEN, Nonce, RandomizedNonceKey};
use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;

use crate::ledger::KeyOf;
use crate::model::{Reason, Refusal, SecretBytes};

/// The longest that is read: more than what names an agent, an epoch and a key.
const PLACE_BYTES_MAX: usize = 512;

/// What seals them.
pub(super) struct Places(RandomizedNonceKey);

impl Places {
    pub(super) fn new() -> Self {
        let key = SecretBytes::random::<32>();
        #[expect(clippy::expect_used, reason = "the size is right there")]
        Self(RandomizedNonceKey::new(&AES_256_GCM, key.reveal()).expect("AES-256 has keys of 32 bytes"))
    }

    pub(super) fn seal(&self, of: &KeyOf) -> Result<String, Refusal> {
        let mut sealed = format!("{} {} {}", of.agent, of.epoch, of.name).into_bytes();
        let nonce = self.0.seal_in_place_append_tag(Aad::empty(), &mut sealed).map_err(Refusal::internal)?;
        sealed.extend_from_slice(nonce.as_ref());
        Ok(BASE64_URL_SAFE_NO_PAD.encode(sealed))
    }

    /// Agent, epoch and name of the key before; of nothing the beginning.
    ///
    /// # Errors
    /// `MALFORMED_REQUEST` for what this daemon has not given out since it was started.
    pub(super) fn open(&self, text: &str) -> Result<(String, u32, String), Refusal> {
        if text.is_empty() {
            return Ok(Default::default());
        }
        let wrong = || Refusal::new(Reason::MalformedRequest, "page on from what the last page said is next, or begin anew");
        self.place(text).ok_or_else(wrong)
    }

    fn place(&self, text: &str) -> Option<(String, u32, String)> {
        let mut sealed =
            Some(text).filter(|text| text.len() <= PLACE_BYTES_MAX).and_then(|text| BASE64_URL_SAFE_NO_PAD.decode(text).ok())?;
        let nonce: [u8; NONCE_LEN] = *sealed.last_chunk()?;
        sealed.truncate(sealed.len() - NONCE_LEN);
        let place = self.0.open_in_place(Nonce::assume_unique_for_key(nonce), Aad::empty(), &mut sealed).ok()?;
        let mut parts = std::str::from_utf8(place).ok()?.splitn(3, ' ');
        Some((parts.next()?.to_owned(), parts.next()?.parse().ok()?, parts.next()?.to_owned()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::model::{AgentId, KeyName};

    #[test]
    fn a_place_tells_nothing_and_is_read_by_who_gave_it_out_alone() {
        let places = Places::new();
        let of = KeyOf { agent: AgentId::parse("builder/1").unwrap(), epoch: 3, name: KeyName::parse("tools").unwrap() };
        let place = places.seal(&of).unwrap();
        assert_ne!(place, places.seal(&of).unwrap());
        assert!(!String::from_utf8_lossy(&BASE64_URL_SAFE_NO_PAD.decode(&place).unwrap()).contains("builder"));
        assert_eq!(places.open(&place).unwrap(), ("builder/1".to_owned(), 3, "tools".to_owned()));
        assert_eq!(places.open("").unwrap(), Default::default());
        let mut other = place.clone();
        let last = other.pop().unwrap();
        other.push(if last == 'A' { 'Q' } else { 'A' });
        for wrong in [&*other, "builder/1 3 tools", "x", &place[..12], &"A".repeat(PLACE_BYTES_MAX + 1)] {
            assert_eq!(places.open(wrong).unwrap_err().reason, Reason::MalformedRequest);
        }
        assert!(Places::new().open(&place).is_err());
    }

    #[test]
    fn the_longest_names_have_a_place() {
        let agent = AgentId::parse(&format!("{}/{}", "a".repeat(64), "b".repeat(64))).unwrap();
        let of = KeyOf { agent, epoch: u32::MAX, name: KeyName::parse(&"k".repeat(64)).unwrap() };
        let places = Places::new();
        assert!(places.open(&places.seal(&of).unwrap()).is_ok());
    }
}

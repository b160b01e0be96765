//! Checkpoints: C2SP signed notes over the size and the root of the tree (c2sp.org/signed-note, c2sp.org/tlog-checkpoint).
//!
//! A note is text from outside until its signature is verified: [`open`] looks at nothing in the text before that.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;

use crate::model::{Algorithm, Digest, InvalidKey, PublicKey, TrustDomain, hex};

/// Largest note that is read, in bytes.
pub const NOTE_BYTES_MAX: usize = 65_536;
/// Most signature lines that are read. The specification wants at least 16; witnesses add one each.
const SIGNATURES_MAX: usize = 64;
/// Longest verifier key that is read, in bytes.
const VERIFIER_KEY_BYTES_MAX: usize = 1024;
/// Signature type of Ed25519.
const TYPE_ED25519: u8 = 0x01;
/// Signature type of ECDSA, in DER over SHA-256.
const TYPE_ECDSA: u8 = 0x02;

/// Why a note or a verifier key is not accepted.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NoteError {
    /// More than [`NOTE_BYTES_MAX`] bytes, or too many signatures.
    #[error("the note is too large")]
    TooLarge,
    /// Not of the form of a signed note.
    #[error("not a signed note: {0}")]
    Malformed(&'static str),
    /// No signature names the pinned key.
    #[error("the note carries no signature of the pinned key")]
    Unsigned,
    /// A signature names the pinned key and is not its.
    #[error("a signature that names the pinned key does not verify")]
    SignatureInvalid,
    /// Signed, but not a checkpoint.
    #[error("the signed text is not a checkpoint: {0}")]
    NotCheckpoint(&'static str),
    /// A checkpoint of another log.
    #[error("the checkpoint's origin is not the name of the pinned key")]
    OtherOrigin,
    /// Not a verifier key.
    #[error("not a verifier key: {0}")]
    InvalidVerifierKey(&'static str),
    /// A verifier key over no acceptable public key.
    #[error("not a verifier key: {0}")]
    InvalidKey(#[from] InvalidKey),
}

/// The name of a trust domain's ledger: origin of its checkpoints, and name of the key that signs them.
#[must_use]
pub fn ledger_name(domain: &TrustDomain) -> String {
    format!("{domain}/ledger")
}

/// What a checkpoint says: the tree of the first `size` entries has `root`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Checkpoint {
    /// Which log, see [`ledger_name`].
    pub origin: String,
    /// Entries.
    pub size: u64,
    /// RFC 6962 root over them.
    pub root: Digest,
}

impl Checkpoint {
    /// The text that is signed: `origin`, `size` in decimal, `root` in base64, a line each.
    #[must_use]
    pub fn body(&self) -> String {
        format!("{}\n{}\n{}\n", self.origin, self.size, BASE64.encode(self.root.0))
    }

    /// The signed note: the body, an empty line, and a line for each signature (of the body) by a key named `name`.
    #[must_use]
    pub fn signed(&self, name: &str, signatures: &[(&PublicKey, Vec<u8>)]) -> String {
        let line = |(key, signature): &(&PublicKey, Vec<u8>)| {
            let blob = [&key_id(name, key)[..], signature].concat();
            format!("\u{2014} {name} {}\n", BASE64.encode(blob))
        };
        format!("{}\n{}", self.body(), signatures.iter().map(line).collect::<String>())
    }

    fn parse(text: &str) -> Result<Self, NoteError> {
        let mut lines = text.split_terminator('\n');
        let (Some(origin), Some(size), Some(root), None) = (lines.next(), lines.next(), lines.next(), lines.next()) else {
            return Err(NoteError::NotCheckpoint("it has not three lines"));
        };
        if origin.is_empty() {
            return Err(NoteError::NotCheckpoint("no origin"));
        }
        let canonical = size.bytes().all(|b| b.is_ascii_digit()) && (size == "0" || !size.starts_with('0'));
        let size = size.parse().ok().filter(|_| canonical).ok_or(NoteError::NotCheckpoint("the size is not a number"))?;
        let root = BASE64.decode(root).ok().and_then(|bytes| Digest::from_slice(&bytes));
        Ok(Self { origin: origin.to_owned(), size, root: root.ok_or(NoteError::NotCheckpoint("the root is not 32 bytes"))? })
    }
}

/// The first four bytes of SHA-256 over `name ‖ 0x0A ‖ 0x01 ‖ key` for Ed25519, over the SubjectPublicKeyInfo for others
/// (signed-note, "Signature types"). A name for a key, not a fingerprint.
fn key_id(name: &str, key: &PublicKey) -> [u8; 4] {
    let [a, b, c, d, ..] = match key.algorithm() {
        Algorithm::Ed25519 => Digest::of_parts(&[name.as_bytes(), &[b'\n', TYPE_ED25519], key.raw()]),
        Algorithm::P256 | Algorithm::P384 | Algorithm::Ps256 => key.digest(),
    }
    .0;
    [a, b, c, d]
}

/// The key that a ledger's checkpoints are verified with, as it is pinned: `name+id+base64(type ‖ key)`. For ECDSA the key
/// is a SubjectPublicKeyInfo, for Ed25519 its 32 bytes.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct VerifierKey {
    name: String,
    key: PublicKey,
}

impl VerifierKey {
    /// `key` under `name`.
    ///
    /// # Errors
    /// When `name` is empty, longer than 512 bytes, or has white space, a control character or a plus sign.
    pub fn new(name: &str, key: PublicKey) -> Result<Self, NoteError> {
        if name.len() > VERIFIER_KEY_BYTES_MAX / 2 || !valid_name(name) {
            return Err(NoteError::InvalidVerifierKey("such a name cannot be written in a note"));
        }
        Ok(Self { name: name.to_owned(), key })
    }

    /// Reads what [`VerifierKey`] displays.
    ///
    /// # Errors
    /// When it is not of that form, the id is another key's, or the key is none.
    pub fn parse(text: &str) -> Result<Self, NoteError> {
        let bad = NoteError::InvalidVerifierKey;
        if text.len() > VERIFIER_KEY_BYTES_MAX {
            return Err(bad("too long"));
        }
        let mut parts = text.splitn(3, '+');
        let (Some(name), Some(id), Some(blob)) = (parts.next(), parts.next(), parts.next()) else {
            return Err(bad("it is name+id+key"));
        };
        let blob = BASE64.decode(blob).map_err(|_| bad("the key is not base64"))?;
        let key = match blob.split_first() {
            Some((&TYPE_ED25519, raw)) => PublicKey::from_raw(Algorithm::Ed25519, raw)?,
            Some((&TYPE_ECDSA, spki)) => match PublicKey::from_spki(spki)? {
                key if key.algorithm() == Algorithm::P256 => key,
                _ => return Err(bad("the key is not an ECDSA key")),
            },
            _ => return Err(bad("the signature type is unknown")),
        };
        let parsed = Self::new(name, key)?;
        if hex(&parsed.id()) != id {
            return Err(bad("the id is not this key's"));
        }
        Ok(parsed)
    }

    /// Its name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The key itself.
    #[must_use]
    pub fn key(&self) -> &PublicKey {
        &self.key
    }

    /// What its signatures are found by, besides the name.
    #[must_use]
    pub fn id(&self) -> [u8; 4] {
        key_id(&self.name, &self.key)
    }
}

impl fmt::Display for VerifierKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let blob = match self.key.algorithm() {
            Algorithm::Ed25519 => [&[TYPE_ED25519], self.key.raw()].concat(),
            Algorithm::P256 | Algorithm::P384 | Algorithm::Ps256 => [&[TYPE_ECDSA], self.key.spki()].concat(),
        };
        write!(f, "{}+{}+{}", self.name, hex(&self.id()), BASE64.encode(blob))
    }
}

fn valid_name(name: &str) -> bool {
    !name.is_empty() && !name.chars().any(|c| c.is_whitespace() || c.is_control() || c == '+')
}

/// The text of `note`, once its signature by `key` is verified. Signatures of other keys are skipped.
///
/// # Errors
/// When `note` is too large or malformed in any line, no signature names `key`, or one that names it does not verify.
pub fn open<'n>(note: &'n str, key: &VerifierKey) -> Result<&'n str, NoteError> {
    let bad = NoteError::Malformed;
    if note.len() > NOTE_BYTES_MAX {
        return Err(NoteError::TooLarge);
    }
    if note.bytes().any(|b| b < b' ' && b != b'\n') {
        return Err(bad("it has a control character"));
    }
    let gap = note.rfind("\n\n").ok_or(bad("no empty line before the signatures"))?;
    let (text, signatures) = (&note[..=gap], &note[gap + 2..]);
    let lines = signatures.strip_suffix('\n').ok_or(bad("the last line is cut off"))?;
    if lines.split('\n').count() > SIGNATURES_MAX {
        return Err(NoteError::TooLarge);
    }
    let mut verified = false;
    for line in lines.split('\n') {
        let (name, blob) = line
            .strip_prefix("\u{2014} ")
            .and_then(|rest| rest.split_once(' '))
            .filter(|(name, _)| valid_name(name))
            .ok_or(bad("a signature line is '— name signature'"))?;
        let blob = BASE64.decode(blob).map_err(|_| bad("a signature is not base64"))?;
        let (id, signature) = blob.split_at_checked(4).filter(|(_, s)| !s.is_empty()).ok_or(bad("a signature is too short"))?;
        if name == key.name && id == key.id() {
            if !key.key.verifies(text.as_bytes(), signature) {
                return Err(NoteError::SignatureInvalid);
            }
            verified = true;
        }
    }
    if verified { Ok(text) } else { Err(NoteError::Unsigned) }
}

/// The checkpoint in `note`, signed by `key` and of the log that `key` is named after, byte for byte as
/// [`Checkpoint::body`] writes it: no extension lines.
///
/// # Errors
/// As [`open`]; and when the signed text is no checkpoint, or one of another origin.
pub fn verify(note: &str, key: &VerifierKey) -> Result<Checkpoint, NoteError> {
    let checkpoint = Checkpoint::parse(open(note, key)?)?;
    if checkpoint.origin == key.name { Ok(checkpoint) } else { Err(NoteError::OtherOrigin) }
}

#[cfg(test)]
mod tests {
    use aws_lc_rs::rand::SystemRandom;
    use aws_lc_rs::signature::{ECDSA_P256_SHA256_ASN1_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair};

    use super::super::merkle::leaf_hash;
    use super::*;

    /// golang.org/x/mod/sumdb/note, note_test.go.
    const PETER: &str = "PeterNeumann+c74f20a3+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW";
    const ENOCH: &str = "EnochRoot+af0cfe78+ATtqJ7zOtqQtYqOo0CpvDXNlMhV3HeJDpjrASKGLWdop";
    const TEXT: &str = "If you think cryptography is the answer to your problem,\nthen you don't know what your problem is.\n";
    const PETER_LINE: &str =
        "\u{2014} PeterNeumann x08go/ZJkuBS9UG/SffcvIAQxVBtiFupLLr8pAcElZInNIuGUgYN1FFYC2pZSNXgKvqfqdngotpRZb6KE6RyyBwJnAM=\n";
    const ENOCH_LINE: &str =
        "\u{2014} EnochRoot rwz+eBzmZa0SO3NbfRGzPCpDckykFXSdeX+MNtCOXm2/5n2tiOHp+vAF1aGrQ5ovTG01oOTGwnWLox33WWd1RvMc+QQ=\n";

    /// Made with OpenSSL: keys, signatures and, with its SHA-256, ids.
    const P256: (&str, &str) = (
        "example.org/ledger+bcec2205+AjBZMBMGByqGSM49AgEGCCqGSM49AwEHA0IABMNNYhhTgs5KsaYtQpFeQrA5gcSVOmjq1bnquRJvr9f95HArCE8j5WITJtFk7eih//yu+m+UQ0KEPJwrT4V8P7c=",
        "example.org/ledger\n1\ndziFphNIniTOLPdhmdakI/BC5LvxLX7s7pEu8nbGVwE=\n\n\u{2014} example.org/ledger vOwiBTBFAiAfK6lE4LiSOwyNg9nbg1b5sfapFa+fI1aRkVPf35v6/wIhAJ94c58rXqLEoh0JCRkhFZP3lrOmgqSZ814XMNK5v3k7\n",
    );
    const ED25519: (&str, &str) = (
        "example.org/ledger+34304055+ATQ8OtXwhZfQgiGHaWSPmmfF677gREQByrRr/w7hkOZR",
        "example.org/ledger\n1\ndziFphNIniTOLPdhmdakI/BC5LvxLX7s7pEu8nbGVwE=\n\n\u{2014} example.org/ledger NDBAVQDpXXsCqRd2BH0hXjvsIvkIF2oxv1yXK+jJj8xoE00ij/hN7dbKvzZWWN400jOE6qGJ00Sj+MLLm5V3ZvGT0gw=\n",
    );

    #[test]
    fn the_notes_of_another_implementation_open() {
        let (peter, enoch) = (VerifierKey::parse(PETER).unwrap(), VerifierKey::parse(ENOCH).unwrap());
        assert_eq!((peter.to_string(), enoch.to_string()), (PETER.to_owned(), ENOCH.to_owned()));
        let both = format!("{TEXT}\n{PETER_LINE}{ENOCH_LINE}");
        assert_eq!(open(&both, &peter), Ok(TEXT));
        assert_eq!(open(&both, &enoch), Ok(TEXT));
        assert_eq!(open(&format!("{TEXT}\n{PETER_LINE}"), &enoch), Err(NoteError::Unsigned));
        assert!(matches!(verify(&both, &peter), Err(NoteError::NotCheckpoint(_))));
        // The example of c2sp.org/signed-note.
        let spec = VerifierKey::parse("example.com/foo+530d903a+AekyeRrm56hApGFkyQR4ZCbV54Id2LKaANYcrnKv3U2k").unwrap();
        let note = "This is an example message.\n\n\u{2014} example.com/foo Uw2QOkn8srV1yJGh2VYRlL1Tnagv1YEq6TfXppzi2ONncAlTgK7Ztg1ERYNZXsYjOBH3mFXmRKuwHjG1Yu72IneyaQM=\n";
        assert_eq!(open(note, &spec), Ok("This is an example message.\n"));
    }

    #[test]
    fn a_mangled_verifier_key_is_refused() {
        for text in [PETER, P256.0] {
            assert!(VerifierKey::parse(text).is_ok());
            // The id of an ECDSA key does not cover its name.
            let named = if text == P256.0 { "example.org/ledger".len() } else { 0 };
            for at in 0..text.len() {
                for end in at + 1..=text.len() {
                    let whole = at < named.max(1) && end == text.len();
                    assert!(whole || VerifierKey::parse(&text[at..end]).is_err(), "{}", &text[at..end]);
                }
                let mut bytes = text.as_bytes().to_vec();
                bytes[at] += 1;
                let mangled = String::from_utf8(bytes).unwrap();
                assert!(at < named || VerifierKey::parse(&mangled).is_err(), "{mangled}");
            }
        }
        assert!(VerifierKey::parse("PeterNeumann+cc469956+ARpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TWBADKEY==").is_err());
        assert!(VerifierKey::parse("PeterNeumann+173116ae+ZRpc2QcUPDhMQegwxbzhKqiBfsVkmqq/LDE4izWy10TW").is_err());
        assert!(VerifierKey::parse(&format!("{}{PETER}", "a".repeat(2000))).is_err());
    }

    #[test]
    fn checkpoints_signed_with_openssl_verify_with_both_algorithms() {
        let expected = Checkpoint { origin: "example.org/ledger".into(), size: 1, root: leaf_hash(b"entry 0") };
        for (text, note) in [P256, ED25519] {
            let key = VerifierKey::parse(text).unwrap();
            assert_eq!(key.to_string(), text);
            assert_eq!(verify(note, &key), Ok(expected.clone()));
            let line = note.trim_end().rsplit(' ').next().unwrap();
            assert_eq!(expected.signed(key.name(), &[(key.key(), BASE64.decode(line).unwrap()[4..].to_vec())]), note);
        }
    }

    #[test]
    fn every_changed_byte_of_a_checkpoint_is_noticed() {
        for (text, note) in [P256, ED25519] {
            let key = VerifierKey::parse(text).unwrap();
            for at in 0..note.len() {
                let mut bytes = note.as_bytes().to_vec();
                bytes[at] ^= 1;
                if let Ok(mangled) = String::from_utf8(bytes) {
                    assert!(verify(&mangled, &key).is_err(), "byte {at}");
                }
            }
        }
    }

    #[test]
    fn malformed_notes_are_refused_whole() {
        let key = VerifierKey::parse(PETER).unwrap();
        for note in [
            String::new(),
            TEXT.to_owned(),
            format!("{TEXT}\n"),
            format!("{TEXT}\n{}", PETER_LINE.trim_end()),
            format!("{TEXT}{PETER_LINE}"),
            format!("\u{1}{TEXT}\n{PETER_LINE}"),
            format!("{TEXT}\n{PETER_LINE}Unexpected line.\n"),
            format!("{TEXT}\n{PETER_LINE}\u{2014} other AAAA\n"),
            format!("{TEXT}\n{PETER_LINE}\u{2014} bad+name AAAAAAA=\n"),
            format!("{TEXT}\n{PETER_LINE}\u{2014} other AAAAAAA\n"),
            format!("{TEXT}\n{}", PETER_LINE.replace('\n', "\r\n")),
        ] {
            assert!(matches!(open(&note, &key), Err(NoteError::Malformed(_))), "{note:?}");
        }
        assert_eq!(open(&format!("{TEXT}\n{}", PETER_LINE.repeat(65)), &key), Err(NoteError::TooLarge));
        assert_eq!(open(&"a".repeat(NOTE_BYTES_MAX + 1), &key), Err(NoteError::TooLarge));
        let forged = PETER_LINE.replace("ZJkuBS", "ZJkuBT");
        assert_eq!(open(&format!("{TEXT}\n{PETER_LINE}{forged}"), &key), Err(NoteError::SignatureInvalid));
    }

    #[test]
    fn a_signed_text_that_is_no_checkpoint_of_this_log_is_refused() {
        let pair = Ed25519KeyPair::generate().unwrap();
        let public = PublicKey::from_raw(Algorithm::Ed25519, pair.public_key().as_ref()).unwrap();
        let name = ledger_name(&TrustDomain::parse("example.org").unwrap());
        let key = VerifierKey::new(&name, public).unwrap();
        let root = BASE64.encode([7; 32]);
        let signed = |text: &str| {
            let blob = [&key.id()[..], pair.sign(text.as_bytes()).as_ref()].concat();
            verify(&format!("{text}\n\u{2014} {name} {}\n", BASE64.encode(blob)), &key)
        };
        assert_eq!(signed(&format!("{name}\n5\n{root}\n")).map(|checkpoint| checkpoint.size), Ok(5));
        assert_eq!(signed(&format!("other.org/ledger\n5\n{root}\n")), Err(NoteError::OtherOrigin));
        for text in [
            format!("{name}\n05\n{root}\n"),
            format!("{name}\n+5\n{root}\n"),
            format!("{name}\n\n{root}\n"),
            format!("{name}\n18446744073709551616\n{root}\n"),
            format!("{name}\n5\n{}\n", BASE64.encode([7; 31])),
            format!("{name}\n5\n"),
            format!("{name}\n5\n{root}\nextension\n"),
            format!("\n5\n{root}\n"),
        ] {
            assert!(matches!(signed(&text), Err(NoteError::NotCheckpoint(_))), "{text:?}");
        }
    }

    #[test]
    fn what_is_signed_with_p256_verifies() {
        let random = SystemRandom::new();
        let pair = EcdsaKeyPair::generate(&ECDSA_P256_SHA256_ASN1_SIGNING).unwrap();
        let public = PublicKey::from_raw(Algorithm::P256, pair.public_key().as_ref()).unwrap();
        let checkpoint = Checkpoint { origin: "td.example/ledger".into(), size: u64::MAX, root: Digest([9; 32]) };
        let signature = pair.sign(&random, checkpoint.body().as_bytes()).unwrap();
        let note = checkpoint.signed("td.example/ledger", &[(&public, signature.as_ref().to_vec())]);
        let key = VerifierKey::parse(&VerifierKey::new("td.example/ledger", public).unwrap().to_string()).unwrap();
        assert_eq!(verify(&note, &key), Ok(checkpoint));
        assert!(VerifierKey::new("two words", key.key().clone()).is_err());
        assert!(VerifierKey::new("", key.key().clone()).is_err());
    }
}

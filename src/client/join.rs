//! The join file: all that first contact needs, and one secret.

use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use crate::model::{AgentId, InvalidName, SecretBytes, TokenId, TrustDomain, UnixTime};
use crate::proto;

/// The one version there is.
const VERSION: u32 = 1;
/// Largest join file, in bytes.
const BYTES_MAX: usize = 64 * 1024;
/// Most addresses, most authorities.
const ITEMS_MAX: usize = 16;

/// Why a join file is not one.
#[derive(Debug, thiserror::Error)]
pub enum JoinFileError {
    /// It cannot be read or written.
    #[error("{}: {error}", path.display())]
    Io {
        /// Which file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Others can read the secret in it.
    #[error("{}: mode {mode:04o} lets others read it; its token must be taken as known: ask for another", path.display())]
    Readable {
        /// Which file.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// It is not a join file that this version understands.
    #[error("not a join file: {0}")]
    Malformed(&'static str),
    /// A name in it breaks its rule.
    #[error("not a join file: {0}")]
    Name(#[from] InvalidName),
}

/// Everything for first contact (proto `JoinFile`), parsed. Holds the token's seed, hence no Debug.
pub struct JoinFile {
    /// Where the daemon listens, `host:port`, tried in order.
    pub addresses: Vec<String>,
    /// The trust domain.
    pub trust_domain: TrustDomain,
    /// Whom it makes the bearer.
    pub agent: AgentId,
    /// The authorities to trust, and no others.
    pub bundle: proto::Bundle,
    /// The token's public name.
    pub token_id: TokenId,
    /// The token's secret, 32 bytes.
    pub token_seed: SecretBytes,
    /// Until when it is good.
    pub expires: UnixTime,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Written {
    version: u32,
    agent: String,
    trust_domain: String,
    addresses: Vec<String>,
    expires_unix_seconds: u64,
    bundle: WrittenBundle,
    token_id: String,
    token_seed: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct WrittenBundle {
    authorities: Vec<String>,
    sequence: u64,
    refresh_hint_seconds: u32,
}

impl Drop for Written {
    fn drop(&mut self) {
        self.token_seed.zeroize();
    }
}

impl JoinFile {
    /// Takes over what the daemon answered.
    ///
    /// # Errors
    /// When a field is absent, too large, or not what it must be.
    pub fn from_proto(mut join: proto::JoinFile) -> Result<Self, JoinFileError> {
        let token_seed = SecretBytes::new(std::mem::take(&mut join.token_seed));
        let bundle = join.bundle.ok_or(JoinFileError::Malformed("no bundle"))?;
        if !(1..=ITEMS_MAX).contains(&bundle.authorities.len()) {
            return Err(JoinFileError::Malformed("the bundle must have 1 to 16 authorities"));
        }
        if !(1..=ITEMS_MAX).contains(&join.addresses.len()) || join.addresses.iter().any(|address| address.len() > 260) {
            return Err(JoinFileError::Malformed("it must have 1 to 16 addresses"));
        }
        if token_seed.reveal().len() != 32 {
            return Err(JoinFileError::Malformed("the token's seed must have 32 bytes"));
        }
        Ok(Self {
            addresses: join.addresses,
            trust_domain: TrustDomain::parse(&join.trust_domain)?,
            agent: AgentId::parse(&join.agent)?,
            bundle,
            token_id: TokenId::from_slice(&join.token_id).ok_or(JoinFileError::Malformed("the token's id must have 16 bytes"))?,
            token_seed,
            expires: UnixTime::from_seconds(join.expires_unix_seconds),
        })
    }

    /// Parses the JSON text.
    ///
    /// # Errors
    /// When it is larger than 64 KiB, of another version, has an unknown field, or a field is not what it must be.
    pub fn parse(json: &[u8]) -> Result<Self, JoinFileError> {
        if json.len() > BYTES_MAX {
            return Err(JoinFileError::Malformed("larger than 64 KiB"));
        }
        // serde_json quotes what it stumbles over, and that may be the seed: its message is not passed on.
        let written: Written =
            serde_json::from_slice(json).map_err(|_| JoinFileError::Malformed("not the JSON of a join file"))?;
        if written.version != VERSION {
            return Err(JoinFileError::Malformed("another version than 1; take a newer keyward"));
        }
        let bytes = |text: &String| STANDARD.decode(text).map_err(|_| JoinFileError::Malformed("a field is not base64"));
        Self::from_proto(proto::JoinFile {
            addresses: written.addresses.clone(),
            trust_domain: written.trust_domain.clone(),
            agent: written.agent.clone(),
            bundle: Some(proto::Bundle {
                authorities: written.bundle.authorities.iter().map(bytes).collect::<Result<_, _>>()?,
                sequence: written.bundle.sequence,
                refresh_hint_seconds: written.bundle.refresh_hint_seconds,
                // Nobody joins by them.
                token_signing_keys: Vec::new(),
            }),
            token_id: bytes(&written.token_id)?,
            token_seed: bytes(&written.token_seed)?,
            expires_unix_seconds: written.expires_unix_seconds,
        })
    }

    /// The JSON text, with a newline. Secret.
    ///
    /// # Errors
    /// When it would be larger than 64 KiB.
    pub fn to_json(&self) -> Result<Zeroizing<Vec<u8>>, JoinFileError> {
        let written = Written {
            version: VERSION,
            agent: self.agent.to_string(),
            trust_domain: self.trust_domain.to_string(),
            addresses: self.addresses.clone(),
            expires_unix_seconds: self.expires.seconds(),
            bundle: WrittenBundle {
                authorities: self.bundle.authorities.iter().map(|der| STANDARD.encode(der)).collect(),
                sequence: self.bundle.sequence,
                refresh_hint_seconds: self.bundle.refresh_hint_seconds,
            },
            token_id: STANDARD.encode(self.token_id.0),
            token_seed: STANDARD.encode(self.token_seed.reveal()),
        };
        // One buffer of the largest size: a vector that grows leaves copies of the seed behind.
        let mut buffer = Zeroizing::new(vec![0; BYTES_MAX]);
        let mut rest: &mut [u8] = &mut buffer;
        serde_json::to_writer_pretty(&mut rest, &written).map_err(|_| JoinFileError::Malformed("larger than 64 KiB"))?;
        rest.write_all(b"\n").map_err(|_| JoinFileError::Malformed("larger than 64 KiB"))?;
        let unused = rest.len();
        buffer.truncate(BYTES_MAX - unused);
        Ok(buffer)
    }

    /// Reads the file at `path`; `-` is standard input, where permissions do not apply.
    ///
    /// # Errors
    /// As [`JoinFile::parse`]; and when group or others may read the file.
    pub fn read(path: &Path) -> Result<Self, JoinFileError> {
        let io_error = |error| JoinFileError::Io { path: path.to_path_buf(), error };
        // Capacity for all of it, for the same reason as above.
        let mut json = Zeroizing::new(Vec::with_capacity(BYTES_MAX + 2));
        let limit = BYTES_MAX as u64 + 1;
        if path == Path::new("-") {
            io::stdin().lock().take(limit).read_to_end(&mut json).map_err(io_error)?;
        } else {
            let file = File::open(path).map_err(io_error)?;
            let mode = file.metadata().map_err(io_error)?.mode() & 0o7777;
            if mode & 0o077 != 0 {
                return Err(JoinFileError::Readable { path: path.to_path_buf(), mode });
            }
            file.take(limit).read_to_end(&mut json).map_err(io_error)?;
        }
        Self::parse(&json)
    }

    /// Makes an empty file for a join file, mode 0600. Done before the daemon is asked, so that the one answer that holds
    /// the secret is not lost to a path that cannot be written.
    ///
    /// # Errors
    /// When it exists already or cannot be made.
    pub fn create(path: &Path) -> Result<File, JoinFileError> {
        let made = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path);
        made.map_err(|error| JoinFileError::Io { path: path.to_path_buf(), error })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;

    pub(crate) fn example() -> JoinFile {
        JoinFile::from_proto(proto::JoinFile {
            addresses: vec!["127.0.0.1:8443".into()],
            trust_domain: "example.org".into(),
            agent: "coder/7".into(),
            bundle: Some(proto::Bundle {
                authorities: vec![vec![0x30, 0x00]],
                sequence: 3,
                refresh_hint_seconds: 300,
                ..proto::Bundle::default()
            }),
            token_id: vec![1; 16],
            token_seed: vec![2; 32],
            expires_unix_seconds: 1_800_000_000,
        })
        .expect("a join file")
    }

    fn written_with(mode: u32) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("join.json");
        JoinFile::create(&path).expect("created").write_all(&example().to_json().expect("json")).expect("written");
        std::fs::set_permissions(&path, Permissions::from_mode(mode)).expect("chmod");
        (directory, path)
    }

    #[test]
    fn what_is_written_is_read_back() {
        let (_directory, path) = written_with(0o600);
        let join = JoinFile::read(&path).expect("read");
        assert_eq!(join.agent.as_str(), "coder/7");
        assert_eq!(join.bundle, example().bundle);
        assert_eq!((join.token_id.0, join.token_seed.reveal()), ([1; 16], &[2; 32][..]));
        assert_eq!(join.expires, UnixTime::from_seconds(1_800_000_000));
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        for mode in [0o640, 0o604, 0o644, 0o660] {
            let (_directory, path) = written_with(mode);
            assert!(matches!(JoinFile::read(&path), Err(JoinFileError::Readable { .. })), "{mode:o}");
        }
        let (_directory, path) = written_with(0o400);
        JoinFile::read(&path).expect("0400 will do");
    }

    #[test]
    fn it_is_created_for_its_owner_alone_and_never_over_another() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("join.json");
        let file = JoinFile::create(&path).expect("created");
        assert_eq!(file.metadata().expect("metadata").mode() & 0o777, 0o600);
        assert!(JoinFile::create(&path).is_err());
    }

    #[test]
    fn another_version_an_unknown_field_and_a_short_seed_are_refused_without_repeating_the_secret() {
        let json = String::from_utf8(example().to_json().expect("json").to_vec()).expect("text");
        let seed = STANDARD.encode([2; 32]);
        for (from, to) in
            [("\"version\": 1", "\"version\": 2"), ("\"agent\"", "\"extra\""), (seed.as_str(), "AgIC"), (seed.as_str(), "Ag")]
        {
            let error = JoinFile::parse(json.replace(from, to).as_bytes()).err().expect("refused").to_string();
            assert!(!error.contains("Ag"), "{error}");
        }
        assert!(JoinFile::parse(&vec![b' '; BYTES_MAX + 1]).is_err());
    }
}

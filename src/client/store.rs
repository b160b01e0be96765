//! The directory an agent's credentials live in.
//!
//! ```text
//! DIR/                       0700
//!   credential-<serial>/     svid.pem key.pem bundle.pem agent.json, 0600: one certificate and all that belongs to it
//!   current                  symlink to one of them
//!   svid.pem …               symlinks through current
//!   next.key next.ask        an outstanding request: its key, and its exact bytes
//!   lock
//! ```
//!
//! A certificate and its key are never replaced one by one: a complete directory is made beside the old one, then `current`
//! is swapped in one rename. Who reads `svid.pem` and `key.pem` across a swap opens `current` once and reads both below it;
//! the directory before the current one is kept for readers in between.

use std::fs::{self, DirBuilder, File, OpenOptions, TryLockError};
use std::io::{self, Read};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use prost::Message;
use serde::{Deserialize, Serialize};
use zeroize::Zeroizing;

use super::durable;
use super::request::Key;
use crate::model::{PublicKey, UnixTime};
use crate::proto::{self, Ask};

/// Largest file that is read back, in bytes.
const FILE_BYTES_MAX: u64 = 256 * 1024;
const FILES: [&str; 4] = ["svid.pem", "key.pem", "bundle.pem", "agent.json"];

/// Why the directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file system said no.
    #[error("{}: {error}", path.display())]
    Io {
        /// Where.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// Another process works in it.
    #[error("{}: another keyward process works in it", path.display())]
    Busy {
        /// Which directory.
        path: PathBuf,
    },
    /// Others may enter the directory.
    #[error("{}: mode {mode:04o} lets others in; make it 0700", path.display())]
    Open {
        /// Which directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// A file in it is not what it must be.
    #[error("{}: {what}", path.display())]
    Broken {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// Nothing has been attested into it yet.
    #[error("{}: no credential yet; run `keyward agent attest --join FILE --out DIR` first", path.display())]
    Empty {
        /// Which directory.
        path: PathBuf,
    },
    /// It belongs to another agent.
    #[error("{}: it belongs to {owner}; use a directory of its own for each agent", path.display())]
    Foreign {
        /// Which directory.
        path: PathBuf,
        /// Whose it is.
        owner: String,
    },
    /// The join file was used with a key that this directory holds or is asking for already.
    #[error("{}: {what}", path.display())]
    Joined {
        /// Which directory.
        path: PathBuf,
        /// What to do instead.
        what: &'static str,
    },
}

/// `agent.json`: what belongs to a certificate besides its bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Card {
    /// Version of this file: 1.
    pub version: u32,
    /// `<class>/<instance>`
    pub agent: String,
    /// The identity in the certificate.
    pub spiffe_id: String,
    /// Trust domain.
    pub trust_domain: String,
    /// Epoch of the certificate.
    pub epoch: u32,
    /// The sequence the next renewal claims.
    pub next_sequence: u64,
    /// Ledger index of the intent behind the certificate.
    pub ledger_index: u64,
    /// Start of validity, Unix seconds.
    pub not_before_unix_seconds: u64,
    /// End of validity, Unix seconds.
    pub not_after_unix_seconds: u64,
    /// Sequence of the bundle in `bundle.pem`.
    pub bundle_sequence: u64,
    /// Where the daemon listens.
    pub addresses: Vec<String>,
    /// The join token this identity came in with, in hexadecimal. Not a secret.
    pub token_id: String,
}

impl Card {
    /// When a renewal is due: half of the certificate's life has passed.
    #[must_use]
    pub fn half_life(&self) -> UnixTime {
        UnixTime::from_seconds(self.not_before_unix_seconds / 2 + self.not_after_unix_seconds / 2)
    }

    /// Whether the certificate is past its end.
    #[must_use]
    pub fn is_expired(&self, now: UnixTime) -> bool {
        now.seconds() >= self.not_after_unix_seconds
    }
}

/// A credential in force: card, chain, key, authorities.
pub struct Holding {
    /// `agent.json`
    pub card: Card,
    /// DER, leaf first.
    pub chain: Vec<Vec<u8>>,
    /// The certified key.
    pub key: Key,
    /// DER.
    pub authorities: Vec<Vec<u8>>,
}

impl Holding {
    /// Whether the chain still ends in the bundle: else nobody who has it knows us, keyward included.
    #[must_use]
    pub fn ends_in_the_bundle(&self) -> bool {
        let last = self.chain.last().and_then(|der| x509_parser::parse_x509_certificate(der).ok());
        let Some((_, last)) = last else { return false };
        let signed = |key: PublicKey| key.verifies(last.tbs_certificate.as_ref(), &last.signature_value.data);
        self.authorities.iter().filter_map(|der| key_of(der)).any(signed)
    }
}

/// An outstanding request: made durable before it is sent, the same bytes until it is answered.
pub struct Pending {
    /// The key to be certified.
    pub key: Key,
    /// The exact bytes of the [`Ask`].
    pub ask: Vec<u8>,
    /// What they claim.
    pub claim: proto::ask::Claim,
}

/// The directory, locked for as long as this lives.
pub struct AgentDir {
    path: PathBuf,
    _lock: File,
    #[cfg(test)]
    crash_at: std::cell::Cell<Option<u32>>,
}

impl AgentDir {
    /// Opens and locks `path`; makes it (0700) if `create` is set.
    ///
    /// # Errors
    /// When it is absent, open to others, or another process works in it.
    pub fn open(path: &Path, create: bool) -> Result<Self, StoreError> {
        let failed = |error| StoreError::Io { path: path.to_path_buf(), error };
        if create {
            match DirBuilder::new().recursive(true).mode(0o700).create(path) {
                Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
                _ => {}
            }
        }
        let mode = match fs::metadata(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(StoreError::Empty { path: path.to_path_buf() }),
            found => found.map_err(failed)?.mode() & 0o7777,
        };
        if mode & 0o077 != 0 {
            return Err(StoreError::Open { path: path.to_path_buf(), mode });
        }
        let lock =
            OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(path.join("lock")).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => return Err(StoreError::Busy { path: path.to_path_buf() }),
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        Ok(Self {
            path: path.to_path_buf(),
            _lock: lock,
            #[cfg(test)]
            crash_at: std::cell::Cell::new(None),
        })
    }

    /// Where it is.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The credential in force.
    ///
    /// # Errors
    /// When there is none, or a file of it is not what it must be.
    pub fn holding(&self) -> Result<Holding, StoreError> {
        match self.current_name()? {
            Some(name) => read_holding(&self.path.join(name)),
            None => Err(StoreError::Empty { path: self.path.clone() }),
        }
    }

    /// The credential in force, or none where nothing has been attested yet.
    ///
    /// # Errors
    /// As [`AgentDir::holding`].
    pub fn holding_if_any(&self) -> Result<Option<Holding>, StoreError> {
        match self.holding() {
            Err(StoreError::Empty { .. }) => Ok(None),
            other => other.map(Some),
        }
    }

    /// The outstanding request, if there is one. Both files must be there: `next.ask` is written last and removed first, so
    /// a key without an ask was never sent, or its answer is in force already.
    ///
    /// # Errors
    /// When a file is not what it must be. A request that cannot be read must not silently be made anew: under another key
    /// it would look like a clone.
    pub fn pending(&self) -> Result<Option<Pending>, StoreError> {
        let ask_path = self.path.join("next.ask");
        if !ask_path.try_exists().map_err(|error| self.failed("next.ask", error))? {
            return Ok(None);
        }
        let broken = |path: &Path, what: String| StoreError::Broken { path: path.to_path_buf(), what };
        let ask = read(&ask_path)?;
        let claim = Ask::decode(ask.as_slice()).ok().and_then(|ask| ask.claim);
        let claim = claim.ok_or_else(|| broken(&ask_path, "not an outstanding request".into()))?;
        let key_path = self.path.join("next.key");
        let key = Key::from_pem(&read(&key_path)?).map_err(|error| broken(&key_path, error.to_string()))?;
        Ok(Some(Pending { key, ask: ask.to_vec(), claim }))
    }

    /// Makes `key` and the bytes of its request durable. Only what comes back from here may be sent.
    ///
    /// # Errors
    /// When the file system says no; then nothing may be sent.
    pub fn intend(&self, key: Key, ask: Vec<u8>, claim: proto::ask::Claim) -> Result<Pending, StoreError> {
        // An old ask never stands beside a new key.
        self.abandon()?;
        durable::write(&self.path, "next.key", key.to_pem().as_bytes()).map_err(|error| self.failed("next.key", error))?;
        // Crash here: a key without an ask. Nothing was sent; the next attempt overwrites it.
        self.crash_point("next.key is durable")?;
        durable::write(&self.path, "next.ask", &ask).map_err(|error| self.failed("next.ask", error))?;
        // Crash here: the request is repeated as it is, whether or not it had been sent.
        self.crash_point("next.ask is durable")?;
        Ok(Pending { key, ask, claim })
    }

    /// Puts `credential` in force for the outstanding key.
    ///
    /// # Errors
    /// When the file system says no. The old credential is then in force still, or the new one already; never a mixture.
    pub fn promote(&self, pending: &Pending, card: &Card, credential: &proto::Credential) -> Result<(), StoreError> {
        let serial = credential.chain.first().and_then(|leaf| serial_of(leaf)).ok_or_else(|| StoreError::Broken {
            path: self.path.clone(),
            what: "the certificate to be stored does not parse".into(),
        })?;
        let name = format!("credential-{serial}");
        let before = self.current_name()?;
        if before.as_deref() != Some(name.as_str()) {
            self.make_credential(&name, pending, card, credential).map_err(|error| self.failed(&name, error))?;
            // Crash here: a complete directory that nothing points to. The old pair is in force; the request is repeated, and
            // the same answer makes the directory anew.
            self.crash_point("the new directory is complete")?;
            for file in FILES {
                // Before the first swap these dangle; after it they never do.
                let target = format!("current/{file}");
                if fs::read_link(self.path.join(file)).ok().as_deref() != Some(Path::new(&target)) {
                    durable::link(&self.path, file, &target).map_err(|error| self.failed(file, error))?;
                }
            }
            self.crash_point("the links are there")?;
            durable::link(&self.path, "current", &name).map_err(|error| self.failed("current", error))?;
        }
        // Crash here: the new pair is in force and its request still looks outstanding. `settle` sees that the key is the
        // same and forgets the request.
        self.crash_point("current is swapped")?;
        self.abandon()?;
        // What is left is tidying; a failure costs disk space and is made good by the next renewal.
        let _ = self.remove_all_credentials_but(&[Some(name), before]);
        Ok(())
    }

    /// Forgets an outstanding request whose answer is in force already: a crash came between the two.
    ///
    /// # Errors
    /// When the file system says no.
    pub fn settle(&self, holding: &Holding) -> Result<(), StoreError> {
        match self.pending()? {
            Some(pending) if pending.key.public() == holding.key.public() => self.abandon(),
            _ => Ok(()),
        }
    }

    /// Forgets the outstanding request: answered, or refused for what is in it.
    ///
    /// # Errors
    /// When the file system says no.
    pub fn abandon(&self) -> Result<(), StoreError> {
        for name in ["next.ask", "next.key"] {
            // The ask first: a key alone means nothing.
            durable::remove(&self.path.join(name)).map_err(|error| self.failed(name, error))?;
            durable::sync(&self.path).map_err(|error| self.failed(name, error))?;
            self.crash_point("one file of the request is gone")?;
        }
        Ok(())
    }

    /// Puts a newer bundle in force beside the credential; false where one as new is there already.
    ///
    /// # Errors
    /// When there is no credential, or the file system says no.
    pub fn keep_bundle(&self, bundle: &proto::Bundle) -> Result<bool, StoreError> {
        let name = self.current_name()?.ok_or_else(|| StoreError::Empty { path: self.path.clone() })?;
        let directory = self.path.join(name);
        let mut card = read_holding(&directory)?.card;
        if bundle.sequence <= card.bundle_sequence {
            return Ok(false);
        }
        card.bundle_sequence = bundle.sequence;
        let authorities = certificates_pem(&bundle.authorities);
        durable::write(&directory, "bundle.pem", authorities.as_bytes()).map_err(|error| self.failed("bundle.pem", error))?;
        // Crash here: newer authorities under the sequence of those before. The same bundle is put in force again, no older one is.
        self.crash_point("the newer authorities are durable")?;
        write_card(&directory, &card).map_err(|error| self.failed("agent.json", error))?;
        Ok(true)
    }

    fn make_credential(&self, name: &str, pending: &Pending, card: &Card, credential: &proto::Credential) -> io::Result<()> {
        let directory = self.path.join(name);
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        DirBuilder::new().mode(0o700).create(&directory)?;
        let empty: &[Vec<u8>] = &[];
        let authorities = credential.bundle.as_ref().map_or(empty, |bundle| &bundle.authorities);
        durable::write(&directory, "svid.pem", certificates_pem(&credential.chain).as_bytes())?;
        durable::write(&directory, "key.pem", pending.key.to_pem().as_bytes())?;
        durable::write(&directory, "bundle.pem", certificates_pem(authorities).as_bytes())?;
        write_card(&directory, card)?;
        durable::sync(&self.path)
    }

    fn current_name(&self) -> Result<Option<String>, StoreError> {
        current_name(&self.path)
    }

    fn remove_all_credentials_but(&self, kept: &[Option<String>]) -> io::Result<()> {
        for entry in fs::read_dir(&self.path)? {
            let name = entry?.file_name().to_string_lossy().into_owned();
            if name.starts_with("credential-") && !kept.iter().flatten().any(|kept| *kept == name) {
                fs::remove_dir_all(self.path.join(name))?;
            }
        }
        durable::sync(&self.path)
    }

    fn failed(&self, name: &str, error: io::Error) -> StoreError {
        StoreError::Io { path: self.path.join(name), error }
    }

    /// Where tests let the process die.
    #[cfg(test)]
    fn crash_point(&self, point: &str) -> Result<(), StoreError> {
        match self.crash_at.get() {
            Some(0) => Err(StoreError::Broken { path: self.path.clone(), what: format!("died: {point}") }),
            left => {
                self.crash_at.set(left.map(|left| left - 1));
                Ok(())
            }
        }
    }

    #[cfg(not(test))]
    #[expect(clippy::unused_self, clippy::unnecessary_wraps, reason = "the test build counts here")]
    fn crash_point(&self, _point: &str) -> Result<(), StoreError> {
        Ok(())
    }
}

fn write_card(directory: &Path, card: &Card) -> io::Result<()> {
    let mut json = serde_json::to_vec_pretty(card)?;
    json.push(b'\n');
    durable::write(directory, "agent.json", &json)
}

/// The credential in force in an agent's directory, read beside whoever works in it.
///
/// # Errors
/// As [`AgentDir::holding`].
pub fn holding_in(path: &Path) -> Result<Holding, StoreError> {
    match current_name(path)? {
        Some(name) => read_holding(&path.join(name)),
        None => Err(StoreError::Empty { path: path.to_path_buf() }),
    }
}

fn current_name(path: &Path) -> Result<Option<String>, StoreError> {
    let current = path.join("current");
    match fs::read_link(&current) {
        Ok(target) => Ok(target.to_str().map(str::to_owned)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(StoreError::Io { path: current, error }),
    }
}

fn read_holding(directory: &Path) -> Result<Holding, StoreError> {
    let broken = |name: &str, what: String| StoreError::Broken { path: directory.join(name), what };
    let card: Card =
        serde_json::from_slice(&read(&directory.join("agent.json"))?).map_err(|error| broken("agent.json", error.to_string()))?;
    let key = Key::from_pem(&read(&directory.join("key.pem"))?).map_err(|error| broken("key.pem", error.to_string()))?;
    let chain = certificates(&read(&directory.join("svid.pem"))?).ok_or_else(|| broken("svid.pem", "not PEM".into()))?;
    let authorities =
        certificates(&read(&directory.join("bundle.pem"))?).ok_or_else(|| broken("bundle.pem", "not PEM".into()))?;
    if card.version != 1 {
        return Err(broken("agent.json", "another version than 1; take a newer keyward".into()));
    }
    if chain.first().and_then(|leaf| key_of(leaf)).as_ref() != Some(key.public()) {
        return Err(broken("svid.pem", "the certificate is not of the key beside it".into()));
    }
    Ok(Holding { card, chain, key, authorities })
}

fn read(path: &Path) -> Result<Zeroizing<Vec<u8>>, StoreError> {
    let failed = |error| StoreError::Io { path: path.to_path_buf(), error };
    let file = File::open(path).map_err(failed)?;
    let size = file.metadata().map_err(failed)?.len();
    if size > FILE_BYTES_MAX {
        return Err(StoreError::Broken { path: path.to_path_buf(), what: format!("larger than {FILE_BYTES_MAX} bytes") });
    }
    // Room for all of it at once: a vector that grows leaves copies of a key behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(usize::try_from(size).unwrap_or(0) + 1));
    file.take(FILE_BYTES_MAX).read_to_end(&mut bytes).map_err(failed)?;
    Ok(bytes)
}

fn certificates(text: &[u8]) -> Option<Vec<Vec<u8>>> {
    let blocks = pem::parse_many(text).ok()?;
    Some(blocks.into_iter().filter(|block| block.tag() == "CERTIFICATE").map(pem::Pem::into_contents).collect())
}

/// Certificates as PEM, one after the other (RFC 7468 §5).
#[must_use]
pub fn certificates_pem(ders: &[Vec<u8>]) -> String {
    let blocks: Vec<_> = ders.iter().map(|der| pem::Pem::new("CERTIFICATE", der.as_slice())).collect();
    pem::encode_many_config(&blocks, pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF))
}

fn serial_of(certificate: &[u8]) -> Option<String> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    Some(crate::model::hex(parsed.raw_serial()))
}

/// The key a certificate certifies.
pub(super) fn key_of(certificate: &[u8]) -> Option<PublicKey> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    PublicKey::from_spki(parsed.public_key().raw).ok()
}

#[cfg(test)]
#[path = "store_tests.rs"]
mod tests;

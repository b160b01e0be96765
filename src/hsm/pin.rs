//! The PIN: where it comes from, and the marker that makes one wrong PIN cost one try, also under a restart loop.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use cryptoki::types::RawAuthPin;
use zeroize::Zeroizing;

use super::error::Error;
use crate::config::PinSource;
use crate::model::{KeyId, SecretBytes, UnixTime, hex};
use crate::proto::TokenRole;

/// Longest PIN, in bytes, with its newline.
const PIN_BYTES_MAX: usize = 256;
/// Most that is read of an operator's reason, in bytes: 256 characters.
const REASON_BYTES_MAX: u64 = 1024;

/// A PIN source that can be asked again at each login. Only a file descriptor's PIN is kept, because it can be read once.
pub(super) struct Pin {
    source: PinSource,
    kept: Mutex<Option<SecretBytes>>,
}

impl Pin {
    pub(super) fn new(source: PinSource) -> Self {
        Self { source, kept: Mutex::new(None) }
    }

    /// Reads the PIN for one login. What is returned is overwritten when dropped.
    pub(super) fn read(&self) -> Result<RawAuthPin, Error> {
        match &self.source {
            // Others may not even be able to read it: not the group either.
            PinSource::File(path) => read_file(path, 0o077),
            // systemd shows the ACL of a service user as group bits.
            PinSource::Credential(name) => read_file(&credential(name)?, 0o007),
            PinSource::Fd(fd) => self.read_fd(*fd),
        }
        .map(|pin| RawAuthPin::new(Box::new(pin.reveal().to_vec())))
    }

    fn read_fd(&self, fd: i32) -> Result<SecretBytes, Error> {
        let mut kept = self.kept.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        if let Some(pin) = kept.as_ref() {
            return Ok(SecretBytes::new(pin.reveal().to_vec()));
        }
        let path = PathBuf::from(format!("/proc/self/fd/{fd}"));
        let file = File::open(&path).map_err(|error| refused(&path, error))?;
        let pin = read_bounded(file, &path)?;
        *kept = Some(SecretBytes::new(pin.reveal().to_vec()));
        Ok(pin)
    }
}

fn refused(path: &Path, cause: impl ToString) -> Error {
    Error::PinSource { from: path.display().to_string(), cause: cause.to_string() }
}

fn credential(name: &str) -> Result<PathBuf, Error> {
    let from = format!("credential {name:?}");
    if name.is_empty() || name.contains('/') || name == "." || name == ".." {
        return Err(Error::PinSource { from, cause: "not a credential's name".into() });
    }
    let directory = std::env::var_os("CREDENTIALS_DIRECTORY")
        .ok_or(Error::PinSource { from, cause: "$CREDENTIALS_DIRECTORY is not set".into() })?;
    Ok(PathBuf::from(directory).join(name))
}

fn read_file(path: &Path, forbidden: u32) -> Result<SecretBytes, Error> {
    let file = File::open(path).map_err(|error| refused(path, error))?;
    // Of the opened file, so that it cannot be exchanged in between.
    let metadata = file.metadata().map_err(|error| refused(path, error))?;
    if !metadata.is_file() {
        return Err(refused(path, "not a regular file"));
    }
    if metadata.mode() & forbidden != 0 {
        return Err(refused(path, format!("mode {:04o} lets others read it; chmod 600", metadata.mode() & 0o7777)));
    }
    read_bounded(file, path)
}

fn read_bounded(mut file: File, path: &Path) -> Result<SecretBytes, Error> {
    let mut buffer = Zeroizing::new([0_u8; PIN_BYTES_MAX + 1]);
    let mut length = 0;
    while length < buffer.len() {
        match file.read(&mut buffer[length..]) {
            Ok(0) => break,
            Ok(more) => length += more,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(refused(path, error)),
        }
    }
    if length > PIN_BYTES_MAX {
        return Err(refused(path, format!("longer than {PIN_BYTES_MAX} bytes")));
    }
    let pin = buffer[..length].strip_suffix(b"\n").unwrap_or(&buffer[..length]);
    if pin.is_empty() {
        return Err(refused(path, "it is empty"));
    }
    Ok(SecretBytes::new(pin.to_vec()))
}

/// `<state>/pin-pending-<role>`: there while a login is being tried, and after one that failed.
#[derive(Debug, Clone)]
pub(super) struct Marker {
    directory: PathBuf,
    path: PathBuf,
    /// `<state>/pin-unlock-<role>`: an operator's [`Unlock`]. Its owner is who, its time is when, its text is why.
    unlock: PathBuf,
}

/// What an operator asked for with `keyward hsm unlock`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Unlock {
    /// Who.
    pub uid: u32,
    /// When.
    pub at: UnixTime,
    /// Why, if that was said.
    pub reason: String,
}

impl Marker {
    pub(super) fn new(state: &Path, role: TokenRole) -> Self {
        let name = match role {
            TokenRole::Agents => "agents",
            TokenRole::Authority | TokenRole::Unspecified => "authority",
        };
        let [path, unlock] = ["pin-pending", "pin-unlock"].map(|what| state.join(format!("{what}-{name}")));
        Self { directory: state.into(), path, unlock }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// No login is tried: an earlier one has not succeeded, or an unlock is not recorded yet.
    pub(super) fn is_set(&self) -> bool {
        is_there(&self.path) || is_there(&self.unlock)
    }

    /// Durable before C_Login is called. A crash from here to [`Marker::clear`] leaves it behind, and the next start does not
    /// log in: whether that try was counted by the token is not known.
    pub(super) fn set(&self, label: &str, serial: &str) -> io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&self.path)?;
        writeln!(
            file,
            "a login to token {label:?} (serial {serial:?}) has not succeeded; `keyward hsm unlock` after checking its PIN"
        )?;
        file.sync_all()?;
        self.sync_directory()
    }

    /// Returns whether it was there.
    pub(super) fn clear(&self) -> io::Result<bool> {
        self.remove(&self.path)
    }

    fn remove(&self, path: &Path) -> io::Result<bool> {
        match fs::remove_file(path) {
            Ok(()) => self.sync_directory().map(|()| true),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Whole and durable, or not at all. A crash before the link leaves a file that nobody reads.
    fn ask_to_unlock(&self, reason: &str) -> io::Result<()> {
        let beside = self.unlock.with_extension(hex(&KeyId::random().0));
        let mut file = OpenOptions::new().write(true).create_new(true).open(&beside)?;
        // Another user's, root's mostly: the daemon has to read it.
        file.set_permissions(fs::Permissions::from_mode(0o644))?;
        file.write_all(reason.as_bytes())?;
        file.sync_all()?;
        let linked = fs::hard_link(&beside, &self.unlock);
        fs::remove_file(&beside)?;
        linked.and_then(|()| self.sync_directory())
    }

    fn asked_to_unlock(&self) -> io::Result<Option<Unlock>> {
        let file = match File::open(&self.unlock) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let metadata = file.metadata()?;
        let (seconds, nanos) = (u64::try_from(metadata.mtime()), u64::try_from(metadata.mtime_nsec()));
        let at =
            UnixTime(seconds.unwrap_or_default().saturating_mul(1_000_000).saturating_add(nanos.unwrap_or_default() / 1_000));
        let mut reason = Vec::new();
        file.take(REASON_BYTES_MAX).read_to_end(&mut reason)?;
        Ok(Some(Unlock { uid: metadata.uid(), at, reason: String::from_utf8_lossy(&reason).into_owned() }))
    }

    fn sync_directory(&self) -> io::Result<()> {
        File::open(&self.directory)?.sync_all()
    }
}

/// A file system that does not answer counts as there.
fn is_there(path: &Path) -> bool {
    !matches!(path.symlink_metadata(), Err(error) if error.kind() == io::ErrorKind::NotFound)
}

/// Leaves word in `state` that the caller's user wants one more login: what `keyward hsm unlock` does. Whoever holds the ledger records
/// it, and then [`unlock`]s. Returns whether a login is held back; if none is, nothing is left.
///
/// # Errors
/// `AlreadyExists` when somebody asked before and it is not recorded yet; else when `state` cannot be written.
pub fn ask_to_unlock(state: &Path, role: TokenRole, reason: &str) -> io::Result<bool> {
    let marker = Marker::new(state, role);
    if !is_there(&marker.path) {
        return Ok(false);
    }
    marker.ask_to_unlock(reason).map(|()| true)
}

/// What an operator asked for and nobody has carried out.
///
/// # Errors
/// When it cannot be read.
pub fn asked_to_unlock(state: &Path, role: TokenRole) -> io::Result<Option<Unlock>> {
    Marker::new(state, role).asked_to_unlock()
}

/// Allows one more login, once the wish is in the ledger. Returns whether one had been held back.
///
/// # Errors
/// When the files in `state` cannot be removed durably.
pub fn unlock(state: &Path, role: TokenRole) -> io::Result<bool> {
    let marker = Marker::new(state, role);
    // A crash in between leaves the wish, and no login is tried before it is recorded once more.
    let held_back = marker.clear()?;
    marker.remove(&marker.unlock)?;
    Ok(held_back)
}

/// Whether logins are held back until [`unlock`].
#[must_use]
pub fn pin_pending(state: &Path, role: TokenRole) -> bool {
    Marker::new(state, role).is_set()
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use cryptoki::types::RawAuthPin;

    use super::*;

    fn file(content: &[u8], mode: u32) -> (tempfile::TempDir, PathBuf) {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("pin");
        fs::write(&path, content).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        (directory, path)
    }

    fn bytes(pin: &RawAuthPin) -> Vec<u8> {
        use secrecy::ExposeSecret;
        pin.expose_secret().clone()
    }

    #[test]
    fn one_trailing_newline_is_cut() {
        let (_directory, path) = file(b"12 34\n\n", 0o600);
        assert_eq!(bytes(&Pin::new(PinSource::File(path)).read().unwrap()), b"12 34\n");
    }

    #[test]
    fn a_file_that_others_can_read_is_refused() {
        for mode in [0o640, 0o604, 0o620] {
            let (_directory, path) = file(b"1234", mode);
            let error = Pin::new(PinSource::File(path)).read().err().unwrap().to_string();
            assert!(error.contains("lets others read it") && !error.contains("1234"), "{error}");
        }
    }

    #[test]
    fn an_empty_or_overlong_pin_is_refused() {
        for content in [Vec::new(), b"\n".to_vec(), vec![b'1'; 257]] {
            let (_directory, path) = file(&content, 0o600);
            assert!(Pin::new(PinSource::File(path)).read().is_err());
        }
    }

    #[test]
    fn a_descriptor_is_read_once_and_good_for_a_second_login() {
        use std::os::fd::AsRawFd;
        let (reader, mut writer) = io::pipe().unwrap();
        writer.write_all(b"1234\n").unwrap();
        drop(writer);
        let pin = Pin::new(PinSource::Fd(reader.as_raw_fd()));
        assert_eq!(bytes(&pin.read().unwrap()), b"1234");
        assert_eq!(bytes(&pin.read().unwrap()), b"1234");
    }

    #[test]
    fn a_credential_is_a_name_and_not_a_path() {
        assert!(credential("../pin").is_err());
        assert!(credential("..").is_err());
    }

    #[test]
    fn the_marker_holds_until_unlocked() {
        let state = tempfile::tempdir().unwrap();
        let marker = Marker::new(state.path(), TokenRole::Agents);
        assert!(!pin_pending(state.path(), TokenRole::Agents));
        marker.set("a", "b").unwrap();
        assert!(marker.set("a", "b").is_err());
        assert!(pin_pending(state.path(), TokenRole::Agents));
        assert!(!pin_pending(state.path(), TokenRole::Authority));
        assert!(unlock(state.path(), TokenRole::Agents).unwrap());
        assert!(!unlock(state.path(), TokenRole::Agents).unwrap());
    }

    #[test]
    fn what_an_operator_asks_for_is_told_once_and_unlocks_nothing_by_itself() {
        let (state, role) = (tempfile::tempdir().unwrap(), TokenRole::Authority);
        let state = state.path();
        assert!(!ask_to_unlock(state, role, "").unwrap(), "nothing is locked");
        assert_eq!(asked_to_unlock(state, role).unwrap(), None);
        Marker::new(state, role).set("a", "b").unwrap();
        let before = UnixTime::wall().minus_seconds(1);
        assert!(ask_to_unlock(state, role, "the PIN was corrected").unwrap());
        let again = ask_to_unlock(state, role, "another").unwrap_err();
        assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
        let asked = asked_to_unlock(state, role).unwrap().unwrap();
        assert_eq!((asked.uid, asked.reason.as_str()), (rustix::process::geteuid().as_raw(), "the PIN was corrected"));
        assert!(before < asked.at && asked.at <= UnixTime::wall(), "{asked:?}");
        assert!(pin_pending(state, role) && asked_to_unlock(state, TokenRole::Agents).unwrap().is_none());
        // Not even where the login that was under way has succeeded meanwhile: it is not recorded yet.
        Marker::new(state, role).clear().unwrap();
        assert!(pin_pending(state, role));
        unlock(state, role).unwrap();
        assert!(!pin_pending(state, role));
        assert_eq!(fs::read_dir(state).unwrap().count(), 0, "nothing is left");
    }
}

//! Small files beside the ledger, replaced whole. What cannot be written is known, told, and tried again at each look at what is due.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::{Mutex, MutexGuard, PoisonError};

use super::Acts;

/// `bundle.pem`, `issuing.pem` and `ledger.vkey`.
const AUTHORITIES: &str = "authorities";
/// `issuing.csr`.
pub(super) const REQUEST: &str = "request";
/// `crl.der` and those beside it.
pub(super) const CRLS: &str = "crls";

/// Writes beside, syncs, renames over, syncs the directory: a crash leaves the old file or the new one.
pub(super) fn replace(path: &Path, bytes: &[u8], mode: u32) -> std::io::Result<()> {
    let beside = path.with_extension("new");
    let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&beside)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    std::fs::rename(&beside, path)?;
    match path.parent() {
        Some(directory) => File::open(directory)?.sync_all(),
        None => Ok(()),
    }
}

/// Replaces a file that says something else; `None`: it goes. The error names it.
pub(super) fn keep(path: &Path, bytes: Option<&[u8]>) -> std::io::Result<()> {
    let kept = match bytes {
        Some(bytes) if std::fs::read(path).is_ok_and(|there| there == bytes) => Ok(()),
        Some(bytes) => replace(path, bytes, 0o644),
        None => std::fs::remove_file(path).or_else(|error| if error.kind() == ErrorKind::NotFound { Ok(()) } else { Err(error) }),
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy();
    kept.map_err(|error| Error::new(error.kind(), format!("{name}: {error}")))
}

/// Files that do not say what is in force, by what they tell of; with which, and why.
#[derive(Default)]
pub(super) struct Behind(Mutex<BTreeMap<&'static str, String>>);

impl Behind {
    fn locked(&self) -> MutexGuard<'_, BTreeMap<&'static str, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What came of writing those of `what`. A line in the log when they fall behind, and one when they are not any more.
    pub(super) fn note(&self, what: &'static str, kept: std::io::Result<()>) {
        let mut behind = self.locked();
        match kept {
            Ok(()) if behind.remove(what).is_some() => tracing::info!(what, "files say again what is in force"),
            Ok(()) => {}
            Err(error) => {
                if behind.insert(what, error.to_string()).is_none() {
                    tracing::error!(what, %error, "files do not say what is in force; they are written again by themselves");
                }
            }
        }
    }

    fn has(&self, what: &str) -> bool {
        self.locked().contains_key(what)
    }
}

impl Acts {
    /// Files of the state directory that could not be written, each with why.
    #[must_use]
    pub fn files_behind(&self) -> Vec<String> {
        self.behind.locked().values().cloned().collect()
    }

    /// Another try at what could not be written.
    pub(super) async fn catch_up_files(&self) {
        if self.behind.has(AUTHORITIES) {
            self.write_authority_files().await;
        }
        if self.behind.has(CRLS) {
            self.keep_crls().await;
        }
    }

    /// `bundle.pem`, `issuing.pem` and `ledger.vkey` say what is in force. A crash before leaves the old ones, which the next start
    /// replaces.
    pub async fn keep_authority_files(&self) {
        let _one = self.rotating.lock().await;
        self.write_authority_files().await;
    }

    pub(super) async fn write_authority_files(&self) {
        let Ok(authorities) = self.authorities() else { return };
        let pem = |der: &[u8]| pem::encode(&pem::Pem::new("CERTIFICATE", der));
        let vkey = super::verifier_key(&self.domain, authorities.ledger_key().public().clone());
        let texts = [
            ("bundle.pem", Some(authorities.bundle().authorities.iter().map(|der| pem(der)).collect::<String>())),
            ("issuing.pem", Some(pem(authorities.issuing().certificate()))),
            ("ledger.vkey", vkey.ok().map(|vkey| format!("{vkey}\n"))),
        ];
        let state = self.state.clone();
        let write = move || {
            let kept = texts.map(|(name, text)| text.map_or(Ok(()), |text| keep(&state.join(name), Some(text.as_bytes()))));
            kept.into_iter().collect()
        };
        self.behind.note(AUTHORITIES, blocking(write).await);
    }
}

/// Work on files, beside the runtime's threads.
pub(super) async fn blocking(work: impl FnOnce() -> std::io::Result<()> + Send + 'static) -> std::io::Result<()> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(Error::other(error)))
}

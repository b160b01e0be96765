//! Disk set apart, so that a full disk leaves room for quarantines and the stop.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

/// 64 MiB.
const BYTES: u64 = 64 << 20;

pub(super) struct Reserve {
    path: PathBuf,
}

impl Reserve {
    pub(super) fn new(state: &Path) -> Self {
        Self { path: state.join("reserve") }
    }

    /// Sets the space apart, if it is not yet.
    pub(super) fn hold(&self) -> std::io::Result<()> {
        if self.path.metadata().is_ok_and(|found| found.len() == BYTES) {
            return Ok(());
        }
        let made =
            OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&self.path).and_then(|file| fill(&file));
        if made.is_err() {
            let _ = std::fs::remove_file(&self.path);
        }
        made
    }

    /// Gives the space up.
    pub(super) fn give_up(&self) {
        if let Err(error) = std::fs::remove_file(&self.path) {
            tracing::error!(%error, "the reserve could not be given up");
        }
    }
}

fn fill(file: &File) -> std::io::Result<()> {
    rustix::fs::fallocate(file, rustix::fs::FallocateFlags::empty(), 0, BYTES)?;
    file.sync_all()
}

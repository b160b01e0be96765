//! Denials in force that are not durable yet, kept on a tmpfs so that they survive the daemon (not the machine).

use std::fs::{File, OpenOptions};
use std::io::{Read, Seek, Write};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::Path;
use std::sync::Mutex;

use crate::model::AgentId;

/// Largest file that is read back.
const BYTES_MAX: u64 = 16 << 20;

pub(super) struct PendingDenials {
    file: Mutex<(File, usize)>,
}

impl PendingDenials {
    /// Opens the file, and what an earlier daemon left in it: agents and the epoch that was denied.
    pub(super) fn open(path: &Path) -> std::io::Result<(Self, Vec<(AgentId, u32)>)> {
        let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
        let mut text = String::new();
        Read::by_ref(&mut file).take(BYTES_MAX).read_to_string(&mut text)?;
        let left = text
            .lines()
            .filter_map(|line| {
                let (epoch, agent) = line.split_once(' ')?;
                Some((AgentId::parse(agent).ok()?, epoch.parse().ok()?))
            })
            .collect::<Vec<_>>();
        let count = left.len();
        Ok((Self { file: Mutex::new((file, count)) }, left))
    }

    /// Before the command is queued. A failure is logged: the denial takes force all the same.
    pub(super) fn add(&self, agent: &AgentId, epoch: u32) {
        let mut file = self.file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        file.1 += 1;
        if let Err(error) = file.0.write_all(format!("\n{epoch} {agent}\n").as_bytes()) {
            tracing::error!(%error, %agent, "a denial could not be noted in pending-denials; it is in force");
        }
    }

    /// `count` of them are durable now. When none is left the file is emptied; a crash before that leaves lines of durable
    /// quarantines, which are found to be in force at the next start.
    pub(super) fn durable(&self, count: usize) {
        let mut file = self.file.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        file.1 = file.1.saturating_sub(count);
        if file.1 == 0
            && let Err(error) = file.0.set_len(0).and_then(|()| file.0.rewind())
        {
            tracing::warn!(%error, "pending-denials could not be emptied");
        }
    }
}

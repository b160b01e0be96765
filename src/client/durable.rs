//! Files that are whole or absent after a crash.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Makes `name` in `directory` hold `bytes`, mode 0600: temporary file, fsync, rename, fsync of the directory. A crash
/// leaves the old file or the new one, and at most a temporary file that the next writing overwrites.
pub(super) fn write(directory: &Path, name: &str, bytes: &[u8]) -> io::Result<()> {
    let temporary = directory.join(format!(".{name}.new"));
    remove(&temporary)?;
    let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary, directory.join(name))?;
    sync(directory)
}

/// Makes `name` in `directory` a symbolic link to `target`, replacing whatever is there in one step.
pub(super) fn link(directory: &Path, name: &str, target: &str) -> io::Result<()> {
    let temporary = directory.join(format!(".{name}.new"));
    remove(&temporary)?;
    std::os::unix::fs::symlink(target, &temporary)?;
    fs::rename(&temporary, directory.join(name))?;
    sync(directory)
}

/// Removes a file that may be gone already.
pub(super) fn remove(path: &Path) -> io::Result<()> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Makes the names in `directory` durable.
pub(super) fn sync(directory: &Path) -> io::Result<()> {
    File::open(directory)?.sync_all()
}

//! What would be on the disk after a power cut: per file the bytes of its last sync, per directory the names of its last sync.
//!
//! Shared by the preload library, which keeps the shadow, and by the house, which seeds it and restores from it.
//! Stricter than any file system in use: a name is there only if its directory was synced after it appeared, bytes only if
//! their file was synced after they were written. (Allowed by POSIX, so the daemon may rely on nothing more.)
//! The shadow itself need not be durable: the power is cut by SIGKILL.

use std::fs::{self, File, Metadata, OpenOptions, Permissions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::UNIX_EPOCH;

/// Names a file for as long as it exists: an inode number may be used again, but not with the same birth time.
#[derive(Clone, PartialEq, Eq, Hash, Debug)]
pub struct Key(String);

impl Key {
    pub fn of(meta: &Metadata) -> Self {
        let born = meta.created().ok().and_then(|at| at.duration_since(UNIX_EPOCH).ok()).unwrap_or_default();
        Self(format!("{}-{}", meta.ino(), born.as_nanos()))
    }
}

/// The shadow directory.
pub struct Shadow(PathBuf);

impl Shadow {
    pub fn at(path: &Path) -> io::Result<Self> {
        fs::create_dir_all(path)?;
        Ok(Self(path.to_owned()))
    }

    fn file(&self, key: &Key) -> PathBuf {
        self.0.join(format!("file-{}", key.0))
    }

    fn names(&self, key: &Key) -> PathBuf {
        self.0.join(format!("names-{}", key.0))
    }

    /// A file was synced: all its bytes. Replaces the copy at once, so that a kill in the middle loses no older sync.
    pub fn keep_whole(&self, key: &Key, file: &File) -> io::Result<()> {
        let length = file.metadata()?.len();
        let to = self.0.join(format!("new-{}", key.0));
        let copy = File::create(&to)?;
        copy_range(file, &copy, 0, length, Zeroes::Holes)?;
        copy.set_len(length)?;
        fs::rename(to, self.file(key))
    }

    /// A file was synced whose copy lacks only these ranges. In place: a kill in the middle is a power cut during the sync.
    #[allow(dead_code, reason = "for the library")]
    pub fn keep_ranges(&self, key: &Key, file: &File, ranges: &[(u64, u64)]) -> io::Result<()> {
        let Ok(copy) = OpenOptions::new().write(true).open(self.file(key)) else {
            return self.keep_whole(key, file);
        };
        let length = file.metadata()?.len();
        for &(from, to) in ranges {
            copy_range(file, &copy, from, to.min(length), Zeroes::Written)?;
        }
        copy.set_len(length)
    }

    /// A directory was synced: its names. `folder` is a path through which it can be listed.
    pub fn keep_names(&self, key: &Key, folder: &Path) -> io::Result<()> {
        let mut lines = String::new();
        for entry in fs::read_dir(folder)? {
            let entry = entry?;
            // Gone since the listing: as if removed before the sync.
            let Ok(meta) = entry.metadata() else { continue };
            let kind = if meta.is_dir() {
                "dir"
            } else if meta.is_symlink() {
                "link"
            } else if meta.is_file() {
                "file"
            } else {
                continue;
            };
            let name = entry.file_name();
            let target = if meta.is_symlink() { fs::read_link(entry.path()).unwrap_or_default() } else { PathBuf::new() };
            lines +=
                &format!("{kind}\t{:o}\t{}\t{}\t{}\n", meta.mode() & 0o7777, Key::of(&meta).0, name.display(), target.display());
        }
        let to = self.0.join(format!("new-{}", key.0));
        fs::write(&to, lines)?;
        fs::rename(to, self.names(key))
    }

    /// Takes everything below `state` as synced: where a test starts.
    #[allow(dead_code, reason = "for the house")]
    pub fn keep_all(&self, state: &Path) -> io::Result<()> {
        self.keep_names(&Key::of(&fs::metadata(state)?), state)?;
        for entry in fs::read_dir(state)? {
            let path = entry?.path();
            let meta = fs::symlink_metadata(&path)?;
            if meta.is_dir() {
                self.keep_all(&path)?;
            } else if meta.is_file() {
                self.keep_whole(&Key::of(&meta), &File::open(&path)?)?;
            }
        }
        Ok(())
    }

    /// Writes what survived into `target`, an empty directory.
    #[allow(dead_code, reason = "for the house")]
    pub fn restore(&self, key: &Key, target: &Path) -> io::Result<()> {
        // A directory that was never synced has no names.
        let Ok(lines) = fs::read_to_string(self.names(key)) else { return Ok(()) };
        for line in lines.lines() {
            let [kind, mode, key, name, link] = line.splitn(5, '\t').collect::<Vec<_>>()[..] else {
                return Err(io::Error::other(format!("not a line of names: {line:?}")));
            };
            let (key, to) = (Key(key.to_owned()), target.join(name));
            let mode = u32::from_str_radix(mode, 8).map_err(io::Error::other)?;
            match kind {
                "dir" => {
                    fs::create_dir(&to)?;
                    self.restore(&key, &to)?;
                    fs::set_permissions(&to, Permissions::from_mode(mode))?;
                }
                "link" => std::os::unix::fs::symlink(link, &to)?,
                _ => {
                    let empty = OpenOptions::new().write(true).create_new(true).mode(mode).open(&to)?;
                    // A name without synced bytes is an empty file.
                    if let Ok(copy) = File::open(self.file(&key)) {
                        let length = copy.metadata()?.len();
                        copy_range(&copy, &empty, 0, length, Zeroes::Holes)?;
                        empty.set_len(length)?;
                    }
                    fs::set_permissions(&to, Permissions::from_mode(mode))?;
                }
            }
        }
        Ok(())
    }
}

/// Cuts the power: `state` becomes what `shadow` says survived. The process that wrote it is dead by now. The shadow goes:
/// the next one is seeded from what is there then.
#[allow(dead_code, reason = "for the house")]
pub fn power_cut(state: &Path, shadow: &Path) -> io::Result<()> {
    let meta = fs::metadata(state)?;
    let survivors = state.with_extension("survivors");
    fs::create_dir(&survivors)?;
    Shadow::at(shadow)?.restore(&Key::of(&meta), &survivors)?;
    fs::set_permissions(&survivors, meta.permissions())?;
    fs::remove_dir_all(state)?;
    fs::rename(&survivors, state)?;
    fs::remove_dir_all(shadow)
}

/// What becomes of blocks that hold nothing but zeroes.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Zeroes {
    Written,
    /// Left out of a new file: space that was only set aside costs nothing.
    Holes,
}

fn copy_range(from: &File, to: &File, mut at: u64, end: u64, zeroes: Zeroes) -> io::Result<()> {
    let mut buffer = vec![0; 64 * 1024];
    while at < end {
        let want = usize::try_from(end - at).unwrap_or(buffer.len()).min(buffer.len());
        let got = from.read_at(&mut buffer[..want], at)?;
        if got == 0 {
            break;
        }
        if zeroes == Zeroes::Written || buffer[..got].iter().any(|byte| *byte != 0) {
            to.write_all_at(&buffer[..got], at)?;
        }
        at += got as u64;
    }
    Ok(())
}

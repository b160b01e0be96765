//! The instruments: the fault module and the preload library (tests/shim, tests/preload).

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

#[path = "../../preload/shadow.rs"]
mod shadow;

/// The PKCS#11 module that counts and fails as it is told.
pub fn shim() -> PathBuf {
    example("libp11shim.so")
}

/// Examples are built beside the binaries.
fn example(name: &str) -> PathBuf {
    let built = Path::new(env!("CARGO_BIN_EXE_keyward")).with_file_name("examples").join(name);
    assert!(built.exists(), "{} is missing: cargo build --examples, with the profile of the tests", built.display());
    built
}

/// The library for LD_PRELOAD.
pub fn preload_library() -> PathBuf {
    example("libpreload.so")
}

/// Puts the preload library under a command.
pub fn preload(command: &mut Command, state: &Path, shadow: &Path, control: &Path) {
    command
        .env("LD_PRELOAD", preload_library())
        .env("KEYWARD_PRELOAD_STATE", canonical(state))
        .env("KEYWARD_PRELOAD_SHADOW", shadow)
        .env("KEYWARD_PRELOAD_CONTROL", control);
}

/// The path by which the kernel names it, also before it exists.
fn canonical(path: &Path) -> PathBuf {
    fs::canonicalize(path.parent().unwrap()).unwrap().join(path.file_name().unwrap())
}

/// Takes the state directory as durable, unless a shadow is kept already.
pub fn seed(state: &Path, shadow: &Path) {
    if state.exists() && !shadow.exists() {
        shadow::Shadow::at(shadow).unwrap().keep_all(&canonical(state)).unwrap();
    }
}

/// See [`shadow::power_cut`].
pub fn power_cut(state: &Path, shadow: &Path) {
    shadow::power_cut(&canonical(state), shadow).unwrap();
}

/// The preload library's control file, replaced as a whole by each call.
pub struct Control(PathBuf);

impl Control {
    pub fn of(path: &Path) -> Self {
        Self(path.to_owned())
    }

    /// Everything works again.
    pub fn clear(&self) {
        self.set("");
    }

    /// The next sync of a state file fails.
    pub fn fail_next_sync(&self) {
        self.set("fsync=EIO\n");
    }

    /// No state file can grow.
    pub fn fill_disk(&self) {
        self.set("write=ENOSPC\n");
    }

    /// The wall clock is off by so much.
    pub fn move_clock(&self, offset_ms: i64) {
        self.set(&format!("realtime_offset_ms={offset_ms}\n"));
    }

    /// The process kills itself just before its N-th sync from now.
    pub fn kill_before_sync(&self, count: u64) {
        self.set(&format!("kill_before_sync={count}\n"));
    }

    /// The process kills itself just after its N-th sync from now.
    pub fn kill_after_sync(&self, count: u64) {
        self.set(&format!("kill_after_sync={count}\n"));
    }

    /// Both at once.
    pub fn move_clock_and_kill_after_sync(&self, offset_ms: i64, count: u64) {
        self.set(&format!("realtime_offset_ms={offset_ms}\nkill_after_sync={count}\n"));
    }

    fn set(&self, text: &str) {
        let new = self.0.with_extension("new");
        fs::write(&new, text).unwrap();
        fs::rename(new, &self.0).unwrap();
    }
}

/// The shim's log.
#[derive(Debug, Default)]
pub struct Signatures {
    /// Calls of C_Login, whatever came of them.
    pub logins: usize,
    /// (CKA_ID, signed data) in hex, and how often each was signed.
    pub made: BTreeMap<(String, String), usize>,
}

impl Signatures {
    /// As far as the log has come.
    pub fn read(log: &Path) -> Self {
        let mut read = Self::default();
        for line in fs::read_to_string(log).unwrap_or_default().lines() {
            match line.split_once(' ') {
                Some((key, data)) => *read.made.entry((key.to_owned(), data.to_owned())).or_default() += 1,
                None if line == "login" => read.logins += 1,
                None => panic!("not a line of the shim: {line:?}"),
            }
        }
        read
    }

    /// How many signatures in all.
    pub fn count(&self) -> usize {
        self.made.values().sum()
    }

    /// How often `digest` was signed, with any key.
    pub fn of_digest(&self, digest: &[u8]) -> usize {
        let hex: String = digest.iter().map(|byte| format!("{byte:02x}")).collect();
        self.made.iter().filter(|((_, data), _)| *data == hex).map(|(_, count)| count).sum()
    }
}

//! What the fault module (tests/shim) is told while a process uses it.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// Longest wait for an answer: longer than the module's own wait for a parked call.
const DEADLINE: Duration = Duration::from_secs(40);
/// Longest wait for the socket of a process that has just been started.
const START: Duration = Duration::from_secs(10);

/// A process's fault module.
pub struct Shim(PathBuf);

impl Shim {
    /// The one that listens at this path (`KEYWARD_SHIM_SOCKET`).
    pub fn at(socket: &Path) -> Self {
        Self(socket.to_owned())
    }

    /// Carries out one command (see tests/shim/control.rs); what it answers after `ok`.
    #[track_caller]
    pub fn tell(&self, command: &str) -> String {
        self.ask(command).unwrap_or_else(|why| panic!("{command}: {why}"))
    }

    /// The same, with what it answers after `error`.
    #[track_caller]
    pub fn ask(&self, command: &str) -> Result<String, String> {
        let mut stream = self.connect();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        stream.write_all(format!("{command}\n").as_bytes()).unwrap();
        let mut line = String::new();
        BufReader::new(stream).read_line(&mut line).unwrap_or_else(|error| panic!("{command}: {error}"));
        match line.trim_end().split_once(' ').unwrap_or((line.trim_end(), "")) {
            ("ok", text) => Ok(text.to_owned()),
            ("error", why) => Err(why.to_owned()),
            _ => panic!("{command}: no answer but {line:?}"),
        }
    }

    /// A command that answers a number: `faults`, `sessions`, `hanging`.
    #[track_caller]
    pub fn number(&self, command: &str) -> u64 {
        self.tell(command).parse().unwrap()
    }

    /// How often a function was called since the module was loaded.
    #[track_caller]
    pub fn calls(&self, function: &str) -> u64 {
        let counts = self.tell("counts");
        let count = counts.split(' ').find_map(|word| word.strip_prefix(function)?.strip_prefix('='));
        count.map_or(0, |count| count.parse().unwrap())
    }

    /// The module is loaded some time after the process starts, and nothing else tells of it.
    #[track_caller]
    fn connect(&self) -> UnixStream {
        let until = Instant::now() + START;
        loop {
            match UnixStream::connect(&self.0) {
                Ok(stream) => return stream,
                Err(error) => assert!(Instant::now() < until, "{}: {error}", self.0.display()),
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

//! What a command said, and what is expected of it.

use std::io::Write as _;
use std::process::{Command, Stdio};

/// Exit code, standard output, standard error.
#[derive(Debug)]
pub struct Output {
    what: String,
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
}

/// Runs a command to its end.
pub fn run(command: &mut Command) -> Output {
    run_given(command, &[])
}

/// Runs a command with `input` on its standard input.
pub fn run_given(command: &mut Command, input: &[u8]) -> Output {
    let what = format!("{} {:?}", command.get_program().display(), command.get_args().collect::<Vec<_>>());
    if !input.is_empty() {
        command.stdin(Stdio::piped());
    }
    let mut child =
        command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap_or_else(|error| panic!("{what}: {error}"));
    if let Some(mut stdin) = child.stdin.take() {
        // A command that does not read its input is judged by what it says.
        let _ = stdin.write_all(input);
    }
    let done = child.wait_with_output().unwrap();
    Output {
        what,
        code: done.status.code().unwrap_or(-1),
        stdout: String::from_utf8_lossy(&done.stdout).into_owned(),
        stderr: String::from_utf8_lossy(&done.stderr).into_owned(),
    }
}

impl Output {
    /// It must have succeeded.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.exits(0)
    }

    /// It must have ended with this code.
    #[track_caller]
    pub fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{}\n--- stdout\n{}\n--- stderr\n{}", self.what, self.stdout, self.stderr);
        self
    }

    /// It must have been refused (exit code 3) with this reason code.
    #[track_caller]
    pub fn refused(self, reason: &str) -> Self {
        self.exits(3).says(reason)
    }

    /// It must have found the daemon, the ledger or the token unavailable (exit code 5), with this reason code.
    #[track_caller]
    pub fn unavailable(self, reason: &str) -> Self {
        self.exits(5).says(reason)
    }

    /// Standard error must hold this.
    #[track_caller]
    pub fn says(self, text: &str) -> Self {
        assert!(self.stderr.contains(text), "{}: {text:?} is not in\n{}", self.what, self.stderr);
        self
    }

    /// Standard output as JSON.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|error| panic!("{}: {error} in\n{}", self.what, self.stdout))
    }
}

//! `keyward hsm`: the tokens, and the lock against burning PIN tries.

use clap::{Subcommand, ValueEnum};
use serde::Serialize;

use super::render::pairs;
use super::{Failure, Global, Output, status};
use crate::proto::{TokenRole, TokenStatus};

/// The verbs.
#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Show the tokens: usable or why not, queues, mechanisms, what is switched off.
    #[command(after_help = "Example:\n  keyward hsm status --format json")]
    Status,
    /// Let the daemon log in again after a failed login. Check the PIN first: the next try counts.
    ///
    /// The daemon tries no login while pin-pending-authority or pin-pending-agents lies in its state directory, so that a
    /// wrong PIN costs one try and not all of them. This removes the file; it works with the daemon down.
    #[command(after_help = "Example:\n  keyward hsm unlock --token authority")]
    Unlock {
        /// Which token.
        #[arg(long, value_enum, default_value = "all")]
        token: Which,
    },
}

/// Which of the two configured tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Which {
    /// Root, issuing, ledger and canary keys.
    Authority,
    /// Agents' keys.
    Agents,
    /// Both.
    All,
}

/// One token, as JSON has it.
#[derive(Serialize)]
pub(super) struct Token {
    role: &'static str,
    module: String,
    label: String,
    serial: String,
    usable: bool,
    fault: Option<String>,
    lanes: u32,
    queued: u32,
    signatures: u64,
    reconnects: u64,
    pin_pending: bool,
    mechanisms: Vec<String>,
    off: Vec<String>,
}

pub(super) async fn run(verb: Verb, global: &Global, output: &mut Output) -> Result<(), Failure> {
    match verb {
        Verb::Status => {
            let tokens: Vec<_> = status::ask(global).await?.tokens.into_iter().map(Token::from).collect();
            Ok(output.show(&tokens, |tokens| tokens.iter().map(Token::text).collect::<Vec<_>>().join("\n"))?)
        }
        Verb::Unlock { token } => unlock(token, global, output),
    }
}

#[derive(Serialize)]
struct Unlocked {
    unlocked: Vec<&'static str>,
}

fn unlock(which: Which, global: &Global, output: &mut Output) -> Result<(), Failure> {
    let state = global.load()?.paths.state;
    let mut unlocked = Vec::new();
    for (name, token) in [("authority", Which::Authority), ("agents", Which::Agents)] {
        if which != Which::All && which != token {
            continue;
        }
        let marker = state.join(format!("pin-pending-{name}"));
        match std::fs::remove_file(&marker) {
            Ok(()) => unlocked.push(name),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
            Err(error) => return Err(Failure::error(format!("{}: {error}", marker.display()))),
        }
    }
    // Durable, or a crash would bring the lock back after the PIN was put right.
    std::fs::File::open(&state).and_then(|directory| directory.sync_all())?;
    output.say(if unlocked.is_empty() { "no login was locked" } else { "the daemon may log in again" });
    Ok(output.show(&Unlocked { unlocked }, |unlocked| unlocked.unlocked.iter().map(|name| format!("{name}\n")).collect())?)
}

impl From<TokenStatus> for Token {
    fn from(token: TokenStatus) -> Self {
        Self {
            role: match token.role() {
                TokenRole::Authority => "authority",
                TokenRole::Agents => "agents",
                TokenRole::Unspecified => "unknown",
            },
            module: token.module,
            label: token.label,
            serial: token.serial,
            usable: token.usable,
            fault: (!token.fault.is_empty()).then_some(token.fault),
            lanes: token.lanes,
            queued: token.queued,
            signatures: token.signatures,
            reconnects: token.reconnects,
            pin_pending: token.pin_pending,
            mechanisms: token.mechanisms,
            off: token.off,
        }
    }
}

impl Token {
    pub(super) fn text(&self) -> String {
        // A token that was never reached has not told its serial.
        let serial = if self.serial.is_empty() { "-" } else { &self.serial };
        let mut lines = vec![
            ("token", format!("{} ({}, serial {})", self.role, self.label, serial)),
            ("module", self.module.clone()),
            ("usable", if self.usable { "yes" } else { "NO" }.into()),
        ];
        lines.extend(self.fault.iter().map(|fault| ("newest fault", fault.clone())));
        if self.pin_pending {
            lines.push(("login", "locked after a failed one: check the PIN, then `keyward hsm unlock`".into()));
        }
        lines.push(("lanes", format!("{}, {} queued", self.lanes, self.queued)));
        lines.push(("signatures", format!("{}, {} reconnects", self.signatures, self.reconnects)));
        if !self.off.is_empty() {
            lines.push(("switched off", self.off.join(", ")));
        }
        pairs(&lines)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cli::Format;

    #[test]
    fn unlock_removes_the_marker_of_the_named_token_and_needs_no_daemon() {
        let directory = tempfile::tempdir().expect("a directory");
        let state = directory.path().join("state");
        std::fs::create_dir(&state).expect("made");
        let markers = ["authority", "agents"].map(|name| state.join(format!("pin-pending-{name}")));
        for marker in &markers {
            std::fs::write(marker, "").expect("written");
        }
        let config = include_str!("../../scripts/keyward.toml").replace("/var/lib/keyward", &state.display().to_string());
        let path = directory.path().join("keyward.toml");
        std::fs::write(&path, config).expect("written");
        let global = Global { config: path, socket: None, format: Format::Json };
        let mut output = Output::of_process(Format::Json);
        unlock(Which::Authority, &global, &mut output).expect("unlocked");
        assert!(!markers[0].exists() && markers[1].exists());
        unlock(Which::All, &global, &mut output).expect("unlocked");
        assert!(!markers[1].exists());
        unlock(Which::All, &global, &mut output).expect("harmless");
    }
}

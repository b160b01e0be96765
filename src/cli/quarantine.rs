//! `keyward quarantine`: take everything back from an agent, and give it another chance.

use std::path::PathBuf;
use std::time::Duration;

use clap::Subcommand;
use serde::Serialize;
use tokio::time::{Instant, sleep_until};

use super::agents::{Certificate, Daemon, JoinPlace, Shown, agents_table, certificates_table, list, show};
use super::render::pairs;
use super::{Failure, Global, Output, duration};
use crate::client::Error;
use crate::model::{AgentId, Reason};
use crate::proto::{AgentState, QuarantineRequest, QuarantineResponse, ReleaseRequest};

/// How long a quarantine that is in force but not durable is repeated.
const REPEAT_FOR: Duration = Duration::from_secs(30);
const REPEAT_EVERY: Duration = Duration::from_millis(500);

/// The verbs.
#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Deny an agent everything, at once: its certificates are revoked, its renewals and tokens refused.
    #[command(after_help = "Example:\n  keyward quarantine apply coder/7 --reason 'exfiltration, case 1234' --yes")]
    Apply {
        /// <class>/<instance>
        #[arg(value_parser = AgentId::parse)]
        agent: AgentId,
        /// Why; kept in the ledger, at most 256 characters.
        #[arg(long, value_parser = reason)]
        reason: String,
        /// Do it without showing what it affects and asking first.
        #[arg(long)]
        yes: bool,
    },
    /// List the quarantined agents.
    #[command(after_help = "Example:\n  keyward quarantine list --format json")]
    List,
    /// Lift a quarantine: the agent must attest anew, with a new key and the join file this writes. Old certificates stay denied.
    #[command(after_help = "Example:\n  keyward quarantine release coder/7 --reason 'false alarm' --out coder-7.join --yes")]
    Release {
        /// <class>/<instance>
        #[arg(value_parser = AgentId::parse)]
        agent: AgentId,
        /// Why; kept in the ledger, at most 256 characters.
        #[arg(long, value_parser = reason)]
        reason: String,
        /// How long the join file is good for [default: as configured].
        #[arg(long, value_parser = duration::seconds, value_name = "DURATION")]
        token_ttl: Option<u32>,
        /// Where the join file goes: a new file (mode 0600), or - for standard output.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
        /// Do it without showing what it affects and asking first.
        #[arg(long)]
        yes: bool,
    },
}

/// A reason that the ledger takes; a clap value parser.
pub(super) fn reason(text: &str) -> Result<String, String> {
    let size = text.trim().chars().count();
    if (1..=256).contains(&size) { Ok(text.trim().to_owned()) } else { Err("say why in 1 to 256 characters".into()) }
}

pub(super) async fn run(verb: Verb, global: &Global, output: &mut Output) -> Result<(), Failure> {
    match verb {
        Verb::Apply { agent, reason, yes } => {
            let mut daemon = Daemon::connect(global).await?;
            if !yes {
                let consequence = "Its certificates are revoked, its keys sign and verify no more, and it gets none.";
                confirm(&show(&mut daemon, &agent).await?, &format!("Quarantine {agent}? {consequence}"), output)?;
            }
            let answer = apply(&mut daemon, &agent, &reason, output).await?;
            let applied = Applied {
                agent: agent.to_string(),
                ledger_index: answer.ledger_index,
                epoch_denied: answer.epoch_denied,
                already: answer.already,
                denied: answer.denied.iter().map(Certificate::from).collect(),
            };
            Ok(output.show(&applied, Applied::text)?)
        }
        Verb::List => {
            let agents = list(&mut Daemon::connect(global).await?, Some(AgentState::Quarantined)).await?;
            Ok(output.show(&agents, |agents| agents_table(agents))?)
        }
        Verb::Release { agent, reason, token_ttl, out, yes } => {
            let mut daemon = Daemon::connect(global).await?;
            if !yes {
                let consequence = "It may attest again with the join file.";
                confirm(&show(&mut daemon, &agent).await?, &format!("Release {agent}? {consequence}"), output)?;
            }
            let mut place = JoinPlace::open(&out)?;
            let request = ReleaseRequest { agent: agent.to_string(), reason, token_ttl_seconds: token_ttl.unwrap_or(0) };
            let answer = daemon.service.release(request).await.map_err(|status| daemon.failed(&status))?.into_inner();
            place.take(answer.join, answer.ledger_index, &format!("released into epoch {}", answer.epoch), output)
        }
    }
}

fn confirm(affected: &Shown, question: &str, output: &mut Output) -> Result<(), Failure> {
    output.say(&affected.text());
    if output.confirms(question) {
        Ok(())
    } else {
        Err(Failure::usage("nothing was done; add --yes to do it without being asked"))
    }
}

/// Repeats while the daemon says that the denial is in force but not durable; that is harmless, and stopping would leave it
/// to the daemon's pending denials alone.
async fn apply(daemon: &mut Daemon, agent: &AgentId, reason: &str, output: &mut Output) -> Result<QuarantineResponse, Failure> {
    let until = Instant::now() + REPEAT_FOR;
    let mut told = false;
    loop {
        let request = QuarantineRequest { agent: agent.to_string(), reason: reason.to_owned() };
        let error = match daemon.service.quarantine(request).await {
            Ok(answer) => return Ok(answer.into_inner()),
            Err(status) => daemon.failed(&status),
        };
        let Some(refused) = error.refused().filter(|refused| refused.reason == Reason::EnforcedNotDurable) else {
            return Err(error.into());
        };
        let again = Instant::now() + refused.retry_after.unwrap_or(REPEAT_EVERY).clamp(REPEAT_EVERY, REPEAT_FOR);
        if again > until {
            return Err(Failure::from(Error::Refused(refused.clone())));
        }
        if !told {
            output.say(&format!("{agent} is denied from now on, but that is not durable yet; repeating"));
            told = true;
        }
        sleep_until(again).await;
    }
}

#[derive(Serialize)]
struct Applied {
    agent: String,
    ledger_index: u64,
    epoch_denied: u32,
    already: bool,
    denied: Vec<Certificate>,
}

impl Applied {
    fn text(&self) -> String {
        let state = if self.already { "quarantined already" } else { "quarantined" };
        let mut text = pairs(&[
            ("agent", self.agent.clone()),
            ("state", state.into()),
            ("ledger entry", self.ledger_index.to_string()),
            ("denied up to epoch", self.epoch_denied.to_string()),
            ("certificates denied", self.denied.len().to_string()),
        ]);
        if !self.denied.is_empty() {
            text.push('\n');
            text.push_str(&certificates_table(&self.denied));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reason_says_something_and_not_too_much() {
        assert_eq!(reason("  why ").as_deref(), Ok("why"));
        assert!(reason("  ").is_err());
        assert!(reason(&"ä".repeat(256)).is_ok() && reason(&"ä".repeat(257)).is_err());
    }
}

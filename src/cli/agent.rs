//! `keyward agent`: what runs beside an agent.

use std::ffi::OsString;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Subcommand;
use serde::Serialize;

use super::agent_run::{self, Reaction};
use super::render::{pairs, time};
use super::{Failure, Output, duration};
use crate::client::store::Card;
use crate::client::{AgentDir, Client, JoinFile};
use crate::model::UnixTime;

/// The verbs.
#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// First contact: turn a join file into a certificate.
    #[command(after_help = "Example:\n  keyward agent attest --join coder-7.join --out /run/coder")]
    Attest {
        /// The join file (mode 0600), or - for standard input.
        #[arg(long, value_name = "FILE")]
        join: PathBuf,
        /// Directory for the credentials, made with mode 0700. svid.pem, key.pem and bundle.pem appear in it.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Wished lifetime [default: what the enrolment grants].
        #[arg(long, value_parser = duration::seconds, value_name = "DURATION")]
        ttl: Option<u32>,
    },
    /// Get the next certificate; comes back with the bound key where the last one has expired.
    #[command(after_help = "Example:\n  keyward agent renew --out /run/coder")]
    Renew {
        /// Directory of the credentials.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// Wished lifetime [default: what the enrolment grants].
        #[arg(long, value_parser = duration::seconds, value_name = "DURATION")]
        ttl: Option<u32>,
    },
    /// Run a command with credentials that are kept fresh; kill it when the agent is quarantined.
    ///
    /// The command finds the paths of its files in KEYWARD_SVID, KEYWARD_KEY and KEYWARD_BUNDLE. It runs in a process group
    /// of its own, which ends with it. Told to restart, it has ten seconds. Its exit code is passed on; 3 tells of a quarantine. The bundle is followed as
    /// it changes, so that a new authority is known before it signs, and a quarantine is heard of at once.
    #[command(
        after_help = "Example:\n  keyward agent run --join coder-7.join --out /run/coder --on-renew signal:HUP --on-bundle restart -- ./coder --serve"
    )]
    Run {
        /// Directory of the credentials.
        #[arg(long, value_name = "DIR")]
        out: PathBuf,
        /// The join file, for when there are no credentials yet.
        #[arg(long, value_name = "FILE")]
        join: Option<PathBuf>,
        /// Wished lifetime [default: what the enrolment grants].
        #[arg(long, value_parser = duration::seconds, value_name = "DURATION")]
        ttl: Option<u32>,
        /// What to do with the command after a renewal: signal:HUP, signal:USR1 or signal:USR2 (sent to its whole process
        /// group), restart or none.
        #[arg(long, value_parser = Reaction::parse, default_value = "none", value_name = "ACTION")]
        on_renew: Reaction,
        /// What to do with the command when the bundle has changed: as above [default: as after a renewal].
        #[arg(long, value_parser = Reaction::parse, value_name = "ACTION")]
        on_bundle: Option<Reaction>,
        /// The command and its arguments.
        #[arg(last = true, required = true, value_name = "COMMAND")]
        command: Vec<OsString>,
    },
}

pub(super) async fn run(verb: Verb, output: &mut Output) -> Result<ExitCode, Failure> {
    match verb {
        Verb::Attest { join, out, ttl } => {
            let join = JoinFile::read(&join)?;
            let client = Client::new(AgentDir::open(&out, true)?);
            let card = client.attest(&join, ttl.unwrap_or(0)).await?;
            show(&card, &out, output)
        }
        Verb::Renew { out, ttl } => {
            let card = refresh(&out, ttl.unwrap_or(0)).await?;
            show(&card, &out, output)
        }
        Verb::Run { out, join, ttl, on_renew, on_bundle, command } => {
            agent_run::Supervisor::new(out, join, ttl.unwrap_or(0), (on_renew, on_bundle), command)?.run(output).await
        }
    }
}

/// Renews, or rejoins where the certificate does not count any more. The directory is locked for as long as it takes.
pub(super) async fn refresh(out: &Path, ttl_seconds: u32) -> Result<Card, crate::client::Error> {
    let dir = AgentDir::open(out, false)?;
    let holding = dir.holding()?;
    let client = Client::new(dir);
    if holding.card.is_expired(UnixTime::wall()) || !holding.ends_in_the_bundle() {
        return client.rejoin(ttl_seconds).await;
    }
    match client.renew(ttl_seconds).await {
        Err(error) if error.is_of_the_certificate() => client.rejoin(ttl_seconds).await,
        renewed => renewed,
    }
}

#[derive(Serialize)]
struct Credentials<'a> {
    agent: &'a str,
    spiffe_id: &'a str,
    epoch: u32,
    next_sequence: u64,
    ledger_index: u64,
    not_after: String,
    directory: String,
}

fn show(card: &Card, out: &Path, output: &mut Output) -> Result<ExitCode, Failure> {
    let credentials = Credentials {
        agent: &card.agent,
        spiffe_id: &card.spiffe_id,
        epoch: card.epoch,
        next_sequence: card.next_sequence,
        ledger_index: card.ledger_index,
        not_after: time(card.not_after_unix_seconds),
        directory: out.display().to_string(),
    };
    output.show(&credentials, |credentials| {
        pairs(&[
            ("SPIFFE ID", credentials.spiffe_id.to_owned()),
            ("epoch", credentials.epoch.to_string()),
            ("not after", credentials.not_after.clone()),
            ("ledger entry", credentials.ledger_index.to_string()),
            ("directory", credentials.directory.clone()),
        ])
    })?;
    Ok(ExitCode::SUCCESS)
}

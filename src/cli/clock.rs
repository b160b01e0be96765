//! `keyward clock`: tell the daemon that the wall clock is right.

use clap::Subcommand;
use serde::Serialize;

use super::agents::Daemon;
use super::render::pairs;
use super::{Failure, Global, Output, quarantine};
use crate::proto::AcceptClockRequest;

/// The verbs.
#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Take the wall clock as the truth; issuing goes on. Recorded with its deviation.
    #[command(after_help = "Example:\n  keyward clock accept --reason 'NTP stepped after the power cut'")]
    Accept {
        /// Why; kept in the ledger, at most 256 characters.
        #[arg(long, value_parser = quarantine::reason)]
        reason: String,
    },
}

#[derive(Serialize)]
struct Accepted {
    ledger_index: u64,
    deviation_micros: i64,
}

pub(super) async fn run(verb: Verb, global: &Global, output: &mut Output) -> Result<(), Failure> {
    let Verb::Accept { reason } = verb;
    let mut daemon = Daemon::connect(global).await?;
    let request = AcceptClockRequest { reason };
    let answer = daemon.service.accept_clock(request).await.map_err(|status| daemon.failed(&status))?.into_inner();
    let accepted = Accepted { ledger_index: answer.ledger_index, deviation_micros: answer.deviation_micros };
    Ok(output.show(&accepted, |accepted| {
        pairs(&[
            ("ledger entry", accepted.ledger_index.to_string()),
            ("deviation accepted", format!("{} ms", accepted.deviation_micros / 1_000)),
        ])
    })?)
}

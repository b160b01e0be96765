//! `keyward ledger`: read the book, and its checkpoint.

use std::io::{self, IsTerminal};

use clap::Subcommand;
use prost::Message;
use serde::Serialize;

use super::agents::Daemon;
use super::describe::Described;
use super::render::{Format, pad};
use super::{EXIT_NOT_FOUND, Failure, Global, Output, ledger_verify};
use crate::proto::{Entry, GetCheckpointRequest, ListEntriesRequest, ListEntriesResponse};

/// Entries asked for at once.
const PAGE_ENTRIES: u32 = 1_000;

/// The verbs.
#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// List entries, oldest first.
    #[command(
        after_help = "Examples:\n  keyward ledger list --newest 20\n  keyward ledger list --from 1000 --limit 500 --format json"
    )]
    List {
        /// First index.
        #[arg(long, value_name = "INDEX", default_value = "0", conflicts_with = "newest")]
        from: u64,
        /// How many at most [default: all].
        #[arg(long, value_name = "COUNT", conflicts_with = "newest")]
        limit: Option<u64>,
        /// The newest ones only.
        #[arg(long, value_name = "COUNT")]
        newest: Option<u64>,
    },
    /// Show one entry whole.
    #[command(after_help = "Example:\n  keyward ledger show 42")]
    Show {
        /// Its index.
        index: u64,
    },
    /// Print the newest checkpoint, a C2SP signed note; keep it somewhere else.
    #[command(
        after_help = "Examples:\n  keyward ledger checkpoint >> /mnt/elsewhere/checkpoints\n  keyward ledger checkpoint --vkey"
    )]
    Checkpoint {
        /// Print the verifier key instead.
        #[arg(long)]
        vkey: bool,
    },
    /// Verify a copy of the ledger offline: tree, checkpoints, and every promise that can be read off it. Exits 6 if it fails.
    #[command(
        after_help = "Example:\n  keyward ledger verify copy.db --key ledger.vkey --checkpoint /mnt/elsewhere/checkpoints --signatures\n\nA copy of a running daemon's ledger is made with\n  sqlite3 keyward.db \"VACUUM INTO 'copy.db'\"\nWhat `cp` makes of one lacks what is in keyward.db-wal still."
    )]
    Verify(ledger_verify::Against),
}

#[derive(Serialize)]
struct Checkpoint {
    note: String,
    vkey: String,
}

pub(super) async fn run(verb: Verb, global: &Global, output: &mut Output) -> Result<(), Failure> {
    if let Verb::Verify(against) = &verb {
        return ledger_verify::run(against, output);
    }
    let mut daemon = Daemon::connect(global).await?;
    match verb {
        Verb::Verify(_) => Ok(()),
        Verb::List { from, limit, newest } => {
            let from = match newest {
                Some(newest) => page(&mut daemon, 0, 1).await?.size.saturating_sub(newest),
                None => from,
            };
            list(&mut daemon, from, limit.unwrap_or(u64::MAX), output).await
        }
        Verb::Show { index } => {
            let entries = decode(&page(&mut daemon, index, 1).await?)?;
            let entry = entries.first().filter(|entry| entry.index == index);
            let entry = entry.ok_or_else(|| Failure::new(EXIT_NOT_FOUND, format!("there is no entry {index}")))?;
            Ok(output.show(&Described::of(entry), Described::text)?)
        }
        Verb::Checkpoint { vkey } => {
            let answer = daemon.service.get_checkpoint(GetCheckpointRequest {}).await;
            let answer = answer.map_err(|status| daemon.failed(&status))?.into_inner();
            if answer.note.is_empty() && !vkey {
                return Err(Failure::new(EXIT_NOT_FOUND, "there is no checkpoint yet"));
            }
            let checkpoint = Checkpoint { note: answer.note, vkey: answer.vkey };
            Ok(output.show(&checkpoint, |checkpoint| {
                // The note's bytes are signed: nothing is added to them.
                if vkey { format!("{}\n", checkpoint.vkey) } else { checkpoint.note.clone() }
            })?)
        }
    }
}

async fn page(daemon: &mut Daemon, from: u64, limit: u32) -> Result<ListEntriesResponse, Failure> {
    let answer = daemon.service.list_entries(ListEntriesRequest { from, limit }).await;
    Ok(answer.map_err(|status| daemon.failed(&status))?.into_inner())
}

fn decode(page: &ListEntriesResponse) -> Result<Vec<Entry>, Failure> {
    let decoded = page.entries.iter().map(|bytes| Entry::decode(bytes.as_slice()));
    decoded.collect::<Result<_, _>>().map_err(|error| Failure::error(format!("an entry does not parse: {error}")))
}

/// Page by page: a ledger is larger than memory. JSON is one array all the same.
async fn list(daemon: &mut Daemon, mut from: u64, limit: u64, output: &mut Output) -> Result<(), Failure> {
    let until = from.saturating_add(limit);
    let json = output.format() == Format::Json;
    output.raw(if json { "[".into() } else { line(["INDEX", "TIME", "KIND", "DETAIL"]) }.as_bytes())?;
    let mut separator = "\n";
    while from < until {
        let entries = decode(&page(daemon, from, u32::try_from(until - from).unwrap_or(u32::MAX).min(PAGE_ENTRIES)).await?)?;
        let Some(last) = entries.last() else { break };
        from = last.index.saturating_add(1);
        let mut text = String::new();
        for described in entries.iter().map(Described::of) {
            if json {
                text.push_str(separator);
                text.push_str(&serde_json::to_string(&described).map_err(std::io::Error::from)?);
                separator = ",\n";
            } else {
                text.push_str(&line([&described.index.to_string(), &described.time, described.kind, &described.summary()]));
            }
        }
        output.raw(text.as_bytes())?;
    }
    if json {
        output.raw(b"\n]\n")?;
    }
    Ok(())
}

/// One line of the list.
fn line(cells: [&str; 4]) -> String {
    laid_out(cells, io::stdout().is_terminal())
}

/// The widths are fixed, for what comes later is not known yet. At a terminal the last cell is cut to it, and no other ever.
fn laid_out(cells: [&str; 4], at_terminal: bool) -> String {
    let detail = if at_terminal { 100 - 8 - 20 - 22 - 6 } else { usize::MAX };
    let cells = cells.iter().zip([(8, usize::MAX), (20, usize::MAX), (22, usize::MAX), (0, detail)]);
    let cells = cells.map(|(cell, (least, most))| pad(cell, cell.chars().count().clamp(least, most)));
    format!("{}\n", cells.collect::<Vec<_>>().join("  ").trim_end())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn at_a_terminal_the_detail_alone_is_cut() {
        let (kind, detail) = ("agent_key_object_ended", "x".repeat(200));
        let cells = ["123456789", "2027-01-15T08:00:00Z", kind, &detail];
        assert!(laid_out(cells, false).ends_with(&format!("  {kind}  {detail}\n")));
        let cut = laid_out(cells, true);
        assert!(
            cut.starts_with("123456789  2027-01-15T08:00:00Z  agent_key_object_ended  xxx") && cut.ends_with("x…\n"),
            "{cut}"
        );
    }
}

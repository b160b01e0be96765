//! `keyward ledger`: read the book, and its checkpoint.

use clap::Subcommand;
use prost::Message;
use serde::Serialize;

use super::agents::Daemon;
use super::describe::Described;
use super::render::table;
use super::{EXIT_NOT_FOUND, Failure, Global, Output, ledger_verify};
use crate::proto::{Entry, GetCheckpointRequest, ListEntriesRequest, ListEntriesResponse};

/// The verbs.
#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// List entries, oldest first; by default the newest 50.
    #[command(after_help = "Examples:\n  keyward ledger list\n  keyward ledger list --from 0 --limit 1000 --format json")]
    List {
        /// First index.
        #[arg(long, value_name = "INDEX")]
        from: Option<u64>,
        /// How many, at most 1000.
        #[arg(long, default_value = "50", value_parser = clap::value_parser!(u32).range(1..=1000))]
        limit: u32,
    },
    /// Show one entry whole.
    #[command(after_help = "Example:\n  keyward ledger show 42")]
    Show {
        /// Its index.
        index: u64,
    },
    /// Print the newest checkpoint, a C2SP signed note; keep it somewhere else.
    #[command(after_help = "Example:\n  keyward ledger checkpoint >> /mnt/elsewhere/checkpoints")]
    Checkpoint {
        /// Print the verifier key instead.
        #[arg(long)]
        vkey: bool,
    },
    /// Verify a copy of the ledger offline: tree, checkpoints, and every promise that can be read off it. Exits 6 if it fails.
    #[command(
        after_help = "Example:\n  keyward ledger verify keyward.db --key ledger.vkey --checkpoint /mnt/elsewhere/newest --signatures"
    )]
    Verify(ledger_verify::Against),
}

#[derive(Serialize)]
struct Page {
    size: u64,
    entries: Vec<Described>,
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
        Verb::List { from, limit } => {
            let from = match from {
                Some(from) => from,
                None => page(&mut daemon, 0, 1).await?.size.saturating_sub(limit.into()),
            };
            let answer = page(&mut daemon, from, limit).await?;
            let shown = Page { size: answer.size, entries: decode(&answer)?.iter().map(Described::of).collect() };
            Ok(output.show(&shown, Page::text)?)
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

impl Page {
    fn text(&self) -> String {
        let row = |entry: &Described| vec![entry.index.to_string(), entry.time.clone(), entry.kind.to_owned(), entry.summary()];
        let rows: Vec<_> = self.entries.iter().map(row).collect();
        table(&["INDEX", "TIME", "KIND", "DETAIL"], &rows)
    }
}

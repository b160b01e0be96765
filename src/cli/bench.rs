//! `keyward bench`: what issuing costs.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::{Failure, Output, block_on, done};
use crate::bench::{self, Plan, Report, token};

/// The verbs.
#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// First attestations, renewals on standing connections, renewals each on its own: CPU against its floor, latencies, memory.
    #[command(
        after_help = "Examples:\n  keyward bench issue\n  keyward bench issue --format json --keys-in-token 200,10000\n  keyward bench issue --agents 100000"
    )]
    Issue(Issue),
    /// The PKCS#11 module by itself, in a process of its own.
    #[command(subcommand, hide = true)]
    Token(Token),
}

/// What `issue` takes.
#[derive(Debug, Args)]
pub(super) struct Issue {
    /// Agents that attest and renew, each with a connection.
    #[arg(long, default_value_t = 2000, value_name = "N", value_parser = count(16, 9000))]
    connections: usize,
    /// Requests under way at once.
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = count(1, 256))]
    outstanding: usize,
    /// Rounds of a comparison; the figure is the median of their ratios.
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = count(1, 7))]
    rounds: usize,
    /// Compare tokens that hold so many other key pairs with an empty one.
    #[arg(long, value_name = "N,…", value_delimiter = ',', value_parser = count(1, 100_000))]
    keys_in_token: Vec<usize>,
    /// Enrol so many agents, start again, and tell how long that took and what memory it needed.
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = count(0, 1_000_000))]
    agents: usize,
    /// Compare another build of keyward with this one.
    #[arg(long, value_name = "KEYWARD")]
    against: Option<PathBuf>,
    /// Where everything is made, and whose disk is measured [default: the directory for temporary files].
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// Where filled tokens are kept [default: below --work].
    #[arg(long, value_name = "DIR")]
    token_cache: Option<PathBuf>,
    /// The source's revision, for the report.
    #[arg(long, value_name = "REVISION")]
    revision: Option<String>,
}

/// What runs in a process of its own, with SOFTHSM2_CONF naming the token directory.
#[derive(Debug, Subcommand)]
pub(super) enum Token {
    /// Bare signatures.
    #[command(after_help = "Example:\n  keyward bench token sign --module M --pin-file F --count 10000 --threads 4")]
    Sign {
        #[command(flatten)]
        place: TokenPlace,
        /// A session each.
        #[arg(long)]
        threads: usize,
    },
    /// Key pairs that nobody uses.
    #[command(after_help = "Example:\n  keyward bench token fill --module M --pin-file F --count 10000")]
    Fill {
        #[command(flatten)]
        place: TokenPlace,
    },
}

/// Which token.
#[derive(Debug, Args)]
pub(super) struct TokenPlace {
    /// The PKCS#11 module.
    #[arg(long)]
    module: PathBuf,
    /// Its PIN.
    #[arg(long)]
    pin_file: PathBuf,
    /// How many.
    #[arg(long)]
    count: usize,
}

fn count(least: u64, most: u64) -> impl clap::builder::TypedValueParser<Value = usize> {
    use clap::builder::TypedValueParser as _;
    clap::value_parser!(u64).range(least..=most).try_map(usize::try_from)
}

pub(super) fn run(verb: Verb, output: &mut Output) -> Result<ExitCode, Failure> {
    let failed = |error: bench::Failed| Failure::error(format!("bench: {error}"));
    match verb {
        Verb::Issue(ask) => {
            let plan = plan(ask);
            let issue = Box::pin(bench::issue(&plan, |what| output.say(what)));
            let report = block_on(async { Ok(issue.await) })?.map_err(failed)?;
            done(output.show(&report, Report::text).map_err(Failure::from))
        }
        Verb::Token(Token::Sign { place, threads }) => {
            let raw = token::sign(&place.module, &place.pin_file, threads, place.count).map_err(failed)?;
            let json = serde_json::to_string(&raw).map_err(|error| Failure::error(error.to_string()))?;
            done(output.raw(json.as_bytes()).map_err(Failure::from))
        }
        Verb::Token(Token::Fill { place }) => done(token::fill(&place.module, &place.pin_file, place.count).map_err(failed)),
    }
}

fn plan(ask: Issue) -> Plan {
    let work = ask.work.unwrap_or_else(|| std::env::temp_dir().join("keyward-bench"));
    Plan {
        connections: ask.connections,
        outstanding: ask.outstanding,
        rounds: ask.rounds,
        keys_in_token: ask.keys_in_token,
        against: ask.against,
        crowd: ask.agents,
        cache: ask.token_cache.unwrap_or_else(|| work.join("tokens")),
        work,
        revision: ask.revision,
    }
}

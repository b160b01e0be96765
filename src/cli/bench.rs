//! `keyward bench`: what issuing and signing cost.

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Subcommand};

use super::{Failure, Output, block_on, done};
use crate::bench::{
    self, OverloadPlan, OverloadReport, Plan, Report, RotationPlan, RotationReport, SignPlan, SignReport, SlowPlan, SlowReport,
    room, token,
};

/// The verbs.
#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// First attestations, renewals on standing connections, renewals each on its own: CPU against its floor, latencies, memory.
    #[command(
        after_help = "Examples:\n  keyward bench issue\n  keyward bench issue --format json --keys-in-token 200,10000\n  keyward bench issue --agents 100000"
    )]
    Issue(Issue),
    /// Signatures of agents' keys, recorded, counted and in batches: CPU against its floor. Keys by the hundred thousand.
    #[command(after_help = "Examples:\n  keyward bench sign\n  keyward bench sign --keys 10000 --format json")]
    Sign(Sign),
    /// A device that takes its time to sign: the HSM room alone and the daemon end to end, against bare threads.
    #[command(after_help = "Example:\n  keyward bench slow-hsm --fault-module target/release/examples/libp11shim.so")]
    SlowHsm(SlowHsm),
    /// Four times as much as the device makes: how soon who is turned away hears so, how long who is admitted waits, memory.
    #[command(
        after_help = "Example:\n  keyward bench overload --fault-module target/release/examples/libp11shim.so --seconds 60"
    )]
    Overload(Overload),
    /// Authorities replaced by the hundred under continuous issuing: requests not granted, certificates rejected, objects left over.
    ///
    /// Days pass by a library under daemon and command that moves the wall clock (`cargo build --release --examples`).
    #[command(
        after_help = "Example:\n  keyward bench rotation --clock target/release/examples/libpreload.so --rotations 100 --kills 20"
    )]
    Rotation(Rotation),
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
    /// Where filled tokens are kept [default: below --work].
    #[arg(long, value_name = "DIR")]
    token_cache: Option<PathBuf>,
    #[command(flatten)]
    run: Run,
}

/// What `sign` takes.
#[derive(Debug, Args)]
pub(super) struct Sign {
    /// Agents, each with a connection and keys of its own.
    #[arg(long, default_value_t = 125, value_name = "N", value_parser = count(1, 1000))]
    agents: usize,
    /// Calls under way at once.
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = count(1, 256))]
    outstanding: usize,
    /// Signatures of each kind.
    #[arg(long, default_value_t = 20_000, value_name = "N", value_parser = count(100, 10_000_000))]
    signatures: usize,
    /// Wrapped keys that are made, at most 990 for each agent.
    #[arg(long, default_value_t = 100_000, value_name = "N", value_parser = count(100, 990_000))]
    keys: usize,
    #[command(flatten)]
    run: Run,
}

/// Of every run.
#[derive(Debug, Args)]
pub(super) struct Run {
    /// Where everything is made, and whose disk is measured [default: the directory for temporary files].
    #[arg(long, value_name = "DIR")]
    work: Option<PathBuf>,
    /// The source's revision, for the report.
    #[arg(long, value_name = "REVISION")]
    revision: Option<String>,
}

impl Run {
    fn work(&self) -> PathBuf {
        self.work.clone().unwrap_or_else(|| std::env::temp_dir().join("keyward-bench"))
    }
}

/// A device made slow.
#[derive(Debug, Args)]
pub(super) struct Device {
    /// The PKCS#11 module that stands before the real one and takes time (`cargo build --release --examples`).
    #[arg(long, value_name = "MODULE")]
    fault_module: PathBuf,
    /// Sign lanes, and bare threads.
    #[arg(long, default_value_t = 8, value_name = "N", value_parser = count(1, 256))]
    lanes: usize,
}

/// What `slow-hsm` takes.
#[derive(Debug, Args)]
pub(super) struct SlowHsm {
    #[command(flatten)]
    device: Device,
    /// Requests under way at once.
    #[arg(long, default_value_t = 64, value_name = "N", value_parser = count(1, 1024))]
    outstanding: usize,
    /// Rounds of a comparison; the figure is the median of their ratios.
    #[arg(long, default_value_t = 5, value_name = "N", value_parser = count(1, 5))]
    rounds: usize,
    /// Agents, each with a connection.
    #[arg(long, default_value_t = 2000, value_name = "N", value_parser = count(1024, 9000))]
    connections: usize,
    #[command(flatten)]
    run: Run,
}

/// What `overload` takes.
#[derive(Debug, Args)]
pub(super) struct Overload {
    #[command(flatten)]
    device: Device,
    /// How much is offered, in capacities of the bare device.
    #[arg(long, default_value_t = 4.0, value_name = "X")]
    factor: f64,
    /// Seconds at half load.
    #[arg(long, default_value_t = 60, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=600))]
    half_seconds: u64,
    /// Seconds under overload.
    #[arg(long, default_value_t = 60, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// Agents, each with a connection.
    #[arg(long, default_value_t = 2000, value_name = "N", value_parser = count(64, 9000))]
    connections: usize,
    #[command(flatten)]
    run: Run,
}

/// What `rotation` takes.
#[derive(Debug, Args)]
pub(super) struct Rotation {
    /// The library for LD_PRELOAD that moves the wall clock.
    #[arg(long, value_name = "LIBRARY")]
    clock: PathBuf,
    /// Rotations to be made.
    #[arg(long, default_value_t = 1000, value_name = "N", value_parser = count(1, 100_000))]
    rotations: usize,
    /// Daemons killed in the midst of one.
    #[arg(long, default_value_t = 0, value_name = "N", value_parser = count(0, 10_000))]
    kills: usize,
    /// Agents that renew all the time.
    #[arg(long, default_value_t = 4, value_name = "N", value_parser = count(1, 64))]
    agents: usize,
    #[command(flatten)]
    run: Run,
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
    /// Signatures of the HSM room.
    #[command(
        after_help = "Example:\n  keyward bench token room --module M --pin-file F --count 10000 --lanes 8 --outstanding 64"
    )]
    Room {
        #[command(flatten)]
        place: TokenPlace,
        /// Sign lanes.
        #[arg(long)]
        lanes: usize,
        /// Askers.
        #[arg(long)]
        outstanding: usize,
        /// Where the fault module of this process listens, to be asked for its counts.
        #[arg(long)]
        fault_socket: Option<PathBuf>,
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
        Verb::Sign(ask) => {
            let plan = SignPlan {
                agents: ask.agents,
                outstanding: ask.outstanding,
                signatures: ask.signatures,
                keys: ask.keys,
                work: ask.run.work(),
                revision: ask.run.revision,
            };
            let measured = Box::pin(bench::sign(&plan, |what| output.say(what)));
            let report = block_on(async { Ok(measured.await) })?.map_err(failed)?;
            done(output.show(&report, SignReport::text).map_err(Failure::from))
        }
        Verb::SlowHsm(ask) => {
            let plan = SlowPlan {
                fault_module: ask.device.fault_module,
                lanes: ask.device.lanes,
                outstanding: ask.outstanding,
                rounds: ask.rounds,
                connections: ask.connections,
                work: ask.run.work(),
                revision: ask.run.revision,
            };
            let measured = Box::pin(bench::slow_hsm(&plan, |what| output.say(what)));
            let report = block_on(async { Ok(measured.await) })?.map_err(failed)?;
            done(output.show(&report, SlowReport::text).map_err(Failure::from))
        }
        Verb::Overload(ask) => {
            let plan = OverloadPlan {
                fault_module: ask.device.fault_module,
                lanes: ask.device.lanes,
                factor: ask.factor,
                half_seconds: ask.half_seconds,
                seconds: ask.seconds,
                connections: ask.connections,
                work: ask.run.work(),
                revision: ask.run.revision,
            };
            let measured = Box::pin(bench::overload(&plan, |what| output.say(what)));
            let report = block_on(async { Ok(measured.await) })?.map_err(failed)?;
            done(output.show(&report, OverloadReport::text).map_err(Failure::from))
        }
        Verb::Rotation(ask) => {
            let plan = RotationPlan {
                work: ask.run.work(),
                clock: ask.clock,
                rotations: ask.rotations,
                kills: ask.kills,
                agents: ask.agents,
                revision: ask.run.revision,
            };
            bench::under_clock(&plan.clock, &plan.work).map_err(failed)?;
            let measured = Box::pin(bench::rotation(&plan, |what| output.say(what)));
            let report = block_on(async { Ok(measured.await) })?.map_err(failed)?;
            done(output.show(&report, RotationReport::text).map_err(Failure::from))
        }
        Verb::Token(Token::Sign { place, threads }) => {
            let raw = token::sign(&place.module, &place.pin_file, threads, place.count).map_err(failed)?;
            json(&raw, output)
        }
        Verb::Token(Token::Room { place, lanes, outstanding, fault_socket }) => {
            let asked = room::Asked {
                module: &place.module,
                pin_file: &place.pin_file,
                lanes,
                outstanding,
                count: place.count,
                fault_socket: fault_socket.as_deref(),
            };
            json(&room::sign(&asked).map_err(failed)?, output)
        }
        Verb::Token(Token::Fill { place }) => done(token::fill(&place.module, &place.pin_file, place.count).map_err(failed)),
    }
}

fn json(value: &impl serde::Serialize, output: &mut Output) -> Result<ExitCode, Failure> {
    let json = serde_json::to_string(value).map_err(|error| Failure::error(error.to_string()))?;
    done(output.raw(json.as_bytes()).map_err(Failure::from))
}

fn plan(ask: Issue) -> Plan {
    let work = ask.run.work();
    Plan {
        connections: ask.connections,
        outstanding: ask.outstanding,
        rounds: ask.rounds,
        keys_in_token: ask.keys_in_token,
        against: ask.against,
        crowd: ask.agents,
        cache: ask.token_cache.unwrap_or_else(|| work.join("tokens")),
        work,
        revision: ask.run.revision,
    }
}

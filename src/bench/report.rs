//! What a run found, for machines and for people.

use std::fmt::Write as _;

use serde::Serialize;

use super::disk::Fsync;
use super::figures::Paired;
use super::phase::Phase;
use super::token::RawSignatures;
use crate::config::Config;

/// One goal and whether it was reached.
#[derive(Debug, Clone, Serialize)]
pub struct Goal {
    /// What was measured.
    pub name: String,
    /// What came out.
    pub value: f64,
    /// Which side of the bound is good.
    pub may_be: Side,
    /// The most or the least it may be.
    pub bound: f64,
    /// Whether it is.
    pub met: bool,
}

/// Of a bound.
#[derive(Debug, Clone, Copy, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Side {
    /// The bound or less.
    AtMost,
    /// The bound or more.
    AtLeast,
}

impl Goal {
    /// `value` may be `bound` at most.
    #[must_use]
    pub fn at_most(name: &str, value: f64, bound: f64) -> Self {
        Self { name: name.to_owned(), value, may_be: Side::AtMost, bound, met: value <= bound }
    }

    /// `value` may be `bound` at least.
    #[must_use]
    pub fn at_least(name: &str, value: f64, bound: f64) -> Self {
        Self { name: name.to_owned(), value, may_be: Side::AtLeast, bound, met: value >= bound }
    }
}

/// A line for each.
pub(super) fn goals_text(goals: &[Goal]) -> String {
    let line = |goal: &Goal| {
        let verdict = if goal.met { "met   " } else { "MISSED" };
        let side = match goal.may_be {
            Side::AtMost => "at most",
            Side::AtLeast => "at least",
        };
        format!("{verdict} {:<52} {:>9.3}  {side} {:.2}\n", goal.name, goal.value, goal.bound)
    };
    goals.iter().map(line).collect()
}

/// On what a run was made.
#[derive(Debug, Clone, Serialize)]
pub struct Ground {
    /// Of the disk, before.
    pub fsync_before: Fsync,
    /// And after.
    pub fsync_after: Fsync,
    /// The effective configuration.
    pub configuration: String,
    /// Its SHA-256.
    pub configuration_sha256: String,
    /// Of this build.
    pub version: &'static str,
    /// The source's, where known.
    pub revision: Option<String>,
    /// Whether this is a build to be measured.
    pub optimised: bool,
    /// Cores that daemon and generator share.
    pub cores: usize,
}

impl Ground {
    pub(super) fn new(fsync: (Fsync, Fsync), config: &Config, revision: Option<String>) -> Self {
        Self {
            fsync_before: fsync.0,
            fsync_after: fsync.1,
            configuration: config.effective(),
            configuration_sha256: config.hash.to_string(),
            version: env!("CARGO_PKG_VERSION"),
            revision,
            optimised: !cfg!(debug_assertions),
            cores: std::thread::available_parallelism().map_or(0, std::num::NonZero::get),
        }
    }

    pub(super) fn disk_text(&self) -> String {
        let (before, after) = (self.fsync_before, self.fsync_after);
        format!(
            "disk        4 KiB + fdatasync p50 {:.2} ms, p99 {:.2} ms before; {:.2} and {:.2} after\n",
            before.p50_ms, before.p99_ms, after.p50_ms, after.p99_ms
        )
    }

    pub(super) fn build_text(&self) -> String {
        let mut text = format!(
            "\nkeyward {} ({}), configuration {}\n",
            self.version,
            self.revision.as_deref().unwrap_or("revision unknown"),
            self.configuration_sha256.get(..16).unwrap_or_default()
        );
        if !self.optimised {
            text.push_str("This is a debug build: its figures mean nothing.\n");
        }
        text
    }
}

/// The variants of a comparison.
#[derive(Debug, Clone, Serialize)]
pub struct Comparison {
    /// What B has that A has not.
    pub what: String,
    /// Server CPU per certificate, B/A.
    #[serde(flatten)]
    pub paired: Paired,
    /// What the ratio may be, where there is such a goal.
    pub bound: Option<f64>,
    /// Median server CPU per certificate of A and B, in microseconds.
    pub a_us: f64,
    /// See `a_us`.
    pub b_us: f64,
}

/// A start with many agents.
#[derive(Debug, Clone, Serialize)]
pub struct Crowd {
    /// Enrolled.
    pub agents: usize,
    /// Enrolments per second while they were.
    pub enrolments_per_second: f64,
    /// From the start of the process to READY=1.
    pub start_to_ready_seconds: f64,
    /// VmRSS then.
    pub rss_mib: f64,
}

/// Everything of one run.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Signatures per second of the bare module, as many threads as lanes.
    pub floor_signatures_per_second: f64,
    /// One C_Sign and two P-256 verifications, measured inside the daemon while it renewed on standing connections.
    pub floor_cpu_us: f64,
    /// One full mutual handshake, the server's side, measured inside the daemon.
    pub handshake_cpu_us: f64,
    /// Renewals on standing connections.
    pub certificates_per_second: f64,
    /// Of those.
    pub server_cpu_us_per_certificate: f64,
    /// To the floor.
    pub cpu_ratio: f64,
    /// Renewals each on its own connection, to the floor and a handshake.
    pub own_connection_cpu_ratio: f64,
    /// Renewals on standing connections.
    pub p50_ms: f64,
    /// Of those.
    pub p99_ms: f64,
    /// Of those.
    pub commits_per_second: f64,
    /// Ready, with an empty ledger.
    pub rss_mib: f64,
    /// Of renewals on standing connections.
    pub ledger_bytes_per_certificate: f64,
    /// From the start of the process to READY=1, with an empty ledger.
    pub start_to_ready_seconds: f64,
    /// Requests under way at once.
    pub outstanding: usize,
    /// Agents that attested and renewed, each with a connection.
    pub connections: usize,
    /// The bare module.
    pub raw: RawSignatures,
    /// In the order in which they were run.
    pub phases: Vec<Phase>,
    /// Server CPU to floor of each round on standing connections.
    pub cpu_ratio_rounds: Vec<f64>,
    /// A against B.
    pub comparisons: Vec<Comparison>,
    /// With many agents.
    pub crowd: Option<Crowd>,
    /// Each with its bound.
    pub goals: Vec<Goal>,
    /// Disk, configuration, build.
    #[serde(flatten)]
    pub ground: Ground,
}

impl Report {
    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = String::new();
        let _ = writeln!(
            text,
            "floor       {:.0} bare C_Sign/s on {} threads ({:.1} us CPU each); C_Sign + two verifications {:.1} us; handshake {:.1} us",
            self.floor_signatures_per_second,
            self.raw.threads,
            self.raw.micros_each(),
            self.floor_cpu_us,
            self.handshake_cpu_us
        );
        let _ = writeln!(text, "{}", self.ground.disk_text());
        self.phases_text(&mut text);
        for comparison in &self.comparisons {
            let paired = &comparison.paired;
            let _ = writeln!(
                text,
                "{:<22} {:.1} us against {:.1} us: ratio {:.3} (the same against itself {:.3}, spread {:.3})",
                comparison.what, comparison.b_us, comparison.a_us, paired.ratio, paired.same_ratio, paired.same_spread
            );
        }
        if let Some(crowd) = &self.crowd {
            let _ = writeln!(
                text,
                "{} agents: enrolled at {:.0}/s; start to ready {:.2} s; {:.1} MiB",
                crowd.agents, crowd.enrolments_per_second, crowd.start_to_ready_seconds, crowd.rss_mib
            );
        }
        text + "\n" + &goals_text(&self.goals) + &self.ground.build_text()
    }

    fn phases_text(&self, text: &mut String) {
        let _ = writeln!(
            text,
            "{:<22}{:>8}{:>8}{:>8}{:>8}{:>9}{:>9}{:>8}{:>8}{:>9}",
            "", "cert/s", "p50 ms", "p99", "p99.9", "CPU us", "floor us", "ratio", "commit/s", "MiB"
        );
        for phase in &self.phases {
            let _ = writeln!(
                text,
                "{:<22}{:>8.0}{:>8.1}{:>8.1}{:>8.1}{:>9.1}{:>9.1}{:>8.2}{:>8.0}{:>9.1}",
                phase.name,
                phase.certificates_per_second,
                phase.latency.p50_ms,
                phase.latency.p99_ms,
                phase.latency.p999_ms,
                phase.server_cpu_us_per_certificate,
                phase.floor_cpu_us + phase.handshake_cpu_us,
                phase.server_cpu_us_per_certificate / (phase.floor_cpu_us + phase.handshake_cpu_us),
                phase.commits_per_second,
                phase.rss_mib
            );
        }
        let _ = writeln!(
            text,
            "\n{:<22}{:>7}{:>8}{:>7}{:>8}{:>7}{:>7}{:>8}{:>11}{:>7}",
            "CPU us per certificate", "sign", "verify", "CSR", "(check)", "proof", "build", "ledger", "handshake", "rest"
        );
        for phase in &self.phases {
            let parts = &phase.parts_us;
            let _ = writeln!(
                text,
                "{:<22}{:>7.1}{:>8.1}{:>7.1}{:>8.1}{:>7.1}{:>7.1}{:>8.1}{:>11.1}{:>7.1}",
                phase.name,
                parts.sign,
                parts.verify_own,
                parts.csr,
                parts.csr_verify,
                parts.proof,
                parts.certificate,
                parts.ledger,
                parts.handshake,
                parts.rest
            );
        }
        let _ = writeln!(text);
    }
}

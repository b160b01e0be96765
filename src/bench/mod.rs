//! What issuing and signing cost: `keyward bench`.
//!
//! Owns: throw-away daemons with throw-away tokens, agents by the thousand, figures. Promises: stock configuration, or the report
//! says in what it differs; the floor and what is held against it come from one run; keys and requests are made before the clock
//! starts; variants alternate, with the same thing twice beside them; under an open load a latency counts from when its request was
//! due. Never: touches a token or a daemon that it has not made, or runs inside the daemon.

mod disk;
mod figures;
mod fleet;
mod house;
mod load;
mod overload;
mod phase;
mod report;
pub mod room;
mod rotation;
mod rotation_peers;
mod sign;
mod slow;
mod standing;
pub mod token;

use std::path::{Path, PathBuf};
use std::time::Instant;

use disk::Fsync;
use figures::{Paired, median};
use fleet::{Fleet, Step};
use house::{House, Running, Site, Wants, ran};
pub use overload::{OverloadPlan, OverloadReport, overload};
use phase::{Measured, Phase};
pub use report::{Comparison, Crowd, Goal, Ground, Report, Side};
pub use rotation::{RotationPlan, RotationReport, rotation, under_clock};
pub use sign::{SignPlan, SignReport, sign};
pub use slow::{SlowPlan, SlowReport, slow_hsm};
use token::RawSignatures;

/// Any reason why a run ended without figures.
pub type Failed = Box<dyn std::error::Error + Send + Sync>;

/// An agent may hold 8 live certificates: one attested, 5 renewed on a standing connection, 2 each on its own.
const STANDING_RENEWALS: usize = 5;
const OWN_RENEWALS: usize = 2;
/// Comparisons leave out the renewals on own connections: the first certificate and 7 renewals.
const COMPARED_RENEWALS_MAX: usize = 7;
/// What other keys in the token may add.
const KEYS_RATIO_MAX: f64 = 1.05;
const RAW_SIGNATURES: usize = 10_000;

/// What to measure.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Agents that attest and renew, each with a connection.
    pub connections: usize,
    /// Requests under way at once.
    pub outstanding: usize,
    /// Rounds of a comparison, at most 7.
    pub rounds: usize,
    /// Compare an empty token with those that hold so many other key pairs.
    pub keys_in_token: Vec<usize>,
    /// Compare with another build of keyward.
    pub against: Option<PathBuf>,
    /// Enrol so many agents, start again, and tell how that went; 0: leave it out.
    pub crowd: usize,
    /// Everything is made below it. The disk is the one that is measured.
    pub work: PathBuf,
    /// Where filled tokens are kept.
    pub cache: PathBuf,
    /// The source's revision, for the report.
    pub revision: Option<String>,
}

/// Runs it and tells `progress` what is being done.
///
/// # Errors
/// When anything refuses or fails: a figure of half a run is none.
pub async fn issue(plan: &Plan, mut progress: impl FnMut(&str)) -> Result<Report, Failed> {
    std::fs::create_dir_all(&plan.work)?;
    std::fs::create_dir_all(&plan.cache)?;
    let binary = std::env::current_exe()?;
    let site = Site::new(plan.work.clone(), plan.cache.clone())?;
    let fsync_before = disk::fsync(&plan.work)?;

    progress("one daemon, an empty token: first attestations, renewals on standing connections, renewals each on its own");
    let alone = alone(plan, &site, &binary).await?;

    let mut comparisons = Vec::new();
    for count in &plan.keys_in_token {
        progress(&format!("{count} other keys in the token against none (filling a token takes a while, once)"));
        let a = Variant { binary: &binary, keys_in_token: 0 };
        let b = Variant { binary: &binary, keys_in_token: *count };
        comparisons.push(Box::pin(compare(plan, &site, format!("{count} other keys"), &a, &b)).await?);
    }
    if let Some(other) = &plan.against {
        progress("this build against the other");
        let a = Variant { binary: other, keys_in_token: 0 };
        let b = Variant { binary: &binary, keys_in_token: 0 };
        comparisons.push(Box::pin(compare(plan, &site, "this build".to_owned(), &a, &b)).await?);
    }
    let crowd = if plan.crowd > 0 {
        progress(&format!("{} agents are enrolled", plan.crowd));
        Some(with_crowd(plan, &site, &binary).await?)
    } else {
        None
    };
    let fsync_after = disk::fsync(&plan.work)?;
    Ok(alone.report(plan, comparisons, crowd, (fsync_before, fsync_after)))
}

/// What one daemon by itself showed.
struct Alone {
    config: crate::config::Config,
    raw: RawSignatures,
    rss_empty_mib: f64,
    start_to_ready_seconds: f64,
    attest: Phase,
    standing: Phase,
    /// Of `standing`.
    rounds: Vec<Phase>,
    own: Phase,
}

async fn alone(plan: &Plan, site: &Site, binary: &Path) -> Result<Alone, Failed> {
    let house = House::build(site, "alone", binary, Wants::default()).await?;
    let raw = raw_signatures(&house, RAW_SIGNATURES).await?;
    let mut running = house.start().await?;
    let rss_empty_mib = mib(running.rss_kib()?);
    let start_to_ready_seconds = running.ready_after.as_secs_f64();
    let mut fleet = Fleet::enrol(&running.operator, plan.connections, 1 + STANDING_RENEWALS + OWN_RENEWALS).await?;
    let measured = |name, step, rounds| Measured { name, step, rounds, outstanding: plan.outstanding };
    let (attest, _) = measured("attest", Step::Attest, 1).run(&house, &mut running, &mut fleet).await?;
    fleet.all(Step::Connect, plan.outstanding).await?;
    let standing = measured("renew_standing", Step::RenewStanding, STANDING_RENEWALS);
    let (standing, rounds) = standing.run(&house, &mut running, &mut fleet).await?;
    fleet.all(Step::Disconnect, plan.outstanding).await?;
    let own = measured("renew_own_connection", Step::RenewOwn, OWN_RENEWALS);
    let (own, _) = own.run(&house, &mut running, &mut fleet).await?;
    running.stop().await?;
    let config = house.config.clone();
    Ok(Alone { config, raw, rss_empty_mib, start_to_ready_seconds, attest, standing, rounds, own })
}

impl Alone {
    fn report(self, plan: &Plan, comparisons: Vec<Comparison>, crowd: Option<Crowd>, fsync: (Fsync, Fsync)) -> Report {
        let ratio = |phase: &Phase| phase.server_cpu_us_per_certificate / (phase.floor_cpu_us + phase.handshake_cpu_us);
        let (standing, own) = (&self.standing, &self.own);
        let mut goals = vec![
            Goal::at_most("renewals on standing connections: CPU to floor", ratio(standing), 1.7),
            Goal::at_most("renewals on own connections: CPU to floor + handshake", ratio(own), 1.5),
            Goal::at_most("commits per certificate", standing.commits_per_second / standing.certificates_per_second, 0.5),
            Goal::at_most("ledger bytes per certificate", standing.ledger_bytes_per_certificate, 1536.0),
            Goal::at_most("MiB with an empty ledger", self.rss_empty_mib, 40.0),
        ];
        goals.extend(comparisons.iter().filter(|comparison| comparison.bound.is_some()).map(|comparison| Goal {
            name: format!("CPU with {} in the token to CPU without", comparison.what),
            value: comparison.paired.ratio,
            may_be: Side::AtMost,
            bound: KEYS_RATIO_MAX,
            met: comparison.paired.meets(KEYS_RATIO_MAX),
        }));
        if let Some(crowd) = &crowd {
            goals.push(Goal::at_most("start to ready with many agents, in seconds", crowd.start_to_ready_seconds, 1.0));
            goals.push(Goal::at_most("MiB with many agents", crowd.rss_mib, 80.0));
        }
        Report {
            floor_signatures_per_second: self.raw.per_second(),
            floor_cpu_us: standing.floor_cpu_us,
            handshake_cpu_us: own.handshake_cpu_us,
            certificates_per_second: standing.certificates_per_second,
            server_cpu_us_per_certificate: standing.server_cpu_us_per_certificate,
            cpu_ratio: ratio(standing),
            own_connection_cpu_ratio: ratio(own),
            p50_ms: standing.latency.p50_ms,
            p99_ms: standing.latency.p99_ms,
            commits_per_second: standing.commits_per_second,
            rss_mib: self.rss_empty_mib,
            ledger_bytes_per_certificate: standing.ledger_bytes_per_certificate,
            start_to_ready_seconds: self.start_to_ready_seconds,
            outstanding: plan.outstanding,
            connections: plan.connections,
            raw: self.raw,
            cpu_ratio_rounds: self.rounds.iter().map(ratio).collect(),
            phases: vec![self.attest, self.standing, self.own],
            comparisons,
            crowd,
            goals,
            ground: Ground::new(fsync, &self.config, plan.revision.clone()),
        }
    }
}

/// One side of a comparison.
struct Variant<'a> {
    binary: &'a Path,
    keys_in_token: usize,
}

/// A daemon whose agents have connected.
struct Ready {
    house: House,
    running: Running,
    fleet: Fleet,
}

impl Ready {
    async fn new(plan: &Plan, site: &Site, name: &str, variant: &Variant<'_>) -> Result<Self, Failed> {
        let wants = Wants { keys_in_token: variant.keys_in_token, ..Wants::default() };
        let house = House::build(site, name, variant.binary, wants).await?;
        let running = house.start().await?;
        let mut fleet = Fleet::enrol(&running.operator, plan.connections, 1 + COMPARED_RENEWALS_MAX).await?;
        fleet.all(Step::Attest, plan.outstanding).await?;
        fleet.all(Step::Connect, plan.outstanding).await?;
        Ok(Self { house, running, fleet })
    }

    /// Server CPU per renewal, in microseconds: each agent renews once.
    async fn round(&mut self, outstanding: usize) -> Result<f64, Failed> {
        let measured = Measured { name: "renew_standing", step: Step::RenewStanding, rounds: 1, outstanding };
        let (phase, _) = measured.run(&self.house, &mut self.running, &mut self.fleet).await?;
        Ok(phase.server_cpu_us_per_certificate)
    }
}

/// A, A again and B: three daemons that wait while another works, a round at a time, in an order that turns.
async fn compare(plan: &Plan, site: &Site, what: String, a: &Variant<'_>, b: &Variant<'_>) -> Result<Comparison, Failed> {
    let mut three = [
        Ready::new(plan, site, "a", a).await?,
        Ready::new(plan, site, "a-again", a).await?,
        Ready::new(plan, site, "b", b).await?,
    ];
    let mut rounds = Vec::new();
    for round in 0..plan.rounds.min(COMPARED_RENEWALS_MAX) {
        let mut cost = [0.0; 3];
        for turn in 0..three.len() {
            let at = (round + turn) % three.len();
            cost[at] = three[at].round(plan.outstanding).await?;
        }
        rounds.push((cost[0], cost[1], cost[2]));
    }
    for ready in three {
        ready.running.stop().await?;
    }
    let of = |side: fn(&(f64, f64, f64)) -> f64| median(&rounds.iter().map(side).collect::<Vec<_>>());
    let bound = (b.keys_in_token > 0).then_some(KEYS_RATIO_MAX);
    Ok(Comparison { what, paired: Paired::of(&rounds), bound, a_us: of(|round| round.0), b_us: of(|round| round.2) })
}

/// Many agents, and a start with them.
async fn with_crowd(plan: &Plan, site: &Site, binary: &Path) -> Result<Crowd, Failed> {
    let house = House::build(site, "crowd", binary, Wants::default()).await?;
    let running = house.start().await?;
    let from = Instant::now();
    fleet::enrol_many(&house.socket(), plan.crowd).await?;
    let seconds = from.elapsed().as_secs_f64();
    running.stop().await?;
    let again = house.start().await?;
    let (ready, rss_mib) = (again.ready_after, mib(again.rss_kib()?));
    again.stop().await?;
    #[expect(clippy::cast_precision_loss, reason = "figures, not accounts")]
    let enrolments_per_second = plan.crowd as f64 / seconds;
    Ok(Crowd { agents: plan.crowd, enrolments_per_second, start_to_ready_seconds: ready.as_secs_f64(), rss_mib })
}

/// The bare module with this house's authority token, as many threads as lanes, in a process of its own.
async fn raw_signatures(house: &House, count: usize) -> Result<RawSignatures, Failed> {
    let mut command = house.command();
    command.args(["bench", "token", "sign", "--threads", &house.config.authority.lanes.to_string()]);
    command.args(["--count", &count.to_string()]);
    command.arg("--module").arg(&house.module).arg("--pin-file").arg(house.pin_file());
    Ok(serde_json::from_slice(&ran(&mut command).await?)?)
}

#[expect(clippy::cast_precision_loss, reason = "figures, not accounts")]
fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

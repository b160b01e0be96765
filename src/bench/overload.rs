//! `keyward bench overload`: more is asked for than the device makes. Who is turned away hears so at once, who is admitted is served as
//! if there were no crowd, and nothing piles up.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::figures::Latency;
use super::fleet::{Fleet, Step};
use super::house::{House, Running, Site, Wants};
use super::load::{Offered, Pool, offer};
use super::report::goals_text;
use super::{Failed, Goal, Ground, disk, mib, raw_signatures};

/// What one signature takes the device.
const DELAY: Duration = Duration::from_millis(10);
/// About three seconds.
const RAW_SIGNATURES: usize = 2400;
/// At half load, before anything is counted.
const WARM_UP: Duration = Duration::from_secs(5);
/// The most that can be configured: every certificate of a run stays alive.
const LIVE_CERTIFICATES: usize = 64;
/// Attestations at once: fewer than are turned away.
const ATTESTING: usize = 8;
const RSS_EVERY: Duration = Duration::from_secs(1);
const SHED_P99_MS_MAX: f64 = 5.0;
const ACCEPTED_P99_RATIO_MAX: f64 = 2.5;
const RSS_GROWTH_MIB_MAX: f64 = 8.0;

/// What to measure.
#[derive(Debug, Clone)]
pub struct OverloadPlan {
    /// The fault module, which makes the device slow.
    pub fault_module: PathBuf,
    /// Sign lanes, and bare threads.
    pub lanes: usize,
    /// Offered, in capacities of the bare device.
    pub factor: f64,
    /// At half load.
    pub half_seconds: u64,
    /// Under overload.
    pub seconds: u64,
    /// Agents, each with a connection.
    pub connections: usize,
    /// Everything is made below it.
    pub work: PathBuf,
    /// The source's revision, for the report.
    pub revision: Option<String>,
}

/// One load.
#[derive(Debug, Clone, Serialize)]
pub struct Load {
    /// Requests due a second.
    pub offered_per_second: f64,
    /// For so long.
    pub seconds: f64,
    /// Certificates.
    pub accepted: usize,
    /// A second.
    pub accepted_per_second: f64,
    /// From when the request was due.
    pub accepted_latency: Latency,
    /// RESOURCE_EXHAUSTED.
    pub shed: usize,
    /// From when the request was due.
    pub shed_latency: Latency,
    /// Of those latencies the generator's own part: from when a request was due to when it was handed to its connection.
    pub generator_lag: Latency,
    /// Due when no agent was idle, and so never sent.
    pub without_agent: u64,
    /// VmRSS of the daemon at the start.
    pub rss_mib_start: f64,
    /// The largest seen.
    pub rss_mib_max: f64,
    /// Each second.
    pub rss_mib: Vec<f64>,
}

/// Everything of one run.
#[derive(Debug, Clone, Serialize)]
pub struct OverloadReport {
    /// Of requests turned away under overload.
    pub shed_p99_ms: f64,
    /// p99 of accepted requests under overload to that at half load.
    pub accepted_p99_ratio: f64,
    /// Of the daemon under overload.
    pub rss_growth_mib: f64,
    /// Signatures a second of the bare device.
    pub capacity_per_second: f64,
    /// Sign lanes, and bare threads.
    pub lanes: usize,
    /// What one signature takes the device.
    pub delay_ms: f64,
    /// Agents, each with a connection.
    pub connections: usize,
    /// At half of the capacity.
    pub half: Load,
    /// Past it.
    pub overload: Load,
    /// How latencies are counted.
    pub method: &'static str,
    /// Each with its bound.
    pub goals: Vec<Goal>,
    /// Disk, configuration, build.
    #[serde(flatten)]
    pub ground: Ground,
}

/// Runs it and tells `progress` what is being done.
///
/// # Errors
/// When anything fails but by being turned away: a figure of half a run is none.
pub async fn overload(plan: &OverloadPlan, mut progress: impl FnMut(&str)) -> Result<OverloadReport, Failed> {
    std::fs::create_dir_all(&plan.work)?;
    let site = Site::new(plan.work.clone(), plan.work.clone())?;
    let binary = std::env::current_exe()?;
    let fsync_before = disk::fsync(&plan.work)?;
    let wants = Wants {
        fault_module: Some(&plan.fault_module),
        lanes: Some(plan.lanes),
        live_certificates: Some(LIVE_CERTIFICATES),
        ..Wants::default()
    };
    let house = House::build(&site, "overload", &binary, wants).await?;
    house.delay_signatures(DELAY)?;
    progress("what the bare device makes");
    let capacity = raw_signatures(&house, RAW_SIGNATURES).await?.per_second();

    let mut running = house.start().await?;
    let renewals = renewals_each(plan, capacity)?;
    progress(&format!("{} agents with {renewals} requests each are made ready", plan.connections));
    let mut fleet = Fleet::enrol(&running.operator, plan.connections, 1 + renewals).await?;
    fleet.all(Step::Attest, ATTESTING).await?;
    fleet.all(Step::Connect, ATTESTING).await?;
    let pool = Pool::of(fleet.into_renewers()?);

    let half_rate = capacity / 2.0;
    progress(&format!("half load: {half_rate:.0} requests a second"));
    offer(&pool, half_rate, WARM_UP).await?;
    let half = load(&pool, &mut running, half_rate, Duration::from_secs(plan.half_seconds)).await?;
    let rate = capacity * plan.factor;
    progress(&format!("overload: {rate:.0} requests a second for {} s", plan.seconds));
    let over = load(&pool, &mut running, rate, Duration::from_secs(plan.seconds)).await?;
    running.stop().await?;

    let fsync_after = disk::fsync(&plan.work)?;
    let shed_p99_ms = over.shed_latency.p99_ms;
    let accepted_p99_ratio = over.accepted_latency.p99_ms / half.accepted_latency.p99_ms;
    let rss_growth_mib = over.rss_mib_max - over.rss_mib_start;
    Ok(OverloadReport {
        shed_p99_ms,
        accepted_p99_ratio,
        rss_growth_mib,
        capacity_per_second: capacity,
        lanes: plan.lanes,
        delay_ms: DELAY.as_secs_f64() * 1e3,
        connections: plan.connections,
        half,
        overload: over,
        method: "open loop: requests are due at fixed times whatever became of earlier ones, and every latency counts from that time",
        goals: vec![
            Goal::at_most("p99 of requests turned away, in ms", shed_p99_ms, SHED_P99_MS_MAX),
            Goal::at_most("p99 of accepted requests to that at half load", accepted_p99_ratio, ACCEPTED_P99_RATIO_MAX),
            Goal::at_most("growth of the daemon's memory, in MiB", rss_growth_mib, RSS_GROWTH_MIB_MAX),
        ],
        ground: Ground::new((fsync_before, fsync_after), &house.config, plan.revision.clone()),
    })
}

/// Requests for each agent: what the device can make in the time, and room for chance, which decides who is admitted. An agent that has
/// none left is not asked any more.
#[expect(clippy::cast_precision_loss, reason = "an estimate")]
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "an estimate above zero")]
fn renewals_each(plan: &OverloadPlan, capacity: f64) -> Result<usize, Failed> {
    let half = (WARM_UP.as_secs() + plan.half_seconds) as f64 / 2.0;
    let mean = capacity * (half + plan.seconds as f64) * 1.05 / plan.connections.max(1) as f64;
    let each = (mean + 3.0 * mean.sqrt()) as usize + 1;
    // One is the attested one.
    if each < LIVE_CERTIFICATES {
        return Ok(each);
    }
    Err(format!("an agent may hold {LIVE_CERTIFICATES} live certificates and would need {each}: ask for more connections").into())
}

async fn load(pool: &Pool, running: &mut Running, per_second: f64, time: Duration) -> Result<Load, Failed> {
    let mut rss_mib = vec![mib(running.rss_kib()?)];
    let mut offered = std::pin::pin!(offer(pool, per_second, time));
    let mut every = tokio::time::interval(RSS_EVERY);
    let offered = loop {
        tokio::select! {
            offered = &mut offered => break offered?,
            _ = every.tick() => rss_mib.push(mib(running.rss_kib()?)),
        }
    };
    rss_mib.push(mib(running.rss_kib()?));
    let Offered { issued, turned_away, lag, without_agent, .. } = offered;
    #[expect(clippy::cast_precision_loss, reason = "figures, not accounts")]
    let accepted_per_second = issued.len() as f64 / time.as_secs_f64();
    Ok(Load {
        offered_per_second: per_second,
        seconds: time.as_secs_f64(),
        accepted: issued.len(),
        accepted_per_second,
        accepted_latency: Latency::of(issued),
        shed: turned_away.len(),
        shed_latency: Latency::of(turned_away),
        generator_lag: Latency::of(lag),
        without_agent,
        rss_mib_start: rss_mib.first().copied().unwrap_or_default(),
        rss_mib_max: rss_mib.iter().copied().fold(0.0, f64::max),
        rss_mib,
    })
}

impl OverloadReport {
    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = self.ground.disk_text();
        let _ = writeln!(
            text,
            "device      {} ms a signature, {} lanes: {:.0} signatures/s by bare threads\n\n\
             {:<10}{:>11}{:>13}{:>8}{:>8}{:>8}{:>8}{:>9}{:>8}{:>8}{:>10}{:>9}{:>9}",
            self.delay_ms,
            self.lanes,
            self.capacity_per_second,
            "",
            "offered/s",
            "accepted/s",
            "p50 ms",
            "p99",
            "p99.9",
            "shed",
            "p50 ms",
            "p99",
            "p99.9",
            "lag p99",
            "MiB",
            "max MiB"
        );
        for (name, load) in [("half", &self.half), ("overload", &self.overload)] {
            let (accepted, shed) = (&load.accepted_latency, &load.shed_latency);
            let _ = writeln!(
                text,
                "{name:<10}{:>11.0}{:>13.0}{:>8.1}{:>8.1}{:>8.1}{:>8}{:>9.2}{:>8.2}{:>8.2}{:>10.2}{:>9.1}{:>9.1}",
                load.offered_per_second,
                load.accepted_per_second,
                accepted.p50_ms,
                accepted.p99_ms,
                accepted.p999_ms,
                load.shed,
                shed.p50_ms,
                shed.p99_ms,
                shed.p999_ms,
                load.generator_lag.p99_ms,
                load.rss_mib_start,
                load.rss_mib_max
            );
        }
        let _ = writeln!(text, "{}\n", self.method);
        if self.half.without_agent + self.overload.without_agent > 0 {
            let _ =
                writeln!(text, "Some requests were never sent, because no agent was idle: the offer was smaller than told.\n");
        }
        text + &goals_text(&self.goals) + &self.ground.build_text()
    }
}

//! `keyward bench slow-hsm`: what keyward leaves of a device whose time goes by signing.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;

use super::figures::{Latency, Paired};
use super::fleet::{Fleet, Step};
use super::house::{House, Site, Wants, ran};
use super::load::{Pool, keep_busy};
use super::report::goals_text;
use super::room::RoomSignatures;
use super::{Failed, Goal, Ground, disk, raw_signatures};

/// What one signature takes the device: the HSM room alone, and the daemon end to end.
const ROOM_DELAY: Duration = Duration::from_millis(2);
const END_TO_END_DELAY: Duration = Duration::from_millis(10);
/// About two seconds of each.
const ROOM_SIGNATURES: usize = 8000;
const RAW_SIGNATURES: usize = 2000;
/// Of one round end to end.
const WINDOW: Duration = Duration::from_millis(2500);
/// An agent may hold 8 live certificates: one attested, 7 renewed.
const RENEWALS: usize = 7;
/// Attestations at once: fewer than are turned away.
const ATTESTING: usize = 8;
const FRACTION_OF_RAW_MIN: f64 = 0.97;
const END_TO_END_FRACTION_MIN: f64 = 0.95;

/// What to measure.
#[derive(Debug, Clone)]
pub struct SlowPlan {
    /// The fault module, which makes the device slow.
    pub fault_module: PathBuf,
    /// Sign lanes, and bare threads.
    pub lanes: usize,
    /// Requests under way at once.
    pub outstanding: usize,
    /// Of each comparison.
    pub rounds: usize,
    /// Agents, each with a connection.
    pub connections: usize,
    /// Everything is made below it.
    pub work: PathBuf,
    /// The source's revision, for the report.
    pub revision: Option<String>,
}

/// Against bare threads.
#[derive(Debug, Clone, Serialize)]
pub struct AgainstRaw {
    /// What one signature takes the device.
    pub delay_ms: f64,
    /// Signatures a second, round by round: bare threads, what is measured, bare threads again.
    pub rounds: Vec<[f64; 3]>,
    /// B is what is measured, A the bare threads.
    #[serde(flatten)]
    pub paired: Paired,
}

impl AgainstRaw {
    fn new(delay: Duration, rounds: Vec<[f64; 3]>) -> Self {
        let paired = Paired::of(&rounds.iter().map(|[raw, measured, again]| (*raw, *again, *measured)).collect::<Vec<_>>());
        Self { delay_ms: delay.as_secs_f64() * 1e3, rounds, paired }
    }

    fn text(&self, name: &str) -> String {
        let rounds = |at: usize| self.rounds.iter().map(|round| format!("{:.0}", round[at])).collect::<Vec<_>>().join(" ");
        let ratios: Vec<String> = self.paired.ratios.iter().map(|ratio| format!("{ratio:.3}")).collect();
        format!(
            "{name:<12}{} ms a signature\n  bare threads/s  {}\n  measured/s      {}\n  ratios          {}: median {:.3} \
             (bare threads against themselves {:.3}, spread {:.3})\n",
            self.delay_ms,
            rounds(0),
            rounds(1),
            ratios.join(" "),
            self.paired.ratio,
            self.paired.same_ratio,
            self.paired.same_spread
        )
    }
}

/// Everything of one run.
#[derive(Debug, Clone, Serialize)]
pub struct SlowReport {
    /// Signatures of the HSM room alone to those of bare threads, with 2 ms each.
    pub fraction_of_raw: f64,
    /// Certificates of the daemon to signatures of bare threads, with 10 ms each.
    pub end_to_end_fraction: f64,
    /// Sign lanes, and bare threads.
    pub lanes: usize,
    /// Requests under way at once.
    pub outstanding: usize,
    /// Agents, each with a connection.
    pub connections: usize,
    /// C_Sign is called to learn a length, which costs the device nothing, and to sign.
    pub c_sign_calls_per_signature: f64,
    /// The HSM room alone.
    pub room: AgainstRaw,
    /// The daemon.
    pub end_to_end: AgainstRaw,
    /// Renewals within the windows.
    pub certificates: usize,
    /// Requests that were told to come back later, within the windows. They wait as long as they were told.
    pub turned_away: u64,
    /// Of the renewals.
    pub latency: Latency,
    /// Each with its bound.
    pub goals: Vec<Goal>,
    /// Disk, configuration, build.
    #[serde(flatten)]
    pub ground: Ground,
}

/// Runs it and tells `progress` what is being done.
///
/// # Errors
/// When anything refuses or fails: a figure of half a run is none.
pub async fn slow_hsm(plan: &SlowPlan, mut progress: impl FnMut(&str)) -> Result<SlowReport, Failed> {
    std::fs::create_dir_all(&plan.work)?;
    let site = Site::new(plan.work.clone(), plan.work.clone())?;
    let binary = std::env::current_exe()?;
    let fsync_before = disk::fsync(&plan.work)?;
    let wants = Wants { fault_module: Some(&plan.fault_module), lanes: Some(plan.lanes), ..Wants::default() };
    let house = House::build(&site, "slow", &binary, wants).await?;

    progress("the HSM room alone, 2 ms a signature, against bare threads");
    let (room, calls) = room_alone(plan, &house).await?;
    progress("the daemon end to end, 10 ms a signature, against bare threads");
    let daemon = end_to_end(plan, &house).await?;

    let fsync_after = disk::fsync(&plan.work)?;
    let (fraction_of_raw, end_to_end_fraction) = (room.paired.ratio, daemon.against.paired.ratio);
    Ok(SlowReport {
        fraction_of_raw,
        end_to_end_fraction,
        lanes: plan.lanes,
        outstanding: plan.outstanding,
        connections: plan.connections,
        c_sign_calls_per_signature: calls,
        room,
        end_to_end: daemon.against,
        certificates: daemon.latencies.len(),
        turned_away: daemon.turned_away,
        latency: Latency::of(daemon.latencies),
        goals: vec![
            Goal::at_least("HSM room alone, 2 ms: fraction of bare threads", fraction_of_raw, FRACTION_OF_RAW_MIN),
            Goal::at_least("end to end, 10 ms: fraction of bare threads", end_to_end_fraction, END_TO_END_FRACTION_MIN),
        ],
        ground: Ground::new((fsync_before, fsync_after), &house.config, plan.revision.clone()),
    })
}

async fn room_alone(plan: &SlowPlan, house: &House) -> Result<(AgainstRaw, f64), Failed> {
    house.delay_signatures(ROOM_DELAY)?;
    let (mut rounds, mut calls) = (Vec::new(), 0.0);
    for _ in 0..plan.rounds {
        let raw = raw_signatures(house, ROOM_SIGNATURES).await?.per_second();
        let room = room_signatures(house, plan.outstanding).await?;
        let again = raw_signatures(house, ROOM_SIGNATURES).await?.per_second();
        calls = room.c_sign_calls_per_signature.ok_or("the fault module did not count")?;
        rounds.push([raw, room.signatures.per_second(), again]);
    }
    Ok((AgainstRaw::new(ROOM_DELAY, rounds), calls))
}

async fn room_signatures(house: &House, outstanding: usize) -> Result<RoomSignatures, Failed> {
    let mut command = house.command();
    command.args(["bench", "token", "room", "--lanes", &house.config.authority.lanes.to_string()]);
    command.args(["--count", &ROOM_SIGNATURES.to_string(), "--outstanding", &outstanding.to_string()]);
    command.arg("--module").arg(&house.module).arg("--pin-file").arg(house.pin_file());
    command.arg("--fault-socket").arg(house.fault_socket()).env("KEYWARD_SHIM_SOCKET", house.fault_socket());
    Ok(serde_json::from_slice(&ran(&mut command).await?)?)
}

/// What the daemon showed.
struct EndToEnd {
    against: AgainstRaw,
    latencies: Vec<Duration>,
    turned_away: u64,
}

/// The daemon is idle while the bare threads sign, but for its canary.
async fn end_to_end(plan: &SlowPlan, house: &House) -> Result<EndToEnd, Failed> {
    house.delay_signatures(END_TO_END_DELAY)?;
    let running = house.start().await?;
    let mut fleet = Fleet::enrol(&running.operator, plan.connections, 1 + RENEWALS).await?;
    fleet.all(Step::Attest, ATTESTING).await?;
    fleet.all(Step::Connect, ATTESTING).await?;
    let pool = Pool::of(fleet.into_renewers()?);
    let (mut rounds, mut latencies, mut turned_away) = (Vec::new(), Vec::new(), 0);
    for _ in 0..plan.rounds {
        let raw = raw_signatures(house, RAW_SIGNATURES).await?.per_second();
        let busy = keep_busy(&pool, plan.outstanding, WINDOW).await?;
        let again = raw_signatures(house, RAW_SIGNATURES).await?.per_second();
        #[expect(clippy::cast_precision_loss, reason = "figures, not accounts")]
        rounds.push([raw, busy.issued.len() as f64 / busy.seconds, again]);
        latencies.extend(busy.issued);
        turned_away += busy.turned_away;
    }
    running.stop().await?;
    Ok(EndToEnd { against: AgainstRaw::new(END_TO_END_DELAY, rounds), latencies, turned_away })
}

impl SlowReport {
    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = self.ground.disk_text();
        let _ = writeln!(
            text,
            "            {} lanes, {} outstanding, {:.2} calls of C_Sign a signature (asking for a length costs the device nothing)\n",
            self.lanes, self.outstanding, self.c_sign_calls_per_signature
        );
        text += &self.room.text("HSM room");
        text += &self.end_to_end.text("end to end");
        let _ = writeln!(
            text,
            "  {} certificates, p50 {:.1} ms, p99 {:.1} ms; {} requests were told to come back later\n",
            self.certificates, self.latency.p50_ms, self.latency.p99_ms, self.turned_away
        );
        text + &goals_text(&self.goals) + &self.ground.build_text()
    }
}

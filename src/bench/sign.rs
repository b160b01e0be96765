//! What signatures of agents' keys cost: recorded, counted, in batches; with one key each, and among a hundred thousand.

use std::fmt::Write as _;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde::Serialize;
use tokio::task::JoinSet;
use tonic::transport::Channel;

use super::Failed;
use super::disk;
use super::figures::{Latency, percentile};
use super::fleet::{Fleet, Step};
use super::house::{House, Running, Site, Wants};
use super::phase::{Difference, Snapshot};
use super::report::{Goal, Ground, goals_text};
use super::standing;
use crate::proto::key_service_client::KeyServiceClient;
use crate::proto::{Content, CreateKeyRequest, KeyAccounting, KeyPurpose, KeyStorage, SignBatchRequest, SignRequest, content};

/// Signatures of a batch.
const BATCH: usize = 100;
/// What differs from the stock configuration: few agents ask for what a fleet would.
const LIMITS: [&str; 2] = ["signatures_per_second = 1000000", "key_changes_per_second = 100000"];
/// Signatures, one after the other, whose latency tells what loading a key costs.
const ALONE: usize = 1000;

type Signer = KeyServiceClient<Channel>;

/// What to measure.
#[derive(Debug, Clone)]
pub struct SignPlan {
    /// Each with a connection.
    pub agents: usize,
    /// Calls under way at once.
    pub outstanding: usize,
    /// Of each kind.
    pub signatures: usize,
    /// Wrapped keys that are made.
    pub keys: usize,
    /// Everything is made below it.
    pub work: PathBuf,
    /// The source's revision, for the report.
    pub revision: Option<String>,
}

/// One kind of call.
#[derive(Debug, Clone, Serialize)]
pub struct SignPhase {
    /// recorded, counted, batch, create, cached, uncached.
    pub name: &'static str,
    /// Signatures, or keys.
    pub count: usize,
    /// From the first call to the last answer.
    pub seconds: f64,
    /// Their quotient.
    pub per_second: f64,
    /// Of a call.
    #[serde(flatten)]
    pub latency: Latency,
    /// User and system time of the daemon, for one.
    pub server_cpu_us: f64,
    /// One C_Sign and one verification, measured around these very calls; 0 where nothing was signed.
    pub floor_cpu_us: f64,
    /// The ledger's writer thread, for one.
    pub ledger_cpu_us: f64,
    /// Transactions of the ledger.
    pub commits_per_second: f64,
    /// Growth of the ledger's file, for one.
    pub ledger_bytes: f64,
    /// VmRSS at the end.
    pub rss_mib: f64,
}

impl SignPhase {
    fn ratio(&self) -> f64 {
        self.server_cpu_us / self.floor_cpu_us
    }
}

/// Everything of one run.
#[derive(Debug, Clone, Serialize)]
pub struct SignReport {
    /// Recorded.
    pub signatures_per_second: f64,
    /// Server CPU of a recorded signature to one C_Sign and one verification.
    pub recorded_cpu_ratio: f64,
    /// The same of a counted one.
    pub counted_cpu_ratio: f64,
    /// One C_Sign and one verification to the server CPU of a signature in a batch of 100.
    pub batch_fraction_of_floor: f64,
    /// Wrapped keys, each durable when it is answered.
    pub created_keys_per_second: f64,
    /// Server CPU of a signature by a key in memory, while there are all the keys, to that before they were made.
    pub cached_cpu_ratio: f64,
    /// p50 of signatures one after the other: by keys that are not in memory, less that by a key that is.
    pub uncached_added_ms: f64,
    /// The check of standing, epoch, state and expiry.
    pub standing_check_ns: f64,
    /// VmRSS that the keys took.
    pub keys_rss_mib: f64,
    /// Keys that were made.
    pub keys: usize,
    /// Calls under way at once.
    pub outstanding: usize,
    /// In the order in which they were run.
    pub phases: Vec<SignPhase>,
    /// Each with its bound.
    pub goals: Vec<Goal>,
    /// Limits that are not the stock ones.
    pub limits: [&'static str; 2],
    /// Disk, configuration, build.
    #[serde(flatten)]
    pub ground: Ground,
}

impl SignReport {
    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = format!("{}\n", self.ground.disk_text());
        let _ = writeln!(
            text,
            "{:<12}{:>9}{:>9}{:>9}{:>9}{:>10}{:>10}{:>8}{:>10}{:>9}",
            "", "1/s", "p50 ms", "p99", "CPU us", "floor us", "ledger us", "commit/s", "bytes", "MiB"
        );
        for phase in &self.phases {
            let _ = writeln!(
                text,
                "{:<12}{:>9.0}{:>9.2}{:>9.2}{:>9.1}{:>10.1}{:>10.1}{:>8.0}{:>10.0}{:>9.1}",
                phase.name,
                phase.per_second,
                phase.latency.p50_ms,
                phase.latency.p99_ms,
                phase.server_cpu_us,
                phase.floor_cpu_us,
                phase.ledger_cpu_us,
                phase.commits_per_second,
                phase.ledger_bytes,
                phase.rss_mib
            );
        }
        let limits = format!("Stock configuration but for the limits {}.\n", self.limits.join(" and "));
        text + "\n" + &goals_text(&self.goals) + &self.ground.build_text() + &limits
    }
}

/// Runs it and tells `progress` what is being done.
///
/// # Errors
/// When anything refuses or fails: a figure of half a run is none.
pub async fn sign(plan: &SignPlan, mut progress: impl FnMut(&str)) -> Result<SignReport, Failed> {
    std::fs::create_dir_all(&plan.work)?;
    let site = Site::new(plan.work.clone(), plan.work.clone())?;
    let fsync_before = disk::fsync(&plan.work)?;
    let standing_check_ns = standing::check_ns(&plan.work).await?;
    let house = House::build(&site, "sign", &std::env::current_exe()?, Wants { limits: &LIMITS, ..Wants::default() }).await?;
    let mut running = house.start().await?;
    let mut fleet = Fleet::enrol(&running.operator, plan.agents, 1).await?;
    fleet.all(Step::Attest, plan.outstanding).await?;
    let signers: Arc<[Signer]> = fleet.into_signers().await?.into();
    for signer in signers.iter() {
        for (name, accounting) in [("recorded", KeyAccounting::Recorded), ("counted", KeyAccounting::Counted)] {
            create(signer.clone(), name.to_owned(), accounting).await?;
        }
    }
    let mut bench = Bench { plan, house: &house, running: &mut running, signers, phases: Vec::new() };
    progress("one key each: recorded, counted, in batches of 100");
    // Once before it counts: sessions, caches, lanes.
    bench.measured("warm", plan.signatures / 10, 1, Call::Recorded).await?;
    bench.phases.clear();
    let recorded = bench.measured("recorded", plan.signatures, 1, Call::Recorded).await?;
    let counted = bench.measured("counted", plan.signatures, 1, Call::Counted).await?;
    let batch = bench.measured("batch", plan.signatures.div_ceil(BATCH), BATCH, Call::Batch).await?;
    progress(&format!("{} wrapped keys are made", plan.keys));
    let created = bench.measured("create", plan.keys, 1, Call::Create).await?;
    progress("the keys of before, among all of them");
    let cached = bench.measured("cached", plan.signatures, 1, Call::Recorded).await?;
    let near = bench.alone(|_, _| "recorded".to_owned()).await?;
    let each = plan.keys.div_ceil(plan.agents);
    // A step that visits keys far from one another, each once.
    let far = bench.alone(|turn, agent| format!("key-{}", (turn * 7919 + agent) % each.max(1))).await?;
    let phases = std::mem::take(&mut bench.phases);
    running.stop().await?;
    let p50 = |sorted: &[Duration]| percentile(sorted, 500).map_or(0.0, |value| value.as_secs_f64() * 1e3);
    let uncached_added_ms = p50(&far) - p50(&near);
    let cached_cpu_ratio = cached.server_cpu_us / recorded.server_cpu_us;
    let batch_fraction_of_floor = 1.0 / batch.ratio();
    let goals = vec![
        Goal::at_most("recorded signatures: CPU to floor", recorded.ratio(), 1.7),
        Goal::at_most("counted signatures: CPU to floor", counted.ratio(), 1.5),
        Goal::at_least("batches of 100: floor to CPU", batch_fraction_of_floor, 0.8),
        Goal::at_least("keys created per second", created.per_second, 1000.0),
        Goal::at_most("keys in memory among many: CPU to that of few", cached_cpu_ratio, 1.1),
        Goal::at_most("keys not in memory: added p50, ms", uncached_added_ms, 1.0),
        Goal::at_most("check of standing, ns", standing_check_ns, 1000.0),
    ];
    let ground = Ground::new((fsync_before, disk::fsync(&plan.work)?), &house.config, plan.revision.clone());
    Ok(SignReport {
        signatures_per_second: recorded.per_second,
        recorded_cpu_ratio: recorded.ratio(),
        counted_cpu_ratio: counted.ratio(),
        batch_fraction_of_floor,
        created_keys_per_second: created.per_second,
        cached_cpu_ratio,
        uncached_added_ms,
        standing_check_ns,
        keys_rss_mib: created.rss_mib - batch.rss_mib,
        keys: plan.keys,
        outstanding: plan.outstanding,
        phases,
        goals,
        limits: LIMITS,
        ground,
    })
}

/// What is called, over and over.
#[derive(Debug, Clone, Copy)]
enum Call {
    Recorded,
    Counted,
    Batch,
    Create,
}

struct Bench<'a> {
    plan: &'a SignPlan,
    house: &'a House,
    running: &'a mut Running,
    signers: Arc<[Signer]>,
    phases: Vec<SignPhase>,
}

impl Bench<'_> {
    /// `calls` of a kind, each of `weight` signatures or keys.
    #[expect(clippy::cast_precision_loss, reason = "figures, not accounts")]
    async fn measured(&mut self, name: &'static str, calls: usize, weight: usize, call: Call) -> Result<SignPhase, Failed> {
        let before = Snapshot::take(self.house, self.running).await?;
        let from = Instant::now();
        let latencies = self.all(calls, call).await?;
        let seconds = from.elapsed().as_secs_f64();
        let after = Snapshot::take(self.house, self.running).await?;
        let count = calls * weight;
        let cpu = Difference { before: &before.cpu, after: &after.cpu };
        let each = |nanos: u64| nanos as f64 / 1e3 / count.max(1) as f64;
        let phase = SignPhase {
            name,
            count,
            seconds,
            per_second: count as f64 / seconds,
            latency: Latency::of(latencies),
            server_cpu_us: each(cpu.of(|cpu| cpu.process_nanos)),
            floor_cpu_us: cpu.mean_us(|cpu| (cpu.sign_nanos, cpu.sign_count))
                + cpu.mean_us(|cpu| (cpu.verify_own_nanos, cpu.verify_own_count)),
            ledger_cpu_us: each(cpu.of(|cpu| cpu.ledger_nanos)),
            commits_per_second: after.commits.saturating_sub(before.commits) as f64 / seconds,
            ledger_bytes: after.ledger_bytes.saturating_sub(before.ledger_bytes) as f64 / count.max(1) as f64,
            rss_mib: super::mib(self.running.rss_kib()?),
        };
        self.phases.push(phase.clone());
        Ok(phase)
    }

    /// As many under way as planned, each agent as often as the next.
    async fn all(&self, calls: usize, call: Call) -> Result<Vec<Duration>, Failed> {
        let taken = Arc::new(AtomicUsize::new(0));
        let mut slots = JoinSet::new();
        for _ in 0..self.plan.outstanding {
            let (signers, taken) = (Arc::clone(&self.signers), Arc::clone(&taken));
            slots.spawn(async move {
                let mut took = Vec::new();
                loop {
                    let number = taken.fetch_add(1, Ordering::Relaxed);
                    if number >= calls {
                        return Ok::<_, Failed>(took);
                    }
                    let signer = signers[number % signers.len()].clone();
                    let from = Instant::now();
                    match call {
                        Call::Recorded => one(signer, "recorded".to_owned(), number).await?,
                        Call::Counted => one(signer, "counted".to_owned(), number).await?,
                        Call::Batch => batch(signer, number).await?,
                        Call::Create => {
                            let name = format!("key-{}", number / signers.len());
                            create(signer, name, KeyAccounting::Recorded).await?;
                        }
                    }
                    took.push(from.elapsed());
                }
            });
        }
        let mut all = Vec::with_capacity(calls);
        while let Some(slot) = slots.join_next().await {
            all.extend(slot??);
        }
        Ok(all)
    }

    /// One after the other, by the key that `name` says for each turn and agent. Sorted.
    async fn alone(&self, name: impl Fn(usize, usize) -> String) -> Result<Vec<Duration>, Failed> {
        let mut took = Vec::with_capacity(ALONE);
        for turn in 0..ALONE {
            let agent = turn % self.signers.len();
            let (signer, key) = (self.signers[agent].clone(), name(turn / self.signers.len(), agent));
            let from = Instant::now();
            one(signer, key, turn).await?;
            took.push(from.elapsed());
        }
        took.sort_unstable();
        Ok(took)
    }
}

fn digest(number: usize) -> Content {
    let mut digest = vec![0x5a; 32];
    digest[..8].copy_from_slice(&number.to_be_bytes());
    Content { content: Some(content::Content::Digest(digest)) }
}

async fn one(mut signer: Signer, key: String, number: usize) -> Result<(), Failed> {
    signer.sign(SignRequest { key, content: Some(digest(number)) }).await?;
    Ok(())
}

async fn batch(mut signer: Signer, number: usize) -> Result<(), Failed> {
    let contents = (0..BATCH).map(|at| digest(number * BATCH + at)).collect();
    let answer = signer.sign_batch(SignBatchRequest { key: "recorded".to_owned(), contents }).await?.into_inner();
    if answer.signatures.len() == BATCH { Ok(()) } else { Err("a batch came back short".into()) }
}

async fn create(mut signer: Signer, name: String, accounting: KeyAccounting) -> Result<(), Failed> {
    let request = CreateKeyRequest {
        name,
        purpose: KeyPurpose::RawDigest.into(),
        storage: KeyStorage::Wrapped.into(),
        accounting: accounting.into(),
        ..CreateKeyRequest::default()
    };
    signer.create_key(request).await?;
    Ok(())
}

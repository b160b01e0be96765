//! `keyward bench rotation`: authorities replaced by the hundred while agents are issued certificates all the time. What must not be: a
//! request that is not granted, a certificate that somebody with a bundle of the last refresh would reject, an object left in a token.
//!
//! Days pass by a library for LD_PRELOAD that moves the wall clock of the daemon and of this process alike; an operator then accepts the
//! clock, as after any jump.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message as _;
use serde::Serialize;
use tokio::sync::watch;
use tonic::Code;

use super::house::{House, Running, Site, Wants};
use super::report::goals_text;
use super::rotation_peers::{Agent, COMPLAINTS_MAX, Judge, Moment, Run};
use super::{Failed, Goal, Ground, disk};
use crate::ledger::Reader;
use crate::model::SecretBytes;
use crate::proto::entry::Body;
use crate::proto::{self, AuthorityState, EnrolRequest, Entry, Finding, Purpose, ReconcileRequest, RotateRequest};

/// What the preload library reads the clock's offset from.
const CONTROL: &str = "KEYWARD_PRELOAD_CONTROL";
/// What passes between two rotations: a tenth of a root's time in the bundle, an eighth of a certificate's life.
const HOP: Duration = Duration::from_secs(75);
/// An agent's renewals in that time: within what it may hold at once, with room for those whose outcome a crash left unknown.
const RENEWALS_PER_HOP: usize = 5;
/// The most that can be configured.
const LIVE_CERTIFICATES: usize = 64;
/// Longest wait for all agents to have renewed once between two rotations.
const CATCH_UP: Duration = Duration::from_secs(90);
/// A daemon is killed within so many milliseconds of a rotation's beginning.
const KILL_WITHIN_MS: u64 = 256;

/// What to run.
#[derive(Debug, Clone)]
pub struct RotationPlan {
    /// The preload library.
    pub clock: PathBuf,
    /// Rotations to be made.
    pub rotations: usize,
    /// Daemons killed in the midst of one, evenly spread.
    pub kills: usize,
    /// Agents that renew all the time.
    pub agents: usize,
    /// Everything is made below it.
    pub work: PathBuf,
    /// The source's revision, for the report.
    pub revision: Option<String>,
}

/// Everything of one run.
#[derive(Debug, Clone, Serialize)]
pub struct RotationReport {
    /// Authorities that became active in another's place, by the ledger.
    pub rotations: usize,
    /// Of them roots, issuing authorities, ledger keys, token-signing keys.
    pub rotated: [usize; 4],
    /// Requests that were not granted; while daemons are killed, those that were not granted afterwards either.
    pub failed_issues: usize,
    /// Certificates that some bundle of the last refresh does not verify, at any moment of their lives.
    pub rejected: usize,
    /// Strays in the tokens, and keys that are missing there.
    pub orphans: usize,
    /// What `keyward ledger verify` found wrong, by the ledger key of the beginning.
    pub violations: usize,
    /// Certificates.
    pub issued: usize,
    /// Verifications by webpki.
    pub verified: usize,
    /// And by openssl.
    pub verified_by_openssl: usize,
    /// Bundles seen.
    pub bundles: usize,
    /// Daemons killed.
    pub kills: usize,
    /// That passed by the daemon's clock.
    pub hours: f64,
    /// That passed.
    pub seconds: f64,
    /// What went wrong, in words: the first of it.
    pub complaints: Vec<String>,
    /// Each with its bound.
    pub goals: Vec<Goal>,
    /// Disk, configuration, build.
    #[serde(flatten)]
    pub ground: Ground,
}

/// Runs this command again with the clock under it; returns only where that is so already, or cannot be.
///
/// # Errors
/// When the program cannot be run again.
pub fn under_clock(clock: &Path, work: &Path) -> Result<(), Failed> {
    if std::env::var_os(CONTROL).is_some() {
        return Ok(());
    }
    std::fs::create_dir_all(work)?;
    let control = work.canonicalize()?.join(format!("clock-{}", std::process::id()));
    let mut again = std::process::Command::new(std::env::current_exe()?);
    again.args(std::env::args_os().skip(1)).env("LD_PRELOAD", clock.canonicalize()?).env(CONTROL, control);
    Err(again.exec().into())
}

/// The clock of this process and its daemon.
struct Clock {
    control: PathBuf,
    passed: Duration,
}

impl Clock {
    fn pass(&mut self, time: Duration) -> Result<(), Failed> {
        self.passed += time;
        let new = self.control.with_extension("new");
        std::fs::write(&new, format!("realtime_offset_ms={}\n", self.passed.as_millis()))?;
        Ok(std::fs::rename(new, &self.control)?)
    }
}

impl Drop for Clock {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.control);
    }
}

/// Runs it and tells `progress` what is being done. [`under_clock`] comes first.
///
/// # Errors
/// When anything fails but what is counted.
pub async fn rotation(plan: &RotationPlan, mut progress: impl FnMut(&str)) -> Result<RotationReport, Failed> {
    std::fs::create_dir_all(&plan.work)?;
    let control = PathBuf::from(std::env::var_os(CONTROL).ok_or("the clock is not under this process")?);
    let mut clock = Clock { control: control.clone(), passed: Duration::ZERO };
    let site = Site::new(plan.work.clone(), plan.work.clone())?;
    let fsync_before = disk::fsync(&plan.work)?;
    let library = plan.clock.canonicalize()?;
    let wants = Wants { clock: Some((&library, &control)), live_certificates: Some(LIVE_CERTIFICATES), ..Wants::default() };
    let house = House::build(&site, "rotation", &std::env::current_exe()?, wants).await?;
    let pinned = plan.work.canonicalize()?.join(format!("pinned-{}.vkey", std::process::id()));
    std::fs::copy(house.config.paths.state.join("ledger.vkey"), &pinned)?;
    let mut running = house.start().await?;

    let judge = Arc::new(Judge::new(&plan.work)?);
    let (hops, hopped) = watch::channel(Moment { address: house.address()?, hop: 0, over: false });
    let pause = Arc::new(tokio::sync::RwLock::new(()));
    let (renewed, mut caught_up) = watch::channel(vec![0; plan.agents]);
    let mut agents = tokio::task::JoinSet::new();
    for number in 0..plan.agents {
        let ask = EnrolRequest { agent: format!("bench/{number}"), ..EnrolRequest::default() };
        let join = running.operator.enrol(ask).await?.into_inner().join.ok_or("an enrolment without a join file")?;
        let agent = Agent::attest(join, Arc::clone(&judge)).await?;
        let run = Run { moments: hopped.clone(), pause: Arc::clone(&pause), renewed: renewed.clone(), number };
        agents.spawn(agent.renew_on(RENEWALS_PER_HOP, run, plan.kills > 0));
    }

    let from = Instant::now();
    let (mut kills, mut told) = (0, 0);
    let mut actives = Actives::default();
    actives.look(&mut running).await?;
    for number in 0.. {
        // A hop may replace more than one: the last kill comes all the same.
        if actives.replaced >= plan.rotations && kills >= plan.kills {
            break;
        }
        if actives.replaced >= told {
            progress(&format!("{} rotations, {} certificates", actives.replaced, judge.issued()));
            told += 100;
        }
        let kill_now = kills < plan.kills && (actives.replaced + 1) * plan.kills / plan.rotations > kills;
        if kill_now {
            kills += 1;
            running = killed(&house, running, purpose_of(number)).await?;
            hops.send_modify(|moment| moment.address = house.address().unwrap_or_default());
        } else {
            rotate(&mut running, purpose_of(number)).await.map_err(|error| house.said(&error.to_string()))?;
        }
        // A client that follows the refresh hint comes by at least every fourth time; an agent does each time.
        let all_were_here = caught_up.wait_for(|renewed| renewed.iter().all(|hop| *hop > number));
        tokio::time::timeout(CATCH_UP, all_were_here).await.map_err(|_| "an agent is stuck")??;
        {
            // A request meets the clock before the jump or after it: never the jump.
            let _nobody_asks = pause.write().await;
            clock.pass(HOP)?;
            running.operator.accept_clock(proto::AcceptClockRequest { reason: "time passes".into() }).await?;
        }
        hops.send_modify(|moment| moment.hop += 1);
        actives.look(&mut running).await?;
    }
    hops.send_modify(|moment| moment.over = true);
    let mut failed_issues = 0;
    while let Some(failed) = agents.join_next().await {
        failed_issues += failed?;
    }
    let seconds = from.elapsed().as_secs_f64();
    progress("the tokens are held against the ledger, the ledger against what it promises");
    let mut strays = running.operator.reconcile(ReconcileRequest::default()).await?.into_inner().strays;
    strays.retain(|stray| matches!(stray.finding(), Finding::Stray | Finding::Missing));
    running.stop().await?;
    let found = violations(&house, &pinned).await?;
    let (violations, mut complaints) = (found.len(), judge.complaints());
    complaints.extend(found.into_iter().take(COMPLAINTS_MAX));
    let rotated = rotated(&house.ledger())?;
    let _ = std::fs::remove_file(&pinned);
    let fsync_after = disk::fsync(&plan.work)?;
    let (rotations, rejected, orphans) = (rotated.iter().sum(), judge.rejected(), strays.len());
    #[expect(clippy::cast_precision_loss, reason = "figures, not accounts")]
    let goals = [
        ("requests not granted", failed_issues),
        ("certificates rejected", rejected),
        ("orphans", orphans),
        ("violations", violations),
    ]
    .map(|(name, value)| Goal::at_most(name, value as f64, 0.0));
    Ok(RotationReport {
        rotations,
        rotated,
        failed_issues,
        rejected,
        orphans,
        violations,
        issued: judge.issued(),
        verified: judge.verified(),
        verified_by_openssl: judge.verified_by_openssl(),
        bundles: judge.bundles(),
        kills,
        hours: clock.passed.as_secs_f64() / 3600.0,
        seconds,
        complaints,
        goals: goals.into(),
        ground: Ground::new((fsync_before, fsync_after), &house.config, plan.revision.clone()),
    })
}

/// Who is active, and how often that was somebody else than before.
#[derive(Default)]
struct Actives {
    keys: BTreeMap<i32, Vec<u8>>,
    replaced: usize,
}

impl Actives {
    async fn look(&mut self, running: &mut Running) -> Result<(), Failed> {
        let all = running.operator.get_authorities(proto::GetAuthoritiesRequest {}).await?.into_inner().authorities;
        for one in all.into_iter().filter(|one| one.state() == AuthorityState::Active) {
            if let Some(before) = self.keys.insert(one.purpose, one.key_id.clone()) {
                self.replaced += usize::from(before != one.key_id);
            }
        }
        Ok(())
    }
}

/// Mostly issuing authorities; of the others each comes by while another is on its way.
fn purpose_of(number: usize) -> Purpose {
    match number % 20 {
        5 => Purpose::Root,
        10 => Purpose::Ledger,
        15 => Purpose::TokenSigning,
        _ => Purpose::Issuing,
    }
}

async fn rotate(running: &mut Running, purpose: Purpose) -> Result<(), Failed> {
    let request = RotateRequest { purpose: purpose.into(), now: true, reason: "bench".into() };
    match running.operator.rotate(request).await {
        Ok(_) => Ok(()),
        // The one before is not through yet, or one that had to wait goes on by itself.
        Err(status) if status.code() == Code::FailedPrecondition || status.code() == Code::Unavailable => Ok(()),
        Err(status) => Err(status.into()),
    }
}

/// A rotation is begun, the daemon dies of it, another one starts.
async fn killed(house: &House, running: Running, purpose: Purpose) -> Result<Running, Failed> {
    let mut operator = running.operator.clone();
    let begun = tokio::spawn(async move {
        let request = RotateRequest { purpose: purpose.into(), now: true, reason: "bench".into() };
        operator.rotate(request).await.map(drop)
    });
    let random = SecretBytes::random::<2>();
    let moment = u64::from(u16::from_be_bytes([random.reveal()[0], random.reveal()[1]])) % KILL_WITHIN_MS;
    tokio::time::sleep(Duration::from_millis(moment)).await;
    running.kill().await?;
    // Granted, refused or cut off: what it came to is judged by what is there afterwards.
    let _ = begun.await;
    house.start_after_kill().await
}

/// `keyward ledger verify` by a key that has been followed since: what it finds, in words.
async fn violations(house: &House, pinned: &Path) -> Result<Vec<String>, Failed> {
    let mut verify = house.command();
    verify.args(["ledger", "verify"]).arg(house.ledger()).arg("--key").arg(pinned).args(["--signatures", "--format", "json"]);
    let output = verify.output().await?;
    let said = || Failed::from(String::from_utf8_lossy(&output.stderr).trim().to_owned());
    let verdict: serde_json::Value = serde_json::from_slice(&output.stdout).map_err(|_| said())?;
    let found = verdict["violations"].as_array().ok_or_else(said)?;
    Ok(found.iter().map(|one| format!("entry {}: {}: {}", one["index"], one["rule"], one["detail"])).collect())
}

/// How many of each purpose became active in another's place.
fn rotated(ledger: &Path) -> Result<[usize; 4], Failed> {
    let reader = Reader::open(ledger)?;
    let (mut rotated, mut from) = ([0; 4], 0);
    loop {
        let page = reader.entries(from, 1000)?;
        if page.is_empty() {
            return Ok(rotated);
        }
        from += page.len() as u64;
        for bytes in page {
            let Some(Body::AuthorityStepped(step)) = Entry::decode(&bytes[..])?.body else { continue };
            if step.to() == AuthorityState::Active && !step.replaces.is_empty() {
                match step.purpose() {
                    Purpose::Root => rotated[0] += 1,
                    Purpose::Issuing => rotated[1] += 1,
                    Purpose::Ledger => rotated[2] += 1,
                    _ => rotated[3] += 1,
                }
            }
        }
    }
}

impl RotationReport {
    /// For people.
    #[must_use]
    pub fn text(&self) -> String {
        let mut text = self.ground.disk_text();
        let [roots, issuing, ledger, token_signing] = self.rotated;
        let _ = writeln!(
            text,
            "rotations   {} in {:.1} hours of the daemon's clock ({:.0} s): {roots} roots, {issuing} issuing, {ledger} ledger, {token_signing} \
             token-signing; {} daemons killed\n\
             issued      {} certificates; {} verifications by webpki, {} by openssl, against {} bundles\n",
            self.rotations,
            self.hours,
            self.seconds,
            self.kills,
            self.issued,
            self.verified,
            self.verified_by_openssl,
            self.bundles
        );
        for complaint in &self.complaints {
            let _ = writeln!(text, "{complaint}");
        }
        text + &goals_text(&self.goals) + &self.ground.build_text()
    }
}

//! `keyward agent run`: a command beside credentials that are kept fresh, and killed with them.

use std::collections::VecDeque;
use std::ffi::OsString;
use std::path::PathBuf;
use std::pin::{Pin, pin};
use std::process::{ExitCode, ExitStatus};
use std::sync::Arc;
use std::time::Duration;

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{Notify, mpsc};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use super::agent::refresh;
use super::agent_follow::{Heard, follow};
use super::render::time;
use super::{EXIT_REFUSED, Failure, Output};
use crate::client::store::{Card, holding_in};
use crate::client::{self, AgentDir, Client, JoinFile};
use crate::model::{Reason, UnixTime};

/// A wall clock that jumps or a suspended machine is noticed within this time.
const LOOK_AGAIN: Duration = Duration::from_secs(30);
/// A certificate whose authority went is replaced within this time, or a tenth of its life where that is less.
const SOON_MAX_MICROS: u64 = 180_000_000;
/// Between SIGTERM and SIGKILL.
const GRACE: Duration = Duration::from_secs(10);
/// The command waits so long for what the daemon says of its agent, where it says anything.
const FIRST_WORD: Duration = Duration::from_secs(1);
const BACK_OFF_FIRST: Duration = Duration::from_secs(1);
const BACK_OFF_MAX: Duration = Duration::from_secs(60);

/// What happens to the command when its files have changed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Reaction {
    /// It is sent this signal.
    Signal(Signal),
    /// It is ended and started again.
    Restart,
    /// Nothing: it reads the files by itself.
    Nothing,
}

impl Reaction {
    /// `signal:HUP`, `signal:USR1`, `signal:USR2`, `restart` or `none`; a clap value parser.
    pub(super) fn parse(text: &str) -> Result<Self, String> {
        match text {
            "restart" => Ok(Self::Restart),
            "none" => Ok(Self::Nothing),
            "signal:HUP" => Ok(Self::Signal(Signal::HUP)),
            "signal:USR1" => Ok(Self::Signal(Signal::USR1)),
            "signal:USR2" => Ok(Self::Signal(Signal::USR2)),
            _ => Err("write signal:HUP, signal:USR1, signal:USR2, restart or none".into()),
        }
    }
}

/// One command and its credentials.
pub(super) struct Supervisor {
    out: PathBuf,
    join: Option<PathBuf>,
    ttl_seconds: u32,
    on_renew: Reaction,
    on_bundle: Reaction,
    program: OsString,
    arguments: Vec<OsString>,
    grace: Duration,
}

/// The command as it runs.
struct Running {
    child: Child,
    /// It leads a group of its own.
    group: Option<Pid>,
    /// It was told to end, to be started again, and is killed at this moment.
    restarts: Option<Instant>,
}

/// What became of a turn of the supervisor's work.
enum Turn {
    /// Time passed.
    Waited,
    Renewed(Result<Card, client::Error>),
    Heard(Heard),
}

/// What ended a wait.
enum Event<T> {
    Exited(ExitStatus),
    /// Its grace is over.
    Overdue,
    Told(Signal),
    Done(T),
}

/// The signals that are passed on.
struct Signals {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
    hang_up: tokio::signal::unix::Signal,
}

impl Signals {
    fn listen() -> std::io::Result<Self> {
        Ok(Self {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
            hang_up: signal(SignalKind::hangup())?,
        })
    }

    /// Waits for `work`, the end of the command, the end of its grace or a signal, whichever comes first; `work` is dropped in the latter
    /// cases.
    async fn or<T>(&mut self, running: &mut Running, work: impl Future<Output = T>) -> std::io::Result<Event<T>> {
        let overdue = running.restarts;
        Ok(tokio::select! {
            status = running.child.wait() => Event::Exited(status?),
            () = at(overdue) => Event::Overdue,
            _ = self.terminate.recv() => Event::Told(Signal::TERM),
            _ = self.interrupt.recv() => Event::Told(Signal::INT),
            _ = self.hang_up.recv() => Event::Told(Signal::HUP),
            done = work => Event::Done(done),
        })
    }
}

impl Supervisor {
    /// After a renewal, and with a newer bundle, `command` is told as asked; for the bundle as for a renewal where nothing else is.
    pub(super) fn new(
        out: PathBuf,
        join: Option<PathBuf>,
        ttl_seconds: u32,
        (on_renew, on_bundle): (Reaction, Option<Reaction>),
        mut command: Vec<OsString>,
    ) -> Result<Self, Failure> {
        if command.is_empty() {
            return Err(Failure::usage("name the command to run after --"));
        }
        let program = command.remove(0);
        let on_bundle = on_bundle.unwrap_or(on_renew);
        Ok(Self { out, join, ttl_seconds, on_renew, on_bundle, program, arguments: command, grace: GRACE })
    }

    pub(super) async fn run(self, output: &mut Output) -> Result<ExitCode, Failure> {
        let mut card = self.first_credentials(output).await?;
        let (tell, mut heard) = mpsc::channel(1);
        let renewed = Arc::new(Notify::new());
        // Ends when dropped.
        let mut following = JoinSet::new();
        following.spawn(follow(self.out.clone(), tell, Arc::clone(&renewed)));
        // What comes before the command does is for the command.
        let mut signals = Signals::listen()?;
        let mut due = due(&card, UnixTime::wall(), random());
        let mut bundle = card.bundle_sequence;
        let (first, mut unheard) = self.first_word(&mut heard).await?;
        match first {
            // It starts with this one, and is told of nothing.
            Some(Heard::Bundle(sequence)) if sequence > bundle => {
                output.say(&format!("keyward: the bundle has changed, sequence {sequence}"));
                bundle = sequence;
                due = due.min(self.left(&card, output));
            }
            other => unheard.extend(other),
        }
        let mut running = self.start()?;
        let mut back_off = BackOff::default();
        // What the renewal under way has failed of and is tried again in spite of.
        let mut said = String::new();
        // The certificate whose authority is known to leave.
        let mut leaving = None;
        // A renewal under way: it goes on whatever happens meanwhile, and holds up nothing.
        let mut refreshing = pin!(None);
        loop {
            if refreshing.is_none() && UnixTime::wall() >= due {
                refreshing.set(Some(refresh(&self.out, self.ttl_seconds)));
            }
            let event = match unheard.pop_front() {
                Some(word) => Event::Done(Turn::Heard(word)),
                None => signals.or(&mut running, wait(due, &mut heard, refreshing.as_mut())).await?,
            };
            match event {
                Event::Exited(status) => {
                    // What it has spawned would go on with credentials that nobody takes away.
                    running.send(Signal::KILL);
                    if running.restarts.is_none() {
                        return Ok(exit_code(status));
                    }
                    running = self.start()?;
                }
                Event::Overdue => {
                    running.send(Signal::KILL);
                    running.restarts = Some(Instant::now() + self.grace);
                }
                Event::Told(Signal::HUP) => running.send(Signal::HUP),
                Event::Told(told) => {
                    running.send(told);
                    return Ok(exit_code(running.end(self.grace).await?));
                }
                Event::Done(Turn::Waited) => {}
                Event::Done(Turn::Renewed(Ok(new))) => {
                    card = new;
                    output.say(&format!("keyward: renewed {}, not after {}", card.agent, time(card.not_after_unix_seconds)));
                    due = self::due(&card, UnixTime::wall(), random());
                    back_off = BackOff::default();
                    said.clear();
                    renewed.notify_waiters();
                    // Where the bundle could not be followed, the renewal has brought it.
                    let newer = card.bundle_sequence > bundle;
                    bundle = bundle.max(card.bundle_sequence);
                    self.react(&mut running, &[Some(self.on_renew), newer.then_some(self.on_bundle)])?;
                }
                Event::Done(Turn::Renewed(Err(error))) if error.is_passing() => {
                    let wait = back_off.next(error.refused().and_then(|refused| refused.retry_after));
                    output.say(&format!("keyward: {error}; again in {} s", wait.as_secs().max(1)));
                    due = UnixTime(UnixTime::wall().0.saturating_add(u64::try_from(wait.as_micros()).unwrap_or(u64::MAX)));
                }
                // What it has is good: nobody on the path could end it else, and no full disk.
                Event::Done(Turn::Renewed(Err(error))) if spares_the_command(&error) && !card.is_expired(UnixTime::wall()) => {
                    let told = error.to_string();
                    if said != told {
                        let end = time(card.not_after_unix_seconds);
                        output.say(&format!("keyward: {told}; it is tried again until the certificate ends, at {end}"));
                        said = told;
                    }
                    let wait = u64::try_from(back_off.next(None).as_micros()).unwrap_or(u64::MAX);
                    let end = UnixTime::from_seconds(card.not_after_unix_seconds);
                    due = UnixTime(UnixTime::wall().0.saturating_add(wait)).min(end);
                }
                Event::Done(Turn::Renewed(Err(error)) | Turn::Heard(Heard::Contained(error))) => {
                    return self.give_up(running, error).await;
                }
                // Else a renewal brought it, and the command was told.
                Event::Done(Turn::Heard(Heard::Bundle(sequence))) if sequence > bundle => {
                    output.say(&format!("keyward: the bundle has changed, sequence {sequence}"));
                    bundle = sequence;
                    due = due.min(self.left(&card, output));
                    self.react(&mut running, &[Some(self.on_bundle)])?;
                }
                Event::Done(Turn::Heard(Heard::Bundle(_))) => {}
                // Said again and again; and of a certificate that has been replaced, for as long as its stream lasts.
                Event::Done(Turn::Heard(Heard::Leaving(certificate, within))) => {
                    if certificate == card.ledger_index && leaving != Some(certificate) {
                        leaving = Some(certificate);
                        let seconds = within.as_secs();
                        output.say(&format!(
                            "keyward: its authority is trusted for {seconds} s more; there will be another certificate before"
                        ));
                        due = due.min(before(within, UnixTime::wall(), random()));
                    }
                }
                // Else it is of a certificate that has been replaced meanwhile.
                Event::Done(Turn::Heard(Heard::Rejected(error, certificate))) if certificate == card.ledger_index => {
                    output.say(&format!("keyward: {error}; there will be another certificate soon"));
                    due = due.min(soon(&card, UnixTime::wall(), random()));
                }
                Event::Done(Turn::Heard(Heard::Rejected(..))) => {}
                // Nothing that the command reads has changed.
                Event::Done(Turn::Heard(Heard::Sequence(sequence))) => bundle = bundle.max(sequence),
                Event::Done(Turn::Heard(Heard::Silence(error))) => {
                    output.say(&format!("keyward: the bundle cannot be followed, renewals will bring it: {error}"));
                }
            }
        }
    }

    /// The credentials to start with: those in the directory, or the join file's.
    async fn first_credentials(&self, output: &mut Output) -> Result<Card, Failure> {
        let join = self.join.as_deref().map(JoinFile::read);
        let mut back_off = BackOff::default();
        let join = match join {
            // A join file is often gone once it was used; what is in the directory then counts.
            Some(Err(client::JoinFileError::Io { .. })) if self.out.join("current").exists() => None,
            Some(join) => Some(join?),
            None => None,
        };
        loop {
            let attempt = self.first_attempt(join.as_ref()).await;
            match attempt {
                Ok(card) => return Ok(card),
                Err(error) if error.is_passing() => {
                    let wait = back_off.next(error.refused().and_then(|refused| refused.retry_after));
                    output.say(&format!("keyward: {error}; again in {} s", wait.as_secs().max(1)));
                    sleep_until(Instant::now() + wait).await;
                }
                Err(error) => return Err(error.into()),
            }
        }
    }

    async fn first_attempt(&self, join: Option<&JoinFile>) -> Result<Card, client::Error> {
        let dir = AgentDir::open(&self.out, join.is_some())?;
        let holding = dir.holding_if_any()?;
        if let Some(join) = join {
            // The file of a release makes the old credentials void, fresh as they may look.
            if holding.as_ref().is_none_or(|holding| holding.card.token_id != join.token_id.to_string()) {
                return Client::new(dir).attest(join, self.ttl_seconds).await;
            }
        }
        let holding = dir.holding()?;
        if holding.card.half_life() > UnixTime::wall() && holding.ends_in_the_bundle() {
            return Ok(holding.card);
        }
        drop(dir);
        refresh(&self.out, self.ttl_seconds).await
    }

    /// What the daemon tells of the bundle first, if it answers soon, and what it said before. Fresh as the credentials look, the
    /// agent may be in quarantine: then the command does not start, however often a supervisor calls for it.
    async fn first_word(&self, heard: &mut mpsc::Receiver<Heard>) -> Result<(Option<Heard>, VecDeque<Heard>), Failure> {
        let (until, mut before) = (Instant::now() + FIRST_WORD, VecDeque::new());
        while let Ok(Some(word)) = timeout_at(until, heard.recv()).await {
            match word {
                Heard::Contained(error) => {
                    let failure = Failure::from(error).and_then_said(&format!("{} was not started", self.program.display()));
                    return Err(failure.with_code(EXIT_REFUSED));
                }
                Heard::Bundle(_) | Heard::Sequence(_) => return Ok((Some(word), before)),
                // No bundle comes with this certificate.
                Heard::Rejected(..) => return Ok((Some(word), before)),
                other => before.push_back(other),
            }
        }
        Ok((None, before))
    }

    /// When another certificate is due because the bundle has no authority for this one any more.
    fn left(&self, card: &Card, output: &mut Output) -> UnixTime {
        if holding_in(&self.out).is_ok_and(|holding| holding.ends_in_the_bundle()) {
            return UnixTime(u64::MAX);
        }
        output.say("keyward: its authority is not trusted any more; there will be another certificate soon");
        soon(card, UnixTime::wall(), random())
    }

    fn start(&self) -> Result<Running, Failure> {
        let out = std::path::absolute(&self.out)?;
        let child = Command::new(&self.program)
            .args(&self.arguments)
            .env("KEYWARD_SVID", out.join("svid.pem"))
            .env("KEYWARD_KEY", out.join("key.pem"))
            .env("KEYWARD_BUNDLE", out.join("bundle.pem"))
            // A group of its own: what the agent spawned goes with it.
            .process_group(0)
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| Failure::error(format!("{}: {error}", self.program.display())))?;
        let group = child.id().and_then(|pid| Pid::from_raw(i32::try_from(pid).ok()?));
        Ok(Running { child, group, restarts: None })
    }

    /// Once, where several ask for the same; a restart leaves nothing to be told. Of a command that has ended by itself the end counts: it is
    /// not done again.
    fn react(&self, running: &mut Running, asked: &[Option<Reaction>]) -> Result<(), Failure> {
        if running.restarts.is_some() || running.child.try_wait()?.is_some() {
            return Ok(());
        }
        if asked.contains(&Some(Reaction::Restart)) {
            running.send(Signal::TERM);
            running.restarts = Some(Instant::now() + self.grace);
            return Ok(());
        }
        for (at, reaction) in asked.iter().enumerate() {
            if let Some(Reaction::Signal(signal)) = reaction
                && !asked[..at].contains(reaction)
            {
                running.send(*signal);
            }
        }
        Ok(())
    }

    /// There will be no further certificate. A quarantined agent gets no time to say goodbye.
    async fn give_up(&self, mut running: Running, error: client::Error) -> Result<ExitCode, Failure> {
        let contained = is_contained(&error);
        let last = if contained { Signal::KILL } else { Signal::TERM };
        running.send(last);
        running.end(self.grace).await?;
        let failure = Failure::from(error).and_then_said(&format!("{} was ended", self.program.display()));
        Err(if contained { failure.with_code(EXIT_REFUSED) } else { failure })
    }
}

/// Whether everything was taken back from this agent.
pub(super) fn is_contained(error: &client::Error) -> bool {
    error.refused().is_some_and(|refused| {
        matches!(refused.reason, Reason::AgentQuarantined | Reason::CloneSuspected | Reason::EpochStale | Reason::DeniedMeanwhile)
    })
}

/// Whether keyward has not spoken. The other end has not proved to be the one of this trust domain: its certificate is wrong, or, where
/// the bound key is shown without a certificate, it says that ours is. Or the directory fails: what was sent from it is sent again as it was,
/// and brings the same answer.
fn spares_the_command(error: &client::Error) -> bool {
    matches!(error, client::Error::Untrusted { .. } | client::Error::Rejected { .. } | client::Error::Store(_))
}

impl Running {
    /// To the whole group.
    fn send(&self, signal: Signal) {
        if let Some(group) = self.group {
            // It may be gone already, which is what was wanted.
            let _ = kill_process_group(group, signal);
        }
    }

    /// Waits for the end of what was told to end; past the grace it is killed, and so is what it leaves behind.
    async fn end(&mut self, grace: Duration) -> Result<ExitStatus, Failure> {
        let ended = timeout(grace, self.child.wait()).await;
        self.send(Signal::KILL);
        Ok(match ended {
            Ok(status) => status?,
            Err(_) => self.child.wait().await?,
        })
    }
}

/// The command's own code; 128 + the signal that ended it, as shells have it.
fn exit_code(status: ExitStatus) -> ExitCode {
    use std::os::unix::process::ExitStatusExt;
    let code = status.code().or_else(|| status.signal().map(|signal| 128 + signal)).unwrap_or(1);
    ExitCode::from(u8::try_from(code).unwrap_or(1))
}

/// Half-life, but not before a third of what is left has passed: `notBefore` lies some time before the issuance, and the
/// half-life of a certificate shorter than that is over when it arrives. Give or take a tenth of what is left: agents that
/// started together do not renew together.
fn due(card: &Card, now: UnixTime, random: u32) -> UnixTime {
    let left_micros = UnixTime::from_seconds(card.not_after_unix_seconds).0.saturating_sub(now.0);
    let middle = card.half_life().0.max(now.0.saturating_add(left_micros / 3));
    UnixTime(middle.saturating_sub(left_micros / 10).saturating_add(spread(left_micros / 5, random)))
}

/// All that hear of the same bundle, or are rejected by the same daemon, do not renew at once.
fn soon(card: &Card, now: UnixTime, random: u32) -> UnixTime {
    let life_micros = card.not_after_unix_seconds.saturating_sub(card.not_before_unix_seconds).saturating_mul(1_000_000);
    UnixTime(now.0.saturating_add(spread((life_micros / 10).min(SOON_MAX_MICROS), random)))
}

/// Spread over the first half of what is left: the other half is for those that have to ask more than once.
fn before(within: Duration, now: UnixTime, random: u32) -> UnixTime {
    let half_micros = u64::try_from(within.as_micros() / 2).unwrap_or(u64::MAX);
    UnixTime(now.0.saturating_add(spread(half_micros, random)))
}

/// Evenly over `range`, from 0 to just below it.
fn spread(range: u64, random: u32) -> u64 {
    u64::try_from((u128::from(range) * u128::from(random)) >> 32).unwrap_or(range)
}

fn random() -> u32 {
    let mut bytes = [0; 4];
    // Without randomness the renewal is merely not spread.
    let _ = aws_lc_rs::rand::fill(&mut bytes);
    u32::from_be_bytes(bytes)
}

async fn at(moment: Option<Instant>) {
    match moment {
        Some(moment) => sleep_until(moment).await,
        None => std::future::pending().await,
    }
}

/// Until the end of the renewal under way; without one until `due`, at most [`LOOK_AGAIN`]: the monotonic clock stands still while a
/// machine is suspended; or until something is heard. May be dropped and called again: nothing is lost.
async fn wait<F>(due: UnixTime, heard: &mut mpsc::Receiver<Heard>, mut refreshing: Pin<&mut Option<F>>) -> Turn
where
    F: Future<Output = Result<Card, client::Error>>,
{
    let left = Duration::from_micros(due.0.saturating_sub(UnixTime::wall().0));
    let passed = async {
        let Some(under_way) = refreshing.as_mut().as_pin_mut() else {
            sleep_until(Instant::now() + left.min(LOOK_AGAIN)).await;
            return Turn::Waited;
        };
        let renewed = under_way.await;
        refreshing.set(None);
        Turn::Renewed(renewed)
    };
    tokio::select! {
        Some(heard) = heard.recv() => Turn::Heard(heard),
        turn = passed => turn,
    }
}

/// Doubling waits, spread by up to a half, over which what the daemon asks for counts: never less than that, and spread as well, because
/// it asks the same of everybody.
#[derive(Default)]
pub(super) struct BackOff {
    failures: u32,
}

impl BackOff {
    /// How many in a row.
    pub(super) fn failures(&self) -> u32 {
        self.failures
    }

    pub(super) fn next(&mut self, asked: Option<Duration>) -> Duration {
        let wait = self.next_of(asked, random());
        self.failures += 1;
        wait
    }

    fn next_of(&self, asked: Option<Duration>, random: u32) -> Duration {
        let doubled = BACK_OFF_FIRST.saturating_mul(1 << self.failures.min(6)).min(BACK_OFF_MAX);
        let least = asked.map_or(doubled / 2, |asked| asked.min(BACK_OFF_MAX).max(doubled / 2));
        let range = u64::try_from((least.max(doubled) / 2).as_micros()).unwrap_or(u64::MAX);
        least + Duration::from_micros(spread(range, random))
    }
}

#[cfg(test)]
#[path = "agent_run_tests.rs"]
mod tests;

//! Renewals on standing connections under two kinds of load: so many under way all the time, or so many a second whatever becomes of
//! them. Requests are made beforehand; one that is turned away is sent again, later, as it is.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::timeout;

use super::Failed;
use crate::client::Error;
use crate::client::agent::Connection;
use crate::model::Reason;

/// Before the window of [`keep_busy`] opens: a queue that stands is known as one by then.
const RAMP: Duration = Duration::from_millis(500);
/// Requests that are under way when the load ends come back within this.
const LAST_ANSWER: Duration = Duration::from_secs(15);

/// An agent that asks again and again.
pub(super) struct Renewer {
    connection: Connection,
    asks: VecDeque<Vec<u8>>,
    sequence: u64,
}

/// What a request came to.
enum Answer {
    Issued,
    /// RESOURCE_EXHAUSTED, with the time after which to ask again.
    TurnedAway(Duration),
}

impl Renewer {
    /// `asks` claim `sequence` and what follows it.
    pub(super) fn new(connection: Connection, asks: VecDeque<Vec<u8>>, sequence: u64) -> Self {
        Self { connection, asks, sequence }
    }

    async fn renew(&mut self) -> Result<Answer, Failed> {
        let ask = self.asks.front().cloned().ok_or("an agent has no request left")?;
        match self.connection.renew(ask, Vec::new()).await {
            Ok(credential) => {
                self.asks.pop_front();
                self.sequence += 1;
                if credential.next_sequence == self.sequence { Ok(Answer::Issued) } else { Err("a sequence jumped".into()) }
            }
            Err(Error::Refused(refused)) if refused.reason == Reason::Overloaded => {
                Ok(Answer::TurnedAway(refused.retry_after.unwrap_or_default()))
            }
            Err(other) => Err(other.into()),
        }
    }
}

/// Agents that have nothing under way. Whoever has waited longest is next.
#[derive(Clone, Default)]
pub(super) struct Pool(Arc<Mutex<Agents>>);

#[derive(Default)]
struct Agents {
    idle: VecDeque<Renewer>,
    /// Without a request left. They stay connected.
    spent: Vec<Renewer>,
}

impl Pool {
    pub(super) fn of(agents: Vec<Renewer>) -> Self {
        Self(Arc::new(Mutex::new(Agents { idle: agents.into(), spent: Vec::new() })))
    }

    fn lock(&self) -> MutexGuard<'_, Agents> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take(&self) -> Option<Renewer> {
        self.lock().idle.pop_front()
    }

    fn give(&self, agent: Renewer) {
        let mut agents = self.lock();
        if agent.asks.is_empty() { agents.spent.push(agent) } else { agents.idle.push_back(agent) }
    }
}

/// What [`keep_busy`] saw in its window.
pub(super) struct Busy {
    pub issued: Vec<Duration>,
    pub turned_away: u64,
    pub seconds: f64,
}

/// `outstanding` agents always have a request under way, or have been turned away and wait as long as they were told. Counted is what
/// is answered within `time`, after a short ramp: neither the beginning nor the end of a crowd.
pub(super) async fn keep_busy(pool: &Pool, outstanding: usize, time: Duration) -> Result<Busy, Failed> {
    let open = Instant::now() + RAMP;
    let close = open + time;
    let mut slots = JoinSet::new();
    for _ in 0..outstanding {
        let pool = pool.clone();
        slots.spawn(async move {
            let (mut issued, mut turned_away) = (Vec::new(), 0_u64);
            while Instant::now() < close {
                let mut agent = pool.take().ok_or("more requests under way than agents")?;
                let from = Instant::now();
                let answer = agent.renew().await?;
                let now = Instant::now();
                pool.give(agent);
                let counted = (open..close).contains(&now);
                match answer {
                    Answer::Issued if counted => issued.push(now - from),
                    Answer::Issued => {}
                    Answer::TurnedAway(wait) => {
                        turned_away += u64::from(counted);
                        tokio::time::sleep_until((now + wait).min(close).into()).await;
                    }
                }
            }
            Ok::<_, Failed>((issued, turned_away))
        });
    }
    let mut busy = Busy { issued: Vec::new(), turned_away: 0, seconds: time.as_secs_f64() };
    while let Some(slot) = slots.join_next().await {
        let (issued, turned_away) = slot??;
        busy.issued.extend(issued);
        busy.turned_away += turned_away;
    }
    Ok(busy)
}

/// What became of an offer. Every latency counts from when the request was due, so a generator or a daemon that falls behind is seen.
#[derive(Default)]
pub(super) struct Offered {
    pub issued: Vec<Duration>,
    pub turned_away: Vec<Duration>,
    /// From when a request was due to when it was handed to its connection: the generator's own part of the latencies.
    pub lag: Vec<Duration>,
    /// Due when no agent was idle: never sent.
    pub without_agent: u64,
    failure: Option<Failed>,
}

/// `per_second` requests a second, evenly, for `time`, whatever the answers (open loop).
pub(super) async fn offer(pool: &Pool, per_second: f64, time: Duration) -> Result<Offered, Failed> {
    let runtime = tokio::runtime::Handle::current();
    let offered = Arc::new(Mutex::new(Offered::default()));
    let (ended, mut all_ended) = tokio::sync::mpsc::channel::<()>(1);
    let (mine, idle) = (Arc::clone(&offered), pool.clone());
    // A thread of its own: the runtime's timer knows whole milliseconds only.
    let clock = thread::Builder::new().name("bench-arrivals".into()).spawn(move || {
        let start = Instant::now();
        for number in 0_u32.. {
            let after = Duration::from_secs_f64(f64::from(number) / per_second);
            if after >= time {
                break;
            }
            let due = start + after;
            thread::sleep(due.saturating_duration_since(Instant::now()));
            let Some(mut agent) = idle.take() else {
                note(&mine, |offered| offered.without_agent += 1);
                continue;
            };
            let (mine, idle, ended) = (Arc::clone(&mine), idle.clone(), ended.clone());
            runtime.spawn(async move {
                let lag = due.elapsed();
                let answer = agent.renew().await;
                let took = due.elapsed();
                idle.give(agent);
                note(&mine, |offered| {
                    offered.lag.push(lag);
                    match answer {
                        Ok(Answer::Issued) => offered.issued.push(took),
                        Ok(Answer::TurnedAway(_)) => offered.turned_away.push(took),
                        Err(error) => offered.failure = Some(error),
                    }
                });
                drop(ended);
            });
        }
    })?;
    // Each request and the clock hold a sender; the channel closes when the last has ended.
    let patience = time + LAST_ANSWER;
    timeout(patience, all_ended.recv()).await.map_err(|_| "requests did not come back")?;
    clock.join().map_err(|_| "the clock died")?;
    let mut offered = std::mem::take(&mut *offered.lock().unwrap_or_else(PoisonError::into_inner));
    match offered.failure.take() {
        None => Ok(offered),
        Some(error) => Err(error),
    }
}

fn note(offered: &Mutex<Offered>, how: impl FnOnce(&mut Offered)) {
    how(&mut offered.lock().unwrap_or_else(PoisonError::into_inner));
}

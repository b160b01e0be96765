//! How much of a second is whose: no agent takes more of the token, of the disk and of the readers than its share.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::model::{AgentId, Reason, Refusal};

/// A call whose clock is so far behind others' is of the same second.
const CLOCK_SECONDS: u64 = 2;
/// Nobody waits longer for having had more than a share.
const AHEAD_SECONDS: u64 = 60;

/// What agents have asked for in this second.
pub(super) struct Rates {
    now: Mutex<Second>,
    /// Signatures, and what counts as such.
    per_second_max: u32,
    /// Keys made, rotated, disabled, destroyed.
    changes_max: u32,
}

#[derive(Default)]
struct Second {
    second: u64,
    agents: HashMap<AgentId, Spent>,
    /// Of all agents.
    signatures: u64,
    /// Agents that sign in this second, and that did in the last.
    signing: (u64, u64),
    /// Who has had more than a share, and in which second it is even again.
    ahead: HashMap<AgentId, u64>,
}

#[derive(Default)]
struct Spent {
    asked: u32,
    signatures: u64,
    changes: u32,
}

impl Rates {
    pub(super) fn new(per_second_max: u32, changes_max: u32) -> Self {
        Self { now: Mutex::default(), per_second_max, changes_max }
    }

    fn of<T>(&self, agent: &AgentId, second: u64, spend: impl FnOnce(&mut Spent, &mut Second) -> T) -> T {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        // Who looked at the clock a moment earlier and comes a moment later begins no second anew. A clock that was set back does.
        if second > now.second || now.second - second > CLOCK_SECONDS {
            let before = if now.second + 1 == second { now.signing.0 } else { 0 };
            let mut ahead = std::mem::take(&mut now.ahead);
            ahead.retain(|_, even| *even > second && *even - second <= AHEAD_SECONDS);
            *now = Second { second, signing: (0, before), ahead, ..Second::default() };
        }
        let (whose, mut spent) = now.agents.remove_entry(agent).unwrap_or_else(|| (agent.clone(), Spent::default()));
        let done = spend(&mut spent, &mut now);
        now.agents.insert(whose, spent);
        done
    }

    /// A look at keys that costs as much as `cost` signatures.
    ///
    /// # Errors
    /// `RATE_LIMITED`.
    pub(super) fn look(&self, agent: &AgentId, cost: usize, second: u64) -> Result<(), Refusal> {
        self.of(agent, second, |spent, _| self.ask(spent, cost))
    }

    fn ask(&self, spent: &mut Spent, cost: usize) -> Result<(), Refusal> {
        let asked = spent.asked.saturating_add(u32::try_from(cost).unwrap_or(u32::MAX));
        if asked > self.per_second_max {
            return Err(limited(format!("ask for at most {} signatures a second", self.per_second_max)));
        }
        spent.asked = asked;
        Ok(())
    }

    /// So many signatures, where the token makes `capacity` in a second (`None`: nobody knows yet). Once agents have asked for half of what
    /// it makes, none gets more than an even share of it, counted among those who sign in this second or did in the last. The first call of
    /// an agent in a second may be more, where the agent waits as many seconds then as it has had shares.
    ///
    /// # Errors
    /// `RATE_LIMITED`.
    pub(super) fn sign(&self, agent: &AgentId, count: usize, capacity: Option<u64>, second: u64) -> Result<(), Refusal> {
        self.of(agent, second, |spent, now| {
            let first = spent.signatures == 0;
            let (mine, more) = (spent.signatures.saturating_add(count as u64), now.signatures.saturating_add(count as u64));
            let even = now.ahead.get(agent).is_none_or(|even| *even <= second);
            let mut ahead = 0;
            if let Some(capacity) = capacity.filter(|capacity| more > capacity / 2) {
                let signing = now.signing.0.max(now.signing.1).max(1);
                let share = (capacity / signing).max(1);
                if mine > share && !(first && even) {
                    return Err(limited(match signing {
                        1 => format!("the token makes {capacity} signatures a second: ask for fewer, or again in a second"),
                        _ => "others sign as well: ask for fewer signatures, or again in a second".to_owned(),
                    }));
                }
                ahead = (mine / share).min(AHEAD_SECONDS);
            }
            self.ask(spent, count)?;
            if ahead > 1 {
                now.ahead.insert(agent.clone(), second + ahead);
            }
            now.signing.0 += u64::from(first);
            (spent.signatures, now.signatures) = (mine, more);
            Ok(())
        })
    }

    /// A key is to be made, rotated or ended.
    ///
    /// # Errors
    /// `RATE_LIMITED`.
    pub(super) fn change(&self, agent: &AgentId, second: u64) -> Result<(), Refusal> {
        self.of(agent, second, |spent, _| {
            if spent.changes >= self.changes_max {
                return Err(limited(format!("make, rotate, disable and destroy at most {} keys a second", self.changes_max)));
            }
            spent.changes += 1;
            Ok(())
        })
    }
}

fn limited(advice: String) -> Refusal {
    Refusal::new(Reason::RateLimited, advice).retry_after(Duration::from_secs(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn agent(number: u32) -> AgentId {
        AgentId::parse(&format!("builder/{number}")).unwrap()
    }

    #[test]
    fn who_signs_alone_has_the_whole_token_and_of_many_each_an_even_share() {
        let rates = Rates::new(1000, 1);
        let sign = |number, count, second| rates.sign(&agent(number), count, Some(100), second).is_ok();
        // Alone: all of it, and no more.
        assert!(sign(1, 60, 1) && sign(1, 40, 1));
        let told = |number| rates.sign(&agent(number), 1, Some(100), 1).unwrap_err().advice;
        assert!(told(1).contains("100 signatures a second"), "{}", told(1));
        // Another one's first call is taken, whatever was asked for before.
        assert!(sign(2, 30, 1));
        assert!(told(1).contains("others sign"), "{}", told(1));
        // Both are known to sign: neither takes more than half.
        assert!(sign(1, 50, 2) && !sign(1, 1, 2));
        assert!(sign(2, 20, 2) && sign(2, 30, 2) && !sign(2, 1, 2));
        // A second in which nobody signed is forgotten.
        assert!(sign(1, 60, 4) && sign(1, 40, 4));
        // What a token that is hardly used makes is nobody's share.
        assert!(sign(1, 1, 5) && sign(2, 1, 5) && sign(3, 1, 5) && sign(1, 40, 5) && !sign(1, 10, 5) && sign(2, 10, 5));
    }

    #[test]
    fn a_batch_larger_than_a_share_passes_as_the_first_call_of_a_second() {
        let rates = Rates::new(1000, 1);
        assert!(rates.sign(&agent(1), 500, Some(14), 1).is_ok());
        assert!(rates.sign(&agent(1), 1, Some(14), 1).is_err());
        assert!(rates.sign(&agent(2), 14, Some(14), 20).is_ok(), "others are served");
        assert!(rates.sign(&agent(1), 500, Some(14), 20).is_err(), "it has had the token for 35 seconds");
        assert!(rates.sign(&agent(1), 5, Some(14), 21).is_ok(), "a share, for all that");
        assert!(rates.sign(&agent(1), 500, Some(14), 40).is_ok());
        assert!(rates.sign(&agent(1), 1001, None, 200).is_err(), "never more than an agent may ask for");
        assert!(rates.sign(&agent(1), 1000, None, 200).is_ok());
    }

    #[test]
    fn calls_that_come_out_of_order_begin_no_second_anew_and_a_clock_that_is_set_back_does() {
        let rates = Rates::new(10, 1);
        assert!(rates.look(&agent(1), 10, 100).is_ok());
        assert!(rates.look(&agent(1), 1, 99).is_err());
        assert!(rates.look(&agent(1), 1, 100).is_err());
        assert!(rates.look(&agent(1), 10, 50).is_ok());
    }

    #[test]
    fn looks_count_as_signatures_and_changes_have_a_rate_of_their_own() {
        let rates = Rates::new(250, 2);
        assert!(rates.look(&agent(1), 100, 1).is_ok() && rates.look(&agent(1), 100, 1).is_ok());
        assert!(rates.look(&agent(1), 100, 1).is_err());
        assert!(rates.look(&agent(2), 100, 1).is_ok());
        assert!(rates.sign(&agent(1), 50, None, 1).is_ok() && rates.sign(&agent(1), 1, None, 1).is_err());
        assert!(rates.change(&agent(1), 1).is_ok() && rates.change(&agent(1), 1).is_ok() && rates.change(&agent(1), 1).is_err());
        assert!(rates.change(&agent(1), 2).is_ok());
    }
}

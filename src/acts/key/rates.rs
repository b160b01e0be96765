//! How much of a second is whose: no agent takes more of the token, of the disk and of the readers than its share.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use crate::model::{AgentId, Reason, Refusal};

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

    fn of<T>(&self, agent: &AgentId, second: u64, spend: impl FnOnce(&mut Spent, &mut u64, &mut (u64, u64)) -> T) -> T {
        let mut now = self.now.lock().unwrap_or_else(PoisonError::into_inner);
        if now.second != second {
            let before = if now.second + 1 == second { now.signing.0 } else { 0 };
            *now = Second { second, signing: (0, before), ..Second::default() };
        }
        let Second { agents, signatures, signing, .. } = &mut *now;
        if !agents.contains_key(agent) {
            agents.insert(agent.clone(), Spent::default());
        }
        match agents.get_mut(agent) {
            Some(spent) => spend(spent, signatures, signing),
            None => spend(&mut Spent::default(), signatures, signing),
        }
    }

    /// A look at keys that costs as much as `cost` signatures.
    ///
    /// # Errors
    /// `RATE_LIMITED`.
    pub(super) fn look(&self, agent: &AgentId, cost: usize, second: u64) -> Result<(), Refusal> {
        self.of(agent, second, |spent, _, _| self.ask(spent, cost))
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
    /// an agent in a second is never too much.
    ///
    /// # Errors
    /// `RATE_LIMITED`.
    pub(super) fn sign(&self, agent: &AgentId, count: usize, capacity: Option<u64>, second: u64) -> Result<(), Refusal> {
        self.of(agent, second, |spent, all, signing| {
            let first = spent.signatures == 0;
            let (mine, more) = (spent.signatures.saturating_add(count as u64), all.saturating_add(count as u64));
            if let Some(capacity) = capacity.filter(|capacity| !first && more > capacity / 2)
                && mine > capacity / signing.0.max(signing.1).max(1)
            {
                return Err(limited("others sign as well: ask for fewer signatures, or again in a second".to_owned()));
            }
            self.ask(spent, count)?;
            signing.0 += u64::from(first);
            (spent.signatures, *all) = (mine, more);
            Ok(())
        })
    }

    /// A key is to be made, rotated or ended.
    ///
    /// # Errors
    /// `RATE_LIMITED`.
    pub(super) fn change(&self, agent: &AgentId, second: u64) -> Result<(), Refusal> {
        self.of(agent, second, |spent, _, _| {
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
        assert!(sign(1, 60, 1) && sign(1, 40, 1) && !sign(1, 1, 1));
        // Another one's first call is taken, whatever was asked for before.
        assert!(sign(2, 30, 1));
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
        assert!(rates.sign(&agent(1), 1001, None, 2).is_err(), "never more than an agent may ask for");
        assert!(rates.sign(&agent(1), 1000, None, 2).is_ok());
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

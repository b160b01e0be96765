//! An outage as the log tells it: a line when it begins, one for a reason that is new, one when it is over.

use std::time::{Duration, Instant};

/// Shortest time between two lines of one outage.
const BETWEEN: Duration = Duration::from_secs(10);
/// As many different reasons of one outage are told.
const REASONS_MAX: usize = 32;

/// What was told of an outage; nothing while there is none.
#[derive(Default)]
pub struct Outage(Option<Told>);

struct Told {
    began: Instant,
    newest: Instant,
    reasons: Vec<String>,
}

impl Outage {
    /// It is there, for this reason. Whether that is worth a line: it has just begun; or the reason was not told yet, and nothing else
    /// within 10 s.
    pub fn goes_on(&mut self, reason: &str) -> bool {
        self.goes_on_at(reason, Instant::now())
    }

    /// The same for a reason that waits for a person: it is told at once, however little time has passed, if it was not told yet.
    pub fn awaits_a_person(&mut self, reason: &str) -> bool {
        self.is_news(reason, Duration::ZERO, Instant::now())
    }

    fn goes_on_at(&mut self, reason: &str, now: Instant) -> bool {
        self.is_news(reason, BETWEEN, now)
    }

    fn is_news(&mut self, reason: &str, between: Duration, now: Instant) -> bool {
        let Some(told) = &mut self.0 else {
            self.0 = Some(Told { began: now, newest: now, reasons: vec![reason.to_owned()] });
            return true;
        };
        let news = told.reasons.len() < REASONS_MAX
            && now.saturating_duration_since(told.newest) >= between
            && !told.reasons.iter().any(|known| known == reason);
        if news {
            told.newest = now;
            told.reasons.push(reason.to_owned());
        }
        news
    }

    /// It is over. How long it took, if there was one.
    pub fn ends(&mut self) -> Option<Duration> {
        self.0.take().map(|told| told.began.elapsed())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outage_begins_once_changes_seldom_and_ends_once() {
        let (mut outage, start) = (Outage::default(), Instant::now());
        let after = |seconds| start + Duration::from_secs(seconds);
        assert!(outage.ends().is_none(), "there is none");
        assert!(outage.goes_on_at("gone", start));
        // Two reasons that alternate, and one that comes to stay.
        for second in 0..10 {
            assert!(!outage.goes_on_at("gone", after(second)) && !outage.goes_on_at("restarted", after(second)));
        }
        assert!(!outage.goes_on_at("gone", after(10)) && outage.goes_on_at("restarted", after(10)));
        assert!(!outage.goes_on_at("locked", after(19)) && outage.goes_on_at("locked", after(20)));
        assert!(!outage.goes_on_at("gone", after(1000)), "it was told");
        assert!(outage.ends().is_some() && outage.ends().is_none());
        assert!(outage.goes_on_at("gone", after(1001)), "another one");
    }

    #[test]
    fn a_reason_that_waits_for_a_person_is_told_at_once_and_once() {
        let mut outage = Outage::default();
        assert!(outage.goes_on("gone") && !outage.goes_on("restarted"));
        assert!(outage.awaits_a_person("locked") && !outage.awaits_a_person("locked"));
        assert!(!outage.goes_on("locked") && !outage.goes_on("restarted"), "the rest has to wait");
    }

    #[test]
    fn reasons_without_end_are_told_so_often_and_not_kept() {
        let (mut outage, start) = (Outage::default(), Instant::now());
        let told = (0..1000).filter(|n| outage.goes_on_at(&n.to_string(), start + BETWEEN * *n)).count();
        assert_eq!(told, REASONS_MAX);
    }
}

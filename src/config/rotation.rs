//! `[rotation]`: how old an authority becomes, and when it may be replaced.

use super::reader::{Reader, Section};
use crate::model::UnixTime;

const DAY_SECONDS: u64 = 86_400;

/// When authorities are replaced by themselves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Rotation {
    /// Age of a root, in days, 1 to 3,600. Default 1,825; its certificate is good for ten years.
    pub root_days: u64,
    /// Age of an issuing authority, in days, 1 to 350. Default 90; its certificate is good for a year.
    pub issuing_days: u64,
    /// Age of a token-signing key, in days, 1 to 3,650. Default 30.
    pub token_signing_days: u64,
    /// Age of a ledger key, in days, 1 to 3,650. Default 365.
    pub ledger_days: u64,
    /// Age of a wrapping key, in days, 1 to 3,650. Default 365.
    pub wrapping_days: u64,
    /// A retired key stays in the token for so long, in days, 0 to 3,650, so that a backup of the ledger from before can be restored; a
    /// tainted one goes at once. Default 7.
    pub destroy_days: u64,
    /// What is due by age waits for this time of day. Default: any.
    pub window: Option<Window>,
    /// Up to so much is added to each age, differently for each key, in seconds, 0 to 604,800. Default 3,600.
    pub jitter_seconds: u64,
    /// Nothing is rotated but what is tainted. Default: no.
    pub paused: bool,
}

/// A time of each day, UTC, in minutes since midnight. It may run over midnight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    from: u64,
    until: u64,
}

impl Window {
    fn parse(text: &str) -> Option<Self> {
        let minute = |text: &str| {
            let (hours, minutes) = text.split_once(':')?;
            let two = |digits: &str| digits.parse::<u64>().ok().filter(|_| digits.len() == 2);
            let (hours, minutes) = (two(hours)?, two(minutes)?);
            (hours < 24 && minutes < 60).then_some(hours * 60 + minutes)
        };
        let (from, until) = text.split_once('-')?;
        let window = Self { from: minute(from)?, until: minute(until)? };
        (window.from != window.until).then_some(window)
    }

    /// The first moment from `at` on that is inside.
    #[must_use]
    pub fn next(&self, at: UnixTime) -> UnixTime {
        let second = at.seconds() % DAY_SECONDS;
        let (from, until) = (self.from * 60, self.until * 60);
        let inside = if from < until { (from..until).contains(&second) } else { second >= from || second < until };
        if inside {
            return at;
        }
        let midnight = UnixTime::from_seconds(at.seconds() - second);
        midnight.plus_seconds(if second < from { from } else { from + DAY_SECONDS })
    }
}

impl std::fmt::Display for Window {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{:02}:{:02}-{:02}:{:02}", self.from / 60, self.from % 60, self.until / 60, self.until % 60)
    }
}

impl Rotation {
    pub(super) fn read(mut section: Section<'_>, reader: &mut Reader<'_>) -> Self {
        let mut number = |key, range, default: u64| section.number(reader, key, range).unwrap_or(default);
        let mut rotation = Self {
            root_days: number("root_days", 1..=3_600, 1_825),
            issuing_days: number("issuing_days", 1..=350, 90),
            token_signing_days: number("token_signing_days", 1..=3_650, 30),
            ledger_days: number("ledger_days", 1..=3_650, 365),
            wrapping_days: number("wrapping_days", 1..=3_650, 365),
            destroy_days: number("destroy_days", 0..=3_650, 7),
            jitter_seconds: number("jitter_seconds", 0..=604_800, 3_600),
            window: None,
            paused: false,
        };
        if let Some(text) = section.text(reader, "window") {
            rotation.window = Window::parse(text.get_ref());
            if rotation.window.is_none() && !text.get_ref().is_empty() {
                let what = format!("must be a time of day in UTC, as in \"02:00-04:30\", is {:?}", text.get_ref());
                section.wrong(reader, Some(text.span()), "window", &what);
            }
        }
        rotation.paused = section.truth(reader, "paused").unwrap_or(false);
        section.finish(reader);
        rotation
    }

    pub(super) fn lines(&self) -> Vec<String> {
        vec![
            format!("rotation.root_days = {}", self.root_days),
            format!("rotation.issuing_days = {}", self.issuing_days),
            format!("rotation.token_signing_days = {}", self.token_signing_days),
            format!("rotation.ledger_days = {}", self.ledger_days),
            format!("rotation.wrapping_days = {}", self.wrapping_days),
            format!("rotation.destroy_days = {}", self.destroy_days),
            format!("rotation.window = \"{}\"", self.window.map(|window| window.to_string()).unwrap_or_default()),
            format!("rotation.jitter_seconds = {}", self.jitter_seconds),
            format!("rotation.paused = {}", self.paused),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(hours: u64, minutes: u64) -> UnixTime {
        UnixTime::from_seconds(20_000 * DAY_SECONDS + hours * 3_600 + minutes * 60)
    }

    #[test]
    fn what_is_due_outside_of_the_window_waits_for_its_next_opening() {
        let window = Window::parse("02:00-04:30").expect("a window");
        assert_eq!(window.next(at(2, 0)), at(2, 0));
        assert_eq!(window.next(at(4, 29)), at(4, 29));
        assert_eq!(window.next(at(1, 59)), at(2, 0));
        assert_eq!(window.next(at(4, 30)), at(26, 0));
        let over_midnight = Window::parse("23:00-01:00").expect("a window");
        assert_eq!(over_midnight.next(at(0, 59)), at(0, 59));
        assert_eq!(over_midnight.next(at(1, 0)), at(23, 0));
        assert_eq!(over_midnight.to_string(), "23:00-01:00");
        for wrong in ["", "2:00-04:00", "02:00", "24:00-01:00", "02:60-03:00", "02:00-02:00"] {
            assert_eq!(Window::parse(wrong), None, "{wrong:?}");
        }
    }
}

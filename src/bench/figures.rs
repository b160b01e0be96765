//! What is made of measurements: percentiles, medians, paired ratios.

use std::time::Duration;

use serde::Serialize;

/// Latencies of one phase, in milliseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub struct Latency {
    /// Half were faster.
    pub p50_ms: f64,
    /// 99 of 100 were faster.
    pub p99_ms: f64,
    /// 999 of 1,000 were faster.
    pub p999_ms: f64,
}

impl Latency {
    /// Of these; zeros where there is none.
    #[must_use]
    pub fn of(mut all: Vec<Duration>) -> Self {
        all.sort_unstable();
        let at = |permille| percentile(&all, permille).map_or(0.0, |value| value.as_secs_f64() * 1e3);
        Self { p50_ms: at(500), p99_ms: at(990), p999_ms: at(999) }
    }
}

/// The smallest of `sorted` that `permille` thousandths are not above (nearest rank); none of none.
#[must_use]
pub fn percentile<T: Copy>(sorted: &[T], permille: usize) -> Option<T> {
    let rank = (sorted.len() * permille).div_ceil(1000).max(1);
    sorted.get(rank - 1).copied()
}

/// The middle one, or the mean of the two in the middle; 0 of none.
#[must_use]
pub fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_unstable_by(f64::total_cmp);
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => 0.0,
        length if length % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

/// Two variants measured in turn, and the first a second time beside them: how far the same thing differs from itself.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Paired {
    /// Median of B/A, round by round.
    pub ratio: f64,
    /// Each round's.
    pub ratios: Vec<f64>,
    /// Median of A'/A.
    pub same_ratio: f64,
    /// Largest less smallest A'/A.
    pub same_spread: f64,
}

impl Paired {
    /// From each round's (A, A', B).
    #[must_use]
    pub fn of(rounds: &[(f64, f64, f64)]) -> Self {
        let ratios: Vec<f64> = rounds.iter().map(|(a, _, b)| b / a).collect();
        let same: Vec<f64> = rounds.iter().map(|(a, again, _)| again / a).collect();
        let most = same.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let least = same.iter().copied().fold(f64::INFINITY, f64::min);
        Self {
            ratio: median(&ratios),
            ratios,
            same_ratio: median(&same),
            same_spread: if same.is_empty() { 0.0 } else { most - least },
        }
    }

    /// Met if the median is at most the bound plus half of what the same thing differs from itself.
    #[must_use]
    pub fn meets(&self, bound: f64) -> bool {
        self.ratio <= bound + self.same_spread / 2.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_percentile_is_the_nearest_rank() {
        let hundred: Vec<u32> = (1..=100).collect();
        assert_eq!(percentile(&hundred, 500), Some(50));
        assert_eq!(percentile(&hundred, 990), Some(99));
        assert_eq!(percentile(&hundred, 999), Some(100));
        assert_eq!(percentile(&hundred, 0), Some(1));
        assert_eq!(percentile(&[7], 999), Some(7));
        assert_eq!(percentile::<u32>(&[], 500), None);
    }

    #[test]
    fn latencies_are_told_in_milliseconds_whatever_their_order() {
        let latency = Latency::of((1..=1000).rev().map(Duration::from_millis).collect());
        assert_eq!(latency, Latency { p50_ms: 500.0, p99_ms: 990.0, p999_ms: 999.0 });
        assert_eq!(Latency::of(Vec::new()), Latency::default());
    }

    #[test]
    fn the_median_stands_in_the_middle() {
        assert_eq!(median(&[3.0, 1.0, 2.0]).to_bits(), 2.0_f64.to_bits());
        assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]).to_bits(), 2.5_f64.to_bits());
        assert_eq!(median(&[]).to_bits(), 0.0_f64.to_bits());
    }

    #[test]
    fn a_ratio_is_of_the_same_round_and_one_bad_round_does_not_move_it() {
        // The machine is twice as slow in the second round, and B suffers an accident in the third.
        let paired = Paired::of(&[(100.0, 101.0, 104.0), (200.0, 198.0, 208.0), (100.0, 100.0, 900.0)]);
        assert!((paired.ratio - 1.04).abs() < 1e-9);
        assert!((paired.same_ratio - 1.0).abs() < 1e-9);
        assert!((paired.same_spread - 0.02).abs() < 1e-9);
        assert!(paired.meets(1.05) && paired.meets(1.03) && !paired.meets(1.02));
    }
}

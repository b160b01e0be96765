//! Durations as people write them: `90s`, `10m`, `1h`, `1d`.

/// Whole seconds of `text`; a clap value parser.
///
/// # Errors
/// When it is not a positive whole number with one of the units s, m, h, d, or exceeds 2^32 − 1 seconds.
pub(super) fn seconds(text: &str) -> Result<u32, String> {
    let wrong = || format!("{text:?} is not a duration: write 90s, 10m, 1h or 1d");
    let unit = text.chars().last().ok_or_else(wrong)?;
    let factor: u32 = match unit {
        's' => 1,
        'm' => 60,
        'h' => 3_600,
        'd' => 86_400,
        _ => return Err(wrong()),
    };
    let digits = &text[..text.len() - 1];
    if digits.is_empty() || !digits.bytes().all(|byte| byte.is_ascii_digit()) {
        return Err(wrong());
    }
    let number: u32 = digits.parse().map_err(|_| wrong())?;
    number.checked_mul(factor).filter(|seconds| *seconds > 0).ok_or_else(wrong)
}

/// Seconds as people read them, two units at most: `9m 30s`, `1d 2h`.
pub(super) fn text(seconds: u64) -> String {
    let units = [(86_400, "d"), (3_600, "h"), (60, "m"), (1, "s")];
    let Some(first) = units.iter().position(|(size, _)| seconds >= *size) else { return "0s".into() };
    let (size, unit) = units[first];
    let head = format!("{}{unit}", seconds / size);
    match units.get(first + 1).map(|(smaller, unit)| (seconds % size / smaller, unit)) {
        Some((rest, unit)) if rest > 0 => format!("{head} {rest}{unit}"),
        _ => head,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_four_units_are_understood() {
        assert_eq!(["90s", "10m", "1h", "1d"].map(|text| seconds(text).expect("valid")), [90, 600, 3_600, 86_400]);
    }

    #[test]
    fn anything_else_is_refused() {
        for text in ["", "s", "10", "0s", "-1s", "+1s", "1.5h", "1w", "1 h", "99999999999s", "4294967295d", "10µ", "1hs"] {
            assert!(seconds(text).is_err(), "{text:?}");
        }
    }

    #[test]
    fn two_units_are_shown_at_most() {
        assert_eq!([0, 59, 60, 570, 93_600, 86_401].map(text), ["0s", "59s", "1m", "9m 30s", "1d 2h", "1d"]);
    }
}

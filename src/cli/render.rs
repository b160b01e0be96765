//! How data is printed: a table for people, JSON for programs.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use crate::model::UnixTime;

/// Widest table at a terminal, in characters.
const WIDTH_MAX: usize = 100;
/// Narrowest a column is cut to.
const COLUMN_WIDTH_MIN: usize = 8;
const GAP: &str = "  ";

/// How data is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Aligned columns, at most 100 wide at a terminal.
    Table,
    /// One JSON document.
    Json,
}

/// Where data and messages go.
pub struct Output {
    format: Format,
    data: Box<dyn Write>,
    messages: Box<dyn Write>,
}

impl Output {
    /// This process's standard output and standard error.
    #[must_use]
    pub fn of_process(format: Format) -> Self {
        Self { format, data: Box::new(io::stdout()), messages: Box::new(io::stderr()) }
    }

    /// The chosen format.
    #[must_use]
    pub fn format(&self) -> Format {
        self.format
    }

    /// A message for a person, on standard error. That it cannot be written changes nothing.
    pub fn say(&mut self, message: &str) {
        let _ = writeln!(self.messages, "{message}");
    }

    /// Bytes as they are, on standard output.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.data.write_all(bytes)?;
        self.data.flush()
    }

    /// `value` as JSON, or what `table` makes of it.
    ///
    /// # Errors
    /// When standard output cannot be written.
    pub fn show<T: Serialize>(&mut self, value: &T, table: impl FnOnce(&T) -> String) -> io::Result<()> {
        let text = match self.format {
            Format::Json => format!("{}\n", serde_json::to_string_pretty(value)?),
            Format::Table => table(value),
        };
        self.raw(text.as_bytes())
    }

    /// Asks a person for `yes`. Where nobody is there to ask it is said all the same, since it tells what follows; false.
    pub fn confirms(&mut self, question: &str) -> bool {
        if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
            self.say(question);
            return false;
        }
        let _ = write!(self.messages, "{question} Type yes to go on: ");
        let _ = self.messages.flush();
        let mut answer = String::new();
        io::stdin().read_line(&mut answer).is_ok() && answer.trim() == "yes"
    }
}

/// Rows below headings, columns aligned. A program reads every cell whole; for a person at a terminal what is wider than 100 characters
/// loses it in its widest columns, and the last one goes on in the next line instead.
#[must_use]
pub fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    laid_out(headings, rows, io::stdout().is_terminal().then_some(WIDTH_MAX))
}

fn laid_out(headings: &[&str], rows: &[Vec<String>], at_most: Option<usize>) -> String {
    let heading_row: Vec<String> = headings.iter().map(|heading| (*heading).to_owned()).collect();
    let mut widths: Vec<usize> = headings.iter().map(|heading| width(heading)).collect();
    for row in rows {
        for (column, cell) in widths.iter_mut().zip(row) {
            *column = (*column).max(width(cell));
        }
    }
    if let Some(at_most) = at_most {
        fit(&mut widths, at_most);
    }
    let mut text = String::new();
    for row in std::iter::once(&heading_row).chain(rows) {
        let Some((last, others)) = row.split_last() else { continue };
        let mut before: String = others.iter().zip(&widths).map(|(cell, width)| pad(cell, *width) + GAP).collect();
        for part in wrapped(last, widths.last().copied().unwrap_or_default()) {
            text.push_str(format!("{before}{}", pad(part, width(part))).trim_end());
            text.push('\n');
            before = " ".repeat(width(&before));
        }
    }
    text
}

/// `text` in pieces of at most `to` characters, between words where there are any.
fn wrapped(text: &str, to: usize) -> Vec<&str> {
    let mut parts = Vec::new();
    let mut rest = text;
    while let Some((end, _)) = rest.char_indices().nth(to).filter(|(end, _)| *end > 0) {
        let (part, _) = rest.split_at(end);
        let at_blank = if rest[end..].starts_with(' ') { Some(end) } else { part.rfind(' ').filter(|at| *at > 0) };
        let (part, next) = rest.split_at(at_blank.unwrap_or(end));
        parts.push(part);
        rest = next.trim_start_matches(' ');
    }
    parts.push(rest);
    parts
}

/// Names and values, one pair a line. A value is never cut.
#[must_use]
pub fn pairs(pairs: &[(&str, String)]) -> String {
    let widest = pairs.iter().map(|(name, _)| width(name)).max().unwrap_or(0);
    pairs
        .iter()
        .map(|(name, value)| format!("{}\n", format!("{}{GAP}{}", pad(name, widest), pad(value, width(value))).trim_end()))
        .collect()
}

/// Seconds since the epoch as RFC 3339; `-` for 0, which means never.
#[must_use]
pub fn time(unix_seconds: u64) -> String {
    if unix_seconds == 0 { "-".into() } else { UnixTime::from_seconds(unix_seconds).to_string() }
}

/// As [`time`], for JSON: null for 0.
#[must_use]
pub fn time_or_null(unix_seconds: u64) -> Option<String> {
    (unix_seconds != 0).then(|| time(unix_seconds))
}

/// A time of RFC 3339 as a table has room for it: to the minute where it is less than two days from `now`, else to the day.
pub(super) fn brief(time: &str, now: UnixTime) -> String {
    const NEAR_SECONDS: u64 = 2 * 86_400;
    let (from, to) = (now.minus_seconds(NEAR_SECONDS).to_string(), now.plus_seconds(NEAR_SECONDS).to_string());
    match time.get(..16) {
        Some(start) if *from <= *time && *time < *to => format!("{start}Z"),
        _ => day(time),
    }
}

/// Its day.
pub(super) fn day(time: &str) -> String {
    time.get(..10).unwrap_or(time).to_owned()
}

fn fit(widths: &mut [usize], at_most: usize) {
    let available = at_most.saturating_sub(GAP.len() * widths.len().saturating_sub(1));
    while widths.iter().sum::<usize>() > available {
        match widths.iter_mut().max() {
            Some(widest) if *widest > COLUMN_WIDTH_MIN => *widest -= 1,
            _ => return,
        }
    }
}

fn width(text: &str) -> usize {
    text.chars().count()
}

/// `text` in exactly `to` characters. What came from outside may hold control characters; a terminal must not obey them.
pub(super) fn pad(text: &str, to: usize) -> String {
    let mut cell: String = text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    let has = width(&cell);
    if has > to {
        cell = cell.chars().take(to.saturating_sub(1)).collect();
        cell.push('…');
    } else {
        cell.extend(std::iter::repeat_n(' ', to - has));
    }
    cell
}

#[cfg(test)]
mod tests {
    use super::*;

    fn row(cells: &[&str]) -> Vec<String> {
        cells.iter().map(|cell| (*cell).to_owned()).collect()
    }

    #[test]
    fn columns_are_aligned_and_lines_have_no_trailing_blanks() {
        let text = table(&["AGENT", "STATE"], &[row(&["coder/7", "active"]), row(&["a/b", "x"])]);
        assert_eq!(text, "AGENT    STATE\ncoder/7  active\na/b      x\n");
    }

    #[test]
    fn at_a_terminal_a_table_is_at_most_a_hundred_wide_and_its_last_column_goes_on_in_the_next_line() {
        let (name, words) = ("x".repeat(150), "one two three ".repeat(20));
        let text = laid_out(&["INDEX", "NAME", "DETAIL"], &[row(&["123456", &name, words.trim()])], Some(WIDTH_MAX));
        assert!(text.lines().all(|line| width(line) <= WIDTH_MAX), "{text}");
        assert!(text.contains("123456") && text.contains('…'), "{text}");
        assert_eq!(text.split_whitespace().filter(|word| ["one", "two", "three"].contains(word)).count(), 60, "{text}");
        let below = text.lines().nth(2).expect("a second line");
        assert_eq!(below.find(|c| c != ' '), text.find("DETAIL"), "{text}");
    }

    #[test]
    fn a_program_reads_every_cell_whole() {
        let long = "x".repeat(150);
        let text = laid_out(&["INDEX", "DETAIL"], &[row(&[&long, &long])], None);
        assert_eq!(text.lines().last(), Some(format!("{long}  {long}").as_str()));
    }

    #[test]
    fn what_is_longer_than_a_line_goes_on_between_words() {
        assert_eq!(wrapped("one two three", 7), ["one two", "three"]);
        assert_eq!(wrapped("one two three", 6), ["one", "two", "three"]);
        assert_eq!(wrapped("ébènes", 4), ["ébèn", "es"]);
        assert_eq!((wrapped("", 4), wrapped("whole", 5)), (vec![""], vec!["whole"]));
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert!(!table(&["A"], &[row(&["\x1b[2Jgone"])]).contains('\x1b'));
        assert!(!pairs(&[("reason", "fine\x07".into())]).contains('\x07'));
    }

    #[test]
    fn a_time_in_a_table_is_to_the_minute_when_it_is_near_and_else_to_the_day() {
        let now = UnixTime::from_seconds(1_800_000_000);
        for (text, wanted) in [
            ("2027-01-15T08:00:00Z", "2027-01-15T08:00Z"),
            ("2027-01-17T07:59:59Z", "2027-01-17T07:59Z"),
            ("2027-01-17T08:00:00Z", "2027-01-17"),
            ("2027-01-13T07:59:59Z", "2027-01-13"),
            ("-", "-"),
        ] {
            assert_eq!(brief(text, now), wanted);
        }
    }

    #[test]
    fn a_time_is_rfc_3339_and_zero_is_never() {
        assert_eq!(time(1_800_000_000), "2027-01-15T08:00:00Z");
        assert_eq!((time(0).as_str(), time_or_null(0)), ("-", None));
    }
}

//! How data is printed: a table for people, JSON for programs.

use std::io::{self, IsTerminal, Write};

use serde::Serialize;

use crate::model::UnixTime;

/// Widest table, in characters.
const WIDTH_MAX: usize = 100;
/// Narrowest a column is cut to.
const COLUMN_WIDTH_MIN: usize = 8;
const GAP: &str = "  ";

/// How data is printed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Format {
    /// Aligned columns, at most 100 wide.
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

    /// Asks a person for `yes`; false where nobody is there to ask.
    pub fn confirms(&mut self, question: &str) -> bool {
        if !(io::stdin().is_terminal() && io::stderr().is_terminal()) {
            return false;
        }
        let _ = write!(self.messages, "{question} Type yes to go on: ");
        let _ = self.messages.flush();
        let mut answer = String::new();
        io::stdin().read_line(&mut answer).is_ok() && answer.trim() == "yes"
    }
}

/// Rows below headings, columns aligned. What is wider than 100 characters loses it in its widest columns.
#[must_use]
pub fn table(headings: &[&str], rows: &[Vec<String>]) -> String {
    let heading_row: Vec<String> = headings.iter().map(|heading| (*heading).to_owned()).collect();
    let mut widths: Vec<usize> = headings.iter().map(|heading| width(heading)).collect();
    for row in rows {
        for (column, cell) in widths.iter_mut().zip(row) {
            *column = (*column).max(width(cell));
        }
    }
    fit(&mut widths);
    let mut text = String::new();
    for row in std::iter::once(&heading_row).chain(rows) {
        let cells: Vec<String> = row.iter().zip(&widths).map(|(cell, width)| pad(cell, *width)).collect();
        text.push_str(cells.join(GAP).trim_end());
        text.push('\n');
    }
    text
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

fn fit(widths: &mut [usize]) {
    let available = WIDTH_MAX.saturating_sub(GAP.len() * widths.len().saturating_sub(1));
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
    fn a_table_is_at_most_a_hundred_wide_and_cuts_its_widest_column() {
        let long = "x".repeat(150);
        let text = table(&["INDEX", "DETAIL"], &[row(&["123456", &long])]);
        assert!(text.lines().all(|line| width(line) <= WIDTH_MAX));
        assert!(text.contains("123456") && text.contains('…'));
    }

    #[test]
    fn control_characters_do_not_reach_the_terminal() {
        assert!(!table(&["A"], &[row(&["\x1b[2Jgone"])]).contains('\x1b'));
        assert!(!pairs(&[("reason", "fine\x07".into())]).contains('\x07'));
    }

    #[test]
    fn a_time_is_rfc_3339_and_zero_is_never() {
        assert_eq!(time(1_800_000_000), "2027-01-15T08:00:00Z");
        assert_eq!((time(0).as_str(), time_or_null(0)), ("-", None));
    }
}

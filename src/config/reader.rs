//! Reads one TOML table key by key and collects what is wrong with it, so that one run tells everything.

use std::fmt;
use std::ops::{Range, RangeInclusive};
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::{DeTable, DeValue};

/// One mistake in a configuration file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mistake {
    line: Option<usize>,
    what: String,
}

impl Mistake {
    pub(super) fn of_file(what: impl Into<String>) -> Self {
        Self { line: None, what: what.into() }
    }

    /// The line it is on, from 1. None where something is missing or the file could not be read.
    #[must_use]
    pub fn line(&self) -> Option<usize> {
        self.line
    }
}

impl fmt::Display for Mistake {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Some(line) = self.line {
            write!(f, "line {line}: ")?;
        }
        f.write_str(&self.what)
    }
}

/// The text, and the mistakes found so far.
pub(super) struct Reader<'t> {
    text: &'t str,
    mistakes: Vec<Mistake>,
    syntax_is_broken: bool,
}

impl<'t> Reader<'t> {
    pub(super) fn new(text: &'t str) -> Self {
        Self { text, mistakes: Vec::new(), syntax_is_broken: false }
    }

    /// What the TOML parser found. It goes on after an error, with values that stand nowhere in the text.
    pub(super) fn syntax(&mut self, fault: &toml::de::Error) {
        self.mistake(fault.span(), fault.message());
        self.syntax_is_broken = true;
    }

    pub(super) fn mistake(&mut self, at: Option<Range<usize>>, what: impl Into<String>) {
        if self.syntax_is_broken && at == Some(0..0) {
            return;
        }
        let line = at.map(|span| 1 + self.text.bytes().take(span.start).filter(|byte| *byte == b'\n').count());
        self.mistakes.push(Mistake { line, what: what.into() });
    }

    /// In the order of the file; what has no line comes first.
    pub(super) fn into_mistakes(mut self) -> Vec<Mistake> {
        self.mistakes.sort_by_key(|mistake| mistake.line);
        self.mistakes
    }
}

/// One table: its keys are taken one by one; what is left over at the end is unknown, hence a mistake.
pub(super) struct Section<'d> {
    name: &'static str,
    span: Option<Range<usize>>,
    entries: Vec<(&'d str, Range<usize>, &'d Spanned<DeValue<'d>>)>,
}

impl<'d> Section<'d> {
    pub(super) fn root(table: &'d DeTable<'d>) -> Self {
        Self { name: "", span: None, entries: entries(table) }
    }

    /// The table `key` of this one; empty where it is absent or not a table (which is a mistake).
    pub(super) fn table(&mut self, reader: &mut Reader<'_>, key: &str, name: &'static str) -> Section<'d> {
        let found = self.take(key);
        let span = found.as_ref().map(|(_, value)| value.span());
        let table = found.and_then(|(span, value)| {
            let table = value.get_ref().as_table();
            if table.is_none() {
                reader.mistake(Some(span), format!("[{name}]: must be a table, is {}", describe(value.get_ref())));
            }
            table
        });
        Section { name, span, entries: table.map(entries).unwrap_or_default() }
    }

    /// Whether the table is in the file at all.
    pub(super) fn is_present(&self) -> bool {
        self.span.is_some()
    }

    /// How many keys have not been taken yet.
    pub(super) fn keys_left(&self) -> usize {
        self.entries.len()
    }

    fn take(&mut self, key: &str) -> Option<(Range<usize>, &'d Spanned<DeValue<'d>>)> {
        let at = self.entries.iter().position(|(name, ..)| *name == key)?;
        let (_, span, value) = self.entries.swap_remove(at);
        Some((span, value))
    }

    /// A mistake in the value of `key`.
    pub(super) fn wrong(&self, reader: &mut Reader<'_>, span: Option<Range<usize>>, key: &str, what: &str) {
        let name = self.name;
        reader.mistake(span.or_else(|| self.span.clone()), format!("[{name}] {key}: {what}"));
    }

    /// A string, if the key is there; with its place.
    pub(super) fn text(&mut self, reader: &mut Reader<'_>, key: &str) -> Option<Spanned<&'d str>> {
        let (_, value) = self.take(key)?;
        let text = value.get_ref().as_str();
        if text.is_none() {
            self.wrong(reader, Some(value.span()), key, &format!("must be a string, is {}", describe(value.get_ref())));
        }
        text.map(|text| Spanned::new(value.span(), text))
    }

    /// A string that must be there.
    pub(super) fn required_text(&mut self, reader: &mut Reader<'_>, key: &str) -> Option<Spanned<&'d str>> {
        if self.entries.iter().any(|(name, ..)| *name == key) {
            return self.text(reader, key);
        }
        self.wrong(reader, None, key, "is missing");
        None
    }

    /// An absolute path. Relative ones would depend on where the daemon was started.
    pub(super) fn path(&mut self, reader: &mut Reader<'_>, key: &str) -> Option<PathBuf> {
        let text = self.text(reader, key)?;
        self.absolute(reader, key, text)
    }

    /// An absolute path that must be there.
    pub(super) fn required_path(&mut self, reader: &mut Reader<'_>, key: &str) -> Option<PathBuf> {
        let text = self.required_text(reader, key)?;
        self.absolute(reader, key, text)
    }

    fn absolute(&self, reader: &mut Reader<'_>, key: &str, text: Spanned<&'d str>) -> Option<PathBuf> {
        let path = Path::new(*text.get_ref());
        if path.is_absolute() && !text.get_ref().contains('\0') {
            return Some(path.to_path_buf());
        }
        self.wrong(reader, Some(text.span()), key, &format!("must be an absolute path, is {:?}", text.get_ref()));
        None
    }

    /// A whole number in `range`.
    pub(super) fn number(&mut self, reader: &mut Reader<'_>, key: &str, range: RangeInclusive<u64>) -> Option<u64> {
        let (_, value) = self.take(key)?;
        self.in_range(reader, key, value, &range)
    }

    /// true or false.
    pub(super) fn truth(&mut self, reader: &mut Reader<'_>, key: &str) -> Option<bool> {
        let (_, value) = self.take(key)?;
        let truth = value.get_ref().as_bool();
        if truth.is_none() {
            self.wrong(reader, Some(value.span()), key, &format!("must be true or false, is {}", describe(value.get_ref())));
        }
        truth
    }

    /// A list of whole numbers in `range`; empty where the key is absent.
    pub(super) fn numbers(&mut self, reader: &mut Reader<'_>, key: &str, range: &RangeInclusive<u64>) -> Vec<Spanned<u64>> {
        let items = self.items(reader, key);
        items.iter().filter_map(|item| Some(Spanned::new(item.span(), self.in_range(reader, key, item, range)?))).collect()
    }

    /// A list of strings; empty where the key is absent.
    pub(super) fn texts(&mut self, reader: &mut Reader<'_>, key: &str) -> Vec<Spanned<&'d str>> {
        let mut texts = Vec::new();
        for item in self.items(reader, key) {
            match item.get_ref().as_str() {
                Some(text) => texts.push(Spanned::new(item.span(), text)),
                None => {
                    self.wrong(reader, Some(item.span()), key, &format!("must hold strings, has {}", describe(item.get_ref())));
                }
            }
        }
        texts
    }

    fn items(&mut self, reader: &mut Reader<'_>, key: &str) -> Vec<&'d Spanned<DeValue<'d>>> {
        let Some((_, value)) = self.take(key) else { return Vec::new() };
        match value.get_ref().as_array() {
            Some(array) => array.iter().collect(),
            None => {
                self.wrong(reader, Some(value.span()), key, &format!("must be a list, is {}", describe(value.get_ref())));
                Vec::new()
            }
        }
    }

    fn in_range(
        &self,
        reader: &mut Reader<'_>,
        key: &str,
        value: &Spanned<DeValue<'_>>,
        range: &RangeInclusive<u64>,
    ) -> Option<u64> {
        let number = value.get_ref().as_integer().and_then(|n| u64::from_str_radix(n.as_str(), n.radix()).ok());
        if let Some(number) = number.filter(|number| range.contains(number)) {
            return Some(number);
        }
        let (low, high) = (range.start(), range.end());
        self.wrong(reader, Some(value.span()), key, &format!("must be {low} to {high}, is {}", describe(value.get_ref())));
        None
    }

    /// Whatever was not taken is a mistake: a misspelt limit must not silently be the default.
    pub(super) fn finish(self, reader: &mut Reader<'_>) {
        for (key, span, value) in self.entries {
            let what = match (self.name, value.get_ref().is_table()) {
                ("", true) => format!("[{key}]: no such section"),
                ("", false) => format!("{key}: no such key outside a section"),
                (name, true) => format!("[{name}.{key}]: no such section"),
                (name, false) => format!("[{name}] {key}: no such key"),
            };
            reader.mistake(Some(span), what);
        }
    }
}

fn entries<'d>(table: &'d DeTable<'d>) -> Vec<(&'d str, Range<usize>, &'d Spanned<DeValue<'d>>)> {
    table.iter().map(|(key, value)| (key.get_ref().as_ref(), key.span(), value)).collect()
}

/// A value as it is repeated to its writer, cut short.
fn describe(value: &DeValue<'_>) -> String {
    match value {
        DeValue::Integer(number) => number.to_string(),
        DeValue::Float(number) => number.to_string(),
        DeValue::Boolean(truth) => truth.to_string(),
        DeValue::String(text) => format!("{:?}", text.chars().take(60).collect::<String>()),
        other => format!("a value of type {}", other.type_str()),
    }
}

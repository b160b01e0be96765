//! `keyward ledger verify`: a copy of the ledger, held offline against its checkpoints and against what keyward promises.

use std::io::Read;
use std::path::{Path, PathBuf};

use clap::Args;
use serde::Serialize;

use super::render::{pairs, table};
use super::{EXIT_NOT_FOUND, EXIT_VERIFICATION_FAILED, Failure, Output};
use crate::ledger::note::{self, Checkpoint, VerifierKey};
use crate::ledger::verify::{Report, Verifier};
use crate::ledger::{Generation, Reader, StoreError};
use crate::proto::Purpose;

/// Entries read at once.
const PAGE_ENTRIES: u32 = 1_000;
/// Largest file of a key or a note.
const TEXT_BYTES_MAX: u64 = 64 * 1024;
/// A signature line of a signed note begins with an em dash and a blank.
const SIGNATURE_START: &str = "\u{2014} ";
/// Findings that the table shows; JSON has all that were kept.
const ROWS_MAX: usize = 50;

/// What to verify, against what.
#[derive(Debug, Args)]
pub(super) struct Against {
    /// The ledger file, keyward.db or a copy of it.
    file: PathBuf,
    /// The pinned verifier key, as `keyward init` wrote it (ledger.vkey). Keep it where the ledger's host cannot change it. Keys that
    /// followed it are trusted as far as each was vouched for by the one before.
    #[arg(long, value_name = "VKEYFILE")]
    key: PathBuf,
    /// A file of checkpoints that were kept elsewhere, one after the other; can be repeated. Without one a ledger cut back
    /// to its own newest checkpoint cannot be told from a whole one.
    #[arg(long, value_name = "NOTEFILE")]
    checkpoint: Vec<PathBuf>,
    /// Verify every released signature as well, some 50 µs each.
    #[arg(long)]
    signatures: bool,
}

#[derive(Serialize)]
struct Verdict {
    holds: bool,
    trust_domain: Option<String>,
    entries: u64,
    checkpoints: usize,
    sealed: u64,
    root: String,
    first: Option<String>,
    last: Option<String>,
    agents: u64,
    intents: u64,
    certificates: u64,
    keys: u64,
    signatures: u64,
    signatures_counted: u64,
    released: u64,
    withheld: u64,
    failed: u64,
    unknown: u64,
    open_intents: Vec<u64>,
    quarantines: u64,
    reinstatements: u64,
    violations_total: u64,
    violations: Vec<Violation>,
}

#[derive(Serialize)]
struct Violation {
    index: u64,
    rule: &'static str,
    detail: String,
}

pub(super) fn run(against: &Against, output: &mut Output) -> Result<(), Failure> {
    let key = VerifierKey::parse(text(&against.key)?.trim_end())
        .map_err(|error| Failure::error(format!("{}: {error}", against.key.display())))?;
    if !against.file.exists() {
        return Err(Failure::new(EXIT_NOT_FOUND, format!("{}: no such file", against.file.display())));
    }
    let failed = |error: StoreError| Failure::error(format!("{}: {error}", against.file.display()));
    let reader = Reader::open(&against.file).map_err(failed)?;
    let (keys, vouchers) = follow(&reader, key).map_err(failed)?;
    let checkpoints = checkpoints(against, &reader, &keys)?;
    let count = checkpoints.len();

    let followers: Vec<_> = keys.iter().skip(1).zip(&vouchers).map(|(key, voucher)| (key.key().clone(), voucher.size)).collect();
    let seals: Vec<_> = checkpoints.iter().map(|(checkpoint, key)| (key.key().clone(), checkpoint.size)).collect();
    let checkpoints = checkpoints.into_iter().map(|(checkpoint, _)| checkpoint);
    let mut verifier = Verifier::new(checkpoints.chain(vouchers), against.signatures);
    seals.into_iter().for_each(|(key, size)| verifier.expect_in_service(key, size));
    followers.into_iter().for_each(|(key, size)| verifier.expect_follower(key, size));
    if let Some((size, rows)) = reader.authority_rows().map_err(failed)? {
        verifier.expect_authorities(size, rows);
    }
    let mut from = 0;
    loop {
        let page = reader.entries(from, PAGE_ENTRIES).map_err(failed)?;
        page.iter().for_each(|entry| verifier.entry(entry));
        from += page.len() as u64;
        if page.is_empty() {
            break;
        }
    }
    let verdict = Verdict::of(verifier.finish(), count);
    output.show(&verdict, Verdict::text)?;
    if verdict.holds {
        return Ok(());
    }
    let found = format!("{}: {} violations", against.file.display(), verdict.violations_total);
    Err(Failure::new(EXIT_VERIFICATION_FAILED, found))
}

/// The pinned key, and those that followed it: each is vouched for by a checkpoint that the one before it signed, and whose tree the
/// verifier is to find it in. What the file's rows say is believed for nothing but where to look.
fn follow(reader: &Reader, pinned: VerifierKey) -> Result<(Vec<VerifierKey>, Vec<Checkpoint>), StoreError> {
    let mut candidates = reader.generations(Purpose::Ledger)?;
    candidates.retain(|found| !found.checkpoint.is_empty());
    let (mut keys, mut vouchers) = (vec![pinned], Vec::new());
    while let Some(newest) = keys.last().cloned() {
        let vouched = |found: &Generation| note::verify(&found.checkpoint, &newest).ok();
        let Some((at, voucher)) = candidates.iter().enumerate().find_map(|(at, found)| {
            let own = reader.public_key(&found.key_id).ok().flatten()?;
            vouched(found).filter(|_| own != *newest.key()).map(|voucher| (at, voucher))
        }) else {
            break;
        };
        let next = reader.public_key(&candidates.remove(at).key_id)?;
        let Some(next) = next.and_then(|next| VerifierKey::new(newest.name(), next).ok()) else { break };
        keys.push(next);
        vouchers.push(voucher);
    }
    Ok((keys, vouchers))
}

/// The newest one in the file, and those kept elsewhere, each with the newest key that has signed it. Without any the ledger is not
/// verified, whatever it says.
fn checkpoints(against: &Against, reader: &Reader, keys: &[VerifierKey]) -> Result<Vec<(Checkpoint, VerifierKey)>, Failure> {
    let unverified = |place: &Path, error: &dyn std::fmt::Display| {
        Failure::new(EXIT_VERIFICATION_FAILED, format!("the checkpoint of {}: {error}", place.display()))
    };
    // By whichever of them; what is told of a note that none has signed is told of the pinned one.
    let verified = |note: &str| {
        let signed = keys.iter().rev().find_map(|key| Some((note::verify(note, key).ok()?, key.clone())));
        signed.map_or_else(|| note::verify(note, &keys[0]).map(|note| (note, keys[0].clone())), Ok)
    };
    let mut checkpoints = Vec::new();
    let own = reader.fact("checkpoint").map_err(|error| Failure::error(format!("{}: {error}", against.file.display())))?;
    if let Some(own) = own {
        let own = String::from_utf8(own).map_err(|error| unverified(&against.file, &error))?;
        checkpoints.push(verified(&own).map_err(|error| unverified(&against.file, &error))?);
    }
    for path in &against.checkpoint {
        for note in notes(&text(path)?) {
            checkpoints.push(verified(note).map_err(|error| unverified(path, &error))?);
        }
    }
    if checkpoints.is_empty() {
        let advice = "copy a running daemon's ledger with sqlite3's VACUUM INTO, or name a checkpoint with --checkpoint";
        let found = format!("{}: there is no checkpoint to hold the ledger against; {advice}", against.file.display());
        return Err(Failure::new(EXIT_VERIFICATION_FAILED, found));
    }
    Ok(checkpoints)
}

/// The signed notes of a file that `keyward ledger checkpoint >>` appended to: each ends with its signature lines. Text
/// without any is one note, which does not verify.
fn notes(text: &str) -> Vec<&str> {
    let mut notes = Vec::new();
    let (mut start, mut end, mut signed) = (0, 0, false);
    for line in text.split_inclusive('\n') {
        let signature = line.starts_with(SIGNATURE_START);
        if signed && !signature {
            notes.push(&text[start..end]);
            start = end;
        }
        signed = signature;
        end += line.len();
    }
    notes.push(&text[start..]);
    notes
}

fn text(path: &Path) -> Result<String, Failure> {
    let failed = |error: std::io::Error| Failure::error(format!("{}: {error}", path.display()));
    let mut text = String::new();
    std::fs::File::open(path).map_err(failed)?.take(TEXT_BYTES_MAX).read_to_string(&mut text).map_err(failed)?;
    Ok(text)
}

impl Verdict {
    fn of(report: Report, checkpoints: usize) -> Self {
        let violation =
            |v: &crate::ledger::verify::Violation| Violation { index: v.index, rule: v.rule, detail: v.detail.clone() };
        Self {
            holds: report.holds(),
            trust_domain: report.trust_domain.as_ref().map(ToString::to_string),
            entries: report.entries,
            checkpoints,
            sealed: report.size_sealed,
            root: report.root.to_string(),
            first: report.time.map(|(first, _)| first.to_string()),
            last: report.time.map(|(_, last)| last.to_string()),
            agents: report.agents,
            intents: report.intents,
            certificates: report.certificates,
            keys: report.keys,
            signatures: report.signatures,
            signatures_counted: report.signatures_counted,
            released: report.released,
            withheld: report.withheld,
            failed: report.failed,
            unknown: report.unknown,
            violations: report.violations.iter().map(violation).collect(),
            open_intents: report.open_intents,
            quarantines: report.quarantines,
            reinstatements: report.reinstatements,
            violations_total: report.violations_total,
        }
    }

    fn text(&self) -> String {
        let dash = || "-".to_owned();
        let time = |time: &Option<String>| time.clone().unwrap_or_else(dash);
        let mut text = pairs(&[
            ("verdict", if self.holds { "holds" } else { "DOES NOT HOLD" }.into()),
            ("trust domain", self.trust_domain.clone().unwrap_or_else(dash)),
            ("entries", format!("{}, {} below a checkpoint", self.entries, self.sealed)),
            ("root", self.root.clone()),
            ("from", time(&self.first)),
            ("to", time(&self.last)),
            ("checkpoints", self.checkpoints.to_string()),
            ("agents", format!("{}, {} quarantines, {} lifted", self.agents, self.quarantines, self.reinstatements)),
            ("intents", format!("{}: {}", self.intents, self.outcomes())),
            ("certificates", self.certificates.to_string()),
            ("agents' keys", self.keys.to_string()),
            ("their signatures", format!("{} recorded, {} counted", self.signatures, self.signatures_counted)),
        ]);
        if !self.violations.is_empty() {
            let row = |v: &Violation| vec![v.index.to_string(), v.rule.to_owned(), v.detail.clone()];
            let rows: Vec<_> = self.violations.iter().take(ROWS_MAX).map(row).collect();
            text.push('\n');
            text.push_str(&table(&["INDEX", "RULE", "FOUND"], &rows));
        }
        text
    }

    fn outcomes(&self) -> String {
        format!(
            "{} released, {} withheld, {} failed, {} unknown, {} open",
            self.released,
            self.withheld,
            self.failed,
            self.unknown,
            self.open_intents.len()
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ledger_without_a_checkpoint_or_without_the_pinned_key_is_not_verified() {
        let directory = tempfile::tempdir().expect("a directory");
        let domain = crate::model::TrustDomain::parse("example.org").expect("a name");
        crate::ledger::create(directory.path(), &domain, [7; 16]).expect("a ledger");
        let key = directory.path().join("ledger.vkey");
        let signer = crate::client::request::Key::generate().expect("a key");
        let vkey = VerifierKey::new(&note::ledger_name(&domain), signer.public().clone()).expect("a verifier key");
        std::fs::write(&key, format!("{vkey}\n")).expect("written");
        let mut against =
            Against { file: directory.path().join("keyward.db"), key: key.clone(), checkpoint: Vec::new(), signatures: true };
        let mut output = Output::of_process(super::super::Format::Json);
        let error = run(&against, &mut output).expect_err("nothing to hold it against").to_string();
        assert!(error.contains("no checkpoint"), "{error}");

        let reader = Reader::open(&against.file).expect("opened");
        let mut verifier = Verifier::new([], false);
        reader.entries(0, 10).expect("read").iter().for_each(|entry| verifier.entry(entry));
        let report = verifier.finish();
        let checkpoint = Checkpoint { origin: note::ledger_name(&domain), size: report.entries, root: report.root };
        let signature = rcgen::SigningKey::sign(&signer, checkpoint.body().as_bytes()).expect("signed");
        let kept = directory.path().join("kept");
        std::fs::write(&kept, checkpoint.signed(&checkpoint.origin, &[(signer.public(), signature)])).expect("written");
        against.checkpoint.push(kept.clone());
        run(&against, &mut output).expect("holds");

        let one = std::fs::read_to_string(&kept).expect("read");
        std::fs::write(&kept, one.repeat(2)).expect("written");
        run(&against, &mut output).expect("two notes in one file");
        std::fs::write(&kept, format!("{one}and more\n")).expect("written");
        assert!(run(&against, &mut output).is_err(), "what follows the last signature is not ignored");

        let beyond = Checkpoint { size: report.entries + 1, ..checkpoint };
        let signature = rcgen::SigningKey::sign(&signer, beyond.body().as_bytes()).expect("signed");
        std::fs::write(&kept, beyond.signed(&beyond.origin, &[(signer.public(), signature)])).expect("written");
        assert!(run(&against, &mut output).expect_err("cut back").to_string().contains("violations"));

        std::fs::write(&key, "nothing").expect("written");
        assert!(run(&against, &mut output).is_err());
    }
}

//! The rows of the authorities are no more than what the entries amount to, and a start holds all of them against these: who can write to
//! the file, but has neither token nor ledger key, makes nobody trust an authority again, or one of his own.
//!
//! Entries about authorities are rare among millions. Which they are is listed in the file; what is listed is read, looked up in the tree as
//! an agent's key's entries are, and folded anew. Where that does not give the rows, or there is no list, all entries are looked through: only
//! then a start is refused. What this does not see is a list that was cut back together with the rows (an authority as it was some time
//! before), and a file that was rewritten from an entry on: `keyward ledger verify` and the signed checkpoints do.

use std::collections::{BTreeMap, HashSet};

use prost::Message as _;
use rusqlite::Connection;

use super::{Generation, Generations, read};
use crate::ledger::agent_keys::held::entry;
use crate::ledger::store::{Row, StoreError};
use crate::model::{KeyId, UnixTime};
use crate::proto::{self, AuthorityState as State, Purpose, entry::Body};

/// The fact that lists the entries, eight bytes each.
pub(in crate::ledger) const LIST: &str = "authority_entries";
/// How far an entry's time may be from when it was decided, in seconds; entries' times stand still as long after the clock was set back, until
/// that takes effect.
const APART_SECONDS: u64 = 10;

/// Whether what an authority is follows from this entry, which has changed `rows`.
pub(super) fn is_listed(body: &Body, rows: &[Row]) -> bool {
    match body {
        Body::AuthorityActivated(_)
        | Body::AuthorityStepped(_)
        | Body::AuthorityTainted(_)
        | Body::RotationPaused(_)
        | Body::RotationResumed(_) => true,
        Body::ClockAccepted(accepted) => accepted.deviation_micros < 0,
        // Most are of keys that no authority was planned with.
        Body::KeyAbandoned(_) => !rows.is_empty(),
        _ => false,
    }
}

/// Holds the rows, those of destroyed authorities and the pause of the rotation among them, against the entries. Gives the list where it was
/// not there, or not whole.
///
/// # Errors
/// [`StoreError::NotAsRecorded`]; when the file cannot be read.
pub(in crate::ledger) fn hold(
    connection: &Connection,
    found: &mut Generations,
    listed: Option<Vec<u8>>,
) -> Result<Option<Row>, StoreError> {
    let rows = rows(connection)?;
    if let Some(listed) = listed {
        match told(connection, &listed).and_then(|told| compare(&told, &rows, found)) {
            Ok(()) => {
                found.told_by = listed;
                return Ok(None);
            }
            Err(StoreError::NotAsRecorded(what)) => {
                // Also after an earlier keyward wrote to the file: it lists nothing.
                tracing::warn!(what, "the authorities are not what the listed entries say: all entries are looked through");
            }
            Err(error) => return Err(error),
        }
    }
    let list = search(connection)?;
    compare(&told(connection, &list)?, &rows, found)?;
    found.told_by.clone_from(&list);
    Ok(Some(Row::Fact(LIST, list)))
}

/// All rows.
pub(in crate::ledger) fn rows(connection: &Connection) -> Result<Vec<Generation>, StoreError> {
    let mut select = connection.prepare("SELECT * FROM generation")?;
    let mut rows = select.query([])?;
    let mut all = Vec::new();
    while let Some(row) = rows.next()? {
        all.push(read(row)?);
    }
    Ok(all)
}

fn wrong(what: String) -> StoreError {
    StoreError::NotAsRecorded(what + "; see `keyward ledger verify`, and restore a backup")
}

/// The entries of a list.
fn told(connection: &Connection, list: &[u8]) -> Result<Vec<proto::Entry>, StoreError> {
    let (indexes, rest) = list.as_chunks();
    let mut all = Vec::<proto::Entry>::with_capacity(indexes.len());
    for index in indexes {
        let index = u64::from_be_bytes(*index);
        let Some(entry) = entry(connection, index)? else {
            return Err(wrong(format!("entry {index} is not the one in the tree, or is not there")));
        };
        if all.last().is_some_and(|last| last.index >= index) {
            return Err(wrong("the list of the authorities' entries is in another order".to_owned()));
        }
        all.push(entry);
    }
    if rest.is_empty() { Ok(all) } else { Err(wrong("the list of the authorities' entries is torn".to_owned())) }
}

/// Looks through all entries for those to be listed.
fn search(connection: &Connection) -> Result<Vec<u8>, StoreError> {
    let mut list = Vec::new();
    let mut planned = HashSet::new();
    let (mut ledger_keys, mut ledger_activated) = (Vec::new(), false);
    let mut select = connection.prepare("SELECT idx, bytes FROM entry ORDER BY idx")?;
    let mut entries = select.query([])?;
    while let Some(found) = entries.next()? {
        let index = found.get::<_, i64>(0)?.cast_unsigned();
        let damaged = || StoreError::Damaged(format!("entry {index}"));
        let entry = proto::Entry::decode(found.get_ref(1)?.as_blob().map_err(|_| damaged())?).map_err(|_| damaged())?;
        let Some(body) = entry.body else { continue };
        let listed = match &body {
            Body::AuthorityStepped(step) => {
                planned.insert(step.key_id.clone());
                true
            }
            Body::AuthorityActivated(activated) => {
                ledger_activated |= activated.purpose() == Purpose::Ledger;
                planned.insert(activated.key_id.clone());
                true
            }
            Body::KeyAbandoned(abandoned) => planned.contains(&abandoned.key_id),
            // The first ledger key of a house from before there were generations.
            Body::KeyIntended(key) if key.purpose() == Purpose::Ledger && !ledger_activated => {
                ledger_keys.push(key.key_id.clone());
                true
            }
            Body::KeyActivated(key) => !ledger_activated && ledger_keys.contains(&key.key_id),
            body => is_listed(body, &[]),
        };
        if listed {
            list.extend(index.to_be_bytes());
        }
    }
    Ok(list)
}

/// What the entries make of a generation.
struct Amount {
    generation: Generation,
    /// When it got there, at the earliest and at the latest: not to the moment, where the clock was set back.
    since: (UnixTime, UnixTime),
    /// The entry that changed it last.
    told_by: u64,
    /// It may have no row.
    optional: bool,
}

/// How far entries' times are ahead of the clock.
#[derive(Default)]
struct Behind {
    micros: i64,
    until: UnixTime,
}

impl Behind {
    /// The earliest moment that an entry of this time was decided in.
    fn earliest(&mut self, time: UnixTime, body: &Body) -> UnixTime {
        if time > self.until {
            self.micros = 0;
        }
        if let Body::ClockAccepted(accepted) = body
            && accepted.deviation_micros < 0
        {
            self.micros = self.micros.saturating_add(accepted.deviation_micros);
            self.until = time.plus_seconds(APART_SECONDS);
        }
        UnixTime(time.0.saturating_add_signed(self.micros)).minus_seconds(APART_SECONDS)
    }
}

/// Folds the entries, and compares.
fn compare(entries: &[proto::Entry], rows: &[Generation], found: &Generations) -> Result<(), StoreError> {
    let mut folded = Generations::default();
    let mut amounts = BTreeMap::<KeyId, Amount>::new();
    let older = first_ledger_key(entries);
    if let Some((index, first)) = &older {
        let since = (first.since.minus_seconds(APART_SECONDS), UnixTime(u64::MAX));
        folded.by_key.insert(first.key_id, first.clone());
        // In a house that a crash left in the midst of `init` it is no generation yet.
        amounts.insert(first.key_id, Amount { generation: first.clone(), since, told_by: *index, optional: true });
    }
    let mut behind = Behind::default();
    for entry in entries {
        let (time, Some(body)) = (UnixTime(entry.time_unix_micros), &entry.body) else { continue };
        let earliest = behind.earliest(time, body);
        let changed =
            folded.change(time, body).map_err(|_| wrong(format!("entry {} cannot follow those before", entry.index)))?;
        // Their age counted from the migration.
        let migrated = older.is_some()
            && matches!(body, Body::AuthorityActivated(first) if matches!(first.purpose(), Purpose::Root | Purpose::Issuing));
        let latest = if migrated { UnixTime(u64::MAX) } else { time.plus_seconds(APART_SECONDS) };
        for row in changed {
            let Row::Generation(generation) = row else { continue };
            let before = amounts.get(&generation.key_id).filter(|before| before.generation.state == generation.state);
            let since = before.map_or((earliest, latest), |before| (before.since.0.min(earliest), before.since.1));
            let amount = Amount { generation: *generation, since, told_by: entry.index, optional: false };
            amounts.insert(amount.generation.key_id, amount);
        }
        if matches!(body, Body::ClockAccepted(_)) {
            amounts.values_mut().for_each(|amount| amount.since.0 = amount.since.0.min(earliest));
        }
    }
    for row in rows {
        let Some(amount) = amounts.remove(&row.key_id) else {
            return Err(wrong(format!("no entry makes {} an authority", row.key_id)));
        };
        if let Some(field) = differs(row, &amount) {
            return Err(wrong(format!(
                "the authority {} has another {field} than entry {} gives it",
                row.key_id, amount.told_by
            )));
        }
    }
    if let Some((id, amount)) = amounts.iter().find(|(_, amount)| !amount.optional) {
        return Err(wrong(format!("the authority {id} of entry {} has no row", amount.told_by)));
    }
    let by = |pause: &super::Pause| pause.by.clone();
    let same = match (&found.paused, &folded.paused) {
        (None, None) => true,
        // A file of an earlier keyward does not say who.
        (Some(found), Some(folded)) => found.by.is_none() || by(found) == by(folded),
        _ => false,
    };
    if same { Ok(()) } else { Err(wrong("the rotation is paused, or is not, other than the entries say".to_owned())) }
}

/// Which field of a row is not what the entries make it.
fn differs(row: &Generation, amount: &Amount) -> Option<&'static str> {
    let told = &amount.generation;
    let fields = [
        ("purpose", row.purpose == told.purpose),
        ("state", row.state == told.state),
        ("certificate", row.certificate == told.certificate),
        ("issuer", row.issuer == told.issuer),
        ("checkpoint", row.checkpoint == told.checkpoint),
        ("taint", row.tainted == told.tainted),
        ("maintenance window", row.now == told.now),
        ("age", (amount.since.0..=amount.since.1).contains(&row.since)),
    ];
    fields.into_iter().find(|(_, same)| !same).map(|(field, _)| field)
}

/// The first ledger key, where it became a generation without an entry: with the migration of a file from before there were any.
fn first_ledger_key(entries: &[proto::Entry]) -> Option<(u64, Generation)> {
    let bodies = || entries.iter().filter_map(|entry| Some((entry, entry.body.as_ref()?)));
    let told = |body: &Body| matches!(body, Body::AuthorityActivated(first) if first.purpose() == Purpose::Ledger);
    if bodies().any(|(_, body)| told(body)) {
        return None;
    }
    bodies().find_map(|(entry, body)| {
        let Body::KeyActivated(key) = body else { return None };
        let generation = Generation {
            key_id: KeyId::from_slice(&key.key_id)?,
            purpose: Purpose::Ledger,
            state: State::Active,
            since: UnixTime(entry.time_unix_micros),
            certificate: Vec::new(),
            issuer: None,
            checkpoint: String::new(),
            tainted: false,
            now: false,
        };
        Some((entry.index, generation))
    })
}

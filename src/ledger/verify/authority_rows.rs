//! The rows that a daemon goes by, held against what the entries make of the authorities.

use std::collections::HashSet;

use super::At;
use super::authorities::Authorities;
use super::keys::Keys;
use crate::ledger::generation::Generation as Row;
use crate::model::UnixTime;
use crate::proto::{AuthorityState as State, Purpose};

/// How far a row's time may be from the time that the entry implies, in seconds: it was decided by then.
const APART_SECONDS: u64 = 10;

impl Authorities {
    /// All rows, as they were when the entry before the one at `at` was the last.
    pub(super) fn hold(&self, rows: &[Row], keys: &Keys, at: &mut At<'_>) {
        let last = at.index;
        let mut wrong = |index: u64, what: std::fmt::Arguments<'_>| {
            at.index = index;
            at.violates("authority-row", what);
        };
        let mut seen = HashSet::new();
        for row in rows {
            let id = row.key_id;
            seen.insert(id);
            let Some(told) = self.by_id.get(&id) else {
                // In a house from before there were generations the ledger key became one without an entry.
                let is_first = !self.ledger_begun
                    && row.purpose == Purpose::Ledger
                    && matches!(row.state, State::Active | State::Retiring)
                    && keys.public(&id, Purpose::Ledger).is_some();
                if !is_first {
                    wrong(last, format_args!("no entry makes {id} an authority, as its row says"));
                }
                continue;
            };
            // There the age of what was in force counts from the migration.
            let is_migrated = !self.ledger_begun && matches!(row.purpose, Purpose::Root | Purpose::Issuing);
            let latest = if is_migrated { UnixTime(u64::MAX) } else { told.since_latest().plus_seconds(APART_SECONDS) };
            let since = told.since_earliest.minus_seconds(APART_SECONDS)..=latest;
            let fields = [
                ("purpose", row.purpose == told.purpose),
                ("state", row.state == told.state),
                ("certificate", row.certificate == told.certificate),
                ("issuer", row.issuer == told.issuer),
                ("checkpoint", row.checkpoint == told.checkpoint),
                ("taint", row.tainted == told.tainted),
                ("maintenance window", row.now == told.now),
                ("age", since.contains(&row.since)),
            ];
            if let Some((field, _)) = fields.iter().find(|(_, same)| !same) {
                wrong(told.told_by, format_args!("the row of {id} has another {field} than the entries give it"));
            }
        }
        for (id, told) in self.by_id.iter().filter(|(id, _)| !seen.contains(*id)) {
            wrong(told.told_by, format_args!("the authority {id} has no row"));
        }
    }
}

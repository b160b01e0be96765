//! A key's row is no more than what its entries amount to, and it is held against them when the key comes into memory: who can write to
//! the file, but has neither token nor ledger key, gives nobody another's key, another purpose, a longer life or a larger budget.
//!
//! An entry is immutable, and hashed into the tree: where its tile is complete, its leaf is looked up as well. What this does not see is a
//! row as it was some time before (a disabled key that is active again, a version that was followed by another, signatures not counted),
//! which wrapping keys a version was under between its first and its present one (a row names the last entry that rewrapped it, and not
//! those before: a taint of one of these is forgotten with its place in the list), and a file that was rewritten from an entry on, tiles
//! and all: `keyward ledger verify` and the signed checkpoints do.

use std::collections::{BTreeSet, HashMap};
use std::sync::PoisonError;

use prost::Message as _;
use rusqlite::{Connection, OptionalExtension as _, params};

use super::super::Ledger;
use super::super::merkle::{HASH_BYTES, TILE_HASHES, leaf_hash};
use super::super::store::StoreError;
use super::rows::{AgentKeyRow, StoredKey};
use super::{KeyOf, KeyTerms};
use crate::model::{Reason, Refusal};
use crate::proto::{self, KeyStorage, entry::Body};

impl Ledger {
    /// A look at the file that failed, told to a caller. That a row is not as recorded the log tells once.
    #[must_use]
    pub fn unread(&self, error: StoreError) -> Refusal {
        match error {
            StoreError::NotAsRecorded(_) => {
                self.tell_odd(&error);
                let advice =
                    "this key is not what the ledger says of it: have an operator run `keyward ledger verify`, and use another";
                Refusal::new(Reason::KeyNotAsRecorded, advice).because(error)
            }
            other => Refusal::internal(other),
        }
    }

    /// Which keys of a page, by their place, are not as recorded: they are published nowhere, and stay where they are. Blocking.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn odd_keys(&self, keys: &[StoredKey]) -> Result<BTreeSet<usize>, StoreError> {
        let mut odd = BTreeSet::new();
        for (at, key) in keys.iter().enumerate() {
            match self.0.reader.hold(key) {
                Err(error @ StoreError::NotAsRecorded(_)) => {
                    self.tell_odd(&error);
                    odd.insert(at);
                }
                other => other?,
            }
        }
        Ok(odd)
    }

    /// Once, however often it is met: duties meet it every few seconds, and anybody who asks for keys does.
    fn tell_odd(&self, error: &StoreError) {
        if self.0.odd.lock().unwrap_or_else(PoisonError::into_inner).awaits_a_person(&error.to_string()) {
            tracing::error!(%error, "a key's row was changed by somebody else: nothing is done by what it says");
        }
    }
}

/// Holds a key against the entries that its row names.
///
/// # Errors
/// [`StoreError::NotAsRecorded`]; when the file cannot be read.
pub(in crate::ledger) fn hold(connection: &Connection, key: &StoredKey) -> Result<(), StoreError> {
    let of = &key.of;
    let wrong = |what: &str| StoreError::NotAsRecorded(format!("{} epoch {} key {}: {what}", of.agent, of.epoch, of.name));
    let Some(created) = key.created else { return Err(wrong("its row names no entry")) };
    let Some(Told { terms: Some(terms), version: first }) = told(connection, created, of)? else {
        return Err(wrong(&format!("entry {created} does not make it")));
    };
    if terms != key.terms {
        return Err(wrong(&format!("it has other terms than in entry {created}")));
    }
    let mut before = 0;
    for version in &key.versions {
        let Some(entry) = version.told_by else { return Err(wrong("a version names no entry")) };
        let recorded = if entry == created { first.clone() } else { told(connection, entry, of)?.and_then(|told| told.version) };
        let Some(mut recorded) = recorded else { return Err(wrong(&format!("entry {entry} does not tell of it"))) };
        if let Some(again) = version.rewrapped_by {
            let Some((wrapped_sha256, wrapping_key_id)) = rewrapped(connection, again, &recorded.key_id)? else {
                return Err(wrong(&format!("entry {again} does not rewrap version {}", version.number)));
            };
            // A taint of the wrapping key that it was made under is not forgotten.
            if version.wrapped.is_some() && version.wrapped_before.first().map(|id| &id.0[..]) != Some(&recorded.wrapping_key_id)
            {
                return Err(wrong(&format!("version {} was under another wrapping key in entry {entry}", version.number)));
            }
            (recorded.wrapped_sha256, recorded.wrapping_key_id) = (wrapped_sha256, wrapping_key_id);
        }
        if recorded != version.entry() {
            return Err(wrong(&format!("version {} is another in entry {entry}", version.number)));
        }
        // The newest is the last.
        if version.number <= before {
            return Err(wrong("its versions are in another order"));
        }
        before = version.number;
    }
    Ok(())
}

/// What an entry tells of a key.
struct Told {
    /// Where it makes the key.
    terms: Option<KeyTerms>,
    version: Option<proto::AgentKeyVersion>,
}

/// `None`: nothing of this key, or its bytes are not those of its leaf.
fn told(connection: &Connection, index: u64, of: &KeyOf) -> Result<Option<Told>, StoreError> {
    let entry = entry(connection, index)?;
    Ok(entry.and_then(|entry| entry.body).and_then(told_by).and_then(|(named, told)| (named == Named::from(of)).then_some(told)))
}

/// SHA-256 of a wrapped key, and under which key it is.
type Wrapped = (Vec<u8>, Vec<u8>);

/// How a version is wrapped by this entry.
fn rewrapped(connection: &Connection, index: u64, key_id: &[u8]) -> Result<Option<Wrapped>, StoreError> {
    let Some(Body::AgentKeysRewrapped(told)) = entry(connection, index)?.and_then(|entry| entry.body) else { return Ok(None) };
    let one = told.versions.into_iter().find(|one| one.key_id == key_id);
    Ok(one.map(|one| {
        let wrapping = if one.wrapped_sha256.is_empty() { Vec::new() } else { told.wrapping_key_id };
        (one.wrapped_sha256, wrapping)
    }))
}

/// An entry, unless its bytes are not those of its leaf.
pub(in crate::ledger) fn entry(connection: &Connection, index: u64) -> Result<Option<proto::Entry>, StoreError> {
    let bytes: Option<Vec<u8>> = connection
        .prepare_cached("SELECT bytes FROM entry WHERE idx = ?1")?
        .query_row([index.cast_signed()], |row| row.get(0))
        .optional()?;
    let Some(bytes) = bytes else { return Ok(None) };
    let (tile, at) = (index / TILE_HASHES, (index % TILE_HASHES) * HASH_BYTES as u64);
    let leaf: Option<Vec<u8>> = connection
        .prepare_cached("SELECT substr(hashes, ?2, ?3) FROM tile WHERE level = 0 AND idx = ?1")?
        .query_row(params![tile.cast_signed(), at.cast_signed() + 1, (HASH_BYTES as u64).cast_signed()], |row| row.get(0))
        .optional()?;
    if leaf.is_some_and(|leaf| leaf != leaf_hash(&bytes).0) {
        return Ok(None);
    }
    Ok(proto::Entry::decode(bytes.as_slice()).ok().filter(|entry| entry.index == index))
}

#[derive(Clone, PartialEq, Eq)]
struct Named {
    agent: String,
    epoch: u32,
    name: String,
}

impl From<&KeyOf> for Named {
    fn from(of: &KeyOf) -> Self {
        Self { agent: of.agent.to_string(), epoch: of.epoch, name: of.name.to_string() }
    }
}

fn told_by(body: Body) -> Option<(Named, Told)> {
    match body {
        Body::AgentKeyCreated(created) => {
            let terms = KeyTerms {
                purpose: created.purpose(),
                algorithm: created.algorithm(),
                storage_asked: created.storage_asked(),
                accounting: created.accounting(),
                signatures_max: created.signatures_max,
                ttl_seconds: created.ttl_seconds,
            };
            let named = Named { agent: created.agent, epoch: created.epoch, name: created.name };
            Some((named, Told { terms: Some(terms), version: created.version }))
        }
        Body::AgentKeyRotated(rotated) => {
            let named = Named { agent: rotated.agent, epoch: rotated.epoch, name: rotated.name };
            Some((named, Told { terms: None, version: rotated.version }))
        }
        _ => None,
    }
}

/// Names their entries in the rows of a file that an earlier keyward wrote, and notes which of them are objects in the token. Once, with
/// the migration: what a row holds is not believed for it, it is held against the entry from then on.
pub(in crate::ledger) fn name_entries(transaction: &Connection) -> Result<(), StoreError> {
    let mut entries = transaction.prepare("SELECT idx, bytes FROM entry ORDER BY idx")?;
    let mut select = transaction.prepare("SELECT row FROM agent_key WHERE agent = ?1 AND epoch = ?2 AND name = ?3")?;
    let mut update = transaction.prepare("UPDATE agent_key SET row = ?4 WHERE agent = ?1 AND epoch = ?2 AND name = ?3")?;
    let mut resident = transaction.prepare(
        "INSERT OR IGNORE INTO resident_key SELECT id, ?2, ?3, ?4, ?5 FROM hsm_key WHERE id = ?1 AND state IN ('active', 'destroying')",
    )?;
    let mut of_version = HashMap::<Vec<u8>, Named>::new();
    let mut rows = entries.query([])?;
    while let Some(found) = rows.next()? {
        let index: i64 = found.get(0)?;
        let Ok(entry) = proto::Entry::decode(found.get_ref(1)?.as_blob().map_err(rusqlite::Error::from)?) else { continue };
        let index = index.cast_unsigned();
        let mut change = |named: &Named, how: &dyn Fn(&mut AgentKeyRow)| {
            let of = params![named.agent, named.epoch, named.name];
            let row: Option<Vec<u8>> = select.query_row(of, |row| row.get(0)).optional()?;
            if let Some(mut row) = row.and_then(|row| AgentKeyRow::decode(row.as_slice()).ok()) {
                how(&mut row);
                update.execute(params![named.agent, named.epoch, named.name, row.encode_to_vec()])?;
            }
            Ok::<_, StoreError>(())
        };
        let Some(body) = entry.body else { continue };
        if let Body::AgentKeysRewrapped(told) = &body {
            for named in told.versions.iter().filter_map(|one| of_version.get(&one.key_id)) {
                change(named, &|row| row.rewrapped_by(index, &told.versions))?;
            }
        }
        let Some((named, told)) = told_by(body) else { continue };
        let Some(version) = told.version else { continue };
        change(&named, &|row| row.told_of(index, told.terms.is_some(), &version.key_id))?;
        of_version.insert(version.key_id.clone(), named.clone());
        if version.storage() == KeyStorage::Resident {
            let expires = version.expires_unix_seconds.cast_signed();
            resident.execute(params![version.key_id, named.agent, named.epoch, named.name, expires])?;
        }
    }
    Ok(())
}

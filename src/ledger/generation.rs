//! The generations of the authorities, as the book knows them: one for each key, or outside root, that signs or will or did.
//!
//! Each arrow of a generation's life is one entry with its row in the same transaction; which arrows there are is decided here, in the order
//! of the book. Destroyed ones are in the file alone.

pub(super) mod held;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;

use prost::Message as _;
use rusqlite::{Connection, Row as Fields, params};

use crate::model::{KeyId, Reason, Refusal, UnixTime};
use crate::proto::{AuthorityActivated, AuthorityStepped, AuthorityTainted, Operator};
use crate::proto::{AuthorityState as State, IntentKind, Purpose, entry::Body};

use super::store::{Row, StoreError};

/// One generation of an authority.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generation {
    /// CKA_ID of its key; of an outside root the last 16 bytes of its certificate.
    pub key_id: KeyId,
    /// What it is for.
    pub purpose: Purpose,
    /// How far it has got.
    pub state: State,
    /// When it got there.
    pub since: UnixTime,
    /// DER; empty where there is none, or none yet.
    pub certificate: Vec<u8>,
    /// The root over an issuing authority.
    pub issuer: Option<KeyId>,
    /// Of a ledger key: the note that it and its predecessor signed; empty for the first.
    pub checkpoint: String,
    /// Its key may be in other hands.
    pub tainted: bool,
    /// It waits for no maintenance window; a wrapping key neither for what is under the one before.
    pub now: bool,
}

impl Generation {
    /// Whether its key is somewhere else.
    #[must_use]
    pub fn is_outside(&self) -> bool {
        self.purpose == Purpose::Root && outside_id(&self.certificate) == Some(self.key_id)
    }

    /// Whether peers trust what is under it, or are about to.
    #[must_use]
    pub fn is_trusted(&self) -> bool {
        matches!(self.state, State::Prepublished | State::Active | State::Retiring)
    }

    /// Whether it is on its way to being active.
    #[must_use]
    pub fn is_coming(&self) -> bool {
        matches!(self.state, State::Planned | State::Prepublished)
    }
}

/// What an outside root is called: nobody has told us a CKA_ID. These bytes are of its signature, hence random.
#[must_use]
pub fn outside_id(certificate: &[u8]) -> Option<KeyId> {
    certificate.last_chunk().map(|bytes: &[u8; 16]| KeyId(*bytes))
}

/// Whether there is such an arrow.
fn is_arrow(from: Option<State>, to: State) -> bool {
    matches!(
        (from, to),
        (None, State::Planned)
            | (Some(State::Planned), State::Prepublished | State::Destroyed)
            | (Some(State::Prepublished), State::Active | State::Retired)
            | (Some(State::Active), State::Retiring)
            | (Some(State::Retiring), State::Retired)
            | (Some(State::Retired), State::Destroyed)
    )
}

/// All generations that are not destroyed, and what follows from them.
#[derive(Debug, Clone, Default)]
pub(super) struct Generations {
    by_key: BTreeMap<KeyId, Generation>,
    /// Grows with every change of what is in the bundle, once there is a root in it: milliseconds since the Unix epoch, from the second
    /// bundle on.
    bundle_sequence: u64,
    paused: Option<Pause>,
    /// Which entries have made them what they are, eight bytes each: a start holds the rows against these.
    told_by: Vec<u8>,
}

/// That an operator holds up the rotation.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Pause {
    /// Who, and why; unknown in a file that was written before this was kept.
    pub by: Option<Operator>,
    /// Since when; unknown as well.
    pub since: Option<UnixTime>,
}

impl Pause {
    /// As the file has it: whether, in one byte; and eight bytes of seconds with the operator after them, which older files lack.
    fn read(fact: &[u8], by: &[u8]) -> Option<Self> {
        let known = by.split_first_chunk().and_then(|(since, by)| Some((u64::from_be_bytes(*since), Operator::decode(by).ok()?)));
        (fact == [1]).then(|| match known {
            Some((since, by)) => Self { by: Some(by), since: Some(UnixTime::from_seconds(since)) },
            None => Self::default(),
        })
    }

    fn rows(paused: Option<&Self>) -> Vec<Row> {
        let known = paused.and_then(|paused| Some((paused.since?, paused.by.as_ref()?)));
        let by = known.map(|(since, by)| [&since.seconds().to_be_bytes()[..], &by.encode_to_vec()].concat());
        vec![
            Row::Fact("rotation_paused", vec![u8::from(paused.is_some())]),
            Row::Fact("rotation_paused_by", by.unwrap_or_default()),
        ]
    }
}

impl Generations {
    /// As they are in the file.
    pub(super) fn load(
        connection: &Connection,
        fact: impl Fn(&str) -> Result<Option<Vec<u8>>, StoreError>,
    ) -> Result<Self, StoreError> {
        let mut select = connection.prepare("SELECT * FROM generation WHERE state <> ?1")?;
        let mut rows = select.query([State::Destroyed as i32])?;
        let mut by_key = BTreeMap::new();
        while let Some(row) = rows.next()? {
            let generation = read(row)?;
            by_key.insert(generation.key_id, generation);
        }
        let bundle_sequence = fact("bundle_sequence")?.and_then(|bytes| bytes.try_into().ok()).map_or(1, u64::from_be_bytes);
        let paused = Pause::read(&fact("rotation_paused")?.unwrap_or_default(), &fact("rotation_paused_by")?.unwrap_or_default());
        Ok(Self { by_key, bundle_sequence, paused, told_by: Vec::new() })
    }

    pub(super) fn all(&self) -> Vec<Generation> {
        self.by_key.values().cloned().collect()
    }

    pub(super) fn bundle_sequence(&self) -> u64 {
        self.bundle_sequence
    }

    pub(super) fn paused(&self) -> Option<&Pause> {
        self.paused.as_ref()
    }

    /// Whether a generation in this state signs this. A key that is no generation is one that `init` makes, while there is none in force
    /// yet; one that is no generation any more signs nothing.
    pub(super) fn may_sign(&self, kind: IntentKind, key: &KeyId) -> bool {
        let Some(found) = self.by_key.get(key) else {
            let purpose = if matches!(kind, IntentKind::Root | IntentKind::Issuing) { Purpose::Root } else { Purpose::Issuing };
            return self.active(purpose).is_none();
        };
        match kind {
            IntentKind::Attest | IntentKind::Renew | IntentKind::Issuing => found.state == State::Active,
            IntentKind::Server => matches!(found.state, State::Active | State::Retiring),
            IntentKind::Crl => found.is_trusted(),
            IntentKind::Root | IntentKind::Csr => found.state == State::Planned,
            IntentKind::Unspecified => false,
        }
    }

    /// Whether keys may be wrapped under this key now.
    pub(super) fn wraps(&self, key: &[u8]) -> bool {
        self.active(Purpose::Wrapping).is_some_and(|active| active.key_id.0 == key)
    }

    /// Takes an entry that is about to be written at `index` into account, or refuses it. Gives the rows that follow from it.
    pub(super) fn fold(&mut self, index: u64, now: UnixTime, body: &Body) -> Result<Vec<Row>, Refusal> {
        let mut rows = self.change(now, body)?;
        if held::is_listed(body, &rows) {
            self.told_by.extend(index.to_be_bytes());
            rows.push(Row::Fact(held::LIST, self.told_by.clone()));
        }
        Ok(rows)
    }

    fn change(&mut self, now: UnixTime, body: &Body) -> Result<Vec<Row>, Refusal> {
        let told = self.in_bundle();
        let mut rows = match body {
            Body::AuthorityActivated(activated) => vec![self.activated(now, activated)?],
            Body::AuthorityStepped(stepped) => self.stepped(now, stepped)?,
            Body::AuthorityTainted(tainted) => self.tainted(now, tainted)?,
            Body::ClockAccepted(accepted) => self.set_back(now, accepted.deviation_micros),
            // Whoever made it has given it up: that is the end of what it was planned for.
            Body::KeyAbandoned(abandoned) => {
                let planned = KeyId::from_slice(&abandoned.key_id).and_then(|id| self.by_key.remove(&id));
                planned.map(|planned| row(Generation { state: State::Destroyed, since: now, ..planned })).into_iter().collect()
            }
            Body::RotationPaused(_) | Body::RotationResumed(_) => {
                self.paused = match body {
                    Body::RotationPaused(paused) => Some(Pause { by: paused.by.clone(), since: Some(now) }),
                    _ => None,
                };
                return Ok(Pause::rows(self.paused.as_ref()));
            }
            _ => return Ok(Vec::new()),
        };
        if told.iter().any(|(purpose, _)| *purpose == Purpose::Root) && told != self.in_bundle() {
            // By the clock, so that a ledger restored from a backup does not count anew what it has told already: nobody would listen.
            self.bundle_sequence = (self.bundle_sequence + 1).max(now.micros() / 1000);
            rows.push(Row::Fact("bundle_sequence", self.bundle_sequence.to_be_bytes().to_vec()));
        }
        Ok(rows)
    }

    /// What peers are told: roots, and the keys of tokens.
    fn in_bundle(&self) -> Vec<(Purpose, KeyId)> {
        let told = |found: &&Generation| matches!(found.purpose, Purpose::Root | Purpose::TokenSigning) && found.is_trusted();
        self.by_key.values().filter(told).map(|found| (found.purpose, found.key_id)).collect()
    }

    fn active(&self, purpose: Purpose) -> Option<&Generation> {
        self.by_key.values().find(|found| found.purpose == purpose && found.state == State::Active)
    }

    fn activated(&mut self, now: UnixTime, activated: &AuthorityActivated) -> Result<Row, Refusal> {
        let purpose = activated.purpose();
        let key_id = KeyId::from_slice(&activated.key_id).or_else(|| outside_id(&activated.certificate));
        let key_id = key_id.ok_or_else(|| Refusal::internal("an authority without a key"))?;
        let issuer = if purpose == Purpose::Issuing { self.active(Purpose::Root).map(|root| root.key_id) } else { None };
        let generation = Generation {
            key_id,
            purpose,
            state: State::Active,
            since: now,
            certificate: activated.certificate.clone(),
            issuer,
            checkpoint: String::new(),
            tainted: false,
            now: false,
        };
        self.by_key.insert(key_id, generation.clone());
        Ok(row(generation))
    }

    fn stepped(&mut self, now: UnixTime, step: &AuthorityStepped) -> Result<Vec<Row>, Refusal> {
        let (purpose, to) = (step.purpose(), step.to());
        let key_id = KeyId::from_slice(&step.key_id).ok_or_else(|| Refusal::internal("a key id has 16 bytes"))?;
        let from = self.by_key.get(&key_id).filter(|found| found.purpose == purpose).map(|found| found.state);
        // The arrow into retiring is in the entry that makes the next one active.
        // And one on its way may be told not to wait.
        let hurried = from == Some(to) && step.now && self.by_key.get(&key_id).is_some_and(Generation::is_coming);
        if hurried && let Some(coming) = self.by_key.get_mut(&key_id) {
            coming.now = true;
            return Ok(vec![row(coming.clone())]);
        }
        // What was made elsewhere was not planned here.
        let from_outside = from.is_none()
            && to == State::Prepublished
            && purpose == Purpose::Root
            && outside_id(&step.certificate) == Some(key_id);
        if (!is_arrow(from, to) && !from_outside) || to == State::Retiring {
            return Err(Refusal::internal(format!("no arrow leads from {from:?} to {to:?}")));
        }
        if (to == State::Planned || from_outside)
            && self.by_key.values().any(|found| found.purpose == purpose && found.is_coming())
        {
            return Err(Refusal::new(Reason::RotationUnderWay, "one is on its way already; see `keyward ca list`"));
        }
        let mut rows = Vec::new();
        if to == State::Active {
            let before = self.active(purpose).map(|found| found.key_id);
            if before != KeyId::from_slice(&step.replaces) {
                return Err(Refusal::internal("another one is active than the one to be replaced"));
            }
            if let Some(before) = before.and_then(|before| self.by_key.get_mut(&before)) {
                (before.state, before.since) = (State::Retiring, now);
                rows.push(row(before.clone()));
            }
        }
        let planned = Generation {
            key_id,
            purpose,
            state: to,
            since: now,
            certificate: Vec::new(),
            issuer: None,
            checkpoint: String::new(),
            tainted: false,
            now: step.now,
        };
        let generation = self.by_key.entry(key_id).or_insert(planned);
        (generation.state, generation.since) = (to, now);
        if to == State::Prepublished {
            (generation.certificate, generation.issuer) = (step.certificate.clone(), KeyId::from_slice(&step.issuer));
        }
        if to == State::Active {
            generation.checkpoint.clone_from(&step.checkpoint);
        }
        rows.push(row(generation.clone()));
        if to == State::Destroyed {
            self.by_key.remove(&key_id);
        }
        Ok(rows)
    }

    /// A verifier knows roots alone: what is under a tainted issuing authority goes when its root goes.
    fn tainted(&mut self, now: UnixTime, tainted: &AuthorityTainted) -> Result<Vec<Row>, Refusal> {
        let unknown = || Refusal::new(Reason::AuthorityUnknown, "no authority has this key; see `keyward ca list`");
        let key_id = KeyId::from_slice(&tainted.key_id).ok_or_else(unknown)?;
        let found = self.by_key.get(&key_id).ok_or_else(unknown)?;
        let root = if found.purpose == Purpose::Root { Some(key_id) } else { found.issuer };
        let touched = |found: &Generation| {
            found.key_id == key_id || (root.is_some() && (Some(found.key_id) == root || found.issuer == root))
        };
        let tainted = self.by_key.values_mut().filter(|found| touched(found)).map(|found| {
            // However long it has been retiring: the time in which what is under it is renewed begins now.
            let begins = found.purpose == Purpose::Issuing && found.state == State::Retiring && !found.tainted;
            found.since = if begins { now } else { found.since.min(now) };
            found.tainted = true;
            row(found.clone())
        });
        Ok(tainted.collect())
    }

    /// The clock is about to be set back by an operator: what has happened by the time that it ran ahead has happened just now, or whatever
    /// follows would wait until it is there again. What is under a retiring authority may be in force then, and is waited for.
    fn set_back(&mut self, now: UnixTime, deviation_micros: i64) -> Vec<Row> {
        if deviation_micros >= 0 {
            return Vec::new();
        }
        let wall = UnixTime(now.0.saturating_add_signed(deviation_micros));
        let ahead =
            self.by_key.values_mut().filter(|found| found.since > wall && (found.state != State::Retiring || found.tainted));
        let set_back = ahead.map(|found| {
            found.since = wall;
            row(found.clone())
        });
        set_back.collect()
    }
}

fn row(generation: Generation) -> Row {
    Row::Generation(Box::new(generation))
}

/// Writes the row of a generation, in the transaction of its entry. What is destroyed is no key to look for any more.
pub(super) fn write(transaction: &Connection, generation: &Generation) -> Result<(), StoreError> {
    transaction
        .prepare_cached(
            "INSERT OR REPLACE INTO generation (key_id, purpose, state, since_micros, certificate, issuer, checkpoint, tainted, now) \
             VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
        )?
        .execute(params![
            generation.key_id.0,
            generation.purpose as i32,
            generation.state as i32,
            generation.since.micros().cast_signed(),
            generation.certificate,
            generation.issuer.map(|issuer| issuer.0),
            generation.checkpoint,
            generation.tainted,
            generation.now,
        ])?;
    if generation.state == State::Destroyed {
        let mut gone = transaction.prepare_cached("UPDATE hsm_key SET state = 'destroyed' WHERE id = ?1 AND state = 'active'")?;
        gone.execute([generation.key_id.0])?;
    }
    Ok(())
}

/// One row of the table.
pub(super) fn read(row: &Fields<'_>) -> Result<Generation, StoreError> {
    let damaged = || StoreError::Damaged("a row of generation".to_owned());
    let key_id: Vec<u8> = row.get("key_id")?;
    let issuer: Option<Vec<u8>> = row.get("issuer")?;
    Ok(Generation {
        key_id: KeyId::from_slice(&key_id).ok_or_else(damaged)?,
        purpose: row.get::<_, i32>("purpose")?.try_into().map_err(|_| damaged())?,
        state: row.get::<_, i32>("state")?.try_into().map_err(|_| damaged())?,
        since: UnixTime(row.get::<_, i64>("since_micros")?.cast_unsigned()),
        certificate: row.get("certificate")?,
        issuer: issuer.and_then(|issuer| KeyId::from_slice(&issuer)),
        checkpoint: row.get("checkpoint")?,
        tainted: row.get("tainted")?,
        now: row.get("now")?,
    })
}

//! The tokens held against the ledger.

use std::collections::BTreeMap;

use crate::authn::Operator;
use crate::hsm::Held;
use crate::model::{KeyId, Reason, Refusal};
use crate::proto::{self, Finding, Purpose, TokenRole, entry::Body};

use super::keys::{self, Tokens};
use super::label::is_ours;
use super::{Acts, hsm_refusal};

/// Something that is in a token and not in the ledger, or the other way round; or on its way from one to the other.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stray {
    /// What it is.
    pub finding: Finding,
    /// Which token.
    pub role: TokenRole,
    /// Its label.
    pub token: String,
    /// CKA_ID, of whatever length.
    pub id: Vec<u8>,
    /// CKA_LABEL.
    pub label: String,
    /// How many objects; 0: the ledger knows the key, the token does not have it.
    pub objects: u32,
    /// What the ledger has the key for.
    pub purpose: Purpose,
    /// It is gone now.
    pub destroyed: bool,
}

/// What an operator wants to be gone. Only strays ever go: what the ledger knows, and what is labelled as somebody else's, stays.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Unwanted {
    /// Nothing.
    Nothing,
    /// All strays.
    Strays,
    /// The stray with this CKA_ID.
    Stray(Vec<u8>),
}

/// What the ledger has a key for, and how far it has got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Row {
    role: TokenRole,
    purpose: Purpose,
    state: RowState,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RowState {
    Intended,
    Active,
    Ending,
}

impl Unwanted {
    fn is(&self, stray: &Stray) -> bool {
        stray.finding == Finding::Stray
            && match self {
                Self::Nothing => false,
                Self::Strays => true,
                Self::Stray(id) => stray.id == *id,
            }
    }
}

impl Acts {
    /// What is not in a token and in the ledger alike, in both tokens. Strays that are unwanted are destroyed; nothing else ever is.
    ///
    /// # Errors
    /// `NOT_FOUND` where no stray has that CKA_ID; `HSM_UNAVAILABLE`, `LEDGER_UNAVAILABLE`.
    pub async fn reconcile(&self, operator: &Operator, unwanted: Unwanted, reason: &str) -> Result<Vec<Stray>, Refusal> {
        // No authority's key is made meanwhile. Agents' are: what is in a token was intended before, and what is active was there before.
        let _one = self.rotating.lock().await;
        let authorities = self.authorities()?;
        let tokens = authorities.tokens();
        let roles: &[TokenRole] =
            if tokens.shared { &[TokenRole::Authority] } else { &[TokenRole::Authority, TokenRole::Agents] };
        let before = self.key_rows(tokens).await?;
        let mut held = Vec::new();
        for role in roles {
            held.push((*role, tokens.of(*role).inventory().await.map_err(hsm_refusal)?));
        }
        let after = self.key_rows(tokens).await?;
        let mut strays = Vec::new();
        for (role, held) in held {
            strays.extend(found(role, tokens.of(role).name().1, held, (&before, &after), self.ledger.deployment()));
        }
        if let Unwanted::Stray(_) = unwanted
            && !strays.iter().any(|stray| unwanted.is(stray))
        {
            let advice =
                "no stray of this deployment has this CKA_ID, and nothing else is destroyed; see `keyward hsm reconcile`";
            return Err(Refusal::new(Reason::NotFound, advice));
        }
        for stray in strays.iter_mut().filter(|stray| unwanted.is(stray)) {
            let Some(id) = KeyId::from_slice(&stray.id) else { continue };
            let objects_destroyed = tokens.of(stray.role).destroy_labelled(id, &stray.label).await.map_err(hsm_refusal)?;
            let (by, token) = (Some(operator.signs(reason)), stray.role.into());
            let body = proto::OrphansDestroyed { by, token, key_id: stray.id.clone(), objects_destroyed };
            self.ledger.record(Body::OrphansDestroyed(body)).await?;
            stray.destroyed = true;
        }
        Ok(strays)
    }

    /// All keys of the ledger that have objects, are about to, or had them a moment ago.
    async fn key_rows(&self, tokens: &Tokens) -> Result<BTreeMap<KeyId, Row>, Refusal> {
        let role = |role| if tokens.shared { TokenRole::Authority } else { role };
        // Before the others: one that is active now and ending in a moment is in either.
        let ending = keys::being_destroyed(&self.ledger).await?.into_iter();
        let row = Row { role: role(TokenRole::Agents), purpose: Purpose::Agent, state: RowState::Ending };
        let mut rows: BTreeMap<_, _> = ending.map(|id| (id, row)).collect();
        rows.extend(keys::rows(&self.ledger).await?.into_iter().map(|row| {
            let state = if row.active { RowState::Active } else { RowState::Intended };
            (row.id, Row { role: role(row.token), purpose: row.purpose, state })
        }));
        Ok(rows)
    }
}

/// What a token holds, against the rows from before it was looked into and from after.
fn found(
    role: TokenRole,
    token: String,
    held: Vec<Held>,
    (before, after): (&BTreeMap<KeyId, Row>, &BTreeMap<KeyId, Row>),
    deployment: &[u8],
) -> Vec<Stray> {
    let any = |rows: &BTreeMap<KeyId, Row>, id: &[u8]| KeyId::from_slice(id).and_then(|id| rows.get(&id).copied());
    let row = |rows: &BTreeMap<KeyId, Row>, id: &[u8]| any(rows, id).filter(|row| row.role == role);
    let stray = |finding, id: Vec<u8>, purpose| Stray {
        finding,
        role,
        token: token.clone(),
        id,
        label: String::new(),
        objects: 0,
        purpose,
        destroyed: false,
    };
    let mut strays = Vec::new();
    for one in &held {
        let (then, now) = (row(before, &one.id), row(after, &one.id));
        let finding = match now.or(then) {
            Some(Row { state: RowState::Active, .. }) if now.is_some() => continue,
            Some(Row { state: RowState::Intended, .. }) => Finding::InTheMaking,
            // Or it came to its end while the token was looked into.
            Some(_) => Finding::BeingDestroyed,
            // Where one token became two, the objects did not move by themselves.
            None if any(after, &one.id).or(any(before, &one.id)).is_some() => Finding::Misplaced,
            None if is_ours(&one.label, deployment, &one.id) => Finding::Stray,
            None => Finding::Foreign,
        };
        let purpose = now.or(then).map_or(Purpose::Unspecified, |row| row.purpose);
        strays.push(Stray { label: one.label.clone(), objects: one.objects, ..stray(finding, one.id.clone(), purpose) });
    }
    for (id, now) in after.iter().filter(|(_, row)| row.role == role) {
        if held.iter().any(|one| one.id == id.0) {
            continue;
        }
        let finding = match (before.get(id).map(|row| row.state), now.state) {
            (Some(RowState::Active), RowState::Active) => Finding::Missing,
            // It came to be while the token was looked into.
            (_, RowState::Active) => continue,
            (_, RowState::Intended) => Finding::InTheMaking,
            (_, RowState::Ending) => Finding::BeingDestroyed,
        };
        strays.push(stray(finding, id.0.to_vec(), now.purpose));
    }
    strays
}

#[cfg(test)]
mod tests {
    use super::super::label::label;
    use super::*;

    const OURS: [u8; 16] = [0x11; 16];

    fn id(byte: u8) -> KeyId {
        KeyId([byte; 16])
    }

    fn held(byte: u8, deployment: u8) -> Held {
        Held { id: id(byte).0.to_vec(), label: label(Purpose::Agent, &[deployment; 16], id(byte)), objects: 2 }
    }

    fn rows(rows: &[(u8, RowState)]) -> BTreeMap<KeyId, Row> {
        let row = |state| Row { role: TokenRole::Agents, purpose: Purpose::Agent, state };
        rows.iter().map(|(byte, state)| (id(*byte), row(*state))).collect()
    }

    fn findings(all: &[Held], before: &[(u8, RowState)], after: &[(u8, RowState)]) -> Vec<(u8, Finding)> {
        let found = found(TokenRole::Agents, "token".into(), all.to_vec(), (&rows(before), &rows(after)), &OURS);
        found.into_iter().map(|stray| (stray.id[0], stray.finding)).collect()
    }

    #[test]
    fn each_object_and_each_row_is_what_it_is() {
        use RowState::{Active, Ending, Intended};
        let all = [held(1, 0x11), held(2, 0x11), held(3, 0x11), held(4, 0x11), held(5, 0x22)];
        let ledger = [(1, Active), (2, Intended), (3, Ending), (6, Active), (7, Intended), (8, Ending)];
        let wanted = [
            (2, Finding::InTheMaking),
            (3, Finding::BeingDestroyed),
            (4, Finding::Stray),
            (5, Finding::Foreign),
            (6, Finding::Missing),
            (7, Finding::InTheMaking),
            (8, Finding::BeingDestroyed),
        ];
        assert_eq!(findings(&all, &ledger, &ledger), wanted);
        // The same keys in the other token are in the wrong one: the only copy, perhaps.
        let there = found(TokenRole::Authority, "token".into(), all.to_vec(), (&rows(&ledger), &rows(&ledger)), &OURS);
        let wrong = [1, 2, 3].map(|id| (id, Finding::Misplaced)).into_iter().chain([(4, Finding::Stray), (5, Finding::Foreign)]);
        assert_eq!(there.iter().map(|one| (one.id[0], one.finding)).collect::<Vec<_>>(), wrong.collect::<Vec<_>>());
        assert!(!there.iter().any(|one| Unwanted::Stray(id(1).0.to_vec()).is(one)));
    }

    #[test]
    fn what_happens_while_a_token_is_looked_into_is_no_stray_and_nothing_missing() {
        use RowState::{Active, Ending, Intended};
        // Intended after the rows were read, and seen half made or whole.
        assert_eq!(findings(&[held(1, 0x11)], &[], &[(1, Intended)]), [(1, Finding::InTheMaking)]);
        assert_eq!(findings(&[held(1, 0x11)], &[], &[(1, Active)]), []);
        // Not there when the token was looked into, and in use by now.
        assert_eq!(findings(&[], &[(1, Intended)], &[(1, Active)]), []);
        assert_eq!(findings(&[], &[], &[(1, Active)]), []);
        // Destroyed meanwhile.
        assert_eq!(findings(&[held(1, 0x11)], &[(1, Active)], &[]), [(1, Finding::BeingDestroyed)]);
        assert_eq!(findings(&[held(1, 0x11)], &[(1, Ending)], &[]), [(1, Finding::BeingDestroyed)]);
        assert_eq!(findings(&[], &[(1, Active)], &[]), []);
    }

    #[test]
    fn only_strays_are_ever_unwanted() {
        let ledger = rows(&[(1, RowState::Intended), (2, RowState::Ending), (3, RowState::Active)]);
        let all = vec![held(1, 0x11), held(2, 0x11), held(4, 0x11), held(5, 0x22)];
        let found = found(TokenRole::Agents, "token".into(), all, (&ledger, &ledger), &OURS);
        let goes =
            |unwanted: &Unwanted| found.iter().filter(|stray| unwanted.is(stray)).map(|stray| stray.id[0]).collect::<Vec<_>>();
        assert_eq!(goes(&Unwanted::Nothing), [0; 0]);
        assert_eq!(goes(&Unwanted::Strays), [4]);
        for byte in 1..=5 {
            let expected = if byte == 4 { vec![4] } else { vec![] };
            assert_eq!(goes(&Unwanted::Stray(id(byte).0.to_vec())), expected);
        }
    }
}

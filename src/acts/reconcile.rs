//! The tokens held against the ledger.

use std::collections::BTreeMap;

use crate::authn::Operator;
use crate::ledger::KeyRow;
use crate::model::{KeyId, Refusal};
use crate::proto::{self, Purpose, TokenRole, entry::Body};

use super::keys::{self, name};
use super::{Acts, hsm_refusal};

/// Something that is in a token and not in the ledger, or the other way round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stray {
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

impl Stray {
    /// Whether keyward made it: by its label. Anything else in the token is somebody else's.
    fn is_an_orphan(&self) -> bool {
        use Purpose::{Canary, Issuing, Ledger, Root, TokenSigning, Wrapping};
        let ours = [Root, Issuing, Ledger, Canary, TokenSigning, Wrapping];
        let labelled = ours.iter().any(|purpose| self.label.starts_with(&format!("keyward/{}/", name(*purpose))));
        self.objects > 0 && labelled
    }
}

impl Acts {
    /// Objects without a row and rows without an object, in both tokens. With `destroy`, objects that keyward made under an id of which the
    /// ledger knows nothing are destroyed; nothing else ever is.
    ///
    /// # Errors
    /// `HSM_UNAVAILABLE`, `LEDGER_UNAVAILABLE`.
    pub async fn reconcile(&self, operator: &Operator, destroy: bool, reason: &str) -> Result<Vec<Stray>, Refusal> {
        // No key is made meanwhile.
        let _one = self.rotating.lock().await;
        let authorities = self.authorities()?;
        let tokens = authorities.tokens();
        let rows = keys::rows(&self.ledger).await?;
        let roles: &[TokenRole] =
            if tokens.shared { &[TokenRole::Authority] } else { &[TokenRole::Authority, TokenRole::Agents] };
        let mut strays = Vec::new();
        for role in roles {
            let hsm = tokens.of(*role);
            let rows = rows.iter().filter(|row| tokens.shared || row.token == *role);
            let mut missing: BTreeMap<&[u8], &KeyRow> = rows.map(|row| (row.id.0.as_slice(), row)).collect();
            for held in hsm.inventory().await.map_err(hsm_refusal)? {
                if missing.remove(held.id.as_slice()).is_none() {
                    let (id, label, objects) = (held.id, held.label, held.objects);
                    let token = hsm.name().1;
                    strays.push(Stray {
                        role: *role,
                        token,
                        id,
                        label,
                        objects,
                        purpose: Purpose::Unspecified,
                        destroyed: false,
                    });
                }
            }
            strays.extend(missing.into_values().map(|row| Stray {
                role: *role,
                token: hsm.name().1,
                id: row.id.0.to_vec(),
                label: String::new(),
                objects: 0,
                purpose: row.purpose,
                destroyed: false,
            }));
        }
        for stray in strays.iter_mut().filter(|stray| destroy && stray.is_an_orphan()) {
            let Some(id) = KeyId::from_slice(&stray.id) else { continue };
            let objects_destroyed = tokens.of(stray.role).destroy(id).await.map_err(hsm_refusal)?;
            let (by, token) = (Some(operator.signs(reason)), stray.role.into());
            let body = proto::OrphansDestroyed { by, token, key_id: stray.id.clone(), objects_destroyed };
            self.ledger.record(Body::OrphansDestroyed(body)).await?;
            stray.destroyed = true;
        }
        Ok(strays)
    }
}

//! What the entries say of a key in the token. Its row says as much, but anybody who can write to the file says it there, too: by a row alone
//! no key is destroyed, and none is published.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::{KeyId, PublicKey};
use crate::proto::{self, entry::Body};

use super::agent_keys::held::entry;
use super::store::{Reader, StoreError};

impl Reader {
    /// Of keys that rows call intended those of which the entries say so, with their intents: none since says that it was made, put to use or
    /// given up. One look back for all of them, until the oldest intent, at entries as their leaves have them, so that none can be hidden; a
    /// key that no entry intends makes it one at everything. Blocking.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn open_key_intents(&self, keys: &[KeyId]) -> Result<BTreeMap<KeyId, proto::KeyIntended>, StoreError> {
        let (mut sought, mut open) = (keys.iter().copied().collect::<BTreeSet<_>>(), BTreeMap::new());
        for index in (0..self.size()?).rev() {
            if sought.is_empty() {
                break;
            }
            // What came before it nobody can tell.
            let Some(entry) = entry(&self.locked(), index)? else { break };
            let of = match &entry.body {
                Some(Body::KeyIntended(intended)) => &intended.key_id,
                Some(Body::KeyActivated(activated)) => &activated.key_id,
                Some(Body::KeyAbandoned(abandoned)) => &abandoned.key_id,
                Some(Body::AgentKeyCreated(proto::AgentKeyCreated { version: Some(version), .. })) => &version.key_id,
                Some(Body::AgentKeyRotated(proto::AgentKeyRotated { version: Some(version), .. })) => &version.key_id,
                _ => continue,
            };
            let Some(key) = KeyId::from_slice(of).filter(|key| sought.remove(key)) else { continue };
            if let Some(Body::KeyIntended(intended)) = entry.body {
                open.insert(key, intended);
            }
        }
        Ok(open)
    }

    /// The public key of an authority as the entry has it that put the key to use; `None` where there is no such entry. Blocking: looks back
    /// from the newest entry.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn activated_key(&self, id: &KeyId) -> Result<Option<PublicKey>, StoreError> {
        for index in (0..self.size()?).rev() {
            if let Some(Body::KeyActivated(activated)) = entry(&self.locked(), index)?.and_then(|entry| entry.body)
                && activated.key_id == id.0
            {
                return Ok(PublicKey::from_spki(&activated.spki).ok());
            }
        }
        Ok(None)
    }

    fn size(&self) -> Result<u64, StoreError> {
        let last: Option<i64> = self.locked().query_row("SELECT max(idx) FROM entry", [], |row| row.get(0))?;
        Ok(last.map_or(0, |last| last.cast_unsigned() + 1))
    }
}

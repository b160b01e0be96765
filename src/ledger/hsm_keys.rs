//! What the entries say of a key in the token. Its row says as much, but anybody who can write to the file says it there, too: by a row alone
//! no key is destroyed, and none is published.

use std::collections::{BTreeMap, BTreeSet};

use crate::model::{KeyId, PublicKey};
use crate::proto::{self, entry::Body};

use super::agent_keys::KeyOf;
use super::agent_keys::held::entry;
use super::store::{Reader, StoreError};

impl Reader {
    /// Of keys that rows call intended those of which the entries say so, with their intents: none since says that it was made, put to use or
    /// given up. One look back for all of them, until the oldest intent, at entries as their leaves have them, so that none can be hidden; a
    /// key that no entry intends makes it one at everything. `size` is how many entries the ledger has: the file may have more. Blocking.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn open_key_intents(&self, keys: &[KeyId], size: u64) -> Result<BTreeMap<KeyId, proto::KeyIntended>, StoreError> {
        let (mut sought, mut open) = (keys.iter().copied().collect::<BTreeSet<_>>(), BTreeMap::new());
        for index in (0..size).rev() {
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

    /// Of resident keys that rows call ended those of which the entries say so: the key was destroyed, another version followed it, or its
    /// object ended. A look back as in [`Reader::open_key_intents`], until the entries that put them to use, because whose they are is not
    /// believed by a row either. Blocking.
    ///
    /// # Errors
    /// When the file cannot be read or a row breaks a rule.
    pub fn ended_keys(&self, keys: &[KeyId], size: u64) -> Result<BTreeSet<KeyId>, StoreError> {
        let mut sought = BTreeMap::new();
        for key in keys {
            if let Some(of) = self.owner_of_object(*key)? {
                sought.insert(*key, (of, false));
            }
        }
        let mut ended = BTreeSet::new();
        for index in (0..size).rev() {
            if sought.is_empty() {
                break;
            }
            let Some(entry) = entry(&self.locked(), index)? else { break };
            let (agent, epoch, name, version) = match &entry.body {
                Some(Body::AgentKeyObjectEnded(over)) => {
                    ended.extend(KeyId::from_slice(&over.key_id).filter(|key| sought.remove(key).is_some()));
                    continue;
                }
                Some(Body::AgentKeyDestroyed(gone)) => (&gone.agent, gone.epoch, &gone.name, None),
                Some(Body::AgentKeyRotated(rotated)) => (&rotated.agent, rotated.epoch, &rotated.name, rotated.version.as_ref()),
                Some(Body::AgentKeyCreated(created)) => (&created.agent, created.epoch, &created.name, created.version.as_ref()),
                _ => continue,
            };
            let is_its = |of: &KeyOf| (of.agent.as_str(), of.epoch, of.name.as_str()) == (agent.as_str(), epoch, name.as_str());
            if let Some(key) = version.and_then(|version| KeyId::from_slice(&version.key_id))
                && let Some((of, over)) = sought.remove(&key)
                && over
                && is_its(&of)
            {
                ended.insert(key);
            }
            for (of, over) in sought.values_mut() {
                *over |= is_its(of);
            }
        }
        Ok(ended)
    }

    /// The public key of an authority as the entry has it that put the key to use; `None` where there is no such entry. Blocking: looks back
    /// from the newest of `size` entries, as far as they can be read.
    ///
    /// # Errors
    /// When the file cannot be read.
    pub fn activated_key(&self, id: &KeyId, size: u64) -> Result<Option<PublicKey>, StoreError> {
        for index in (0..size).rev() {
            let Some(entry) = entry(&self.locked(), index)? else { break };
            if let Some(Body::KeyActivated(activated)) = entry.body
                && activated.key_id == id.0
            {
                return Ok(PublicKey::from_spki(&activated.spki).ok());
            }
        }
        Ok(None)
    }
}

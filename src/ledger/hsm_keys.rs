//! What the entries say of a key in the token. Its row says as much, but anybody who can write to the file says it there, too: by a row alone
//! no key is destroyed, and none is published.

use crate::model::{KeyId, PublicKey};
use crate::proto::{self, entry::Body};

use super::agent_keys::held::entry;
use super::store::{Reader, StoreError};

impl Reader {
    /// The intent of a key that was never entered: no entry says that it was made or put to use, or that it was given up. Looks at every entry
    /// since the intent, each as its leaf has it, so that none can be hidden; what a crash left open is among the last. Blocking.
    ///
    /// # Errors
    /// [`StoreError::NotAsRecorded`] where there is none, whatever the row says; when the file cannot be read.
    pub fn open_key_intent(&self, id: &KeyId) -> Result<proto::KeyIntended, StoreError> {
        let wrong = |what: String| StoreError::NotAsRecorded(format!("key {id} is not one in the making: {what}"));
        for index in (0..self.size()?).rev() {
            let Some(entry) = entry(&self.locked(), index)? else {
                return Err(wrong(format!("entry {index} is not the one in the tree, or is not there")));
            };
            let (of, what) = match entry.body {
                Some(Body::KeyIntended(intended)) if intended.key_id == id.0 => return Ok(intended),
                Some(Body::KeyActivated(activated)) => (activated.key_id, "was made"),
                Some(Body::KeyAbandoned(abandoned)) => (abandoned.key_id, "was given up"),
                Some(Body::AgentKeyCreated(created)) => (created.version.unwrap_or_default().key_id, "is an agent's"),
                Some(Body::AgentKeyRotated(rotated)) => (rotated.version.unwrap_or_default().key_id, "is an agent's"),
                _ => continue,
            };
            if of == id.0 {
                return Err(wrong(format!("it {what} in entry {index}")));
            }
        }
        Err(wrong("no entry intends it".to_owned()))
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

//! A key's next version.

use std::sync::Arc;

use crate::authn::Connection;
use crate::ledger::{KeyVersion, VERSIONS_MAX, in_time};
use crate::model::{Reason, Refusal, UnixTime};

use super::create::TRIES_MAX;
use super::{Acts, KeyShown, Loaded, in_progress, stored};

impl Acts {
    /// A new version signs from its entry on; the older ones verify until they expire. `known` is the newest version that the caller knows
    /// of (0: whatever it is), so that a request whose answer was lost rotates once. Gives the entry's index; none: it had been rotated.
    ///
    /// # Errors
    /// As [`Acts::sign`] of the key's state; `KEYS_TOO_MANY`; `RATE_LIMITED`; `REQUEST_IN_PROGRESS`; `HSM_UNAVAILABLE`, `LEDGER_UNAVAILABLE`.
    pub async fn rotate_key(&self, source: &Arc<Connection>, name: &str, known: u32) -> Result<(KeyShown, Option<u64>), Refusal> {
        let rotated = self.rotate_known(source, name, known).await;
        self.refused_key_call("RotateKey", source, rotated).await
    }

    async fn rotate_known(&self, source: &Connection, name: &str, known: u32) -> Result<(KeyShown, Option<u64>), Refusal> {
        let caller = source.agent(&self.ledger)?;
        let now = self.trusted_now()?;
        self.keys.rates.change(caller.agent(), now.seconds())?;
        let of = Self::own_key(caller, name)?;
        let loaded = self.load_key(&of).await?;
        let key = &loaded.key;
        // An expired key may be rotated: that is what the advice says. A disabled one may not.
        self.ledger.may_rotate(key)?;
        let before = key.newest()?;
        if known != 0 && known < before.number {
            return Ok((self.shown(stored(key)), None));
        }
        if key.versions().iter().filter(|version| version.expires > now).count() >= VERSIONS_MAX {
            let advice = format!("wait until an older version expires: {VERSIONS_MAX} of them verify at once");
            return Err(Refusal::new(Reason::KeysTooMany, advice));
        }
        let _turn = self.keys.making_rsa.make(&of.agent, key.terms().algorithm)?;
        let index = self.replace_version(&loaded, &before, now).await?;
        Ok((self.shown(stored(key)), Some(index)))
    }

    /// Another version signs instead of the newest one, `before`. Gives the entry's index.
    pub(super) async fn replace_version(&self, loaded: &Loaded, before: &KeyVersion, now: UnixTime) -> Result<u64, Refusal> {
        let key = &loaded.key;
        let (making, _) = self.keys.making.make(key.of(), false)?;
        self.has_room(&*self.keys.token()?, &making, key.terms(), Some(before.key_id)).await?;
        for tries_left in (0..TRIES_MAX).rev() {
            let token = self.keys.token()?;
            let version = self.make_version(&token, &making, key.terms(), before.number + 1, now).await?;
            let (key_id, storage) = (version.key_id, version.storage);
            let changing = match in_time(Arc::clone(&loaded.changing).lock_owned()).await {
                Ok(changing) => changing,
                Err(refusal) => {
                    // For certain no entry puts it to use.
                    self.give_up(&token, key_id, storage, "another change of its key did not come to its end").await;
                    return Err(refusal);
                }
            };
            // Whoever signs with the old version finishes first, by deadlines of his own.
            let signing = Arc::clone(&loaded.signing).write_owned().await;
            let entered = if key.newest()?.number == before.number {
                self.ledger.rotate_key(key, version, now, (changing, signing, Arc::clone(&making))).await
            } else {
                Err(in_progress())
            };
            match entered {
                Ok(index) => {
                    self.ledger.seal_signatures(key);
                    // What signed until now never signs again.
                    loaded.unbind();
                    self.destroy_objects(&token, vec![(before.key_id, before.storage)]).await;
                    return Ok(index);
                }
                Err(refusal) => self.not_entered(refusal, &token, key_id, storage, tries_left).await?,
            }
        }
        Err(in_progress())
    }
}

//! A key signs no more.

use std::sync::Arc;

use crate::authn::{Connection, Operator};
use crate::ledger::{Ends, KeyOf, in_time};
use crate::model::{AgentId, KeyId, KeyName, Reason, Refusal};
use crate::proto::{self, KeyStorage};

use super::{Acts, KeyToken, Loaded};

impl Acts {
    /// An agent, which may name itself, ends a key of its own. In force before it is durable, acknowledged when it is; `None`: it was so before.
    ///
    /// # Errors
    /// `KEY_NOT_FOUND`, `KEY_DESTROYED` where it is to be disabled; as the agent's standing; `RATE_LIMITED`; `LEDGER_UNAVAILABLE`.
    pub async fn end_own_key(
        &self,
        source: &Arc<Connection>,
        (agent, name): (&str, &str),
        how: Ends,
    ) -> Result<Option<u64>, Refusal> {
        let ended = async {
            let caller = source.agent(&self.ledger)?;
            self.keys.rates.change(caller.agent(), self.ledger.clock().reckoned().seconds())?;
            Self::is_own(caller, agent)?;
            self.end(Self::own_key(caller, name)?, how.clone(), None).await
        };
        let method = match how {
            Ends::Disabled => "DisableKey",
            Ends::Destroyed => "DestroyKey",
        };
        let ended = ended.await;
        self.refused_key_call(method, source, ended).await
    }

    /// An operator ends a key of any agent; epoch 0 is the current one.
    ///
    /// # Errors
    /// `AGENT_UNKNOWN`, `KEY_NOT_FOUND`, `KEY_DESTROYED`; `LEDGER_UNAVAILABLE`.
    pub async fn end_key(
        &self,
        operator: &Operator,
        (agent, epoch, name): (AgentId, u32, &str),
        how: Ends,
        reason: &str,
    ) -> Result<Option<u64>, Refusal> {
        let name = KeyName::parse(name).map_err(|_| crate::ledger::key_not_found())?;
        let epoch = self.epoch_or_current(&agent, epoch)?;
        let of = KeyOf { agent, epoch, name };
        tracing::warn!(agent = %of.agent, key = %of.name, ?how, "an operator ends a key");
        self.end(of, how, Some(operator.signs(reason))).await
    }

    async fn end(&self, of: KeyOf, how: Ends, by: Option<proto::Operator>) -> Result<Option<u64>, Refusal> {
        let loaded = match self.load_key(&of).await {
            // What its row holds is nobody's, and stays where it is; the key itself an operator takes away.
            Err(refusal) if refusal.reason == Reason::KeyNotAsRecorded && by.is_some() && matches!(how, Ends::Destroyed) => {
                let bare = self.read(move |reader| reader.bare_agent_key(&of)).await?.ok_or_else(crate::ledger::key_not_found)?;
                Arc::new(Loaded::new(self.ledger.restore_key(bare)?))
            }
            loaded => loaded?,
        };
        let changing = in_time(Arc::clone(&loaded.changing).lock_owned()).await?;
        let destroys = matches!(how, Ends::Destroyed);
        let objects: Vec<_> = loaded.key.versions().iter().map(|version| (version.key_id, version.storage)).collect();
        let index = self.ledger.end_key(&loaded.key, how, by, (changing, Arc::clone(&loaded.key))).await?;
        self.ledger.seal_signatures(&loaded.key);
        if destroys && index.is_some() {
            loaded.unbind();
            if let Ok(token) = self.keys.token() {
                self.destroy_objects(&token, objects).await;
            }
        }
        Ok(index)
    }

    /// After the entry that ends them. What cannot be destroyed now is destroyed later (`over.rs`).
    pub(super) async fn destroy_objects(&self, token: &KeyToken, objects: Vec<(KeyId, KeyStorage)>) {
        for (id, storage) in objects {
            let destroyed = token.hsm.destroy_agent_key(id, storage).await;
            if destroyed.is_ok() {
                self.keys.session.gone(id);
            }
            let noted = match destroyed {
                Ok(_) if storage == KeyStorage::Resident => self.ledger.key_object_destroyed(id).await,
                Ok(_) => Ok(()),
                Err(error) => Err(super::hsm_refusal(error)),
            };
            if let Err(refusal) = noted {
                self.keys.ended.may_be(id);
                tracing::warn!(key = %id, ?refusal, "an ended key's object may be in the token for a while");
            }
        }
    }
}

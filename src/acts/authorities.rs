//! The authorities in force, and the bundle that peers trust.

use std::sync::Arc;

use crate::hsm::SigningKey;
use crate::ledger::{AuthorityRow, Ledger};
use crate::model::Refusal;
use crate::proto::{self, Purpose};

use super::certificate::Authority;
use super::keys::Keys;

/// How long a peer may keep a bundle before it asks again, in seconds.
const REFRESH_HINT_SECONDS: u32 = 300;

/// What signs, and under what it is trusted.
pub struct Authorities {
    issuing: Arc<Authority>,
    root: Vec<u8>,
    /// Held so that it is watched with the others; an outside root's is not here.
    root_key: Option<SigningKey>,
    ledger_key: SigningKey,
    bundle: proto::Bundle,
}

impl Authorities {
    /// From the bound keys and the certificates in force.
    ///
    /// # Errors
    /// When `keyward init` has not finished.
    pub async fn load(ledger: &Ledger, keys: Keys) -> Result<Self, Refusal> {
        let rows = certificates(ledger).await?;
        let certificate = |purpose: Purpose| {
            rows.iter().find(|row| row.purpose == purpose).map(|row| row.certificate.clone()).ok_or_else(|| {
                Refusal::internal("`keyward init` has not finished: run it, or give it the certificates of the outside root")
            })
        };
        let root = certificate(Purpose::Root)?;
        let issuing = Arc::new(Authority::new(keys.issuing, certificate(Purpose::Issuing)?)?);
        let bundle = proto::Bundle { authorities: vec![root.clone()], sequence: 1, refresh_hint_seconds: REFRESH_HINT_SECONDS };
        Ok(Self { issuing, root, root_key: keys.root, ledger_key: keys.ledger, bundle })
    }

    /// What signs leaves and CRLs.
    #[must_use]
    pub fn issuing(&self) -> Arc<Authority> {
        Arc::clone(&self.issuing)
    }

    /// What peers trust.
    #[must_use]
    pub fn bundle(&self) -> proto::Bundle {
        self.bundle.clone()
    }

    /// What signs checkpoints.
    #[must_use]
    pub fn ledger_key(&self) -> &SigningKey {
        &self.ledger_key
    }

    /// For people.
    #[must_use]
    pub fn list(&self) -> Vec<proto::Authority> {
        vec![
            proto::Authority {
                purpose: Purpose::Root.into(),
                key_id: self.root_key.as_ref().map(|key| key.id().0.to_vec()).unwrap_or_default(),
                certificate: self.root.clone(),
                in_hsm: self.root_key.is_some(),
            },
            proto::Authority {
                purpose: Purpose::Issuing.into(),
                key_id: self.issuing.key().id().0.to_vec(),
                certificate: self.issuing.certificate().to_vec(),
                in_hsm: true,
            },
        ]
    }
}

/// The certificates in force.
pub(super) async fn certificates(ledger: &Ledger) -> Result<Vec<AuthorityRow>, Refusal> {
    let ledger = ledger.clone();
    tokio::task::spawn_blocking(move || ledger.reader().authorities())
        .await
        .map_err(Refusal::internal)?
        .map_err(Refusal::internal)
}

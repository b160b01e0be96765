//! Agents' keys: three classes of storage, one face, and what must hold when the token, a session or a blob goes wrong.

use std::sync::Arc;
use std::time::Duration;

use keyward::hsm::{AgentKey, Error, Hsm, MadeKey, Modules, Settings, SignError};
use keyward::model::{Algorithm, Digest, KeyId, PublicKey};
use keyward::proto::KeyStorage::{self, Resident, Session, Wrapped};

use super::shim::Shim;
use super::{House, in_house, lacks, new_key, until};

/// A token and a wrapping key, where it wraps.
struct Room {
    hsm: Hsm,
    wrapping: Option<KeyId>,
}

/// An agent's key as whoever keeps a table of them knows it.
#[derive(Clone)]
struct Row {
    id: KeyId,
    public: PublicKey,
    storage: KeyStorage,
    wrapped: Option<Arc<[u8]>>,
}

fn wraps() -> bool {
    lacks().is_empty()
}

fn digest(message: &[u8]) -> Arc<[u8]> {
    Digest::of(message).0.into()
}

impl Room {
    async fn of(hsm: Hsm) -> Self {
        let wrapping = wraps().then(KeyId::random);
        if let Some(id) = wrapping {
            hsm.generate_wrapping(id, "keyward/wrapping/test").await.unwrap();
        }
        Self { hsm, wrapping }
    }

    async fn open(house: &House) -> Self {
        Self::of(house.open(&Modules::new(), "agents")).await
    }

    /// One lane behind the fault module, and a canary.
    async fn behind_the_shim(house: &House) -> (Self, Shim) {
        let mut settings: Settings = house.settings("agents");
        settings.token.module = super::shim_module();
        settings.token.lanes = 1;
        settings.sign_deadline = Duration::from_secs(2);
        let hsm = Hsm::open(&Modules::new(), settings, Arc::default()).unwrap();
        hsm.set_canary(new_key(&hsm, Algorithm::P256).await);
        (Self::of(hsm).await, Shim::at(&house.0.join("shim.sock")))
    }

    fn wrapping_for(&self, storage: KeyStorage) -> Option<KeyId> {
        self.wrapping.filter(|_| storage == Wrapped)
    }

    async fn make(&self, algorithm: Algorithm, storage: KeyStorage) -> Row {
        let id = KeyId::random();
        let MadeKey { public, wrapped } =
            self.hsm.make_agent_key(id, algorithm, storage, self.wrapping_for(storage)).await.unwrap();
        assert_eq!(wrapped.is_some(), storage == Wrapped);
        Row { id, public, storage, wrapped: wrapped.map(Into::into) }
    }

    fn try_bind(&self, row: &Row) -> Result<AgentKey, Error> {
        self.hsm.agent_key(row.id, row.public.clone(), row.storage, row.wrapped.clone(), self.wrapping_for(row.storage))
    }

    fn bind(&self, row: &Row) -> AgentKey {
        self.try_bind(row).unwrap()
    }
}

async fn signs(key: &AgentKey, message: &[u8]) {
    let input: Arc<[u8]> = key.public().algorithm().input(message).into();
    let signature = key.sign_digest(Arc::clone(&input)).await.unwrap();
    assert!(key.public().raw_verifier().unwrap().verifies(&input, &signature));
}

#[test]
fn a_key_of_each_class_and_algorithm_signs_and_is_gone_when_destroyed() {
    in_house("agent_keys::a_key_of_each_class_and_algorithm_signs_and_is_gone_when_destroyed", async |house| {
        let room = Room::open(&house).await;
        let all = [Session, Wrapped, Resident];
        for algorithm in [Algorithm::P256, Algorithm::P384, Algorithm::Ed25519] {
            // SoftHSM wraps no Ed25519 key.
            let classes = if wraps() && algorithm != Algorithm::Ed25519 { &all[..] } else { &[Session, Resident] };
            assert_eq!(room.hsm.storages(algorithm), classes);
            for &storage in classes {
                let row = room.make(algorithm, storage).await;
                let key = room.bind(&row);
                assert_eq!(key.public().algorithm(), algorithm);
                signs(&key, b"first").await;
                signs(&room.bind(&row), b"second").await;
                if let Some(size) = algorithm.digest_size() {
                    // Tokens sign any length without a word.
                    let error = key.sign_digest(vec![7; size + 1].into()).await.unwrap_err();
                    assert!(matches!(error, SignError::NotSigned(Error::Input { .. })), "{error}");
                    let half = key.sign_digest(vec![7; size].into()).await.unwrap().len() / 2;
                    assert_eq!(half, size, "r and s, each as long as the digest");
                }
                drop(key);
                let objects = room.hsm.destroy_agent_key(row.id, storage).await.unwrap();
                assert_eq!(objects, if storage == Resident { 2 } else { 1 });
                assert_eq!(room.hsm.destroy_agent_key(row.id, storage).await.unwrap(), 0);
            }
        }
        assert!(room.hsm.status().usable && room.hsm.status().reconnects == 0);
        room.hsm.shut_down(Duration::from_secs(5));
    });
}

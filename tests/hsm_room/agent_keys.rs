//! Agents' keys: three classes of storage, one face, and what must hold when the token, a session or a blob goes wrong.

use std::fs;
use std::sync::Arc;
use std::time::{Duration, Instant};

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::mechanism::Mechanism;
use cryptoki::object::Attribute;
use cryptoki::slot::Slot;
use keyward::hsm::{AgentKey, Error, Hsm, MadeKey, Modules, Settings, SignError};
use keyward::model::{Algorithm, Digest, KeyId, PublicKey, hex};
use keyward::proto::KeyStorage::{self, Resident, Session, Wrapped};

use super::faults::{AT_SIGN_INIT, Answer};
use super::shim::Shim;
use super::{House, in_house, lacks, new_key, until};

/// Of a resident key.
const LABEL: &str = "keyward/agent/11111111.test";

/// The codes by which an owner's session is known to be dead.
const DEAD_SESSION: [u32; 5] = [0xb3, 0xb0, 0x90, 0x91, 0xb5];

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

    /// One lane behind the fault module, and no canary: it would now and then meet the fault that is meant for another.
    async fn behind_the_shim(house: &House) -> (Self, Shim) {
        let mut settings: Settings = house.settings("agents");
        settings.token.module = super::shim_module();
        settings.token.lanes = 1;
        settings.sign_deadline = Duration::from_secs(2);
        let hsm = Hsm::open(&Modules::new(), settings, Arc::default()).unwrap();
        (Self::of(hsm).await, Shim::at(&house.0.join("shim.sock")))
    }

    fn wrapping_for(&self, storage: KeyStorage) -> Option<KeyId> {
        self.wrapping.filter(|_| storage == Wrapped)
    }

    async fn make(&self, algorithm: Algorithm, storage: KeyStorage) -> Row {
        self.make_as(KeyId::random(), algorithm, storage).await
    }

    async fn make_at(&self, id: KeyId, storage: KeyStorage) -> Row {
        self.make_as(id, Algorithm::P256, storage).await
    }

    async fn make_as(&self, id: KeyId, algorithm: Algorithm, storage: KeyStorage) -> Row {
        let made = self.hsm.make_agent_key(id, algorithm, storage, self.wrapping_for(storage), LABEL).await;
        let MadeKey { public, wrapped } = made.unwrap();
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
        for algorithm in [Algorithm::P256, Algorithm::P384, Algorithm::Ed25519, Algorithm::Ps256] {
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
                    let made = key.sign_digest(vec![7; size].into()).await.unwrap().len();
                    // r and s are each as long as the digest; RSA's is as long as the modulus.
                    assert_eq!(made, if algorithm == Algorithm::Ps256 { 256 } else { 2 * size });
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

#[test]
fn a_key_that_is_slow_to_make_holds_up_its_own_kind_alone_and_only_so_many_wait() {
    in_house("agent_keys::a_key_that_is_slow_to_make_holds_up_its_own_kind_alone_and_only_so_many_wait", async |house| {
        let (room, shim) = Room::behind_the_shim(&house).await;
        let before = room.make(Algorithm::Ps256, Session).await;
        shim.tell("hang C_GenerateKeyPair");
        let mut making = tokio::task::JoinSet::new();
        for _ in 0..20 {
            let hsm = room.hsm.clone();
            making.spawn(async move { hsm.make_agent_key(KeyId::random(), Algorithm::Ps256, Session, None, LABEL).await });
        }
        // One is being made, fifteen wait for their turn, the others hear so at once.
        for _ in 0..4 {
            let refused = tokio::time::timeout(Duration::from_secs(5), making.join_next()).await.expect("at once");
            assert!(matches!(refused.unwrap().unwrap(), Err(Error::QueueFull)));
        }
        shim.tell("await hanging=1");
        for shard in [0, 1] {
            let quick = room.make_at(id_of(shard), Session).await;
            signs(&room.bind(&quick), b"nobody waits").await;
        }
        signs(&room.bind(&before), b"nor who signs with one that is there").await;
        assert!(making.try_join_next().is_none(), "they wait");
        shim.tell("release");
        for made in making.join_all().await {
            made.unwrap();
        }
        room.hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn no_authority_has_an_rsa_key() {
    in_house("agent_keys::no_authority_has_an_rsa_key", async |house| {
        let hsm = house.open(&Modules::new(), "agents");
        let id = KeyId::random();
        assert!(matches!(hsm.generate(id, Algorithm::Ps256, "keyward/test").await, Err(Error::Incapable { .. })));
        assert!(hsm.find(id).await.unwrap().is_empty());
        hsm.shut_down(Duration::from_secs(5));
    });
}

/// An id of this shard: an owner has those with the same last bit.
fn id_of(shard: u8) -> KeyId {
    let mut id = KeyId::random();
    id.0[15] = id.0[15] & !1 | shard;
    id
}

/// How often the token signed this message's digest.
fn times_signed(house: &House, message: &[u8]) -> usize {
    let signed = hex(&digest(message));
    fs::read_to_string(house.0.join("shim.log")).unwrap().lines().filter(|line| line.ends_with(&signed)).count()
}

async fn is_not_signed(key: &AgentKey, message: &[u8]) -> Error {
    match key.sign_digest(digest(message)).await {
        Err(SignError::NotSigned(error)) => error,
        other => panic!("{other:?}"),
    }
}

#[test]
fn an_authority_key_is_not_reached_as_an_agents_nor_an_agents_as_an_authoritys() {
    in_house("agent_keys::an_authority_key_is_not_reached_as_an_agents_nor_an_agents_as_an_authoritys", async |house| {
        let room = Room::open(&house).await;
        let hsm = &room.hsm;
        let authority = new_key(hsm, Algorithm::P256).await;
        let (id, public) = (authority.id(), authority.public().clone());
        let row = Row { id, public: public.clone(), storage: Resident, wrapped: None };
        for id in [id, KeyId::random()] {
            assert!(matches!(room.try_bind(&Row { id, ..row.clone() }), Err(Error::NotAgents(_))));
        }
        let other = room.make(Algorithm::P256, Resident).await;
        assert!(matches!(room.try_bind(&Row { id, ..other.clone() }), Err(Error::NotAgents(_))));
        assert!(matches!(hsm.make_agent_key(id, Algorithm::P256, Session, None, LABEL).await, Err(Error::NotAgents(_))));
        assert!(matches!(hsm.destroy_agent_key(id, Resident).await, Err(Error::NotAgents(_))));
        // Where nobody holds it any more its label tells.
        drop(authority);
        let error = is_not_signed(&room.bind(&row), b"reached").await;
        assert!(matches!(error, Error::NotAgents(_)), "{error}");
        assert!(matches!(hsm.destroy_agent_key(id, Resident).await, Err(Error::NotAgents(_))));
        assert_eq!(hsm.find(id).await.unwrap().len(), 2);
        // And the other way round.
        let agents = room.make(Algorithm::P256, Resident).await;
        assert!(hsm.key(agents.id, agents.public.clone()).await.is_err());
        let held = room.bind(&agents);
        assert!(hsm.key(agents.id, agents.public.clone()).await.is_err());
        signs(&held, b"its own").await;
        hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn when_an_owners_session_dies_wrapped_keys_come_back_and_session_keys_are_lost() {
    in_house("agent_keys::when_an_owners_session_dies_wrapped_keys_come_back_and_session_keys_are_lost", async |house| {
        let (room, shim) = Room::behind_the_shim(&house).await;
        let (mine, others) = (room.make_at(id_of(0), Session).await, room.make_at(id_of(1), Session).await);
        let held = room.bind(&mine);
        signs(&held, b"before").await;
        let wrapped = if wraps() { Some(room.make_at(id_of(0), Wrapped).await) } else { None };
        // It is told at the next key that is made, which is made all the same.
        shim.tell("fail C_GenerateKeyPair rv=0xb3");
        let next = room.make_at(id_of(0), Session).await;
        signs(&room.bind(&next), b"next").await;
        assert!(matches!(is_not_signed(&held, b"lost").await, Error::KeyLost(_)));
        assert!(matches!(room.try_bind(&mine), Err(Error::KeyLost(_))));
        signs(&room.bind(&others), b"another shard").await;
        if let Some(row) = wrapped {
            let unwrapped = shim.calls("C_UnwrapKey");
            for _ in 0..3 {
                signs(&room.bind(&row), b"unwrapped again").await;
            }
            assert_eq!(shim.calls("C_UnwrapKey") - unwrapped, 1);
        }
        assert!(room.hsm.status().usable && room.hsm.status().reconnects == 0, "{:?}", room.hsm.status());
        room.hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn when_the_module_restarts_session_keys_are_lost_and_the_others_come_back() {
    in_house("agent_keys::when_the_module_restarts_session_keys_are_lost_and_the_others_come_back", async |house| {
        let (room, shim) = Room::behind_the_shim(&house).await;
        for (code, round) in [("0x30", 1), ("0x101", 2)] {
            let mut rows = vec![];
            for storage in room.hsm.storages(Algorithm::P256) {
                rows.push(room.make(Algorithm::P256, storage).await);
            }
            let keys: Vec<_> = rows.iter().map(|row| room.bind(row)).collect();
            for key in &keys {
                signs(key, b"before").await;
            }
            shim.tell(&format!("fail C_SignInit rv={code}"));
            assert!(keys[0].sign_digest(digest(b"lost")).await.is_err());
            until("it is back", Duration::from_secs(10), || {
                let status = room.hsm.status();
                status.usable && status.reconnects == round
            })
            .await;
            for (row, key) in rows.iter().zip(&keys) {
                if row.storage == Session {
                    assert!(matches!(is_not_signed(key, b"after").await, Error::KeyLost(_)));
                    assert!(matches!(room.try_bind(row), Err(Error::KeyLost(_))));
                } else {
                    signs(key, b"after").await;
                    signs(&room.bind(row), b"bound anew").await;
                }
            }
        }
        room.hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn another_keys_blob_makes_no_signature_that_leaves() {
    in_house("agent_keys::another_keys_blob_makes_no_signature_that_leaves", async |house| {
        let (room, _shim) = Room::behind_the_shim(&house).await;
        if !wraps() {
            return;
        }
        let (mine, other) = (room.make(Algorithm::P256, Wrapped).await, room.make(Algorithm::P256, Wrapped).await);
        assert_eq!(room.hsm.destroy_agent_key(mine.id, Wrapped).await.unwrap(), 1);
        let swapped = room.bind(&Row { wrapped: other.wrapped.clone(), ..mine.clone() });
        let error = swapped.sign_digest(digest(b"swapped")).await.unwrap_err();
        assert!(matches!(error, SignError::Unknown(Error::KeyMismatch(_))), "{error}");
        // From then on it has to prove itself first.
        for _ in 0..5 {
            assert!(matches!(is_not_signed(&swapped, b"swapped still").await, Error::KeyMismatch(_)));
        }
        assert_eq!((times_signed(&house, b"swapped"), times_signed(&house, b"swapped still")), (1, 0));
        assert!(room.hsm.status().usable && room.hsm.status().reconnects == 0, "{:?}", room.hsm.status());
        // With its own blob it is itself again, under the same binding.
        signs(&room.bind(&mine), b"mine").await;
        signs(&swapped, b"mine").await;
        signs(&room.bind(&other), b"other").await;
        room.hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn a_blob_that_was_touched_is_refused_and_costs_nobody_else_anything() {
    in_house("agent_keys::a_blob_that_was_touched_is_refused_and_costs_nobody_else_anything", async |house| {
        let (room, _shim) = Room::behind_the_shim(&house).await;
        if !wraps() {
            return;
        }
        let (row, session) = (room.make(Algorithm::P256, Wrapped).await, room.make(Algorithm::P256, Session).await);
        room.hsm.destroy_agent_key(row.id, Wrapped).await.unwrap();
        let whole = row.wrapped.clone().unwrap();
        let flipped = |at: usize| {
            let mut bytes = whole.to_vec();
            bytes[at] ^= 1;
            bytes
        };
        let mut bad: Vec<Vec<u8>> = [0, 7, 8, whole.len() / 2, whole.len() - 1].into_iter().map(flipped).collect();
        bad.extend([whole[..whole.len() - 8].to_vec(), whole[8..].to_vec(), whole[..3].to_vec(), vec![0; 1024]]);
        bad.push([&whole[..], &[0; 8]].concat());
        for blob in bad {
            let key = room.bind(&Row { wrapped: Some(blob.into()), ..row.clone() });
            let error = is_not_signed(&key, b"touched").await;
            assert!(matches!(error, Error::NotUnwrapped { .. }), "{error:?}");
        }
        assert_eq!(times_signed(&house, b"touched"), 0);
        assert!(room.try_bind(&Row { wrapped: Some(vec![0; 2000].into()), ..row.clone() }).is_err());
        assert!(room.hsm.status().usable && room.hsm.status().reconnects == 0, "{:?}", room.hsm.status());
        signs(&room.bind(&session), b"still there").await;
        signs(&room.bind(&row), b"whole").await;
        room.hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn a_key_rewrapped_under_another_wrapping_key_is_the_same_key() {
    in_house("agent_keys::a_key_rewrapped_under_another_wrapping_key_is_the_same_key", async |house| {
        let room = Room::open(&house).await;
        let Some(old) = room.wrapping else { return };
        let new = KeyId::random();
        room.hsm.generate_wrapping(new, "keyward/wrapping/next").await.unwrap();
        let row = room.make(Algorithm::P256, Wrapped).await;
        let held = room.bind(&row);
        signs(&held, b"before").await;
        let blob = row.wrapped.clone().unwrap();
        let again = room.hsm.rewrap_agent_key((row.id, Algorithm::P256), blob, old, new).await.unwrap();
        room.hsm.destroy(old).await.unwrap();
        let rebound = room.hsm.agent_key(row.id, row.public, Wrapped, Some(again.into()), Some(new)).unwrap();
        room.hsm.destroy_agent_key(row.id, Wrapped).await.unwrap();
        signs(&rebound, b"after").await;
        signs(&held, b"after").await;
        room.hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn rewrapping_leaves_no_object_behind_and_does_not_touch_the_one_that_signs() {
    in_house("agent_keys::rewrapping_leaves_no_object_behind_and_does_not_touch_the_one_that_signs", async |house| {
        let (room, shim) = Room::behind_the_shim(&house).await;
        let Some(old) = room.wrapping else { return };
        let new = KeyId::random();
        room.hsm.generate_wrapping(new, "keyward/wrapping/next").await.unwrap();
        let row = room.make(Algorithm::P256, Wrapped).await;
        let held = room.bind(&row);
        signs(&held, b"before").await;
        let blob = row.wrapped.clone().unwrap();
        let again = || room.hsm.rewrap_agent_key((row.id, Algorithm::P256), Arc::clone(&blob), old, new);
        let objects = || {
            let [unwrapped, destroyed] = ["C_UnwrapKey", "C_DestroyObject"].map(|name| shim.calls(name));
            i64::try_from(unwrapped).unwrap() - i64::try_from(destroyed).unwrap()
        };
        let before = objects();
        for _ in 0..20 {
            again().await.unwrap();
        }
        // The token fails between the two.
        shim.tell("fail C_WrapKey rv=0x05");
        again().await.unwrap_err();
        again().await.unwrap();
        assert_eq!(objects(), before);
        signs(&held, b"after").await;
        assert_eq!(objects(), before, "it was not unwrapped again");
        // Not under the one that it is said to be under.
        assert!(matches!(
            room.hsm.rewrap_agent_key((row.id, Algorithm::P256), blob.clone(), new, old).await,
            Err(Error::NotUnwrapped { .. })
        ));
        assert_eq!(objects() - before, 1, "C_UnwrapKey was called, and made nothing");
        room.hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn unwrapped_keys_are_bounded_and_none_is_destroyed_while_it_signs() {
    in_house("agent_keys::unwrapped_keys_are_bounded_and_none_is_destroyed_while_it_signs", async |house| {
        let (room, shim) = Room::behind_the_shim(&house).await;
        if !wraps() {
            return;
        }
        room.hsm.set_unwrapped_max(8);
        let objects = || {
            let [pairs, unwrapped, destroyed] =
                ["C_GenerateKeyPair", "C_UnwrapKey", "C_DestroyObject"].map(|name| shim.calls(name));
            i64::try_from(2 * pairs + unwrapped).unwrap() - i64::try_from(destroyed).unwrap()
        };
        let before = objects();
        let mut rows = vec![];
        for _ in 0..32 {
            rows.push(room.make(Algorithm::P256, Wrapped).await);
        }
        let room = Arc::new(room);
        let mut at_work = tokio::task::JoinSet::new();
        for worker in 0..8 {
            let (room, rows) = (Arc::clone(&room), rows.clone());
            at_work.spawn(async move {
                for round in 0..40 {
                    signs(&room.bind(&rows[(worker * 5 + round * 7) % rows.len()]), b"one of many").await;
                }
            });
        }
        while let Some(done) = at_work.join_next().await {
            done.unwrap();
        }
        // Those whose last signer has just let go are buried by the next errand.
        for row in &rows[..4] {
            signs(&room.bind(row), b"last").await;
        }
        let kept = objects() - before;
        assert!((1..=10).contains(&kept), "{kept} objects");
        assert!(room.hsm.status().usable && room.hsm.status().reconnects == 0, "{:?}", room.hsm.status());
        room.hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn at_c_unwrap_key_each_code_has_its_consequence() {
    in_house("agent_keys::at_c_unwrap_key_each_code_has_its_consequence", async |house| {
        let (room, shim) = Room::behind_the_shim(&house).await;
        if !wraps() {
            return;
        }
        let row = room.make_at(id_of(0), Wrapped).await;
        for (number, (code, name, expected, recovers)) in AT_SIGN_INIT.iter().enumerate() {
            let message = [b"unwrap", &number.to_be_bytes()[..]].concat();
            let back = room.hsm.status().reconnects;
            // A key that nothing brings back, of the same owner.
            let bystander = room.bind(&room.make_at(id_of(0), Session).await);
            room.hsm.destroy_agent_key(row.id, Wrapped).await.unwrap();
            shim.tell(&format!("fail C_UnwrapKey rv={code:#x}"));
            let answer = room.bind(&row).sign_digest(digest(&message)).await;
            // A vague answer tells of the blob.
            let vague = matches!(code, 0x05 | 0x06 | 0x07 | 0x50 | 0x204 | 0x8000_0001);
            match (&answer, expected) {
                (Ok(_), Answer::Signed) if !vague => assert_eq!(times_signed(&house, &message), 1, "{name}"),
                (Err(SignError::NotSigned(error)), expected) if vague || *expected != Answer::Signed => {
                    assert_eq!(error.is_overload(), *expected == Answer::Shed, "{name}: {error}");
                    assert_eq!(times_signed(&house, &message), 0, "{name}");
                }
                _ => panic!("{name}: {answer:?}"),
            }
            until(name, Duration::from_secs(10), || room.hsm.status().usable).await;
            signs(&room.bind(&row), b"well").await;
            assert_eq!(room.hsm.status().reconnects - back, u64::from(*recovers), "{name}");
            if *recovers || DEAD_SESSION.contains(code) {
                assert!(matches!(is_not_signed(&bystander, b"lost").await, Error::KeyLost(_)), "{name}");
            } else {
                signs(&bystander, b"untouched").await;
            }
        }
        room.hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn a_key_that_cannot_be_made_leaves_nothing_behind_and_the_token_well() {
    in_house("agent_keys::a_key_that_cannot_be_made_leaves_nothing_behind_and_the_token_well", async |house| {
        let (room, shim) = Room::behind_the_shim(&house).await;
        let storage = if wraps() { Wrapped } else { Session };
        let calls = if wraps() { &["C_GenerateKeyPair", "C_WrapKey"][..] } else { &["C_GenerateKeyPair"] };
        for call in calls {
            for (code, name, expected, recovers) in AT_SIGN_INIT {
                let back = room.hsm.status().reconnects;
                let id = KeyId::random();
                shim.tell(&format!("fail {call} rv={code:#x}"));
                let made = room.hsm.make_agent_key(id, Algorithm::P256, storage, room.wrapping_for(storage), LABEL).await;
                // Only a session that was dead is tried again, in another one.
                let dead = DEAD_SESSION.contains(code);
                assert_eq!(made.is_ok(), dead, "{call} {name}: {made:?}");
                assert!(dead || made.is_err_and(|error| error.is_overload() == (*expected == Answer::Shed)), "{call} {name}");
                until(name, Duration::from_secs(10), || room.hsm.status().usable).await;
                assert_eq!(room.hsm.destroy_agent_key(id, storage).await.unwrap(), u32::from(dead), "{call} {name}");
                let next = room.make(Algorithm::P256, storage).await;
                signs(&room.bind(&next), b"well").await;
                assert_eq!(room.hsm.status().reconnects - back, u64::from(*recovers), "{call} {name}");
            }
        }
        room.hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn a_handle_in_doubt_is_looked_at_by_its_owner_and_not_unwrapped_again() {
    in_house("agent_keys::a_handle_in_doubt_is_looked_at_by_its_owner_and_not_unwrapped_again", async |house| {
        let (room, shim) = Room::behind_the_shim(&house).await;
        for storage in [Session, Wrapped].into_iter().filter(|storage| *storage == Session || wraps()) {
            let key = room.bind(&room.make(Algorithm::P256, storage).await);
            signs(&key, b"before").await;
            let unwrapped = shim.calls("C_UnwrapKey");
            for code in ["0x82", "0x60", "0x05"] {
                shim.tell(&format!("fail C_SignInit rv={code}"));
                signs(&key, code.as_bytes()).await;
                assert_eq!(times_signed(&house, code.as_bytes()), if storage == Session { 1 } else { 2 }, "{code}");
            }
            // A spoilt signature puts every handle in doubt.
            shim.tell("corrupt C_Sign");
            let error = key.sign_digest(digest(b"spoilt")).await.unwrap_err();
            assert!(matches!(error, SignError::Unknown(Error::Corrupt(_))), "{error}");
            signs(&key, b"after").await;
            assert_eq!(shim.calls("C_UnwrapKey"), unwrapped);
        }
        assert!(room.hsm.status().usable && room.hsm.status().reconnects == 0, "{:?}", room.hsm.status());
        room.hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn a_batch_is_signed_in_order_and_what_goes_wrong_in_its_midst_costs_one_signature() {
    in_house("agent_keys::a_batch_is_signed_in_order_and_what_goes_wrong_in_its_midst_costs_one_signature", async |house| {
        let (room, shim) = Room::behind_the_shim(&house).await;
        let key = room.bind(&room.make(Algorithm::P256, Session).await);
        let verifier = key.public().raw_verifier().unwrap();
        let batch = |round: u8| (0..100_u8).map(|number| digest(&[round, number])).collect::<Vec<_>>();
        let times = |round: u8| (0..100).map(|number| times_signed(&house, &[round, number])).collect::<Vec<_>>();
        signs(&key, b"a pace").await;

        let signed = key.sign_digests(batch(0)).await;
        for (digest, signature) in batch(0).iter().zip(&signed) {
            assert!(verifier.verifies(digest, signature.as_ref().unwrap()));
        }
        assert_eq!(times(0), [1; 100]);

        shim.tell("fail C_Sign rv=0x05 nth=11 after");
        let signed = key.sign_digests(batch(1)).await;
        assert_eq!(signed.iter().filter(|answer| matches!(answer, Err(SignError::Unknown(_)))).count(), 1);
        for ((answer, digest), times) in signed.iter().zip(batch(1)).zip(times(1)) {
            match answer {
                Ok(signature) => assert!(verifier.verifies(&digest, signature) && times == 1),
                Err(SignError::Unknown(_)) => assert_eq!(times, 1),
                Err(SignError::NotSigned(error)) => assert!(matches!(error, Error::BatchEnded) && times == 0, "{error}"),
            }
        }

        // A dead handle in its midst is looked up, and the batch goes on.
        shim.tell("fail C_SignInit rv=0x82 nth=20");
        assert!(key.sign_digests(batch(2)).await.iter().all(Result::is_ok));
        assert_eq!(times(2), [1; 100]);

        let mut wrong = batch(3);
        wrong[7] = vec![1; 31].into();
        assert!(key.sign_digests(wrong).await.iter().all(|answer| matches!(answer, Err(SignError::NotSigned(_)))));
        assert_eq!(times(3), [0; 100]);
        assert!(key.sign_digests(vec![]).await.is_empty());
        room.hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn a_device_that_grows_slow_in_the_midst_of_a_batch_keeps_nobody_else_waiting() {
    in_house("agent_keys::a_device_that_grows_slow_in_the_midst_of_a_batch_keeps_nobody_else_waiting", async |house| {
        let (room, shim) = Room::behind_the_shim(&house).await;
        let key = room.bind(&room.make(Algorithm::P256, Session).await);
        let other = room.bind(&room.make(Algorithm::P256, Session).await);
        let batch = |round: u8| (0..32_u8).map(|number| digest(&[round, number])).collect::<Vec<_>>();
        // What a signature takes is known, and a batch is cut by it.
        assert!(key.sign_digests(batch(0)).await.iter().all(Result::is_ok));
        signs(&other, b"fast").await;

        shim.tell("delay C_Sign ms=250");
        let begun = shim.calls("C_Sign");
        let slow = tokio::spawn(async move { key.sign_digests(batch(1)).await });
        until("the batch is under way", Duration::from_secs(5), || shim.calls("C_Sign") > begun).await;
        let from = Instant::now();
        signs(&other, b"between two of a batch").await;
        assert!(from.elapsed() < Duration::from_millis(1200), "{:?} behind a batch", from.elapsed());
        let made = slow.await.unwrap().iter().filter(|answer| answer.is_ok()).count();
        assert!(made >= 4, "{made} of the batch by its deadline");
        assert!(room.hsm.status().usable && room.hsm.status().reconnects == 0, "{:?}", room.hsm.status());
        room.hsm.shut_down(Duration::from_secs(10));
    });
}

#[test]
fn a_batch_ends_at_its_deadline_with_what_was_made() {
    in_house("agent_keys::a_batch_ends_at_its_deadline_with_what_was_made", async |house| {
        let (room, shim) = Room::behind_the_shim(&house).await;
        let key = room.bind(&room.make(Algorithm::P256, Session).await);
        signs(&key, b"fast").await;
        shim.tell("delay C_Sign ms=90");
        let signed = key.sign_digests((0..100_u8).map(|number| digest(&[9, number])).collect()).await;
        let (mut made, mut unknown, mut token) = (0, 0, 0);
        for (number, answer) in (0..).zip(&signed) {
            let times = times_signed(&house, &[9, number]);
            assert!(times <= 1);
            token += times;
            match answer {
                Ok(_) => made += 1,
                Err(SignError::Unknown(_)) => unknown += 1,
                Err(SignError::NotSigned(error)) => assert!(times == 0, "{error}"),
            }
        }
        assert!(made >= 10 && unknown <= 1 && token <= made + unknown, "{made} made, {unknown} unknown, {token} by the token");
        room.hsm.shut_down(Duration::from_secs(10));
    });
}

#[test]
fn agents_keys_come_and_go_while_token_keys_do_and_nobody_hears_of_it() {
    in_house("agent_keys::agents_keys_come_and_go_while_token_keys_do_and_nobody_hears_of_it", async |house| {
        let room = Arc::new(Room::open(&house).await);
        room.hsm.set_canary(new_key(&room.hsm, Algorithm::P256).await);
        room.hsm.set_unwrapped_max(16);
        let until = Instant::now() + Duration::from_secs(3);
        let mut at_work = tokio::task::JoinSet::new();
        for storage in [Session, Wrapped, Session, Wrapped].into_iter().filter(|storage| *storage == Session || wraps()) {
            let room = Arc::clone(&room);
            at_work.spawn(async move {
                let mut rows = vec![];
                while Instant::now() < until {
                    rows.push(room.make(Algorithm::P256, storage).await);
                    signs(&room.bind(&rows[rows.len() / 2]), b"some").await;
                    if rows.len() > 40 {
                        room.hsm.destroy_agent_key(rows.remove(3).id, storage).await.unwrap();
                    }
                }
            });
        }
        let (hsm, administered) = (room.hsm.clone(), Arc::clone(&room));
        at_work.spawn(async move {
            while Instant::now() < until {
                let key = new_key(&hsm, Algorithm::P256).await;
                key.sign(b"token key"[..].into()).await.unwrap();
                let resident = administered.make(Algorithm::P256, Resident).await;
                signs(&administered.bind(&resident), b"resident").await;
                assert_eq!(hsm.destroy_agent_key(resident.id, Resident).await.unwrap(), 2);
                assert_eq!(hsm.destroy(key.id()).await.unwrap(), 2);
            }
        });
        while let Some(done) = at_work.join_next().await {
            done.unwrap();
        }
        let status = room.hsm.status();
        assert!(status.usable && status.reconnects == 0 && status.faults.is_empty(), "{status:?}");
        room.hsm.shut_down(Duration::from_secs(5));
    });
}
#[test]
fn an_owner_that_hangs_keeps_nobody_else_from_signing() {
    in_house("agent_keys::an_owner_that_hangs_keeps_nobody_else_from_signing", async |house| {
        let (room, shim) = Room::behind_the_shim(&house).await;
        if !wraps() {
            return;
        }
        let (row, other) = (room.make(Algorithm::P256, Wrapped).await, room.make(Algorithm::P256, Resident).await);
        let (key, other) = (room.bind(&row), room.bind(&other));
        signs(&other, b"before").await;
        room.hsm.destroy_agent_key(row.id, Wrapped).await.unwrap();
        shim.tell("hang C_UnwrapKey");
        let waiting = tokio::spawn({
            let key = key.clone();
            async move { key.sign_digest(digest(b"late")).await }
        });
        shim.tell("await hanging=1");
        signs(&other, b"meanwhile").await;
        assert!(matches!(waiting.await.unwrap(), Err(SignError::NotSigned(Error::Deadline))));
        shim.tell("release");
        signs(&key, b"after").await;
        assert_eq!((times_signed(&house, b"late"), shim.calls("C_UnwrapKey") > 0), (0, true));
        assert!(room.hsm.status().usable && room.hsm.status().reconnects == 0, "{:?}", room.hsm.status());
        room.hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn of_keys_whose_ids_collide_none_signs_for_another() {
    in_house("agent_keys::of_keys_whose_ids_collide_none_signs_for_another", async |house| {
        let room = Room::open(&house).await;
        let (first, bystander) = (room.make(Algorithm::P256, Resident).await, room.make(Algorithm::P256, Resident).await);
        signs(&room.bind(&first), b"alone").await;
        // A session object under the id of a token object: each signs as itself.
        let session = room.make_at(first.id, Session).await;
        assert_ne!(session.public, first.public);
        signs(&room.bind(&session), b"in a session").await;
        signs(&room.bind(&first), b"in the token").await;
        // Two token objects: what was found goes on as itself, and what has to be looked for is not guessed.
        let second = room.make_at(first.id, Resident).await;
        let error = room.bind(&second).sign_digest(digest(b"whose?")).await.unwrap_err();
        assert!(matches!(error, SignError::NotSigned(Error::KeyAmbiguous { count: 2, .. })), "{error}");
        signs(&room.bind(&first), b"as before").await;
        signs(&room.bind(&session), b"still in a session").await;
        signs(&room.bind(&bystander), b"still").await;
        room.hsm.shut_down(Duration::from_secs(5));
    });
}

#[test]
fn a_wrapping_key_that_could_decrypt_wraps_nothing() {
    in_house("agent_keys::a_wrapping_key_that_could_decrypt_wraps_nothing", async |house| {
        let room = Room::open(&house).await;
        if !wraps() {
            return;
        }
        // Made behind the room's back, in the same process: it is logged in.
        let module = Pkcs11::new(super::token::module()).unwrap();
        let _ = module.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK));
        let is_agents = |slot: &Slot| module.get_token_info(*slot).unwrap().label() == "agents";
        let slot = module.get_slots_with_initialized_token().unwrap().into_iter().find(is_agents).unwrap();
        let session = module.open_rw_session(slot).unwrap();
        for (decrypts, extractable) in [(true, false), (false, true), (false, false)] {
            let id = KeyId::random();
            let template = [
                Attribute::ValueLen(32.into()),
                Attribute::Token(true),
                Attribute::Private(true),
                Attribute::Sensitive(true),
                Attribute::Extractable(extractable),
                Attribute::Encrypt(false),
                Attribute::Decrypt(decrypts),
                Attribute::Wrap(true),
                Attribute::Unwrap(true),
                Attribute::Id(id.0.to_vec()),
            ];
            session.generate_key(&Mechanism::AesKeyGen, &template).unwrap();
            let made = room.hsm.make_agent_key(KeyId::random(), Algorithm::P256, Wrapped, Some(id), LABEL).await;
            if decrypts || extractable {
                assert!(matches!(made, Err(Error::Attribute { .. })), "{made:?}");
            } else {
                made.unwrap();
            }
        }
        drop(session);
        room.hsm.shut_down(Duration::from_secs(5));
    });
}

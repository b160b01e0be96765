//! Who follows the bundle, with two generations of authorities and no token.

use tokio::time::timeout;

use super::*;
use crate::authn::Tls;
use crate::ledger::{Decided, Evidence, Intention, Settings, Subject, Token, create};
use crate::model::{AGENT_EXTENSION_OID, AgentExtension, AgentId, KeyId, PublicKey, Reason, Serial, TokenId, TrustDomain};

/// What has to come within a second, on a busy machine.
const DEADLINE: Duration = Duration::from_secs(10);

struct House {
    ledger: Ledger,
    bundles: Bundles,
    connection: Arc<Connection>,
    tls: Tls,
    agent: AgentId,
    _directory: tempfile::TempDir,
}

/// An agent that is enrolled, and a connection with a certificate of its first epoch.
async fn house() -> House {
    let directory = tempfile::tempdir().unwrap();
    let (state, runtime) = (directory.path().join("state"), directory.path().to_path_buf());
    let settings = Settings { state, runtime, queue_max: 64, live_max: 8, forget_seconds: 3600 };
    let domain = TrustDomain::parse("example.org").unwrap();
    create(&settings.state, &domain, [1; 16]).unwrap();
    let ledger = Ledger::open(&settings, Arc::default()).unwrap().ledger;
    let agent = AgentId::parse("builder/1").unwrap();
    let (serial, key) = (Serial::random(), rcgen::KeyPair::generate().unwrap());
    let leaf = leaf(&agent, &domain, &serial, &key);
    let tls = Tls::default();
    tls.trust(ledger.clock(), &[leaf.clone().into()]).unwrap();
    let connection = Arc::new(Connection::identify(Some(&leaf), "192.0.2.1".parse().unwrap(), &domain, &tls).unwrap());
    let house = House { ledger, bundles: Bundles::default(), connection, tls, agent, _directory: directory };
    let token = house.enrol(&house.agent).await;
    house.certified(token, serial, &key).await;
    house
}

fn leaf(agent: &AgentId, domain: &TrustDomain, serial: &Serial, key: &rcgen::KeyPair) -> Vec<u8> {
    let extension = AgentExtension { epoch: 1, lineage_root: agent.clone(), appraisal_index: 1, policy_hash: None };
    let mut parameters = rcgen::CertificateParams::default();
    parameters.serial_number = Some(rcgen::SerialNumber::from_slice(&serial.0));
    let name = agent.spiffe_id(domain).to_string();
    parameters.subject_alt_names = vec![rcgen::SanType::URI(name.try_into().unwrap())];
    parameters.custom_extensions = vec![rcgen::CustomExtension::from_oid_content(&AGENT_EXTENSION_OID, extension.to_der())];
    parameters.self_signed(key).unwrap().der().to_vec()
}

fn bundle(sequence: u64, refresh_hint_seconds: u32) -> proto::Bundle {
    let authorities = (0..sequence).map(|root| root.to_be_bytes().to_vec()).collect();
    proto::Bundle { authorities, sequence, refresh_hint_seconds, ..proto::Bundle::default() }
}

impl House {
    fn follow(&self) -> BundleWatch {
        self.bundles.follow(&self.connection, &self.ledger)
    }

    async fn enrol(&self, agent: &AgentId) -> TokenId {
        let expires = self.ledger.clock().reckoned().plus_seconds(3600);
        let token = Token { id: TokenId::random(), public_key: [7; 32], expires, spent_for: None };
        let (id, limits) = (token.id, proto::Limits { ttl_seconds_max: 600, rejoin_seconds: 600 });
        self.ledger.enrol(agent, limits, proto::Operator::default(), token).await.unwrap();
        id
    }

    /// The ledger tells of its certificate.
    async fn certified(&self, token: TokenId, serial: Serial, key: &rcgen::KeyPair) {
        let now = self.ledger.clock().reckoned();
        let key = PublicKey::from_spki(&rcgen::PublicKeyData::subject_public_key_info(key)).unwrap();
        let subject = Subject {
            agent: self.agent.clone(),
            epoch: 1,
            evidence: Evidence::JoinToken(token),
            fresh_until: now.plus_seconds(86_400),
            request_hash: key.digest(),
            idempotency_hash: [1; 16],
            key,
            serial,
            not_before: now,
            not_after: now.plus_seconds(600),
        };
        let (kind, key_id, tbs) = (proto::IntentKind::Attest, KeyId::random(), Arc::from(&b"tbs"[..]));
        let intention = Intention { kind, key_id, tbs, subject: Some(subject) };
        let Decided::Intent(intent) = self.ledger.intend(intention).await.unwrap() else { panic!("a new one") };
        intent.release(b"signature").unwrap();
    }

    async fn quarantine(&self, agent: &AgentId) {
        let cause = proto::QuarantineCause::Operator;
        self.ledger.quarantine(agent, Some(proto::Operator::default()), cause, "a test").await.unwrap();
    }
}

async fn soon(watch: &mut BundleWatch) -> Result<proto::Bundle, Refusal> {
    let told = timeout(DEADLINE, watch.next()).await.expect("it was told")?;
    assert_eq!(told.renew_within_seconds, 0);
    Ok(told.bundle.expect("whole"))
}

async fn silent(watch: &mut BundleWatch) -> bool {
    timeout(Duration::from_millis(50), watch.next()).await.is_err()
}

#[tokio::test]
async fn the_bundle_is_told_at_once_and_each_that_follows_it() {
    let house = house().await;
    house.bundles.publish(bundle(1, 300), Vec::new());
    let mut watch = house.follow();
    assert_eq!(soon(&mut watch).await.unwrap(), bundle(1, 300));
    assert!(silent(&mut watch).await);
    house.bundles.publish(bundle(2, 300), Vec::new());
    assert_eq!(soon(&mut watch).await.unwrap(), bundle(2, 300));
    // The token came back with the same authorities.
    house.bundles.publish(bundle(2, 300), Vec::new());
    assert!(silent(&mut watch).await);
}

#[tokio::test]
async fn whoever_holds_a_certificate_of_an_authority_that_leaves_is_told_how_long_it_is_trusted() {
    let house = house().await;
    let issuer = house.connection.issuer().expect("an agent").to_vec();
    let until = house.ledger.clock().reckoned().plus_seconds(900);
    house.bundles.publish(bundle(1, 300), Vec::new());
    let mut watch = house.follow();
    soon(&mut watch).await.unwrap();
    // Of another authority.
    house.bundles.publish(bundle(1, 300), vec![(b"another".to_vec(), until)]);
    soon(&mut watch).await.unwrap();
    for (until, least, most) in [(until, 880, 900), (house.ledger.clock().reckoned(), 1, 1)] {
        house.bundles.publish(bundle(1, 300), vec![(b"another".to_vec(), until), (issuer.clone(), until)]);
        // Who follows already, and who comes later.
        for watch in [&mut watch, &mut house.follow()] {
            let told = timeout(DEADLINE, watch.next()).await.expect("it was told").unwrap();
            assert!((least..=most).contains(&told.renew_within_seconds), "{told:?}");
        }
    }
}

#[tokio::test]
async fn who_is_slow_is_told_the_newest_alone() {
    let house = house().await;
    house.bundles.publish(bundle(1, 300), Vec::new());
    let mut watch = house.follow();
    for sequence in 2..=4 {
        house.bundles.publish(bundle(sequence, 300), Vec::new());
    }
    assert_eq!(soon(&mut watch).await.unwrap(), bundle(4, 300));
    assert!(silent(&mut watch).await);
}

#[tokio::test]
async fn it_is_said_again_when_its_refresh_hint_has_passed() {
    let house = house().await;
    house.bundles.publish(bundle(1, 1), Vec::new());
    let mut watch = house.follow();
    let first = Instant::now();
    for _ in 0..2 {
        assert_eq!(soon(&mut watch).await.unwrap(), bundle(1, 1));
    }
    assert!(first.elapsed() >= Duration::from_secs(1));
}

#[tokio::test]
async fn a_wait_that_was_given_up_loses_nothing() {
    let house = house().await;
    let mut watch = house.follow();
    assert!(silent(&mut watch).await, "there is no bundle yet");
    house.bundles.publish(bundle(1, 300), Vec::new());
    assert_eq!(soon(&mut watch).await.unwrap(), bundle(1, 300));
}

#[tokio::test]
async fn it_ends_with_the_trust_in_the_authority_over_the_callers_certificate() {
    let house = house().await;
    house.bundles.publish(bundle(1, 300), Vec::new());
    let mut watch = house.follow();
    soon(&mut watch).await.unwrap();
    let mut other = rcgen::CertificateParams::default();
    other.distinguished_name.push(rcgen::DnType::CommonName, "another authority");
    let other = other.self_signed(&rcgen::KeyPair::generate().unwrap()).unwrap();
    house.tls.trust(house.ledger.clock(), &[other.der().clone()]).unwrap();
    house.bundles.publish(bundle(2, 300), Vec::new());
    assert_eq!(soon(&mut watch).await.unwrap_err().reason, Reason::Unauthenticated);
}

#[tokio::test]
async fn a_quarantine_ends_it_and_another_agents_does_not() {
    let house = house().await;
    house.bundles.publish(bundle(1, 300), Vec::new());
    let mut watch = house.follow();
    soon(&mut watch).await.unwrap();
    let other = AgentId::parse("builder/2").unwrap();
    house.enrol(&other).await;
    house.quarantine(&other).await;
    assert!(silent(&mut watch).await);
    // At rest or not: it is told in the middle of a wait.
    let (told, ()) = tokio::join!(soon(&mut watch), house.quarantine(&house.agent));
    assert_eq!(told.unwrap_err().reason, Reason::AgentQuarantined);
}

//! The client against a small server that speaks the protocol as the proto describes it, and can lose an answer.

use std::pin::Pin;
use std::sync::{Arc, Mutex};

use prost::Message;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, PublicKeyData, SanType, string::Ia5String};
use rustls::pki_types::CertificateDer;
use tokio::sync::watch;
use tokio_stream::{Stream, StreamExt, wrappers::ReceiverStream};
use tonic::{Request, Response, Status, Streaming};
use tonic_types::StatusExt as _;

use super::*;
use crate::model::{Algorithm, Csr, Meter, PublicKey, SecretBytes, join_public_key};
use crate::proto::agent_service_server::{AgentService, AgentServiceServer};
use crate::proto::{self, Ask, AttestResponse, Challenge, RenewResponse, WatchBundleRequest, WatchBundleResponse};

pub(crate) struct Seen {
    /// Asks in the order of their arrival.
    pub(crate) asks: Vec<Vec<u8>>,
    /// How long certificates live.
    pub(crate) lifetime_seconds: u64,
    /// From which ask on all are refused.
    pub(crate) quarantined_after: Option<usize>,
    /// The newest certified key.
    bound: Option<PublicKey>,
    sequence: u64,
    /// How many answers are lost from here on.
    lose: u32,
    /// The bundle is told in answers alone: a daemon from before.
    pub(crate) mute: bool,
    /// Who follows is refused with this reason, whoever follows already with the next bundle.
    pub(crate) refuse_watches: Option<&'static str>,
    /// Told to who follows, with the next bundle.
    pub(crate) renew_within_seconds: u32,
    /// Somebody else answers new connections; how often he did.
    pub(crate) impostor: bool,
    pub(crate) imposed: usize,
    /// Nobody answers new connections, for good; how many were begun.
    pub(crate) black_hole: bool,
    pub(crate) swallowed: usize,
    /// Answers begin, and never end.
    endless: bool,
    /// How often it was asked to be followed; and how often before each ask.
    pub(crate) watches: usize,
    pub(crate) watches_before: Vec<usize>,
    /// What certifies agents, where it is not what certifies the server.
    other: Option<Issuer<'static, KeyPair>>,
    /// What is told of authorities, in answers and to who follows it.
    pub(crate) bundle: watch::Sender<Bundle>,
}

struct Server {
    issuer: Issuer<'static, KeyPair>,
    authority: Vec<u8>,
    domain: TrustDomain,
    token: PublicKey,
    seen: Arc<Mutex<Seen>>,
}

struct Subject(PublicKey);

impl PublicKeyData for Subject {
    fn der_bytes(&self) -> &[u8] {
        self.0.raw()
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        &rcgen::PKCS_ECDSA_P256_SHA256
    }
}

fn certificate(issuer: &Issuer<'static, KeyPair>, key: &PublicKey, uri: &str, lifetime_seconds: u64) -> Vec<u8> {
    let mut parameters = CertificateParams::default();
    let now = time::OffsetDateTime::now_utc();
    parameters.not_before = now;
    parameters.not_after = now + Duration::from_secs(lifetime_seconds);
    parameters.subject_alt_names = vec![SanType::URI(Ia5String::try_from(uri).expect("ASCII"))];
    parameters.signed_by(&Subject(key.clone()), issuer).expect("a certificate").der().to_vec()
}

fn refusal(reason: &str) -> Status {
    let details = tonic_types::ErrorDetails::with_error_info(reason, "keyward", std::collections::HashMap::new());
    Status::with_error_details(tonic::Code::PermissionDenied, "ask the operator", details)
}

impl Server {
    fn answer(&self, bytes: &[u8], proof: &[u8], binder: impl Fn(&Digest) -> Digest) -> Result<Credential, Status> {
        let mut seen = self.seen.lock().expect("not poisoned");
        let ask = Ask::decode(bytes).expect("an ask");
        let key = Csr::parse(&ask.csr, &Meter::default()).expect("a CSR").key().clone();
        if seen.quarantined_after.is_some_and(|after| seen.asks.len() >= after) {
            return Err(refusal("AGENT_QUARANTINED"));
        }
        let repeated = seen.asks.contains(&bytes.to_vec());
        seen.asks.push(bytes.to_vec());
        let watches = seen.watches;
        seen.watches_before.push(watches);
        let prover = match ask.claim.expect("a claim") {
            Claim::Join(_) => self.token.clone(),
            Claim::BoundKey(claim) => {
                assert_eq!(claim.agent, "coder/7");
                assert!(repeated || claim.sequence == seen.sequence, "the next sequence is claimed");
                seen.bound.clone().expect("a bound key")
            }
        };
        if !prover.verifies(&binder(&key.digest()).0, proof) && !repeated {
            return Err(Status::permission_denied("the proof is not over this binder"));
        }
        if !repeated {
            seen.sequence += 1;
            seen.bound = Some(key.clone());
        }
        if seen.lose > 0 {
            seen.lose -= 1;
            return Err(Status::unavailable("the answer was lost"));
        }
        let issuer = seen.other.as_ref().unwrap_or(&self.issuer);
        let chain = vec![certificate(issuer, &key, "spiffe://example.org/agent/coder/7", seen.lifetime_seconds)];
        let bundle = Some(seen.bundle.borrow().clone());
        Ok(Credential { chain, bundle, epoch: 1, next_sequence: seen.sequence, ..Default::default() })
    }
}

#[tonic::async_trait]
impl AgentService for Server {
    type AttestStream = Pin<Box<dyn Stream<Item = Result<AttestResponse, Status>> + Send>>;

    async fn attest(&self, request: Request<Streaming<AttestRequest>>) -> Result<Response<Self::AttestStream>, Status> {
        let (sender, receiver) = mpsc::channel(2);
        let step = |step| AttestResponse { step: Some(step) };
        let nonce = [9; 32];
        let challenge = Challenge { nonce: nonce.to_vec(), expires_seconds: 10 };
        sender.send(Ok(step(Step::Challenge(challenge)))).await.expect("room");
        let mut requests = request.into_inner();
        let server = Server {
            issuer: Issuer::from_ca_cert_der(
                &CertificateDer::from(self.authority.clone()),
                KeyPair::try_from(self.issuer.key().serialized_der()).expect("a key"),
            )
            .expect("an issuer"),
            authority: self.authority.clone(),
            domain: self.domain.clone(),
            token: self.token.clone(),
            seen: Arc::clone(&self.seen),
        };
        tokio::spawn(async move {
            let answer = requests.next().await.expect("an answer").expect("a message");
            let ask = Digest::of(&answer.ask);
            let credential = server
                .answer(&answer.ask, &answer.proof, |spki| attest_binder(&nonce, spki, &ask, &server.domain))
                .map(|credential| AttestResponse { step: Some(Step::Credential(credential)) });
            let _ = sender.send(credential).await;
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    type WatchBundleStream = Pin<Box<dyn Stream<Item = Result<WatchBundleResponse, Status>> + Send>>;

    async fn watch_bundle(&self, _: Request<WatchBundleRequest>) -> Result<Response<Self::WatchBundleStream>, Status> {
        let mut bundles = {
            let mut seen = self.seen.lock().expect("not poisoned");
            seen.watches += 1;
            if seen.mute {
                return Err(Status::unimplemented("WatchBundle"));
            }
            seen.bundle.subscribe()
        };
        let (sender, receiver) = mpsc::channel(1);
        let seen = Arc::clone(&self.seen);
        tokio::spawn(async move {
            loop {
                let refused = seen.lock().expect("not poisoned").refuse_watches;
                if let Some(reason) = refused {
                    let _ = sender.send(Err(refusal(reason))).await;
                    return;
                }
                let bundle = Some(bundles.borrow_and_update().clone());
                let renew_within_seconds = seen.lock().expect("not poisoned").renew_within_seconds;
                let told = WatchBundleResponse { bundle, renew_within_seconds };
                if sender.send(Ok(told)).await.is_err() || bundles.changed().await.is_err() {
                    return;
                }
            }
        });
        Ok(Response::new(Box::pin(ReceiverStream::new(receiver))))
    }

    async fn renew(&self, request: Request<RenewRequest>) -> Result<Response<RenewResponse>, Status> {
        let RenewRequest { ask, proof } = request.into_inner();
        let sequence = match Ask::decode(ask.as_slice()).expect("an ask").claim {
            Some(Claim::BoundKey(claim)) => claim.sequence,
            other => panic!("a bound key is claimed, not {other:?}"),
        };
        let hash = Digest::of(&ask);
        let credential = self.answer(&ask, &proof, |spki| renew_binder(sequence, spki, &hash, &self.domain))?;
        Ok(Response::new(RenewResponse { credential: Some(credential) }))
    }
}

/// What follows the head of an answer, in vain.
struct Endless;

impl http_body::Body for Endless {
    type Data = prost::bytes::Bytes;
    type Error = std::convert::Infallible;

    fn poll_frame(
        self: Pin<&mut Self>,
        _: &mut std::task::Context<'_>,
    ) -> std::task::Poll<Option<Result<http_body::Frame<Self::Data>, Self::Error>>> {
        std::task::Poll::Pending
    }
}

impl Seen {
    /// One more authority, from here on.
    pub(crate) fn one_more_authority(&self) {
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let authority = parameters.self_signed(&KeyPair::generate().expect("a key")).expect("a certificate");
        self.bundle.send_modify(|bundle| {
            bundle.authorities.push(authority.der().to_vec());
            bundle.sequence += 1;
        });
    }

    /// Agents are certified by an authority of their own, from here on.
    pub(crate) fn certify_by_another(&mut self) {
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        let key = KeyPair::generate().expect("a key");
        let authority = parameters.self_signed(&key).expect("a certificate").der().to_vec();
        self.other = Some(Issuer::new(parameters, key));
        self.bundle.send_modify(|bundle| {
            bundle.authorities.push(authority);
            bundle.sequence += 1;
        });
    }

    /// That authority is not trusted any more.
    pub(crate) fn distrust_the_other(&mut self) {
        self.other = None;
        self.bundle.send_modify(|bundle| {
            bundle.authorities.pop();
            bundle.sequence += 1;
        });
    }
}

/// What a server under `issuer` shakes hands with.
fn acceptor(issuer: &Issuer<'static, KeyPair>, domain: &TrustDomain) -> tokio_rustls::TlsAcceptor {
    let key = Key::generate().expect("a key");
    let leaf = certificate(issuer, key.public(), domain.server().as_str(), 600);
    let mut tls = rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::aws_lc_rs::default_provider()))
        .with_protocol_versions(&[&rustls::version::TLS13])
        .expect("TLS 1.3")
        .with_no_client_auth()
        .with_single_cert(vec![CertificateDer::from(leaf)], key.to_rustls().into())
        .expect("a server");
    tls.alpn_protocols = vec![b"h2".to_vec()];
    tokio_rustls::TlsAcceptor::from(Arc::new(tls))
}

/// A server on a free port; its join file and what it saw.
pub(crate) async fn serve() -> (JoinFile, Arc<Mutex<Seen>>) {
    let domain = TrustDomain::parse("example.org").expect("a name");
    let key = KeyPair::generate().expect("a key");
    let mut parameters = CertificateParams::default();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let authority = parameters.self_signed(&key).expect("a certificate").der().to_vec();
    let issuer = Issuer::new(parameters, key);
    let seed = SecretBytes::new(vec![4; 32]);
    let token = PublicKey::from_raw(Algorithm::Ed25519, &join_public_key(&seed)).expect("a key");

    let acceptor = acceptor(&issuer, &domain);
    let strange = {
        let key = KeyPair::generate().expect("a key");
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        self::acceptor(&Issuer::new(parameters, key), &domain)
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();

    let bundle = Bundle { authorities: vec![authority.clone()], sequence: 5, refresh_hint_seconds: 60, ..Bundle::default() };
    let seen = Arc::new(Mutex::new(Seen {
        asks: Vec::new(),
        lifetime_seconds: 600,
        quarantined_after: None,
        bound: None,
        sequence: 0,
        lose: 0,
        mute: false,
        refuse_watches: None,
        renew_within_seconds: 0,
        impostor: false,
        imposed: 0,
        black_hole: false,
        swallowed: 0,
        endless: false,
        watches: 0,
        watches_before: Vec::new(),
        other: None,
        bundle: watch::Sender::new(bundle.clone()),
    }));
    let service = Server { issuer, authority, domain, token, seen: Arc::clone(&seen) };
    let doors = Arc::clone(&seen);
    let incoming = tokio_stream::wrappers::TcpListenerStream::new(listener).then(move |tcp| {
        let (acceptor, swallowed) = {
            let mut seen = doors.lock().expect("not poisoned");
            seen.imposed += usize::from(seen.impostor);
            seen.swallowed += usize::from(seen.black_hole);
            (if seen.impostor { strange.clone() } else { acceptor.clone() }, seen.black_hole)
        };
        async move {
            if swallowed {
                std::future::pending::<()>().await;
            }
            let mut tls = acceptor.accept(tcp?).await?;
            // tonic wants a transport that it knows; a pipe is one.
            let (near, mut far) = tokio::io::duplex(64 * 1024);
            tokio::spawn(async move { tokio::io::copy_bidirectional(&mut tls, &mut far).await });
            Ok::<_, std::io::Error>(near)
        }
    });
    let answered = Arc::clone(&seen);
    let ends = move |answer: http::Response<tonic::body::Body>| {
        if answered.lock().expect("not poisoned").endless { answer.map(|_| tonic::body::Body::new(Endless)) } else { answer }
    };
    let layer = tower::util::MapResponseLayer::new(ends);
    tokio::spawn(
        tonic::transport::Server::builder()
            .layer(layer)
            .add_service(AgentServiceServer::new(service))
            .serve_with_incoming(incoming),
    );

    let join = JoinFile::from_proto(proto::JoinFile {
        addresses: vec!["127.0.0.1:1".into(), address],
        trust_domain: "example.org".into(),
        agent: "coder/7".into(),
        bundle: Some(bundle),
        token_id: vec![1; 16],
        token_seed: seed.reveal().to_vec(),
        expires_unix_seconds: UnixTime::wall().plus_seconds(600).seconds(),
    });
    (join.expect("a join file"), seen)
}

fn client() -> (tempfile::TempDir, Client) {
    let root = tempfile::tempdir().expect("a directory");
    let client = Client::new(AgentDir::open(&root.path().join("agent"), true).expect("opened"));
    (root, client)
}

#[tokio::test]
async fn a_join_file_becomes_a_credential_that_is_renewed_and_rejoined() {
    let (join, seen) = serve().await;
    let (_root, client) = client();
    let first = client.attest(&join, 0).await.expect("attested");
    assert_eq!((first.spiffe_id.as_str(), first.next_sequence), ("spiffe://example.org/agent/coder/7", 1));
    let second = client.renew(0).await.expect("renewed");
    let third = client.rejoin(0).await.expect("rejoined");
    assert_eq!((second.next_sequence, third.next_sequence), (2, 3));
    assert_eq!(seen.lock().expect("not poisoned").asks.len(), 3);
    assert!(client.dir().pending().expect("read").is_none());
}

#[tokio::test]
async fn a_lost_answer_is_asked_for_again_with_the_same_bytes() {
    let (join, seen) = serve().await;
    let (_root, client) = client();
    for verb in ["attest", "renew", "rejoin"] {
        seen.lock().expect("not poisoned").lose = 2;
        let mut outcomes = Vec::new();
        for _ in 0..3 {
            outcomes.push(match verb {
                "attest" => client.attest(&join, 0).await,
                // Another wish meanwhile must not make another request.
                "renew" => client.renew(u32::try_from(outcomes.len()).expect("small")).await,
                _ => client.rejoin(0).await,
            });
        }
        assert!(outcomes[0].as_ref().is_err_and(Error::is_passing) && outcomes[1].is_err() && outcomes[2].is_ok(), "{verb}");
        let asks = std::mem::take(&mut seen.lock().expect("not poisoned").asks);
        assert_eq!(asks.len(), 3);
        assert!(asks.iter().all(|ask| *ask == asks[0]), "{verb}");
    }
}

#[tokio::test]
async fn an_answer_that_begins_and_never_ends_is_given_up_and_asked_for_again() {
    let (join, seen) = serve().await;
    let (_root, client) = client();
    client.attest(&join, 0).await.expect("attested");
    seen.lock().expect("not poisoned").endless = true;
    let error = timeout(2 * ANSWER_TIMEOUT, client.renew(0)).await.expect("given up").expect_err("no end");
    assert!(error.is_passing() && error.to_string().contains("within 15 s"), "{error}");
    seen.lock().expect("not poisoned").endless = false;
    client.renew(0).await.expect("renewed");
    let asks = &seen.lock().expect("not poisoned").asks;
    assert!(asks.len() == 3 && asks[1] == asks[2]);
}

#[tokio::test]
async fn an_old_join_file_does_not_cost_the_renewal_under_way_its_key() {
    let (join, seen) = serve().await;
    let (_root, client) = client();
    client.attest(&join, 0).await.expect("attested");
    seen.lock().expect("not poisoned").lose = 1;
    client.renew(0).await.expect_err("lost");
    let before = client.dir().pending().expect("read").expect("outstanding").ask;
    assert!(matches!(client.attest(&join, 0).await, Err(Error::Store(StoreError::Joined { .. }))));
    assert_eq!(client.dir().pending().expect("read").expect("outstanding").ask, before);
    client.renew(0).await.expect("renewed");
}

#[tokio::test]
async fn a_directory_of_another_agent_is_left_alone() {
    let (join, _seen) = serve().await;
    let (_root, client) = client();
    client.attest(&join, 0).await.expect("attested");
    let (other, _) = serve().await;
    let other = JoinFile { agent: AgentId::parse("coder/8").expect("a name"), token_id: crate::model::TokenId([2; 16]), ..other };
    assert!(matches!(client.attest(&other, 0).await, Err(Error::Store(StoreError::Foreign { .. }))));
}

#[tokio::test]
async fn a_server_of_another_authority_is_untrusted_and_nobody_at_all_is_unreachable() {
    let (mut join, _seen) = serve().await;
    let (other, _) = serve().await;
    let (_root, client) = client();
    let ours = std::mem::replace(&mut join.bundle, other.bundle);
    let error = client.attest(&join, 0).await.expect_err("another authority");
    assert!(matches!(error, Error::Untrusted { .. }), "{error}");
    join.bundle = ours;
    join.addresses.truncate(1);
    let error = client.attest(&join, 0).await.expect_err("nobody");
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
}

async fn next(watch: &mut BundleWatch) -> Result<crate::client::News, Error> {
    timeout(ANSWER_TIMEOUT, watch.next()).await.expect("soon")
}

#[tokio::test]
async fn whoever_follows_the_bundle_hears_of_newer_ones_alone() {
    let (join, seen) = serve().await;
    let (_root, client) = client();
    client.attest(&join, 0).await.expect("attested");
    let told = |change: &dyn Fn(&mut Bundle)| seen.lock().expect("not poisoned").bundle.send_modify(change);
    let mut watch = Client::watch_bundle(&client.dir().holding().expect("held")).await.expect("followed");
    assert!(next(&mut watch).await.expect("told").bundle.is_none(), "what is held already is no news");
    told(&|bundle| bundle.sequence = 4);
    assert!(next(&mut watch).await.expect("told").bundle.is_none(), "what is older is none either");
    seen.lock().expect("not poisoned").one_more_authority();
    told(&|bundle| bundle.sequence = 9);
    let bundle = loop {
        if let Some(bundle) = next(&mut watch).await.expect("told").bundle {
            break bundle;
        }
    };
    assert_eq!((bundle.sequence, bundle.authorities.len()), (9, 2));
    assert!(client.dir().keep_bundle(&bundle).expect("kept"));
    let held = client.dir().holding().expect("held");
    assert_eq!((held.card.bundle_sequence, held.authorities), (9, bundle.authorities));
}

#[tokio::test]
async fn authorities_that_cannot_be_used_are_not_taken() {
    let (join, seen) = serve().await;
    let (_root, client) = client();
    client.attest(&join, 0).await.expect("attested");
    let before = client.dir().holding().expect("held");
    for spoil in [Vec::clear, |authorities: &mut Vec<Vec<u8>>| authorities.push(b"no certificate".to_vec())] {
        let mut watch = Client::watch_bundle(&before).await.expect("followed");
        seen.lock().expect("not poisoned").bundle.send_modify(|bundle| {
            bundle.sequence += 1;
            spoil(&mut bundle.authorities);
        });
        let error = loop {
            match next(&mut watch).await {
                Ok(news) => assert!(news.bundle.is_none(), "unusable"),
                Err(error) => break error,
            }
        };
        assert!(matches!(error, Error::Answer(_)), "{error}");
        client.renew(0).await.expect("renewed");
        assert_eq!(client.dir().holding().expect("held").authorities, before.authorities);
    }
}

#[tokio::test]
async fn a_daemon_that_falls_silent_is_noticed() {
    let (join, seen) = serve().await;
    let (_root, client) = client();
    client.attest(&join, 0).await.expect("attested");
    seen.lock().expect("not poisoned").bundle.send_modify(|bundle| bundle.refresh_hint_seconds = 1);
    let mut watch = Client::watch_bundle(&client.dir().holding().expect("held")).await.expect("followed");
    next(&mut watch).await.expect("the first word");
    let error = next(&mut watch).await.expect_err("nothing is said");
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
}

//! The wire as an attacker has it: any request, any proof, any certificate, no manners.
//!
//! Binders and the join key are computed here from their definition in `agent.proto`, not by the code under test.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use aws_lc_rs::hkdf::{HKDF_SHA256, KeyType, Salt};
use aws_lc_rs::signature::Ed25519KeyPair;
use hyper_util::rt::TokioIo;
use keyward::proto::agent_service_client::AgentServiceClient;
use keyward::proto::operator_service_client::OperatorServiceClient;
use keyward::proto::{
    Ask, AttestRequest, AttestResponse, BoundKeyClaim, Bundle, Challenge, Credential, EnrolRequest, Entry, JoinClaim, JoinFile,
    ListEntriesRequest, QuarantineRequest, ReleaseRequest, RenewRequest, StatusRequest, WatchBundleRequest, WatchBundleResponse,
    ask::Claim, attest_response::Step,
};
use prost::Message as _;
use rcgen::SigningKey as _;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::{ClientConfig, DigitallySignedStruct, SignatureScheme};
use sha2::{Digest as _, Sha256};
use tokio::net::{TcpStream, UnixStream};
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_rustls::TlsConnector;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::{Channel, Endpoint, Uri};
pub use tonic_health::pb::health_check_response::ServingStatus;
use tonic_health::pb::health_client::HealthClient;
use tonic_health::pb::{HealthCheckRequest, HealthCheckResponse};
use tonic_reflection::pb::v1::ServerReflectionRequest;
use tonic_reflection::pb::v1::server_reflection_client::ServerReflectionClient;
use tonic_reflection::pb::v1::server_reflection_request::MessageRequest;
use tonic_reflection::pb::v1::server_reflection_response::MessageResponse;
use tonic_types::StatusExt as _;

use super::{Agent, DEADLINE, DOMAIN, House};

/// How a call was refused.
#[derive(Debug)]
pub struct Refused {
    /// The stable reason code; empty when the refusal carries none.
    pub reason: String,
    pub code: tonic::Code,
    pub message: String,
    /// The ledger entry that tells of it.
    pub ledger_index: Option<u64>,
    /// When to ask again.
    pub retry_after: Option<Duration>,
}

impl From<tonic::Status> for Refused {
    fn from(status: tonic::Status) -> Self {
        let info = status.get_details_error_info();
        if let Some(info) = &info {
            assert_eq!(info.domain, "keyward");
        }
        let ledger_index = info.as_ref().and_then(|info| info.metadata.get("ledger_index")?.parse().ok());
        let reason = info.map(|info| info.reason).unwrap_or_default();
        let retry_after = status.get_details_retry_info().and_then(|retry| retry.retry_delay);
        Self { reason, code: status.code(), message: status.message().to_owned(), ledger_index, retry_after }
    }
}

/// An answer or a refusal.
pub type Answer<T> = Result<T, Refused>;

/// It must have been refused with this reason code.
#[track_caller]
pub fn refused<T: std::fmt::Debug>(answer: Answer<T>, reason: &str) -> Refused {
    let refused = answer.expect_err(reason);
    assert_eq!(refused.reason, reason, "{refused:?}");
    assert!(!refused.message.is_empty(), "a refusal says what to do");
    refused
}

/// A client certificate with its key.
#[derive(Clone)]
pub struct Identity {
    pub chain: Vec<Vec<u8>>,
    /// PKCS#8.
    pub key: Vec<u8>,
}

impl Identity {
    /// The one an agent holds at the moment.
    pub fn of(agent: &Agent<'_>) -> Self {
        let key = pem::parse(std::fs::read(agent.key()).unwrap()).unwrap().into_contents();
        Self { chain: agent.chain(), key }
    }

    /// What it signs proofs with.
    pub fn pair(&self) -> rcgen::KeyPair {
        rcgen::KeyPair::try_from(self.key.as_slice()).unwrap()
    }
}

/// A connection to a house's daemon.
pub struct Wire {
    pub(super) runtime: Runtime,
    address: std::net::SocketAddr,
    operator: PathBuf,
}

impl House {
    /// The wire to this house.
    pub fn wire(&self) -> Wire {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        Wire { runtime, address: self.address(), operator: self.runtime().join("operator.sock") }
    }
}

impl Wire {
    /// A channel, with or without a client certificate. The server's certificate is taken whatever it says.
    pub(super) fn channel(&self, identity: Option<&Identity>) -> Channel {
        let config = Arc::new(reckless(identity));
        let address = self.address;
        let connector = tower::service_fn(move |_: Uri| {
            let config = Arc::clone(&config);
            async move {
                let tcp = TcpStream::connect(address).await?;
                TlsConnector::from(config).connect(ServerName::from(address.ip()), tcp).await.map(TokioIo::new)
            }
        });
        let _inside = self.runtime.enter();
        Endpoint::from_static("https://house").timeout(DEADLINE).connect_with_connector_lazy(connector)
    }

    /// One Attest: `answer` makes the request from the challenge.
    pub fn attest(&self, identity: Option<&Identity>, answer: impl FnOnce(&Challenge) -> AttestRequest) -> Answer<Credential> {
        self.attest_after(identity, Duration::ZERO, answer)
    }

    /// One Attest whose answer to the challenge comes late.
    pub fn attest_after(
        &self,
        identity: Option<&Identity>,
        wait: Duration,
        answer: impl FnOnce(&Challenge) -> AttestRequest,
    ) -> Answer<Credential> {
        let mut stream = self.open(identity)?;
        let challenge = stream.challenge.clone();
        // The server's patience is what is tested: time must pass.
        self.runtime.block_on(async { tokio::time::sleep(wait).await });
        stream.send(self, answer(&challenge));
        stream.credential(self)
    }

    /// Opens an Attest stream and reads its challenge.
    pub fn open(&self, identity: Option<&Identity>) -> Answer<Stream> {
        let channel = self.channel(identity);
        self.runtime.block_on(async {
            let (requests, receiver) = mpsc::channel(2);
            let mut answers = AgentServiceClient::new(channel).attest(ReceiverStream::new(receiver)).await?.into_inner();
            match answers.message().await?.and_then(|answer| answer.step) {
                Some(Step::Challenge(challenge)) => {
                    assert_eq!(challenge.nonce.len(), 32);
                    Ok(Stream { challenge, requests, answers })
                }
                other => panic!("the server did not begin with a challenge: {other:?}"),
            }
        })
    }

    /// One Renew.
    pub fn renew(&self, identity: Option<&Identity>, request: RenewRequest) -> Answer<Credential> {
        let channel = self.channel(identity);
        self.runtime.block_on(async {
            let answer = AgentServiceClient::new(channel).renew(request).await?;
            Ok(answer.into_inner().credential.expect("a credential"))
        })
    }

    /// Follows the bundle over a connection of its own.
    pub fn watch_bundle(&self, identity: Option<&Identity>) -> Answer<Following<'_>> {
        let channel = self.channel(identity);
        self.follow(AgentServiceClient::new(channel))
    }

    /// Asks for it on the operators' socket.
    pub fn watch_bundle_as_operator(&self) -> Answer<Following<'_>> {
        self.follow(AgentServiceClient::new(self.local()))
    }

    fn follow(&self, mut service: AgentServiceClient<Channel>) -> Answer<Following<'_>> {
        let told = self.runtime.block_on(service.watch_bundle(WatchBundleRequest {}))?.into_inner();
        Ok(Following { wire: self, told })
    }

    /// A connection that stays: many renewals, one handshake.
    pub fn standing(&self, identity: &Identity) -> Standing {
        Standing(AgentServiceClient::new(self.channel(Some(identity))))
    }

    /// One Renew over a connection that stays.
    pub fn renew_over(&self, standing: &mut Standing, request: RenewRequest) -> Answer<Credential> {
        let answer = self.runtime.block_on(standing.0.renew(request))?;
        Ok(answer.into_inner().credential.expect("a credential"))
    }

    /// Quarantines over the operator socket; the acknowledgement's ledger index.
    pub fn quarantine(&self, agent: &str) -> u64 {
        let mut operator = self.operator();
        let request = QuarantineRequest { agent: agent.to_owned(), reason: "a test".to_owned() };
        self.runtime.block_on(operator.quarantine(request)).unwrap().into_inner().ledger_index
    }

    /// What grpc.health.v1 says of a service, over TCP without a certificate or over the operator socket.
    pub fn health(&self, face: Face, service: &str) -> Answer<ServingStatus> {
        let mut health = HealthClient::new(self.face(face));
        let request = HealthCheckRequest { service: service.to_owned() };
        Ok(self.runtime.block_on(health.check(request))?.into_inner().status())
    }

    /// Waits until a service's health is as wanted. Over TCP without a certificate it can be asked, not watched.
    pub fn health_becomes(&self, face: Face, service: &str, wanted: ServingStatus) {
        if matches!(face, Face::Tcp) {
            let until = std::time::Instant::now() + DEADLINE;
            while self.health(face, service).unwrap() != wanted {
                assert!(std::time::Instant::now() < until, "{service:?} did not become {wanted:?} over {face:?}");
                std::thread::sleep(Duration::from_millis(20));
            }
            return;
        }
        self.watch_health(service).becomes(wanted);
    }

    /// Follows a service's health over the operator socket.
    pub fn watch_health(&self, service: &str) -> Watched<'_> {
        let mut health = HealthClient::new(self.local());
        let request = HealthCheckRequest { service: service.to_owned() };
        let told = self.runtime.block_on(health.watch(request)).unwrap().into_inner();
        Watched { wire: self, service: service.to_owned(), told }
    }

    /// The services that gRPC reflection lists.
    pub fn reflected(&self, face: Face, identity: Option<&Identity>) -> Answer<Vec<String>> {
        let channel = identity.map_or_else(|| self.face(face), |identity| self.channel(Some(identity)));
        let request =
            ServerReflectionRequest { host: String::new(), message_request: Some(MessageRequest::ListServices(String::new())) };
        self.runtime.block_on(async {
            let mut reflection = ServerReflectionClient::new(channel);
            let mut answers = reflection.server_reflection_info(tokio_stream::once(request)).await?.into_inner();
            match answers.message().await?.and_then(|answer| answer.message_response) {
                Some(MessageResponse::ListServicesResponse(list)) => {
                    Ok(list.service.into_iter().map(|service| service.name).collect())
                }
                other => panic!("no list of services: {other:?}"),
            }
        })
    }

    fn face(&self, face: Face) -> Channel {
        match face {
            Face::Tcp => self.channel(None),
            Face::Operator => self.local(),
        }
    }

    /// Sends a Renew and hangs up without waiting for the answer.
    pub fn renew_and_vanish(&self, identity: &Identity, request: RenewRequest, after: Duration) {
        let channel = self.channel(Some(identity));
        self.runtime.block_on(async {
            let _ = tokio::time::timeout(after, AgentServiceClient::new(channel).renew(request)).await;
        });
    }

    /// Whether a TLS connection with this certificate gets as far as an answer to a call.
    pub fn operator_call_over_tcp(&self, identity: Option<&Identity>) -> Answer<()> {
        let channel = self.channel(identity);
        self.runtime.block_on(async {
            OperatorServiceClient::new(channel).status(StatusRequest {}).await?;
            Ok(())
        })
    }

    /// Enrols over the operator socket.
    pub fn enrol(&self, agent: &str) -> JoinFile {
        self.try_enrol(EnrolRequest { agent: agent.to_owned(), ..EnrolRequest::default() }).unwrap()
    }

    /// Enrols over the operator socket, or is refused.
    pub fn try_enrol(&self, request: EnrolRequest) -> Answer<JoinFile> {
        let mut operator = self.operator();
        let answer = self.runtime.block_on(operator.enrol(request))?;
        Ok(answer.into_inner().join.expect("a join file"))
    }

    /// Releases over the operator socket.
    pub fn release(&self, agent: &str) -> JoinFile {
        let mut operator = self.operator();
        let request = ReleaseRequest { agent: agent.to_owned(), reason: "a test".to_owned(), token_ttl_seconds: 0 };
        let answer = self.runtime.block_on(operator.release(request)).unwrap();
        answer.into_inner().join.expect("a join file")
    }

    /// Every entry of the ledger.
    pub fn entries(&self) -> Vec<Entry> {
        let mut operator = self.operator();
        let mut entries = Vec::new();
        loop {
            let request = ListEntriesRequest { from: entries.len() as u64, limit: 1000 };
            let page = self.runtime.block_on(operator.list_entries(request)).unwrap().into_inner();
            if page.entries.is_empty() {
                return entries;
            }
            entries.extend(page.entries.iter().map(|bytes| Entry::decode(bytes.as_slice()).unwrap()));
        }
    }

    fn operator(&self) -> OperatorServiceClient<Channel> {
        OperatorServiceClient::new(self.local())
    }

    pub(super) fn local(&self) -> Channel {
        let socket = self.operator.clone();
        let connector = tower::service_fn(move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        });
        let _inside = self.runtime.enter();
        Endpoint::from_static("http://operator").timeout(DEADLINE).connect_with_connector_lazy(connector)
    }

    /// The server's own certificate, DER, as a TLS client sees it.
    pub fn server_certificate(&self) -> Vec<u8> {
        self.runtime.block_on(async {
            let tcp = TcpStream::connect(self.address).await.unwrap();
            let name = ServerName::from(self.address.ip());
            let tls = TlsConnector::from(Arc::new(reckless(None))).connect(name, tcp).await.unwrap();
            tls.get_ref().1.peer_certificates().unwrap()[0].to_vec()
        })
    }
}

/// Where a daemon listens.
#[derive(Debug, Clone, Copy)]
pub enum Face {
    Tcp,
    Operator,
}

/// A service's health as it changes.
pub struct Watched<'a> {
    wire: &'a Wire,
    service: String,
    told: tonic::Streaming<HealthCheckResponse>,
}

impl Watched<'_> {
    /// Waits until it is told so.
    #[track_caller]
    pub fn becomes(&mut self, wanted: ServingStatus) {
        let told = &mut self.told;
        let watch = async { while told.message().await.unwrap().expect("a watch has no end").status() != wanted {} };
        let in_time = self.wire.runtime.block_on(async { tokio::time::timeout(DEADLINE, watch).await }).is_ok();
        assert!(in_time, "{:?} did not become {wanted:?}", self.service);
    }
}

/// The bundle as an agent follows it.
pub struct Following<'a> {
    wire: &'a Wire,
    told: tonic::Streaming<WatchBundleResponse>,
}

impl std::fmt::Debug for Following<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Following")
    }
}

impl Following<'_> {
    /// Waits for what is told next, or for why nothing more is. Without a reason where the connection ended.
    #[track_caller]
    pub fn next(&mut self) -> Answer<Bundle> {
        Ok(self.message()?.bundle.expect("a bundle"))
    }

    /// Waits until a renewal is asked for; within how many seconds.
    #[track_caller]
    pub fn renew_within(&mut self) -> u32 {
        loop {
            match self.message().unwrap().renew_within_seconds {
                0 => {}
                seconds => return seconds,
            }
        }
    }

    #[track_caller]
    fn message(&mut self) -> Answer<WatchBundleResponse> {
        let told = &mut self.told;
        let next = self.wire.runtime.block_on(async { tokio::time::timeout(DEADLINE, told.message()).await });
        Ok(next.expect("nothing was told in time")?.expect("an end says why"))
    }
}

/// A connection that stays.
pub struct Standing(AgentServiceClient<Channel>);

/// An Attest stream whose challenge was read.
pub struct Stream {
    pub challenge: Challenge,
    requests: mpsc::Sender<AttestRequest>,
    answers: tonic::Streaming<AttestResponse>,
}

impl Stream {
    /// Answers the challenge.
    pub fn send(&mut self, wire: &Wire, request: AttestRequest) {
        // A stream that the server has ended is judged by what `credential` reads.
        let _ = wire.runtime.block_on(self.requests.send(request));
    }

    /// The server's answer.
    pub fn credential(&mut self, wire: &Wire) -> Answer<Credential> {
        match wire.runtime.block_on(self.answers.message())?.and_then(|answer| answer.step) {
            Some(Step::Credential(credential)) => Ok(credential),
            other => panic!("neither a credential nor a refusal: {other:?}"),
        }
    }
}

/// A request in the making: every part can be spoilt before it is sent.
pub struct Draft {
    /// The key to be certified.
    pub key: rcgen::KeyPair,
    pub ask: Ask,
    /// The trust domain that the proof names.
    pub domain: String,
}

impl Draft {
    /// For the bearer of a join token.
    pub fn join(join: &JoinFile) -> Self {
        Self::with(Claim::Join(JoinClaim { token_id: join.token_id.clone() }))
    }

    /// For the holder of an agent's newest key.
    pub fn bound(agent: &str, sequence: u64) -> Self {
        Self::with(Claim::BoundKey(BoundKeyClaim { agent: agent.to_owned(), sequence }))
    }

    fn with(claim: Claim) -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let ask = Ask { csr: csr(&key), idempotency_key: fresh_name(), ttl_seconds: 0, claim: Some(claim) };
        Self { key, ask, domain: DOMAIN.to_owned() }
    }

    /// What an Attest proof is signed over.
    pub fn attest_binder(&self, nonce: &[u8]) -> [u8; 32] {
        self.binder(b"keyward/attest/v1\0", nonce)
    }

    /// What a Renew proof is signed over.
    pub fn renew_binder(&self, sequence: u64) -> [u8; 32] {
        self.binder(b"keyward/renew/v1\0", &sequence.to_be_bytes())
    }

    fn binder(&self, label: &[u8], moment: &[u8]) -> [u8; 32] {
        let spki = Sha256::digest(spki(&self.key));
        let ask = Sha256::digest(self.ask.encode_to_vec());
        let domain = Sha256::digest(self.domain.as_bytes());
        Sha256::new()
            .chain_update(label)
            .chain_update(moment)
            .chain_update(spki)
            .chain_update(ask)
            .chain_update(domain)
            .finalize()
            .into()
    }

    /// The answer to a challenge with a join token's seed.
    pub fn joined(&self, challenge: &Challenge, seed: &[u8]) -> AttestRequest {
        let proof = join_key(seed).sign(&self.attest_binder(&challenge.nonce)).as_ref().to_vec();
        AttestRequest { ask: self.ask.encode_to_vec(), proof }
    }

    /// The answer to a challenge with a certified key: a rejoin.
    pub fn rejoined(&self, challenge: &Challenge, holder: &Identity) -> AttestRequest {
        let proof = holder.pair().sign(&self.attest_binder(&challenge.nonce)).unwrap();
        AttestRequest { ask: self.ask.encode_to_vec(), proof }
    }

    /// A renewal proved by a certified key.
    pub fn renewal(&self, holder: &Identity) -> RenewRequest {
        let Some(Claim::BoundKey(claim)) = &self.ask.claim else { panic!("a renewal claims a bound key") };
        let proof = holder.pair().sign(&self.renew_binder(claim.sequence)).unwrap();
        RenewRequest { ask: self.ask.encode_to_vec(), proof }
    }

    /// The identity it becomes with an answer's certificate.
    pub fn identity(&self, credential: &Credential) -> Identity {
        Identity { chain: credential.chain.clone(), key: self.key.serialize_der() }
    }
}

/// PKCS#10 for a key, as a well-behaved client sends it.
pub fn csr(key: &rcgen::KeyPair) -> Vec<u8> {
    rcgen::CertificateParams::default().serialize_request(key).unwrap().der().to_vec()
}

fn spki(key: &rcgen::KeyPair) -> Vec<u8> {
    use rcgen::PublicKeyData as _;
    key.subject_public_key_info()
}

/// The Ed25519 key of a join token: HKDF-SHA256, no salt, info "keyward/join/v1".
fn join_key(seed: &[u8]) -> Ed25519KeyPair {
    struct Seed;
    impl KeyType for Seed {
        fn len(&self) -> usize {
            32
        }
    }
    let mut derived = [0; 32];
    Salt::new(HKDF_SHA256, b"").extract(seed).expand(&[b"keyward/join/v1"], Seed).unwrap().fill(&mut derived).unwrap();
    Ed25519KeyPair::from_seed_unchecked(&derived).unwrap()
}

fn fresh_name() -> String {
    let mut bytes = [0; 16];
    aws_lc_rs::rand::fill(&mut bytes).unwrap();
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn reckless(identity: Option<&Identity>) -> ClientConfig {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let builder = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .dangerous()
        .with_custom_certificate_verifier(Arc::new(AnyServer));
    let mut config = match identity {
        Some(identity) => {
            let chain = identity.chain.iter().map(|der| CertificateDer::from(der.clone())).collect();
            builder.with_client_auth_cert(chain, PrivateKeyDer::Pkcs8(identity.key.clone().into())).unwrap()
        }
        None => builder.with_no_client_auth(),
    };
    config.alpn_protocols = vec![b"h2".to_vec()];
    config
}

#[derive(Debug)]
struct AnyServer;

impl ServerCertVerifier for AnyServer {
    fn verify_server_cert(
        &self,
        _end_entity: &CertificateDer<'_>,
        _intermediates: &[CertificateDer<'_>],
        _name: &ServerName<'_>,
        _ocsp: &[u8],
        _now: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Err(rustls::Error::General("TLS 1.3 only".into()))
    }

    fn verify_tls13_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _signature: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        vec![SignatureScheme::ECDSA_NISTP256_SHA256, SignatureScheme::ED25519, SignatureScheme::ECDSA_NISTP384_SHA384]
    }
}

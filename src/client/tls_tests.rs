use super::*;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType, string::Ia5String};

struct Authority {
    der: Vec<u8>,
    issuer: Issuer<'static, KeyPair>,
}

fn authority() -> Authority {
    let key = KeyPair::generate().expect("a key");
    let mut parameters = CertificateParams::default();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    parameters.distinguished_name.push(DnType::CommonName, "authority");
    let der = parameters.self_signed(&key).expect("a certificate").der().to_vec();
    Authority { der, issuer: Issuer::new(parameters, key) }
}

fn uri(text: &str) -> SanType {
    SanType::URI(Ia5String::try_from(text).expect("ASCII"))
}

fn leaf(authority: &Authority, names: Vec<SanType>) -> (Vec<u8>, Key) {
    let key = Key::generate().expect("a key");
    let mut parameters = CertificateParams::default();
    parameters.subject_alt_names = names;
    (parameters.signed_by(&key, &authority.issuer).expect("a certificate").der().to_vec(), key)
}

fn domain() -> TrustDomain {
    TrustDomain::parse("example.org").expect("a name")
}

/// Shakes hands over a pipe: does the client take this server?
async fn handshake(
    trusted: &[u8],
    certificate: Vec<u8>,
    key: &Key,
    versions: &[&'static rustls::SupportedProtocolVersion],
) -> bool {
    let server = rustls::ServerConfig::builder_with_provider(Arc::new(aws_lc_rs::default_provider()))
        .with_protocol_versions(versions)
        .expect("versions")
        .with_no_client_auth()
        .with_single_cert(vec![CertificateDer::from(certificate)], key.to_rustls().into())
        .expect("a server");
    let client = config(&[trusted.to_vec()], &domain(), None).expect("a client");
    let (near, far) = tokio::io::duplex(16 * 1024);
    let accept = tokio_rustls::TlsAcceptor::from(Arc::new(server)).accept(far);
    let name = ServerName::try_from("any.host.example").expect("a name");
    let connect = TlsConnector::from(Arc::new(client)).connect(name, near);
    let (_, connected) = tokio::join!(accept, connect);
    connected.is_ok()
}

const TLS13: &[&rustls::SupportedProtocolVersion] = &[&rustls::version::TLS13];

#[tokio::test]
async fn the_server_of_the_trust_domain_is_taken_whatever_its_host() {
    let ours = authority();
    let (certificate, key) = leaf(&ours, vec![uri("spiffe://example.org/keyward/server")]);
    assert!(handshake(&ours.der, certificate, &key, TLS13).await);
}

#[tokio::test]
async fn a_server_that_names_hosts_beside_its_identity_is_taken() {
    let ours = authority();
    let host = SanType::DnsName(Ia5String::try_from("any.host.example").expect("ASCII"));
    let (certificate, key) = leaf(&ours, vec![uri("spiffe://example.org/keyward/server"), host]);
    assert!(handshake(&ours.der, certificate, &key, TLS13).await);
}

#[tokio::test]
async fn nobody_else_is_taken() {
    let ours = authority();
    let server = || uri("spiffe://example.org/keyward/server");
    let host = || SanType::DnsName(Ia5String::try_from("any.host.example").expect("ASCII"));
    for names in [
        vec![],
        vec![host()],
        vec![uri("spiffe://example.org/agent/coder/7")],
        vec![uri("spiffe://example.com/keyward/server")],
        vec![uri("spiffe://example.org/keyward/server/")],
        vec![server(), uri("spiffe://example.org/agent/coder/7")],
    ] {
        let (certificate, key) = leaf(&ours, names.clone());
        assert!(!handshake(&ours.der, certificate, &key, TLS13).await, "{names:?}");
    }
    let theirs = authority();
    let (certificate, key) = leaf(&theirs, vec![server()]);
    assert!(!handshake(&ours.der, certificate, &key, TLS13).await, "another authority");
}

#[tokio::test]
async fn tls_1_2_is_not_spoken() {
    // rustls without its `tls12` feature cannot even offer it; what the client says is looked at instead.
    let ours = authority();
    let client = config(&[ours.der], &domain(), None).expect("a client");
    let name = ServerName::try_from("any.host.example").expect("a name");
    let mut connection = rustls::ClientConnection::new(Arc::new(client), name).expect("a connection");
    let mut hello = Vec::new();
    connection.write_tls(&mut hello).expect("written");
    // supported_versions (RFC 8446 §4.2.1): type 43, length 3, list of 2 bytes, 0x0304 alone.
    assert!(hello.windows(7).any(|window| window == [0, 43, 0, 3, 2, 3, 4]));
}

#[test]
fn a_bundle_without_authorities_trusts_nobody() {
    assert!(config(&[], &domain(), None).is_err());
    assert!(config(&[vec![1, 2, 3]], &domain(), None).is_err());
}

use super::*;
use crate::client::agent::Connection;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair, SanType, string::Ia5String};

struct Authority {
    der: Vec<u8>,
    issuer: Issuer<'static, KeyPair>,
}

fn authority() -> Authority {
    named("authority")
}

fn named(name: &str) -> Authority {
    let key = KeyPair::generate().expect("a key");
    let mut parameters = CertificateParams::default();
    parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    parameters.distinguished_name.push(DnType::CommonName, name);
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

/// A server on a free port that takes clients of `trusted` alone.
async fn demanding(ours: &Authority, trusted: &Authority) -> String {
    let (certificate, key) = leaf(ours, vec![uri("spiffe://example.org/keyward/server")]);
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from(trusted.der.clone())).expect("an authority");
    let provider = Arc::new(aws_lc_rs::default_provider());
    let clients = rustls::server::WebPkiClientVerifier::builder_with_provider(Arc::new(roots), Arc::clone(&provider));
    let server = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(TLS13)
        .expect("versions")
        .with_client_cert_verifier(clients.build().expect("a verifier"))
        .with_single_cert(vec![CertificateDer::from(certificate)], key.to_rustls().into())
        .expect("a server");
    let acceptor = tokio_rustls::TlsAcceptor::from(Arc::new(server));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.expect("a port");
    let address = listener.local_addr().expect("an address").to_string();
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            // Whoever is taken hears nothing.
            let _ = acceptor.accept(tcp).await;
        }
    });
    address
}

/// The client's handshake ends before the server has looked at its certificate, and HTTP/2 tells no more than words.
#[tokio::test]
async fn a_server_that_does_not_take_our_certificate_is_told_from_one_that_is_not_there() {
    let ours = authority();
    let (rejects, hangs_up) = (demanding(&ours, &named("another")).await, demanding(&ours, &ours).await);
    let namesake = demanding(&ours, &authority()).await;
    let (certificate, key) = leaf(&ours, vec![uri("spiffe://example.org/agent/coder/7")]);
    let call = async |address: &String, identity| {
        let authorities = [ours.der.clone()];
        let connection = Connection::open(std::slice::from_ref(address), &authorities, &domain(), identity).await;
        connection.expect("connected").watch_bundle(0).await.err().expect("no answer")
    };
    let identity = Some((std::slice::from_ref(&certificate), &key));
    for _ in 0..20 {
        let error = call(&rejects, identity).await;
        assert!(matches!(&error, Error::Rejected { place, .. } if *place == rejects), "{error}");
    }
    for (address, identity) in [(&namesake, identity), (&rejects, None)] {
        let error = call(address, identity).await;
        assert!(matches!(error, Error::Rejected { .. }), "{error}");
    }
    let error = call(&hangs_up, identity).await;
    assert!(matches!(error, Error::Unreachable { .. }), "{error}");
}

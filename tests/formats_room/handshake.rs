//! A rustls handshake between two ends whose keys answer only to transcript hashes, as an agent's key in keyward does.

use std::sync::{Arc, Mutex};

use keyward::formats::{Signed, tls};
use keyward::model::Algorithm;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair, PublicKeyData};
use rustls::client::ResolvesClientCert;
use rustls::pki_types::{CertificateDer, ServerName};
use rustls::server::{ClientHello, ResolvesServerCert, WebPkiClientVerifier};
use rustls::sign::{CertifiedKey, SigningKey};
use rustls::{
    ClientConfig, ClientConnection, RootCertStore, ServerConfig, ServerConnection, SignatureAlgorithm, SignatureScheme,
};

use super::Signer;

/// Runs it; tells who signed, in order.
pub fn mutual(client: Arc<Signer>, server: Arc<Signer>) -> Vec<tls::Role> {
    let signed = Arc::new(Mutex::new(Vec::new()));
    let authority_key = KeyPair::generate().unwrap();
    let mut authority = CertificateParams::default();
    authority.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let root = authority.self_signed(&authority_key).unwrap();
    let issuer = Issuer::new(authority, authority_key);
    let mut roots = RootCertStore::empty();
    roots.add(root.der().clone()).unwrap();
    let roots = Arc::new(roots);
    let end = |key: Arc<Signer>, role| {
        let certificate = CertificateParams::new(["end.example".to_owned()]).unwrap().signed_by(&*key, &issuer).unwrap();
        let key = Key { key, role, signed: Arc::clone(&signed) };
        Arc::new(Certified(Arc::new(CertifiedKey::new(vec![CertificateDer::from(certificate)], Arc::new(key)))))
    };
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let versions = [&rustls::version::TLS13];
    let client_config = ClientConfig::builder_with_provider(Arc::clone(&provider))
        .with_protocol_versions(&versions)
        .unwrap()
        .with_root_certificates(Arc::clone(&roots))
        .with_client_cert_resolver(end(client, tls::Role::Client));
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, Arc::clone(&provider)).build().unwrap();
    let server_config = ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&versions)
        .unwrap()
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(end(server, tls::Role::Server));
    let mut client = ClientConnection::new(Arc::new(client_config), ServerName::try_from("end.example").unwrap()).unwrap();
    let mut server = ServerConnection::new(Arc::new(server_config)).unwrap();
    // Each turn moves what there is; a handshake takes three.
    for _ in 0..10 {
        let mut flight = Vec::new();
        while client.wants_write() {
            client.write_tls(&mut flight).unwrap();
        }
        read(&flight, |bytes| server.read_tls(bytes));
        server.process_new_packets().unwrap();
        let mut flight = Vec::new();
        while server.wants_write() {
            server.write_tls(&mut flight).unwrap();
        }
        read(&flight, |bytes| client.read_tls(bytes));
        client.process_new_packets().unwrap();
    }
    assert!(!client.is_handshaking() && !server.is_handshaking(), "the handshake did not come to its end");
    assert!(server.peer_certificates().is_some());
    signed.lock().unwrap().clone()
}

fn read(mut flight: &[u8], mut take: impl FnMut(&mut &[u8]) -> std::io::Result<usize>) {
    while !flight.is_empty() {
        take(&mut flight).unwrap();
    }
}

impl PublicKeyData for Signer {
    fn der_bytes(&self) -> &[u8] {
        match self {
            Self::P256(pair) => aws_lc_rs::signature::KeyPair::public_key(pair).as_ref(),
            Self::Ed25519(pair) => aws_lc_rs::signature::KeyPair::public_key(pair).as_ref(),
            Self::Rsa(pair) => aws_lc_rs::signature::KeyPair::public_key(pair).as_ref(),
        }
    }

    fn algorithm(&self) -> &'static rcgen::SignatureAlgorithm {
        match self {
            Self::P256(_) => &rcgen::PKCS_ECDSA_P256_SHA256,
            Self::Ed25519(_) => &rcgen::PKCS_ED25519,
            Self::Rsa(_) => &rcgen::PKCS_RSA_SHA256,
        }
    }
}

#[derive(Debug)]
struct Certified(Arc<CertifiedKey>);

impl ResolvesClientCert for Certified {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl ResolvesServerCert for Certified {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(Arc::clone(&self.0))
    }
}

#[derive(Debug, Clone)]
struct Key {
    key: Arc<Signer>,
    role: tls::Role,
    signed: Arc<Mutex<Vec<tls::Role>>>,
}

impl SigningKey for Key {
    fn choose_scheme(&self, offered: &[SignatureScheme]) -> Option<Box<dyn rustls::sign::Signer>> {
        offered.contains(&rustls::sign::Signer::scheme(self)).then(|| Box::new(self.clone()) as _)
    }

    fn algorithm(&self) -> SignatureAlgorithm {
        match *self.key {
            Signer::P256(_) => SignatureAlgorithm::ECDSA,
            Signer::Ed25519(_) => SignatureAlgorithm::ED25519,
            Signer::Rsa(_) => SignatureAlgorithm::RSA,
        }
    }
}

impl rustls::sign::Signer for Key {
    /// What rustls wants signed is taken apart, and only the hash at its end is used.
    fn sign(&self, message: &[u8]) -> Result<Vec<u8>, rustls::Error> {
        // 64 spaces, 33 letters of either context, a zero.
        let hash = &message[64 + 33 + 1..];
        let algorithm = match *self.key {
            Signer::P256(_) => Algorithm::P256,
            Signer::Ed25519(_) => Algorithm::Ed25519,
            Signer::Rsa(_) => Algorithm::Ps256,
        };
        self.signed.lock().unwrap().push(self.role);
        match self.key.finish(tls::prepare(algorithm, self.role, hash).unwrap()) {
            Signed::Tls(signature) => Ok(signature),
            other => panic!("{other:?}"),
        }
    }

    fn scheme(&self) -> SignatureScheme {
        match *self.key {
            Signer::P256(_) => SignatureScheme::ECDSA_NISTP256_SHA256,
            Signer::Ed25519(_) => SignatureScheme::ED25519,
            Signer::Rsa(_) => SignatureScheme::RSA_PSS_SHA256,
        }
    }
}

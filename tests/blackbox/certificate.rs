//! What is issued, judged by those who did not write it: OpenSSL, GnuTLS, pkilint, webpki.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use rustls::pki_types::{CertificateDer, UnixTime};
use rustls::server::WebPkiClientVerifier;
use x509_parser::prelude::{CertificateRevocationList, FromDer as _, X509Certificate};

use crate::house::{Agent, DEADLINE, House, Output, certificates, run};

fn tool(name: &str, arguments: &[&str]) -> Output {
    run(Command::new(name).args(arguments))
}

/// pkilint, where scripts/test puts it.
fn linter() -> String {
    let own = concat!(env!("CARGO_MANIFEST_DIR"), "/target/pkilint/bin/lint_pkix_cert");
    if Path::new(own).exists() { own.to_owned() } else { "lint_pkix_cert".to_owned() }
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

fn pem_file(house: &House, name: &str, ders: &[&[u8]]) -> PathBuf {
    let path = house.path(name);
    let blocks: String = ders.iter().map(|der| pem::encode(&pem::Pem::new("CERTIFICATE", *der))).collect();
    fs::write(&path, blocks).unwrap();
    path
}

/// The serials on the CRL once it lists `serial`: it is made within a second of the change.
pub fn crl_listing(house: &House, serial: &[u8]) -> Vec<Vec<u8>> {
    let until = Instant::now() + DEADLINE;
    loop {
        let path = house.path("crl.der");
        if house.keyward(&["crl", "show", "--der", text(&path)]).code == 0
            && let Ok(der) = fs::read(&path)
            && let Ok((_, crl)) = CertificateRevocationList::from_der(&der)
        {
            let listed: Vec<_> = crl.iter_revoked_certificates().map(|revoked| revoked.raw_serial().to_vec()).collect();
            if listed.iter().any(|listed| listed == serial) {
                return listed;
            }
        }
        assert!(Instant::now() < until, "the CRL never listed {serial:02x?}");
        // The CRL is polled in the field as well: there is no event to wait for outside the daemon.
        std::thread::sleep(Duration::from_millis(50));
    }
}

fn leaf_of(agent: &Agent<'_>, house: &House) -> PathBuf {
    pem_file(house, "leaf.pem", &[&agent.certificate()])
}

#[test]
fn openssl_verifies_the_chain_for_clients_and_servers_under_strict_rules() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    let (bundle, issuing) = (house.state().join("bundle.pem"), house.state().join("issuing.pem"));
    let leaf = leaf_of(&agent, &house);
    for purpose in ["sslclient", "sslserver"] {
        let arguments =
            ["verify", "-x509_strict", "-purpose", purpose, "-CAfile", text(&bundle), "-untrusted", text(&issuing), text(&leaf)];
        tool("openssl", &arguments).ok();
    }
}

#[test]
fn openssl_refuses_a_quarantined_agent_by_the_crl() {
    let house = House::serving();
    let (bad, good) = (house.attested("builder/1"), house.attested("builder/2"));
    bad.quarantine().ok();
    crl_listing(&house, &bad.serial());
    let crl = house.path("crl.pem");
    tool("openssl", &["crl", "-inform", "DER", "-in", text(&house.path("crl.der")), "-out", text(&crl)]).ok();
    let (bundle, issuing) = (house.state().join("bundle.pem"), house.state().join("issuing.pem"));
    let check = |agent: &Agent<'_>| {
        let leaf = leaf_of(agent, &house);
        let arguments = [
            "verify",
            "-x509_strict",
            "-crl_check",
            "-CRLfile",
            text(&crl),
            "-CAfile",
            text(&bundle),
            "-untrusted",
            text(&issuing),
            text(&leaf),
        ];
        tool("openssl", &arguments)
    };
    check(&good).ok();
    check(&bad).exits(2).says("certificate revoked");
}

#[test]
fn gnutls_verifies_the_chain() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    let chain = agent.chain();
    let bundle = certificates(&house.state().join("bundle.pem"));
    let infile = pem_file(&house, "chain.pem", &[&chain[0], &chain[1]]);
    let anchor = pem_file(&house, "anchor.pem", &[&bundle[0]]);
    tool(
        "certtool",
        &["--verify", "--verify-profile", "medium", "--load-ca-certificate", text(&anchor), "--infile", text(&infile)],
    )
    .ok();
}

/// pkilint knows URIs of web servers only: the authority of spiffe://<trust domain>/… is no fault of ours (SPIFFE-ID §2).
const ALLOWED: [&str; 1] = ["pkix.invalid_uri_syntax"];

#[test]
fn pkilint_finds_nothing_wrong_with_any_certificate_but_the_spiffe_uri() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    let root = certificates(&house.state().join("bundle.pem")).swap_remove(0);
    let server = house.wire().server_certificate();
    let chain = agent.chain();
    for (name, der) in [("root", &root), ("issuing", &chain[1]), ("agent", &chain[0]), ("server", &server)] {
        let path = pem_file(&house, &format!("{name}.pem"), &[der]);
        let output = tool(&linter(), &["lint", "-s", "WARNING", "-f", "JSON", text(&path)]);
        let report = output.json();
        let findings: Vec<&serde_json::Value> = report["results"]
            .as_array()
            .unwrap_or_else(|| panic!("no results in {report}"))
            .iter()
            .flat_map(|result| result["finding_descriptions"].as_array().into_iter().flatten())
            .filter(|finding| !ALLOWED.iter().any(|code| finding["code"] == *code))
            .collect();
        assert!(findings.is_empty(), "{name}: {findings:#?}");
    }
}

#[test]
fn webpki_accepts_the_chain_under_the_issuing_certificate_and_under_the_root() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    let chain: Vec<CertificateDer<'static>> = agent.chain().into_iter().map(CertificateDer::from).collect();
    let root = CertificateDer::from(certificates(&house.state().join("bundle.pem")).swap_remove(0));
    for anchor in [root, chain[1].clone()] {
        let mut roots = rustls::RootCertStore::empty();
        roots.add(anchor).unwrap();
        let provider = rustls::crypto::aws_lc_rs::default_provider().into();
        let verifier = WebPkiClientVerifier::builder_with_provider(std::sync::Arc::new(roots), provider).build().unwrap();
        verifier.verify_client_cert(&chain[0], &chain[1..], UnixTime::now()).unwrap();
    }
}

fn parsed(der: &[u8]) -> X509Certificate<'_> {
    x509_parser::parse_x509_certificate(der).unwrap().1
}

#[test]
fn an_agents_certificate_has_the_profile_of_an_x509_svid() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    let der = agent.certificate();
    let certificate = parsed(&der);
    assert_eq!(certificate.version().0, 2);
    assert!(certificate.raw_serial().len() <= 20 && certificate.raw_serial().len() >= 15, "random, about 128 bits");
    let usage = certificate.key_usage().unwrap().unwrap();
    assert!(usage.critical && usage.value.digital_signature() && usage.value.flags == 1, "digitalSignature alone");
    let purposes = certificate.extended_key_usage().unwrap().unwrap().value;
    assert!(purposes.client_auth && purposes.server_auth && !purposes.any && purposes.other.is_empty());
    let constraints = certificate.basic_constraints().unwrap().unwrap();
    assert!(constraints.critical && !constraints.value.ca);
    let encoded = certificate.extensions().iter().find(|extension| extension.oid.to_id_string() == "2.5.29.19").unwrap().value;
    assert_eq!(encoded, [0x30, 0], "an empty SEQUENCE: cA is left to its default, as DER demands");
    for oid in ["2.5.29.14", "2.5.29.35", "2.25.177325374.1"] {
        let found = certificate.extensions().iter().find(|extension| extension.oid.to_id_string() == oid);
        assert!(!found.unwrap_or_else(|| panic!("{oid} is missing")).critical);
    }
    let lifetime = certificate.validity().not_after.timestamp() - certificate.validity().not_before.timestamp();
    assert!((600..=660).contains(&lifetime), "ten minutes and the allowance for clocks, not {lifetime} s");
}

#[test]
fn the_authorities_can_sign_certificates_and_crls_and_nothing_else() {
    let house = House::serving();
    house.attested("builder/1");
    let root = certificates(&house.state().join("bundle.pem")).swap_remove(0);
    let issuing = certificates(&house.state().join("issuing.pem")).swap_remove(0);
    for (der, path_length) in [(&root, 1), (&issuing, 0)] {
        let certificate = parsed(der);
        let constraints = certificate.basic_constraints().unwrap().unwrap();
        assert!(constraints.critical && constraints.value.ca);
        assert_eq!(constraints.value.path_len_constraint, Some(path_length));
        let usage = certificate.key_usage().unwrap().unwrap();
        assert!(usage.critical && usage.value.key_cert_sign() && usage.value.crl_sign() && !usage.value.digital_signature());
        let names = format!("{:?}", certificate.subject_alternative_name().unwrap().unwrap().value.general_names);
        assert!(names.contains("\"spiffe://house.example\""), "{names}");
    }
}

#[test]
fn no_two_certificates_share_a_serial_or_a_key() {
    let house = House::serving();
    let agent = house.attested("builder/1");
    let mut seen = std::collections::BTreeSet::new();
    for _ in 0..5 {
        let der = agent.certificate();
        let certificate = parsed(&der);
        assert!(seen.insert(certificate.raw_serial().to_vec()));
        assert!(seen.insert(certificate.public_key().raw.to_vec()));
        agent.renew().ok();
    }
}

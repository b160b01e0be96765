//! `keyward init` with a root outside: our issuing key's request goes out, a certificate comes back. The root here is OpenSSL's.

use std::path::PathBuf;
use std::process::Command;

use keyward::proto::Purpose;

use crate::house::{Body, House, run};
use crate::instruments;

/// An outside root that signs whatever it is given, as told.
pub struct OutsideRoot(PathBuf);

pub const FITS: &str = "basicConstraints=critical,CA:TRUE,pathlen:0\nkeyUsage=critical,keyCertSign,cRLSign\n\
                    subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\nsubjectAltName=URI:spiffe://house.example\n";

impl OutsideRoot {
    pub fn new(house: &House, name: &str) -> Self {
        let root = Self(house.path(name));
        std::fs::create_dir(&root.0).unwrap();
        root.openssl(
            "req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout root.key -out root.pem -days 30 \
             -subj /CN=outside -addext basicConstraints=critical,CA:TRUE,pathlen:1 -addext keyUsage=critical,keyCertSign,cRLSign",
        );
        root
    }

    fn openssl(&self, arguments: &str) {
        run(Command::new("openssl").args(arguments.split_whitespace()).current_dir(&self.0)).ok();
    }

    pub fn certificate(&self) -> String {
        self.0.join("root.pem").display().to_string()
    }

    /// The issuing certificate for a request, with these extensions.
    pub fn sign(&self, csr: &str, extensions: &str) -> String {
        std::fs::write(self.0.join("extensions"), extensions).unwrap();
        self.openssl(&format!(
            "x509 -req -in {csr} -CA root.pem -CAkey root.key -out issuing.pem -days 7 -extfile extensions -set_serial 7"
        ));
        self.0.join("issuing.pem").display().to_string()
    }

    /// The same, in the name of `subject` instead of the request's.
    pub fn sign_named(&self, csr: &str, extensions: &str, subject: &str) -> String {
        let renamed = self.0.join("renamed.pem").display().to_string();
        self.openssl(&format!("req -in {csr} -pubkey -noout -out key.pub"));
        self.openssl("req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout any.key -out any.csr -subj /CN=any");
        std::fs::write(self.0.join("extensions"), extensions).unwrap();
        self.openssl(&format!(
            "x509 -req -in any.csr -force_pubkey key.pub -subj {subject} -CA root.pem -CAkey root.key -out {renamed} -days 7 \
             -extfile extensions -set_serial 8"
        ));
        renamed
    }

    /// The issuing certificate for a request, for no longer than so many days.
    pub fn sign_for_days(&self, csr: &str, days: &str) -> String {
        std::fs::write(self.0.join("extensions"), FITS).unwrap();
        let from_to = format!(
            "x509 -req -in {csr} -CA root.pem -CAkey root.key -out brief.pem -days {days} -extfile extensions -set_serial 9"
        );
        self.openssl(&from_to);
        self.0.join("brief.pem").display().to_string()
    }
}

/// A house that waits for its issuing certificate, and the request for it.
pub fn awaiting_root() -> (House, String) {
    let house = House::new();
    let csr = house.path("issuing.csr").display().to_string();
    house.keyward(&["init", "--root-csr", &csr]).ok();
    (house, csr)
}

#[test]
fn a_house_under_an_outside_root_issues_what_openssl_verifies_under_that_root() {
    let (mut house, csr) = awaiting_root();
    let root = OutsideRoot::new(&house, "root");
    root.openssl(&format!("req -in {csr} -verify -noout"));
    house.keyward(&["init", "--root-certificate", &root.certificate(), "--issuing-certificate", &root.sign(&csr, FITS)]).ok();
    house.serve();
    let agent = house.attested("builder/1");
    agent.renew().ok();
    let (chain, anchor) = (agent.svid(), root.certificate());
    let verify = ["verify", "-x509_strict", "-CAfile", &anchor, "-untrusted", chain.to_str().unwrap(), chain.to_str().unwrap()];
    run(Command::new("openssl").args(verify)).ok();
    agent.quarantine().ok();
    crate::certificate::crl_listing(&house, &agent.serial());
    let entries = house.entries();
    let made = entries.iter().filter(|body| matches!(body, Body::KeyIntended(key) if key.purpose() == Purpose::Root)).count();
    assert_eq!(made, 0, "there is no root key in the token");
    house.stop_and_verify();
}

#[test]
fn waiting_for_the_root_is_resumed_with_the_same_key() {
    let (mut house, first) = awaiting_root();
    house.start();
    assert!(!house.daemon().was_ready());
    // On a busy machine the first word may be of a token that takes long to open.
    let why = "`keyward init` has not finished: run it";
    if !house.log().contains(why) {
        house.daemon().tells(why);
    }
    assert_eq!(house.stop(), 0);
    let again = house.path("again.csr").display().to_string();
    house.keyward(&["init", "--root-csr", &again]).ok();
    let key = |path: &str| run(Command::new("openssl").args(["req", "-in", path, "-noout", "-pubkey"])).ok().stdout;
    assert_eq!(key(&first), key(&again));
    // A certificate over the first request fits still.
    let root = OutsideRoot::new(&house, "root");
    let arguments = ["init", "--root-certificate", &root.certificate(), "--issuing-certificate", &root.sign(&first, FITS)];
    house.keyward(&arguments).ok();
    house.keyward(&arguments).exits(1).says("initialised already");
}

#[test]
fn outside_certificates_that_do_not_fit_are_refused_and_the_right_ones_are_still_taken() {
    let (mut house, csr) = awaiting_root();
    let root = OutsideRoot::new(&house, "root");
    let other = OutsideRoot::new(&house, "other");
    let init = |root: &str, issuing: &str| house.keyward(&["init", "--root-certificate", root, "--issuing-certificate", issuing]);
    let refused = |extensions: &str, why: &str| init(&root.certificate(), &root.sign(&csr, extensions)).exits(1).says(why);
    refused(&FITS.replace("pathlen:0", "pathlen:1"), "path length");
    refused(&FITS.replace(",pathlen:0", ""), "path length");
    refused(&FITS.replace("CA:TRUE,pathlen:0", "CA:FALSE"), "not a CA");
    refused(&FITS.replace("keyCertSign,", ""), "may not sign");
    refused(&FITS.replace(",cRLSign", ""), "may not sign");
    refused(&FITS.replace("spiffe://house.example", "spiffe://other.example"), "another trust domain");
    refused(&FITS.replace("subjectKeyIdentifier=hash", "subjectKeyIdentifier=none"), "SubjectKeyIdentifier");
    // What verifiers would refuse the agents' certificates for, all of them or some.
    refused(&format!("{FITS}nameConstraints=critical,permitted;DNS:house.example\n"), "NameConstraints");
    refused(&format!("{FITS}extendedKeyUsage=serverAuth\n"), "ExtendedKeyUsage");
    refused(&format!("{FITS}1.2.3.4=critical,ASN1:NULL\n"), "critical extension");
    let twice = "/DC=example/DC=house/O=keyward/CN=issuing";
    init(&root.certificate(), &root.sign_named(&csr, FITS, twice)).exits(1).says("subject");
    init(&other.certificate(), &root.sign(&csr, FITS)).exits(1).says("not signed by the root");
    // Somebody else's key.
    other.openssl("req -new -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout x.key -out x.csr -subj /CN=x");
    let foreign = other.0.join("x.csr").display().to_string();
    init(&root.certificate(), &root.sign(&foreign, FITS)).exits(1).says("not for the key");
    init(&root.certificate(), &csr).exits(1).says("is no PEM certificate");
    init(&root.certificate(), &root.sign(&csr, FITS)).ok();
    house.serve();
    house.attested("builder/1");
    house.stop_and_verify();
}

/// Power is cut at each sync of the last step in turn; the same call again completes it.
#[test]
fn taking_the_outside_root_is_resumed_after_a_power_cut_at_any_sync() {
    for sync in (1..).step_by(if instruments::slow() { 1 } else { 4 }) {
        let (house, csr) = awaiting_root();
        let mut house = house.with_preload();
        let root = OutsideRoot::new(&house, "root");
        let (anchor, issuing) = (root.certificate(), root.sign(&csr, FITS));
        let arguments = ["--root-certificate", &anchor, "--issuing-certificate", &issuing];
        house.control().kill_after_sync(sync);
        let first = house.init_preloaded(&arguments);
        house.control().clear();
        if first.code == 0 {
            assert!(sync > 4, "it syncs more often than that");
            return;
        }
        assert_eq!(first.code, -1, "{first:?}");
        house.after_power_cut();
        let arguments = [&["init"], &arguments[..]].concat();
        let mut again = house.keyward(&arguments);
        if again.stderr.contains("keyward hsm unlock") {
            house.keyward(&["hsm", "unlock"]).ok();
            again = house.keyward(&arguments);
        }
        assert!(again.code == 0 || again.stderr.contains("initialised already"), "{again:?}");
        house.serve();
        house.attested("builder/1");
        house.stop_and_verify();
    }
}

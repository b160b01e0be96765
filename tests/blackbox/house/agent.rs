//! An agent as its owner sees it: a name, a join file, a directory with credentials.

use std::fs;
use std::path::PathBuf;
use std::time::Instant;

use super::{DEADLINE, House, Output};

/// An agent of a house.
pub struct Agent<'a> {
    house: &'a House,
    pub name: String,
}

impl<'a> Agent<'a> {
    pub(super) fn of(house: &'a House, name: &str) -> Self {
        Self { house, name: name.to_owned() }
    }

    fn base(&self) -> PathBuf {
        self.house.path("agents").join(self.name.replace('/', "-"))
    }

    pub fn join_file(&self) -> PathBuf {
        self.base().with_extension("join")
    }

    /// Where its credentials are.
    pub fn dir(&self) -> PathBuf {
        self.base()
    }

    pub fn svid(&self) -> PathBuf {
        self.dir().join("svid.pem")
    }

    pub fn key(&self) -> PathBuf {
        self.dir().join("key.pem")
    }

    pub fn bundle(&self) -> PathBuf {
        self.dir().join("bundle.pem")
    }

    /// An operator enrols it.
    pub fn enrol(&self, more: &[&str]) -> Output {
        let out = self.join_file();
        let _ = fs::remove_file(&out);
        self.house.keyward(&[&["agents", "enrol", &self.name, "--out", out.to_str().unwrap()], more].concat())
    }

    /// It attests with its join file.
    pub fn attest(&self, more: &[&str]) -> Output {
        let (join, dir) = (self.join_file(), self.dir());
        self.house
            .keyward(&[&["agent", "attest", "--join", join.to_str().unwrap(), "--out", dir.to_str().unwrap()], more].concat())
    }

    /// It renews.
    pub fn renew(&self) -> Output {
        self.house.keyward(&["agent", "renew", "--out", self.dir().to_str().unwrap()])
    }

    /// An operator takes everything from it.
    pub fn quarantine(&self) -> Output {
        self.house.quarantine(&self.name)
    }

    /// An operator lets it join anew.
    pub fn release(&self) -> Output {
        let out = self.join_file();
        let _ = fs::remove_file(&out);
        let arguments =
            ["quarantine", "release", &self.name, "--reason", "looked into it", "--out", out.to_str().unwrap(), "--yes"];
        self.house.keyward(&arguments)
    }

    /// What the operator sees of it.
    pub fn shown(&self) -> serde_json::Value {
        self.house.keyward(&["agents", "show", &self.name, "--format", "json"]).ok().json()
    }

    /// What the operator sees of it once `is_so`: an agent has its answer before the book has its outcome.
    #[track_caller]
    pub fn shown_once(&self, is_so: impl Fn(&serde_json::Value) -> bool) -> serde_json::Value {
        let until = Instant::now() + DEADLINE;
        loop {
            let shown = self.shown();
            if is_so(&shown) {
                return shown;
            }
            assert!(Instant::now() < until, "{shown}");
        }
    }

    /// Its chain, leaf first, DER.
    pub fn chain(&self) -> Vec<Vec<u8>> {
        certificates(&self.svid())
    }

    /// Its newest certificate, DER.
    pub fn certificate(&self) -> Vec<u8> {
        self.chain().swap_remove(0)
    }

    /// The serial number of its newest certificate.
    pub fn serial(&self) -> Vec<u8> {
        let der = self.certificate();
        x509_parser::parse_x509_certificate(&der).unwrap().1.raw_serial().to_vec()
    }

    /// Keeps a copy of its credentials under another name, as a thief would.
    pub fn copied_as(&self, name: &str) -> Agent<'a> {
        let copy = Agent::of(self.house, name);
        let done = std::process::Command::new("cp").arg("-a").arg(self.dir()).arg(copy.dir()).status().unwrap();
        assert!(done.success());
        copy
    }
}

/// The certificates of a PEM file, DER.
pub fn certificates(path: &std::path::Path) -> Vec<Vec<u8>> {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    let parsed = pem::parse_many(text).unwrap();
    parsed.into_iter().filter(|block| block.tag() == "CERTIFICATE").map(pem::Pem::into_contents).collect()
}

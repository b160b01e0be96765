//! SoftHSM tokens: made once per run of the tests, copied for each house.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

/// The user PIN of every test token.
pub const PIN: &str = "house-pin-1234";

/// SoftHSM's module, where distributions put it.
pub fn module() -> PathBuf {
    let places = ["/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/pkcs11/libsofthsm2.so", "/usr/lib/pkcs11/libsofthsm2.so"];
    places.iter().map(PathBuf::from).find(|path| path.exists()).expect("install softhsm2 (scripts/test does)")
}

/// A token's section of the configuration.
pub fn section(module: &Path, label: &str, pin_file: &Path) -> String {
    format!("module = {module:?}\ntoken = {label:?}\npin_file = {pin_file:?}\nlanes = 2\n")
}

/// Puts tokens `authority` and `agents` in `tokens`, and a SoftHSM configuration that names it.
pub fn furnish(tokens: &Path, conf: &Path) {
    // Kept until the process ends; initialising a token takes longer than most tests.
    static MASTER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let master = MASTER.get_or_init(|| {
        let dir = tempfile::Builder::new().prefix("kw-tokens-").tempdir().unwrap();
        let (tokens, conf) = (dir.path().join("tokens"), dir.path().join("softhsm2.conf"));
        fs::create_dir(&tokens).unwrap();
        write_conf(&tokens, &conf);
        for label in ["authority", "agents"] {
            initialise(&conf, label);
        }
        dir
    });
    copy(&master.path().join("tokens"), tokens);
    write_conf(tokens, conf);
}

fn write_conf(tokens: &Path, conf: &Path) {
    let text = format!("directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n", tokens.display());
    fs::write(conf, text).unwrap();
}

fn initialise(conf: &Path, label: &str) {
    let done = Command::new("softhsm2-util")
        .env("SOFTHSM2_CONF", conf)
        // The tool takes PINs in argv only: good enough for a token that exists for a test.
        .args(["--init-token", "--free", "--label", label, "--so-pin", "house-so-pin", "--pin", PIN])
        .stdout(Stdio::null())
        .status()
        .expect("install softhsm2 (scripts/test does)");
    assert!(done.success(), "softhsm2-util: {done}");
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target);
        } else {
            fs::copy(&path, &target).unwrap();
        }
    }
}

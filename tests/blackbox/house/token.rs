//! The tokens of the PKCS#11 module under test, which `HSM_UNDER_TEST` names: softhsm (also without it) or kryoptic.
//!
//! Owns: where the module is, how it is told where its tokens are, and what a token is made of. Promises: tokens are made once
//! per run of the tests, through PKCS#11 alone, and copied for each house; nothing else in the tests knows which module it is.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::session::UserType;
use cryptoki::types::AuthPin;

/// The user PIN of every test token.
pub const PIN: &str = "house-pin-1234";
/// The tokens of every house.
const LABELS: [&str; 2] = ["authority", "agents"];
/// Set for the process that makes the tokens.
const MAKER: &str = "KEYWARD_TEST_TOKEN_MODULE";

#[derive(Clone, Copy)]
enum Kind {
    SoftHsm,
    Kryoptic,
}

fn kind() -> Kind {
    match std::env::var("HSM_UNDER_TEST").as_deref() {
        Err(_) | Ok("softhsm") => Kind::SoftHsm,
        Ok("kryoptic") => Kind::Kryoptic,
        Ok(other) => panic!("HSM_UNDER_TEST is softhsm or kryoptic, not {other:?}"),
    }
}

/// Whether the module under test wraps keys.
pub fn wraps() -> bool {
    matches!(kind(), Kind::SoftHsm)
}

/// The module under test.
pub fn module() -> PathBuf {
    match kind() {
        // Where distributions put it.
        Kind::SoftHsm => {
            let places =
                ["/usr/lib/softhsm/libsofthsm2.so", "/usr/lib64/pkcs11/libsofthsm2.so", "/usr/lib/pkcs11/libsofthsm2.so"];
            places.iter().map(PathBuf::from).find(|path| path.exists()).expect("install softhsm2 (scripts/test does)")
        }
        Kind::Kryoptic => {
            let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("target/kryoptic/libkryoptic_pkcs11.so");
            assert!(built.exists(), "{} is missing: `HSM_UNDER_TEST=kryoptic scripts/test` builds it", built.display());
            built
        }
    }
}

/// What tells the module where the tokens of this directory are.
pub fn environment(dir: &Path) -> (&'static str, PathBuf) {
    match kind() {
        Kind::SoftHsm => ("SOFTHSM2_CONF", dir.join("softhsm2.conf")),
        Kind::Kryoptic => ("KRYOPTIC_CONF", dir.join("kryoptic.toml")),
    }
}

/// A token's section of the configuration.
pub fn section(module: &Path, label: &str, pin_file: &Path) -> String {
    format!("module = {module:?}\ntoken = {label:?}\npin_file = {pin_file:?}\nlanes = 2\n")
}

/// Puts tokens `authority` and `agents` into `dir`, and what [`environment`] speaks of.
pub fn furnish(dir: &Path) {
    // Kept until the process ends; making a token takes longer than most tests.
    static MASTER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let master = MASTER.get_or_init(|| {
        let master = tempfile::Builder::new().prefix("kw-tokens-").tempdir().unwrap();
        fs::create_dir(tokens(master.path())).unwrap();
        make(master.path());
        master
    });
    copy(&tokens(master.path()), &tokens(dir));
    write_conf(dir);
}

/// Makes the tokens where there are none, in a process of its own: a module takes its configuration from the environment.
pub fn make(dir: &Path) {
    write_conf(dir);
    let (variable, conf) = environment(dir);
    let (_, place) = module_path!().split_once("::").expect("a module of the test binary");
    let maker = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", &format!("{place}::maker"), "--ignored", "--nocapture"])
        .env(variable, conf)
        .env(MAKER, module())
        .output()
        .unwrap();
    // A name that fits no test is a success of no test.
    let made = maker.status.success() && String::from_utf8_lossy(&maker.stdout).contains("1 passed");
    assert!(made, "no tokens could be made in {}: {}", dir.display(), String::from_utf8_lossy(&maker.stderr));
}

#[test]
#[ignore = "what makes the tokens of the others"]
fn maker() {
    let Some(module) = std::env::var_os(MAKER) else { return };
    let module = Pkcs11::new(module).unwrap();
    let so_pin = AuthPin::new("house-so-pin".into());
    for label in LABELS {
        // Afresh for each: SoftHSM shows the next empty slot only then.
        module.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)).unwrap();
        let empty = |slot: &cryptoki::slot::Slot| !module.get_token_info(*slot).unwrap().token_initialized();
        let slot = module.get_slots_with_token().unwrap().into_iter().find(empty).expect("an empty slot");
        module.init_token(slot, &so_pin, label).unwrap();
        let session = module.open_rw_session(slot).unwrap();
        session.login(UserType::So, Some(&so_pin)).unwrap();
        session.init_pin(&AuthPin::new(PIN.into())).unwrap();
        drop(session);
        module.clone().finalize().unwrap();
    }
}

/// The tokens are gone, as far as the module can see.
pub fn take_away(dir: &Path) {
    let (here, away) = (tokens(dir), away(dir));
    match kind() {
        Kind::SoftHsm => {
            fs::rename(&here, away).unwrap();
            fs::create_dir(here).unwrap();
        }
        // It keeps its files open, wherever they are moved: an empty file is a token that was never initialised.
        Kind::Kryoptic => {
            copy(&here, &away);
            for file in fs::read_dir(here).unwrap() {
                fs::File::create(file.unwrap().path()).unwrap();
            }
        }
    }
}

/// The tokens stay where they are; [`bring_back`] makes them what they are now.
pub fn keep(dir: &Path) {
    copy(&tokens(dir), &away(dir));
}

/// One of the tokens is gone; [`bring_back`] undoes it.
pub fn take_one_away(dir: &Path, label: &str) {
    keep(dir);
    match kind() {
        Kind::SoftHsm => {
            let labelled = |place: &PathBuf| {
                let object = fs::read(place.join("token.object")).unwrap();
                object.windows(label.len()).any(|window| window == label.as_bytes())
            };
            let places = fs::read_dir(tokens(dir)).unwrap().map(|entry| entry.unwrap().path());
            fs::remove_dir_all(places.into_iter().find(labelled).expect("its directory")).unwrap();
        }
        Kind::Kryoptic => drop(fs::File::create(tokens(dir).join(format!("{label}.sql"))).unwrap()),
    }
}

/// Kryoptic keeps its files open.
pub fn kept_open() -> bool {
    matches!(kind(), Kind::Kryoptic)
}

/// The tokens that were taken away are there again.
pub fn bring_back(dir: &Path) {
    let (here, away) = (tokens(dir), away(dir));
    match kind() {
        Kind::SoftHsm => {
            // Not removed in place: who uses it writes to it.
            let gone = dir.join("tokens.gone");
            let _ = fs::remove_dir_all(&gone);
            fs::rename(&here, gone).unwrap();
            fs::rename(away, here).unwrap();
        }
        Kind::Kryoptic => {
            for file in fs::read_dir(&away).unwrap() {
                let file = file.unwrap();
                fs::copy(file.path(), here.join(file.file_name())).unwrap();
            }
            fs::remove_dir_all(away).unwrap();
        }
    }
}

fn tokens(dir: &Path) -> PathBuf {
    dir.join("tokens")
}

fn away(dir: &Path) -> PathBuf {
    dir.join("tokens.away")
}

fn write_conf(dir: &Path) {
    let tokens = tokens(dir);
    let text = match kind() {
        Kind::SoftHsm => {
            format!("directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\n", tokens.display())
        }
        Kind::Kryoptic => {
            let slot = |(number, label)| {
                format!("[[slots]]\nslot = {number}\ndbtype = \"sqlite\"\ndbargs = {:?}\n", tokens.join(format!("{label}.sql")))
            };
            (1..).zip(LABELS).map(slot).collect()
        }
    };
    fs::write(environment(dir).1, text).unwrap();
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

//! The instruments are tested before they judge: each test runs this binary again, as a subject under the instrument.

use std::fs::{self, File};
use std::io::{BufRead as _, BufReader, ErrorKind, Write as _};
use std::os::unix::fs::FileExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, AttributeType, ObjectClass};
use cryptoki::session::UserType;
use cryptoki::types::AuthPin;

use crate::house::{Control, House, Output, PIN, instrument, run};

/// A state directory of its own and what the library is told about it.
struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let bench = Self { dir: tempfile::tempdir().unwrap() };
        fs::create_dir(bench.state()).unwrap();
        bench
    }

    fn state(&self) -> PathBuf {
        fs::canonicalize(self.dir.path()).unwrap().join("state")
    }

    fn shadow(&self) -> PathBuf {
        self.dir.path().join("shadow")
    }

    fn control(&self) -> Control {
        Control::of(&self.dir.path().join("control"))
    }

    fn cut_power(&self) {
        instrument::power_cut(&self.state(), &self.shadow());
    }

    fn subject(&self, what: &str) -> Command {
        instrument::seed(&self.state(), &self.shadow());
        let mut command = again(what);
        command.env("SUBJECT_STATE", self.state());
        instrument::preload(&mut command, &self.state(), &self.shadow(), &self.dir.path().join("control"));
        command
    }

    fn run(&self, what: &str) -> Output {
        run(&mut self.subject(what))
    }
}

fn again(what: &str) -> Command {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "instruments::subject", "--ignored", "--nocapture"]).env("SUBJECT", what).stdin(Stdio::null());
    command
}

#[test]
#[ignore = "what the tests below run under an instrument"]
fn subject() {
    let Ok(what) = std::env::var("SUBJECT") else { return };
    let state = PathBuf::from(std::env::var_os("SUBJECT_STATE").unwrap_or_default());
    match what.as_str() {
        "files" => write_files(&state),
        "rows" => write_rows(&state),
        "failing sync" => sync_twice(&state),
        "full disk" => fill(&state),
        "clock" => say(&SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs().to_string()),
        "sign" => sign(),
        "private keys" => tell_private_keys(),
        "destroy a key" => destroy_key(),
        "make a twin" => make_twin(),
        "sign with a key" => sign_with_key(),
        "another token" => make_another_token(),
        _ => panic!("what is {what}?"),
    }
}

/// One line to standard output, past the test harness.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "\n> {line}").unwrap();
    out.flush().unwrap();
}

/// What the subject said.
fn said(output: &Output) -> Vec<&str> {
    output.stdout.lines().filter_map(|line| line.strip_prefix("> ")).collect()
}

fn sync_folder(path: &Path) {
    File::open(path).unwrap().sync_all().unwrap();
}

fn write_files(state: &Path) {
    let durable = File::create(state.join("durable")).unwrap();
    (&durable).write_all(b"0123456789").unwrap();
    durable.sync_all().unwrap();
    fs::create_dir(state.join("folder")).unwrap();
    let inner = File::create(state.join("folder/inner")).unwrap();
    (&inner).write_all(b"inner").unwrap();
    inner.sync_data().unwrap();
    sync_folder(&state.join("folder"));
    File::create(state.join("no-bytes")).unwrap().write_all(b"never synced").unwrap();
    fs::write(state.join("old-name"), b"renamed").unwrap();
    File::open(state.join("old-name")).unwrap().sync_all().unwrap();
    sync_folder(state);
    // From here on nothing is synced as a whole.
    durable.write_all_at(b"XX", 2).unwrap();
    durable.sync_data().unwrap();
    durable.write_all_at(b"YY", 4).unwrap();
    durable.set_len(8).unwrap();
    fs::rename(state.join("old-name"), state.join("new-name")).unwrap();
    let unnamed = File::create(state.join("unnamed")).unwrap();
    (&unnamed).write_all(b"synced, but its name is not").unwrap();
    unnamed.sync_all().unwrap();
}

#[test]
fn a_power_cut_leaves_what_was_synced_and_nothing_else() {
    let bench = Bench::new();
    bench.run("files").ok();
    assert_eq!(fs::read(bench.state().join("durable")).unwrap(), b"01XXYY67", "before the cut all is there");
    bench.cut_power();
    let read = |name: &str| fs::read(bench.state().join(name)).unwrap();
    assert_eq!(read("durable"), b"01XX456789", "bytes of the last sync");
    assert_eq!(read("folder/inner"), b"inner");
    assert_eq!(read("no-bytes"), b"", "its name was synced, its bytes were not");
    assert_eq!(read("old-name"), b"renamed", "the rename was not synced");
    assert!(!bench.state().join("new-name").exists());
    assert!(!bench.state().join("unnamed").exists(), "its directory was not synced after it appeared");
    // What is there when the next life starts counts as durable.
    bench.run("clock").ok();
    bench.cut_power();
    assert_eq!(read("durable"), b"01XX456789");
}

fn open_rows(state: &Path) -> rusqlite::Connection {
    let db = rusqlite::Connection::open(state.join("rows.db")).unwrap();
    db.pragma_update(None, "journal_mode", "wal").unwrap();
    db.pragma_update(None, "synchronous", "full").unwrap();
    db.execute_batch("CREATE TABLE IF NOT EXISTS row (n INTEGER PRIMARY KEY, body BLOB) STRICT").unwrap();
    db
}

fn write_rows(state: &Path) {
    let db = open_rows(state);
    let first: i64 = db.query_row("SELECT coalesce(max(n), 0) FROM row", [], |row| row.get(0)).unwrap();
    for n in first + 1.. {
        db.execute("INSERT INTO row VALUES (?1, ?2)", (n, vec![7_u8; 2000])).unwrap();
        say(&n.to_string());
    }
}

fn rows_after_cut(bench: &Bench) -> i64 {
    let db = open_rows(&bench.state());
    let sound: String = db.query_row("PRAGMA integrity_check", [], |row| row.get(0)).unwrap();
    assert_eq!(sound, "ok");
    db.query_row("SELECT count(*) FROM row", [], |row| row.get(0)).unwrap()
}

#[test]
fn sqlite_keeps_every_acknowledged_row_through_power_cuts_at_any_moment() {
    let bench = Bench::new();
    for rows in [1, 3, 700] {
        let mut child = bench.subject("rows").stdout(Stdio::piped()).spawn().unwrap();
        let mut last = 0;
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        for n in lines.map_while(Result::ok).filter_map(|line| line.strip_prefix("> ")?.parse::<i64>().ok()).take(rows) {
            last = n;
        }
        child.kill().unwrap();
        child.wait().unwrap();
        bench.cut_power();
        assert!(rows_after_cut(&bench) >= last, "row {last} was acknowledged");
    }
}

#[test]
fn sqlite_keeps_every_acknowledged_row_when_the_power_fails_at_each_sync() {
    let bench = Bench::new();
    for sync in 1..=12 {
        if sync % 2 == 0 {
            bench.control().kill_before_sync(sync);
        } else {
            bench.control().kill_after_sync(sync);
        }
        let output = bench.run("rows").exits(-1);
        let last: i64 = said(&output).last().map_or(0, |n| n.parse().unwrap());
        bench.cut_power();
        assert!(rows_after_cut(&bench) >= last, "row {last} was acknowledged before sync {sync}");
    }
}

fn sync_twice(state: &Path) {
    let file = File::create(state.join("file")).unwrap();
    sync_folder(state);
    (&file).write_all(b"kept").unwrap();
    file.sync_all().unwrap();
    fs::write(state.join("../control"), "fsync=EIO\n").unwrap();
    (&file).write_all(b" lost").unwrap();
    let error = file.sync_all().unwrap_err();
    say(&format!("{error}"));
    file.sync_all().unwrap();
}

#[test]
fn after_a_failed_sync_the_next_one_succeeds_without_the_lost_bytes() {
    let bench = Bench::new();
    let output = bench.run("failing sync").ok();
    assert!(said(&output)[0].contains("os error 5"), "EIO, not {:?}", said(&output));
    bench.cut_power();
    // The length was told to the file system, the bytes never reached the disk.
    assert_eq!(fs::read(bench.state().join("file")).unwrap(), b"kept\0\0\0\0\0");
}

fn fill(state: &Path) {
    fs::write(state.join("reserve"), vec![1; 100_000]).unwrap();
    let file = File::create(state.join("file")).unwrap();
    file.write_all_at(&[1; 5000], 0).unwrap();
    fs::write(state.join("../control"), "write=ENOSPC\n").unwrap();
    file.write_all_at(&[2; 5000], 0).unwrap();
    assert_eq!(file.write_all_at(&[2], 5000).unwrap_err().kind(), ErrorKind::StorageFull);
    fs::write(state.join("../elsewhere"), b"fits").unwrap();
    fs::remove_file(state.join("reserve")).unwrap();
    file.write_all_at(&[3; 90_000], 5000).unwrap();
    assert_eq!(file.write_all_at(&[2; 50_000], 95_000).unwrap_err().kind(), ErrorKind::StorageFull);
    say("full");
}

#[test]
fn a_full_disk_takes_what_does_not_grow_and_what_was_given_up() {
    let bench = Bench::new();
    assert_eq!(said(&bench.run("full disk").ok()), ["full"]);
}

#[test]
fn the_wall_clock_can_be_moved_both_ways() {
    let bench = Bench::new();
    for hours in [0, 30, -30] {
        bench.control().move_clock(hours * 3_600_000);
        let told: i64 = said(&bench.run("clock").ok())[0].parse().unwrap();
        let here = i64::try_from(SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO).as_secs()).unwrap();
        assert!((told - here - hours * 3600).abs() < 20, "{told} is not {hours} hours from {here}");
    }
}

/// Uses the module of SUBJECT_MODULE: one wrong login, one right one, three signatures.
fn sign() {
    let module = Pkcs11::new(std::env::var_os("SUBJECT_MODULE").unwrap()).unwrap();
    module.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)).unwrap();
    let slot = module.get_slots_with_initialized_token().unwrap()[0];
    let session = module.open_rw_session(slot).unwrap();
    assert!(session.login(UserType::User, Some(&AuthPin::new("wrong".into()))).is_err());
    session.login(UserType::User, Some(&AuthPin::new(PIN.into()))).unwrap();
    let curve = Attribute::EcParams(vec![0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07]);
    let public = [curve, Attribute::Token(false), Attribute::Verify(true)];
    let key = |id: u8| {
        let private = [Attribute::Token(false), Attribute::Sign(true), Attribute::Id(vec![id; 16])];
        session.generate_key_pair(&Mechanism::EccKeyPairGen, &public, &private).unwrap().1
    };
    let (one, two) = (key(1), key(2));
    for (key, digest) in [(one, [0xaa; 32]), (two, [0xbb; 32]), (one, [0xaa; 32])] {
        session.sign(&Mechanism::Ecdsa, key, &digest).unwrap();
    }
    // A crash: nothing is closed.
    std::process::abort();
}

#[test]
fn the_shim_counts_each_signature_once_with_its_key_and_each_login() {
    let house = House::new();
    let mut command = again("sign");
    run(house.lend_tokens(&mut command).env("SUBJECT_MODULE", instrument::shim())).exits(-1);
    let signatures = house.signatures();
    assert_eq!(signatures.logins, 2);
    assert_eq!(signatures.count(), 3);
    assert_eq!(signatures.made[&("01".repeat(16), "aa".repeat(32))], 2);
    assert_eq!(signatures.made[&("02".repeat(16), "bb".repeat(32))], 1);
    assert_eq!(signatures.of_digest(&[0xbb; 32]), 1);
}

/// Whether the tests that take minutes are asked for (`scripts/test --slow`).
pub fn slow() -> bool {
    std::env::var_os("KEYWARD_SLOW").is_some()
}

/// A private key as the token describes it.
#[derive(Debug)]
pub struct PrivateKey {
    pub id: String,
    pub sensitive: bool,
    pub extractable: bool,
    pub never_extractable: bool,
    pub local: bool,
}

/// The private keys in a token of a house, read by another process than the daemon.
pub fn private_keys(house: &House, token: &str) -> Vec<PrivateKey> {
    let output = run(&mut beside(house, "private keys", token)).ok();
    let keys = said(&output).into_iter().map(|line| {
        let [id, flags] = line.split(' ').collect::<Vec<_>>()[..] else { panic!("{line:?}") };
        let is = |at: usize| flags.as_bytes()[at] == b'1';
        PrivateKey { id: id.to_owned(), sensitive: is(0), extractable: is(1), never_extractable: is(2), local: is(3) }
    });
    keys.collect()
}

/// Another process than the daemon that uses its token.
fn beside(house: &House, what: &str, token: &str) -> Command {
    let mut command = again(what);
    command.env("SUBJECT_MODULE", house.module()).env("SUBJECT_TOKEN", token).envs([house.module_environment()]);
    command
}

/// Another process destroys a key.
pub fn destroy(house: &House, token: &str, id: &[u8]) {
    let output = run(beside(house, "destroy a key", token).env("SUBJECT_KEY", hex(id))).ok();
    assert_eq!(said(&output), ["2 objects"]);
}

/// Another process destroys the private half of a key alone.
pub fn destroy_private(house: &House, token: &str, id: &[u8]) {
    let output = run(beside(house, "destroy a key", token).env("SUBJECT_KEY", hex(id)).env("SUBJECT_HALF", "private")).ok();
    assert_eq!(said(&output), ["1 objects"]);
}

/// Another process destroys a key that has no public half.
pub fn destroy_secret(house: &House, token: &str, id: &[u8]) {
    let output = run(beside(house, "destroy a key", token).env("SUBJECT_KEY", hex(id))).ok();
    assert_eq!(said(&output), ["1 objects"]);
}

/// Another process makes a key of its own under an id that is taken.
pub fn make_another_under(house: &House, token: &str, id: &[u8]) {
    run(beside(house, "make a twin", token).env("SUBJECT_KEY", hex(id))).ok();
}

/// Another process signs a digest with a key of the token, as who has stolen the key would: r and s, 32 bytes each.
pub fn sign_with(house: &House, token: &str, id: &[u8], digest: &[u8]) -> Vec<u8> {
    let mut command = beside(house, "sign with a key", token);
    let output = run(command.env("SUBJECT_KEY", hex(id)).env("SUBJECT_DIGEST", hex(digest))).ok();
    unhex(said(&output)[0])
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

pub fn unhex(text: &str) -> Vec<u8> {
    (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
}

/// Another process initialises the token anew: same label, and for each key another one with its CKA_ID.
pub fn make_another(house: &House, token: &str, pin: &str) {
    run(beside(house, "another token", token).env("SUBJECT_PIN", pin)).ok();
}

/// SUBJECT_TOKEN of SUBJECT_MODULE.
fn the_token() -> (Pkcs11, cryptoki::slot::Slot) {
    let module = Pkcs11::new(std::env::var_os("SUBJECT_MODULE").unwrap()).unwrap();
    module.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK)).unwrap();
    let label = std::env::var("SUBJECT_TOKEN").unwrap();
    let labelled = |slot: &cryptoki::slot::Slot| module.get_token_info(*slot).is_ok_and(|token| token.label() == label);
    let slot = module.get_slots_with_token().unwrap().into_iter().find(labelled).unwrap();
    (module, slot)
}

fn logged_in(module: &Pkcs11, slot: cryptoki::slot::Slot, pin: &str) -> cryptoki::session::Session {
    let session = module.open_rw_session(slot).unwrap();
    session.login(UserType::User, Some(&AuthPin::new(pin.into()))).unwrap();
    session
}

fn destroy_key() {
    let (module, slot) = the_token();
    let session = logged_in(&module, slot, "house-pin-1234");
    let id = Attribute::Id(unhex(&std::env::var("SUBJECT_KEY").unwrap()));
    let mut wanted = vec![id, Attribute::Token(true)];
    wanted.extend(std::env::var_os("SUBJECT_HALF").map(|_| Attribute::Class(ObjectClass::PRIVATE_KEY)));
    let objects = session.find_objects(&wanted).unwrap();
    objects.iter().for_each(|object| session.destroy_object(*object).unwrap());
    say(&format!("{} objects", objects.len()));
}

fn make_twin() {
    let (module, slot) = the_token();
    make_p256(&logged_in(&module, slot, PIN), unhex(&std::env::var("SUBJECT_KEY").unwrap()));
}

fn make_p256(session: &cryptoki::session::Session, id: Vec<u8>) {
    let curve = Attribute::EcParams(vec![0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07]);
    let public = [curve, Attribute::Token(true), Attribute::Verify(true), Attribute::Id(id.clone())];
    let private = [Attribute::Token(true), Attribute::Sign(true), Attribute::Id(id)];
    session.generate_key_pair(&Mechanism::EccKeyPairGen, &public, &private).unwrap();
}

fn sign_with_key() {
    let (module, slot) = the_token();
    let session = logged_in(&module, slot, PIN);
    let id = Attribute::Id(unhex(&std::env::var("SUBJECT_KEY").unwrap()));
    let keys = session.find_objects(&[id, Attribute::Class(ObjectClass::PRIVATE_KEY), Attribute::Token(true)]).unwrap();
    let digest = unhex(&std::env::var("SUBJECT_DIGEST").unwrap());
    say(&hex(&session.sign(&Mechanism::Ecdsa, keys[0], &digest).unwrap()));
}

fn make_another_token() {
    let (module, slot) = the_token();
    let ids: Vec<Vec<u8>> = {
        let session = logged_in(&module, slot, "house-pin-1234");
        let keys = session.find_objects(&[Attribute::Class(ObjectClass::PRIVATE_KEY), Attribute::Token(true)]).unwrap();
        let id = |key: &_| match session.get_attributes(*key, &[AttributeType::Id]).unwrap().pop() {
            Some(Attribute::Id(id)) => id,
            other => panic!("CKA_ID is {other:?}"),
        };
        keys.iter().map(id).collect()
    };
    let (so_pin, pin) = (AuthPin::new("house-so-pin".into()), std::env::var("SUBJECT_PIN").unwrap());
    module.init_token(slot, &so_pin, &std::env::var("SUBJECT_TOKEN").unwrap()).unwrap();
    {
        let session = module.open_rw_session(slot).unwrap();
        session.login(UserType::So, Some(&so_pin)).unwrap();
        session.init_pin(&AuthPin::new(pin.clone().into())).unwrap();
    }
    let session = logged_in(&module, slot, &pin);
    for id in ids {
        make_p256(&session, id);
    }
}

fn tell_private_keys() {
    let (module, slot) = the_token();
    let session = module.open_ro_session(slot).unwrap();
    session.login(UserType::User, Some(&AuthPin::new(PIN.into()))).unwrap();
    let wanted = [Attribute::Class(ObjectClass::PRIVATE_KEY), Attribute::Token(true)];
    for key in session.find_objects(&wanted).unwrap() {
        let flag = |kind: AttributeType| match session.get_attributes(key, &[kind]).unwrap()[..] {
            [Attribute::Sensitive(is) | Attribute::Extractable(is) | Attribute::NeverExtractable(is) | Attribute::Local(is)] => {
                u8::from(is)
            }
            ref other => panic!("{kind:?} is {other:?}"),
        };
        let id = match &session.get_attributes(key, &[AttributeType::Id]).unwrap()[..] {
            [Attribute::Id(id)] => id.iter().map(|byte| format!("{byte:02x}")).collect::<String>(),
            other => panic!("CKA_ID is {other:?}"),
        };
        let flags = [AttributeType::Sensitive, AttributeType::Extractable, AttributeType::NeverExtractable, AttributeType::Local];
        say(&format!("{id} {}", flags.map(|kind| flag(kind).to_string()).concat()));
    }
}

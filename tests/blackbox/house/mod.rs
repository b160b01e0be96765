//! A house of its own for each test: two tokens of the module under test, a configuration, a daemon, agents.
//!
//! Owns: everything below one temporary directory, and the processes it started. Promises: houses do not meet (own tokens,
//! own loopback address), so tests run in parallel; whatever it waits for is an event with a deadline. Never: sleeps, reads
//! the daemon's insides.

mod agent;
mod daemon;
pub mod instrument;
pub mod keys;
mod output;
mod remote;
mod shim;
mod token;
pub mod wire;

use std::fs;
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

pub use agent::{Agent, certificates};
pub use daemon::Daemon;
pub use instrument::{Control, Signatures};
pub use keyward::proto::entry::Body;
pub use output::{Output, run};
pub use remote::Remote;
pub use shim::Shim;
pub use token::PIN;

/// Longest wait for anything that should take a second, on a busy machine.
pub const DEADLINE: Duration = Duration::from_secs(30);
/// The trust domain of every house.
pub const DOMAIN: &str = "house.example";
/// The port of every house; its address differs.
const PORT: u16 = 8443;

/// A private keyward.
pub struct House {
    dir: tempfile::TempDir,
    address: SocketAddr,
    /// TOML lines by section, beyond what every house has.
    settings: Vec<(&'static str, String)>,
    one_token: bool,
    shim: bool,
    remote: bool,
    preload: bool,
    daemon: Option<Daemon>,
}

impl House {
    /// Tokens and a configuration; nothing initialised, nothing running.
    pub fn new() -> Self {
        let dir = tempfile::Builder::new().prefix("kw-").tempdir().unwrap();
        let house = Self {
            dir,
            address: own_address(),
            settings: Vec::new(),
            one_token: false,
            shim: false,
            remote: false,
            preload: false,
            daemon: None,
        };
        token::furnish(house.dir.path());
        house.return_pins();
        fs::create_dir(house.path("agents")).unwrap();
        house.write_config();
        house
    }

    /// A house whose daemon serves.
    pub fn serving() -> Self {
        Self::new().initialised().served()
    }

    /// With a line in a section of the configuration, e.g. `("limits", "ttl_seconds_default = 20")`.
    pub fn configured(mut self, section: &'static str, line: &str) -> Self {
        self.settings.push((section, line.to_owned()));
        self.write_config();
        self
    }

    /// With one token for the authorities' keys and the agents'.
    pub fn with_one_token(mut self) -> Self {
        self.one_token = true;
        self.write_config();
        self
    }

    /// With the fault module before the token: it counts, and fails as it is told.
    pub fn with_shim(mut self) -> Self {
        self.shim = true;
        self.write_config();
        self
    }

    /// With the tokens in another process: the module is p11-kit's client, and [`Remote`] has to run.
    pub fn with_remote_tokens(mut self) -> Self {
        self.remote = true;
        self.write_config();
        self
    }

    /// With the preload library under the daemon. What is in the state directory by now counts as durable.
    pub fn with_preload(mut self) -> Self {
        self.preload = true;
        self
    }

    /// After `keyward init`.
    pub fn initialised(self) -> Self {
        self.keyward(&["init"]).ok();
        self
    }

    /// With a daemon that is ready.
    pub fn served(mut self) -> Self {
        self.serve();
        self
    }

    /// Starts a daemon and waits until it is ready.
    pub fn serve(&mut self) {
        self.start();
        let house = self.dir.path().display().to_string();
        assert!(self.daemon().is_ready(), "the daemon in {house} did not become ready");
    }

    /// Starts a daemon and waits until it says anything (ready, or why not) or ends.
    pub fn start(&mut self) {
        assert!(self.daemon.is_none(), "a daemon runs already");
        if self.preload {
            instrument::seed(&self.state(), &self.path("shadow"));
        }
        self.daemon = Some(Daemon::start(self));
    }

    pub fn daemon(&mut self) -> &mut Daemon {
        self.daemon.as_mut().expect("no daemon runs")
    }

    /// SIGTERM; its exit code.
    pub fn stop(&mut self) -> i32 {
        self.daemon.take().expect("no daemon runs").stop()
    }

    /// SIGKILL, as a crash would end it.
    pub fn kill9(&mut self) {
        self.daemon.take().expect("no daemon runs").kill9();
    }

    /// Waits for the daemon to end by itself; its exit code, `None` after a signal.
    pub fn ended(&mut self) -> Option<i32> {
        self.daemon.take().expect("no daemon runs").ended()
    }

    /// Stops and serves again.
    pub fn restart(&mut self) {
        assert_eq!(self.stop(), 0, "a stop asked for ends with 0");
        self.serve();
    }

    /// Cuts the power under the daemon: it dies, and of the state directory remains what was synced.
    pub fn power_cut(&mut self) {
        if self.daemon.is_some() {
            self.kill9();
        }
        self.after_power_cut();
    }

    /// The same where the daemon has killed itself at a sync (see [`Control`]).
    pub fn after_power_cut(&mut self) {
        instrument::power_cut(&self.state(), &self.path("shadow"));
        // The runtime directory is a tmpfs in the field.
        let _ = fs::remove_dir_all(self.runtime());
    }

    /// Power is cut, but what is on the tmpfs survives: for a daemon that ended by itself on a disk that lost bytes.
    pub fn power_cut_keeping_runtime(&mut self) {
        instrument::power_cut(&self.state(), &self.path("shadow"));
    }

    /// `keyward init` with the preload library under it.
    pub fn init_preloaded(&self, more: &[&str]) -> Output {
        fs::create_dir_all(self.state()).unwrap();
        instrument::seed(&self.state(), &self.path("shadow"));
        run(self.command_preloaded().arg("init").args(more))
    }

    /// The daemon's process id.
    pub fn daemon_pid(&self) -> u32 {
        self.daemon.as_ref().expect("no daemon runs").pid()
    }

    /// Sends the daemon a signal.
    pub fn daemon_signal(&self, signal: rustix::process::Signal) {
        self.daemon.as_ref().expect("no daemon runs").signal(signal);
    }

    /// What the preload library is told.
    pub fn control(&self) -> Control {
        Control::of(&self.path("control"))
    }

    /// What was signed, by the shim's count.
    pub fn signatures(&self) -> Signatures {
        Signatures::read(&self.path("shim.log"))
    }

    /// What the fault module of the running daemon is told.
    pub fn shim(&self) -> Shim {
        Shim::at(&self.path("shim.sock"))
    }

    /// What the fault module of each process started from now on is told when it is loaded; empty: nothing.
    pub fn shim_script(&self, commands: &str) {
        fs::write(self.path("shim.script"), commands).unwrap();
    }

    /// Runs the command with this house's configuration.
    pub fn keyward(&self, arguments: &[&str]) -> Output {
        run(self.command().args(arguments))
    }

    /// The same with something on standard input.
    pub fn keyward_given(&self, arguments: &[&str], input: &[u8]) -> Output {
        output::run_given(self.command().args(arguments), input)
    }

    /// Starts the command and does not wait; killed when the result is dropped.
    pub fn keyward_async(&self, arguments: &[&str]) -> Running {
        Running(self.command().args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap())
    }

    /// The command, with this house's configuration, tokens, and instruments.
    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_keyward"));
        self.lend_tokens(&mut command)
            .env("KEYWARD_CONFIG", self.config())
            .env_remove("NOTIFY_SOCKET")
            .env_remove("RUST_LOG")
            .stdin(Stdio::null())
            .current_dir(self.dir.path());
        command
    }

    /// With this house's tokens, and what the fault module before them needs.
    pub fn lend_tokens<'a>(&self, command: &'a mut Command) -> &'a mut Command {
        command
            .envs([self.module_environment()])
            .env("KEYWARD_SHIM_MODULE", if self.remote { remote::client() } else { token::module() })
            .env("P11_KIT_SERVER_ADDRESS", format!("unix:path={}", self.path("p11-kit.sock").display()))
            .env("KEYWARD_SHIM_LOG", self.path("shim.log"))
            .env("KEYWARD_SHIM_SOCKET", self.path("shim.sock"))
            .env("KEYWARD_SHIM_SCRIPT", self.path("shim.script"))
    }

    /// The command with the preload library under it.
    pub fn command_preloaded(&self) -> Command {
        let mut command = self.command();
        if self.preload {
            instrument::preload(&mut command, &self.state(), &self.path("shadow"), &self.path("control"));
        }
        command
    }

    /// An agent's name and its directory; nothing is enrolled yet.
    pub fn agent<'a>(&'a self, name: &str) -> Agent<'a> {
        Agent::of(self, name)
    }

    /// An agent that is enrolled and has attested.
    pub fn attested<'a>(&'a self, name: &str) -> Agent<'a> {
        let agent = self.agent(name);
        agent.enrol(&[]).ok();
        agent.attest(&[]).ok();
        agent
    }

    /// What each entry of the ledger tells, in order, read over the operator socket.
    pub fn entries(&self) -> Vec<Body> {
        self.wire().entries().into_iter().map(|entry| entry.body.expect("an entry tells something")).collect()
    }

    /// Stops the daemon and reads its whole book from the file: nothing is being worked on any more.
    pub fn stopped_entries(&mut self) -> Vec<Body> {
        assert_eq!(self.stop(), 0);
        self.ended_entries()
    }

    /// The whole book of a daemon that has ended, from the file.
    pub fn ended_entries(&self) -> Vec<Body> {
        use prost::Message as _;
        assert!(self.daemon.is_none(), "a daemon runs");
        let db = rusqlite::Connection::open(self.state().join("keyward.db")).unwrap();
        let mut rows = db.prepare("SELECT bytes FROM entry ORDER BY idx").unwrap();
        let entries = rows.query_map([], |row| row.get::<_, Vec<u8>>(0)).unwrap();
        entries.map(|bytes| keyward::proto::Entry::decode(bytes.unwrap().as_slice()).unwrap().body.unwrap()).collect()
    }

    /// Stops the daemon and holds the whole ledger against every promise, offline.
    pub fn stop_and_verify(&mut self) {
        assert_eq!(self.stop(), 0);
        self.verify().ok();
    }

    /// `keyward ledger verify`, with every signature.
    pub fn verify(&self) -> Output {
        let (file, key) = (self.state().join("keyward.db"), self.state().join("ledger.vkey"));
        self.keyward(&["ledger", "verify", file.to_str().unwrap(), "--key", key.to_str().unwrap(), "--signatures"])
    }

    /// Quarantines and waits for the acknowledgement.
    pub fn quarantine(&self, agent: &str) -> Output {
        self.keyward(&["quarantine", "apply", agent, "--reason", "the test says so", "--yes", "--format", "json"])
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    pub fn state(&self) -> PathBuf {
        self.path("state")
    }

    pub fn runtime(&self) -> PathBuf {
        self.path("run")
    }

    pub fn config(&self) -> PathBuf {
        self.path("keyward.toml")
    }

    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// The daemon's log so far, of all its lives.
    pub fn log(&self) -> String {
        fs::read_to_string(self.path("daemon.log")).unwrap_or_default()
    }

    /// Replaces the PIN of both tokens in the files, not in the tokens.
    pub fn misplace_pins(&self) {
        self.write_pins("not the PIN");
    }

    /// The same with a PIN of the test's.
    pub fn write_pins(&self, pin: &str) {
        write_private(&self.path("authority.pin"), pin);
        write_private(&self.path("agents.pin"), pin);
    }

    /// The real PKCS#11 module.
    pub fn module(&self) -> PathBuf {
        token::module()
    }

    /// What tells that module where this house's tokens are.
    pub fn module_environment(&self) -> (&'static str, PathBuf) {
        token::environment(self.dir.path())
    }

    /// The module loses both tokens.
    pub fn take_tokens_away(&self) {
        token::take_away(self.dir.path());
    }

    /// The same of one of them.
    pub fn take_token_away(&self, label: &str) {
        token::take_one_away(self.dir.path(), label);
    }

    /// Whatever becomes of both tokens, [`House::bring_tokens_back`] undoes it.
    pub fn keep_tokens(&self) {
        token::keep(self.dir.path());
    }

    /// The module has them again.
    pub fn bring_tokens_back(&self) {
        token::bring_back(self.dir.path());
    }

    /// Whether the module goes on with a token that is gone, until it is opened anew.
    pub fn tokens_are_kept_open(&self) -> bool {
        token::kept_open()
    }

    /// Puts the right PINs back.
    pub fn return_pins(&self) {
        self.write_pins(token::PIN);
    }

    fn write_config(&self) {
        let module = match () {
            () if self.shim => instrument::shim(),
            () if self.remote => remote::client(),
            () => token::module(),
        };
        let mut text = String::new();
        for (section, lines) in [
            ("trust", format!("domain = {DOMAIN:?}\n")),
            ("listen", format!("tcp = \"{}\"\n", self.address)),
            ("paths", format!("state = {:?}\nruntime = {:?}\n", self.state(), self.runtime())),
            ("hsm.authority", token::section(&module, "authority", &self.path("authority.pin"))),
            ("hsm.agents", token::section(&module, "agents", &self.path("agents.pin"))),
            ("operator", String::new()),
            ("limits", String::new()),
            ("rotation", String::new()),
            ("log", String::new()),
        ] {
            if self.one_token && section == "hsm.agents" {
                continue;
            }
            text += &format!("[{section}]\n{lines}");
            for (_, line) in self.settings.iter().filter(|(of, _)| *of == section) {
                text += &format!("{line}\n");
            }
        }
        fs::write(self.config(), text).unwrap();
    }
}

impl Drop for House {
    fn drop(&mut self) {
        drop(self.daemon.take());
        if std::thread::panicking() {
            eprintln!("--- the daemon's log ---\n{}", self.log());
        }
    }
}

/// A command in the background.
pub struct Running(std::process::Child);

impl Drop for Running {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// An address of the loopback network that no other house has: port 8443 is free there, before and after a restart.
fn own_address() -> SocketAddr {
    static HOUSES: AtomicU32 = AtomicU32::new(0);
    let house = HOUSES.fetch_add(1, Ordering::Relaxed);
    // 250 houses in a network of their own; the networks of processes that run at once differ.
    let [.., a, b] = (std::process::id().wrapping_add(house / 250 * 7919)).to_be_bytes();
    let c = u8::try_from(house % 250 + 1).unwrap();
    SocketAddr::from((Ipv4Addr::new(127, a.max(1), b, c), PORT))
}

/// Writes a file for its owner alone.
pub fn write_private(path: &Path, text: &str) {
    use std::io::Write as _;
    let _ = fs::remove_file(path);
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

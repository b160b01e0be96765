//! A throw-away daemon: fresh tokens, stock configuration, its own state; gone with the value.

use std::fmt::Write as _;
use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process};
use tokio::net::UnixDatagram;
use tokio::process::{Child, Command};
use tokio::time::timeout;
use tonic::transport::Channel;

use super::Failed;
use crate::client::operator;
use crate::config::Config;
use crate::model::{SecretBytes, hex};
use crate::proto::operator_service_client::OperatorServiceClient;

/// A start with 10,000 keys in a token takes seconds.
const START_DEADLINE: Duration = Duration::from_secs(120);
const STOP_DEADLINE: Duration = Duration::from_secs(30);
/// Where SoftHSM is on the usual systems.
const MODULES: [&str; 4] = [
    "/usr/lib/softhsm/libsofthsm2.so",
    "/usr/lib64/pkcs11/libsofthsm2.so",
    "/usr/lib/pkcs11/libsofthsm2.so",
    "/usr/local/lib/softhsm/libsofthsm2.so",
];

/// What a house is built from.
#[derive(Debug, Clone)]
pub(super) struct Site {
    /// Below it everything is made.
    pub work: PathBuf,
    /// Where filled tokens are kept.
    pub cache: PathBuf,
    /// The PKCS#11 module; must be SoftHSM.
    pub module: PathBuf,
}

impl Site {
    /// # Errors
    /// Without SoftHSM.
    pub(super) fn new(work: PathBuf, cache: PathBuf) -> Result<Self, Failed> {
        let module = MODULES.iter().map(Path::new).find(|path| path.exists());
        let module = module.ok_or("SoftHSM's module is nowhere; install the package softhsm2")?;
        Ok(Self { work, cache, module: module.to_path_buf() })
    }
}

/// In what a house differs from the stock one.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Wants<'a> {
    /// Key pairs in the authority token that nobody uses.
    pub keys_in_token: usize,
    /// The fault module, to stand before the real one.
    pub fault_module: Option<&'a Path>,
    /// Of the authority token.
    pub lanes: Option<usize>,
    /// Of an agent at once.
    pub live_certificates: Option<usize>,
    /// Lines of the section `limits`.
    pub limits: &'a [&'a str],
    /// The library that moves the wall clock, and the file by which it is told.
    pub clock: Option<(&'a Path, &'a Path)>,
}

/// One daemon's directory and configuration.
pub(super) struct House {
    dir: PathBuf,
    runtime: PathBuf,
    binary: PathBuf,
    pub module: PathBuf,
    /// Behind `module`, if that is the fault module.
    real: Option<PathBuf>,
    clock: Option<(PathBuf, PathBuf)>,
    pub config: Config,
}

impl Drop for House {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.dir);
        let _ = fs::remove_dir_all(&self.runtime);
    }
}

impl House {
    /// Tokens, configuration, `keyward init`.
    pub(super) async fn build(site: &Site, name: &str, binary: &Path, wants: Wants<'_>) -> Result<Self, Failed> {
        let unique = format!("{name}-{}", std::process::id());
        let dir = site.work.join(&unique);
        // The path of a socket has at most 107 bytes; the work directory may be deeper than that.
        let runtime = std::env::temp_dir().join(format!("keyward-bench-{unique}"));
        for made in [&dir, &runtime] {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(made)?;
        }
        let dir = dir.canonicalize()?;
        if wants.keys_in_token > 0 {
            copy(&filled(site, binary, wants.keys_in_token).await?, &dir)?;
        } else {
            empty_token_directory(&dir)?;
            add_token(&dir, "authority").await?;
        }
        write_softhsm_conf(&dir)?;
        add_token(&dir, "agents").await?;
        let module = wants.fault_module.map_or(Ok(site.module.clone()), Path::canonicalize)?;
        let real = wants.fault_module.map(|_| site.module.clone());
        let text = configuration(&dir, &runtime, &module, wants);
        let path = dir.join("keyward.toml");
        fs::write(&path, text)?;
        let config = Config::load(&path).map_err(|errors| errors.to_string())?;
        let clock = wants.clock.map(|(library, control)| (library.to_path_buf(), control.to_path_buf()));
        let house = Self { dir, runtime, binary: binary.to_path_buf(), module, real, clock, config };
        if house.real.is_some() {
            house.delay_signatures(Duration::ZERO)?;
        }
        ran(house.command().arg("init")).await?;
        Ok(house)
    }

    /// The ledger's file.
    pub(super) fn ledger(&self) -> PathBuf {
        self.config.paths.state.join("keyward.db")
    }

    /// Where operators call.
    pub(super) fn socket(&self) -> PathBuf {
        self.runtime.join("operator.sock")
    }

    /// The authority token's PIN.
    pub(super) fn pin_file(&self) -> PathBuf {
        self.dir.join("authority.pin")
    }

    /// `keyward …` with this house's configuration and tokens.
    pub(super) fn command(&self) -> Command {
        let mut command = Command::new(&self.binary);
        command
            .env_clear()
            .env("SOFTHSM2_CONF", self.dir.join("softhsm2.conf"))
            .env("KEYWARD_CONFIG", self.dir.join("keyward.toml"));
        if let Some(real) = &self.real {
            command.env("KEYWARD_SHIM_MODULE", real).env("KEYWARD_SHIM_SCRIPT", self.fault_script());
        }
        if let Some((library, control)) = &self.clock {
            command.env("LD_PRELOAD", library).env("KEYWARD_PRELOAD_CONTROL", control);
        }
        command.stdin(Stdio::null()).kill_on_drop(true);
        command
    }

    /// Where agents reach the daemon that runs.
    pub(super) fn address(&self) -> Result<String, Failed> {
        Ok(fs::read_to_string(self.runtime.join("address"))?.trim().to_owned())
    }

    /// `keyward serve` after a kill: a login that was cut off is for an operator to clear.
    pub(super) async fn start_after_kill(&self) -> Result<Running, Failed> {
        ran(self.command().args(["hsm", "unlock"])).await?;
        self.start().await
    }

    /// Processes started from now on have a device that needs so much longer for a signature. Only with a fault module.
    pub(super) fn delay_signatures(&self, by: Duration) -> Result<(), Failed> {
        let script = format!("delay C_Sign ms={}\n", by.as_secs_f64() * 1e3);
        Ok(fs::write(self.fault_script(), script)?)
    }

    /// Where the fault module of one process listens.
    pub(super) fn fault_socket(&self) -> PathBuf {
        self.runtime.join("faults.sock")
    }

    fn fault_script(&self) -> PathBuf {
        self.dir.join("faults")
    }

    /// `keyward serve`, ready.
    pub(super) async fn start(&self) -> Result<Running, Failed> {
        let notify = self.runtime.join("notify.sock");
        let _ = fs::remove_file(&notify);
        let told = UnixDatagram::bind(&notify)?;
        let log = fs::OpenOptions::new().create(true).append(true).open(self.dir.join("daemon.log"))?;
        let from = Instant::now();
        let mut child = self.command().arg("serve").env("NOTIFY_SOCKET", &notify).stdout(Stdio::null()).stderr(log).spawn()?;
        let mut message = [0; 4096];
        let ready = async {
            loop {
                let length = told.recv(&mut message).await?;
                if message[..length].split(|byte| *byte == b'\n').any(|line| line == b"READY=1") {
                    return Ok::<_, std::io::Error>(from.elapsed());
                }
            }
        };
        let ready_after = tokio::select! {
            ready = timeout(START_DEADLINE, ready) => ready.map_err(|_| self.said("it did not get ready in time"))??,
            ended = child.wait() => return Err(self.said(&format!("it ended at its start: {}", ended?))),
        };
        let pid = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw).ok_or("the daemon has no pid")?;
        let operator = operator::connect(&self.socket()).await?;
        Ok(Running { child, pid, operator, ready_after })
    }

    /// What went wrong, and the last of what the daemon logged.
    pub(super) fn said(&self, what: &str) -> Failed {
        let log = fs::read_to_string(self.dir.join("daemon.log")).unwrap_or_default();
        let last: Vec<&str> = log.lines().rev().take(8).collect();
        format!("keyward serve: {what}\n{}", last.into_iter().rev().collect::<Vec<_>>().join("\n")).into()
    }
}

/// A daemon at work.
pub(super) struct Running {
    child: Child,
    pid: Pid,
    pub operator: OperatorServiceClient<Channel>,
    pub ready_after: Duration,
}

impl Running {
    /// VmRSS, in KiB.
    pub(super) fn rss_kib(&self) -> Result<u64, Failed> {
        let status = fs::read_to_string(format!("/proc/{}/status", self.pid.as_raw_nonzero()))?;
        let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"));
        let value = line.and_then(|line| line.split_whitespace().next()).and_then(|value| value.parse().ok());
        value.ok_or_else(|| "no VmRSS in /proc".into())
    }

    /// SIGKILL, and waits for its end.
    pub(super) async fn kill(mut self) -> Result<(), Failed> {
        self.child.kill().await?;
        Ok(())
    }

    /// SIGTERM, and waits for its end.
    pub(super) async fn stop(mut self) -> Result<(), Failed> {
        kill_process(self.pid, Signal::TERM).map_err(|error| format!("kill: {error}"))?;
        let status = timeout(STOP_DEADLINE, self.child.wait()).await.map_err(|_| "the daemon did not stop in time")??;
        if status.success() { Ok(()) } else { Err(format!("the daemon ended with {status}").into()) }
    }
}

/// Runs it to its end and gives its standard output.
pub(super) async fn ran(command: &mut Command) -> Result<Vec<u8>, Failed> {
    let output = command.stdin(Stdio::null()).output().await?;
    if output.status.success() {
        return Ok(output.stdout);
    }
    let program = command.as_std().get_program().to_string_lossy().into_owned();
    Err(format!("{program}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr).trim()).into())
}

fn empty_token_directory(dir: &Path) -> Result<(), Failed> {
    fs::DirBuilder::new().recursive(true).mode(0o700).create(dir.join("tokens"))?;
    write_softhsm_conf(dir)
}

fn write_softhsm_conf(dir: &Path) -> Result<(), Failed> {
    let conf = format!(
        "directories.tokendir = {}\nobjectstore.backend = file\nlog.level = ERROR\nslots.removable = false\n",
        dir.join("tokens").display()
    );
    Ok(fs::write(dir.join("softhsm2.conf"), conf)?)
}

/// This tool takes a PIN in argv only: tokens made here protect nothing.
async fn add_token(dir: &Path, label: &str) -> Result<(), Failed> {
    let pin = hex(SecretBytes::random::<8>().reveal());
    let mut file = fs::OpenOptions::new().write(true).create_new(true).mode(0o600).open(dir.join(format!("{label}.pin")))?;
    file.write_all(pin.as_bytes())?;
    let mut tool = Command::new("softhsm2-util");
    tool.env("SOFTHSM2_CONF", dir.join("softhsm2.conf"));
    tool.args(["--init-token", "--free", "--label", label, "--so-pin", &pin, "--pin", &pin]);
    ran(&mut tool).await.map(drop)
}

/// Nothing but what has no default and what is wanted: the stock limits are what is measured.
fn configuration(dir: &Path, runtime: &Path, module: &Path, wants: Wants<'_>) -> String {
    let mut text = String::from("[trust]\ndomain = \"bench.example\"\n[listen]\ntcp = \"127.0.0.1:0\"\n");
    let _ = write!(text, "[paths]\nstate = \"{}\"\nruntime = \"{}\"\n", dir.join("state").display(), runtime.display());
    for role in ["authority", "agents"] {
        let pin = dir.join(format!("{role}.pin"));
        let _ = write!(
            text,
            "[hsm.{role}]\nmodule = \"{}\"\ntoken = \"{role}\"\npin_file = \"{}\"\n",
            module.display(),
            pin.display()
        );
        if let Some(lanes) = wants.lanes.filter(|_| role == "authority") {
            let _ = writeln!(text, "lanes = {lanes}");
        }
    }
    if wants.clock.is_some() {
        text.push_str("[rotation]\ndestroy_days = 0\n");
    }
    if wants.live_certificates.is_some() || !wants.limits.is_empty() {
        text.push_str("[limits]\n");
    }
    if let Some(most) = wants.live_certificates {
        let _ = writeln!(text, "live_certificates_per_agent = {most}");
    }
    for line in wants.limits {
        let _ = writeln!(text, "{line}");
    }
    text
}

/// A directory with an authority token of `count` other key pairs: filling one takes minutes, so it is kept.
async fn filled(site: &Site, binary: &Path, count: usize) -> Result<PathBuf, Failed> {
    let version = ran(Command::new("softhsm2-util").arg("--version")).await?;
    let version: String = String::from_utf8_lossy(&version)
        .trim()
        .chars()
        .map(|c| if c.is_ascii_alphanumeric() || c == '.' { c } else { '-' })
        .collect();
    let place = site.cache.join(format!("softhsm-{version}-{count}"));
    if place.is_dir() {
        return Ok(place);
    }
    let draft = site.cache.join(format!("draft-{}", std::process::id()));
    let _ = fs::remove_dir_all(&draft);
    fs::DirBuilder::new().recursive(true).mode(0o700).create(&draft)?;
    let absolute = draft.canonicalize()?;
    empty_token_directory(&absolute)?;
    add_token(&absolute, "authority").await?;
    let mut fill = Command::new(binary);
    fill.env_clear().env("SOFTHSM2_CONF", absolute.join("softhsm2.conf")).args(["bench", "token", "fill", "--count"]);
    fill.arg(count.to_string()).arg("--module").arg(&site.module).arg("--pin-file").arg(absolute.join("authority.pin"));
    ran(&mut fill).await?;
    // Whole or not at all: a fill that was interrupted is begun anew.
    fs::rename(&draft, &place)?;
    Ok(place)
}

fn copy(from: &Path, to: &Path) -> Result<(), Failed> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let target = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            fs::DirBuilder::new().recursive(true).mode(0o700).create(&target)?;
            copy(&entry.path(), &target)?;
        } else {
            fs::copy(entry.path(), &target)?;
        }
    }
    Ok(())
}

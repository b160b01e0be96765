//! The words by which a test arms faults: over a socket while the process runs, from a script when it starts.
//!
//! ```text
//! fail C_Sign rv=0x30 [nth=3] [count=1|all] [after]     the real function is not called; after: its answer is lost
//! delay C_Sign ms=2.0 [queries]                         every call takes longer; ms=0: no more. A device's time goes by signing:
//!                                                       asking C_Sign or C_SignFinal for a length (null buffer) is free, unless `queries`
//! hang C_Sign [nth=1] [count=1]                         parks the call
//! release / hanging / await hanging=1                   lets all go on / how many / waits for so many
//! corrupt C_Sign [nth=1] [count=1|all]                  flips a bit of the signature
//! abort C_Sign [nth=1]                                  ends the process in that call
//! logout / lose / return                                sessions and login go / the device goes / it comes back
//! remap                                                 a private key's handle names another key
//! sessions_max n=16 / pin_tries n=3 / no_session_keys / no_read_only_sessions / unique_ids
//! slow_keygen ms=5000 / preset yubihsm|cloudhsm|tpm / random seed=7 per_mille=20
//! pin real=1234                                         the real module is given this PIN, whatever the caller gave
//! memory 7069...                                        in how many places of the process's memory those bytes (hex) are, and where
//! clear                                                 everything works again
//! counts / faults / sessions                            calls by function / faults injected / sessions open
//! await faults=12                                       waits for so many
//! ```
//! `*` is every hooked function. An answer is one line: `ok`, `ok <text>`, `error <why>`.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::device;
use crate::faults::{self, Deed, Rule};
use crate::functions::Function;
use crate::memory;

/// Longest command.
const LINE_MAX: u64 = 1024;
/// Clients at once.
const CLIENTS_MAX: usize = 16;

/// Carries out the script and opens the socket, where the environment names them.
pub fn start() -> Result<(), String> {
    if let Some(path) = std::env::var_os("KEYWARD_SHIM_SCRIPT").filter(|path| Path::new(path).exists()) {
        let script = std::fs::read_to_string(path).map_err(|error| error.to_string())?;
        for line in script.lines().map(str::trim).filter(|line| !line.is_empty()) {
            carry_out(line)?;
        }
    }
    if let Some(path) = std::env::var_os("KEYWARD_SHIM_SOCKET")
        && let Some(listener) = listen(Path::new(&path))
    {
        thread::Builder::new().name("p11shim".into()).spawn(move || serve(&listener)).map_err(|error| error.to_string())?;
    }
    Ok(())
}

/// A socket file is replaced if nobody listens at it: its process was killed. One that lives keeps it.
fn listen(path: &Path) -> Option<UnixListener> {
    if UnixStream::connect(path).is_err() {
        let _ = std::fs::remove_file(path);
    }
    UnixListener::bind(path).ok()
}

fn serve(listener: &UnixListener) {
    let clients = Arc::new(AtomicUsize::new(0));
    for client in listener.incoming().flatten() {
        let own = Arc::clone(&clients);
        if clients.fetch_add(1, Ordering::SeqCst) < CLIENTS_MAX {
            let answering = thread::Builder::new().name("p11shim-client".into()).spawn(move || {
                answer(&client);
                own.fetch_sub(1, Ordering::SeqCst);
            });
            if answering.is_ok() {
                continue;
            }
        }
        clients.fetch_sub(1, Ordering::SeqCst);
    }
}

fn answer(mut client: &UnixStream) {
    let mut lines = BufReader::new(client);
    loop {
        let mut line = String::new();
        match (&mut lines).take(LINE_MAX).read_line(&mut line) {
            Ok(length) if length > 0 => {}
            _ => return,
        }
        let answer = match carry_out(line.trim()) {
            Ok(text) if text.is_empty() => "ok\n".to_owned(),
            Ok(text) => format!("ok {text}\n"),
            Err(why) => format!("error {why}\n"),
        };
        if client.write_all(answer.as_bytes()).is_err() {
            return;
        }
    }
}

/// The words of a command that nobody has taken yet.
struct Words<'a>(Vec<&'a str>);

impl<'a> Words<'a> {
    fn next(&mut self, what: &str) -> Result<&'a str, String> {
        if self.0.is_empty() { Err(format!("{what} is missing")) } else { Ok(self.0.remove(0)) }
    }

    /// A function, or `*`.
    fn function(&mut self) -> Result<Option<Function>, String> {
        match self.next("the function")? {
            "*" => Ok(None),
            name => Function::named(name).map(Some).ok_or_else(|| format!("{name:?} is no hooked function")),
        }
    }

    fn flag(&mut self, name: &str) -> bool {
        let at = self.0.iter().position(|word| *word == name);
        at.map(|at| self.0.remove(at)).is_some()
    }

    fn value(&mut self, name: &str) -> Option<&'a str> {
        let at = self.0.iter().position(|word| word.strip_prefix(name).is_some_and(|rest| rest.starts_with('=')))?;
        self.0.remove(at).split_once('=').map(|(_, value)| value)
    }

    fn number(&mut self, name: &str) -> Result<Option<u64>, String> {
        let Some(text) = self.value(name) else { return Ok(None) };
        let parsed = text.strip_prefix("0x").map_or_else(|| text.parse(), |hex| u64::from_str_radix(hex, 16));
        parsed.map(Some).map_err(|_| format!("{name}={text} is no number"))
    }

    fn needed(&mut self, name: &str) -> Result<u64, String> {
        self.number(name)?.ok_or_else(|| format!("{name}= is missing"))
    }

    fn millis(&mut self) -> Result<Duration, String> {
        let text = self.value("ms").ok_or("ms= is missing")?;
        let millis = text.parse::<f64>().ok().filter(|millis| (0.0..=600_000.0).contains(millis));
        Ok(Duration::from_secs_f64(millis.ok_or_else(|| format!("ms={text} is no time"))? / 1000.0))
    }

    /// Which calls: `nth`, `count`.
    fn rule(&mut self, on: Option<Function>, deed: Deed) -> Result<Rule, String> {
        let nth = self.number("nth")?.unwrap_or(1);
        let left = match self.value("count") {
            None => Some(1),
            Some("all") => None,
            Some(text) => Some(text.parse().ok().filter(|count| *count > 0).ok_or_else(|| format!("count={text}"))?),
        };
        if nth == 0 {
            return Err("the first call is nth=1".into());
        }
        Ok(Rule { on, deed, skip: nth - 1, left })
    }

    fn end(self) -> Result<(), String> {
        if self.0.is_empty() { Ok(()) } else { Err(format!("what is {:?}?", self.0.join(" "))) }
    }
}

/// Carries out one command. One that is wrong changes nothing.
fn carry_out(line: &str) -> Result<String, String> {
    let mut words = Words(line.split_ascii_whitespace().collect());
    let verb = words.next("the command")?;
    match verb {
        "fail" | "hang" | "corrupt" | "abort" => {
            let on = words.function()?;
            let deed = match verb {
                "fail" => {
                    let code = words.needed("rv")?;
                    if words.flag("after") { Deed::Lose(code) } else { Deed::Fail(code) }
                }
                "hang" => Deed::Hang,
                "corrupt" if matches!(on, Some(Function::C_Sign | Function::C_SignFinal)) => Deed::Corrupt,
                "corrupt" => return Err("only C_Sign and C_SignFinal hand out signatures".into()),
                _ => Deed::Abort,
            };
            let rule = words.rule(on, deed)?;
            words.end()?;
            faults::direct(rule)?;
        }
        "delay" => {
            let (on, by, queries) = (words.function()?, words.millis()?, words.flag("queries"));
            words.end()?;
            faults::delay(on, by, queries);
        }
        "slow_keygen" => {
            let by = words.millis()?;
            words.end()?;
            faults::delay(Some(Function::C_GenerateKeyPair), by, false);
        }
        "await" => {
            let (hanging, faults) = (words.number("hanging")?, words.number("faults")?);
            words.end()?;
            let late = |now: u64, what| format!("{now} {what} after {:?}", faults::AWAIT);
            match (hanging, faults) {
                (Some(wanted), None) => {
                    let wanted = usize::try_from(wanted).unwrap_or(usize::MAX);
                    faults::await_parked(wanted).map_err(|now| late(now as u64, "hang"))?;
                }
                (None, Some(wanted)) => faults::await_injected(wanted).map_err(|now| late(now, "faults"))?,
                _ => return Err("hanging= or faults= is missing".into()),
            }
        }
        "sessions_max" | "pin_tries" => {
            let most = words.needed("n")?;
            words.end()?;
            if verb == "pin_tries" { device::set_pin_tries(most) } else { device::set_sessions_max(most) }
        }
        "random" => {
            let (seed, per_mille) = (words.needed("seed")?, words.needed("per_mille")?);
            words.end()?;
            faults::roll_dice(seed, per_mille);
        }
        "preset" => {
            let name = words.next("the device")?;
            words.end()?;
            device::preset(name)?;
        }
        "pin" => {
            let real = words.value("real").ok_or("real= is missing")?;
            words.end()?;
            device::set_real_pin(real);
        }
        "memory" => {
            let hex = words.next("what to look for")?;
            words.end()?;
            return memory::look_for(hex);
        }
        _ => {
            words.end()?;
            return plain(verb);
        }
    }
    Ok(String::new())
}

/// The commands of one word.
fn plain(verb: &str) -> Result<String, String> {
    match verb {
        "release" => faults::release(),
        "remap" => faults::remap(),
        "no_session_keys" => device::refuse_session_keys(),
        "no_read_only_sessions" => device::refuse_read_only_sessions(),
        "unique_ids" => device::refuse_second_ids(),
        "return" => faults::set_gone(false),
        "clear" => {
            faults::clear();
            device::clear();
        }
        "logout" => return device::lose_sessions().map(|sessions| sessions.to_string()),
        "lose" => {
            faults::set_gone(true);
            return device::lose_sessions().map(|sessions| sessions.to_string());
        }
        "hanging" => return Ok(faults::parked().to_string()),
        "faults" => return Ok(faults::count().to_string()),
        "sessions" => return Ok(device::sessions().to_string()),
        "counts" => {
            let called = Function::ALL.iter().filter(|function| function.calls() > 0);
            return Ok(called.map(|function| format!("{}={}", function.name(), function.calls())).collect::<Vec<_>>().join(" "));
        }
        _ => return Err(format!("what is {verb:?}?")),
    }
    Ok(String::new())
}

//! The tokens behind a socket: p11-kit serves the module under test from a process of its own.

use std::io::{BufRead as _, BufReader};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal, kill_process_group};

use super::{House, token};

/// The module that speaks to the server, where distributions put it.
pub fn client() -> PathBuf {
    let multiarch = format!("/usr/lib/{}-linux-gnu/pkcs11/p11-kit-client.so", std::env::consts::ARCH);
    let places = [&multiarch, "/usr/lib64/pkcs11/p11-kit-client.so", "/usr/lib/pkcs11/p11-kit-client.so"];
    places.iter().map(PathBuf::from).find(|path| path.exists()).expect("install p11-kit-modules (scripts/test does)")
}

/// A running `p11-kit server`, killed when dropped.
pub struct Remote(Child);

impl Remote {
    /// Starts it for a house and waits until it listens.
    pub fn start(house: &House) -> Self {
        let socket = house.path("p11-kit.sock");
        let _ = std::fs::remove_file(&socket);
        let mut child = Command::new("p11-kit")
            .args(["server", "--foreground", "--name"])
            .arg(&socket)
            .arg("--provider")
            .arg(token::module())
            .args(["pkcs11:token=authority", "pkcs11:token=agents"])
            .envs([house.module_environment()])
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            // A connection is a process of its own: all of them are killed at once.
            .process_group(0)
            .spawn()
            .expect("install p11-kit (scripts/test does)");
        let mut told = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut told).unwrap();
        assert!(told.contains("P11_KIT_SERVER_ADDRESS"), "{told:?}");
        Self(child)
    }

    /// Sends all of its processes a signal: with SIGSTOP every call hangs.
    pub fn signal(&self, signal: Signal) {
        let _ = kill_process_group(Pid::from_child(&self.0), signal);
    }
}

impl Drop for Remote {
    fn drop(&mut self) {
        self.signal(Signal::KILL);
        let _ = self.0.wait();
    }
}

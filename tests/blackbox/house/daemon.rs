//! A real `keyward serve`, its readiness and its end awaited as events.

use std::fs::OpenOptions;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::ExitStatus;
use std::sync::Mutex;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use rustix::fd::OwnedFd;
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

use super::{DEADLINE, House};

/// What the waiting thread sends to the notification socket when the process is gone.
const ENDED: &[u8] = b"X_ENDED=1";

/// A running daemon.
pub struct Daemon {
    pid: u32,
    // A pidfd, not a number: it never names another process.
    process: OwnedFd,
    // A mutex, so that a house can be shared by the threads of a test.
    end: Mutex<Receiver<ExitStatus>>,
    notices: UnixDatagram,
    ready: bool,
    ended: bool,
}

impl Daemon {
    /// Starts it and waits for its first word (sd_notify(3): READY=1, or a STATUS= that says why not) or its end.
    pub(super) fn start(house: &House) -> Self {
        let path = house.path("notify");
        let _ = std::fs::remove_file(&path);
        let notices = UnixDatagram::bind(&path).unwrap();
        let log = OpenOptions::new().create(true).append(true).open(house.path("daemon.log")).unwrap();
        let mut child = house
            .command_preloaded()
            .arg("serve")
            .env("NOTIFY_SOCKET", &path)
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .expect("keyward serve");
        let pid = child.id();
        let process = pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).unwrap();
        let (tell, end) = channel();
        thread::spawn(move || {
            let status = child.wait().unwrap();
            let _ = tell.send(status);
            announce(&path);
        });
        let mut daemon = Self { pid, process, end: Mutex::new(end), notices, ready: false, ended: false };
        daemon.listen(|text| text.contains("READY=1") || text.contains("STATUS="));
        daemon
    }

    /// Whether it has said READY=1; waits for that after a mere STATUS=.
    pub fn is_ready(&mut self) -> bool {
        if !self.ready && !self.ended {
            self.listen(|text| text.contains("READY=1"));
        }
        self.ready
    }

    /// Waits until it tells its supervisor this.
    pub fn tells(&mut self, text: &str) {
        let mut told = false;
        self.listen(|notice| {
            told |= notice.contains(text);
            told
        });
        assert!(told, "the daemon ended without {text}");
    }

    /// Whether it had said READY=1 when the first word came.
    pub fn was_ready(&self) -> bool {
        self.ready
    }

    /// Whether the process has ended.
    pub fn has_ended(&self) -> bool {
        self.ended
    }

    pub fn pid(&self) -> u32 {
        self.pid
    }

    /// Reads notices until one satisfies, the process ends, or the deadline passes.
    fn listen(&mut self, mut satisfied: impl FnMut(&str) -> bool) {
        let until = Instant::now() + DEADLINE;
        let mut buffer = [0; 4096];
        loop {
            let left = until.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "the daemon said nothing for {DEADLINE:?}");
            self.notices.set_read_timeout(Some(left)).unwrap();
            let Ok(length) = self.notices.recv(&mut buffer) else { continue };
            let text = String::from_utf8_lossy(&buffer[..length]);
            self.ready |= text.contains("READY=1");
            self.ended |= text.as_bytes() == ENDED;
            if self.ended || satisfied(&text) {
                return;
            }
        }
    }

    /// SIGTERM; the exit code.
    pub(super) fn stop(mut self) -> i32 {
        self.signal(Signal::TERM);
        self.wait().code().expect("the daemon died of a signal")
    }

    /// SIGKILL.
    pub(super) fn kill9(mut self) {
        self.signal(Signal::KILL);
        self.wait();
    }

    /// Waits for its own end.
    pub(super) fn ended(mut self) -> Option<i32> {
        self.wait().code()
    }

    /// The same for an end that takes its time.
    pub fn ended_within(&mut self, patience: Duration) -> Option<i32> {
        self.wait_for(patience).code()
    }

    /// Sends a signal, e.g. SIGSTOP for a daemon that hangs.
    pub fn signal(&self, signal: Signal) {
        let _ = pidfd_send_signal(&self.process, signal);
    }

    fn wait(&mut self) -> ExitStatus {
        self.wait_for(DEADLINE)
    }

    fn wait_for(&mut self, patience: Duration) -> ExitStatus {
        let status = self.end.get_mut().unwrap().recv_timeout(patience).expect("the daemon did not end in time");
        self.ended = true;
        status
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = pidfd_send_signal(&self.process, Signal::KILL);
        let _ = self.end.get_mut().map(|end| end.recv_timeout(DEADLINE));
    }
}

fn announce(path: &Path) {
    if let Ok(socket) = UnixDatagram::unbound() {
        let _ = socket.send_to(ENDED, path);
    }
}

//! The daemon: builds the rooms from left to right, serves, drains.
//!
//! Owns: the order of start and stop, the runtime, timed duties, exit codes. Promises: what cannot be had (a token, say) leaves the
//! daemon up, unready and saying why; agents are served only when the server's own certificate exists; a stop ends what has begun.
//! Never: decides, signs, or keeps state of its own.

mod duties;
mod init;
mod notify;
mod rooms;

use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::watch;
use tracing_subscriber::EnvFilter;

use crate::api;
use crate::config::{Config, Log, LogFormat};
use crate::hsm::Modules;

pub use init::{InitAsk, certificate, initialise};

/// The ledger cannot be written (EX_IOERR).
pub const EXIT_LEDGER: u8 = 74;
/// Restart me: a call hangs inside the PKCS#11 module (EX_TEMPFAIL).
pub const EXIT_RESTART: u8 = 75;

/// After the disk has failed, denials and the operator socket go on for this long.
const GRACE_AFTER_FAILURE: Duration = Duration::from_secs(5);
/// How long exit handlers may take when a call hangs inside the PKCS#11 module.
const EXIT_DEADLINE: Duration = Duration::from_secs(5);
/// A stop waits this long for calls under way.
const DRAIN_DEADLINE: Duration = Duration::from_secs(10);

/// Why a daemon stops.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Cause {
    Signal(&'static str),
    LedgerFailed,
    TokenStuck,
    Transport(String),
}

impl Cause {
    fn exit_code(&self) -> ExitCode {
        match self {
            Self::Signal(_) => ExitCode::SUCCESS,
            Self::LedgerFailed => ExitCode::from(EXIT_LEDGER),
            Self::TokenStuck => ExitCode::from(EXIT_RESTART),
            Self::Transport(_) => ExitCode::FAILURE,
        }
    }

    fn text(&self) -> String {
        match self {
            Self::Signal(name) => (*name).to_owned(),
            Self::LedgerFailed => "the ledger cannot be written".to_owned(),
            Self::TokenStuck => "a call hangs inside the PKCS#11 module".to_owned(),
            Self::Transport(error) => error.clone(),
        }
    }
}

/// Logging as configured; `RUST_LOG` overrides the level. To stderr.
pub fn log(log: &Log) {
    // cryptoki tells every mechanism it has no name for as an error.
    let configured = || EnvFilter::new(format!("{},cryptoki::mechanism=off", log.level));
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| configured());
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let _ = match log.format {
        LogFormat::Text => builder.with_ansi(false).try_init(),
        LogFormat::Json => builder.json().try_init(),
    };
}

/// Runs until a signal, or until it cannot go on. The error is one sentence for the operator.
///
/// # Errors
/// When it cannot start: the configuration does not fit the ledger, another daemon runs, a directory cannot be used.
pub fn serve(config: Config) -> Result<ExitCode, String> {
    log(&config.log);
    crate::hsm::harden().map_err(|error| error.to_string())?;
    raise_file_limit();
    let runtime =
        tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(|error| format!("no runtime: {error}"))?;
    let cause = runtime.block_on(run(config))?;
    runtime.shutdown_timeout(Duration::from_secs(1));
    // A module's own exit handlers may wait for a call that hangs in it. Whoever watches us restarts us after this, too.
    std::thread::spawn(|| {
        std::thread::sleep(EXIT_DEADLINE);
        std::process::abort()
    });
    Ok(cause.exit_code())
}

async fn run(config: Config) -> Result<Cause, String> {
    let config = Arc::new(config);
    let modules = Modules::of_the_daemon();
    let rooms = rooms::open(&config).await?;
    // Before a supervisor hears anything: it may answer with a signal.
    let signals = signal(SignalKind::terminate()).and_then(|terminate| Ok((terminate, signal(SignalKind::interrupt())?)));
    let signals = signals.map_err(|error| format!("signals cannot be received: {error}"))?;
    let (stop, stopping) = watch::channel(None::<Cause>);
    let stop = Arc::new(stop);
    // Before a supervisor hears anything, too: whoever is told by it may ask at once.
    let operators = api::listen_to_operators(&config);
    let serving = vec![
        tokio::spawn(rooms::serve_operators(rooms.clone(), operators, Arc::clone(&stop))),
        tokio::spawn(rooms::serve_agents(rooms.clone(), modules, Arc::clone(&stop))),
    ];
    let duties = [
        tokio::spawn(duties::ledger(rooms.clone())),
        tokio::spawn(duties::unlock(rooms.clone())),
        tokio::spawn(duties::health(rooms.clone(), Arc::clone(&stop))),
    ];
    let cause = until_stopped(&stop, stopping, signals).await;
    tracing::info!(cause = %cause.text(), "stopping");
    notify::stopping();
    if cause == Cause::LedgerFailed {
        // Denials stay in force and operators are heard; nothing is issued.
        tokio::time::sleep(GRACE_AFTER_FAILURE).await;
    }
    for duty in duties {
        // Duties have no end of their own.
        duty.abort();
    }
    for task in serving {
        // Servers end by themselves once `stop` is set.
        let abort = task.abort_handle();
        if tokio::time::timeout(DRAIN_DEADLINE, task).await.is_err() {
            abort.abort();
        }
    }
    rooms.close(&cause).await;
    Ok(cause)
}

/// A signal, or a room that cannot go on.
async fn until_stopped(
    stop: &watch::Sender<Option<Cause>>,
    mut stopping: watch::Receiver<Option<Cause>>,
    (mut terminate, mut interrupt): (Signal, Signal),
) -> Cause {
    let cause = tokio::select! {
        _ = terminate.recv() => Cause::Signal("SIGTERM"),
        _ = interrupt.recv() => Cause::Signal("SIGINT"),
        cause = stopping.wait_for(Option::is_some) => {
            cause.ok().and_then(|cause| cause.clone()).unwrap_or(Cause::Signal("closed"))
        }
    };
    stop.send_if_modified(|current| {
        let first = current.is_none();
        if first {
            *current = Some(cause.clone());
        }
        first
    });
    cause
}

/// A connection is a file descriptor: as many as the hard limit admits.
fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    if let Err(error) = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum }) {
        tracing::warn!(%error, "the limit of open files could not be raised");
    }
}

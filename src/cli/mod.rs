//! The command line: one file per noun.
//!
//! Owns: arguments, what is printed, exit codes. Promises: data on standard output, messages on standard error; JSON that is
//! stable (snake_case, RFC 3339 times); a verb that destroys says what it affects and wants `--yes`. Never: takes a secret
//! from an argument or the environment, prints one other than a join file asked for with `--out -`.

mod agent;
mod agent_follow;
mod agent_run;
mod agents;
mod bench;
mod bundle;
mod ca;
mod ca_list;
mod clock;
mod config;
mod crl;
mod describe;
mod describe_keys;
mod duration;
mod failure;
mod hsm;
mod hsm_reconcile;
mod hsm_status;
mod hsm_unlock;
mod key;
mod key_show;
mod key_terms;
mod ledger;
mod ledger_verify;
mod quarantine;
mod render;
mod serve;
mod shell;
mod status;

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use clap_complete::Shell;

use crate::config::Config;
pub use failure::{EXIT_NOT_FOUND, EXIT_REFUSED, EXIT_UNAVAILABLE, EXIT_VERIFICATION_FAILED, Failure};
pub use render::{Format, Output};

const EXIT_CODES: &str = "\
Exit codes:
  0   done
  1   an error
  2   wrong usage
  3   the daemon refused
  4   not found
  5   unavailable: daemon, token or ledger cannot be reached or cannot answer now
  6   verification failed, or somebody else answered
  74  (serve) the ledger cannot be written
  75  (serve) restart me";

/// Short-lived identities and HSM-backed signing keys for AI agents, and the means to take them all back.
#[derive(Debug, Parser)]
#[command(name = "keyward", version, max_term_width = 100, after_help = EXIT_CODES, arg_required_else_help = true)]
pub struct Arguments {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    command: Command,
}

/// What every verb understands.
#[derive(Debug, Args)]
#[command(next_help_heading = "Everywhere")]
pub struct Global {
    /// Configuration file.
    #[arg(long, global = true, env = "KEYWARD_CONFIG", value_name = "FILE", default_value = "/etc/keyward/keyward.toml")]
    pub config: PathBuf,
    /// Operator socket; by default the one below the configured runtime directory.
    #[arg(long, global = true, env = "KEYWARD_SOCKET", value_name = "PATH")]
    pub socket: Option<PathBuf>,
    /// How data is printed.
    #[arg(long, global = true, env = "KEYWARD_FORMAT", value_enum, default_value = "table")]
    pub format: Format,
}

impl Global {
    /// The checked configuration.
    ///
    /// # Errors
    /// Every mistake in the file.
    pub fn load(&self) -> Result<Config, Failure> {
        if !self.config.exists() {
            let advice = "name the configuration with --config or KEYWARD_CONFIG";
            return Err(Failure::error(format!("{}: no such file; {advice}", self.config.display())));
        }
        Config::load(&self.config).map_err(|errors| Failure::error(format!("{}:\n{errors}", self.config.display())))
    }

    /// Where the daemon listens for operators.
    ///
    /// # Errors
    /// Where no socket is named and the configuration cannot be read.
    pub fn socket(&self) -> Result<PathBuf, Failure> {
        match &self.socket {
            Some(path) => Ok(path.clone()),
            None => Ok(self.load()?.paths.runtime.join("operator.sock")),
        }
    }
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make the ledger, the keys in the token and the authorities over them. Called again, it goes on where it was interrupted.
    #[command(
        after_help = "Examples:\n  keyward init\n  keyward init --root-csr issuing.csr\n  keyward init --root-certificate root.pem --issuing-certificate issuing.pem"
    )]
    Init(serve::Init),
    /// Run the daemon until SIGTERM.
    #[command(after_help = "Example:\n  keyward serve --config /etc/keyward/keyward.toml")]
    Serve,
    /// Enrol agents and look at them (operator).
    #[command(subcommand)]
    Agents(agents::Verb),
    /// Be an agent: get credentials and keep them fresh.
    #[command(subcommand)]
    Agent(agent::Verb),
    /// Signing keys that an agent uses and never holds.
    #[command(subcommand)]
    Key(Box<key::Verb>),
    /// Take everything back from an agent (operator).
    #[command(subcommand)]
    Quarantine(quarantine::Verb),
    /// The certificate revocation list (operator).
    #[command(subcommand)]
    Crl(crl::Verb),
    /// Read the ledger (operator).
    #[command(subcommand)]
    Ledger(ledger::Verb),
    /// The authorities of the trust domain (operator).
    #[command(subcommand)]
    Ca(ca::Verb),
    /// What peers of this trust domain trust (operator).
    #[command(subcommand)]
    Bundle(bundle::Verb),
    /// The PKCS#11 tokens (operator).
    #[command(subcommand)]
    Hsm(hsm::Verb),
    /// Whether the daemon is ready, and if not, why (operator). Exits 5 while it is not.
    #[command(after_help = "Example:\n  keyward status --format json")]
    Status,
    /// The daemon's clock (operator).
    #[command(subcommand)]
    Clock(clock::Verb),
    /// The configuration file.
    #[command(subcommand)]
    Config(config::Verb),
    /// Measure what issuing costs here, with throw-away tokens and daemons.
    #[command(subcommand)]
    Bench(bench::Verb),
    /// Print a completion script.
    #[command(after_help = "Example:\n  keyward completion bash > /etc/bash_completion.d/keyward")]
    Completion {
        /// For which shell.
        shell: Shell,
    },
    /// Print the manual page, or write those of all verbs.
    #[command(after_help = "Examples:\n  keyward man | man -l -\n  keyward man --out /usr/local/share/man/man1")]
    Man {
        /// Directory for one page per verb.
        #[arg(long, value_name = "DIR")]
        out: Option<PathBuf>,
    },
    /// Print the version.
    #[command(after_help = "Example:\n  keyward version --format json")]
    Version,
}

/// Runs the command of this process's arguments.
#[must_use]
pub fn run() -> ExitCode {
    run_with(std::env::args_os())
}

fn run_with(arguments: impl Iterator<Item = OsString>) -> ExitCode {
    let arguments = match Arguments::try_parse_from(arguments) {
        Ok(arguments) => arguments,
        Err(error) => {
            // Help and version go to standard output with 0, the rest to standard error with 2; clap knows which.
            let _ = error.print();
            return ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(2));
        }
    };
    let mut output = Output::of_process(arguments.global.format);
    match dispatch(arguments, &mut output) {
        Ok(code) => code,
        Err(failure) => {
            output.say(&failure.to_string());
            failure.exit_code()
        }
    }
}

fn dispatch(arguments: Arguments, output: &mut Output) -> Result<ExitCode, Failure> {
    let Arguments { global, command } = arguments;
    match command {
        Command::Init(ask) => done(block_on(serve::init(ask, &global, output))),
        Command::Serve => serve::serve(&global),
        Command::Agents(verb) => done(block_on(agents::run(verb, &global, output))),
        Command::Agent(verb) => block_on(agent::run(verb, output)),
        Command::Key(verb) => done(block_on(key::run(*verb, &global, output))),
        Command::Quarantine(verb) => done(block_on(quarantine::run(verb, &global, output))),
        Command::Crl(verb) => done(block_on(crl::run(verb, &global, output))),
        Command::Ledger(verb) => done(block_on(ledger::run(verb, &global, output))),
        Command::Ca(verb) => done(block_on(ca::run(verb, &global, output))),
        Command::Hsm(verb) => block_on(hsm::run(verb, &global, output)),
        Command::Bundle(verb) => done(block_on(bundle::run(verb, &global, output))),
        Command::Status => block_on(status::run(&global, output)),
        Command::Clock(verb) => done(block_on(clock::run(verb, &global, output))),
        Command::Config(verb) => done(config::run(verb, &global, output)),
        Command::Bench(verb) => bench::run(verb, output),
        Command::Completion { shell } => done(shell::completion(shell, output)),
        Command::Man { out } => done(shell::man(out, output)),
        Command::Version => {
            let version =
                Version { version: env!("CARGO_PKG_VERSION"), dangerous_test_hooks: cfg!(feature = "dangerous-test-hooks") };
            done(output.show(&version, Version::table).map_err(Failure::from))
        }
    }
}

#[derive(serde::Serialize)]
struct Version {
    version: &'static str,
    dangerous_test_hooks: bool,
}

impl Version {
    fn table(&self) -> String {
        let hooks = if self.dangerous_test_hooks { " with dangerous-test-hooks: never serve agents with it" } else { "" };
        format!("keyward {}{hooks}\n", self.version)
    }
}

fn done(result: Result<(), Failure>) -> Result<ExitCode, Failure> {
    result.map(|()| ExitCode::SUCCESS)
}

/// One thread is enough for a command; the daemon makes a runtime of its own.
fn block_on<T>(work: impl Future<Output = Result<T, Failure>>) -> Result<T, Failure> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime = runtime.map_err(|error| Failure::error(format!("no runtime: {error}")))?;
    let done = runtime.block_on(work);
    // Dropped, it would wait for whoever hangs inside a PKCS#11 module.
    runtime.shutdown_background();
    done
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_arguments_are_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn whoever_leaves_out_whose_keys_is_told_every_way_to_say_it() {
        for (verb, ways) in [("list", ["--dir", "--agent"]), ("disable", ["--dir", "--agent"]), ("jwks", ["--of", "--class"])] {
            let name = (verb == "disable").then_some("tokens");
            let error = Arguments::try_parse_from(["keyward", "key", verb].into_iter().chain(name)).unwrap_err().to_string();
            assert!(ways.iter().all(|way| error.contains(way)), "{error}");
        }
    }

    #[test]
    fn every_verb_has_help_and_an_example() {
        fn check(command: &clap::Command, path: &str) {
            let path = format!("{path} {}", command.get_name());
            assert!(command.get_about().is_some(), "{path} has no help");
            if command.has_subcommands() {
                command.get_subcommands().for_each(|verb| check(verb, &path));
            } else {
                let examples = command.get_after_help().map(ToString::to_string).unwrap_or_default();
                assert!(examples.starts_with("Example"), "{path} has no example");
                assert!(examples.contains("keyward "), "{path}: the example is not a command");
            }
        }
        Arguments::command().get_subcommands().for_each(|verb| check(verb, "keyward"));
    }
}

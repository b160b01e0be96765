//! `keyward hsm`: the tokens, what they can do, and the lock against burning PIN tries.

use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Subcommand, ValueEnum};
use serde::Serialize;

use super::agents::Daemon;
use super::describe::purpose_name;
use super::failure::EXIT_UNAVAILABLE;
use super::hsm_reconcile::Unwanted;
use super::hsm_status::{Token, role};
use super::render::table;
use super::{Failure, Global, Output, hsm_reconcile, hsm_unlock, quarantine, status};
use crate::config;
use crate::hsm::{self, Modules, SlotSeen};
use crate::proto::{Purpose, TestTokensRequest, TokenCheck};

/// The verbs.
#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Show the tokens: usable or why not, queues, mechanisms, what is switched off.
    ///
    /// Exit code 5 if one is not usable.
    #[command(after_help = "Example:\n  keyward hsm status --format json")]
    Status,
    /// List the slots and tokens that the modules show, and which of them the configuration names.
    ///
    /// Loads the modules in this process and logs in to nothing: it works before `keyward init` and beside the daemon.
    #[command(after_help = "Examples:\n  keyward hsm slots\n  keyward hsm slots --module /usr/lib/softhsm/libsofthsm2.so")]
    Slots {
        /// Another PKCS#11 module than the configured ones.
        #[arg(long, value_name = "FILE")]
        module: Option<PathBuf>,
    },
    /// Have the daemon's tokens sign, and look the authorities' keys up anew: attributes, public key, a verified signature.
    ///
    /// Exit code 5 if anything fails.
    #[command(after_help = "Example:\n  keyward hsm test --signatures 100")]
    Test {
        /// Canary signatures per token; the longest is told. [default: the daemon's, a handful]
        #[arg(long, value_parser = clap::value_parser!(u32).range(1..=1000))]
        signatures: Option<u32>,
    },
    /// Hold the tokens against the ledger: objects that it knows nothing of, keys that a token does not have.
    ///
    /// in the making, being destroyed: on their way; what a crash left so is put in order at the next start, or soon. stray: by its label this
    /// deployment's, and not in the ledger. missing: in use, and not in the token. misplaced: in the wrong one of two tokens. foreign: of another
    /// deployment, or not keyward's.
    ///
    /// Nothing is destroyed unasked, and nothing but strays ever. Exit code 5 if one is left, or a key is missing or misplaced.
    #[command(
        after_help = "Examples:\n  keyward hsm reconcile\n  keyward hsm reconcile --destroy 0f3a9c11\n  keyward hsm reconcile --destroy-orphans --yes"
    )]
    Reconcile {
        /// Destroy all strays.
        #[arg(long)]
        destroy_orphans: bool,
        /// Destroy one stray: its key id, or the first eight digits or more.
        #[arg(long, value_name = "KEY_ID", conflicts_with = "destroy_orphans", value_parser = key_id_start)]
        destroy: Option<String>,
        /// Destroy them without asking first.
        #[arg(long)]
        yes: bool,
    },
    /// Let the daemon log in again after a failed login. Check the PIN first: the next try counts.
    ///
    /// The daemon tries no login while pin-pending-authority or pin-pending-agents lies in its state directory, so that a
    /// wrong PIN costs one try and not all of them. This leaves word beside the file, as its owner or root; the daemon, now or at its
    /// next start, records who unlocked what and why, and then logs in. Where a daemon runs, what came of that is told: exit code 5 if
    /// the PIN was refused again, or nothing came of it in ten seconds; 3 if another unlock is not recorded yet, and this one not kept.
    #[command(after_help = "Example:\n  keyward hsm unlock --token authority --reason 'PIN corrected'")]
    Unlock {
        /// Which token.
        #[arg(long, value_enum, default_value = "all")]
        token: Which,
        /// Why; kept in the ledger, at most 256 characters.
        #[arg(long, value_parser = quarantine::reason)]
        reason: Option<String>,
    },
}

/// Which of the two configured tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum Which {
    /// Root, issuing, ledger and canary keys.
    Authority,
    /// Agents' keys.
    Agents,
    /// Both.
    All,
}

fn key_id_start(text: &str) -> Result<String, String> {
    let hexadecimal = text.len() >= 8 && text.bytes().all(|byte| byte.is_ascii_hexdigit());
    hexadecimal.then(|| text.to_ascii_lowercase()).ok_or_else(|| "eight hexadecimal digits or more".to_owned())
}

pub(super) async fn run(verb: Verb, global: &Global, output: &mut Output) -> Result<ExitCode, Failure> {
    match verb {
        Verb::Status => {
            let tokens: Vec<_> = status::ask(global).await?.tokens.into_iter().map(Token::from).collect();
            output.show(&tokens, |tokens| tokens.iter().map(Token::text).collect::<Vec<_>>().join("\n"))?;
            let usable = !tokens.is_empty() && tokens.iter().all(Token::is_usable);
            return Ok(if usable { ExitCode::SUCCESS } else { ExitCode::from(EXIT_UNAVAILABLE) });
        }
        Verb::Slots { module } => slots(module, global, output).await,
        Verb::Test { signatures } => test(signatures, global, output).await,
        Verb::Unlock { token, reason } => hsm_unlock::run(token, &reason.unwrap_or_default(), global, output).await,
        Verb::Reconcile { destroy_orphans, destroy, yes } => {
            let unwanted = match destroy {
                Some(key_id) => Unwanted::Stray(key_id),
                None if destroy_orphans => Unwanted::Strays,
                None => Unwanted::Nothing,
            };
            hsm_reconcile::run(unwanted, yes, global, output).await
        }
    }
    .map(|()| ExitCode::SUCCESS)
}

/// A token that a module shows.
#[derive(Serialize)]
struct Slot {
    module: String,
    slot: u64,
    description: String,
    label: Option<String>,
    serial: Option<String>,
    model: Option<String>,
    initialised: bool,
    pin: Option<&'static str>,
    /// The roles that the configuration gives it.
    configured: Vec<&'static str>,
    error: Option<String>,
}

/// Longest wait for a module to show its slots.
const SLOTS_DEADLINE: Duration = Duration::from_secs(10);

async fn slots(module: Option<PathBuf>, global: &Global, output: &mut Output) -> Result<(), Failure> {
    // A module given by name can be looked at before there is a configuration.
    let (configured, modules) = match (global.load(), module) {
        (Ok(config), Some(module)) => (vec![("authority", config.authority), ("agents", config.agents)], vec![module]),
        (Err(_), Some(module)) => (Vec::new(), vec![module]),
        (config, None) => {
            let config = config?;
            let mut modules = vec![config.authority.module.clone(), config.agents.module.clone()];
            modules.dedup();
            (vec![("authority", config.authority), ("agents", config.agents)], modules)
        }
    };
    let looked = tokio::task::spawn_blocking(move || {
        let loaded = Modules::new();
        let mut rows = Vec::new();
        for path in &modules {
            let seen = loaded.slots(path).map_err(|error| Failure::new(EXIT_UNAVAILABLE, error.to_string()))?;
            rows.extend(seen.into_iter().map(|slot| Slot::of(path, slot, &configured)));
        }
        let looked_at = configured.into_iter().filter(|(_, wanted)| modules.contains(&wanted.module));
        let missing: Vec<_> = looked_at.filter(|(role, _)| !rows.iter().any(|row| row.configured.contains(role))).collect();
        Ok::<_, Failure>((rows, missing))
    });
    let (rows, missing) = match tokio::time::timeout(SLOTS_DEADLINE, looked).await {
        Ok(Ok(rows)) => rows?,
        Ok(Err(error)) => return Err(Failure::error(error.to_string())),
        Err(_) => {
            return Err(Failure::new(EXIT_UNAVAILABLE, format!("the PKCS#11 module does not answer within {SLOTS_DEADLINE:?}")));
        }
    };
    output.show(&rows, |rows| {
        let cells: Vec<_> = rows.iter().map(Slot::cells).collect();
        table(&["SLOT", "TOKEN", "SERIAL", "MODEL", "STATE", "CONFIGURED"], &cells)
    })?;
    for (role, wanted) in missing {
        output.say(&not_there(role, &wanted));
    }
    Ok(())
}

/// A warning: the daemon would not find this token either, if its environment is the same.
fn not_there(role: &str, wanted: &config::Token) -> String {
    let serial = wanted.serial.as_ref().map(|serial| format!(" with serial {serial:?}")).unwrap_or_default();
    let hint = hsm::finds_tokens_by(&wanted.module).map(|hint| format!("; {hint}")).unwrap_or_default();
    format!("warning: hsm.{role} names token {:?}{serial}, which {} does not show{hint}", wanted.label, wanted.module.display())
}

impl Slot {
    fn of(module: &std::path::Path, slot: SlotSeen, configured: &[(&'static str, config::Token)]) -> Self {
        let (token, error) = match slot.token {
            Ok(token) => (Some(token), None),
            Err(error) => (None, Some(error)),
        };
        let named = |wanted: &config::Token| {
            let serial = |serial: &String| wanted.serial.as_ref().is_none_or(|wanted| wanted == serial);
            token.as_ref().is_some_and(|token| token.label == wanted.label && serial(&token.serial)) && wanted.module == module
        };
        let configured = configured.iter().filter(|(_, wanted)| named(wanted)).map(|(role, _)| *role).collect();
        Self {
            module: module.display().to_string(),
            slot: slot.id,
            description: slot.description,
            configured,
            error,
            initialised: token.as_ref().is_some_and(|token| token.initialised),
            pin: token.as_ref().and_then(|token| token.pin),
            label: token.as_ref().map(|token| token.label.clone()),
            serial: token.as_ref().map(|token| token.serial.clone()),
            model: token.map(|token| token.model),
        }
    }

    fn cells(&self) -> Vec<String> {
        let or_dash = |text: &Option<String>| text.clone().filter(|text| !text.is_empty()).unwrap_or_else(|| "-".into());
        let state = match (&self.error, self.pin, self.initialised) {
            (Some(error), _, _) => error.clone(),
            (None, Some(pin), _) => format!("PIN {pin}"),
            (None, None, true) => "initialised".into(),
            (None, None, false) => "not initialised".into(),
        };
        let configured = if self.configured.is_empty() { "-".into() } else { self.configured.join(", ") };
        vec![self.slot.to_string(), or_dash(&self.label), or_dash(&self.serial), or_dash(&self.model), state, configured]
    }
}

/// One question put to a token, and its answer.
#[derive(Serialize)]
struct Checked {
    role: &'static str,
    label: String,
    check: String,
    purpose: Option<&'static str>,
    passed: bool,
    error: Option<String>,
    micros: u64,
}

impl From<TokenCheck> for Checked {
    fn from(check: TokenCheck) -> Self {
        Self {
            role: role(check.role()),
            purpose: (check.purpose() != Purpose::Unspecified).then(|| purpose_name(check.purpose())),
            passed: check.error.is_empty(),
            label: check.label,
            check: check.name,
            error: (!check.error.is_empty()).then_some(check.error),
            micros: check.micros,
        }
    }
}

async fn test(signatures: Option<u32>, global: &Global, output: &mut Output) -> Result<(), Failure> {
    let mut daemon = Daemon::connect(global).await?;
    let request = TestTokensRequest { signatures: signatures.unwrap_or_default() };
    let answer = daemon.service.test_tokens(request).await.map_err(|status| daemon.failed(&status))?.into_inner();
    let checks: Vec<Checked> = answer.checks.into_iter().map(Checked::from).collect();
    output.show(&checks, |checks| {
        let cells = |check: &Checked| {
            let result =
                check.error.clone().unwrap_or_else(|| format!("passed, {}.{:03} ms", check.micros / 1000, check.micros % 1000));
            let of = check.purpose.map(|purpose| format!("{purpose} ")).unwrap_or_default();
            vec![check.role.to_owned(), check.label.clone(), format!("{of}{}", check.check), result]
        };
        table(&["TOKEN", "LABEL", "CHECK", "RESULT"], &checks.iter().map(cells).collect::<Vec<_>>())
    })?;
    match checks.iter().filter(|check| !check.passed).count() {
        _ if checks.is_empty() => Err(Failure::new(EXIT_UNAVAILABLE, "no token is open yet: see `keyward hsm status`")),
        0 => Ok(()),
        failed => Err(Failure::new(EXIT_UNAVAILABLE, format!("{failed} of {} checks failed", checks.len()))),
    }
}

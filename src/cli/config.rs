//! `keyward config`: check the configuration before the daemon does.

use std::path::PathBuf;

use clap::Subcommand;
use serde::Serialize;

use super::{Failure, Global, Output};
use crate::config::Config;

/// The verbs.
#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Tell every mistake at once; print the effective values where there is none.
    #[command(after_help = "Examples:\n  keyward config validate\n  keyward config validate ./keyward.toml")]
    Validate {
        /// The file [default: that of --config].
        file: Option<PathBuf>,
    },
}

#[derive(Serialize)]
struct Effective {
    hash: String,
    values: toml::Table,
}

pub(super) fn run(verb: Verb, global: &Global, output: &mut Output) -> Result<(), Failure> {
    let Verb::Validate { file } = verb;
    let path = file.unwrap_or_else(|| global.config.clone());
    let config = Config::load(&path).map_err(|errors| Failure::error(format!("{}:\n{errors}", path.display())))?;
    let text = config.effective();
    let values = toml::from_str(&text).map_err(|error| Failure::error(error.to_string()))?;
    output.show(&Effective { hash: config.hash.to_string(), values }, |_| text)?;
    output.say(&format!("{} is valid, SHA-256 {}", path.display(), config.hash));
    Ok(())
}

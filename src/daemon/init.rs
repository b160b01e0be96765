//! `keyward init`: the ledger's first entry, keys, authorities.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::acts::{self, Initialised, Root, Tokens};
use crate::config::Config;
use crate::hsm::{Hsm, Modules};
use crate::ledger::{self, Ledger};
use crate::model::{KeyId, Meter};
use crate::proto::TokenRole;

use super::rooms::{ledger_settings, token_settings};

/// What `init` was asked for.
#[derive(Debug, Default)]
pub struct InitAsk {
    /// The root is outside: hand out the issuing key's CSR.
    pub root_outside: bool,
    /// The outside root's certificate and the issuing certificate it signed, PEM files.
    pub signed: Option<(PathBuf, PathBuf)>,
}

/// Makes what is missing. Called again after an interruption it goes on; a complete one is refused.
///
/// # Errors
/// One sentence for the operator.
pub async fn initialise(config: &Config, ask: InitAsk) -> Result<Initialised, String> {
    crate::hsm::harden().map_err(|error| error.to_string())?;
    let state = &config.paths.state;
    std::fs::DirBuilder::create(
        std::os::unix::fs::DirBuilderExt::mode(std::fs::DirBuilder::new().recursive(true), 0o750),
        &config.paths.runtime,
    )
    .map_err(|error| format!("{}: {error}", config.paths.runtime.display()))?;
    match ledger::create(state, &config.trust_domain, KeyId::random().0) {
        Ok(()) => {}
        // An earlier call got this far.
        Err(ledger::StoreError::Exists(_)) => {}
        Err(error) => return Err(error.to_string()),
    }
    let root = match ask {
        InitAsk { signed: Some((root, issuing)), .. } => {
            Root::Signed { root: certificate(&root)?, issuing: certificate(&issuing)? }
        }
        InitAsk { root_outside: true, .. } => Root::Outside,
        InitAsk { .. } => Root::Own,
    };
    let meter = Arc::new(Meter::default());
    let opened = Ledger::open(&ledger_settings(config), Arc::clone(&meter)).map_err(|error| error.to_string())?;
    if opened.genesis.trust_domain != config.trust_domain.as_str() {
        return Err(format!("the ledger in {} is of trust domain {}", state.display(), opened.genesis.trust_domain));
    }
    let ledger = opened.ledger;
    acts::unlock(&ledger, config).await.map_err(told)?;
    let modules = Modules::new();
    let open = |role| Hsm::open(&modules, token_settings(config, role), Arc::clone(&meter)).map_err(|error| error.to_string());
    let authority = open(TokenRole::Authority)?;
    let shared = config.agents == config.authority;
    let agents = if shared { authority.clone() } else { open(TokenRole::Agents)? };
    let tokens = Tokens { authority, agents, shared };
    let done = acts::initialise(&ledger, &tokens, &config.trust_domain, state, root).await.map_err(told);
    let stopped = ledger.stop("init").await;
    ledger.finish(std::time::Duration::from_secs(5)).await;
    let deadline = std::time::Duration::from_secs(2);
    tokens.authority.shut_down(deadline);
    if !shared {
        tokens.agents.shut_down(deadline);
    }
    stopped.map_err(told).and(done)
}

fn told(refusal: crate::model::Refusal) -> String {
    let mut text = refusal.advice.clone();
    let mut cause = std::error::Error::source(&refusal);
    while let Some(error) = cause {
        text = format!("{text}: {error}");
        cause = error.source();
    }
    text
}

/// A certificate in PEM.
///
/// # Errors
/// That it is none, or cannot be read.
pub fn certificate(path: &Path) -> Result<Vec<u8>, String> {
    let read = std::fs::read(path).map_err(|error| format!("{}: {error}", path.display()))?;
    let parsed = pem::parse(read).ok().filter(|parsed| parsed.tag() == "CERTIFICATE");
    Ok(parsed.ok_or_else(|| format!("{} is no PEM certificate", path.display()))?.into_contents())
}

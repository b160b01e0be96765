//! An operator lets the daemon log in to a token once more, after a login that failed.

use crate::config::Config;
use crate::hsm;
use crate::ledger::Ledger;
use crate::model::Refusal;
use crate::proto::{self, Operator, TokenRole, entry::Body};

/// Records what operators asked for since the last look, and then lets the daemon log in. A crash at any moment leaves the wish to the next
/// start, which records it, again if need be, with the time at which it was asked for: meanwhile no login is tried.
///
/// # Errors
/// `LEDGER_UNAVAILABLE`, or `INTERNAL` when the state directory cannot be read or written: then the login stays locked.
pub async fn unlock(ledger: &Ledger, config: &Config) -> Result<(), Refusal> {
    for (role, token) in [(TokenRole::Authority, &config.authority), (TokenRole::Agents, &config.agents)] {
        let Some(asked) = in_state(config, move |state| hsm::asked_to_unlock(state, role)).await? else { continue };
        let entry = proto::HsmUnlocked {
            by: Some(Operator { uid: asked.uid, reason: asked.reason }),
            token: token.label.clone(),
            role: role.into(),
            asked_unix_micros: asked.at.micros(),
        };
        let index = ledger.record(Body::HsmUnlocked(entry)).await?;
        in_state(config, move |state| hsm::unlock(state, role)).await?;
        tracing::warn!(token = %token.label, uid = asked.uid, index, "an operator unlocked the login");
    }
    Ok(())
}

/// Off the runtime's threads: a disk may hang.
async fn in_state<T: Send + 'static>(
    config: &Config,
    work: impl FnOnce(&std::path::Path) -> std::io::Result<T> + Send + 'static,
) -> Result<T, Refusal> {
    let state = config.paths.state.clone();
    tokio::task::spawn_blocking(move || work(&state)).await.map_err(Refusal::internal)?.map_err(Refusal::internal)
}

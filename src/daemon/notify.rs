//! sd_notify(3): what a supervisor is told.

use sd_notify::NotifyState;

fn tell(states: &[NotifyState<'_>]) {
    if let Err(error) = sd_notify::notify(states) {
        tracing::debug!(%error, "sd_notify");
    }
}

/// Up, but not ready, and why.
pub(super) fn waiting(why: &str) {
    tell(&[NotifyState::Status(why)]);
}

/// Agents are served.
pub(super) fn ready() {
    tell(&[NotifyState::Ready, NotifyState::Status("ready")]);
}

/// On the way down.
pub(super) fn stopping() {
    tell(&[NotifyState::Stopping]);
}

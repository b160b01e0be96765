//! `keyward hsm unlock`: word to the daemon that it may log in once more, and what came of that.

use std::io::ErrorKind;
use std::path::Path;
use std::time::Duration;

use serde::Serialize;
use tokio::time::{Instant, sleep};

use super::agents::Daemon;
use super::failure::{EXIT_REFUSED, EXIT_UNAVAILABLE};
use super::hsm::Which;
use super::hsm_status::role;
use super::{Failure, Global, Output};
use crate::hsm::{self, Unlock};
use crate::proto::{StatusRequest, TokenRole, TokenStatus};

/// Longest wait for a running daemon to record an unlock and to log in.
const OUTCOME_DEADLINE: Duration = Duration::from_secs(10);
/// Between two looks at what came of it.
const LOOK: Duration = Duration::from_millis(100);

/// What was done, as JSON has it.
#[derive(Serialize)]
struct Unlocked {
    /// Tokens for which word was left.
    unlocked: Vec<&'static str>,
    /// Those of them that a running daemon has logged in to.
    logged_in: Vec<&'static str>,
    /// Those of them that refused the PIN again.
    refused: Vec<&'static str>,
    /// Those that somebody unlocked before, which no daemon has recorded yet: this unlock was not kept.
    not_kept: Vec<&'static str>,
}

impl Unlocked {
    fn text(&self) -> String {
        let came_of = |name: &&'static str| match () {
            () if self.logged_in.contains(name) => format!("{name}: logged in\n"),
            () if self.refused.contains(name) => format!("{name}: unlocked, and the PIN refused again\n"),
            () => format!("{name}: unlocked\n"),
        };
        let not_kept = self.not_kept.iter().map(|name| format!("{name}: unlocked before\n"));
        self.unlocked.iter().map(came_of).chain(not_kept).collect()
    }
}

/// What came of it.
#[derive(Default)]
struct Outcome {
    logged_in: Vec<TokenRole>,
    refused: Vec<TokenRole>,
}

/// Word that was left in the state directory.
struct Word {
    left: Vec<TokenRole>,
    /// What others left before, and no daemon has recorded yet: ours was not kept.
    before: Vec<(TokenRole, Unlock)>,
}

pub(super) async fn run(which: Which, reason: &str, global: &Global, output: &mut Output) -> Result<(), Failure> {
    let state = global.load()?.paths.state;
    // How often a PIN was refused so far: asked before anything can come of this.
    let mut daemon = Daemon::connect(global).await.ok();
    let seen = match &mut daemon {
        Some(daemon) => tokens(daemon).await?,
        None => Vec::new(),
    };
    let word = leave_word(which, reason, &state)?;
    let mut came = Outcome::default();
    let outcome = match daemon {
        _ if word.left.is_empty() => {
            output.say(if word.before.is_empty() { "no login was locked" } else { "nothing was unlocked" });
            Ok(())
        }
        None => {
            output.say("no daemon answers: it logs in again when it is started next");
            Ok(())
        }
        Some(mut daemon) => follow(&mut daemon, &state, &word.left, &seen, &mut came).await,
    };
    let names = |roles: &[TokenRole]| roles.iter().copied().map(role).collect();
    let unlocked = Unlocked {
        unlocked: names(&word.left),
        logged_in: names(&came.logged_in),
        refused: names(&came.refused),
        not_kept: word.before.iter().map(|(of, _)| role(*of)).collect(),
    };
    output.show(&unlocked, Unlocked::text)?;
    outcome?;
    match word.before.first() {
        None => Ok(()),
        Some((of, earlier)) => Err(not_kept(*of, earlier)),
    }
}

/// An unlock that is not in the ledger yet is not replaced: it is somebody's act, with somebody's reason.
fn not_kept(of: TokenRole, earlier: &Unlock) -> Failure {
    let reason = if earlier.reason.is_empty() { String::new() } else { format!(" with reason {:?}", earlier.reason) };
    let message = format!(
        "{} was unlocked before by uid {}{reason}, which the daemon has not recorded yet; this unlock and its reason were not kept",
        role(of),
        earlier.uid
    );
    Failure::new(EXIT_REFUSED, message)
}

fn leave_word(which: Which, reason: &str, state: &Path) -> Result<Word, Failure> {
    let mut word = Word { left: Vec::new(), before: Vec::new() };
    let unusable = |error| Failure::error(format!("{} cannot be used: {error}", state.display()));
    for (token, of) in [(Which::Authority, TokenRole::Authority), (Which::Agents, TokenRole::Agents)] {
        if which != Which::All && which != token {
            continue;
        }
        match hsm::ask_to_unlock(state, of, reason) {
            Ok(true) => word.left.push(of),
            Ok(false) => {}
            Err(error) if error.kind() == ErrorKind::AlreadyExists => {
                // Recorded since, it is gone: then there is nothing to say of it but that.
                let earlier = hsm::asked_to_unlock(state, of).map_err(unusable)?;
                let gone = || Failure::error("another unlock was recorded this moment; see `keyward hsm status`");
                word.before.push((of, earlier.ok_or_else(gone)?));
            }
            Err(error) => return Err(unusable(error)),
        }
    }
    Ok(word)
}

async fn tokens(daemon: &mut Daemon) -> Result<Vec<TokenStatus>, Failure> {
    let answer = daemon.service.status(StatusRequest {}).await;
    Ok(answer.map_err(|status| daemon.failed(&status))?.into_inner().tokens)
}

/// Until each token is logged in to, its PIN is refused again, or the deadline has passed.
async fn follow(
    daemon: &mut Daemon,
    state: &Path,
    of: &[TokenRole],
    seen: &[TokenStatus],
    came: &mut Outcome,
) -> Result<(), Failure> {
    let until = Instant::now() + OUTCOME_DEADLINE;
    let mut waiting = of.to_vec();
    loop {
        let now = tokens(daemon).await.map_err(|gone| gone.and_then_said("it logs in again when it is started next"))?;
        waiting.retain(|one| {
            // Until it is recorded nothing comes of it.
            let recorded = matches!(hsm::asked_to_unlock(state, *one), Ok(None));
            let Some(token) = now.iter().find(|token| token.role() == *one).filter(|_| recorded) else { return true };
            if token.usable {
                came.logged_in.push(*one);
            } else if refusals(&now, *one) > refusals(seen, *one) {
                came.refused.push(*one);
            } else {
                return true;
            }
            false
        });
        if let Some(one) = came.refused.first() {
            let message = format!("{}: the PIN was refused again; correct it, then `keyward hsm unlock` once more", role(*one));
            return Err(Failure::new(EXIT_UNAVAILABLE, message));
        }
        let Some(one) = waiting.first() else { return Ok(()) };
        if Instant::now() >= until {
            let fault = now.iter().find(|token| token.role() == *one).map(|token| token.fault.as_str()).unwrap_or_default();
            let message = format!("{}: not logged in after {OUTCOME_DEADLINE:?}: {fault}; see `keyward hsm status`", role(*one));
            return Err(Failure::new(EXIT_UNAVAILABLE, message));
        }
        sleep(LOOK).await;
    }
}

/// How often a token has refused its PIN, as far as the daemon remembers.
fn refusals(tokens: &[TokenStatus], of: TokenRole) -> u64 {
    let of_role = tokens.iter().filter(|token| token.role() == of);
    of_role
        .flat_map(|token| {
            let refused = hsm::Error::PinIncorrect { label: token.label.clone() }.to_string();
            token.faults.iter().filter(move |seen| seen.fault == refused).map(|seen| seen.count)
        })
        .sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn word_is_left_for_the_named_token_and_does_not_replace_what_was_left_before() {
        let directory = tempfile::tempdir().expect("a directory");
        let state = directory.path();
        let markers = ["authority", "agents"].map(|name| state.join(format!("pin-pending-{name}")));
        for marker in &markers {
            std::fs::write(marker, "").expect("written");
        }
        let asked = || [TokenRole::Authority, TokenRole::Agents].map(|role| hsm::asked_to_unlock(state, role).expect("read"));
        let word = leave_word(Which::Authority, "the first", state).expect("left");
        assert_eq!((word.left, word.before.len()), (vec![TokenRole::Authority], 0));
        assert!(matches!(asked(), [Some(unlock), None] if unlock.reason == "the first"));
        let word = leave_word(Which::All, "another", state).expect("left");
        assert_eq!(word.left, [TokenRole::Agents]);
        let told = not_kept(word.before[0].0, &word.before[0].1).to_string();
        assert!(told.contains("authority") && told.contains("the first") && told.contains("not kept"), "{told}");
        assert!(matches!(asked(), [Some(one), Some(other)] if one.reason == "the first" && other.reason == "another"));
        assert!(markers.iter().all(|marker| marker.exists()), "the daemon removes them, when it has recorded it");
    }
}

use super::*;
use crate::cli::Format;
use crate::client::agent::tests::{Seen, serve};
use std::io::Write;
use std::path::Path;
use std::sync::{Arc, Mutex};

fn card(not_before: u64, not_after: u64) -> Card {
    Card {
        version: 1,
        agent: "coder/7".into(),
        spiffe_id: String::new(),
        trust_domain: String::new(),
        epoch: 1,
        next_sequence: 1,
        ledger_index: 1,
        not_before_unix_seconds: not_before,
        not_after_unix_seconds: not_after,
        bundle_sequence: 1,
        addresses: Vec::new(),
        token_id: String::new(),
    }
}

#[test]
fn a_renewal_is_due_around_half_life() {
    for _ in 0..100 {
        let due = due(&card(1_000, 2_000), UnixTime::from_seconds(1_000)).seconds();
        assert!((1_400..=1_600).contains(&due), "{due}");
    }
}

#[test]
fn a_certificate_shorter_than_it_is_backdated_is_not_renewed_again_at_once() {
    for _ in 0..100 {
        let due = due(&card(970, 1_010), UnixTime::from_seconds(1_000)).0;
        assert!((1_002_000_000..=1_005_000_000).contains(&due), "{due}");
    }
}

#[test]
fn waits_grow_and_stay_below_a_minute_and_heed_what_the_daemon_asks() {
    let mut back_off = BackOff::default();
    let waits: Vec<_> = (0..40).map(|_| back_off.next(None)).collect();
    assert!(waits[0] <= BACK_OFF_FIRST && waits[39] >= BACK_OFF_MAX / 2 && waits.iter().all(|wait| *wait <= BACK_OFF_MAX));
    assert_eq!(BackOff::default().next(Some(Duration::from_secs(20))), Duration::from_secs(20));
}

#[test]
fn actions_are_understood_or_refused() {
    assert_eq!(Reaction::parse("signal:HUP"), Ok(Reaction::Signal(Signal::HUP)));
    assert_eq!((Reaction::parse("restart"), Reaction::parse("none")), (Ok(Reaction::Restart), Ok(Reaction::Nothing)));
    assert!(Reaction::parse("signal:KILL").is_err() && Reaction::parse("").is_err());
}

/// A supervisor of a shell script, its directory, and what its server saw.
async fn supervised(
    lifetime_seconds: u64,
    on_renew: Reaction,
    script: &str,
) -> (tempfile::TempDir, Supervisor, Arc<Mutex<Seen>>) {
    supervised_for(lifetime_seconds, (on_renew, None), script).await
}

/// The same with what is to be done about bundles.
async fn supervised_for(
    lifetime_seconds: u64,
    reactions: (Reaction, Option<Reaction>),
    script: &str,
) -> (tempfile::TempDir, Supervisor, Arc<Mutex<Seen>>) {
    let root = tempfile::tempdir().expect("a directory");
    let (join, seen) = serve().await;
    seen.lock().expect("not poisoned").lifetime_seconds = lifetime_seconds;
    let path = root.path().join("join");
    JoinFile::create(&path).expect("made").write_all(&join.to_json().expect("json")).expect("written");
    let command = ["sh", "-c", script, "sh", root.path().to_str().expect("text")].map(OsString::from).to_vec();
    let supervisor = Supervisor::new(root.path().join("agent"), Some(path), 0, reactions, command).expect("a supervisor");
    (root, supervisor, seen)
}

fn output() -> Output {
    Output::of_process(Format::Table)
}

fn is_running(pid_file: &Path) -> bool {
    let pid = std::fs::read_to_string(pid_file).expect("a pid");
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.trim())).unwrap_or_default();
    stat.rsplit(')').next().is_some_and(|rest| !rest.is_empty() && !rest.trim_start().starts_with(['Z', 'X']))
}

#[tokio::test]
async fn the_command_finds_its_files_and_its_exit_code_is_passed_on() {
    let script = r#"test -s "$KEYWARD_SVID" && test -s "$KEYWARD_KEY" && test -s "$KEYWARD_BUNDLE" && exit 42"#;
    let (_root, supervisor, _seen) = supervised(600, Reaction::Nothing, script).await;
    assert_eq!(supervisor.run(&mut output()).await.expect("ran"), ExitCode::from(42));
}

#[tokio::test]
async fn the_command_is_told_of_a_renewal() {
    let script = r#"trap "exit 7" USR1; while :; do sleep 0.05; done"#;
    let (_root, supervisor, seen) = supervised(3, Reaction::Signal(Signal::USR1), script).await;
    assert_eq!(supervisor.run(&mut output()).await.expect("ran"), ExitCode::from(7));
    assert_eq!(seen.lock().expect("not poisoned").asks.len(), 2);
}

#[tokio::test]
async fn a_quarantine_kills_all_that_the_command_spawned() {
    let script = r#"trap "" TERM; sleep 1000 & echo $! > "$1/pid"; wait"#;
    let (root, supervisor, seen) = supervised(3, Reaction::Nothing, script).await;
    seen.lock().expect("not poisoned").quarantined_after = Some(1);
    let failure = supervisor.run(&mut output()).await.expect_err("quarantined");
    assert_eq!(failure.exit_code(), ExitCode::from(EXIT_REFUSED));
    assert!(failure.to_string().contains("AGENT_QUARANTINED"), "{failure}");
    // SIGKILL was sent to the group; that it was obeyed is not announced for a grandchild.
    let gone = async {
        while is_running(&root.path().join("pid")) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(10), gone).await.expect("the grandchild is gone");
}

#[tokio::test]
async fn an_expired_certificate_is_replaced_before_the_command_starts() {
    let (root, supervisor, seen) = supervised(0, Reaction::Nothing, "exit 0").await;
    let join = JoinFile::read(&root.path().join("join")).expect("read");
    Client::new(AgentDir::open(&root.path().join("agent"), true).expect("opened")).attest(&join, 0).await.expect("attested");
    seen.lock().expect("not poisoned").lifetime_seconds = 600;
    supervisor.run(&mut output()).await.expect("ran");
    assert_eq!(seen.lock().expect("not poisoned").asks.len(), 2);
}

/// Waits for what the command writes.
async fn appears(path: &Path) {
    let there = async {
        while !path.exists() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(10), there).await.expect("it is there");
}

#[tokio::test]
async fn the_command_is_told_of_a_new_bundle_and_finds_it_in_its_file() {
    let script = r#"
        trap 'exit $(grep -c BEGIN "$KEYWARD_BUNDLE")' USR2
        touch "$1/ready"; while :; do sleep 0.05; done"#;
    for reactions in [(Reaction::Signal(Signal::USR2), None), (Reaction::Nothing, Some(Reaction::Signal(Signal::USR2)))] {
        let (root, supervisor, seen) = supervised_for(600, reactions, script).await;
        let ready = root.path().join("ready");
        let change = async {
            appears(&ready).await;
            seen.lock().expect("not poisoned").one_more_authority();
        };
        let mut output = output();
        let (code, ()) = tokio::join!(supervisor.run(&mut output), change);
        assert_eq!(code.expect("ran"), ExitCode::from(2));
        assert_eq!(seen.lock().expect("not poisoned").asks.len(), 1, "nothing was renewed for it");
    }
}

#[tokio::test]
async fn a_command_that_is_not_to_be_told_of_a_bundle_is_left_alone() {
    let script = r#"
        trap 'exit 9' USR1
        touch "$1/ready"; until [ "$(grep -c BEGIN "$KEYWARD_BUNDLE")" = 2 ]; do sleep 0.05; done"#;
    let reactions = (Reaction::Signal(Signal::USR1), Some(Reaction::Nothing));
    let (root, supervisor, seen) = supervised_for(600, reactions, script).await;
    let ready = root.path().join("ready");
    let change = async {
        appears(&ready).await;
        seen.lock().expect("not poisoned").one_more_authority();
    };
    let mut output = output();
    let (code, ()) = tokio::join!(supervisor.run(&mut output), change);
    assert_eq!(code.expect("ran"), ExitCode::SUCCESS);
}

#[tokio::test]
async fn a_bundle_that_a_renewal_brought_is_told_as_well() {
    let script = r#"trap 'exit 8' USR2; touch "$1/ready"; while :; do sleep 0.05; done"#;
    let reactions = (Reaction::Nothing, Some(Reaction::Signal(Signal::USR2)));
    let (root, supervisor, seen) = supervised_for(3, reactions, script).await;
    seen.lock().expect("not poisoned").mute = true;
    let ready = root.path().join("ready");
    let change = async {
        appears(&ready).await;
        seen.lock().expect("not poisoned").one_more_authority();
    };
    let mut output = output();
    let (code, ()) = tokio::join!(supervisor.run(&mut output), change);
    assert_eq!(code.expect("ran"), ExitCode::from(8));
}

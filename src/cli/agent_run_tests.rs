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

/// Numbers as even as random ones are.
fn randoms(count: u32) -> impl Iterator<Item = u32> {
    (0..count).map(move |n| u32::MAX / count * n)
}

#[test]
fn a_renewal_is_due_around_half_life() {
    for random in randoms(100).chain([u32::MAX]) {
        let due = due(&card(1_000, 2_000), UnixTime::from_seconds(1_000), random).seconds();
        assert!((1_400..=1_600).contains(&due), "{due}");
    }
}

#[test]
fn a_certificate_shorter_than_it_is_backdated_is_not_renewed_again_at_once() {
    for random in randoms(100).chain([u32::MAX]) {
        let due = due(&card(970, 1_010), UnixTime::from_seconds(1_000), random).0;
        assert!((1_002_000_000..=1_005_000_000).contains(&due), "{due}");
    }
}

/// How many of `agents` do it in the busiest tenth of a second.
fn busiest(agents: u32, moment: impl Fn(u32) -> u64) -> usize {
    let mut tenths = std::collections::BTreeMap::new();
    for random in randoms(agents) {
        *tenths.entry(moment(random) / 100_000).or_insert(0) += 1;
    }
    tenths.into_values().max().unwrap_or_default()
}

#[test]
fn ten_thousand_agents_do_not_renew_in_the_same_moment() {
    let (now, hour, ten_minutes) = (UnixTime::from_seconds(1_000), card(1_000, 4_600), card(1_000, 1_600));
    // Certified together; or told of the same bundle, or rejected, in the same moment.
    assert!(busiest(10_000, |random| due(&hour, now, random).0) <= 2, "over twelve minutes");
    assert!(busiest(10_000, |random| due(&ten_minutes, now, random).0) <= 10, "over two minutes");
    assert!(busiest(10_000, |random| soon(&hour, now, random).0) <= 7, "over three minutes");
    assert!(busiest(10_000, |random| soon(&ten_minutes, now, random).0) <= 18, "over a minute");
    let window = Duration::from_secs(900);
    assert!(busiest(10_000, |random| before(window, now, random).0) <= 3, "over half of a taint's window");
    for random in [0, u32::MAX] {
        assert!((1_000..1_450).contains(&before(window, now, random).seconds()));
        assert!((1_000..1_180).contains(&soon(&card(1_000, 90_000), now, random).seconds()));
    }
}

#[test]
fn waits_grow_and_stay_below_a_minute_and_heed_what_the_daemon_asks() {
    let mut back_off = BackOff::default();
    let waits: Vec<_> = (0..40).map(|_| back_off.next(None)).collect();
    assert!(waits[0] <= BACK_OFF_FIRST && waits[39] >= BACK_OFF_MAX / 2 && waits.iter().all(|wait| *wait <= BACK_OFF_MAX));
    // It asks the same of thousands: none comes sooner, and they do not come together.
    for (asked, most) in [(1, 75), (20, 11)] {
        let asked = Duration::from_secs(asked);
        let wait = |random| BackOff::default().next_of(Some(asked), random);
        assert!(randoms(100).all(|random| (asked..asked * 3 / 2).contains(&wait(random))));
        let busiest = busiest(1_000, |random| u64::try_from(wait(random).as_micros()).unwrap());
        assert!(busiest <= most * 3, "{busiest} of a thousand");
    }
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

/// Of the certificate that is held nothing is left but its key: that still does.
#[tokio::test]
async fn a_certificate_whose_authority_has_left_the_bundle_is_replaced_long_before_its_half_life() {
    let script = r#"trap 'exit 7' USR1; touch "$1/ready"; while :; do sleep 0.05; done"#;
    let (root, supervisor, seen) = supervised_for(60, (Reaction::Signal(Signal::USR1), Some(Reaction::Nothing)), script).await;
    seen.lock().expect("not poisoned").certify_by_another();
    let (ready, out) = (root.path().join("ready"), root.path().join("agent"));
    let change = async {
        appears(&ready).await;
        assert!(holding_in(&out).expect("held").ends_in_the_bundle());
        seen.lock().expect("not poisoned").distrust_the_other();
        Instant::now()
    };
    let mut output = output();
    let (code, from) = tokio::join!(supervisor.run(&mut output), change);
    assert_eq!(code.expect("ran"), ExitCode::from(7));
    assert!(from.elapsed() < Duration::from_secs(12), "{:?}: half-life is not before 18 s", from.elapsed());
    assert!(holding_in(&out).expect("held").ends_in_the_bundle());
}

/// Told on the stream, before it is too late.
#[tokio::test]
async fn a_certificate_whose_authority_is_tainted_is_replaced_within_half_of_the_time_that_is_left() {
    let script = r#"trap 'exit 7' USR1; touch "$1/ready"; while :; do sleep 0.05; done"#;
    let (root, supervisor, seen) = supervised_for(600, (Reaction::Signal(Signal::USR1), Some(Reaction::Nothing)), script).await;
    let ready = root.path().join("ready");
    let change = async {
        appears(&ready).await;
        let mut seen = seen.lock().expect("not poisoned");
        seen.renew_within_seconds = 4;
        seen.bundle.send_modify(|_| ());
        Instant::now()
    };
    let mut output = output();
    let both = async { tokio::join!(supervisor.run(&mut output), change) };
    let (code, from) = timeout(Duration::from_secs(20), both).await.expect("half-life is not before 240 s");
    assert_eq!(code.expect("ran"), ExitCode::from(7));
    assert!(from.elapsed() < Duration::from_secs(4), "{:?}", from.elapsed());
    assert_eq!(seen.lock().expect("not poisoned").asks.len(), 2);
}

#[tokio::test]
async fn somebody_on_the_path_does_not_end_a_command_whose_certificate_is_good() {
    let script = r#"trap 'exit 7' USR1; touch "$1/ready"; while :; do sleep 0.05; done"#;
    let (root, supervisor, seen) = supervised(6, Reaction::Signal(Signal::USR1), script).await;
    let ready = root.path().join("ready");
    let change = async {
        appears(&ready).await;
        seen.lock().expect("not poisoned").impostor = true;
        while seen.lock().expect("not poisoned").imposed < 2 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        seen.lock().expect("not poisoned").impostor = false;
    };
    let mut output = output();
    let both = async { tokio::join!(supervisor.run(&mut output), change) };
    let (code, ()) = timeout(Duration::from_secs(30), both).await.expect("renewed");
    assert_eq!(code.expect("ran"), ExitCode::from(7));
}

#[tokio::test]
async fn with_somebody_on_the_path_a_command_ends_when_its_certificate_does() {
    let script = r#"touch "$1/ready"; while :; do sleep 0.05; done"#;
    let (root, supervisor, seen) = supervised(4, Reaction::Nothing, script).await;
    let (ready, out) = (root.path().join("ready"), root.path().join("agent"));
    let change = async {
        appears(&ready).await;
        seen.lock().expect("not poisoned").impostor = true;
    };
    let mut output = output();
    let both = async { tokio::join!(supervisor.run(&mut output), change) };
    let (ended, ()) = timeout(Duration::from_secs(30), both).await.expect("at its end");
    let failure = ended.expect_err("nobody to renew with");
    assert!(failure.to_string().contains("is not the keyward that is trusted here"), "{failure}");
    assert!(holding_in(&out).expect("held").card.is_expired(UnixTime::wall()), "not before");
    assert!(seen.lock().expect("not poisoned").imposed > 1);
}

/// As with a full disk: where a file is to be written, for a while nothing can be.
fn nothing_can_be_written_at(path: &Path) {
    std::fs::create_dir(path).expect("in the way");
}

#[tokio::test]
async fn a_renewal_that_could_not_be_kept_is_asked_for_again_and_the_command_goes_on() {
    let script = r#"trap 'exit 7' USR1; touch "$1/ready"; while :; do sleep 0.05; done"#;
    let (root, supervisor, seen) = supervised(6, Reaction::Signal(Signal::USR1), script).await;
    let (ready, out) = (root.path().join("ready"), root.path().join("agent"));
    let change = async {
        appears(&ready).await;
        let obstacle = out.join(".current.new");
        nothing_can_be_written_at(&obstacle);
        while seen.lock().expect("not poisoned").asks.len() < 3 {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        std::fs::remove_dir(obstacle).expect("room again");
    };
    let mut output = output();
    let both = async { tokio::join!(supervisor.run(&mut output), change) };
    let (code, ()) = timeout(Duration::from_secs(30), both).await.expect("renewed");
    assert_eq!(code.expect("ran"), ExitCode::from(7));
    let asks = &seen.lock().expect("not poisoned").asks;
    assert!(asks[2..].iter().all(|ask| *ask == asks[1]), "another key under the same sequence would look like a clone");
}

#[tokio::test]
async fn with_a_disk_that_takes_nothing_a_command_ends_when_its_certificate_does() {
    let script = r#"touch "$1/ready"; while :; do sleep 0.05; done"#;
    let (root, supervisor, seen) = supervised(10, Reaction::Nothing, script).await;
    let (ready, out) = (root.path().join("ready"), root.path().join("agent"));
    let change = async {
        appears(&ready).await;
        nothing_can_be_written_at(&out.join(".next.key.new"));
    };
    let mut output = output();
    let both = async { tokio::join!(supervisor.run(&mut output), change) };
    let (ended, ()) = timeout(Duration::from_secs(30), both).await.expect("at its end");
    let failure = ended.expect_err("nothing to renew with");
    assert!(failure.to_string().contains("next.key"), "{failure}");
    assert!(holding_in(&out).expect("held").card.is_expired(UnixTime::wall()), "not before");
    assert_eq!(seen.lock().expect("not poisoned").asks.len(), 1, "nothing is sent that is not durable");
}

#[tokio::test]
async fn a_command_is_not_started_with_a_certificate_whose_authority_has_left_the_bundle() {
    let (root, supervisor, seen) = supervised(600, Reaction::Nothing, "exit 0").await;
    let join = JoinFile::read(&root.path().join("join")).expect("read");
    seen.lock().expect("not poisoned").certify_by_another();
    let dir = || AgentDir::open(&root.path().join("agent"), true).expect("opened");
    Client::new(dir()).attest(&join, 0).await.expect("attested");
    seen.lock().expect("not poisoned").distrust_the_other();
    let bundle = seen.lock().expect("not poisoned").bundle.borrow().clone();
    assert!(dir().keep_bundle(&bundle).expect("kept"));
    supervisor.run(&mut output()).await.expect("ran");
    assert!(dir().holding().expect("held").ends_in_the_bundle());
}

/// So a daemon ends the streams under an authority that it trusts no more, before it could tell the bundle without it.
#[tokio::test]
async fn a_certificate_that_is_rejected_where_the_bundle_is_followed_is_replaced_and_the_next_one_follows_at_once() {
    let script = r#"trap 'exit 7' USR1; touch "$1/ready"; while :; do sleep 0.05; done"#;
    let (root, supervisor, seen) = supervised_for(60, (Reaction::Nothing, Some(Reaction::Signal(Signal::USR1))), script).await;
    let ready = root.path().join("ready");
    let refuse = |reason| {
        let mut seen = seen.lock().expect("not poisoned");
        seen.refuse_watches = reason;
        seen.bundle.send_modify(|_| ());
    };
    let asked = |what: fn(&Seen) -> usize, wanted| {
        let seen = &seen;
        async move {
            while what(&seen.lock().expect("not poisoned")) < wanted {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    };
    let change = async {
        appears(&ready).await;
        timeout(Duration::from_secs(10), asked(|seen| seen.watches, 1)).await.expect("followed");
        refuse(Some("UNAUTHENTICATED"));
        timeout(Duration::from_secs(12), asked(|seen| seen.asks.len(), 2)).await.expect("half-life is not before 18 s");
        refuse(None);
        let seen = seen.lock().expect("not poisoned");
        assert_eq!(seen.watches_before, [0, 1], "with what was rejected it is not tried again");
        seen.one_more_authority();
    };
    let mut output = output();
    let (code, ()) = tokio::join!(supervisor.run(&mut output), change);
    assert_eq!(code.expect("ran"), ExitCode::from(7));
}

#[tokio::test]
async fn a_command_that_ignores_its_end_is_killed_and_started_again() {
    let script = r#"
        trap "" TERM; echo >> "$1/starts"; test "$(wc -l < "$1/starts")" = 2 && exit 5
        touch "$1/ready"; while :; do sleep 0.05; done"#;
    let (root, mut supervisor, seen) = supervised_for(600, (Reaction::Nothing, Some(Reaction::Restart)), script).await;
    supervisor.grace = Duration::from_millis(200);
    let ready = root.path().join("ready");
    let change = async {
        appears(&ready).await;
        seen.lock().expect("not poisoned").one_more_authority();
    };
    let mut output = output();
    let (code, ()) = tokio::join!(supervisor.run(&mut output), change);
    assert_eq!(code.expect("ran"), ExitCode::from(5));
}

#[tokio::test]
async fn a_quarantine_does_not_wait_for_a_command_that_takes_its_time_to_end() {
    let script = r#"trap "touch $1/told" TERM; touch "$1/ready"; while :; do sleep 0.05; done"#;
    let (root, mut supervisor, seen) = supervised_for(600, (Reaction::Nothing, Some(Reaction::Restart)), script).await;
    supervisor.grace = Duration::from_secs(600);
    let (ready, told) = (root.path().join("ready"), root.path().join("told"));
    let change = async {
        appears(&ready).await;
        seen.lock().expect("not poisoned").one_more_authority();
        appears(&told).await;
        let mut seen = seen.lock().expect("not poisoned");
        seen.refuse_watches = Some("AGENT_QUARANTINED");
        seen.bundle.send_modify(|_| ());
    };
    let mut output = output();
    let both = async { tokio::join!(supervisor.run(&mut output), change) };
    let (ended, ()) = timeout(Duration::from_secs(20), both).await.expect("at once");
    assert_eq!(ended.expect_err("quarantined").exit_code(), ExitCode::from(EXIT_REFUSED));
}

#[tokio::test]
async fn a_bundle_that_cannot_be_kept_is_told_and_is_not_asked_for_all_the_time() {
    let (_root, supervisor, seen) = supervised(600, Reaction::Nothing, "").await;
    supervisor.first_credentials(&mut output()).await.expect("held");
    let obstacle = supervisor.out.join("current/.bundle.pem.new");
    nothing_can_be_written_at(&obstacle);
    seen.lock().expect("not poisoned").one_more_authority();
    let (tell, mut heard) = mpsc::channel(1);
    let mut following = JoinSet::new();
    following.spawn(follow(supervisor.out.clone(), tell, Arc::new(Notify::new())));
    let told = timeout(Duration::from_secs(20), heard.recv()).await.expect("after three failures");
    let Some(Heard::Silence(client::Error::Store(error))) = told else { panic!("not of the directory") };
    assert!(error.to_string().contains("bundle.pem"), "{error}");
    assert_eq!(seen.lock().expect("not poisoned").watches, 3);
    std::fs::remove_dir(obstacle).expect("room again");
    let told = timeout(Duration::from_secs(20), heard.recv()).await.expect("with the next stream");
    assert!(matches!(told, Some(Heard::Bundle(6))));
}

/// Each address costs 5 s, for the renewal and for the rejoining: that is a long time for a bad agent.
#[tokio::test]
async fn a_quarantine_does_not_wait_for_a_renewal_that_nobody_answers() {
    let script = r#"touch "$1/ready"; while :; do sleep 0.05; done"#;
    let (root, supervisor, seen) = supervised(6, Reaction::Nothing, script).await;
    let ready = root.path().join("ready");
    let becomes = |what: fn(&Seen) -> bool| {
        let seen = &seen;
        async move {
            while !what(&seen.lock().expect("not poisoned")) {
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
        }
    };
    let change = async {
        appears(&ready).await;
        becomes(|seen| seen.watches == 1).await;
        seen.lock().expect("not poisoned").black_hole = true;
        becomes(|seen| seen.swallowed > 0).await;
        let mut seen = seen.lock().expect("not poisoned");
        seen.refuse_watches = Some("AGENT_QUARANTINED");
        seen.bundle.send_modify(|_| ());
        Instant::now()
    };
    let mut output = output();
    let both = async { tokio::join!(supervisor.run(&mut output), change) };
    let (ended, from) = timeout(Duration::from_secs(30), both).await.expect("ended");
    assert_eq!(ended.expect_err("quarantined").exit_code(), ExitCode::from(EXIT_REFUSED));
    assert!(from.elapsed() < Duration::from_secs(4), "{:?}: the renewal was waited for", from.elapsed());
}

/// It may have done its work: that is not done twice.
#[tokio::test]
async fn a_command_that_has_ended_by_itself_is_not_started_again_for_what_comes_in_the_same_moment() {
    let (_root, supervisor, _seen) = supervised(600, Reaction::Restart, "exit 6").await;
    supervisor.first_credentials(&mut output()).await.expect("held");
    let mut running = supervisor.start().expect("started");
    let pid = Pid::from_raw(i32::try_from(running.child.id().expect("it runs")).expect("small")).expect("a pid");
    // Its end is there, and nobody has taken note of it.
    let look = rustix::process::WaitIdOptions::EXITED | rustix::process::WaitIdOptions::NOWAIT;
    let ended = tokio::task::spawn_blocking(move || rustix::process::waitid(rustix::process::WaitId::Pid(pid), look).is_ok());
    assert!(ended.await.expect("looked"));
    supervisor.react(&mut running, &[Some(Reaction::Restart)]).expect("nothing was done");
    assert!(running.restarts.is_none());
    assert_eq!(running.child.wait().await.expect("ended").code(), Some(6));
}

#[tokio::test]
async fn what_a_command_leaves_behind_ends_with_it() {
    let script = r#"trap "" TERM HUP; sleep 1000 & echo $! > "$1/pid"; exit 4"#;
    let (root, supervisor, _seen) = supervised(600, Reaction::Nothing, script).await;
    assert_eq!(supervisor.run(&mut output()).await.expect("ran"), ExitCode::from(4));
    let gone = async {
        while is_running(&root.path().join("pid")) {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    };
    timeout(Duration::from_secs(10), gone).await.expect("it is gone");
}

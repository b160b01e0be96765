use super::*;

const NOW: UnixTime = UnixTime::from_seconds(1_800_000_000);

fn generation(id: u8, purpose: Purpose, state: State) -> Generation {
    Generation {
        key_id: KeyId([id; 16]),
        purpose,
        state,
        since: NOW,
        certificate: Vec::new(),
        issuer: None,
        checkpoint: String::new(),
        tainted: false,
        now: false,
    }
}

/// A root and an issuing authority under it, both active.
fn house() -> Vec<Generation> {
    let issuing = Generation { issuer: Some(KeyId([1; 16])), ..generation(2, Purpose::Issuing, State::Active) };
    vec![generation(1, Purpose::Root, State::Active), issuing]
}

fn rotation() -> Rotation {
    let text = "[trust]\ndomain = \"a.b\"\n[hsm.authority]\nmodule = \"/m\"\ntoken = \"t\"\npin_file = \"/p\"\n[rotation]\njitter_seconds = 0\n";
    crate::config::Config::parse(text).expect("a configuration").rotation
}

fn next_of(all: &[Generation], at: usize, rotation: &Rotation) -> Arrow {
    let terms = Terms { rotation, ttl_seconds_longest: 600, paused: false, now: NOW, freed: Vec::new() };
    next(&all[at], all, &terms).expect("an arrow")
}

#[test]
fn an_authority_is_replaced_by_age_in_the_window_and_one_at_a_time() {
    let mut rotation = rotation();
    let mut all = house();
    let by_age = NOW.plus_seconds(90 * 86_400);
    assert_eq!(next_of(&all, 1, &rotation), arrow(State::Retiring, Some(by_age), false));
    // 1,800,000,000 is 08:00 UTC.
    let text = include_str!("../../scripts/keyward.toml").replace("window = \"\"", "window = \"09:00-10:00\"");
    rotation.window = crate::config::Config::parse(&text).expect("a window").rotation.window;
    assert_eq!(next_of(&all, 1, &rotation).at, Some(by_age.plus_seconds(3_600)));
    // One on its way: no second one is planned, however old the first is.
    all.push(generation(3, Purpose::Issuing, State::Planned));
    assert_eq!(next_of(&all, 1, &rotation).at, None);
    all[2].state = State::Prepublished;
    let terms =
        Terms { rotation: &rotation, ttl_seconds_longest: 600, paused: false, now: NOW.plus_seconds(86_400), freed: Vec::new() };
    assert!(!next(&all[1], &all, &terms).expect("an arrow").is_due(&terms));
}

#[test]
fn a_root_is_in_the_bundle_before_it_signs_and_brings_an_issuing_authority_along() {
    let rotation = rotation();
    let mut all = house();
    all.push(generation(3, Purpose::Root, State::Prepublished));
    assert_eq!(next_of(&all, 2, &rotation).at, Some(NOW.plus_seconds(PREPUBLISH_SECONDS)));
    // Who renews once in half a day has it as well.
    let of_a_day = Terms { rotation: &rotation, ttl_seconds_longest: 86_400, paused: false, now: NOW, freed: Vec::new() };
    assert_eq!(next(&all[2], &all, &of_a_day).expect("an arrow").at, Some(NOW.plus_seconds(86_400)));
    (all[0].state, all[2].state) = (State::Retiring, State::Active);
    assert_eq!(next_of(&all, 1, &rotation), arrow(State::Retiring, Some(NOW), false));
    // Used by what is trusted: it stays.
    assert_eq!(next_of(&all, 0, &rotation).at, None);
    all[1].state = State::Retired;
    assert_eq!(next_of(&all, 0, &rotation), arrow(State::Retired, Some(NOW), false));
}

/// A certificate that ends in so many seconds; nothing else of it counts here.
fn ends_in(seconds: i64) -> Vec<u8> {
    let mut params = rcgen::CertificateParams::default();
    let at = |seconds: i64| time::OffsetDateTime::from_unix_timestamp(1_800_000_000 + seconds).expect("a time");
    (params.not_before, params.not_after) = (at(-86_400), at(seconds));
    params.self_signed(&rcgen::KeyPair::generate().expect("a key")).expect("a certificate").der().to_vec()
}

#[test]
fn a_new_root_does_not_wait_for_an_old_one_that_certifies_no_more() {
    let rotation = rotation();
    let of_a_day = Terms { rotation: &rotation, ttl_seconds_longest: 86_400, paused: false, now: NOW, freed: Vec::new() };
    let mut all = house();
    all.push(generation(3, Purpose::Root, State::Prepublished));
    let waits = |all: &[Generation]| next(&all[2], all, &of_a_day).expect("an arrow").at;
    // When the old one ends, and how long the new one waits.
    for (end, wait) in [(30 * 86_400, 86_400), (86_400 + 3_600, 3_600), (3_600, PREPUBLISH_SECONDS), (600, 600), (-1, 0)] {
        for (at, lasts) in [(0, 1), (1, 0)] {
            (all[at].certificate, all[lasts].certificate) = (ends_in(end), ends_in(90 * 86_400));
            // Under a root of ours the next issuing authority comes with the old one.
            all[0].key_id = KeyId([1; 16]);
            let ours = if at == 0 { wait } else { 86_400 };
            assert_eq!(waits(&all), Some(NOW.plus_seconds(ours)), "{end}");
            all[0].key_id = crate::ledger::outside_id(&all[0].certificate).expect("a certificate");
            assert_eq!(waits(&all), Some(NOW.plus_seconds(wait)), "outside, {end}");
        }
    }
}

#[test]
fn what_nobody_can_certify_without_waits_for_no_window() {
    let text = include_str!("../../scripts/keyward.toml").replace("window = \"\"", "window = \"09:00-10:00\"");
    let rotation = crate::config::Config::parse(&text).expect("a window").rotation;
    let mut all = house();
    (all[0].certificate, all[1].certificate) = (ends_in(90 * 86_400), ends_in(-1));
    all[0].key_id = crate::ledger::outside_id(&all[0].certificate).expect("a certificate");
    all[1].issuer = Some(all[0].key_id);
    all.push(generation(3, Purpose::Root, State::Prepublished));
    let issuing = generation(4, Purpose::Issuing, State::Prepublished);
    all.push(Generation { issuer: Some(all[0].key_id), ..issuing });
    let later = Some(NOW.plus_seconds(3_600));
    for (end, at) in [(-1, Some(NOW)), (80 * 86_400, later)] {
        all[1].certificate = ends_in(end);
        all[2].since = NOW.minus_seconds(PREPUBLISH_SECONDS);
        assert_eq!(
            [2, 3].map(|coming| next_of(&all, coming, &rotation).at),
            [if end < 0 { all[2].since.into() } else { at }, at]
        );
    }
}

#[test]
fn an_issuing_authority_retires_when_its_last_certificate_has_ended_for_everybody() {
    let rotation = rotation();
    let mut all = house();
    all[1].state = State::Retiring;
    assert_eq!(next_of(&all, 1, &rotation).at, Some(NOW.plus_seconds(600 + SLACK_SECONDS)));
    all[1].state = State::Retired;
    assert_eq!(next_of(&all, 1, &rotation), arrow(State::Destroyed, Some(NOW.plus_seconds(7 * 86_400)), false));
}

#[test]
fn a_taint_waits_for_nothing_but_its_window() {
    let mut rotation = rotation();
    rotation.paused = true;
    let terms = Terms { rotation: &rotation, ttl_seconds_longest: 86_400, paused: true, now: NOW, freed: Vec::new() };
    let mut all = house();
    all.iter_mut().for_each(|found| found.tainted = true);
    assert!(next(&all[0], &all, &terms).expect("an arrow").is_due(&terms));
    all.push(generation(3, Purpose::Root, State::Prepublished));
    assert!(next(&all[2], &all, &terms).expect("an arrow").is_due(&terms), "no overlap");
    // The next issuing authority waits for the next root.
    all.push(generation(4, Purpose::Issuing, State::Planned));
    assert!(!next(&all[3], &all, &terms).expect("an arrow").is_due(&terms));
    (all[0].state, all[2].state) = (State::Retiring, State::Active);
    assert!(next(&all[3], &all, &terms).expect("an arrow").is_due(&terms));
    all[1].state = State::Retiring;
    let retirement = next(&all[1], &all, &terms).expect("an arrow");
    assert_eq!(retirement, arrow(State::Retired, Some(NOW.plus_seconds(TAINT_SECONDS)), true));
}

#[test]
fn nothing_moves_while_it_is_paused() {
    let rotation = rotation();
    let terms = Terms {
        rotation: &rotation,
        ttl_seconds_longest: 600,
        paused: true,
        now: NOW.plus_seconds(30 * 86_400),
        freed: Vec::new(),
    };
    let mut all = house();
    all[1].state = State::Retired;
    assert!(!next(&all[1], &all, &terms).expect("an arrow").is_due(&terms));
}

#[test]
fn an_issuing_authority_on_its_way_under_a_root_that_goes_is_given_up() {
    let rotation = rotation();
    let mut all = house();
    all.push(Generation { issuer: Some(KeyId([1; 16])), ..generation(3, Purpose::Issuing, State::Prepublished) });
    assert_eq!(next_of(&all, 2, &rotation).to, State::Active);
    all[0].state = State::Retiring;
    assert_eq!(next_of(&all, 2, &rotation).to, State::Retired);
}

#[test]
fn at_most_two_ledger_keys_sign() {
    let rotation = rotation();
    let mut all = vec![
        generation(1, Purpose::Ledger, State::Retiring),
        generation(2, Purpose::Ledger, State::Active),
        generation(3, Purpose::Ledger, State::Prepublished),
    ];
    assert_eq!(next_of(&all, 2, &rotation).at, Some(NOW.plus_seconds(OVERLAP_SECONDS)));
    let now = NOW.plus_seconds(2 * OVERLAP_SECONDS);
    let late = Terms { rotation: &rotation, ttl_seconds_longest: 600, paused: false, now, freed: Vec::new() };
    assert!(next_of(&all, 0, &rotation).is_due(&late));
    assert!(!next_of(&all, 2, &rotation).is_due(&late), "not before the first of them is retired");
    all.remove(0);
    assert_eq!(next_of(&all, 1, &rotation).at, Some(NOW));
}

#[test]
fn an_outside_root_is_left_to_whoever_has_it() {
    let rotation = rotation();
    let mut all = house();
    all[0].certificate = vec![1; 20];
    assert!(all[0].is_outside());
    assert_eq!(next_of(&all, 0, &rotation).at, None);
    all.push(generation(3, Purpose::Issuing, State::Planned));
    assert_eq!(next_of(&all, 2, &rotation).at, None, "its certificate is signed outside");
}

#[test]
fn a_first_token_signing_key_is_planned_where_none_signs_or_will() {
    let mut all = house();
    assert!(lacks_token_signing(&all));
    for (state, lacks) in [
        (State::Planned, false),
        (State::Prepublished, false),
        (State::Active, false),
        (State::Retiring, true),
        (State::Retired, true),
    ] {
        all.push(generation(3, Purpose::TokenSigning, state));
        assert_eq!(lacks_token_signing(&all), lacks, "{state:?}");
        all.pop();
    }
}

#[test]
fn a_tainted_token_signing_key_is_trusted_for_less_long() {
    let rotation = rotation();
    let mut all = vec![generation(1, Purpose::TokenSigning, State::Retiring)];
    assert_eq!(next_of(&all, 0, &rotation).at, Some(NOW.plus_seconds(OVERLAP_SECONDS)));
    all[0].tainted = true;
    assert_eq!(next_of(&all, 0, &rotation), arrow(State::Retired, Some(NOW.plus_seconds(TAINT_SECONDS)), true));
}

#[test]
fn a_wrapping_key_retires_when_nothing_is_under_it_and_the_next_waits_for_that() {
    let rotation = rotation();
    let mut all = vec![generation(1, Purpose::Wrapping, State::Active)];
    assert_eq!(next_of(&all, 0, &rotation), arrow(State::Retiring, Some(NOW.plus_seconds(365 * 86_400)), false));
    all.push(generation(2, Purpose::Wrapping, State::Prepublished));
    assert_eq!(next_of(&all, 1, &rotation).at, Some(NOW));
    (all[0].state, all[1].state) = (State::Retiring, State::Active);
    all.push(generation(3, Purpose::Wrapping, State::Prepublished));
    // One that holds lost keys never has nothing under it: it is waited for a day, and not at all where an operator asks for another now.
    let waits = Some(NOW.plus_seconds(REWRAP_SECONDS));
    assert_eq!((next_of(&all, 0, &rotation).at, next_of(&all, 2, &rotation).at), (None, waits));
    all[2].now = true;
    assert_eq!(next_of(&all, 2, &rotation).at, Some(NOW));
    all[2].now = false;
    // By a clock that ran ahead and has been set back.
    all[0].since = NOW.plus_seconds(30 * 86_400);
    assert_eq!(next_of(&all, 2, &rotation).at, Some(NOW));
    all[0].since = NOW;
    let freed = |tainted| Terms {
        rotation: &rotation,
        ttl_seconds_longest: 600,
        paused: false,
        now: NOW,
        freed: vec![(KeyId([1; 16]), tainted)],
    };
    assert_eq!(next(&all[0], &all, &freed(false)), Some(arrow(State::Retired, Some(NOW), false)));
    all[0].since = NOW.plus_seconds(30 * 86_400);
    assert_eq!(next(&all[0], &all, &freed(false)), Some(arrow(State::Retired, Some(NOW), false)), "by a clock that was set back");
    // With a taint everything that was ever under it is to go first, also once it has retired.
    for state in [State::Retiring, State::Retired] {
        all[0] = Generation { tainted: true, ..generation(1, Purpose::Wrapping, state) };
        assert_eq!(next(&all[0], &all, &freed(false)).expect("an arrow").at, None, "{state:?}");
        let arrow = next(&all[0], &all, &freed(true)).expect("an arrow");
        assert_eq!((arrow.at, arrow.urgent), (Some(NOW), true), "{state:?}");
    }
    // The next one does not wait for one that retires if the active one is tainted.
    all[0] = generation(1, Purpose::Wrapping, State::Retiring);
    all[1].tainted = true;
    assert_eq!(next_of(&all, 2, &rotation), arrow(State::Active, Some(NOW), true));
}

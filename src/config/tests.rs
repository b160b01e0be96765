use super::*;

const EXAMPLE: &str = include_str!("../../scripts/keyward.toml");
const MINIMAL: &str = r#"
[trust]
domain = "example.org"
[hsm.authority]
module = "/usr/lib/softhsm/libsofthsm2.so"
token = "keyward-authority"
pin_file = "/etc/keyward/authority.pin"
"#;

fn mistakes(text: &str) -> Vec<String> {
    Config::parse(text).expect_err("mistakes").mistakes().iter().map(ToString::to_string).collect()
}

#[test]
fn the_example_is_the_defaults() {
    let example = Config::parse(EXAMPLE).expect("the example");
    let minimal = Config::parse(MINIMAL).expect("the minimum");
    assert_eq!(example.effective(), minimal.effective());
    assert_eq!(example.hash, minimal.hash);
    assert_eq!(example.agents, example.authority);
    assert_eq!(example.limits.ttl_seconds_default, 600);
}

#[test]
fn every_mistake_is_told_at_once_with_its_line() {
    let text = r#"[trust]
domain = "Example.org"
colour = 1
[listen]
tcp = "localhost"
names = ["a:1", 7]
[paths]
state = "here"
[hsm.authority]
token = ""
pin_file = "/a"
pin_fd = 3
[hsm.other]
[operator]
uids = [65534, -1]
[limits]
ttl_seconds_default = 5
crl_seconds = "1h"
hsm_queue = 0x10
connections = 1_000
[log]
level = "loud"
[unheard]
"#;
    let told = mistakes(text);
    let starts = [
        "line 2: [trust] domain: ",
        "line 3: [trust] colour: no such key",
        "line 5: [listen] tcp: must be an IP address",
        "line 6: [listen] names: must hold strings, has 7",
        "line 6: [listen] names: must be host names",
        "line 8: [paths] state: must be an absolute path, is \"here\"",
        "line 9: [hsm.authority] module: is missing",
        "line 9: [hsm.authority] pin_file: only one of",
        "line 10: [hsm.authority] token: must have 1 to 32 bytes",
        "line 13: [hsm.other]: no such section",
        "line 15: [operator] uids: must be 0 to 4294967294, is -1",
        "line 15: [operator] uids: must not be 65534",
        "line 17: [limits] ttl_seconds_default: must be 10 to 86400, is 5",
        "line 18: [limits] crl_seconds: must be 60 to 604800, is \"1h\"",
        "line 22: [log] level: must be error, warn",
        "line 23: [unheard]: no such section",
    ];
    assert_eq!(told.len(), starts.len(), "{told:#?}");
    for (told, start) in told.iter().zip(starts) {
        assert!(told.starts_with(start), "{told:?} does not start with {start:?}");
    }
}

#[test]
fn an_empty_file_lacks_what_has_no_default() {
    let told = mistakes("");
    assert_eq!(told[0], "[trust] domain: is missing");
    assert_eq!(told.len(), 4, "{told:#?}");
}

#[test]
fn a_syntax_error_has_its_line_and_does_not_hide_the_rest() {
    let told = mistakes(&format!("{MINIMAL}[limits]\nttl_seconds_default = = 5\n[log]\nlevel = \"loud\"\n"));
    assert!(told.iter().any(|line| line.starts_with("line 9: ")), "{told:#?}");
    assert!(told.iter().any(|line| line.starts_with("line 11: [log] level")), "{told:#?}");
    assert!(!told.iter().any(|line| line.contains("ttl_seconds_default")), "{told:#?}");
}

#[test]
fn a_wildcard_address_needs_names() {
    let text = format!("{MINIMAL}[listen]\ntcp = \"0.0.0.0:8443\"\n");
    assert!(mistakes(&text)[0].contains("[listen] names: is missing"));
    let named = format!("{text}names = [\"keyward.example.org\", \"::1\"]\n");
    assert_eq!(Config::parse(&named).expect("names").listen.names, ["keyward.example.org", "::1"]);
}

#[test]
fn the_hash_changes_with_a_value_and_not_with_a_comment() {
    let hash = Config::parse(MINIMAL).expect("minimal").hash;
    assert_eq!(hash, Config::parse(&format!("# hello\n{MINIMAL}")).expect("comment").hash);
    assert_ne!(hash, Config::parse(&format!("{MINIMAL}lanes = 3\n")).expect("lanes").hash);
}

#[test]
fn two_tokens_cannot_read_one_descriptor() {
    let text = MINIMAL.replace("pin_file = \"/etc/keyward/authority.pin\"", "pin_fd = 3");
    Config::parse(&text).expect("one token");
    let two = format!("{text}[hsm.agents]\nmodule = \"/m.so\"\ntoken = \"agents\"\npin_fd = 3\n");
    assert!(mistakes(&two)[0].contains("pin_fd: must differ"));
}

#[test]
fn the_effective_values_are_a_configuration_that_means_the_same() {
    let text =
        format!("{MINIMAL}serial = \"a\\\"b\"\n[hsm.agents]\nmodule = \"/m.so\"\ntoken = \"t\"\npin_credential = \"pin\"\n");
    let config = Config::parse(&text).expect("valid");
    let again = Config::parse(&config.effective()).expect("valid");
    assert_eq!((again.hash, again.effective()), (config.hash, config.effective()));
    assert_eq!((again.agents, again.authority), (config.agents, config.authority));
}

#[test]
fn one_token_has_one_section_so_that_one_wrong_pin_costs_one_try() {
    let section = |serial: &str| {
        format!("[hsm.agents]\nmodule = \"/usr/lib/softhsm/libsofthsm2.so\"\ntoken = \"keyward-authority\"\n{serial}pin_fd = 3\n")
    };
    assert!(mistakes(&format!("{MINIMAL}{}", section("")))[0].contains("may be the token of [hsm.authority]"));
    assert!(mistakes(&format!("{MINIMAL}serial = \"1\"\n{}", section("")))[0].contains("tell them apart by serial"));
    Config::parse(&format!("{MINIMAL}serial = \"1\"\n{}", section("serial = \"2\"\n"))).expect("two tokens");
}

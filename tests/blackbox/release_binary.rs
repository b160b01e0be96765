//! The binary as it is shipped: nothing dangerous in it; completion and manual pages come out of it.

use crate::house::{House, run};

/// `scripts/test` runs this against the release binary itself; a release build with the feature does not compile (src/lib.rs).
#[test]
fn the_release_binary_lacks_dangerous_test_hooks() {
    let house = House::new();
    let told = house.keyward(&["version", "--format", "json"]).ok().json();
    assert_eq!(told["dangerous_test_hooks"], false, "{told}");
    assert!(!house.keyward(&["version"]).ok().stdout.contains("dangerous"));
}

#[test]
fn the_completion_of_every_shell_knows_the_verbs() {
    let house = House::new();
    for shell in ["bash", "elvish", "fish", "powershell", "zsh"] {
        let script = house.keyward(&["completion", shell]).ok().stdout;
        for word in ["quarantine", "release", "enrol"] {
            assert!(script.contains(word), "{shell} does not know {word}");
        }
    }
}

#[test]
fn bash_reads_its_completion_and_completes_with_it() {
    let house = House::new();
    let script = house.path("completion.bash");
    std::fs::write(&script, house.keyward(&["completion", "bash"]).ok().stdout).unwrap();
    let ask = "source \"$0\"; COMP_WORDS=(keyward quar); COMP_CWORD=1; _keyward keyward quar keyward; echo \"${COMPREPLY[@]}\"";
    let output = run(std::process::Command::new("bash").args(["--norc", "-euc", ask]).arg(&script)).ok();
    assert_eq!(output.stdout.trim(), "quarantine");
}

#[test]
fn every_verb_has_a_manual_page_with_its_examples() {
    let house = House::new();
    let pages = house.path("man");
    house.keyward(&["man", "--out", pages.to_str().unwrap()]).ok();
    for page in ["keyward", "keyward-serve", "keyward-agents-enrol", "keyward-quarantine-release", "keyward-ledger-verify"] {
        let text = std::fs::read_to_string(pages.join(page).with_extension("1")).unwrap();
        assert!(text.contains(".SH SYNOPSIS"), "{page} is no manual page");
        assert!(page == "keyward" || text.contains("Example"), "{page} has no example");
    }
    assert!(house.keyward(&["man"]).ok().stdout.contains(".TH keyward 1"));
}

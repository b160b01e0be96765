//! What keeps the house in order: each rule here is one that reviewers would otherwise have to remember.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::process::Command;

use prost::Message as _;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, EnumDescriptorProto, FileDescriptorSet};

/// The rooms from left to right: a room names only rooms before it.
const ROOMS: [&str; 15] = [
    "proto", "model", "formats", "config", "hsm", "ledger", "authn", "attest", "policy", "acts", "api", "client", "daemon",
    "bench", "cli",
];

/// No file in src is longer.
const LINES_MAX: usize = 600;

/// Names that say nothing.
const EMPTY_NAMES: [&str; 8] = ["util", "utils", "common", "helper", "helpers", "manager", "handler", "handlers"];

/// Where an HSM key may be asked for a signature. Everything that is signed there was recorded first, or is tagged so that
/// it can never be taken for a certificate (canary, checkpoint, measurements by a key that certifies nothing).
const HSM_SIGNERS: [&str; 5] = ["src/acts/", "src/hsm/", "src/ledger/checkpoint.rs", "src/daemon/", "src/bench/room.rs"];

/// Where keys in memory sign (a client's own key, a join token), and where the rpc of that name is translated: these may not know the
/// HSM at all.
const MEMORY_SIGNERS: [&str; 5] = ["src/client/", "src/model/join.rs", "src/bench/", "src/api/key.rs", "src/cli/key.rs"];

/// Compares the wire types with these; `UPDATE_DESCRIPTOR=1` records growth.
const DESCRIPTOR: &str = "tests/descriptor.bin";

#[test]
fn a_room_names_only_rooms_to_its_left() {
    let mut wrong = Vec::new();
    for (path, text) in sources() {
        let Some(own) = room_of(&path) else { continue };
        // Whole files, not lines: `use crate::{` may run over several.
        for named in rooms_named(&code(&text)) {
            if position(&named).is_some_and(|there| there > own) {
                wrong.push(format!("{path}: {} names {named}, which is to its right", ROOMS[own]));
            }
        }
    }
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn every_folder_and_file_of_src_is_a_known_room() {
    for (path, _) in sources() {
        assert!(
            room_of(&path).is_some() || path == "src/lib.rs" || path == "src/main.rs",
            "{path} belongs to no room of the map"
        );
    }
}

#[test]
fn no_source_file_is_longer_than_the_rule() {
    for (path, text) in sources() {
        let lines = text.lines().count();
        assert!(
            lines <= LINES_MAX,
            "{path} has {lines} lines; {LINES_MAX} is the most: find the room that wants to be its own file"
        );
    }
}

#[test]
fn nothing_is_named_by_a_word_that_says_nothing() {
    for path in tracked() {
        for part in Path::new(&path).iter().filter_map(|part| part.to_str()) {
            let stem = part.split('.').next().unwrap_or(part);
            assert!(!EMPTY_NAMES.contains(&stem), "{path}: name it after what it holds, not {stem:?}");
        }
    }
}

#[test]
fn src_needs_no_unsafe() {
    for (path, text) in sources() {
        for (line, code) in code_lines(&text) {
            assert!(
                !words(&code).any(|word| word == "unsafe"),
                "{path}:{line}: unsafe is for tests/shim and tests/preload alone"
            );
        }
    }
}

#[test]
fn an_hsm_key_signs_only_where_it_was_recorded_first() {
    for (path, text) in sources() {
        if HSM_SIGNERS.iter().any(|allowed| path.starts_with(allowed)) {
            continue;
        }
        let product = before_tests(&text);
        let knows_hsm = rooms_named(&code(product)).iter().any(|room| room == "hsm");
        let in_memory = MEMORY_SIGNERS.iter().any(|allowed| path.starts_with(allowed)) && !knows_hsm;
        for (line, code) in code_lines(product) {
            assert!(
                in_memory || ![".sign(", ".sign_digest(", ".sign_digests("].iter().any(|call| code.contains(call)),
                "{path}:{line}: signing is an act's; record the intent and sign there"
            );
        }
    }
}

#[test]
fn nothing_tracked_knows_this_machine_or_another_registry() {
    // Spelt in halves so that this file passes its own rule.
    let machine = [["/wo", "rk/"], ["/fa", "rm/"], ["/ho", "me/"], ["/ro", "ot/"]].map(|halves| halves.concat());
    let redirects =
        [["replace", "-with"], ["[regis", "tries"], ["[sour", "ce."], ["index", "-url"]].map(|halves| halves.concat());
    for path in tracked() {
        let Ok(bytes) = fs::read(root().join(&path)) else { continue };
        let text = String::from_utf8_lossy(&bytes);
        for word in machine.iter().chain(&redirects) {
            assert!(!text.contains(word.as_str()), "{path} holds {word:?}");
        }
    }
    let lock = fs::read_to_string(root().join("Cargo.lock")).unwrap();
    for line in lock.lines().filter(|line| line.starts_with("source = ")) {
        assert_eq!(line, r#"source = "registry+https://github.com/rust-lang/crates.io-index""#, "in Cargo.lock");
    }
}

#[test]
fn the_protos_only_grow() {
    let now = facts(keyward::proto::DESCRIPTORS);
    let path = root().join(DESCRIPTOR);
    if std::env::var("UPDATE_DESCRIPTOR").as_deref() == Ok("1") {
        fs::write(&path, without_comments(keyward::proto::DESCRIPTORS)).unwrap();
    }
    let committed = facts(&fs::read(&path).unwrap());
    let lost: Vec<_> = committed.difference(&now).cloned().collect();
    assert!(lost.is_empty(), "a landed wire type changed; old entries and old clients would be misread:\n{}", lost.join("\n"));
    let grown: Vec<_> = now.difference(&committed).cloned().collect();
    assert!(
        grown.is_empty(),
        "the protos grew; record it with UPDATE_DESCRIPTOR=1 cargo test --test tidy, so that it stays:\n{}",
        grown.join("\n")
    );
}

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file below src: path from the root, text.
fn sources() -> Vec<(String, String)> {
    let mut found = Vec::new();
    let mut folders = vec![root().join("src")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|kind| kind == "rs") {
                found.push((relative(&path), fs::read_to_string(&path).unwrap()));
            }
        }
    }
    found.sort();
    assert!(!found.is_empty(), "src is empty");
    found
}

/// Every file git tracks; without git (a source archive) every file but build output.
fn tracked() -> Vec<String> {
    let listed = Command::new("git").args(["ls-files", "-z"]).current_dir(root()).output();
    if let Ok(output) = listed
        && output.status.success()
        && !output.stdout.is_empty()
    {
        return output
            .stdout
            .split(|byte| *byte == 0)
            .filter(|n| !n.is_empty())
            .map(|n| String::from_utf8_lossy(n).into())
            .collect();
    }
    let mut found = Vec::new();
    let mut folders = vec![root().to_path_buf()];
    while let Some(folder) = folders.pop() {
        for path in fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if path.is_dir() && !["target", ".git", "quickstart.d"].contains(&name.as_str()) {
                folders.push(path);
            } else if path.is_file() {
                found.push(relative(&path));
            }
        }
    }
    found
}

fn relative(path: &Path) -> String {
    path.strip_prefix(root()).unwrap_or(path).to_string_lossy().into_owned()
}

/// The room a path of src belongs to: `src/<room>/…` or `src/<room>.rs`.
fn room_of(path: &str) -> Option<usize> {
    position(path.strip_prefix("src/")?.split(['/', '.']).next()?)
}

fn position(room: &str) -> Option<usize> {
    ROOMS.iter().position(|known| *known == room)
}

/// Lines with their numbers, comments cut. `//` inside a string literal cuts too much of that line, which no rule here minds.
fn code_lines(text: &str) -> impl Iterator<Item = (usize, String)> {
    text.lines().enumerate().map(|(at, line)| (at + 1, line.split("//").next().unwrap_or_default().to_owned()))
}

/// The text without its comments.
fn code(text: &str) -> String {
    code_lines(text).map(|(_, line)| line + "\n").collect()
}

/// What comes before the unit tests of a file.
fn before_tests(text: &str) -> &str {
    text.split("#[cfg(test)]\nmod ").next().unwrap_or(text)
}

fn words(code: &str) -> impl Iterator<Item = &str> {
    code.split(|c: char| !(c.is_alphanumeric() || c == '_')).filter(|word| !word.is_empty())
}

/// Rooms named by `crate::room`, `crate::{room, room::x}`, and by climbing out with `super::super::room`.
fn rooms_named(code: &str) -> Vec<String> {
    let mut named = Vec::new();
    for path in ["crate::", "super::super::"] {
        for (at, _) in code.match_indices(path) {
            let rest = &code[at + path.len()..];
            match rest.strip_prefix('{') {
                Some(group) => named.extend(heads(group)),
                None => named.extend(words(rest).next().map(str::to_owned)),
            }
        }
    }
    named
}

/// The first word of each member of a brace group, its own inner groups skipped.
fn heads(group: &str) -> Vec<String> {
    let mut depth = 0;
    let mut members = vec![String::new()];
    for c in group.chars() {
        match c {
            '{' => depth += 1,
            '}' if depth == 0 => break,
            '}' => depth -= 1,
            ',' if depth == 0 => members.push(String::new()),
            c if depth == 0 => members.last_mut().unwrap().push(c),
            _ => {}
        }
    }
    members.iter().filter_map(|member| words(member).next().map(str::to_owned)).collect()
}

/// A descriptor set as a set of sentences: what a reader of old bytes relies on.
fn facts(descriptors: &[u8]) -> BTreeSet<String> {
    let set = FileDescriptorSet::decode(descriptors).unwrap();
    let mut facts = BTreeSet::new();
    for file in set.file.iter().filter(|file| file.package().starts_with("keyward.")) {
        for message in &file.message_type {
            message_facts(file.package(), message, &mut facts);
        }
        for values in &file.enum_type {
            enum_facts(file.package(), values, &mut facts);
        }
        for service in &file.service {
            for rpc in &service.method {
                facts.insert(format!(
                    "{}.{}.{}: {}{} -> {}{}",
                    file.package(),
                    service.name(),
                    rpc.name(),
                    if rpc.client_streaming() { "stream " } else { "" },
                    rpc.input_type(),
                    if rpc.server_streaming() { "stream " } else { "" },
                    rpc.output_type(),
                ));
            }
        }
    }
    assert!(!facts.is_empty(), "no keyward messages in the descriptor");
    facts
}

fn message_facts(scope: &str, message: &DescriptorProto, facts: &mut BTreeSet<String>) {
    let name = format!("{scope}.{}", message.name());
    facts.insert(format!("message {name}"));
    for field in &message.field {
        let oneof = field.oneof_index.map(|at| message.oneof_decl[usize::try_from(at).unwrap()].name().to_owned());
        facts.insert(format!(
            "{name} {} = {}: {} {} {}{}",
            field.name(),
            field.number(),
            Label::try_from(field.label.unwrap_or_default()).map_or("?", |label| label.as_str_name()),
            Type::try_from(field.r#type.unwrap_or_default()).map_or("?", |kind| kind.as_str_name()),
            field.type_name(),
            oneof.map(|oneof| format!(" in {oneof}")).unwrap_or_default(),
        ));
    }
    for inner in &message.nested_type {
        message_facts(&name, inner, facts);
    }
    for values in &message.enum_type {
        enum_facts(&name, values, facts);
    }
}

fn enum_facts(scope: &str, values: &EnumDescriptorProto, facts: &mut BTreeSet<String>) {
    for value in &values.value {
        facts.insert(format!("enum {scope}.{} {} = {}", values.name(), value.name(), value.number()));
    }
}

/// The bytes to commit: comments may change freely.
fn without_comments(descriptors: &[u8]) -> Vec<u8> {
    let mut set = FileDescriptorSet::decode(descriptors).unwrap();
    for file in &mut set.file {
        file.source_code_info = None;
    }
    set.encode_to_vec()
}

#[test]
fn the_rule_about_rooms_sees_through_every_way_of_naming_one() {
    assert_eq!(rooms_named("use crate::hsm::Hsm;"), ["hsm"]);
    assert_eq!(rooms_named("use crate::{\n    model::{A, cli},\n    daemon\n};"), ["model", "daemon"]);
    assert_eq!(rooms_named("let x = super::super::daemon::y(crate::api::z);"), ["api", "daemon"]);
    assert_eq!(room_of("src/ledger/gate.rs"), position("ledger"));
    assert_eq!(room_of("src/lib.rs"), None);
}

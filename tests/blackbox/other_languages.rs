//! Agents that are not written in Rust: a stock gRPC library, the committed protos, the files of an agent's directory.

use std::path::Path;
use std::process::Command;

use crate::house::House;

/// Where scripts/test puts it.
const PYTHON: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/target/others/bin/python");

#[test]
fn an_agent_in_python_signs_and_follows_the_bundle_with_stock_grpc() {
    assert!(Path::new(PYTHON).exists(), "{PYTHON} is missing: scripts/test makes it");
    let house = House::new();
    let address = house.address();
    let names = format!("names = [\"{}\", \"keyward.example\"]", address.ip());
    let house = house.configured("listen", &names).initialised().served();
    let agent = house.attested("builder/1");
    // The host that it dials: an address, or a name.
    for (host, is_known) in [(address.ip().to_string(), true), ("keyward.example".into(), true), ("evil.example".into(), false)] {
        let done = Command::new(PYTHON)
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/blackbox/other_languages.py"))
            .arg(concat!(env!("CARGO_MANIFEST_DIR"), "/proto"))
            .arg(agent.dir())
            .arg(address.to_string())
            .arg(&host)
            .output()
            .unwrap();
        let told = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.success(), is_known, "{host}: {told}");
        assert!(is_known || told.contains("Hostname Verification"), "{told}");
    }
}

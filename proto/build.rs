//! Generates the wire types from the protos beside this file, with a pure-Rust compiler: no protoc on the machine.

use std::path::PathBuf;

use prost::Message as _;

const PROTOS: [&str; 5] = [
    "keyward/v1/refusal.proto",
    "keyward/v1/agent.proto",
    "keyward/v1/ledger.proto",
    "keyward/v1/operator.proto",
    "keyward/v1/key.proto",
];

fn main() -> Result<(), Box<dyn std::error::Error>> {
    println!("cargo:rerun-if-changed=proto");
    let descriptors = protox::compile(PROTOS, ["proto"])?;
    let out = PathBuf::from(std::env::var_os("OUT_DIR").ok_or("OUT_DIR is not set")?);
    // For reflection, and for the test that protos only grow.
    std::fs::write(out.join("keyward_v1.bin"), descriptors.encode_to_vec())?;
    tonic_prost_build::configure().codec_path("crate::proto::Codec").compile_fds(descriptors)?;
    Ok(())
}

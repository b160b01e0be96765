//! The wire types of `proto/keyward/v1`, generated at build time. Holds nothing else.
#![allow(missing_docs, clippy::all, rust_2018_idioms, rustdoc::all)]

tonic::include_proto!("keyward.v1");

/// The compiled descriptors, for gRPC reflection and for the test that protos only grow.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/keyward_v1.bin"));

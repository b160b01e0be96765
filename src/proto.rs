//! The wire types of `proto/keyward/v1`, generated at build time, and the buffers that they travel in. Holds nothing else.
#![allow(missing_docs, clippy::all, rust_2018_idioms, rustdoc::all)]

mod codec;

tonic::include_proto!("keyward.v1");

pub use codec::Codec;

/// The compiled descriptors, for gRPC reflection and for the test that protos only grow.
pub const DESCRIPTORS: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/keyward_v1.bin"));

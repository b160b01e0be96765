//! keyward: short-lived identities and HSM-backed signing keys for AI agents, and the means to take them all back.
//!
//! # The map
//!
//! The story is told in `acts::issue`: a signing request and its evidence become a certificate, or a refusal.
//! `Caller → Appraisal → Grant → Prepared → Intent → Signed → Issued`: each value is made only by its room, so a
//! check that was skipped does not compile.
//!
//! Rooms, in one order; a room names only rooms before it (`tests/tidy.rs` holds this):
//!
//! | room | what it owns |
//! |---|---|
//! | [`proto`] | the wire types, generated; nothing else |
//! | [`model`] | the words: identities, serials, keys, digests, the clock, a refusal |
//! | [`formats`] | what an agent's key signs: JWS, HTTP signatures, DPoP, TLS, digests; JWK; verification |
//! | [`config`] | the configuration file, checked as a whole |
//! | [`hsm`] | the PKCS#11 token: lanes, keys, faults; no unverified signature leaves it |
//! | [`ledger`] | the one ordered book, the gate, what follows from the book |
//! | [`authn`] | who is calling |
//! | [`attest`] | evidence → appraisal |
//! | [`policy`] | standing + appraisal + wish → grant; pure |
//! | [`acts`] | the verbs: issue, enrol, quarantine, release, rotate, crl, … |
//! | [`api`] | gRPC: translate, call one act, translate back |
//! | [`client`] | the Rust client of an agent and of an operator |
//! | [`daemon`] | builds the rooms left to right, serves, drains |
//! | [`bench`](mod@bench) | what issuing costs |
//! | [`cli`] | the command line, one file per noun |
//!
//! # The promises
//!
//! 1. Authority keys are made in the token and never leave it. 2. Intent before signature. 3. Every signature is
//!    verified before it leaves the HSM room. 4. Every intent ends in exactly one outcome. 5. Quarantine wins every
//!    race. 6. Quarantine is sticky. 7. One total order. 8. Evidence binds the key being certified. 9. The HSM may
//!    vanish. 10. Decisions fail closed. 11. No secret in a log, error, metric, argv, environment or the ledger.
//!    12. Everything attacker-supplied is bounded.
//!
//! Each has a test in `tests/blackbox` that tries to break it.

// A hook that breaks a promise is for a debug build under test.
#[cfg(all(feature = "dangerous-test-hooks", not(debug_assertions)))]
compile_error!("dangerous-test-hooks is never part of a release binary");

pub mod proto;

pub mod model;

pub mod formats;

pub mod config;

pub mod hsm;

pub mod ledger;

pub mod authn;

pub mod attest;

pub mod policy;

pub mod acts;

pub mod api;

pub mod client;

pub mod daemon;

pub mod bench;

pub mod cli;

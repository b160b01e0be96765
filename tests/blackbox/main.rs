//! keyward from outside: the real daemon, real tokens, the real command. A file per capability; a test is a sentence that a
//! security officer would sign.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]
#![allow(clippy::print_stderr, reason = "a failed test shows the daemon's log")]
#![allow(missing_docs, unreachable_pub, reason = "a binary of tests")]

mod house;

mod agent_run;
mod attest;
mod bad_input;
mod bundle;
mod certificate;
mod crash;
mod enrol;
mod faults;
mod hsm;
mod init;
mod instruments;
mod key_limits;
mod keys;
mod ledger;
mod memory;
mod other_languages;
mod quarantine;
mod race;
mod recovery;
mod release;
mod release_binary;
mod renew;
mod rotate;
mod serve;
mod shim;
mod stolen;
mod strangers;
mod tampered;
mod tokens;
mod unlock;
mod wrapping;

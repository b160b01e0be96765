//! The words of keyward.
//!
//! Owns: what an identity, a key, a signing request, a serial, a digest, an instant and a refusal *are*. Each is parsed
//! once into a type that cannot be wrong. Promises: pure values, no I/O but the clock and the random source.
//! Never: a decision, a file, a socket.

mod binder;
mod clock;
mod csr;
mod ecdsa;
mod extension;
mod identity;
mod join;
mod key;
mod key_name;
mod meter;
mod number;
mod outage;
mod refusal;
mod secret;

pub use binder::{attest_binder, renew_binder};
pub use clock::{Clock, ClockUntrusted, UnixTime};
pub use csr::Csr;
pub(crate) use ecdsa::ecdsa_sig_value;
pub use extension::{AGENT_EXTENSION_OID, AGENT_EXTENSION_OID_DER, AgentExtension};
pub use identity::{AgentId, InvalidName, SpiffeId, TrustDomain};
pub use join::{join_public_key, join_sign};
pub use key::{Algorithm, InvalidKey, KeyId, PublicKey, RawVerifier};
pub use key_name::{InvalidKeyName, KeyName};
pub use meter::{Gauge, Meter, process_cpu_nanos, thread_cpu_nanos};
pub use number::{Digest, KeyTag, Serial, TokenId, hex, unhex};
pub use outage::Outage;
pub use refusal::Refusal;
pub use secret::SecretBytes;

pub use crate::proto::Reason;

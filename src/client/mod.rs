//! The Rust client: of an agent, over TLS; of an operator, over the daemon's socket.
//!
//! Owns: first contact, renewal and rejoin as a client makes them; the bundle as it changes; the join file; the directory an agent's credentials live
//! in; what a refusal is to its caller. Promises: trusts nothing but the pinned bundle and the server's SPIFFE ID; a lost
//! answer is asked for again with the same bytes; a crash at any line leaves one usable pair of key and certificate.
//! Never: falls back to anything weaker, waits without a deadline, writes a secret outside its 0600 files.

pub mod agent;
mod bundle;
mod durable;
mod error;
mod heard;
mod join;
pub mod key;
pub mod operator;
pub mod request;
pub mod store;
pub mod tls;

pub use agent::Client;
pub use bundle::{BundleWatch, News};
pub use error::{Error, Refused};
pub use heard::Place;
pub use join::{JoinFile, JoinFileError};
pub use store::{AgentDir, Holding, Pending, StoreError};

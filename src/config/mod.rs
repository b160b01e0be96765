//! The configuration file.
//!
//! Owns: the path from TOML text to a checked [`Config`]. Promises: every mistake is told at once, each with its line;
//! an unknown key is a mistake; a default is written here and nowhere else. Never: holds a secret (PINs are named by where
//! they are), opens a socket or a token.

mod load;
mod reader;
mod rotation;
#[cfg(test)]
mod tests;

pub use load::Errors;
pub use reader::Mistake;
pub use rotation::{Rotation, Window};

use std::net::SocketAddr;
use std::path::PathBuf;

use crate::model::{Digest, TrustDomain};
use crate::proto::TokenRole;

/// The checked configuration.
#[derive(Debug, Clone)]
pub struct Config {
    /// `[trust] domain`
    pub trust_domain: TrustDomain,
    /// `[listen]`
    pub listen: Listen,
    /// `[paths]`
    pub paths: Paths,
    /// `[hsm.authority]`: root, issuing, ledger and canary keys.
    pub authority: Token,
    /// `[hsm.agents]`: agents' keys. May be the same token.
    pub agents: Token,
    /// `[operator]`
    pub operator: Operator,
    /// `[limits]`
    pub limits: Limits,
    /// `[rotation]`
    pub rotation: Rotation,
    /// `[log]`
    pub log: Log,
    /// SHA-256 over the effective values (defaults filled in), for the ledger and for bench reports.
    pub hash: Digest,
}

/// Where agents reach the daemon.
#[derive(Debug, Clone)]
pub struct Listen {
    /// Address to bind, e.g. `0.0.0.0:8443`. Port 0 takes a free one (written to `<runtime>/address`).
    pub tcp: SocketAddr,
    /// Host names or IP addresses that join files carry. Default: the bound address.
    pub names: Vec<String>,
}

/// Where things are kept.
#[derive(Debug, Clone)]
pub struct Paths {
    /// Durable state: the ledger, certificates.
    pub state: PathBuf,
    /// Volatile: the operator socket, pending denials. A tmpfs.
    pub runtime: PathBuf,
}

/// One PKCS#11 token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    /// The PKCS#11 module (a shared object).
    pub module: PathBuf,
    /// Token label.
    pub label: String,
    /// Token serial, where labels are not unique.
    pub serial: Option<String>,
    /// Where the user PIN is.
    pub pin: PinSource,
    /// Sign lanes (threads with a session each), 1 to 256. Default: as many as cores, at least two.
    pub lanes: usize,
}

/// The section that names the token of a role.
#[must_use]
pub fn section(role: TokenRole) -> &'static str {
    match role {
        TokenRole::Agents => "hsm.agents",
        TokenRole::Authority | TokenRole::Unspecified => "hsm.authority",
    }
}

/// Where a PIN is read from, at each login anew. Never argv, never the environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum PinSource {
    /// A file readable by its owner alone (mode checked at each read). One trailing newline is cut.
    File(PathBuf),
    /// An inherited file descriptor, read once.
    Fd(i32),
    /// A name below `$CREDENTIALS_DIRECTORY` (systemd `LoadCredential=`).
    Credential(String),
}

/// Who may use the operator socket: the daemon's own uid and root always, these besides.
#[derive(Debug, Clone, Default)]
pub struct Operator {
    /// User ids.
    pub uids: Vec<u32>,
    /// Primary group ids.
    pub gids: Vec<u32>,
}

/// Bounds and default lifetimes.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Lifetime granted to an enrolment that names none, 10 to 86,400. Default 600.
    pub ttl_seconds_default: u32,
    /// How long after its last notAfter an agent may rejoin with its bound key, 0 to 2,592,000. Default 86,400.
    pub rejoin_seconds_default: u32,
    /// Lifetime of a join token, 10 to 604,800. Default 3,600.
    pub token_ttl_seconds_default: u32,
    /// Unexpired certificates an agent may have at once, 2 to 64. Default 8.
    pub live_certificates_per_agent: usize,
    /// TCP connections at once, 1 to 100,000. Default 10,000.
    pub connections: usize,
    /// Attest streams without a client certificate at once, 1 to 4,096. Default 256.
    pub unauthenticated_streams: usize,
    /// Intents waiting for the ledger at once, 16 to 65,536. Default 4,096.
    pub ledger_queue: usize,
    /// Signatures waiting for a lane at once, per token, 16 to 65,536. Default 1,024.
    pub hsm_queue: usize,
    /// Deadline of one signature, from queueing to verification, in milliseconds, 100 to 60,000. Default 5,000.
    pub sign_deadline_ms: u64,
    /// Signing keys that an agent may have, destroyed ones not counted, 1 to 1,000,000. Default 1,000.
    pub keys_per_agent: usize,
    /// Of them, keys of the class session, 1 to 16,384. Default 64.
    pub session_keys_per_agent: usize,
    /// Of them, objects in the token, those of past epochs included, 1 to 10,000. Default 16.
    pub resident_keys_per_agent: usize,
    /// Objects in the token of all agents, 1 to 100,000. Default 1,000.
    pub resident_keys: usize,
    /// Signing keys held in memory, and unwrapped keys in sessions of the token, 16 to 1,000,000 (about 2 KiB each, of
    /// RSA 4). Default 4,096.
    pub keys_cached: usize,
    /// Signatures, and looks at keys, that an agent may ask for in a second, 1 to 1,000,000. Default 1,000.
    pub signatures_per_second: u32,
    /// Keys that an agent may make, rotate, disable and destroy in a second, 1 to 100,000. Default 20.
    pub key_changes_per_second: u32,
    /// nextUpdate of the CRL, in seconds, 60 to 604,800. Default 3,600.
    pub crl_seconds: u32,
}

/// Logging, to stderr.
#[derive(Debug, Clone)]
pub struct Log {
    /// error, warn, info, debug or trace. `RUST_LOG` overrides. Default info.
    pub level: String,
    /// Default text.
    pub format: LogFormat,
}

/// How log lines look.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogFormat {
    /// One line a record, for people.
    Text,
    /// One JSON object a record.
    Json,
}

//! `keyward hsm status`, and the part of `keyward status`: one token, as JSON and as text.

use serde::Serialize;

use super::render::{pairs, time};
use crate::proto::{TokenCapabilities, TokenRole, TokenStatus};

/// One token, as JSON has it.
#[derive(Serialize)]
pub(super) struct Token {
    role: &'static str,
    module: String,
    label: String,
    serial: String,
    usable: bool,
    fault: Option<String>,
    lanes: u32,
    queued: u32,
    signatures: u64,
    reconnects: u64,
    pin_pending: bool,
    mechanisms: Vec<String>,
    off: Vec<String>,
    hanging: u32,
    sessions: u32,
    pace_micros: u64,
    turned_away: u64,
    faults: Vec<Fault>,
    capabilities: Option<Capabilities>,
}

/// A fault that was met lately.
#[derive(Serialize)]
struct Fault {
    fault: String,
    count: u64,
    last: String,
}

/// What was found out about a token when it was opened.
#[derive(Serialize)]
struct Capabilities {
    algorithms: Vec<&'static str>,
    ed25519: bool,
    p384: bool,
    wrapped_keys: bool,
    wrapped_algorithms: Vec<&'static str>,
    session_keys: bool,
    read_only_sessions: bool,
    sessions_max: Option<u64>,
}

impl From<TokenStatus> for Token {
    fn from(token: TokenStatus) -> Self {
        Self {
            role: role(token.role()),
            module: token.module,
            label: token.label,
            serial: token.serial,
            usable: token.usable,
            fault: (!token.fault.is_empty()).then_some(token.fault),
            lanes: token.lanes,
            queued: token.queued,
            signatures: token.signatures,
            reconnects: token.reconnects,
            pin_pending: token.pin_pending,
            mechanisms: token.mechanisms,
            off: token.off,
            hanging: token.hanging,
            sessions: token.sessions,
            pace_micros: token.pace_micros,
            turned_away: token.turned_away,
            faults: token
                .faults
                .into_iter()
                .map(|seen| Fault { fault: seen.fault, count: seen.count, last: time(seen.last_unix_seconds) })
                .collect(),
            capabilities: token.capabilities.map(Capabilities::from),
        }
    }
}

impl From<TokenCapabilities> for Capabilities {
    fn from(told: TokenCapabilities) -> Self {
        // Without the first no token is opened. By the names that `keyward key create --algorithm` has.
        let algorithms = [(true, "es256"), (told.p384, "es384"), (told.ed25519, "eddsa"), (told.ps256, "ps256")];
        let wrapped = [true, told.p384, told.ed25519 && told.wrapped_ed25519, told.ps256 && told.wrapped_ps256];
        let wrapped = algorithms.iter().zip(wrapped).filter(|(_, wrapped)| *wrapped && told.wrapped_keys);
        Self {
            wrapped_algorithms: wrapped.map(|((_, name), _)| *name).collect(),
            algorithms: algorithms.into_iter().filter(|(has, _)| *has).map(|(_, name)| name).collect(),
            ed25519: told.ed25519,
            p384: told.p384,
            wrapped_keys: told.wrapped_keys,
            session_keys: told.session_keys,
            read_only_sessions: told.read_only_sessions,
            sessions_max: (told.sessions_max > 0).then_some(told.sessions_max),
        }
    }
}

impl Fault {
    fn times(&self) -> String {
        if self.count == 1 { "once".into() } else { format!("{} times", self.count) }
    }
}

impl Capabilities {
    fn text(&self) -> String {
        let wraps = match () {
            () if !self.wrapped_keys => "wraps no keys".to_owned(),
            () if self.wrapped_algorithms == self.algorithms => "wraps keys".to_owned(),
            () => format!("wraps keys of {} alone", self.wrapped_algorithms.join(" ")),
        };
        let has = [(self.session_keys, "session keys"), (self.read_only_sessions, "read-only sessions")];
        let mut words = vec![self.algorithms.join(" "), wraps];
        words.extend(has.iter().map(|(has, what)| format!("{}{what}", if *has { "" } else { "no " })));
        words.push(self.sessions_max.map_or_else(|| "any number of sessions".into(), |most| format!("{most} sessions")));
        words.join(", ")
    }
}

impl Token {
    pub(super) fn is_usable(&self) -> bool {
        self.usable
    }

    pub(super) fn text(&self) -> String {
        // A token that was never reached has not told its serial.
        let serial = if self.serial.is_empty() { "-" } else { &self.serial };
        let mut lines = vec![
            ("token", format!("{} ({}, serial {})", self.role, self.label, serial)),
            ("module", self.module.clone()),
            (
                "usable",
                match (self.usable, self.pin_pending) {
                    (true, _) => "yes",
                    (false, true) => "NO",
                    (false, false) => "NO: it is tried again by itself",
                }
                .into(),
            ),
        ];
        if self.pin_pending {
            lines.push(("login", "locked after a failed one: check the PIN, then `keyward hsm unlock`".into()));
        }
        let hanging = if self.hanging > 0 { format!(", {} HANGING", self.hanging) } else { String::new() };
        lines.push(("lanes", format!("{}{hanging}, {} sessions, {} queued", self.lanes, self.sessions, self.queued)));
        lines.push((
            "signatures",
            format!("{}, {} µs each at best, {} turned away", self.signatures, self.pace_micros, self.turned_away),
        ));
        lines.push(("reconnects", self.reconnects.to_string()));
        lines.extend(self.capabilities.iter().map(|able| ("capabilities", able.text())));
        if !self.mechanisms.is_empty() {
            lines.push(("mechanisms", format!("{}, by name in --format json", self.mechanisms.len())));
        }
        let names = std::iter::once("newest fault").chain(std::iter::repeat("fault"));
        lines.extend(
            names.zip(&self.faults).map(|(name, seen)| (name, format!("{}, {}: {}", seen.last, seen.times(), seen.fault))),
        );
        if !self.off.is_empty() {
            lines.push(("switched off", self.off.join(", ")));
        }
        pairs(&lines)
    }
}

/// As the configuration calls it.
pub(super) fn role(role: TokenRole) -> &'static str {
    match role {
        TokenRole::Authority => "authority",
        TokenRole::Agents => "agents",
        TokenRole::Unspecified => "unknown",
    }
}

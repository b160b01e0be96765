//! TOML text → [`Config`]: every default and every range is here.

use std::fmt;
use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::path::{Path, PathBuf};

use toml::Spanned;
use toml::de::DeTable;

use super::reader::{Mistake, Reader, Section};
use super::{Config, Limits, Listen, Log, LogFormat, Operator, Paths, PinSource, Rotation, Token};
use crate::model::{Digest, TrustDomain};

/// Largest file that is read, in bytes.
const FILE_BYTES_MAX: u64 = 256 * 1024;
/// Longest runtime directory: `<runtime>/operator.sock` must fit the 107 bytes of a `sockaddr_un`.
const RUNTIME_BYTES_MAX: usize = 90;
/// The uid that user namespaces map strangers to; it names nobody.
const OVERFLOW_ID: u64 = 65_534;

/// Everything that is wrong with a configuration file: one line a mistake, in the order of the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Errors(Vec<Mistake>);

impl Errors {
    /// The mistakes, never none.
    #[must_use]
    pub fn mistakes(&self) -> &[Mistake] {
        &self.0
    }
}

impl fmt::Display for Errors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, mistake) in self.0.iter().enumerate() {
            if at > 0 {
                f.write_str("\n")?;
            }
            mistake.fmt(f)?;
        }
        Ok(())
    }
}

impl std::error::Error for Errors {}

impl Config {
    /// Reads and checks the file at `path`.
    ///
    /// # Errors
    /// Every mistake at once; or the one that it cannot be read, is larger than 256 KiB, or is not UTF-8.
    pub fn load(path: &Path) -> Result<Self, Errors> {
        let whole = |what: String| Errors(vec![Mistake::of_file(what)]);
        let file = std::fs::File::open(path).map_err(|error| whole(error.to_string()))?;
        let mut text = String::new();
        let read = file.take(FILE_BYTES_MAX + 1).read_to_string(&mut text).map_err(|error| whole(error.to_string()))?;
        if read as u64 > FILE_BYTES_MAX {
            return Err(whole(format!("larger than {FILE_BYTES_MAX} bytes")));
        }
        Self::parse(&text)
    }

    /// Checks `text`.
    ///
    /// # Errors
    /// Every mistake at once.
    pub fn parse(text: &str) -> Result<Self, Errors> {
        let mut reader = Reader::new(text);
        let (document, faults) = DeTable::parse_recoverable(text);
        for fault in &faults {
            reader.syntax(fault);
        }
        let config = read(&mut reader, document.get_ref());
        match (config, reader.into_mistakes()) {
            (Some(config), mistakes) if mistakes.is_empty() => Ok(config),
            (_, mistakes) => Err(Errors(mistakes)),
        }
    }

    /// The effective values, defaults filled in, as canonical TOML: one dotted key a line, always in this order. `hash` is its
    /// SHA-256.
    #[must_use]
    pub fn effective(&self) -> String {
        let limits = &self.limits;
        let mut lines = vec![
            format!("trust.domain = {}", quoted(self.trust_domain.as_str())),
            format!("listen.tcp = \"{}\"", self.listen.tcp),
            format!("listen.names = [{}]", self.listen.names.iter().map(|name| quoted(name)).collect::<Vec<_>>().join(", ")),
            format!("paths.state = {}", quoted_path(&self.paths.state)),
            format!("paths.runtime = {}", quoted_path(&self.paths.runtime)),
        ];
        lines.extend(token_lines("authority", &self.authority));
        lines.extend(token_lines("agents", &self.agents));
        lines.extend([
            format!("operator.uids = {:?}", self.operator.uids),
            format!("operator.gids = {:?}", self.operator.gids),
            format!("limits.ttl_seconds_default = {}", limits.ttl_seconds_default),
            format!("limits.rejoin_seconds_default = {}", limits.rejoin_seconds_default),
            format!("limits.token_ttl_seconds_default = {}", limits.token_ttl_seconds_default),
            format!("limits.live_certificates_per_agent = {}", limits.live_certificates_per_agent),
            format!("limits.connections = {}", limits.connections),
            format!("limits.unauthenticated_streams = {}", limits.unauthenticated_streams),
            format!("limits.ledger_queue = {}", limits.ledger_queue),
            format!("limits.hsm_queue = {}", limits.hsm_queue),
            format!("limits.sign_deadline_ms = {}", limits.sign_deadline_ms),
            format!("limits.keys_per_agent = {}", limits.keys_per_agent),
            format!("limits.session_keys_per_agent = {}", limits.session_keys_per_agent),
            format!("limits.resident_keys_per_agent = {}", limits.resident_keys_per_agent),
            format!("limits.resident_keys = {}", limits.resident_keys),
            format!("limits.keys_cached = {}", limits.keys_cached),
            format!("limits.signatures_per_second = {}", limits.signatures_per_second),
            format!("limits.key_changes_per_second = {}", limits.key_changes_per_second),
            format!("limits.crl_seconds = {}", limits.crl_seconds),
        ]);
        lines.extend(self.rotation.lines());
        lines.extend([
            format!("log.level = {}", quoted(&self.log.level)),
            format!(
                "log.format = {}",
                match self.log.format {
                    LogFormat::Text => "\"text\"",
                    LogFormat::Json => "\"json\"",
                }
            ),
        ]);
        lines.join("\n") + "\n"
    }
}

fn token_lines(role: &str, token: &Token) -> Vec<String> {
    let mut lines = vec![
        format!("hsm.{role}.module = {}", quoted_path(&token.module)),
        format!("hsm.{role}.token = {}", quoted(&token.label)),
    ];
    lines.extend(token.serial.iter().map(|serial| format!("hsm.{role}.serial = {}", quoted(serial))));
    lines.push(match &token.pin {
        PinSource::File(path) => format!("hsm.{role}.pin_file = {}", quoted_path(path)),
        PinSource::Fd(fd) => format!("hsm.{role}.pin_fd = {fd}"),
        PinSource::Credential(name) => format!("hsm.{role}.pin_credential = {}", quoted(name)),
    });
    lines.push(format!("hsm.{role}.lanes = {}", token.lanes));
    lines
}

fn quoted(text: &str) -> String {
    toml::Value::String(text.to_owned()).to_string()
}

fn quoted_path(path: &Path) -> String {
    quoted(&path.to_string_lossy())
}

fn read<'d>(reader: &mut Reader<'_>, document: &'d DeTable<'d>) -> Option<Config> {
    let mut root = Section::root(document);
    let trust_domain = trust(root.table(reader, "trust", "trust"), reader);
    let listen = listen(root.table(reader, "listen", "listen"), reader);
    let paths = paths(root.table(reader, "paths", "paths"), reader);
    let tokens = tokens(root.table(reader, "hsm", "hsm"), reader);
    let operator = operator(root.table(reader, "operator", "operator"), reader);
    let limits = limits(root.table(reader, "limits", "limits"), reader);
    let rotation = Rotation::read(root.table(reader, "rotation", "rotation"), reader);
    let log = log(root.table(reader, "log", "log"), reader);
    root.finish(reader);

    let (authority, agents) = tokens?;
    let mut config = Config {
        trust_domain: trust_domain?,
        listen: listen?,
        paths: paths?,
        authority,
        agents,
        operator,
        limits,
        rotation,
        log: log?,
        hash: Digest([0; 32]),
    };
    config.hash = Digest::of(config.effective().as_bytes());
    Some(config)
}

fn trust(mut section: Section<'_>, reader: &mut Reader<'_>) -> Option<TrustDomain> {
    let domain = section.required_text(reader, "domain").and_then(|text| {
        TrustDomain::parse(text.get_ref())
            .map_err(|error| section.wrong(reader, Some(text.span()), "domain", &error.to_string()))
            .ok()
    });
    section.finish(reader);
    domain
}

fn listen(mut section: Section<'_>, reader: &mut Reader<'_>) -> Option<Listen> {
    let place = section.text(reader, "tcp").unwrap_or_else(|| Spanned::new(0..0, "127.0.0.1:8443"));
    let tcp = place.get_ref().parse::<SocketAddr>().ok();
    if tcp.is_none() {
        let what = format!("must be an IP address and a port, as in \"0.0.0.0:8443\", is {:?}", place.get_ref());
        section.wrong(reader, Some(place.span()), "tcp", &what);
    }
    let names = section.texts(reader, "names");
    if names.len() > 16 {
        section.wrong(reader, names.get(16).map(Spanned::span), "names", "must be at most 16");
    }
    for name in names.iter().filter(|name| !is_host(name.get_ref())) {
        let what = format!("must be host names or IP addresses without a port, has {:?}", name.get_ref());
        section.wrong(reader, Some(name.span()), "names", &what);
    }
    let mut names: Vec<String> = names.iter().map(|name| (*name.get_ref()).to_owned()).collect();
    if let (Some(tcp), true) = (tcp, names.is_empty()) {
        if tcp.ip().is_unspecified() {
            section.wrong(reader, Some(place.span()), "names", "is missing: agents cannot connect to a wildcard address");
        }
        names.push(tcp.ip().to_string());
    }
    section.finish(reader);
    Some(Listen { tcp: tcp?, names })
}

/// A DNS name (RFC 1123 §2.1) or an IP address.
fn is_host(name: &str) -> bool {
    let label = |label: &str| {
        !label.is_empty()
            && label.len() <= 63
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|byte| byte.is_ascii_alphanumeric() || byte == b'-')
    };
    name.parse::<IpAddr>().is_ok() || (name.len() <= 253 && name.split('.').all(label))
}

fn paths(mut section: Section<'_>, reader: &mut Reader<'_>) -> Option<Paths> {
    let state_given = section.path(reader, "state");
    let runtime_given = section.path(reader, "runtime");
    let state = state_given.unwrap_or_else(|| PathBuf::from("/var/lib/keyward"));
    let runtime = runtime_given.unwrap_or_else(|| PathBuf::from("/run/keyward"));
    if runtime.as_os_str().len() > RUNTIME_BYTES_MAX {
        let what = format!("must have at most {RUNTIME_BYTES_MAX} bytes (a socket's path is limited to 107)");
        section.wrong(reader, None, "runtime", &what);
    }
    if state == runtime {
        section.wrong(reader, None, "runtime", "must differ from state: what is in it does not outlive a reboot");
    }
    section.finish(reader);
    Some(Paths { state, runtime })
}

fn tokens(mut section: Section<'_>, reader: &mut Reader<'_>) -> Option<(Token, Token)> {
    let authority = token(section.table(reader, "authority", "hsm.authority"), reader);
    let agents_section = section.table(reader, "agents", "hsm.agents");
    let agents = if agents_section.is_present() { token(agents_section, reader) } else { authority.clone() };
    section.finish(reader);
    let (authority, agents) = (authority?, agents?);
    if authority != agents && authority.pin == agents.pin && matches!(authority.pin, PinSource::Fd(_)) {
        reader.mistake(None, "[hsm.agents] pin_fd: must differ from that of [hsm.authority]: a descriptor is read once");
        return None;
    }
    if authority != agents && may_be_one(&authority, &agents) {
        // Two PINs for one token, or one that is tried for each: a wrong one would cost more than one try.
        reader.mistake(
            None,
            "[hsm.agents]: may be the token of [hsm.authority]: leave the section out, or tell them apart by serial",
        );
        return None;
    }
    Some((authority, agents))
}

fn may_be_one(one: &Token, other: &Token) -> bool {
    let serials = one.serial.as_ref().zip(other.serial.as_ref());
    one.module == other.module && one.label == other.label && serials.is_none_or(|(one, other)| one == other)
}

fn token(mut section: Section<'_>, reader: &mut Reader<'_>) -> Option<Token> {
    let module = section.required_path(reader, "module");
    let label = section.required_text(reader, "token").and_then(|label| {
        // CK_TOKEN_INFO.label: 32 bytes, padded (PKCS#11 2.40 §3.2).
        let fits = (1..=32).contains(&label.get_ref().len());
        if !fits {
            section.wrong(reader, Some(label.span()), "token", "must have 1 to 32 bytes");
        }
        fits.then(|| (*label.get_ref()).to_owned())
    });
    let serial = section.text(reader, "serial");
    if let Some(serial) = serial.as_ref().filter(|serial| !(1..=16).contains(&serial.get_ref().len())) {
        section.wrong(reader, Some(serial.span()), "serial", "must have 1 to 16 bytes");
    }
    let serial = serial.map(|serial| (*serial.get_ref()).to_owned());
    let pin = pin(&mut section, reader);
    let lanes = section.number(reader, "lanes", 1..=256);
    section.finish(reader);
    let lanes = lanes.and_then(|lanes| usize::try_from(lanes).ok()).unwrap_or_else(lanes_default);
    Some(Token { module: module?, label: label?, serial, pin: pin?, lanes })
}

/// As many as cores, but at least two, so that one signs while another hangs: on a CPU-bound token more only cost turns of the scheduler,
/// on one with a processor of its own the operator says how many.
fn lanes_default() -> usize {
    std::thread::available_parallelism().map_or(2, |cores| cores.get().clamp(2, 256))
}

fn pin(section: &mut Section<'_>, reader: &mut Reader<'_>) -> Option<PinSource> {
    let keys = section.keys_left();
    let file = section.path(reader, "pin_file").map(PinSource::File);
    let fd = section.number(reader, "pin_fd", 0..=65_535).and_then(|fd| i32::try_from(fd).ok()).map(PinSource::Fd);
    let credential = section.text(reader, "pin_credential").and_then(|name| {
        let is_name = !name.get_ref().is_empty() && !name.get_ref().contains(['/', '\0']) && !name.get_ref().starts_with('.');
        if !is_name {
            section.wrong(reader, Some(name.span()), "pin_credential", "must be a file name below $CREDENTIALS_DIRECTORY");
        }
        is_name.then(|| PinSource::Credential((*name.get_ref()).to_owned()))
    });
    match keys - section.keys_left() {
        0 => section.wrong(reader, None, "pin_file", "is missing: name one of pin_file, pin_fd, pin_credential"),
        1 => {}
        _ => section.wrong(reader, None, "pin_file", "only one of pin_file, pin_fd, pin_credential may be named"),
    }
    file.or(fd).or(credential)
}

fn operator(mut section: Section<'_>, reader: &mut Reader<'_>) -> Operator {
    let mut ids = |key: &str| {
        let mut ids = Vec::new();
        for id in section.numbers(reader, key, &(0..=u64::from(u32::MAX - 1))) {
            if *id.get_ref() == OVERFLOW_ID {
                section.wrong(reader, Some(id.span()), key, "must not be 65534: user namespaces map every stranger to it");
            }
            ids.extend(u32::try_from(*id.get_ref()));
        }
        if ids.len() > 64 {
            section.wrong(reader, None, key, "must be at most 64");
        }
        ids
    };
    let operator = Operator { uids: ids("uids"), gids: ids("gids") };
    section.finish(reader);
    operator
}

fn limits(mut section: Section<'_>, reader: &mut Reader<'_>) -> Limits {
    let mut number = |key, range, default: u64| section.number(reader, key, range).unwrap_or(default);
    // Every range ends below 2^32, so the conversions are exact.
    let small = |value: u64| u32::try_from(value).unwrap_or(u32::MAX);
    let count = |value: u64| usize::try_from(value).unwrap_or(usize::MAX);
    let limits = Limits {
        ttl_seconds_default: small(number("ttl_seconds_default", 10..=86_400, 600)),
        rejoin_seconds_default: small(number("rejoin_seconds_default", 0..=2_592_000, 86_400)),
        token_ttl_seconds_default: small(number("token_ttl_seconds_default", 10..=604_800, 3_600)),
        live_certificates_per_agent: count(number("live_certificates_per_agent", 2..=64, 8)),
        connections: count(number("connections", 1..=100_000, 10_000)),
        unauthenticated_streams: count(number("unauthenticated_streams", 1..=4_096, 256)),
        ledger_queue: count(number("ledger_queue", 16..=65_536, 4_096)),
        hsm_queue: count(number("hsm_queue", 16..=65_536, 1_024)),
        sign_deadline_ms: number("sign_deadline_ms", 100..=60_000, 5_000),
        keys_per_agent: count(number("keys_per_agent", 1..=1_000_000, 1_000)),
        session_keys_per_agent: count(number("session_keys_per_agent", 1..=16_384, 64)),
        resident_keys_per_agent: count(number("resident_keys_per_agent", 1..=10_000, 16)),
        resident_keys: count(number("resident_keys", 1..=100_000, 1_000)),
        keys_cached: count(number("keys_cached", 16..=1_000_000, 4_096)),
        signatures_per_second: small(number("signatures_per_second", 1..=1_000_000, 1_000)),
        key_changes_per_second: small(number("key_changes_per_second", 1..=100_000, 20)),
        crl_seconds: small(number("crl_seconds", 60..=604_800, 3_600)),
    };
    section.finish(reader);
    limits
}

fn log(mut section: Section<'_>, reader: &mut Reader<'_>) -> Option<Log> {
    const LEVELS: [&str; 5] = ["error", "warn", "info", "debug", "trace"];
    let level = section.text(reader, "level").unwrap_or_else(|| Spanned::new(0..0, "info"));
    if !LEVELS.contains(level.get_ref()) {
        let what = format!("must be error, warn, info, debug or trace, is {:?}", level.get_ref());
        section.wrong(reader, Some(level.span()), "level", &what);
    }
    let format = section.text(reader, "format").unwrap_or_else(|| Spanned::new(0..0, "text"));
    let parsed = match *format.get_ref() {
        "text" => Some(LogFormat::Text),
        "json" => Some(LogFormat::Json),
        other => {
            section.wrong(reader, Some(format.span()), "format", &format!("must be text or json, is {other:?}"));
            None
        }
    };
    section.finish(reader);
    Some(Log { level: (*level.get_ref()).to_owned(), format: parsed? })
}

//! `keyward status`: is it well, and if not, why.

use std::process::ExitCode;

use serde::Serialize;

use super::agents::Daemon;
use super::ca_list::Rotation;
use super::hsm_status::Token;
use super::render::pairs;
use super::{EXIT_UNAVAILABLE, Failure, Global, Output, duration};
use crate::model::hex;
use crate::proto::{GetAuthoritiesRequest, StatusRequest, StatusResponse};

#[derive(Serialize)]
struct Status {
    version: String,
    trust_domain: String,
    ready: bool,
    not_ready_because: Vec<String>,
    uptime_seconds: u64,
    listen: Vec<String>,
    config_hash: String,
    agents: u64,
    quarantined: u64,
    not_on_crl: u64,
    files_behind: Vec<String>,
    rotation: Option<Rotation>,
    keys_to_rewrap: u64,
    ledger: Ledger,
    clock: Clock,
    tokens: Vec<Token>,
    cpu: Cpu,
}

#[derive(Serialize)]
struct Ledger {
    entries: u64,
    commits: u64,
    file_bytes: u64,
    bytes_per_day: u64,
    days_until_full: Option<u64>,
    checkpoint_size: u64,
    writable: bool,
    open_intents: u64,
}

#[derive(Serialize)]
struct Clock {
    trusted: bool,
    deviation_micros: i64,
}

#[derive(Serialize)]
struct Cpu {
    process_nanos: u64,
    sign_nanos: u64,
    sign_count: u64,
    verify_own_nanos: u64,
    verify_own_count: u64,
    csr_nanos: u64,
    csr_count: u64,
    csr_verify_nanos: u64,
    proof_nanos: u64,
    proof_count: u64,
    certificate_nanos: u64,
    ledger_nanos: u64,
    handshake_nanos: u64,
    handshake_count: u64,
}

/// What the daemon says of itself.
pub(super) async fn ask(global: &Global) -> Result<StatusResponse, Failure> {
    told(&mut Daemon::connect(global).await?).await
}

async fn told(daemon: &mut Daemon) -> Result<StatusResponse, Failure> {
    Ok(daemon.service.status(StatusRequest {}).await.map_err(|status| daemon.failed(&status))?.into_inner())
}

/// Exits 5 where the daemon is up but not ready, so that scripts can wait for it.
pub(super) async fn run(global: &Global, output: &mut Output) -> Result<ExitCode, Failure> {
    let mut daemon = Daemon::connect(global).await?;
    let mut status = Status::from(told(&mut daemon).await?);
    // A daemon that cannot tell of its authorities tells in its status why.
    let authorities = daemon.service.get_authorities(GetAuthoritiesRequest {}).await.ok();
    status.rotation = authorities.map(|answer| Rotation::of(answer.get_ref()));
    output.show(&status, Status::text)?;
    Ok(if status.ready { ExitCode::SUCCESS } else { ExitCode::from(EXIT_UNAVAILABLE) })
}

impl From<StatusResponse> for Status {
    fn from(status: StatusResponse) -> Self {
        let ledger = status.ledger.unwrap_or_default();
        let clock = status.clock.unwrap_or_default();
        let cpu = status.cpu.unwrap_or_default();
        Self {
            version: status.version,
            trust_domain: status.trust_domain,
            ready: status.ready,
            not_ready_because: status.not_ready_because,
            uptime_seconds: status.uptime_seconds,
            listen: status.listen,
            config_hash: hex(&status.config_hash),
            agents: status.agents,
            quarantined: status.quarantined,
            not_on_crl: status.not_on_crl,
            files_behind: status.files_behind,
            rotation: None,
            keys_to_rewrap: status.keys_to_rewrap,
            ledger: Ledger {
                entries: ledger.entries,
                commits: ledger.commits,
                file_bytes: ledger.file_bytes,
                bytes_per_day: ledger.bytes_per_day,
                days_until_full: (ledger.days_until_full != 0).then_some(ledger.days_until_full),
                checkpoint_size: ledger.checkpoint_size,
                writable: ledger.writable,
                open_intents: ledger.open_intents,
            },
            clock: Clock { trusted: clock.trusted, deviation_micros: clock.deviation_micros },
            tokens: status.tokens.into_iter().map(Token::from).collect(),
            cpu: Cpu {
                process_nanos: cpu.process_nanos,
                sign_nanos: cpu.sign_nanos,
                sign_count: cpu.sign_count,
                verify_own_nanos: cpu.verify_own_nanos,
                verify_own_count: cpu.verify_own_count,
                csr_nanos: cpu.csr_nanos,
                csr_count: cpu.csr_count,
                csr_verify_nanos: cpu.csr_verify_nanos,
                proof_nanos: cpu.proof_nanos,
                proof_count: cpu.proof_count,
                certificate_nanos: cpu.certificate_nanos,
                ledger_nanos: cpu.ledger_nanos,
                handshake_nanos: cpu.handshake_nanos,
                handshake_count: cpu.handshake_count,
            },
        }
    }
}

impl Status {
    fn text(&self) -> String {
        let ledger = &self.ledger;
        let mut lines = vec![
            ("version", self.version.clone()),
            ("trust domain", self.trust_domain.clone()),
            ("ready", if self.ready { "yes" } else { "no" }.into()),
        ];
        lines.extend(self.not_ready_because.iter().map(|cause| ("because", cause.clone())));
        lines.extend([
            ("up for", duration::text(self.uptime_seconds)),
            ("listens on", if self.listen.is_empty() { "-".into() } else { self.listen.join(", ") }),
            ("agents", format!("{}, {} quarantined", self.agents, self.quarantined)),
            ("CRL", crl(self.not_on_crl)),
        ]);
        lines.extend(self.rotation.iter().flat_map(Rotation::lines));
        lines.extend([
            ("keys to rewrap", self.keys_to_rewrap.to_string()),
            ("ledger", format!("{} entries, {} commits, {}", ledger.entries, ledger.commits, bytes(ledger.file_bytes))),
            ("ledger writable", if ledger.writable { "yes" } else { "NO" }.into()),
            ("ledger growth", self.growth()),
            ("open intents", ledger.open_intents.to_string()),
            (
                "checkpoint",
                if ledger.checkpoint_size == 0 { "-".into() } else { format!("of {} entries", ledger.checkpoint_size) },
            ),
            ("clock", self.clock.text()),
            ("configuration", format!("SHA-256 {}", self.config_hash)),
        ]);
        lines.extend(self.files_behind.iter().map(|file| ("NOT WRITTEN", file.clone())));
        let mut text = pairs(&lines);
        for token in &self.tokens {
            text.push('\n');
            text.push_str(&token.text());
        }
        text
    }

    fn growth(&self) -> String {
        if self.ledger.bytes_per_day == 0 {
            return "not known yet".into();
        }
        let per_day = format!("{} a day", bytes(self.ledger.bytes_per_day));
        match self.ledger.days_until_full {
            Some(days) => format!("{per_day}, full in {days} days"),
            None => per_day,
        }
    }
}

impl Clock {
    fn text(&self) -> String {
        let trusted = if self.trusted { "trusted" } else { "NOT TRUSTED: `keyward clock accept --reason …` once it is right" };
        format!("{trusted}, deviates by {} ms", self.deviation_micros / 1_000)
    }
}

/// Whether the newest CRL tells of every quarantine. What it lacks is in force all the same.
pub(super) fn crl(not_listed: u64) -> String {
    match not_listed {
        0 => "tells of every quarantine".into(),
        1 => "1 certificate that is denied is NOT ON IT YET".into(),
        many => format!("{many} certificates that are denied are NOT ON IT YET"),
    }
}

/// Bytes as people read them.
fn bytes(count: u64) -> String {
    let mut rest = count;
    for unit in ["B", "KiB", "MiB", "GiB"] {
        if rest < 10_240 {
            return format!("{rest} {unit}");
        }
        rest /= 1_024;
    }
    format!("{rest} TiB")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_keep_two_figures() {
        assert_eq!([0, 10_239, 10_240, 1 << 30].map(bytes), ["0 B", "10239 B", "10 KiB", "1024 MiB"]);
    }
}

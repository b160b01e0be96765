//! One measured phase: what the daemon's own meters said before and after it.

use std::time::{Duration, Instant};

use rusqlite::{Connection, OpenFlags};
use serde::Serialize;

use super::Failed;
use super::figures::Latency;
use super::fleet::{Fleet, Step};
use super::house::{House, Running};
use crate::model::process_cpu_nanos;
use crate::proto::{CpuParts, StatusRequest};

/// Where the daemon's CPU went, in microseconds per certificate.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Parts {
    /// C_SignInit and C_Sign.
    pub sign: f64,
    /// Verifying our own signature.
    pub verify_own: f64,
    /// Parsing and verifying the CSR.
    pub csr: f64,
    /// Of it, the verification.
    pub csr_verify: f64,
    /// Join and bound-key proofs.
    pub proof: f64,
    /// Building to-be-signed bytes and certificates.
    pub certificate: f64,
    /// The ledger's writer thread.
    pub ledger: f64,
    /// TLS handshakes.
    pub handshake: f64,
    /// All the rest: gRPC, HTTP/2, TLS records, the kernel's sockets, the runtime.
    pub rest: f64,
}

/// One phase's figures.
#[derive(Debug, Clone, Serialize)]
pub struct Phase {
    /// attest, renew_standing, renew_own_connection.
    pub name: &'static str,
    /// Issued.
    pub certificates: u64,
    /// From the first request to the last answer.
    pub seconds: f64,
    /// Their quotient.
    pub certificates_per_second: f64,
    /// As the generator saw it, its own share of the two cores included.
    #[serde(flatten)]
    pub latency: Latency,
    /// User and system time of the daemon, per certificate.
    pub server_cpu_us_per_certificate: f64,
    /// It, split.
    pub parts_us: Parts,
    /// One C_Sign and two P-256 verifications, measured around these very calls.
    pub floor_cpu_us: f64,
    /// One handshake; 0 where certificates did not need one each: a straggler's must not flatter the ratio.
    pub handshake_cpu_us: f64,
    /// Transactions of the ledger.
    pub commits_per_second: f64,
    /// Growth of the ledger's file, its write-ahead log counted in, per certificate.
    pub ledger_bytes_per_certificate: f64,
    /// VmRSS at the end.
    pub rss_mib: f64,
    /// CPU of the generator, per certificate.
    pub generator_cpu_us_per_certificate: f64,
}

/// What the daemon says of itself at one moment.
pub(super) struct Snapshot {
    pub cpu: CpuParts,
    pub commits: u64,
    pub ledger_bytes: u64,
    generator_nanos: u64,
}

impl Snapshot {
    pub(super) async fn take(house: &House, running: &mut Running) -> Result<Self, Failed> {
        let ledger_bytes = ledger_bytes(house)?;
        let status = running.operator.status(StatusRequest {}).await?.into_inner();
        Ok(Self {
            cpu: status.cpu.ok_or("a status without CPU")?,
            commits: status.ledger.ok_or("a status without a ledger")?.commits,
            ledger_bytes,
            generator_nanos: process_cpu_nanos(),
        })
    }
}

/// Pages of the database as a reader sees it now: those still in the write-ahead log count.
fn ledger_bytes(house: &House) -> Result<u64, Failed> {
    let file = Connection::open_with_flags(house.ledger(), OpenFlags::SQLITE_OPEN_READ_ONLY)?;
    let pragma = |name: &str| file.query_row(&format!("PRAGMA {name}"), [], |row| row.get::<_, i64>(0));
    let used = pragma("page_count")? - pragma("freelist_count")?;
    Ok(u64::try_from(used * pragma("page_size")?)?)
}

/// What is measured: a step, so many times over, under a name.
#[derive(Debug, Clone, Copy)]
pub(super) struct Measured {
    pub name: &'static str,
    pub step: Step,
    pub rounds: usize,
    pub outstanding: usize,
}

impl Measured {
    /// All agents take the step, round by round: what the whole cost, and each round.
    pub(super) async fn run(
        self,
        house: &House,
        running: &mut Running,
        fleet: &mut Fleet,
    ) -> Result<(Phase, Vec<Phase>), Failed> {
        let mut moments = vec![Snapshot::take(house, running).await?];
        let (mut all, mut rounds, mut whole) = (Vec::new(), Vec::new(), Duration::ZERO);
        for _ in 0..self.rounds {
            let from = Instant::now();
            let latencies = fleet.all(self.step, self.outstanding).await?;
            let took = from.elapsed();
            let after = Snapshot::take(house, running).await?;
            if let Some(before) = moments.last() {
                rounds.push(phase(self.name, before, &after, took, latencies.clone(), running.rss_kib()?));
            }
            moments.push(after);
            all.extend(latencies);
            whole += took;
        }
        match moments.as_slice() {
            [first, .., last] => Ok((phase(self.name, first, last, whole, all, running.rss_kib()?), rounds)),
            _ => Err("nothing was measured".into()),
        }
    }
}

#[expect(clippy::cast_precision_loss, reason = "figures, not accounts")]
fn phase(
    name: &'static str,
    before: &Snapshot,
    after: &Snapshot,
    took: Duration,
    latencies: Vec<Duration>,
    rss_kib: u64,
) -> Phase {
    let certificates = latencies.len() as u64;
    let each = |nanos: u64| nanos as f64 / 1e3 / certificates.max(1) as f64;
    let cpu = Difference { before: &before.cpu, after: &after.cpu };
    let seconds = took.as_secs_f64();
    let mut parts = Parts {
        sign: each(cpu.of(|cpu| cpu.sign_nanos)),
        verify_own: each(cpu.of(|cpu| cpu.verify_own_nanos)),
        csr: each(cpu.of(|cpu| cpu.csr_nanos)),
        csr_verify: each(cpu.of(|cpu| cpu.csr_verify_nanos)),
        proof: each(cpu.of(|cpu| cpu.proof_nanos)),
        certificate: each(cpu.of(|cpu| cpu.certificate_nanos)),
        ledger: each(cpu.of(|cpu| cpu.ledger_nanos)),
        handshake: each(cpu.of(|cpu| cpu.handshake_nanos)),
        rest: 0.0,
    };
    let whole = each(cpu.of(|cpu| cpu.process_nanos));
    // csr_verify is within csr.
    let known = [parts.sign, parts.verify_own, parts.csr, parts.proof, parts.certificate, parts.ledger, parts.handshake];
    parts.rest = whole - known.iter().sum::<f64>();
    let floor_cpu_us = cpu.mean_us(|cpu| (cpu.sign_nanos, cpu.sign_count))
        + cpu.mean_us(|cpu| (cpu.verify_own_nanos, cpu.verify_own_count))
        + cpu.mean_us(|cpu| (cpu.csr_verify_nanos, cpu.csr_count));
    Phase {
        name,
        certificates,
        seconds,
        certificates_per_second: certificates as f64 / seconds,
        latency: Latency::of(latencies),
        server_cpu_us_per_certificate: whole,
        parts_us: parts,
        floor_cpu_us,
        handshake_cpu_us: if cpu.of(|cpu| cpu.handshake_count) * 2 > certificates {
            cpu.mean_us(|cpu| (cpu.handshake_nanos, cpu.handshake_count))
        } else {
            0.0
        },
        commits_per_second: after.commits.saturating_sub(before.commits) as f64 / seconds,
        ledger_bytes_per_certificate: after.ledger_bytes.saturating_sub(before.ledger_bytes) as f64 / certificates.max(1) as f64,
        rss_mib: rss_kib as f64 / 1024.0,
        generator_cpu_us_per_certificate: each(after.generator_nanos.saturating_sub(before.generator_nanos)),
    }
}

pub(super) struct Difference<'a> {
    pub before: &'a CpuParts,
    pub after: &'a CpuParts,
}

impl Difference<'_> {
    pub(super) fn of(&self, part: impl Fn(&CpuParts) -> u64) -> u64 {
        part(self.after).saturating_sub(part(self.before))
    }

    /// Microseconds a call; 0 where there was none.
    #[expect(clippy::cast_precision_loss, reason = "figures, not accounts")]
    pub(super) fn mean_us(&self, part: impl Fn(&CpuParts) -> (u64, u64)) -> f64 {
        let count = self.of(|cpu| part(cpu).1);
        if count == 0 { 0.0 } else { self.of(|cpu| part(cpu).0) as f64 / 1e3 / count as f64 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_phase_is_the_difference_of_two_moments_and_its_parts_add_up_to_the_whole() {
        let cpu = |times: u64| CpuParts {
            sign_nanos: 50_000 * times,
            sign_count: times,
            verify_own_nanos: 40_000 * times,
            verify_own_count: times,
            csr_nanos: 60_000 * times,
            csr_count: times,
            csr_verify_nanos: 45_000 * times,
            ledger_nanos: 10_000 * times,
            process_nanos: 250_000 * times,
            handshake_nanos: 200_000 * (times / 8),
            handshake_count: times / 8,
            certificate_nanos: 9_000 * times,
            ..CpuParts::default()
        };
        let moment = |times: u64| Snapshot {
            cpu: cpu(times),
            commits: 10 * times,
            ledger_bytes: 1_400 * times,
            generator_nanos: 30_000 * times,
        };
        let phase = phase("test", &moment(7), &moment(9), Duration::from_secs(4), vec![Duration::from_millis(3); 2], 2048);
        let near = |a: f64, b: f64| assert!((a - b).abs() < 1e-9, "{a} {b}");
        near(phase.server_cpu_us_per_certificate, 250.0);
        near(phase.floor_cpu_us, 135.0);
        near(phase.handshake_cpu_us, 0.0);
        near(phase.parts_us.handshake, 100.0);
        near(phase.parts_us.rest, 250.0 - 50.0 - 40.0 - 60.0 - 10.0 - 9.0 - 100.0);
        near(phase.certificates_per_second, 0.5);
        near(phase.commits_per_second, 5.0);
        near(phase.ledger_bytes_per_certificate, 1400.0);
        near(phase.rss_mib, 2.0);
        near(phase.latency.p99_ms, 3.0);
    }
}

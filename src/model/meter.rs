//! Where the CPU goes: thread time around the calls that make the floor (design §9), always on, a fraction of a microsecond each.

use std::sync::atomic::{AtomicU64, Ordering};

/// Nanoseconds of thread CPU and how often.
#[derive(Default)]
pub struct Gauge {
    nanos: AtomicU64,
    count: AtomicU64,
}

impl Gauge {
    /// Runs `work` and adds the CPU time this thread spent in it.
    pub fn measure<T>(&self, work: impl FnOnce() -> T) -> T {
        let before = thread_cpu_nanos();
        let result = work();
        self.add(thread_cpu_nanos().saturating_sub(before));
        result
    }

    /// Adds one measurement.
    pub fn add(&self, nanos: u64) {
        self.nanos.fetch_add(nanos, Ordering::Relaxed);
        self.count.fetch_add(1, Ordering::Relaxed);
    }

    /// Total nanoseconds.
    pub fn nanos(&self) -> u64 {
        self.nanos.load(Ordering::Relaxed)
    }

    /// How many measurements.
    pub fn count(&self) -> u64 {
        self.count.load(Ordering::Relaxed)
    }
}

/// The parts that are told apart.
#[derive(Default)]
pub struct Meter {
    /// C_SignInit and C_Sign.
    pub sign: Gauge,
    /// Verification of our own signature.
    pub verify_own: Gauge,
    /// Parsing and checking a CSR.
    pub csr: Gauge,
    /// The signature check within.
    pub csr_verify: Gauge,
    /// The ledger's writer thread, a batch a measurement.
    pub ledger: Gauge,
    /// TLS handshakes.
    pub handshake: Gauge,
    /// Join and bound-key proofs.
    pub proof: Gauge,
    /// Building to-be-signed bytes and certificates.
    pub certificate: Gauge,
}

/// CPU time of the calling thread (CLOCK_THREAD_CPUTIME_ID).
#[must_use]
pub fn thread_cpu_nanos() -> u64 {
    nanos(rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime))
}

/// CPU time of the whole process.
#[must_use]
pub fn process_cpu_nanos() -> u64 {
    nanos(rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime))
}

fn nanos(time: rustix::time::Timespec) -> u64 {
    u64::try_from(time.tv_sec).unwrap_or(0).saturating_mul(1_000_000_000).saturating_add(u64::try_from(time.tv_nsec).unwrap_or(0))
}

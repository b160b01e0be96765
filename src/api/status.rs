//! `keyward status`: what an operator wants to know at a glance.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use crate::acts::Acts;
use crate::hsm::{Check, FaultSeen, Hsm, Status as TokenState};
use crate::ledger::Ledger;
use crate::model::{Digest, process_cpu_nanos};
use crate::proto::{self, TokenRole};

/// How long a daemon has to live before its ledger's growth is told.
const GROWTH_KNOWN_SECONDS: u64 = 600;

/// Whether the daemon is ready, and what it knows of itself.
#[derive(Clone)]
pub struct Readiness(Arc<Inner>);

struct Inner {
    started: Instant,
    start_size: u64,
    start_bytes: u64,
    config_hash: Digest,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    missing: Vec<String>,
    tokens: Vec<Hsm>,
    pending: Vec<proto::TokenStatus>,
    listen: Vec<String>,
}

impl Readiness {
    /// At start: nothing is ready.
    #[must_use]
    pub fn new(ledger: &Ledger, config_hash: Digest) -> Self {
        let state = State { missing: vec!["starting".to_owned()], ..State::default() };
        Self(Arc::new(Inner {
            started: Instant::now(),
            start_size: ledger.progress().borrow().size,
            start_bytes: ledger.file_bytes(),
            config_hash,
            state: Mutex::new(state),
        }))
    }

    fn state(&self) -> std::sync::MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What is missing; nothing: ready.
    pub fn set_missing(&self, missing: Vec<String>) {
        self.state().missing = missing;
    }

    /// The tokens that are open by now.
    pub fn set_tokens(&self, tokens: Vec<Hsm>) {
        let mut state = self.state();
        state.tokens = tokens;
        state.pending.clear();
    }

    /// The opened tokens, each once.
    #[must_use]
    pub fn tokens(&self) -> Vec<Hsm> {
        self.state().tokens.clone()
    }

    /// Tokens that could not be opened, with why. The same fault again is counted.
    pub fn set_pending_tokens(&self, mut pending: Vec<proto::TokenStatus>) {
        let mut state = self.state();
        let before = std::mem::take(&mut state.pending);
        for token in &mut pending {
            let known = before.iter().filter(|known| known.role == token.role).flat_map(|known| &known.faults);
            for (fault, known) in token.faults.iter_mut().zip(known) {
                fault.count += if fault.fault == known.fault { known.count } else { 0 };
            }
        }
        state.pending = pending;
    }

    /// Where agents reach the daemon.
    pub fn set_listen(&self, listen: Vec<String>) {
        self.state().listen = listen;
    }

    /// Every opened token in turn is asked to do what it is there for; one that could not be opened says why.
    pub(super) async fn test_tokens(&self, signatures: usize) -> Vec<proto::TokenCheck> {
        let (tokens, pending) = {
            let state = self.state();
            (state.tokens.clone(), state.pending.clone())
        };
        let unopened = |token: proto::TokenStatus| proto::TokenCheck {
            role: token.role,
            label: token.label,
            name: "open".to_owned(),
            error: token.fault,
            ..proto::TokenCheck::default()
        };
        let mut checks: Vec<_> = pending.into_iter().map(unopened).collect();
        for token in tokens {
            let (role, label) = token.name();
            checks.extend(token.test(signatures).await.into_iter().map(|one| check(role, &label, one)));
        }
        checks
    }

    pub(super) async fn status(&self, acts: &Acts) -> proto::StatusResponse {
        let ledger = acts.ledger();
        let checkpoint = {
            let ledger = ledger.clone();
            let note = tokio::task::spawn_blocking(move || ledger.reader().fact("checkpoint")).await;
            note.ok().and_then(Result::ok).flatten().unwrap_or_default()
        };
        // origin, size, root: the second line of a note is its size.
        let checkpoint_size = String::from_utf8_lossy(&checkpoint).lines().nth(1).and_then(|line| line.parse().ok()).unwrap_or(0);
        let trusted = ledger.clock().now().is_ok();
        let (agents, quarantined, open_intents) = ledger.counts();
        // Copied: what looks at tokens and files is not to hold up whoever tells of health.
        let (missing, opened, pending, listen) = {
            let state = self.state();
            (state.missing.clone(), state.tokens.clone(), state.pending.clone(), state.listen.clone())
        };
        let mut tokens: Vec<_> = opened.iter().map(|hsm| token(hsm.status())).collect();
        tokens.extend(pending);
        proto::StatusResponse {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            trust_domain: acts.domain().to_string(),
            ready: missing.is_empty(),
            not_ready_because: missing,
            uptime_seconds: self.0.started.elapsed().as_secs(),
            ledger: Some(self.ledger(ledger, checkpoint_size, open_intents)),
            tokens,
            clock: Some(proto::ClockStatus { trusted, deviation_micros: ledger.clock().deviation_micros() }),
            cpu: Some(cpu(ledger)),
            agents: agents as u64,
            quarantined: quarantined as u64,
            config_hash: self.0.config_hash.0.to_vec(),
            listen,
            not_on_crl: acts.not_on_crl(),
            files_behind: acts.files_behind(),
            keys_to_rewrap: acts.keys_to_rewrap(),
        }
    }

    fn ledger(&self, ledger: &Ledger, checkpoint_size: u64, open_intents: usize) -> proto::LedgerStatus {
        let progress = *ledger.progress().borrow();
        let file_bytes = ledger.file_bytes();
        let seconds = self.0.started.elapsed().as_secs();
        // A start writes more than a life does: a rate needs some minutes to mean anything. Entries since start times the average bytes of an entry.
        let bytes_per_day = if seconds >= GROWTH_KNOWN_SECONDS {
            let grown = file_bytes.saturating_sub(self.0.start_bytes);
            let entries = progress.size.saturating_sub(self.0.start_size);
            let average = if entries > 0 && grown == 0 { file_bytes / progress.size.max(1) * entries } else { grown };
            average.saturating_mul(86_400) / seconds
        } else {
            0
        };
        let days_until_full = ledger.free_bytes().checked_div(bytes_per_day).unwrap_or(0);
        proto::LedgerStatus {
            entries: progress.size,
            commits: progress.commits,
            file_bytes,
            bytes_per_day,
            days_until_full,
            checkpoint_size,
            writable: ledger.is_writable(),
            open_intents: open_intents as u64,
        }
    }
}

fn token(status: TokenState) -> proto::TokenStatus {
    proto::TokenStatus {
        role: status.role.into(),
        module: status.module.display().to_string(),
        label: status.label,
        serial: status.serial,
        usable: status.usable,
        fault: status.fault.unwrap_or_default(),
        lanes: u32::try_from(status.lanes).unwrap_or(u32::MAX),
        queued: u32::try_from(status.queued).unwrap_or(u32::MAX),
        mechanisms: status.mechanisms,
        signatures: status.signatures,
        reconnects: status.reconnects,
        pin_pending: status.pin_pending,
        off: status.off,
        hanging: u32::try_from(status.hanging).unwrap_or(u32::MAX),
        sessions: u32::try_from(status.sessions).unwrap_or(u32::MAX),
        pace_micros: u64::try_from(status.pace.as_micros()).unwrap_or(u64::MAX),
        turned_away: status.turned_away,
        faults: status.faults.into_iter().map(fault).collect(),
        capabilities: Some(proto::TokenCapabilities {
            ed25519: status.capabilities.ed25519,
            session_keys: status.capabilities.session_keys,
            read_only_sessions: status.capabilities.read_only_sessions,
            p384: status.capabilities.p384,
            wrapped_keys: status.capabilities.wrapped_keys,
            wrapped_ed25519: status.capabilities.wrapped_ed25519,
            ps256: status.capabilities.ps256,
            wrapped_ps256: status.capabilities.wrapped_ps256,
            sessions_max: status.capabilities.sessions_max.map_or(0, |most| most as u64),
        }),
    }
}

fn fault(seen: FaultSeen) -> proto::TokenFault {
    proto::TokenFault { fault: seen.fault, count: seen.count, last_unix_seconds: seen.last.seconds() }
}

fn check(role: TokenRole, label: &str, check: Check) -> proto::TokenCheck {
    let (error, micros) = match check.outcome {
        Ok(took) => (String::new(), u64::try_from(took.as_micros()).unwrap_or(u64::MAX)),
        Err(error) => (error.to_string(), 0),
    };
    let (role, label, key_id) = (role.into(), label.to_owned(), check.key.map_or_else(Vec::new, |key| key.0.to_vec()));
    proto::TokenCheck { role, label, name: check.name, error, micros, key_id, ..proto::TokenCheck::default() }
}

fn cpu(ledger: &Ledger) -> proto::CpuParts {
    let meter = ledger.meter();
    proto::CpuParts {
        sign_nanos: meter.sign.nanos(),
        sign_count: meter.sign.count(),
        verify_own_nanos: meter.verify_own.nanos(),
        verify_own_count: meter.verify_own.count(),
        csr_nanos: meter.csr.nanos(),
        csr_count: meter.csr.count(),
        csr_verify_nanos: meter.csr_verify.nanos(),
        ledger_nanos: meter.ledger.nanos(),
        process_nanos: process_cpu_nanos(),
        handshake_nanos: meter.handshake.nanos(),
        handshake_count: meter.handshake.count(),
        proof_nanos: meter.proof.nanos(),
        proof_count: meter.proof.count(),
        certificate_nanos: meter.certificate.nanos(),
    }
}

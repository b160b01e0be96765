//! The HSM room by itself, in a process of its own: many askers, its own key, each signature verified as ever.

use std::io::{BufRead as _, BufReader, Write as _};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tokio::task::JoinSet;

use super::Failed;
use super::token::{LABEL, RawSignatures};
use crate::config::{PinSource, Token};
use crate::hsm::{Hsm, Modules, Settings, SigningKey};
use crate::model::{Algorithm, KeyId, Meter, process_cpu_nanos};
use crate::proto::TokenRole;

/// As long as what is signed of a certificate.
const MESSAGE_BYTES: usize = 500;
/// What is signed here starts so: it can be taken for nothing else, and its key certifies nothing.
const TAG: &[u8] = b"keyward/bench/v1\0";
const SIGN_DEADLINE: Duration = Duration::from_secs(5);
const STOP_DEADLINE: Duration = Duration::from_secs(5);
const FAULT_MODULE_DEADLINE: Duration = Duration::from_secs(5);

/// What the room did.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct RoomSignatures {
    /// `threads` are its lanes.
    #[serde(flatten)]
    pub signatures: RawSignatures,
    /// As the fault module counted them, where one was asked.
    pub c_sign_calls_per_signature: Option<f64>,
}

/// What is asked of it.
#[derive(Debug, Clone, Copy)]
pub struct Asked<'a> {
    /// The PKCS#11 module.
    pub module: &'a Path,
    /// The token's PIN.
    pub pin_file: &'a Path,
    /// Sign lanes.
    pub lanes: usize,
    /// Askers.
    pub outstanding: usize,
    /// Signatures in all.
    pub count: usize,
    /// Where the fault module listens.
    pub fault_socket: Option<&'a Path>,
}

/// Signatures by a P-256 key made for this and destroyed afterwards.
///
/// # Errors
/// When the token cannot be used, or one signature fails.
pub fn sign(asked: &Asked<'_>) -> Result<RoomSignatures, Failed> {
    let pin_file = asked.pin_file.canonicalize()?;
    let settings = Settings {
        state: pin_file.parent().unwrap_or(Path::new("/")).into(),
        token: Token {
            module: asked.module.into(),
            label: LABEL.into(),
            serial: None,
            pin: PinSource::File(pin_file),
            lanes: asked.lanes,
        },
        role: TokenRole::Authority,
        for_agents: false,
        queue: asked.outstanding.max(16),
        sign_deadline: SIGN_DEADLINE,
    };
    // As the daemon's.
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let hsm = Hsm::open(&Modules::new(), settings, Arc::new(Meter::default()))?;
    let signed = runtime.block_on(async {
        let id = KeyId::random();
        let public = hsm.generate(id, Algorithm::P256, "keyward/bench").await?;
        let measured = measure(&hsm.key(id, public).await?, asked).await;
        hsm.destroy(id).await?;
        measured
    });
    hsm.shut_down(STOP_DEADLINE);
    signed
}

async fn measure(key: &SigningKey, asked: &Asked<'_>) -> Result<RoomSignatures, Failed> {
    let Asked { count, fault_socket, .. } = *asked;
    let calls_before = fault_socket.map(c_sign_calls).transpose()?;
    let taken = Arc::new(AtomicUsize::new(0));
    let mut askers = JoinSet::new();
    let (from, cpu) = (Instant::now(), process_cpu_nanos());
    for _ in 0..asked.outstanding {
        let (key, taken) = (key.clone(), Arc::clone(&taken));
        askers.spawn(async move {
            loop {
                let number = taken.fetch_add(1, Ordering::Relaxed);
                if number >= count {
                    return Ok::<_, Failed>(());
                }
                let mut message = vec![0x5a; MESSAGE_BYTES];
                message[..TAG.len()].copy_from_slice(TAG);
                message[TAG.len()..][..8].copy_from_slice(&number.to_be_bytes());
                key.sign(message.into()).await?;
            }
        });
    }
    while let Some(ended) = askers.join_next().await {
        ended??;
    }
    let seconds = from.elapsed().as_secs_f64();
    let cpu_nanos = process_cpu_nanos().saturating_sub(cpu);
    let calls_after = fault_socket.map(c_sign_calls).transpose()?;
    #[expect(clippy::cast_precision_loss, reason = "figures, not accounts")]
    let calls_each = |(before, after): (u64, u64)| after.saturating_sub(before) as f64 / count.max(1) as f64;
    Ok(RoomSignatures {
        signatures: RawSignatures { threads: asked.lanes, signatures: count, seconds, cpu_nanos },
        c_sign_calls_per_signature: calls_before.zip(calls_after).map(calls_each),
    })
}

/// How often this process has called C_Sign, as its fault module says.
fn c_sign_calls(socket: &Path) -> Result<u64, Failed> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(FAULT_MODULE_DEADLINE))?;
    stream.write_all(b"counts\n")?;
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    let count = line.split_whitespace().find_map(|word| word.strip_prefix("C_Sign=")?.parse().ok());
    count.ok_or_else(|| "the fault module does not tell how often C_Sign was called".into())
}

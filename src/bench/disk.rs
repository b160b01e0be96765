//! What the disk under the state directory needs for one durable write.

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::time::Instant;

use serde::Serialize;

use super::Failed;
use super::figures::Latency;

const WRITES: usize = 200;

/// 4 KiB and fdatasync, 200 times.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct Fsync {
    /// Half were faster.
    pub p50_ms: f64,
    /// 99 of 100 were faster.
    pub p99_ms: f64,
}

/// Measures in `directory`; leaves nothing there.
///
/// # Errors
/// When the directory cannot be written.
pub fn fsync(directory: &Path) -> Result<Fsync, Failed> {
    let path = directory.join(format!("fsync-{}", std::process::id()));
    let mut file = File::create(&path)?;
    let mut took = Vec::with_capacity(WRITES);
    for _ in 0..WRITES {
        let from = Instant::now();
        file.write_all(&[0x5a; 4096])?;
        file.sync_data()?;
        took.push(from.elapsed());
    }
    drop(file);
    std::fs::remove_file(&path)?;
    let latency = Latency::of(took);
    Ok(Fsync { p50_ms: latency.p50_ms, p99_ms: latency.p99_ms })
}

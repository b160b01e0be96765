//! The module by itself, in a process of its own: C_Sign without anything around it, and filling a token.

use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Barrier};
use std::time::Instant;

use cryptoki::context::{CInitializeArgs, CInitializeFlags, Pkcs11};
use cryptoki::mechanism::Mechanism;
use cryptoki::object::{Attribute, KeyType, ObjectClass};
use cryptoki::session::{Session, UserType};
use cryptoki::types::AuthPin;
use serde::{Deserialize, Serialize};

use super::Failed;
use crate::model::{Digest, SecretBytes, process_cpu_nanos};

/// CKA_EC_PARAMS of P-256: the OID 1.2.840.10045.3.1.7 in DER.
const P256_PARAMS: [u8; 10] = [0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
/// The label of the token in a house.
pub(super) const LABEL: &str = "authority";

/// What the module can do.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub struct RawSignatures {
    /// Threads, a session each.
    pub threads: usize,
    /// Signatures in all.
    pub signatures: usize,
    /// In all.
    pub seconds: f64,
    /// CPU of the process.
    pub cpu_nanos: u64,
}

#[expect(clippy::cast_precision_loss, reason = "figures, not accounts")]
impl RawSignatures {
    /// All threads together.
    #[must_use]
    pub fn per_second(&self) -> f64 {
        self.signatures as f64 / self.seconds
    }

    /// CPU of one, in microseconds.
    #[must_use]
    pub fn micros_each(&self) -> f64 {
        self.cpu_nanos as f64 / 1e3 / self.signatures.max(1) as f64
    }
}

/// `signatures` C_SignInit + C_Sign by a P-256 key of the token, on `threads` threads.
///
/// # Errors
/// When the token cannot be used or holds no such key.
pub fn sign(module: &Path, pin_file: &Path, threads: usize, signatures: usize) -> Result<RawSignatures, Failed> {
    let (context, anchor) = log_in(module, pin_file)?;
    let wanted = [Attribute::Class(ObjectClass::PRIVATE_KEY), Attribute::KeyType(KeyType::EC), Attribute::Sign(true)];
    let key = *anchor.find_objects(&wanted)?.first().ok_or("the token holds no P-256 key")?;
    let slot = anchor.get_session_info()?.slot_id();
    let sessions = (0..threads).map(|_| context.open_ro_session(slot)).collect::<Result<Vec<_>, _>>()?;
    // Taken from one heap: a thread that was held up must not leave the others idle at the end.
    let taken = Arc::new(AtomicUsize::new(0));
    let barrier = Arc::new(Barrier::new(threads + 1));
    let workers: Vec<_> = sessions
        .into_iter()
        .map(|session| {
            let (barrier, taken) = (Arc::clone(&barrier), Arc::clone(&taken));
            std::thread::spawn(move || {
                barrier.wait();
                loop {
                    let number = taken.fetch_add(1, Ordering::Relaxed);
                    if number >= signatures {
                        return Ok::<_, cryptoki::error::Error>(());
                    }
                    let digest = Digest::of(&number.to_be_bytes());
                    session.sign(&Mechanism::Ecdsa, key, &digest.0)?;
                }
            })
        })
        .collect();
    let cpu = process_cpu_nanos();
    barrier.wait();
    let from = Instant::now();
    for worker in workers {
        worker.join().map_err(|_| "a thread died in the module")??;
    }
    let seconds = from.elapsed().as_secs_f64();
    Ok(RawSignatures { threads, signatures, seconds, cpu_nanos: process_cpu_nanos().saturating_sub(cpu) })
}

/// Makes `count` P-256 token key pairs that nobody uses.
///
/// # Errors
/// When the token cannot be used or is full.
pub fn fill(module: &Path, pin_file: &Path, count: usize) -> Result<(), Failed> {
    let (_context, session) = log_in(module, pin_file)?;
    for number in 0..count {
        let half = || {
            let label = format!("bench {number}").into_bytes();
            vec![Attribute::Token(true), Attribute::Id(SecretBytes::random::<16>().reveal().to_vec()), Attribute::Label(label)]
        };
        let mut public = half();
        public.extend([Attribute::EcParams(P256_PARAMS.to_vec()), Attribute::Verify(true), Attribute::Private(false)]);
        let mut private = half();
        private.extend([
            Attribute::Sign(true),
            Attribute::Private(true),
            Attribute::Sensitive(true),
            Attribute::Extractable(false),
        ]);
        session.generate_key_pair(&Mechanism::EccKeyPairGen, &public, &private)?;
    }
    Ok(())
}

fn log_in(module: &Path, pin_file: &Path) -> Result<(Pkcs11, Session), Failed> {
    let pin = std::fs::read_to_string(pin_file)?;
    let context = Pkcs11::new(module)?;
    context.initialize(CInitializeArgs::new(CInitializeFlags::OS_LOCKING_OK))?;
    for slot in context.get_slots_with_token()? {
        if context.get_token_info(slot)?.label() == LABEL {
            let session = context.open_rw_session(slot)?;
            session.login(UserType::User, Some(&AuthPin::new(pin.trim_end().to_owned().into())))?;
            return Ok((context, session));
        }
    }
    Err("no token of that label".into())
}

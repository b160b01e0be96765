//! Looks for a secret in the memory of the process that loaded the module: heap, stacks, everything that can be written.
//!
//! A process may always read itself, so this needs no privilege, whatever the process forbids to others. The secret is asked for in hex
//! and kept masked: what is found is never the search's own.

use std::ffi::c_void;
use std::fmt::Write as _;

/// What is looked for is kept XORed with this.
const MASK: u8 = 0xa5;
/// Bytes that are compared at once, at addresses divisible by it. A copy of which twice as many bytes in a row survive is found.
const WORD: usize = size_of::<u64>();
/// Bytes that are read at once.
const CHUNK: usize = 1 << 16;
/// Longest list of places.
const PLACES_MAX: usize = 8;

/// In how many places there is a part of the secret, and what the first of them are.
pub fn look_for(hex: &str) -> Result<String, String> {
    let words = masked_words(hex)?;
    let mut likely = [false; 256];
    words.iter().for_each(|word| likely[usize::from(word.to_ne_bytes()[0])] = true);
    let maps = std::fs::read_to_string("/proc/self/maps").map_err(|error| error.to_string())?;
    let mut buffer = vec![0_u8; CHUNK];
    let own = buffer.as_ptr() as usize..buffer.as_ptr() as usize + CHUNK;
    let (mut places, mut told, mut last) = (0_u64, String::new(), None);
    for (from, to, name) in maps.lines().filter_map(writable) {
        for start in (from..to).step_by(CHUNK) {
            let length = read(start, &mut buffer[..CHUNK.min(to - start)]);
            for (at, word) in buffer[..length].chunks_exact(WORD).enumerate() {
                if !likely[usize::from(word[0] ^ MASK)] || !words.contains(&mask(word)) {
                    continue;
                }
                let address = start + at * WORD;
                if own.contains(&address) {
                    continue;
                }
                // Words in a row are one copy.
                if last != Some(address - WORD) {
                    places += 1;
                    if places <= PLACES_MAX as u64 {
                        let _ = write!(told, " {address:#x}:{name}");
                    }
                }
                last = Some(address);
            }
        }
    }
    // What was read is not left behind for the next search.
    buffer.fill(0);
    std::hint::black_box(&buffer);
    Ok(format!("{places}{told}"))
}

fn mask(word: &[u8]) -> u64 {
    u64::from_ne_bytes(word.try_into().unwrap_or_default()) ^ u64::from_ne_bytes([MASK; WORD])
}

/// Every part of the secret that is as long as a word.
fn masked_words(hex: &str) -> Result<Vec<u64>, String> {
    let masked: Vec<u8> = (0..hex.len())
        .step_by(2)
        .map(|at| hex.get(at..at + 2).and_then(|byte| u8::from_str_radix(byte, 16).ok()).map(|byte| byte ^ MASK))
        .collect::<Option<_>>()
        .ok_or("that is no hex")?;
    let words: Vec<u64> = masked.windows(WORD).filter_map(|word| Some(u64::from_ne_bytes(word.try_into().ok()?))).collect();
    if words.is_empty() { Err(format!("a secret has at least {WORD} bytes")) } else { Ok(words) }
}

/// A line of proc_pid_maps(5), if what it tells of can be read and written.
fn writable(line: &str) -> Option<(usize, usize, &str)> {
    let mut fields = line.split_ascii_whitespace();
    let (from, to) = fields.next()?.split_once('-')?;
    let may_write = fields.next()?.starts_with("rw");
    let number = |hex| usize::from_str_radix(hex, 16).ok();
    may_write.then_some((number(from)?, number(to)?, fields.nth(3).unwrap_or("anonymous")))
}

/// As much as there is: none of a map that is gone by now.
fn read(from: usize, into: &mut [u8]) -> usize {
    let here = libc::iovec { iov_base: into.as_mut_ptr().cast(), iov_len: into.len() };
    let there = libc::iovec { iov_base: from as *mut c_void, iov_len: into.len() };
    // SAFETY: writes to `into`, as long as it says; what cannot be read there is an error, not a fault.
    let length = unsafe { libc::process_vm_readv(libc::getpid(), &raw const here, 1, &raw const there, 1, 0) };
    usize::try_from(length).unwrap_or(0)
}

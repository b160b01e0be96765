//! The two forms of an ECDSA signature.

/// `r ‖ s` (PKCS#11 v2.40 §2.3.1, RFC 7518 §3.4) → ECDSA-Sig-Value in DER (RFC 3279 §2.2.3). `None` unless it is
/// exactly twice `half` bytes: 32 for P-256, 48 for P-384.
pub(crate) fn ecdsa_sig_value(raw: &[u8], half: usize) -> Option<Vec<u8>> {
    if raw.len() != 2 * half || half > 48 {
        return None;
    }
    let (r, s) = raw.split_at(half);
    let mut body = Vec::with_capacity(2 * half + 6);
    for integer in [r, s] {
        push_integer(&mut body, integer);
    }
    let mut der = Vec::with_capacity(body.len() + 2);
    der.extend([0x30, u8::try_from(body.len()).ok()?]);
    der.extend(body);
    Some(der)
}

/// An unsigned big-endian number of at most 48 bytes as INTEGER: shortest form, with a zero before a set high bit.
fn push_integer(out: &mut Vec<u8>, number: &[u8]) {
    let first = number.iter().position(|byte| *byte != 0).unwrap_or(number.len() - 1);
    let digits = &number[first..];
    let sign = digits[0] & 0x80 != 0;
    // At most 49, so the cast cannot lose anything.
    out.extend([0x02, (digits.len() + usize::from(sign)) as u8]);
    if sign {
        out.push(0);
    }
    out.extend(digits);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn high_bits_get_a_zero_and_leading_zeros_go() {
        let mut raw = [0_u8; 64];
        raw[..32].fill(0xff);
        raw[63] = 0x7f;
        let der = ecdsa_sig_value(&raw, 32).unwrap();
        assert_eq!(&der[..5], [0x30, 35 + 3, 0x02, 33, 0x00]);
        assert_eq!(&der[der.len() - 3..], [0x02, 0x01, 0x7f]);

        let mut raw = [0_u8; 64];
        raw[30] = 0x80; // 30 leading zeros, then a high bit
        raw[32] = 0x01;
        let der = ecdsa_sig_value(&raw, 32).unwrap();
        assert_eq!(&der[..7], [0x30, 5 + 34, 0x02, 0x03, 0x00, 0x80, 0x00]);
        assert_eq!(&der[7..10], [0x02, 32, 0x01]);
    }

    #[test]
    fn the_longest_signature_has_seventy_two_bytes_and_zero_is_one_byte() {
        assert_eq!(ecdsa_sig_value(&[0xff; 64], 32).unwrap().len(), 72);
        assert_eq!(ecdsa_sig_value(&[0; 64], 32).unwrap(), [0x30, 6, 2, 1, 0, 2, 1, 0]);
    }

    #[test]
    fn a_p384_signature_has_a_hundred_and_four_bytes_at_most() {
        let der = ecdsa_sig_value(&[0xff; 96], 48).unwrap();
        assert_eq!((der.len(), &der[..5]), (104, &[0x30, 102, 0x02, 49, 0x00][..]));
        assert!(ecdsa_sig_value(&[0xff; 96], 32).is_none());
    }

    #[test]
    fn another_length_is_no_signature() {
        assert!(ecdsa_sig_value(&[1; 63], 32).is_none());
        assert!(ecdsa_sig_value(&[1; 96], 32).is_none());
        assert!(ecdsa_sig_value(&[], 32).is_none());
    }
}

//! Encodings that differ between a token and the rest of the world.

/// `r ‖ s` as CKM_ECDSA gives it (PKCS#11 v2.40 §2.3.1) → ECDSA-Sig-Value in DER (RFC 3279 §2.2.3). `None` unless it is
/// exactly twice `half` bytes: 32 for P-256, 48 for P-384.
pub(super) fn ecdsa_signature(raw: &[u8], half: usize) -> Option<Vec<u8>> {
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

/// The raw key of a CKA_EC_POINT of `size` bytes: some tokens wrap it in an OCTET STRING, some do not (facts: SoftHSM and NSS do,
/// Kryoptic does not for Ed25519).
pub(super) fn ec_point(value: &[u8], size: usize) -> Option<&[u8]> {
    if value.len() == size {
        return Some(value);
    }
    let inner = value.strip_prefix(&[0x04, u8::try_from(size).ok()?])?;
    (inner.len() == size).then_some(inner)
}

/// CKA_EC_PARAMS of P-256: OID 1.2.840.10045.3.1.7.
pub(super) const P256_PARAMS: [u8; 10] = [0x06, 0x08, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x03, 0x01, 0x07];
/// CKA_EC_PARAMS of P-384: OID 1.3.132.0.34.
pub(super) const P384_PARAMS: [u8; 7] = [0x06, 0x05, 0x2b, 0x81, 0x04, 0x00, 0x22];
/// CKA_EC_PARAMS of Ed25519: OID 1.3.101.112 (PKCS#11 v3.0 §2.3.5).
pub(super) const ED25519_PARAMS: [u8; 5] = [0x06, 0x03, 0x2b, 0x65, 0x70];
/// CKA_EC_PARAMS of Ed25519 as PrintableString "edwards25519", for tokens that refuse the OID.
pub(super) const ED25519_PARAMS_NAME: [u8; 14] = *b"\x13\x0cedwards25519";

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn high_bits_get_a_zero_and_leading_zeros_go() {
        let mut raw = [0_u8; 64];
        raw[..32].fill(0xff);
        raw[63] = 0x7f;
        let der = ecdsa_signature(&raw, 32).unwrap();
        assert_eq!(&der[..5], [0x30, 35 + 3, 0x02, 33, 0x00]);
        assert_eq!(&der[der.len() - 3..], [0x02, 0x01, 0x7f]);

        let mut raw = [0_u8; 64];
        raw[30] = 0x80; // 30 leading zeros, then a high bit
        raw[32] = 0x01;
        let der = ecdsa_signature(&raw, 32).unwrap();
        assert_eq!(&der[..7], [0x30, 5 + 34, 0x02, 0x03, 0x00, 0x80, 0x00]);
        assert_eq!(&der[7..10], [0x02, 32, 0x01]);
    }

    #[test]
    fn the_longest_signature_has_seventy_two_bytes_and_zero_is_one_byte() {
        assert_eq!(ecdsa_signature(&[0xff; 64], 32).unwrap().len(), 72);
        assert_eq!(ecdsa_signature(&[0; 64], 32).unwrap(), [0x30, 6, 2, 1, 0, 2, 1, 0]);
    }

    #[test]
    fn a_p384_signature_has_a_hundred_and_four_bytes_at_most() {
        let der = ecdsa_signature(&[0xff; 96], 48).unwrap();
        assert_eq!((der.len(), &der[..5]), (104, &[0x30, 102, 0x02, 49, 0x00][..]));
        assert!(ecdsa_signature(&[0xff; 96], 32).is_none());
    }

    #[test]
    fn another_length_is_no_signature() {
        assert!(ecdsa_signature(&[1; 63], 32).is_none());
        assert!(ecdsa_signature(&[1; 96], 32).is_none());
        assert!(ecdsa_signature(&[], 32).is_none());
    }

    #[test]
    fn a_point_may_be_wrapped_or_bare() {
        let bare = [7_u8; 32];
        let wrapped = [&[0x04, 0x20][..], &bare].concat();
        assert_eq!(ec_point(&bare, 32), Some(&bare[..]));
        assert_eq!(ec_point(&wrapped, 32), Some(&bare[..]));
        assert_eq!(ec_point(&wrapped[..33], 32), None);
        assert_eq!(ec_point(&[0x04; 65], 65), Some(&[0x04; 65][..]));
    }
}

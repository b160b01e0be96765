//! Encodings that differ between a token and the rest of the world.

/// The raw key of a CKA_EC_POINT of `size` bytes: some tokens wrap it in an OCTET STRING, some do not (facts: SoftHSM and NSS do,
/// Kryoptic does not for Ed25519).
pub(super) fn ec_point(value: &[u8], size: usize) -> Option<&[u8]> {
    if value.len() == size {
        return Some(value);
    }
    let inner = value.strip_prefix(&[0x04, u8::try_from(size).ok()?])?;
    (inner.len() == size).then_some(inner)
}

/// A big integer as it is: some tokens put zeros before it.
pub(super) fn unsigned(number: &[u8]) -> &[u8] {
    &number[number.iter().take_while(|byte| **byte == 0).count()..]
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
    fn a_number_may_have_zeros_before_it() {
        assert_eq!(unsigned(&[0, 0, 1, 0, 1]), [1, 0, 1]);
        assert_eq!(unsigned(&[0]), [0_u8; 0]);
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

//! The binders: what a proof is signed over, so that evidence is bound to one key, one request, one moment, one domain.
//!
//! Client and server compute them here and nowhere else; `proto/keyward/v1/agent.proto` has the definition and its vectors.

use super::{Digest, TrustDomain};

/// The binder of an `Attest`: the server's nonce makes it good for one stream.
///
/// SHA-256("keyward/attest/v1\0" ‖ nonce ‖ `spki` ‖ `ask` ‖ SHA-256(trust domain)), `spki` and `ask` being digests.
#[must_use]
pub fn attest_binder(nonce: &[u8; 32], spki: &Digest, ask: &Digest, domain: &TrustDomain) -> Digest {
    Digest::of_parts(&[b"keyward/attest/v1\0", nonce, &spki.0, &ask.0, &domain_digest(domain).0])
}

/// The binder of a `Renew`: the sequence, accepted once, stands in for the nonce.
///
/// SHA-256("keyward/renew/v1\0" ‖ sequence as 8 bytes big-endian ‖ `spki` ‖ `ask` ‖ SHA-256(trust domain)).
#[must_use]
pub fn renew_binder(sequence: u64, spki: &Digest, ask: &Digest, domain: &TrustDomain) -> Digest {
    Digest::of_parts(&[b"keyward/renew/v1\0", &sequence.to_be_bytes(), &spki.0, &ask.0, &domain_digest(domain).0])
}

fn domain_digest(domain: &TrustDomain) -> Digest {
    Digest::of(domain.as_str().as_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    const PROTO: &str = include_str!("../../proto/keyward/v1/agent.proto");

    fn parts() -> (Digest, Digest, TrustDomain) {
        (Digest([2; 32]), Digest::of(b"ask"), TrustDomain::parse("example.org").expect("a name"))
    }

    #[test]
    fn the_vectors_in_the_proto_are_what_is_computed() {
        let (spki, ask, domain) = parts();
        let attest = attest_binder(&[1; 32], &spki, &ask, &domain);
        let renew = renew_binder(7, &spki, &ask, &domain);
        let vectors: Vec<_> = PROTO.lines().filter_map(|line| line.trim().strip_prefix("//   binder = ")).collect();
        assert_eq!(vectors, [attest.to_string(), renew.to_string()]);
    }

    #[test]
    fn every_part_counts() {
        let (spki, ask, domain) = parts();
        let binder = attest_binder(&[1; 32], &spki, &ask, &domain);
        let other = TrustDomain::parse("example.com").expect("a name");
        assert_ne!(binder, attest_binder(&[0; 32], &spki, &ask, &domain));
        assert_ne!(binder, attest_binder(&[1; 32], &ask, &ask, &domain));
        assert_ne!(binder, attest_binder(&[1; 32], &spki, &spki, &domain));
        assert_ne!(binder, attest_binder(&[1; 32], &spki, &ask, &other));
        assert_ne!(renew_binder(7, &spki, &ask, &domain), renew_binder(8, &spki, &ask, &domain));
    }
}

//! CKA_LABEL of what keyward makes in a token: what it is for, and of which deployment. Several may share a token.
//!
//! `keyward/<purpose>/<deployment>.<key id>`, cut to what every token takes: the first four bytes of the deployment's id, and as much of
//! CKA_ID as there is room for. Of an earlier keyward: `keyward/<purpose>/<key id>`, which does not say whose it is, and counts as ours.

use crate::model::{KeyId, hex};
use crate::proto::Purpose;

use super::keys::name;

/// No token takes less.
const CHARACTERS_MAX: usize = 32;

/// What there are objects for.
const PURPOSES: [Purpose; 7] =
    [Purpose::Root, Purpose::Issuing, Purpose::Ledger, Purpose::Canary, Purpose::TokenSigning, Purpose::Wrapping, Purpose::Agent];

fn short(deployment: &[u8]) -> String {
    hex(&deployment[..deployment.len().min(4)])
}

/// The label of a new object.
pub(super) fn label(purpose: Purpose, deployment: &[u8], id: KeyId) -> String {
    let whole = format!("keyward/{}/{}.{}", name(purpose), short(deployment), hex(&id.0[..4]));
    whole.chars().take(CHARACTERS_MAX).collect()
}

/// Whether an object is this deployment's, by its label: an object with this CKA_ID.
pub(super) fn is_ours(label: &str, deployment: &[u8], id: &[u8]) -> bool {
    let Some((purpose, rest)) = label.strip_prefix("keyward/").and_then(|rest| rest.split_once('/')) else { return false };
    let known = PURPOSES.iter().any(|known| name(*known) == purpose);
    known
        && match rest.split_once('.') {
            Some((owner, _)) => owner == short(deployment),
            None => rest.len() >= 8 && hex(id).starts_with(rest),
        }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: KeyId = KeyId([0xab; 16]);
    const OURS: [u8; 16] = [0x11; 16];

    #[test]
    fn a_label_is_no_longer_than_a_token_takes_and_known_again() {
        for purpose in PURPOSES {
            let label = label(purpose, &OURS, ID);
            assert!(label.len() <= CHARACTERS_MAX, "{label}");
            assert!(is_ours(&label, &OURS, &ID.0), "{label}");
            assert!(!is_ours(&label, &[0x12; 16], &ID.0), "{label} is another deployment's");
        }
        assert_eq!(label(Purpose::Ledger, &OURS, ID), "keyward/ledger/11111111.abababab");
        assert_eq!(label(Purpose::TokenSigning, &OURS, ID), "keyward/token-signing/11111111.a");
    }

    #[test]
    fn a_label_of_an_earlier_keyward_is_ours_if_it_is_of_its_own_id() {
        for label in ["keyward/issuing/abababab", "keyward/wrapping/abababab", "keyward/agent/abababababababab"] {
            assert!(is_ours(label, &OURS, &ID.0), "{label}");
            assert!(!is_ours(label, &OURS, &[1; 16]), "{label}");
        }
    }

    #[test]
    fn whatever_else_is_in_a_token_is_not_ours() {
        let foreign = [
            "",
            "root",
            "keyward/",
            "keyward/issuing",
            "keyward/issuing/",
            "keyward/issuing/abab",
            "keyward/issuing/.abababab",
            "keyward/issuing/11111111",
            "keyward/issuing/111111.abababab",
            "keyward/probe/abababab",
            "keyward/wrapping/test",
            "Keyward/issuing/11111111.abababab",
            "other/issuing/11111111.abababab",
        ];
        for label in foreign {
            assert!(!is_ours(label, &OURS, &ID.0), "{label}");
        }
        assert!(!is_ours("keyward/issuing/", &OURS, &[]), "without a CKA_ID");
    }
}

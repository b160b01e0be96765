//! Authorities, their rotation and the strays of the tokens, as the wire has them.

use crate::acts::{Acts, Arrow, Stray};
use crate::ledger::{Generation, Pause};
use crate::model::KeyId;
use crate::proto::{self, AuthorityState};

/// All that are not destroyed: by purpose, the newest state first.
pub(super) fn list(acts: &Acts) -> Vec<proto::Authority> {
    let mut all: Vec<_> = acts.generations().into_iter().map(|(of, next)| authority(acts, of, next)).collect();
    all.sort_by_key(|one| (one.purpose, one.state, std::cmp::Reverse(one.since_unix_seconds)));
    all
}

pub(super) fn one(acts: &Acts, key: KeyId) -> Option<proto::Authority> {
    list(acts).into_iter().find(|one| one.key_id == key.0)
}

fn authority(acts: &Acts, of: Generation, next: Option<Arrow>) -> proto::Authority {
    let request = acts.request().filter(|(key, _)| *key == of.key_id);
    let outside = of.is_outside();
    proto::Authority {
        purpose: of.purpose.into(),
        key_id: of.key_id.0.to_vec(),
        certificate: of.certificate,
        in_hsm: !outside,
        state: of.state.into(),
        since_unix_seconds: of.since.seconds(),
        next: next.map_or(AuthorityState::Unspecified, |next| next.to).into(),
        next_due_unix_seconds: next.and_then(|next| next.at).map_or(0, |at| at.seconds()),
        tainted: of.tainted,
        issuer: of.issuer.map(|issuer| issuer.0.to_vec()).unwrap_or_default(),
        csr: request.map(|(_, der)| der).unwrap_or_default(),
        keys_left: acts.keys_left_under(of.key_id),
    }
}

pub(super) fn pause(pause: Pause) -> proto::RotationPause {
    proto::RotationPause { by: pause.by, since_unix_seconds: pause.since.map_or(0, |since| since.seconds()) }
}

pub(super) fn stray(stray: Stray) -> proto::Stray {
    proto::Stray {
        role: stray.role.into(),
        label: stray.token,
        key_id: stray.id,
        object_label: stray.label,
        objects: stray.objects,
        purpose: stray.purpose.into(),
        destroyed: stray.destroyed,
        finding: stray.finding.into(),
    }
}

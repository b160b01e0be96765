//! Authorities as people and programs see them.

use serde::Serialize;

use super::describe::{operator, purpose_name, state_name};
use super::render::{brief, day, pairs, table, time, time_or_null};
use crate::model::{Digest, UnixTime, hex};
use crate::proto::{self, AuthorityState};

/// All generations, and whether they move.
pub(super) struct List {
    pub(super) authorities: Vec<Authority>,
    pub(super) pause: Option<Pause>,
}

/// That nothing is rotated, as JSON has it: who holds it up.
#[derive(Serialize)]
pub(super) struct Pause {
    in_configuration: bool,
    since: Option<String>,
    by: serde_json::Value,
    #[serde(skip)]
    who: String,
}

impl Pause {
    pub(super) fn of(answer: &proto::GetAuthoritiesResponse) -> Option<Self> {
        let told = answer.pause.as_ref();
        let since = told.and_then(|told| time_or_null(told.since_unix_seconds));
        let by = told.and_then(|told| told.by.as_ref());
        let who = match (told, by, &since) {
            (_, Some(by), Some(since)) => format!("since {since} by uid {}, {:?}; see `keyward ca resume`", by.uid, by.reason),
            (Some(_), _, _) => "by an operator; see `keyward ca resume`".to_owned(),
            (None, _, _) => "in the configuration, [rotation]".to_owned(),
        };
        answer.rotation_paused.then_some(Self { in_configuration: told.is_none(), since, by: operator(by), who })
    }

    /// By whom, since when and why; what ends it.
    pub(super) fn who(&self) -> &str {
        &self.who
    }
}

/// One generation, as JSON has it.
#[derive(Serialize)]
pub(super) struct Authority {
    purpose: &'static str,
    state: &'static str,
    tainted: bool,
    key_id: String,
    since: String,
    next: Option<&'static str>,
    next_due: Option<String>,
    not_after: Option<String>,
    in_hsm: bool,
    awaits_certificate: bool,
    keys_left: u64,
}

/// What of the authorities somebody has to know who asks how the daemon is.
#[derive(Serialize)]
pub(super) struct Rotation {
    paused: bool,
    pause: Option<Pause>,
    awaits_certificate: bool,
    root_not_after: Option<String>,
    issuing_not_after: Option<String>,
    #[serde(skip)]
    now: String,
}

impl Rotation {
    pub(super) fn of(answer: &proto::GetAuthoritiesResponse) -> Self {
        let all = List::of(answer).authorities;
        let end = |purpose| all.iter().find(|one| one.purpose == purpose && one.state == "active")?.not_after.clone();
        Self {
            paused: answer.rotation_paused,
            pause: Pause::of(answer),
            awaits_certificate: all.iter().any(|one| one.awaits_certificate),
            root_not_after: end("root"),
            issuing_not_after: end("issuing"),
            now: UnixTime::wall().to_string(),
        }
    }

    pub(super) fn lines(&self) -> Vec<(&'static str, String)> {
        let until = |end: &Option<String>| match end {
            None => "-".into(),
            Some(end) if *end <= self.now => format!("ENDED {end}: nothing under it is believed"),
            Some(end) => format!("until {end}"),
        };
        let paused = self.pause.as_ref().map(|pause| format!("PAUSED {}: nothing moves but what is tainted", pause.who()));
        let waits = "WAITS FOR THE OUTSIDE ROOT: sign `keyward ca show --csr`, then `keyward ca adopt`";
        let waits = self.awaits_certificate.then(|| waits.to_owned());
        let mut lines = vec![("root", until(&self.root_not_after)), ("issuing", until(&self.issuing_not_after))];
        if paused.is_none() && waits.is_none() {
            lines.push(("rotation", "by itself; `keyward ca list` says when".into()));
        }
        lines.extend(paused.into_iter().chain(waits).map(|told| ("rotation", told)));
        lines
    }
}

impl List {
    pub(super) fn of(answer: &proto::GetAuthoritiesResponse) -> Self {
        let authorities = answer.authorities.iter().map(Authority::of).collect();
        Self { authorities, pause: Pause::of(answer) }
    }

    pub(super) fn table(rows: &[Authority]) -> String {
        let now = UnixTime::wall();
        let cells = |one: &Authority| {
            let due = match (&one.next_due, one.next) {
                _ if one.awaits_certificate => "ca adopt".into(),
                (Some(due), _) => brief(due, now),
                (None, Some(_)) if one.keys_left > 0 => format!("{} keys left", one.keys_left),
                (None, Some(_)) => "waits".into(),
                (None, None) => "-".into(),
            };
            let not_after = one.not_after.as_deref().map_or_else(|| "-".into(), |end| brief(end, now));
            let state = if one.tainted { format!("{}!", one.state) } else { one.state.to_owned() };
            let key = one.key_id.get(..8).unwrap_or_default().to_owned();
            vec![one.purpose.to_owned(), state, key, day(&one.since), due, not_after]
        };
        table(&["PURPOSE", "STATE", "KEY ID", "SINCE", "NEXT STEP DUE", "NOT AFTER"], &rows.iter().map(cells).collect::<Vec<_>>())
    }
}

impl Authority {
    pub(super) fn of(one: &proto::Authority) -> Self {
        let parsed = x509_parser::parse_x509_certificate(&one.certificate).ok();
        let end = parsed.and_then(|(_, parsed)| u64::try_from(parsed.validity().not_after.timestamp()).ok());
        Self {
            purpose: purpose_name(one.purpose()),
            state: state_name(one.state()),
            tainted: one.tainted,
            key_id: hex(&one.key_id),
            since: time(one.since_unix_seconds),
            next: (one.next() != AuthorityState::Unspecified).then(|| state_name(one.next())),
            next_due: time_or_null(one.next_due_unix_seconds),
            not_after: end.map(time),
            in_hsm: one.in_hsm,
            awaits_certificate: !one.csr.is_empty(),
            keys_left: one.keys_left,
        }
    }

    pub(super) fn text(&self) -> String {
        let waits = match (&self.next_due, self.next) {
            (Some(due), Some(next)) => format!("{next} at {due}"),
            (None, Some(next)) if self.keys_left > 0 => {
                format!("{next}, when {} agents' keys are taken from under it", self.keys_left)
            }
            (None, Some(next)) => format!("{next}, once {}", self.awaited()),
            _ => "-".into(),
        };
        pairs(&[
            ("purpose", self.purpose.into()),
            ("state", self.state.into()),
            ("key id", self.key_id.clone()),
            ("next step", waits),
            ("not after", self.not_after.clone().unwrap_or_else(|| "-".into())),
        ])
    }

    /// What the next step waits for that no clock tells.
    fn awaited(&self) -> &'static str {
        match (self.purpose, self.state) {
            _ if self.awaits_certificate => "`keyward ca adopt` has brought its certificate",
            ("issuing", "planned") => "there is a root to sign it",
            ("issuing", "prepublished") => "its root is active",
            ("wrapping", "retiring" | "retired") => "no agent's key is under it",
            ("root", "retiring") => "the last certificate under it has ended",
            _ => "the next one is active",
        }
    }
}

/// A certificate, as JSON has it.
#[derive(Serialize)]
pub(super) struct Certificate {
    purpose: &'static str,
    state: &'static str,
    subject: String,
    serial: String,
    not_before: String,
    not_after: String,
    certificate_sha256: String,
    key_sha256: String,
    key_id: String,
    in_hsm: bool,
}

impl Certificate {
    pub(super) fn parse(authority: &proto::Authority) -> Option<Self> {
        let (_, certificate) = x509_parser::parse_x509_certificate(&authority.certificate).ok()?;
        let seconds = |at: x509_parser::time::ASN1Time| time(u64::try_from(at.timestamp()).unwrap_or(0));
        Some(Self {
            purpose: purpose_name(authority.purpose()),
            state: state_name(authority.state()),
            subject: certificate.subject().to_string(),
            serial: hex(certificate.raw_serial()),
            not_before: seconds(certificate.validity().not_before),
            not_after: seconds(certificate.validity().not_after),
            certificate_sha256: Digest::of(&authority.certificate).to_string(),
            key_sha256: Digest::of(certificate.public_key().raw).to_string(),
            key_id: hex(&authority.key_id),
            in_hsm: authority.in_hsm,
        })
    }

    pub(super) fn text(&self) -> String {
        pairs(&[
            ("purpose", self.purpose.into()),
            ("state", self.state.into()),
            ("subject", self.subject.clone()),
            ("serial", self.serial.clone()),
            ("not before", self.not_before.clone()),
            ("not after", self.not_after.clone()),
            ("certificate", format!("SHA-256 {}", self.certificate_sha256)),
            ("key", format!("SHA-256 {}", self.key_sha256)),
            ("key id", self.key_id.clone()),
            ("in the HSM", if self.in_hsm { "yes" } else { "no" }.into()),
        ])
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rotation() -> Rotation {
        let end = Some("2027-01-15T08:00:00Z".to_owned());
        let now = "2027-01-15T07:59:59Z".to_owned();
        Rotation {
            paused: false,
            pause: None,
            awaits_certificate: false,
            root_not_after: end.clone(),
            issuing_not_after: end,
            now,
        }
    }

    fn told(rotation: &Rotation) -> String {
        rotation.lines().into_iter().map(|(name, value)| format!("{name} {value}\n")).collect()
    }

    #[test]
    fn an_authority_that_has_ended_is_told() {
        assert_eq!(told(&rotation()).matches("until 2027-01-15T08:00:00Z").count(), 2);
        let late = Rotation { now: "2027-01-15T08:00:00Z".into(), ..rotation() };
        assert_eq!(told(&late).matches("ENDED 2027-01-15T08:00:00Z").count(), 2);
    }

    #[test]
    fn whoever_has_to_act_is_told() {
        assert!(told(&rotation()).contains("rotation by itself"));
        assert!(told(&Rotation { awaits_certificate: true, ..rotation() }).contains("`keyward ca adopt`"));
        let paused = |pause| {
            let answer = proto::GetAuthoritiesResponse { rotation_paused: true, pause, ..Default::default() };
            told(&Rotation { awaits_certificate: true, ..Rotation::of(&answer) })
        };
        let by = proto::Operator { uid: 1000, reason: "change freeze".into() };
        let text = paused(Some(proto::RotationPause { by: Some(by), since_unix_seconds: 1_800_000_000 }));
        let words = ["WAITS FOR", "PAUSED", "2027-01-15T08:00:00Z", "uid 1000", "\"change freeze\"", "`keyward ca resume`"];
        assert!(words.iter().all(|word| text.contains(word)), "{text}");
        assert!(paused(Some(proto::RotationPause::default())).contains("by an operator"), "a ledger of before says no more");
        assert!(paused(None).contains("in the configuration"));
    }
}

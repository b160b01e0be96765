//! Authorities as people and programs see them.

use serde::Serialize;

use super::describe::{purpose_name, state_name};
use super::render::{pairs, table, time, time_or_null};
use crate::model::{Digest, UnixTime, hex};
use crate::proto::{self, AuthorityState};

/// All generations, and whether they move.
pub(super) struct List {
    pub(super) authorities: Vec<Authority>,
    pub(super) rotation_paused: bool,
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
        let rotation = match (self.paused, self.awaits_certificate) {
            (true, _) => "PAUSED, here or in [rotation]: nothing moves but what is tainted; `keyward ca resume`",
            (false, true) => "WAITS FOR THE OUTSIDE ROOT: sign `keyward ca show --csr`, then `keyward ca adopt`",
            (false, false) => "by itself; `keyward ca list` says when",
        };
        vec![("root", until(&self.root_not_after)), ("issuing", until(&self.issuing_not_after)), ("rotation", rotation.into())]
    }
}

impl List {
    pub(super) fn of(answer: &proto::GetAuthoritiesResponse) -> Self {
        let authorities = answer.authorities.iter().map(Authority::of).collect();
        Self { authorities, rotation_paused: answer.rotation_paused }
    }

    pub(super) fn table(rows: &[Authority]) -> String {
        let cells = |one: &Authority| {
            let due = match (&one.next_due, one.next) {
                _ if one.awaits_certificate => "ca adopt".into(),
                (Some(due), _) => minutes(due),
                (None, Some(_)) if one.keys_left > 0 => format!("{} keys left", one.keys_left),
                (None, Some(_)) => "waits".into(),
                (None, None) => "-".into(),
            };
            let not_after = one.not_after.as_deref().map_or_else(|| "-".into(), minutes);
            let state = if one.tainted { format!("{}!", one.state) } else { one.state.to_owned() };
            let key = one.key_id.get(..8).unwrap_or_default().to_owned();
            vec![one.purpose.to_owned(), state, key, minutes(&one.since), due, not_after]
        };
        table(&["PURPOSE", "STATE", "KEY ID", "SINCE", "NEXT STEP DUE", "NOT AFTER"], &rows.iter().map(cells).collect::<Vec<_>>())
    }
}

/// To the minute: what a table has room for.
fn minutes(time: &str) -> String {
    time.get(..16).map_or_else(|| time.to_owned(), |start| format!("{start}Z"))
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
        Rotation { paused: false, awaits_certificate: false, root_not_after: end.clone(), issuing_not_after: end, now }
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
        let paused = Rotation { paused: true, awaits_certificate: true, ..rotation() };
        assert!(told(&paused).contains("`keyward ca resume`"));
    }
}

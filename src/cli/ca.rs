//! `keyward ca`: the authorities of the trust domain.

use clap::Subcommand;
use serde::Serialize;

use super::agents::Daemon;
use super::describe::purpose_name;
use super::render::{pairs, time};
use super::{Failure, Global, Output};
use crate::client::store::certificates_pem;
use crate::model::{Digest, hex};
use crate::proto::{self, GetAuthoritiesRequest};

/// The verbs.
#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Show the root and the issuing authority.
    #[command(after_help = "Examples:\n  keyward ca show\n  keyward ca show --pem > authorities.pem")]
    Show {
        /// Print the certificates as PEM, root first.
        #[arg(long)]
        pem: bool,
    },
}

#[derive(Serialize)]
struct Authority {
    purpose: &'static str,
    subject: String,
    serial: String,
    not_before: String,
    not_after: String,
    certificate_sha256: String,
    key_sha256: String,
    key_id: String,
    in_hsm: bool,
}

pub(super) async fn run(verb: Verb, global: &Global, output: &mut Output) -> Result<(), Failure> {
    let Verb::Show { pem } = verb;
    let mut daemon = Daemon::connect(global).await?;
    let answer = daemon.service.get_authorities(GetAuthoritiesRequest {}).await.map_err(|status| daemon.failed(&status))?;
    let mut authorities = answer.into_inner().authorities;
    authorities.sort_by_key(|authority| authority.purpose);
    if pem {
        let certificates: Vec<_> = authorities.into_iter().map(|authority| authority.certificate).collect();
        return Ok(output.raw(certificates_pem(&certificates).as_bytes())?);
    }
    let shown: Option<Vec<_>> = authorities.iter().map(parse).collect();
    let shown = shown.ok_or_else(|| Failure::error("the daemon answered with a certificate that does not parse"))?;
    Ok(output.show(&shown, |shown| shown.iter().map(Authority::text).collect::<Vec<_>>().join("\n"))?)
}

fn parse(authority: &proto::Authority) -> Option<Authority> {
    let (_, certificate) = x509_parser::parse_x509_certificate(&authority.certificate).ok()?;
    let seconds = |at: x509_parser::time::ASN1Time| time(u64::try_from(at.timestamp()).unwrap_or(0));
    Some(Authority {
        purpose: purpose_name(authority.purpose()),
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

impl Authority {
    fn text(&self) -> String {
        pairs(&[
            ("purpose", self.purpose.into()),
            ("subject", self.subject.clone()),
            ("serial", self.serial.clone()),
            ("not before", self.not_before.clone()),
            ("not after", self.not_after.clone()),
            ("certificate", format!("SHA-256 {}", self.certificate_sha256)),
            ("key", format!("SHA-256 {}", self.key_sha256)),
            ("key id", if self.key_id.is_empty() { "-".into() } else { self.key_id.clone() }),
            ("in the HSM", if self.in_hsm { "yes" } else { "no" }.into()),
        ])
    }
}

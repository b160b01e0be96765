//! `keyward bundle`: what peers of this trust domain trust.

use clap::Subcommand;
use serde::Serialize;

use super::agents::Daemon;
use super::render::{pairs, time};
use super::{Failure, Global, Output};
use crate::client::store::certificates_pem;
use crate::formats::{Jwk, SpiffeBundle};
use crate::model::{Digest, PublicKey, hex};
use crate::proto::{self, GetBundleRequest};

/// The verbs.
#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Show the authorities that a peer's chain must end at and the keys of tokens, or print them for those who verify.
    #[command(
        after_help = "Examples:\n  keyward bundle show\n  keyward bundle show --pem > bundle.pem\n  keyward bundle show --jwks > bundle.json"
    )]
    Show {
        /// Print the certificates as PEM.
        #[arg(long, conflicts_with = "jwks")]
        pem: bool,
        /// Print a SPIFFE bundle: a JWK Set with sequence and refresh hint.
        #[arg(long)]
        jwks: bool,
    },
}

#[derive(Serialize)]
struct Bundle {
    trust_domain: String,
    sequence: u64,
    refresh_hint_seconds: u32,
    authorities: Vec<Authority>,
    /// Thumbprints.
    token_signing_kids: Vec<String>,
}

#[derive(Serialize)]
struct Authority {
    subject: String,
    serial: String,
    not_before: String,
    not_after: String,
    certificate_sha256: String,
}

pub(super) async fn run(verb: Verb, global: &Global, output: &mut Output) -> Result<(), Failure> {
    let Verb::Show { pem, jwks } = verb;
    let mut daemon = Daemon::connect(global).await?;
    let answer = daemon.service.get_bundle(GetBundleRequest {}).await.map_err(|status| daemon.failed(&status))?.into_inner();
    let bundle = answer.bundle.ok_or_else(|| Failure::error("the daemon answered without a bundle"))?;
    if pem {
        return Ok(output.raw(certificates_pem(&bundle.authorities).as_bytes())?);
    }
    if jwks {
        let set = SpiffeBundle::of(&bundle).map_err(|error| Failure::error(error.to_string()))?;
        let text = serde_json::to_string_pretty(&set).map_err(|error| Failure::error(error.to_string()))?;
        return Ok(output.raw(format!("{text}\n").as_bytes())?);
    }
    let shown = parse(&bundle, answer.trust_domain);
    let shown = shown.ok_or_else(|| Failure::error("the daemon answered with a certificate or key that does not parse"))?;
    Ok(output.show(&shown, Bundle::text)?)
}

fn parse(bundle: &proto::Bundle, trust_domain: String) -> Option<Bundle> {
    let authorities = bundle.authorities.iter().map(|der| {
        let (_, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
        let seconds = |at: x509_parser::time::ASN1Time| time(u64::try_from(at.timestamp()).unwrap_or(0));
        Some(Authority {
            subject: certificate.subject().to_string(),
            serial: hex(certificate.raw_serial()),
            not_before: seconds(certificate.validity().not_before),
            not_after: seconds(certificate.validity().not_after),
            certificate_sha256: Digest::of(der).to_string(),
        })
    });
    Some(Bundle {
        trust_domain,
        sequence: bundle.sequence,
        refresh_hint_seconds: bundle.refresh_hint_seconds,
        authorities: authorities.collect::<Option<_>>()?,
        token_signing_kids: bundle.token_signing_keys.iter().map(|spki| kid(spki)).collect::<Option<_>>()?,
    })
}

fn kid(spki: &[u8]) -> Option<String> {
    PublicKey::from_spki(spki).ok().map(|key| Jwk::thumbprint(&key))
}

impl Bundle {
    fn text(&self) -> String {
        let head = pairs(&[
            ("trust domain", self.trust_domain.clone()),
            ("sequence", self.sequence.to_string()),
            ("refresh hint", format!("{} s", self.refresh_hint_seconds)),
            ("authorities", self.authorities.len().to_string()),
            ("token keys", if self.token_signing_kids.is_empty() { "-".into() } else { self.token_signing_kids.join(", ") }),
        ]);
        let authorities = self.authorities.iter().map(|authority| {
            pairs(&[
                ("subject", authority.subject.clone()),
                ("serial", authority.serial.clone()),
                ("not before", authority.not_before.clone()),
                ("not after", authority.not_after.clone()),
                ("certificate", format!("SHA-256 {}", authority.certificate_sha256)),
            ])
        });
        std::iter::once(head).chain(authorities).collect::<Vec<_>>().join("\n")
    }
}

//! `keyward crl`: what is revoked, as the world is told.

use std::io::Write;
use std::path::{Path, PathBuf};

use clap::Subcommand;
use serde::Serialize;
use x509_parser::prelude::{CertificateRevocationList, FromDer};

use super::agents::Daemon;
use super::render::{self, pairs, table};
use super::{EXIT_NOT_FOUND, Failure, Global, Output, status};
use crate::model::hex;
use crate::proto::{self, GetCrlRequest};

/// The verbs.
#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Show the newest CRL of each issuing authority that is trusted, the active one first; or save them.
    #[command(
        after_help = "Examples:\n  keyward crl show\n  keyward crl show --der keyward.crl\n  keyward crl show --pem > crls.pem && openssl verify -crl_check -CAfile bundle.pem -CRLfile crls.pem -untrusted svid.pem svid.pem"
    )]
    Show {
        /// Write that of the active issuing authority in DER to this file; - is standard output.
        #[arg(long, value_name = "FILE", conflicts_with = "pem")]
        der: Option<PathBuf>,
        /// Print all of them as PEM.
        #[arg(long)]
        pem: bool,
    },
}

#[derive(Serialize)]
struct Crl {
    issuer: String,
    number: Option<String>,
    this_update: String,
    next_update: Option<String>,
    revoked: Vec<Revoked>,
    /// Of the other trusted issuing authorities.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    others: Vec<Crl>,
}

#[derive(Serialize)]
struct Revoked {
    serial: String,
    revoked_at: String,
}

pub(super) async fn run(verb: Verb, global: &Global, output: &mut Output) -> Result<(), Failure> {
    let Verb::Show { der, pem } = verb;
    let mut daemon = Daemon::connect(global).await?;
    let answer = daemon.service.get_crl(GetCrlRequest {}).await.map_err(|status| daemon.failed(&status))?;
    let proto::GetCrlResponse { crl: bytes, others, not_listed } = answer.into_inner();
    if not_listed > 0 {
        output.say(&format!("warning: {}: as soon as the token signs, there is a new one", status::crl(not_listed)));
    }
    if bytes.is_empty() {
        return Err(Failure::new(EXIT_NOT_FOUND, "there is no CRL yet"));
    }
    match der {
        Some(path) if path == Path::new("-") => return Ok(output.raw(&bytes)?),
        Some(path) => return save(&path, &bytes),
        None if pem => {
            let lf = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
            let encoded = std::iter::once(bytes).chain(others).map(|der| pem::encode_config(&pem::Pem::new("X509 CRL", der), lf));
            let text: String = encoded.collect();
            return Ok(output.raw(text.as_bytes())?);
        }
        None => {}
    }
    let crls: Option<Vec<_>> = std::iter::once(&bytes).chain(&others).map(|der| parse(der)).collect();
    let mut crls = crls.ok_or_else(|| Failure::error("the daemon answered with a CRL that does not parse"))?;
    let mut newest = crls.remove(0);
    newest.others = crls;
    Ok(output
        .show(&newest, |newest| std::iter::once(newest).chain(&newest.others).map(Crl::text).collect::<Vec<_>>().join("\n"))?)
}

/// A relying party may read the file at any time: it is replaced as a whole.
fn save(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".new");
    let temporary = PathBuf::from(temporary);
    let mut file = std::fs::File::create(&temporary)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    Ok(std::fs::rename(&temporary, path)?)
}

fn parse(der: &[u8]) -> Option<Crl> {
    let (_, crl) = CertificateRevocationList::from_der(der).ok()?;
    let seconds = |at: x509_parser::time::ASN1Time| render::time(u64::try_from(at.timestamp()).unwrap_or(0));
    Some(Crl {
        issuer: crl.issuer().to_string(),
        number: crl.crl_number().map(ToString::to_string),
        this_update: seconds(crl.last_update()),
        next_update: crl.next_update().map(seconds),
        revoked: crl
            .iter_revoked_certificates()
            .map(|revoked| Revoked { serial: hex(revoked.raw_serial()), revoked_at: seconds(revoked.revocation_date) })
            .collect(),
        others: Vec::new(),
    })
}

impl Crl {
    fn text(&self) -> String {
        let dash = || "-".to_owned();
        let mut text = pairs(&[
            ("issuer", self.issuer.clone()),
            ("number", self.number.clone().unwrap_or_else(dash)),
            ("this update", self.this_update.clone()),
            ("next update", self.next_update.clone().unwrap_or_else(dash)),
            ("revoked", self.revoked.len().to_string()),
        ]);
        if !self.revoked.is_empty() {
            let rows: Vec<_> = self.revoked.iter().map(|one| vec![one.serial.clone(), one.revoked_at.clone()]).collect();
            text.push('\n');
            text.push_str(&table(&["SERIAL", "REVOKED AT"], &rows));
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use rcgen::{CertificateParams, CertificateRevocationListParams, IsCa, Issuer, KeyIdMethod, KeyPair, RevokedCertParams};

    #[test]
    fn a_crl_is_told_in_words() {
        let mut authority = CertificateParams::default();
        authority.is_ca = IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let issuer = Issuer::new(authority, KeyPair::generate().expect("a key"));
        let at = |seconds| time::OffsetDateTime::from_unix_timestamp(seconds).expect("a time");
        let revoked = RevokedCertParams {
            serial_number: 0x1234.into(),
            revocation_time: at(1_800_000_000),
            reason_code: None,
            invalidity_date: None,
        };
        let parameters = CertificateRevocationListParams {
            this_update: at(1_800_000_000),
            next_update: at(1_800_003_600),
            crl_number: 42.into(),
            issuing_distribution_point: None,
            revoked_certs: vec![revoked],
            key_identifier_method: KeyIdMethod::Sha256,
        };
        let crl = parse(parameters.signed_by(&issuer).expect("a CRL").der()).expect("parsed");
        assert_eq!((crl.number.as_deref(), crl.next_update.as_deref()), (Some("42"), Some("2027-01-15T09:00:00Z")));
        assert!(crl.text().ends_with("SERIAL  REVOKED AT\n1234    2027-01-15T08:00:00Z\n"), "{}", crl.text());
        assert!(parse(b"no CRL").is_none());
    }

    #[test]
    fn a_saved_crl_replaces_the_old_one_whole() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("keyward.crl");
        save(&path, b"old and longer").expect("saved");
        save(&path, b"new").expect("saved");
        assert_eq!(std::fs::read(&path).expect("read"), b"new");
        assert_eq!(std::fs::read_dir(directory.path()).expect("listed").count(), 1);
    }
}

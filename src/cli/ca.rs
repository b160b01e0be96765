//! `keyward ca`: the authorities of the trust domain and their rotation.

use std::path::PathBuf;

use clap::{Subcommand, ValueEnum};

use super::agents::Daemon;
use super::ca_list::{Authority, Certificate, List, Pause};
use super::quarantine::reason;
use super::render::pairs;
use super::{EXIT_NOT_FOUND, Failure, Global, Output};
use crate::client::store::certificates_pem;
use crate::daemon::certificate;
use crate::model::{hex, unhex};
use crate::proto;

/// The verbs.
#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// List the generations of every authority until their keys are destroyed: state, since when, when the next step is due.
    ///
    /// planned > prepublished > active > retiring > retired > destroyed. A prepublished authority is trusted and signs nothing yet; a
    /// retiring one is trusted until the last certificate under it has ended; a wrapping key until no agent's key is under it. `!` marks a
    /// tainted one. What `waits` does so for another authority; `ca adopt` waits for you.
    #[command(after_help = "Example:\n  keyward ca list --format json")]
    List,
    /// Show the certificates of the roots and issuing authorities.
    #[command(
        after_help = "Examples:\n  keyward ca show\n  keyward ca show --pem > authorities.pem\n  keyward ca show --csr > issuing.csr"
    )]
    Show {
        /// Print the certificates as PEM, roots first.
        #[arg(long)]
        pem: bool,
        /// Print what the outside root is to sign for the planned issuing authority, as PEM.
        #[arg(long, conflicts_with = "pem")]
        csr: bool,
    },
    /// Replace an authority: a new key is made in the token, trusted, and then signs. The old one retires.
    ///
    /// A new root or token-signing key is in the bundle for 15 minutes before it signs, a root for as long as the longest certificate may last,
    /// if that is longer. What is under a wrapping key is wrapped anew in the background. Under an outside root the new issuing authority waits for its certificate: have the request signed and give it back with
    /// `keyward ca adopt`. `keyward ca list` says how far it is.
    #[command(
        after_help = "Examples:\n  keyward ca rotate issuing --now --yes\n  keyward ca rotate root --reason 'yearly' --yes"
    )]
    Rotate {
        /// Which.
        #[arg(value_enum)]
        purpose: Rotating,
        /// Wait for no maintenance window, and with a wrapping key not until nothing is under the one before. One that is on its way is hurried, and no other begun: it may be repeated.
        #[arg(long)]
        now: bool,
        /// Why; kept in the ledger, at most 256 characters.
        #[arg(long, value_parser = reason, default_value = "asked for")]
        reason: String,
        /// Do it without asking first.
        #[arg(long)]
        yes: bool,
    },
    /// Give back what the outside root signed for `keyward ca show --csr`; with another root, that one as well.
    ///
    /// Another root is in the bundle for 15 minutes (or as long as the longest certificate may last) before anything under it signs. A root has
    /// a P-256 key, is signed by itself and says in its KeyUsage that it signs certificates.
    #[command(
        after_help = "Examples:\n  keyward ca adopt --issuing-certificate issuing.pem\n  keyward ca adopt --issuing-certificate issuing.pem --root-certificate new-root.pem"
    )]
    Adopt {
        /// The issuing certificate, PEM.
        #[arg(long, value_name = "FILE")]
        issuing_certificate: PathBuf,
        /// The root over it, PEM [default: the one in force].
        #[arg(long, value_name = "FILE")]
        root_certificate: Option<PathBuf>,
        /// Why; kept in the ledger, at most 256 characters.
        #[arg(long, value_parser = reason, default_value = "signed outside")]
        reason: String,
    },
    /// A key may be in other hands: replace it at once, whatever is paused.
    ///
    /// A verifier knows roots alone: with an issuing authority its root is replaced. What is under the old ones is trusted for 15 minutes
    /// more, in which agents that follow the bundle renew; then the old root leaves the bundle. Whoever was away longer attests anew.
    ///
    /// With a wrapping key each agent's key that was ever under it gets a new version, and its old ones neither sign nor verify any more.
    #[command(after_help = "Example:\n  keyward ca taint 0f3a9c11 --reason 'backup tape lost' --yes")]
    Taint {
        /// Key id, or its first eight digits or more, as `keyward ca list` shows it.
        key_id: String,
        /// Why; kept in the ledger, at most 256 characters.
        #[arg(long, value_parser = reason)]
        reason: String,
        /// Do it without showing what it affects and asking first.
        #[arg(long)]
        yes: bool,
    },
    /// Hold up every rotation but what a taint asks for. `ca list` and `status` say who does, since when and why.
    ///
    /// Where somebody does already, that is said, and nothing is recorded.
    #[command(after_help = "Example:\n  keyward ca pause --reason 'change freeze'")]
    Pause {
        /// Why; kept in the ledger, at most 256 characters.
        #[arg(long, value_parser = reason)]
        reason: String,
    },
    /// Rotate again. What became due meanwhile is done now: each authority once. Where nothing is paused, nothing is recorded.
    #[command(after_help = "Example:\n  keyward ca resume --reason 'freeze is over'")]
    Resume {
        /// Why; kept in the ledger, at most 256 characters.
        #[arg(long, value_parser = reason)]
        reason: String,
    },
}

/// What rotates.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum Rotating {
    /// The trust anchor, and with it the issuing authority.
    Root,
    /// What signs agents' certificates.
    Issuing,
    /// What signs tokens.
    TokenSigning,
    /// What signs checkpoints of the ledger.
    Ledger,
    /// What agents' keys are wrapped under.
    Wrapping,
}

impl From<Rotating> for proto::Purpose {
    fn from(purpose: Rotating) -> Self {
        match purpose {
            Rotating::Root => Self::Root,
            Rotating::Issuing => Self::Issuing,
            Rotating::TokenSigning => Self::TokenSigning,
            Rotating::Ledger => Self::Ledger,
            Rotating::Wrapping => Self::Wrapping,
        }
    }
}

pub(super) async fn run(verb: Verb, global: &Global, output: &mut Output) -> Result<(), Failure> {
    let mut daemon = Daemon::connect(global).await?;
    match verb {
        Verb::List => {
            let answer = authorities(&mut daemon).await?;
            let list = List::of(&answer);
            if let Some(pause) = &list.pause {
                output.say(&format!("rotation is paused {}: nothing moves but what is tainted", pause.who()));
            }
            Ok(output.show(&list.authorities, |rows| List::table(rows))?)
        }
        Verb::Show { csr: true, .. } => {
            let answer = authorities(&mut daemon).await?;
            let waiting = answer.authorities.iter().find(|one| !one.csr.is_empty());
            let waiting = waiting.ok_or_else(|| Failure::new(EXIT_NOT_FOUND, "nothing is waiting for an outside root"))?;
            Ok(output.raw(csr_pem(&waiting.csr).as_bytes())?)
        }
        Verb::Show { pem, .. } => show(authorities(&mut daemon).await?, pem, output),
        Verb::Rotate { purpose, now, reason, yes } => {
            let name = super::describe::purpose_name(purpose.into());
            if !yes && !output.confirms(&format!("Replace the {name} authority?")) {
                return Err(undone());
            }
            let request = proto::RotateRequest { purpose: proto::Purpose::from(purpose).into(), now, reason };
            let answer = daemon.service.rotate(request).await.map_err(|status| daemon.failed(&status))?.into_inner();
            if answer.already {
                output.say("this was under way before, and nothing else was begun:");
            }
            told(answer.authority, output)
        }
        Verb::Adopt { issuing_certificate, root_certificate, reason } => {
            let root_certificate =
                root_certificate.as_deref().map(certificate).transpose().map_err(Failure::error)?.unwrap_or_default();
            let issuing_certificate = certificate(&issuing_certificate).map_err(Failure::error)?;
            let request = proto::AdoptRequest { issuing_certificate, root_certificate, reason };
            let answer = daemon.service.adopt(request).await.map_err(|status| daemon.failed(&status))?.into_inner();
            told(answer.authority, output)
        }
        Verb::Taint { key_id, reason, yes } => {
            let key_id = named(&authorities(&mut daemon).await?, &key_id, yes, output)?;
            let request = proto::TaintRequest { key_id, reason };
            let answer = daemon.service.taint(request).await.map_err(|status| daemon.failed(&status))?.into_inner();
            let rows: Vec<_> = answer.authorities.iter().map(Authority::of).collect();
            output.say(&format!("tainted: ledger entry {}", answer.ledger_index));
            Ok(output.show(&rows, |rows| List::table(rows))?)
        }
        Verb::Pause { reason } => {
            let request = proto::PauseRotationRequest { reason };
            let answer = daemon.service.pause_rotation(request).await.map_err(|status| daemon.failed(&status))?;
            let ledger_index = answer.into_inner().ledger_index;
            if ledger_index > 0 {
                return entry(ledger_index, "rotation is paused", output);
            }
            let pause = Pause::of(&authorities(&mut daemon).await?);
            let who = pause.as_ref().map(Pause::who).unwrap_or_default();
            entry(0, &format!("rotation was paused before, {who}; nothing was recorded"), output)
        }
        Verb::Resume { reason } => {
            let request = proto::ResumeRotationRequest { reason };
            let answer = daemon.service.resume_rotation(request).await.map_err(|status| daemon.failed(&status))?;
            match answer.into_inner().ledger_index {
                0 => entry(0, "rotation was not paused; nothing was recorded", output),
                index => entry(index, "rotation is resumed", output),
            }
        }
    }
}

fn undone() -> Failure {
    Failure::usage("nothing was done; add --yes to do it without being asked")
}

async fn authorities(daemon: &mut Daemon) -> Result<proto::GetAuthoritiesResponse, Failure> {
    let answer = daemon.service.get_authorities(proto::GetAuthoritiesRequest {}).await;
    Ok(answer.map_err(|status| daemon.failed(&status))?.into_inner())
}

/// Those that certificates speak of.
fn show(answer: proto::GetAuthoritiesResponse, pem: bool, output: &mut Output) -> Result<(), Failure> {
    let with_certificate: Vec<_> = answer.authorities.into_iter().filter(|one| !one.certificate.is_empty()).collect();
    if pem {
        let certificates: Vec<_> = with_certificate.into_iter().map(|one| one.certificate).collect();
        return Ok(output.raw(certificates_pem(&certificates).as_bytes())?);
    }
    let shown: Option<Vec<_>> = with_certificate.iter().map(Certificate::parse).collect();
    let shown = shown.ok_or_else(|| Failure::error("the daemon answered with a certificate that does not parse"))?;
    Ok(output.show(&shown, |shown| shown.iter().map(Certificate::text).collect::<Vec<_>>().join("\n"))?)
}

/// The key that an operator means.
fn named(answer: &proto::GetAuthoritiesResponse, key_id: &str, yes: bool, output: &mut Output) -> Result<Vec<u8>, Failure> {
    let start = key_id.to_ascii_lowercase();
    if start.len() < 8 || (start.len().is_multiple_of(2) && unhex(&start).is_none()) {
        return Err(Failure::usage("name the key by its first eight hexadecimal digits or more; see `keyward ca list`"));
    }
    let mut found = answer.authorities.iter().filter(|one| hex(&one.key_id).starts_with(&start));
    match (found.next(), found.next()) {
        (Some(one), None) => {
            output.say(&List::table(&[Authority::of(one)]));
            let affects = match one.purpose() {
                proto::Purpose::Wrapping => {
                    "Taint it? It and every agent's key that was ever under it are replaced, the keys one after the other."
                }
                proto::Purpose::Issuing => "Taint it? It and its root are replaced, at once where the root is in the HSM.",
                proto::Purpose::Root => {
                    "Taint it? It and the issuing authority under it are replaced, at once where it is in the HSM."
                }
                _ => "Taint it? It is replaced at once.",
            };
            if !yes && !output.confirms(affects) {
                return Err(undone());
            }
            Ok(one.key_id.clone())
        }
        (None, _) => Err(Failure::new(EXIT_NOT_FOUND, format!("no authority has a key {key_id}"))),
        (Some(_), Some(_)) => Err(Failure::usage("more than one key begins so: give more digits")),
    }
}

/// Where a new generation has got to, and what it waits for.
fn told(authority: Option<proto::Authority>, output: &mut Output) -> Result<(), Failure> {
    let Some(authority) = authority else {
        return Err(Failure::error("the new authority was given up; the daemon's log says why"));
    };
    if !authority.csr.is_empty() {
        output.say("have the outside root sign this, and give it back with `keyward ca adopt`:");
        output.say(&csr_pem(&authority.csr));
    }
    let row = Authority::of(&authority);
    Ok(output.show(&row, Authority::text)?)
}

/// What was done, and its entry; without one it was so before.
fn entry(ledger_index: u64, done: &str, output: &mut Output) -> Result<(), Failure> {
    output.say(done);
    let index = (ledger_index > 0).then_some(ledger_index);
    let entry = serde_json::json!({ "already": index.is_none(), "ledger_index": index });
    Ok(output.show(&entry, |_| index.map(|index| pairs(&[("ledger entry", index.to_string())])).unwrap_or_default())?)
}

fn csr_pem(der: &[u8]) -> String {
    let lf = pem::EncodeConfig::new().set_line_ending(pem::LineEnding::LF);
    pem::encode_config(&pem::Pem::new("CERTIFICATE REQUEST", der), lf)
}

//! `keyward init` and `keyward serve`.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Args;
use prost::Message;
use serde::Serialize;

use crate::acts::Initialised;
use crate::config::Log;
use crate::daemon::{self, InitAsk};
use crate::ledger::Reader;
use crate::proto::entry::Body;
use crate::proto::{Entry, IntentKind};

use super::{Failure, Global, Output};

/// More entries than an `init` that was interrupted many times leaves behind.
const SETUP_ENTRIES: u32 = 1_000;

/// What `init` takes.
#[derive(Debug, Args)]
pub(super) struct Init {
    /// The root is outside: write the issuing key's signing request to this file and wait for its certificate.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["root_certificate", "issuing_certificate"])]
    root_csr: Option<PathBuf>,
    /// The outside root's certificate, PEM.
    #[arg(long, value_name = "FILE", requires = "issuing_certificate")]
    root_certificate: Option<PathBuf>,
    /// The issuing certificate that the outside root signed, PEM.
    #[arg(long, value_name = "FILE", requires = "root_certificate")]
    issuing_certificate: Option<PathBuf>,
}

#[derive(Serialize)]
struct Done {
    complete: bool,
    trust_domain: String,
    ledger_vkey: Option<String>,
    bundle: Option<PathBuf>,
    issuing_csr: Option<PathBuf>,
}

pub(super) async fn init(ask: Init, global: &Global, output: &mut Output) -> Result<(), Failure> {
    let config = global.load()?;
    if ask.root_csr.is_none() && ask.root_certificate.is_none() && awaits_root(&config.paths.state) {
        let advice =
            "go on with --root-certificate and --issuing-certificate, or write the signing request again with --root-csr";
        return Err(Failure::usage(format!("{} waits for an outside root: {advice}", config.paths.state.display())));
    }
    daemon::log(&Log { level: "error".to_owned(), ..config.log.clone() });
    let signed = ask.root_certificate.zip(ask.issuing_certificate);
    let done =
        daemon::initialise(&config, InitAsk { root_outside: ask.root_csr.is_some(), signed }).await.map_err(Failure::error)?;
    let mut shown = Done {
        complete: false,
        trust_domain: config.trust_domain.to_string(),
        ledger_vkey: None,
        bundle: None,
        issuing_csr: None,
    };
    match done {
        Initialised::Complete { vkey, .. } => {
            shown.complete = true;
            shown.ledger_vkey = Some(vkey);
            shown.bundle = Some(config.paths.state.join("bundle.pem"));
        }
        Initialised::Already => {
            return Err(Failure::error(format!("{} is initialised already; nothing was changed", config.paths.state.display())));
        }
        Initialised::AwaitsRoot { csr } => {
            let path = ask.root_csr.unwrap_or_else(|| config.paths.state.join("issuing.csr"));
            std::fs::write(&path, csr).map_err(|error| Failure::error(format!("{}: {error}", path.display())))?;
            shown.issuing_csr = Some(path);
        }
    }
    output.show(&shown, table)?;
    Ok(())
}

/// Whether the ledger below `state` has a signing request for an outside root and no authority yet. Going on without a word
/// about the root would make one in the token, for good.
fn awaits_root(state: &Path) -> bool {
    let Ok(reader) = Reader::open(&state.join("keyward.db")) else { return false };
    let bodies: Vec<_> = reader
        .entries(0, SETUP_ENTRIES)
        .unwrap_or_default()
        .iter()
        .filter_map(|bytes| Entry::decode(bytes.as_slice()).ok()?.body)
        .collect();
    let asked = |body: &Body| matches!(body, Body::Intended(intended) if intended.kind() == IntentKind::Csr);
    bodies.iter().any(asked) && !bodies.iter().any(|body| matches!(body, Body::AuthorityActivated(_)))
}

fn table(done: &Done) -> String {
    match (&done.ledger_vkey, &done.bundle, &done.issuing_csr) {
        (Some(vkey), Some(bundle), _) => format!(
            "trust domain  {}\nbundle        {}\nledger key    {vkey}\n\nKeep the ledger key where the ledger's keeper cannot change it: `keyward ledger verify --key` goes by it.\n",
            done.trust_domain,
            bundle.display()
        ),
        (_, _, Some(csr)) => format!(
            "signing request  {}\n\nHave the root sign it (CA, path length 0, keyCertSign and cRLSign: the request asks for them), then:\n  keyward init --root-certificate root.pem --issuing-certificate issuing.pem\n",
            csr.display()
        ),
        _ => String::new(),
    }
}

pub(super) fn serve(global: &Global) -> Result<ExitCode, Failure> {
    daemon::serve(global.load()?).map_err(Failure::error)
}

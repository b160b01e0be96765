//! `keyward hsm reconcile`: the tokens held against the ledger.

use serde::Serialize;

use super::agents::Daemon;
use super::describe::purpose_name;
use super::failure::EXIT_UNAVAILABLE;
use super::hsm_status::role;
use super::render::table;
use super::{EXIT_NOT_FOUND, Failure, Global, Output};
use crate::model::hex;
use crate::proto::{self, Finding, ReconcileRequest};

/// What is to be destroyed.
pub(super) enum Unwanted {
    Nothing,
    Strays,
    /// The one whose CKA_ID begins so.
    Stray(String),
}

/// Something that is in a token and not in the ledger, or the other way round; as JSON has it.
#[derive(Serialize)]
struct Stray {
    token: &'static str,
    label: String,
    key_id: String,
    found: &'static str,
    object_label: Option<String>,
    objects: u32,
    purpose: Option<&'static str>,
}

const STRAY: &str = "stray";
const MISSING: &str = "missing";
const MISPLACED: &str = "misplaced";

impl From<proto::Stray> for Stray {
    fn from(stray: proto::Stray) -> Self {
        let found = match stray.finding() {
            _ if stray.destroyed => "destroyed",
            Finding::InTheMaking => "in the making",
            Finding::BeingDestroyed => "being destroyed",
            Finding::Stray => STRAY,
            Finding::Missing => MISSING,
            Finding::Foreign => "foreign",
            Finding::Misplaced => MISPLACED,
            Finding::Unspecified => "unknown",
        };
        Self {
            token: role(stray.role()),
            purpose: (stray.purpose() != proto::Purpose::Unspecified).then(|| purpose_name(stray.purpose())),
            label: stray.label,
            key_id: hex(&stray.key_id),
            found,
            object_label: (stray.objects > 0).then_some(stray.object_label),
            objects: stray.objects,
        }
    }
}

pub(super) async fn run(unwanted: Unwanted, yes: bool, global: &Global, output: &mut Output) -> Result<(), Failure> {
    let mut daemon = Daemon::connect(global).await?;
    let mut request = ReconcileRequest { reason: "keyward hsm reconcile".into(), ..ReconcileRequest::default() };
    if !matches!(unwanted, Unwanted::Nothing) {
        let mut strays = ask(&mut daemon, request.clone()).await?;
        strays.retain(|stray| stray.found == STRAY);
        if let Unwanted::Stray(start) = &unwanted {
            strays.retain(|stray| stray.key_id.starts_with(start));
            match &strays[..] {
                [one] => request.destroy_key_id = crate::model::unhex(&one.key_id).unwrap_or_default(),
                [] => return Err(Failure::new(EXIT_NOT_FOUND, format!("no stray has a key id {start}"))),
                _ => return Err(Failure::usage("more than one stray's key id begins so: give more digits")),
            }
        }
        request.destroy_orphans = request.destroy_key_id.is_empty();
        if !yes {
            output.say(&text(&strays));
            if !output.confirms("Destroy these objects, of which the ledger knows nothing?") {
                return Err(Failure::usage("nothing was done; add --yes to do it without being asked"));
            }
        }
    }
    let strays = ask(&mut daemon, request).await?;
    output.show(&strays, |strays| text(strays))?;
    match strays.iter().filter(|stray| [STRAY, MISSING, MISPLACED].contains(&stray.found)).count() {
        0 => Ok(()),
        left => Err(Failure::new(EXIT_UNAVAILABLE, format!("{left} not as the ledger says"))),
    }
}

async fn ask(daemon: &mut Daemon, request: ReconcileRequest) -> Result<Vec<Stray>, Failure> {
    let answer = daemon.service.reconcile(request).await.map_err(|status| daemon.failed(&status))?;
    Ok(answer.into_inner().strays.into_iter().map(Stray::from).collect())
}

fn text(strays: &[Stray]) -> String {
    if strays.is_empty() {
        return "the tokens hold what the ledger says\n".into();
    }
    let cells = |stray: &Stray| {
        let what = stray.object_label.clone().or(stray.purpose.map(str::to_owned)).unwrap_or_default();
        vec![stray.token.to_owned(), stray.found.to_owned(), stray.key_id.clone(), what]
    };
    table(&["TOKEN", "FOUND", "KEY ID", "WHAT"], &strays.iter().map(cells).collect::<Vec<_>>())
}

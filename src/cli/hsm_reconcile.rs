//! `keyward hsm reconcile`: the tokens held against the ledger.

use serde::Serialize;

use super::agents::Daemon;
use super::describe::purpose_name;
use super::failure::EXIT_UNAVAILABLE;
use super::hsm_status::role;
use super::render::table;
use super::{Failure, Global, Output};
use crate::model::hex;
use crate::proto::{self, ReconcileRequest};

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

impl From<proto::Stray> for Stray {
    fn from(stray: proto::Stray) -> Self {
        let found = match (stray.objects, stray.destroyed) {
            (0, _) => "row without an object",
            (_, true) => "destroyed",
            (_, false) => "object without a row",
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

pub(super) async fn run(destroy: bool, yes: bool, global: &Global, output: &mut Output) -> Result<(), Failure> {
    let mut daemon = Daemon::connect(global).await?;
    if destroy && !yes {
        let strays = ask(&mut daemon, false).await?;
        output.say(&text(&strays));
        if !output.confirms("Destroy the objects that keyward made and the ledger knows nothing of?") {
            return Err(Failure::usage("nothing was done; add --yes to do it without being asked"));
        }
    }
    let strays = ask(&mut daemon, destroy).await?;
    output.show(&strays, |strays| text(strays))?;
    match strays.iter().filter(|stray| stray.found != "destroyed").count() {
        0 => Ok(()),
        left => Err(Failure::new(EXIT_UNAVAILABLE, format!("{left} not as the ledger says"))),
    }
}

async fn ask(daemon: &mut Daemon, destroy_orphans: bool) -> Result<Vec<Stray>, Failure> {
    let request = ReconcileRequest { destroy_orphans, reason: "keyward hsm reconcile".into() };
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

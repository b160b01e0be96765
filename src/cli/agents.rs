//! `keyward agents`: what an operator does with agents.

use std::fs::File;
use std::io::Write;
use std::path::{Path, PathBuf};

use clap::{Subcommand, ValueEnum};
use serde::Serialize;
use tonic::transport::Channel;

use super::render::{pairs, table, time, time_or_null};
use super::{Failure, Global, Output, duration};
use crate::client::{self, JoinFile, operator};
use crate::model::{AgentId, hex};
use crate::proto::operator_service_client::OperatorServiceClient;
use crate::proto::{self, AgentState, AgentSummary, EnrolRequest, ListAgentsRequest, QuarantineCause, ShowAgentRequest};

/// The verbs.
#[derive(Debug, Subcommand)]
pub(super) enum Verb {
    /// Enrol a new agent and write its join file, which is secret and shown once.
    #[command(
        after_help = "Examples:\n  keyward agents enrol coder/7 --ttl 10m --out coder-7.join\n  keyward agents enrol coder/8 --out - | ssh worker keyward agent attest --join - --out /run/coder"
    )]
    Enrol {
        /// <class>/<instance>; an instance is never enrolled twice.
        #[arg(value_parser = AgentId::parse)]
        agent: AgentId,
        /// Longest lifetime of its certificates [default: as configured].
        #[arg(long, value_parser = duration::seconds, value_name = "DURATION")]
        ttl: Option<u32>,
        /// How long after its last certificate expired it may come back with its own key [default: as configured].
        #[arg(long, value_parser = duration::seconds, value_name = "DURATION")]
        rejoin: Option<u32>,
        /// How long the join file is good for [default: as configured].
        #[arg(long, value_parser = duration::seconds, value_name = "DURATION")]
        token_ttl: Option<u32>,
        /// Where the join file goes: a new file (mode 0600), or - for standard output.
        #[arg(long, value_name = "FILE")]
        out: PathBuf,
    },
    /// List agents, by name.
    #[command(after_help = "Example:\n  keyward agents list --state quarantined")]
    List {
        /// Only those in this state.
        #[arg(long, value_enum)]
        state: Option<State>,
    },
    /// Show one agent: state, limits, live certificates.
    #[command(after_help = "Example:\n  keyward agents show coder/7 --format json")]
    Show {
        /// <class>/<instance>
        #[arg(value_parser = AgentId::parse)]
        agent: AgentId,
    },
}

/// The states of an agent.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(super) enum State {
    /// Its join token is not spent yet.
    Enrolled,
    /// It has been attested.
    Active,
    /// It is denied.
    Quarantined,
    /// Released, not attested again yet.
    Reattest,
}

impl From<State> for AgentState {
    fn from(state: State) -> Self {
        match state {
            State::Enrolled => Self::Enrolled,
            State::Active => Self::Active,
            State::Quarantined => Self::Quarantined,
            State::Reattest => Self::Reattest,
        }
    }
}

/// The operator's connection and how its errors are told.
pub(super) struct Daemon {
    pub(super) service: OperatorServiceClient<Channel>,
    place: String,
}

impl Daemon {
    pub(super) async fn connect(global: &Global) -> Result<Self, Failure> {
        let socket = global.socket()?;
        let service = operator::connect(&socket).await.map_err(|error| {
            let nobody = matches!(error, client::Error::Unreachable { .. });
            let failure = Failure::from(error);
            if nobody { failure.and_then_said("is `keyward serve` running?") } else { failure }
        })?;
        Ok(Self { service, place: socket.display().to_string() })
    }

    /// Sorts what a call ended in.
    pub(super) fn failed(&self, status: &tonic::Status) -> client::Error {
        client::Error::of_status(status, &self.place)
    }
}

pub(super) async fn run(verb: Verb, global: &Global, output: &mut Output) -> Result<(), Failure> {
    match verb {
        Verb::Enrol { agent, ttl, rejoin, token_ttl, out } => {
            let request = EnrolRequest {
                agent: agent.to_string(),
                ttl_seconds_max: ttl.unwrap_or(0),
                rejoin_seconds: rejoin.unwrap_or(0),
                token_ttl_seconds: token_ttl.unwrap_or(0),
            };
            let mut place = JoinPlace::open(&out)?;
            let mut daemon = Daemon::connect(global).await?;
            let answer = daemon.service.enrol(request).await.map_err(|status| daemon.failed(&status))?.into_inner();
            place.take(answer.join, answer.ledger_index, "enrolled", output)
        }
        Verb::List { state } => {
            let agents = list(&mut Daemon::connect(global).await?, state.map(AgentState::from)).await?;
            Ok(output.show(&agents, |agents| agents_table(agents))?)
        }
        Verb::Show { agent } => {
            let shown = show(&mut Daemon::connect(global).await?, &agent).await?;
            Ok(output.show(&shown, Shown::text)?)
        }
    }
}

/// Where a join file goes, made ready before the daemon is asked: its answer is given once.
pub(super) struct JoinPlace {
    path: PathBuf,
    file: Option<File>,
    written: bool,
}

#[derive(Serialize)]
struct Joining {
    agent: String,
    ledger_index: u64,
    join_file: String,
    expires: String,
}

impl JoinPlace {
    pub(super) fn open(path: &Path) -> Result<Self, Failure> {
        let file = match path {
            path if path == Path::new("-") => None,
            // Only the better message: that the file is new is seen to where it is created.
            path if path.exists() => {
                return Err(Failure::error(format!("{}: exists already; a join file replaces nothing", path.display())));
            }
            path => Some(JoinFile::create(path)?),
        };
        Ok(Self { path: path.to_path_buf(), file, written: false })
    }

    /// Writes the daemon's answer down and says so.
    pub(super) fn take(
        &mut self,
        join: Option<proto::JoinFile>,
        ledger_index: u64,
        done: &str,
        output: &mut Output,
    ) -> Result<(), Failure> {
        let join = join.ok_or_else(|| Failure::error("the daemon answered without a join file"))?;
        let join = JoinFile::from_proto(join)?;
        let json = join.to_json()?;
        let Some(file) = self.file.as_mut() else {
            output.raw(&json)?;
            output.say(&format!("{done} {}, ledger entry {ledger_index}; good until {}", join.agent, join.expires));
            return Ok(());
        };
        file.write_all(&json)?;
        file.sync_all()?;
        self.written = true;
        let joining = Joining {
            agent: join.agent.to_string(),
            ledger_index,
            join_file: self.path.display().to_string(),
            expires: join.expires.to_string(),
        };
        output.show(&joining, |joining| {
            pairs(&[
                ("agent", joining.agent.clone()),
                ("ledger entry", joining.ledger_index.to_string()),
                ("join file", joining.join_file.clone()),
                ("good until", joining.expires.clone()),
            ])
        })?;
        output.say(&format!("{done}; hand the join file to the agent and to nobody else"));
        Ok(())
    }
}

impl Drop for JoinPlace {
    fn drop(&mut self) {
        if self.file.is_some() && !self.written {
            // Nothing of worth is in it; left behind it would stand in the way of the next attempt.
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

/// One agent, as JSON has it.
#[derive(Serialize)]
pub(super) struct Summary {
    agent: String,
    spiffe_id: String,
    pub(super) state: &'static str,
    epoch: u32,
    next_sequence: u64,
    not_after: Option<String>,
    live_certificates: u32,
}

impl From<AgentSummary> for Summary {
    fn from(agent: AgentSummary) -> Self {
        Self {
            state: state_name(agent.state()),
            agent: agent.agent,
            spiffe_id: agent.spiffe_id,
            epoch: agent.epoch,
            next_sequence: agent.next_sequence,
            not_after: time_or_null(agent.not_after_unix_seconds),
            live_certificates: agent.live_certificates,
        }
    }
}

fn state_name(state: AgentState) -> &'static str {
    match state {
        AgentState::Unspecified => "unknown",
        AgentState::Enrolled => "enrolled",
        AgentState::Active => "active",
        AgentState::Quarantined => "quarantined",
        AgentState::Reattest => "reattest",
    }
}

pub(super) async fn list(daemon: &mut Daemon, state: Option<AgentState>) -> Result<Vec<Summary>, Failure> {
    let mut all = Vec::new();
    let mut after = String::new();
    loop {
        let request = ListAgentsRequest { after, limit: 1_000, state: state.unwrap_or_default().into() };
        let page = daemon.service.list_agents(request).await.map_err(|status| daemon.failed(&status))?.into_inner();
        all.extend(page.agents.into_iter().map(Summary::from));
        if page.next.is_empty() {
            return Ok(all);
        }
        after = page.next;
    }
}

pub(super) fn agents_table(agents: &[Summary]) -> String {
    let row = |agent: &Summary| {
        vec![
            agent.agent.clone(),
            agent.state.into(),
            agent.epoch.to_string(),
            agent.next_sequence.to_string(),
            agent.live_certificates.to_string(),
            agent.not_after.clone().unwrap_or_else(|| "-".into()),
        ]
    };
    let rows: Vec<_> = agents.iter().map(row).collect();
    table(&["AGENT", "STATE", "EPOCH", "SEQUENCE", "LIVE", "NOT AFTER"], &rows)
}

/// One agent whole, as JSON has it.
#[derive(Serialize)]
pub(super) struct Shown {
    #[serde(flatten)]
    pub(super) summary: Summary,
    ttl_seconds_max: u32,
    rejoin_seconds: u32,
    token_expires: Option<String>,
    quarantine: Option<Quarantine>,
    pub(super) certificates: Vec<Certificate>,
}

#[derive(Serialize)]
struct Quarantine {
    ledger_index: u64,
    cause: &'static str,
    detail: String,
}

/// A certificate that has not expired, as JSON has it.
#[derive(Serialize)]
pub(super) struct Certificate {
    serial: String,
    epoch: u32,
    not_after: String,
    denied: bool,
}

impl From<&proto::LiveCertificate> for Certificate {
    fn from(live: &proto::LiveCertificate) -> Self {
        let not_after = time(live.not_after_unix_seconds);
        Self { serial: hex(&live.serial), epoch: live.epoch, not_after, denied: live.denied }
    }
}

pub(super) fn certificates_table(certificates: &[Certificate]) -> String {
    let row = |certificate: &Certificate| {
        let denied = if certificate.denied { "yes" } else { "no" };
        vec![certificate.serial.clone(), certificate.epoch.to_string(), certificate.not_after.clone(), denied.into()]
    };
    let rows: Vec<_> = certificates.iter().map(row).collect();
    table(&["SERIAL", "EPOCH", "NOT AFTER", "DENIED"], &rows)
}

pub(super) async fn show(daemon: &mut Daemon, agent: &AgentId) -> Result<Shown, Failure> {
    let request = ShowAgentRequest { agent: agent.to_string() };
    let answer = daemon.service.show_agent(request).await.map_err(|status| daemon.failed(&status))?.into_inner();
    let quarantined = answer.agent.as_ref().is_some_and(|agent| agent.state() == AgentState::Quarantined);
    let quarantine = quarantined.then(|| Quarantine {
        ledger_index: answer.quarantined_index,
        cause: match answer.quarantine_cause() {
            QuarantineCause::Operator => "operator",
            QuarantineCause::CloneSuspected => "clone_suspected",
            QuarantineCause::Unspecified => "unknown",
        },
        detail: answer.quarantine_detail.clone(),
    });
    let limits = answer.limits.unwrap_or_default();
    Ok(Shown {
        certificates: answer.live.iter().map(Certificate::from).collect(),
        summary: answer.agent.unwrap_or_default().into(),
        ttl_seconds_max: limits.ttl_seconds_max,
        rejoin_seconds: limits.rejoin_seconds,
        token_expires: time_or_null(answer.token_expires_unix_seconds),
        quarantine,
    })
}

impl Shown {
    pub(super) fn text(&self) -> String {
        let summary = &self.summary;
        let dash = || "-".to_owned();
        let mut lines = vec![
            ("agent", summary.agent.clone()),
            ("SPIFFE ID", summary.spiffe_id.clone()),
            ("state", summary.state.into()),
            ("epoch", summary.epoch.to_string()),
            ("next sequence", summary.next_sequence.to_string()),
            ("longest lifetime", duration::text(self.ttl_seconds_max.into())),
            ("may rejoin for", duration::text(self.rejoin_seconds.into())),
            ("not after", summary.not_after.clone().unwrap_or_else(dash)),
            ("unspent token until", self.token_expires.clone().unwrap_or_else(dash)),
        ];
        if let Some(quarantine) = &self.quarantine {
            lines.push(("quarantined", format!("ledger entry {}, {}", quarantine.ledger_index, quarantine.cause)));
            lines.push(("reason", quarantine.detail.clone()));
        }
        let mut text = pairs(&lines);
        if !self.certificates.is_empty() {
            text.push('\n');
            text.push_str(&certificates_table(&self.certificates));
        }
        text
    }
}

//! OperatorService.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use crate::acts::{Acts, Unwanted};
use crate::authn::Operator;
use crate::ledger::Reader;
use crate::model::{AgentId, Reason, Refusal};
use crate::proto::operator_service_server::OperatorService;
use crate::proto::{self, AgentState};

use super::listen::LocalPeer;
use super::refusal::status_of;
use super::status::Readiness;
use super::{authorities, convert};

/// Canary signatures of a test that asks for no number of them.
const CANARIES: usize = 8;
/// Most canary signatures of one test.
const CANARIES_MAX: u32 = 1000;

pub(super) struct Operators {
    acts: Arc<Acts>,
    readiness: Readiness,
}

impl Operators {
    pub(super) fn new(acts: Arc<Acts>, readiness: Readiness) -> Self {
        Self { acts, readiness }
    }

    /// Reads from the ledger's file, off the runtime's threads.
    async fn read<T: Send + 'static>(
        &self,
        read: impl FnOnce(&Reader) -> Result<T, crate::ledger::StoreError> + Send + 'static,
    ) -> Result<T, Status> {
        let ledger = self.acts.ledger().clone();
        let result = tokio::task::spawn_blocking(move || read(ledger.reader())).await;
        result.map_err(|error| status_of(&Refusal::internal(error)))?.map_err(|error| status_of(&Refusal::internal(error)))
    }
}

/// The caller, if it is an operator.
pub(super) fn operator<T>(request: &Request<T>) -> Result<Operator, Status> {
    let refuse = |refusal: Refusal| Err(status_of(&refusal));
    match request.extensions().get::<LocalPeer>() {
        Some(LocalPeer(Ok(operator))) => Ok(*operator),
        Some(LocalPeer(Err(refused))) => refuse(
            Refusal::new(Reason::CallerNotAllowed, "your uid is not an operator's: see [operator] in the configuration")
                .because(*refused),
        ),
        None => refuse(Refusal::internal("a request without a peer")),
    }
}

pub(super) fn agent_id(name: &str) -> Result<AgentId, Status> {
    AgentId::parse(name)
        .map_err(|error| status_of(&Refusal::new(Reason::MalformedRequest, "name an agent as <class>/<instance>").because(error)))
}

fn told<T>(result: Result<T, Refusal>) -> Result<T, Status> {
    result.map_err(|refusal| {
        tracing::info!(?refusal, "an operator's call was refused");
        status_of(&refusal)
    })
}

pub(super) fn checked_reason(reason: String) -> Result<String, Status> {
    if reason.chars().count() > 256 {
        return Err(status_of(&Refusal::new(Reason::MalformedRequest, "give a reason of at most 256 characters")));
    }
    Ok(reason)
}

/// Runs an operator's act in a task of its own, so that it ends whether the caller waits or not.
pub(super) async fn act<T: Send + 'static>(work: impl Future<Output = Result<T, Refusal>> + Send + 'static) -> Result<T, Status> {
    told(tokio::spawn(work).await.unwrap_or_else(|error| Err(Refusal::internal(error))))
}

#[tonic::async_trait]
impl OperatorService for Operators {
    async fn enrol(&self, request: Request<proto::EnrolRequest>) -> Result<Response<proto::EnrolResponse>, Status> {
        let operator = operator(&request)?;
        let ask = request.into_inner();
        let agent = agent_id(&ask.agent)?;
        let acts = Arc::clone(&self.acts);
        let terms =
            act(
                async move { acts.enrol(&operator, agent, ask.ttl_seconds_max, ask.rejoin_seconds, ask.token_ttl_seconds).await },
            )
            .await?;
        let ledger_index = terms.ledger_index;
        Ok(Response::new(proto::EnrolResponse { join: Some(convert::join_file(terms, self.acts.domain())), ledger_index }))
    }

    async fn list_agents(
        &self,
        request: Request<proto::ListAgentsRequest>,
    ) -> Result<Response<proto::ListAgentsResponse>, Status> {
        operator(&request)?;
        let ask = request.into_inner();
        let after = if ask.after.is_empty() { None } else { Some(agent_id(&ask.after)?) };
        let limit = if ask.limit == 0 { 100 } else { ask.limit.min(1000) };
        let state = Some(ask.state()).filter(|state| *state != AgentState::Unspecified);
        let (page, next) = self.acts.ledger().agents(after.as_ref(), limit as usize, state);
        let agents = page.iter().map(|agent| convert::summary(agent, self.acts.domain())).collect();
        Ok(Response::new(proto::ListAgentsResponse { agents, next: next.map(|id| id.to_string()).unwrap_or_default() }))
    }

    async fn show_agent(&self, request: Request<proto::ShowAgentRequest>) -> Result<Response<proto::ShowAgentResponse>, Status> {
        operator(&request)?;
        let agent = told(self.acts.ledger().agent(&agent_id(&request.into_inner().agent)?))?;
        Ok(Response::new(convert::shown(&agent, self.acts.domain())))
    }

    async fn quarantine(
        &self,
        request: Request<proto::QuarantineRequest>,
    ) -> Result<Response<proto::QuarantineResponse>, Status> {
        let operator = operator(&request)?;
        let ask = request.into_inner();
        let (agent, reason) = (agent_id(&ask.agent)?, checked_reason(ask.reason)?);
        let acts = Arc::clone(&self.acts);
        let name = agent.clone();
        let denied = act(async move { acts.quarantine(&operator, &name, &reason).await }).await?;
        let view = told(self.acts.ledger().agent(&agent))?;
        Ok(Response::new(proto::QuarantineResponse {
            ledger_index: denied.index,
            epoch_denied: denied.epoch,
            denied: view.live.iter().map(convert::live).collect(),
            already: denied.already,
        }))
    }

    async fn release(&self, request: Request<proto::ReleaseRequest>) -> Result<Response<proto::ReleaseResponse>, Status> {
        let operator = operator(&request)?;
        let ask = request.into_inner();
        let (agent, reason) = (agent_id(&ask.agent)?, checked_reason(ask.reason)?);
        let acts = Arc::clone(&self.acts);
        let terms = act(async move { acts.release(&operator, agent, &reason, ask.token_ttl_seconds).await }).await?;
        let (ledger_index, epoch) = (terms.ledger_index, terms.epoch);
        Ok(Response::new(proto::ReleaseResponse {
            join: Some(convert::join_file(terms, self.acts.domain())),
            ledger_index,
            epoch,
        }))
    }

    async fn list_entries(
        &self,
        request: Request<proto::ListEntriesRequest>,
    ) -> Result<Response<proto::ListEntriesResponse>, Status> {
        operator(&request)?;
        let ask = request.into_inner();
        let limit = if ask.limit == 0 { 100 } else { ask.limit };
        let entries = self.read(move |reader| reader.entries(ask.from, limit)).await?;
        let size = self.acts.ledger().progress().borrow().size;
        Ok(Response::new(proto::ListEntriesResponse { entries, size }))
    }

    async fn get_checkpoint(
        &self,
        request: Request<proto::GetCheckpointRequest>,
    ) -> Result<Response<proto::GetCheckpointResponse>, Status> {
        operator(&request)?;
        let note = self.read(|reader| reader.fact("checkpoint")).await?.unwrap_or_default();
        let authorities = told(self.acts.authorities())?;
        let vkey = told(crate::acts::verifier_key(self.acts.domain(), authorities.ledger_key().public().clone()))?;
        Ok(Response::new(proto::GetCheckpointResponse {
            note: String::from_utf8_lossy(&note).into_owned(),
            vkey: vkey.to_string(),
        }))
    }

    async fn get_authorities(
        &self,
        request: Request<proto::GetAuthoritiesRequest>,
    ) -> Result<Response<proto::GetAuthoritiesResponse>, Status> {
        operator(&request)?;
        let (authorities, rotation_paused) = (authorities::list(&self.acts), self.acts.is_rotation_paused());
        let pause = self.acts.ledger().rotation_pause().map(authorities::pause);
        Ok(Response::new(proto::GetAuthoritiesResponse { authorities, rotation_paused, pause }))
    }

    async fn get_crl(&self, request: Request<proto::GetCrlRequest>) -> Result<Response<proto::GetCrlResponse>, Status> {
        operator(&request)?;
        let crls = self.acts.crls();
        let (crl, others) = match crls.split_first() {
            Some((first, others)) => (first.clone(), others.to_vec()),
            None => Default::default(),
        };
        Ok(Response::new(proto::GetCrlResponse { crl, others, not_listed: self.acts.not_on_crl() }))
    }

    async fn rotate(&self, request: Request<proto::RotateRequest>) -> Result<Response<proto::RotateResponse>, Status> {
        let operator = operator(&request)?;
        let (ask, acts) = (request.into_inner(), Arc::clone(&self.acts));
        let purpose = ask.purpose();
        let (now, reason) = (ask.now, checked_reason(ask.reason)?);
        let (key, already) = act(async move { acts.rotate(&operator, purpose, now, &reason).await }).await?;
        Ok(Response::new(proto::RotateResponse { authority: authorities::one(&self.acts, key), already }))
    }

    async fn adopt(&self, request: Request<proto::AdoptRequest>) -> Result<Response<proto::AdoptResponse>, Status> {
        let operator = operator(&request)?;
        let (ask, acts) = (request.into_inner(), Arc::clone(&self.acts));
        let (issuing, root, reason) = (ask.issuing_certificate, ask.root_certificate, checked_reason(ask.reason)?);
        let key = act(async move { acts.adopt(&operator, issuing, root, &reason).await }).await?;
        Ok(Response::new(proto::AdoptResponse { authority: authorities::one(&self.acts, key) }))
    }

    async fn taint(&self, request: Request<proto::TaintRequest>) -> Result<Response<proto::TaintResponse>, Status> {
        let operator = operator(&request)?;
        let (ask, acts) = (request.into_inner(), Arc::clone(&self.acts));
        let (key, reason) = (ask.key_id, checked_reason(ask.reason)?);
        let ledger_index = act(async move { acts.taint(&operator, &key, &reason).await }).await?;
        Ok(Response::new(proto::TaintResponse { ledger_index, authorities: authorities::list(&self.acts) }))
    }

    async fn pause_rotation(
        &self,
        request: Request<proto::PauseRotationRequest>,
    ) -> Result<Response<proto::PauseRotationResponse>, Status> {
        let operator = operator(&request)?;
        let (reason, acts) = (checked_reason(request.into_inner().reason)?, Arc::clone(&self.acts));
        let index = act(async move { acts.pause_rotation(&operator, &reason).await }).await?;
        Ok(Response::new(proto::PauseRotationResponse { ledger_index: index.unwrap_or(0) }))
    }

    async fn resume_rotation(
        &self,
        request: Request<proto::ResumeRotationRequest>,
    ) -> Result<Response<proto::ResumeRotationResponse>, Status> {
        let operator = operator(&request)?;
        let (reason, acts) = (checked_reason(request.into_inner().reason)?, Arc::clone(&self.acts));
        let index = act(async move { acts.resume_rotation(&operator, &reason).await }).await?;
        Ok(Response::new(proto::ResumeRotationResponse { ledger_index: index.unwrap_or(0) }))
    }

    async fn reconcile(&self, request: Request<proto::ReconcileRequest>) -> Result<Response<proto::ReconcileResponse>, Status> {
        let operator = operator(&request)?;
        let (ask, acts) = (request.into_inner(), Arc::clone(&self.acts));
        let reason = checked_reason(ask.reason)?;
        let unwanted = match (ask.destroy_orphans, ask.destroy_key_id) {
            (true, _) => Unwanted::Strays,
            (false, id) if id.is_empty() => Unwanted::Nothing,
            (false, id) => Unwanted::Stray(id),
        };
        let strays = act(async move { acts.reconcile(&operator, unwanted, &reason).await }).await?;
        Ok(Response::new(proto::ReconcileResponse { strays: strays.into_iter().map(authorities::stray).collect() }))
    }

    async fn get_bundle(&self, request: Request<proto::GetBundleRequest>) -> Result<Response<proto::GetBundleResponse>, Status> {
        operator(&request)?;
        let trust_domain = self.acts.domain().to_string();
        Ok(Response::new(proto::GetBundleResponse { bundle: Some(told(self.acts.bundle())?), trust_domain }))
    }

    async fn status(&self, request: Request<proto::StatusRequest>) -> Result<Response<proto::StatusResponse>, Status> {
        operator(&request)?;
        Ok(Response::new(self.readiness.status(&self.acts).await))
    }

    async fn test_tokens(
        &self,
        request: Request<proto::TestTokensRequest>,
    ) -> Result<Response<proto::TestTokensResponse>, Status> {
        operator(&request)?;
        let signatures = match request.into_inner().signatures {
            0 => CANARIES,
            wanted => wanted.min(CANARIES_MAX) as usize,
        };
        let mut checks = self.readiness.test_tokens(signatures).await;
        // Where the ledger cannot be read the answer says less.
        let Ok(known) = self.read(Reader::keys).await else { return Ok(Response::new(proto::TestTokensResponse { checks })) };
        for check in checks.iter_mut().filter(|check| !check.key_id.is_empty()) {
            let row = known.iter().find(|row| row.id.0[..] == check.key_id);
            // Agents' keys have rows of their own.
            check.purpose = row.map_or(proto::Purpose::Agent, |row| row.purpose).into();
        }
        Ok(Response::new(proto::TestTokensResponse { checks }))
    }

    async fn accept_clock(
        &self,
        request: Request<proto::AcceptClockRequest>,
    ) -> Result<Response<proto::AcceptClockResponse>, Status> {
        let operator = operator(&request)?;
        let reason = checked_reason(request.into_inner().reason)?;
        let acts = Arc::clone(&self.acts);
        let (ledger_index, deviation_micros) = act(async move { acts.accept_clock(&operator, &reason).await }).await?;
        Ok(Response::new(proto::AcceptClockResponse { ledger_index, deviation_micros }))
    }
}

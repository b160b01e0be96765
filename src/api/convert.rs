//! Between the rooms' values and the wire's.

use crate::acts::{Issued, JoinTerms};
use crate::ledger::{AgentView, Live};
use crate::model::TrustDomain;
use crate::proto;

pub(super) fn credential(issued: Issued, bundle: proto::Bundle) -> proto::Credential {
    let agent = issued.spiffe_id.path().strip_prefix("/agent/").unwrap_or_default().to_owned();
    proto::Credential {
        chain: issued.chain,
        bundle: Some(bundle),
        spiffe_id: issued.spiffe_id.to_string(),
        agent,
        epoch: issued.epoch,
        next_sequence: issued.next_sequence,
        ledger_index: issued.ledger_index,
        not_after_unix_seconds: issued.not_after.seconds(),
    }
}

pub(super) fn join_file(terms: JoinTerms, domain: &TrustDomain) -> proto::JoinFile {
    proto::JoinFile {
        addresses: terms.addresses,
        trust_domain: domain.to_string(),
        agent: terms.agent.to_string(),
        bundle: Some(terms.bundle),
        token_id: terms.token_id.0.to_vec(),
        token_seed: terms.seed.reveal().to_vec(),
        expires_unix_seconds: terms.expires_unix_seconds,
    }
}

pub(super) fn live((live, denied): &(Live, bool)) -> proto::LiveCertificate {
    proto::LiveCertificate {
        serial: live.serial.0.to_vec(),
        not_after_unix_seconds: live.not_after.seconds(),
        epoch: live.epoch,
        denied: *denied,
    }
}

pub(super) fn summary(agent: &AgentView, domain: &TrustDomain) -> proto::AgentSummary {
    proto::AgentSummary {
        agent: agent.id.to_string(),
        spiffe_id: agent.id.spiffe_id(domain).to_string(),
        state: agent.state.into(),
        epoch: agent.epoch,
        next_sequence: agent.sequence,
        not_after_unix_seconds: agent.not_after.map_or(0, crate::model::UnixTime::seconds),
        live_certificates: u32::try_from(agent.live.len()).unwrap_or(u32::MAX),
    }
}

pub(super) fn shown(agent: &AgentView, domain: &TrustDomain) -> proto::ShowAgentResponse {
    let quarantine = agent.quarantine.as_ref();
    proto::ShowAgentResponse {
        agent: Some(summary(agent, domain)),
        limits: Some(agent.limits),
        live: agent.live.iter().map(live).collect(),
        quarantined_index: quarantine.and_then(|found| found.index).unwrap_or(0),
        quarantine_detail: quarantine.map(|found| found.detail.clone()).unwrap_or_default(),
        quarantine_cause: quarantine.map_or(proto::QuarantineCause::Unspecified, |found| found.cause).into(),
        token_expires_unix_seconds: agent.token_expires.map_or(0, crate::model::UnixTime::seconds),
    }
}

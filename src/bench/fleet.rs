//! Agents by the hundred: keys and requests made beforehand, so that the measured time is the daemon's.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::{Duration, Instant};

use prost::Message as _;
use tokio::task::JoinSet;
use tonic::transport::Channel;

use super::Failed;
use super::load::Renewer;
use crate::client::agent::Connection;
use crate::client::request::Key;
use crate::client::{JoinFile, tls};
use crate::model::{Digest, SecretBytes, TrustDomain, hex, join_sign};
use crate::proto::ask::Claim;
use crate::proto::key_service_client::KeyServiceClient;
use crate::proto::operator_service_client::OperatorServiceClient;
use crate::proto::{Ask, BoundKeyClaim, Credential, EnrolRequest, JoinClaim};

/// Operators' connections that enrol at once, and calls under way on each.
const OPERATORS: usize = 4;
const ENROLMENTS_EACH: usize = 32;

/// What an agent does once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    /// A connection without a certificate, Attest, the end of the connection.
    Attest,
    /// The standing connection, with the newest certificate.
    Connect,
    /// Renew on the standing connection.
    RenewStanding,
    /// A connection with the newest certificate, Renew, the end of the connection.
    RenewOwn,
    /// Lets go of the standing connection.
    Disconnect,
}

/// Where the daemon is and what is trusted.
pub(super) struct Place {
    addresses: Vec<String>,
    authorities: Vec<Vec<u8>>,
    domain: TrustDomain,
}

/// A key whose CSR is made.
struct Ready {
    key: Key,
    csr: Vec<u8>,
}

impl Ready {
    fn new() -> Result<Self, Failed> {
        let key = Key::generate()?;
        let mut parameters = rcgen::CertificateParams::default();
        parameters.distinguished_name = rcgen::DistinguishedName::new();
        let csr = parameters.serialize_request(&key)?.der().to_vec();
        Ok(Self { key, csr })
    }

    fn ask(&self, claim: Claim) -> Vec<u8> {
        let idempotency_key = hex(SecretBytes::random::<16>().reveal());
        Ask { csr: self.csr.clone(), idempotency_key, ttl_seconds: 0, claim: Some(claim) }.encode_to_vec()
    }
}

/// One agent.
struct Member {
    join: JoinFile,
    keys: VecDeque<Ready>,
    holds: Option<(Vec<Vec<u8>>, Key)>,
    sequence: u64,
    standing: Option<Connection>,
}

impl Member {
    async fn perform(&mut self, step: Step, place: &Place) -> Result<(), Failed> {
        match step {
            Step::Attest => {
                let mut connection = Connection::open(&place.addresses, &place.authorities, &place.domain, None).await?;
                let ready = self.next_key()?;
                let ask = ready.ask(Claim::Join(JoinClaim { token_id: self.join.token_id.0.to_vec() }));
                let seed = &self.join.token_seed;
                let sign = |binder: &Digest| Ok(join_sign(seed, binder).to_vec());
                let credential = connection.attest(&ask, &ready.key.public().digest(), sign).await?;
                self.take(ready, credential);
            }
            Step::Connect => self.standing = Some(self.connect(place).await?),
            Step::RenewStanding => {
                let mut connection = self.standing.take().ok_or("there is no standing connection")?;
                self.renew(&mut connection).await?;
                self.standing = Some(connection);
            }
            Step::RenewOwn => {
                let mut connection = self.connect(place).await?;
                self.renew(&mut connection).await?;
            }
            Step::Disconnect => self.standing = None,
        }
        Ok(())
    }

    async fn connect(&self, place: &Place) -> Result<Connection, Failed> {
        let (chain, key) = self.holds.as_ref().ok_or("the agent holds no certificate")?;
        Ok(Connection::open(&place.addresses, &place.authorities, &place.domain, Some((chain, key))).await?)
    }

    /// Without a proof: the connection is the proof.
    async fn renew(&mut self, connection: &mut Connection) -> Result<(), Failed> {
        let ready = self.next_key()?;
        let ask = ready.ask(Claim::BoundKey(BoundKeyClaim { agent: self.join.agent.to_string(), sequence: self.sequence }));
        let credential = connection.renew(ask, Vec::new()).await?;
        self.take(ready, credential);
        Ok(())
    }

    fn next_key(&mut self) -> Result<Ready, Failed> {
        self.keys.pop_front().ok_or_else(|| "an agent has no key left".into())
    }

    fn take(&mut self, ready: Ready, credential: Credential) {
        self.sequence = credential.next_sequence;
        self.holds = Some((credential.chain, ready.key));
    }
}

/// All agents of one daemon.
pub(super) struct Fleet {
    members: Vec<Member>,
    place: Arc<Place>,
}

impl Fleet {
    /// Enrols `count` agents and makes `keys_each` keys and CSRs for each.
    pub(super) async fn enrol(operator: &OperatorServiceClient<Channel>, count: usize, keys_each: usize) -> Result<Self, Failed> {
        let joins = enrol(std::slice::from_ref(operator), "bench", count).await?;
        let first = joins.first().ok_or("no agent was enrolled")?;
        let place = Place {
            addresses: first.addresses.clone(),
            authorities: first.bundle.authorities.clone(),
            domain: first.trust_domain.clone(),
        };
        let mut members = Vec::with_capacity(count);
        for join in joins {
            let keys = (0..keys_each).map(|_| Ready::new()).collect::<Result<_, _>>()?;
            members.push(Member { join, keys, holds: None, sequence: 0, standing: None });
        }
        Ok(Self { members, place: Arc::new(place) })
    }

    /// Every agent takes `step`, `outstanding` at once. Gives how long each took.
    pub(super) async fn all(&mut self, step: Step, outstanding: usize) -> Result<Vec<Duration>, Failed> {
        let share = self.members.len().div_ceil(outstanding.max(1)).max(1);
        let mut tasks = JoinSet::new();
        while !self.members.is_empty() {
            let mut members = self.members.split_off(self.members.len().saturating_sub(share));
            let place = Arc::clone(&self.place);
            tasks.spawn(async move {
                let mut took = Vec::with_capacity(members.len());
                for member in &mut members {
                    let from = Instant::now();
                    member.perform(step, &place).await?;
                    took.push(from.elapsed());
                }
                Ok::<_, Failed>((members, took))
            });
        }
        let mut all = Vec::new();
        while let Some(done) = tasks.join_next().await {
            let (members, took) = done??;
            self.members.extend(members);
            all.extend(took);
        }
        Ok(all)
    }

    /// Each agent's KeyService, on a connection of its own.
    pub(super) async fn into_signers(self) -> Result<Vec<KeyServiceClient<Channel>>, Failed> {
        let place = self.place;
        let mut signers = Vec::with_capacity(self.members.len());
        for member in self.members {
            let (chain, key) = member.holds.as_ref().ok_or("the agent holds no certificate")?;
            let config = tls::config(&place.authorities, &place.domain, Some((chain, key)))?;
            signers.push(KeyServiceClient::new(tls::connect(&place.addresses, config).await?.0));
        }
        Ok(signers)
    }

    /// The agents with their standing connections, and a request for each key that is left: each claims the sequence after the one
    /// before.
    pub(super) fn into_renewers(self) -> Result<Vec<Renewer>, Failed> {
        let renewer = |member: Member| {
            let agent = member.join.agent.to_string();
            let claim = |sequence| Claim::BoundKey(BoundKeyClaim { agent: agent.clone(), sequence });
            let asks = member.keys.iter().zip(member.sequence..).map(|(ready, sequence)| ready.ask(claim(sequence))).collect();
            let connection = member.standing.ok_or("there is no standing connection")?;
            Ok(Renewer::new(connection, asks, member.sequence))
        };
        self.members.into_iter().map(renewer).collect()
    }
}

/// Enrols `count` agents of a class over the given connections, many at once.
async fn enrol(operators: &[OperatorServiceClient<Channel>], class: &str, count: usize) -> Result<Vec<JoinFile>, Failed> {
    let lines = operators.len() * ENROLMENTS_EACH;
    let mut tasks = JoinSet::new();
    for line in 0..lines {
        let (mut operator, class) = (operators[line % operators.len()].clone(), class.to_owned());
        tasks.spawn(async move {
            let mut joins = Vec::new();
            for number in (line..count).step_by(lines) {
                let ask = EnrolRequest { agent: format!("{class}/{number}"), ..EnrolRequest::default() };
                let answer = operator.enrol(ask).await?.into_inner();
                joins.push(JoinFile::from_proto(answer.join.ok_or("an enrolment without a join file")?)?);
            }
            Ok::<_, Failed>(joins)
        });
    }
    let mut all = Vec::with_capacity(count);
    while let Some(done) = tasks.join_next().await {
        all.extend(done??);
    }
    Ok(all)
}

/// Enrols `count` agents whose join files nobody keeps.
pub(super) async fn enrol_many(socket: &std::path::Path, count: usize) -> Result<(), Failed> {
    let mut operators = Vec::with_capacity(OPERATORS);
    for _ in 0..OPERATORS {
        operators.push(crate::client::operator::connect(socket).await?);
    }
    // In parts: a hundred thousand join files at once would be of no use and in the way.
    let part = 10_000;
    for from in (0..count).step_by(part) {
        enrol(&operators, &format!("crowd-{from}"), part.min(count - from)).await?;
    }
    Ok(())
}

//! An agent's client: first contact, renewal, rejoin.

use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::timeout;
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;

use super::request::{self, Key};
use super::store::{AgentDir, Card, Holding, Pending, StoreError, key_of};
use super::{BundleWatch, Error, JoinFile, Place, tls};
use crate::model::{AgentId, Digest, TrustDomain, UnixTime, attest_binder, join_sign, renew_binder};
use crate::proto::agent_service_client::AgentServiceClient;
use crate::proto::ask::Claim;
use crate::proto::attest_response::Step;
use crate::proto::{AttestRequest, BoundKeyClaim, Bundle, Credential, JoinClaim, RenewRequest, WatchBundleRequest};

/// The whole of an attestation, challenge and signature included; or of a renewal, whose answer could else trickle in for ever.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(15);
/// A credential is a few kilobytes.
const ANSWER_BYTES_MAX: usize = 256 * 1024;

/// An open connection to the daemon's agent face.
pub struct Connection {
    service: AgentServiceClient<Channel>,
    place: Place,
    trust_domain: TrustDomain,
}

impl Connection {
    /// Connects to the first of `addresses` that answers as the keyward of `domain`; with a client certificate where
    /// `identity` is given.
    ///
    /// # Errors
    /// `Unreachable`, `Untrusted`, or `Crypto` where authorities or identity are not usable.
    pub async fn open(
        addresses: &[String],
        authorities: &[Vec<u8>],
        trust_domain: &TrustDomain,
        identity: Option<(&[Vec<u8>], &Key)>,
    ) -> Result<Self, Error> {
        let config = tls::config(authorities, trust_domain, identity)?;
        let (channel, place) = tls::connect(addresses, config).await?;
        let service = AgentServiceClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX);
        Ok(Self { service, place, trust_domain: trust_domain.clone() })
    }

    /// `Attest`: waits for the challenge, answers it with `ask` and what `prove` signs over the binder, waits for the
    /// credential. `spki` is the digest of the key in the CSR.
    ///
    /// # Errors
    /// A refusal, a broken connection, 15 s passed, or an answer against the protocol.
    pub async fn attest(
        &mut self,
        ask: &[u8],
        spki: &Digest,
        prove: impl FnOnce(&Digest) -> Result<Vec<u8>, Error>,
    ) -> Result<Credential, Error> {
        let answer = timeout(ANSWER_TIMEOUT, self.attest_untimed(ask, spki, prove)).await;
        answer.map_err(|_| self.late())?
    }

    async fn attest_untimed(
        &mut self,
        ask: &[u8],
        spki: &Digest,
        prove: impl FnOnce(&Digest) -> Result<Vec<u8>, Error>,
    ) -> Result<Credential, Error> {
        let place = self.place.clone();
        let failed = |status: tonic::Status| place.failed(&status);
        let against = |what: &str| Error::Answer(what.into());
        let (answers, requests) = mpsc::channel(1);
        let mut steps = self.service.attest(ReceiverStream::new(requests)).await.map_err(failed)?.into_inner();

        let first = steps.message().await.map_err(failed)?.and_then(|response| response.step);
        let Some(Step::Challenge(challenge)) = first else { return Err(against("no challenge came first")) };
        let nonce = challenge.nonce.as_slice().try_into().map_err(|_| against("the nonce has not 32 bytes"))?;
        let proof = prove(&attest_binder(nonce, spki, &Digest::of(ask), &self.trust_domain))?;
        // A closed channel means the stream ended; the next message says why.
        let _ = answers.send(AttestRequest { ask: ask.to_vec(), proof }).await;

        let second = steps.message().await.map_err(failed)?.and_then(|response| response.step);
        let Some(Step::Credential(credential)) = second else { return Err(against("no credential followed the challenge")) };
        Ok(credential)
    }

    /// `Renew` with `ask` and `proof` (empty where this connection itself proves the bound key).
    ///
    /// # Errors
    /// A refusal, a broken connection, 15 s passed, or an answer without a credential.
    pub async fn renew(&mut self, ask: Vec<u8>, proof: Vec<u8>) -> Result<Credential, Error> {
        let answer = timeout(ANSWER_TIMEOUT, self.service.renew(RenewRequest { ask, proof })).await.map_err(|_| self.late())?;
        let answer = answer.map_err(|status| self.place.failed(&status))?.into_inner();
        answer.credential.ok_or_else(|| Error::Answer("no credential".into()))
    }

    /// `WatchBundle`, for bundles after `sequence`.
    ///
    /// # Errors
    /// A refusal or a broken connection.
    pub async fn watch_bundle(mut self, sequence: u64) -> Result<BundleWatch, Error> {
        let answers = self.service.watch_bundle(WatchBundleRequest {}).await;
        let answers = answers.map_err(|status| self.place.failed(&status))?.into_inner();
        Ok(BundleWatch::new(answers, self.place, sequence))
    }

    fn late(&self) -> Error {
        Error::Unreachable { place: self.place.address().to_owned(), cause: "no answer within 15 s".into() }
    }
}

/// The client of one agent, at work in its directory.
pub struct Client {
    dir: AgentDir,
}

impl Client {
    /// Works in `dir`.
    #[must_use]
    pub fn new(dir: AgentDir) -> Self {
        Self { dir }
    }

    /// The directory.
    #[must_use]
    pub fn dir(&self) -> &AgentDir {
        &self.dir
    }

    /// First contact, or the first after a release: a join file becomes a credential. `ttl_seconds` 0 asks for what the
    /// enrolment grants. Repeats an outstanding request of the same token as it is.
    ///
    /// # Errors
    /// As [`Error`] tells; the outstanding request stays durable unless it was refused for what is in it.
    pub async fn attest(&self, join: &JoinFile, ttl_seconds: u32) -> Result<Card, Error> {
        let claim = Claim::Join(JoinClaim { token_id: join.token_id.0.to_vec() });
        let pending = self.join_request(join, ttl_seconds, claim)?;
        let mut connection = Connection::open(&join.addresses, &join.bundle.authorities, &join.trust_domain, None).await?;
        let spki = pending.key.public().digest();
        let sign = |binder: &Digest| Ok(join_sign(&join.token_seed, binder).to_vec());
        let answer = connection.attest(&pending.ask, &spki, sign).await;
        let origin = Origin {
            agent: &join.agent,
            trust_domain: &join.trust_domain,
            addresses: &join.addresses,
            token_id: join.token_id.to_string(),
            bundle: &join.bundle,
        };
        self.settle(&pending, answer, &origin)
    }

    /// The next certificate, over mTLS with the one in force. `ttl_seconds` counts for a new request only.
    ///
    /// # Errors
    /// As [`Client::attest`].
    pub async fn renew(&self, ttl_seconds: u32) -> Result<Card, Error> {
        let (holding, domain, agent) = self.holder()?;
        let pending = self.bound_request(&holding, ttl_seconds)?;
        let identity = Some((holding.chain.as_slice(), &holding.key));
        let mut connection = Connection::open(&holding.card.addresses, &holding.authorities, &domain, identity).await?;
        let binder = renew_binder(holding.card.next_sequence, &pending.key.public().digest(), &Digest::of(&pending.ask), &domain);
        let answer = connection.renew(pending.ask.clone(), holding.key.sign(&binder)?).await;
        self.settle(&pending, answer, &Origin::of(&holding, &agent, &domain, &bundle_of(&holding)))
    }

    /// Comes back after the certificate expired: Attest with the bound key, without a client certificate.
    ///
    /// # Errors
    /// As [`Client::attest`].
    pub async fn rejoin(&self, ttl_seconds: u32) -> Result<Card, Error> {
        let (holding, domain, agent) = self.holder()?;
        let pending = self.bound_request(&holding, ttl_seconds)?;
        let mut connection = Connection::open(&holding.card.addresses, &holding.authorities, &domain, None).await?;
        let spki = pending.key.public().digest();
        let answer = connection.attest(&pending.ask, &spki, |binder| holding.key.sign(binder)).await;
        self.settle(&pending, answer, &Origin::of(&holding, &agent, &domain, &bundle_of(&holding)))
    }

    /// Follows the bundle over mTLS with the certificate of `holding`, for as long as that lasts. The directory is free meanwhile:
    /// what comes is put there by [`AgentDir::keep_bundle`].
    ///
    /// # Errors
    /// As [`Error`] tells.
    pub async fn watch_bundle(holding: &Holding) -> Result<BundleWatch, Error> {
        let domain = TrustDomain::parse(&holding.card.trust_domain).map_err(|error| Error::Crypto(error.to_string()))?;
        let identity = Some((holding.chain.as_slice(), &holding.key));
        let connection = Connection::open(&holding.card.addresses, &holding.authorities, &domain, identity).await?;
        connection.watch_bundle(holding.card.bundle_sequence).await
    }

    fn holder(&self) -> Result<(Holding, TrustDomain, AgentId), Error> {
        let holding = self.dir.holding()?;
        let broken = |error: crate::model::InvalidName| StoreError::Broken {
            path: self.dir.path().join("agent.json"),
            what: error.to_string(),
        };
        let domain = TrustDomain::parse(&holding.card.trust_domain).map_err(broken)?;
        let agent = AgentId::parse(&holding.card.agent).map_err(broken)?;
        Ok((holding, domain, agent))
    }

    fn join_request(&self, join: &JoinFile, ttl_seconds: u32, claim: Claim) -> Result<Pending, Error> {
        let path = || self.dir.path().to_path_buf();
        let holding = self.dir.holding_if_any()?;
        if let Some(holding) = &holding {
            if holding.card.agent != join.agent.as_str() || holding.card.trust_domain != join.trust_domain.as_str() {
                return Err(StoreError::Foreign { path: path(), owner: holding.card.spiffe_id.clone() }.into());
            }
            self.dir.settle(holding)?;
        }
        // The token may be spent for this very key: any other would be refused.
        if let Some(pending) = self.dir.pending()?.filter(|pending| pending.claim == claim) {
            return Ok(pending);
        }
        if holding.is_some_and(|holding| holding.card.token_id == join.token_id.to_string()) {
            let what = "this join file was used already; run `keyward agent renew`";
            return Err(StoreError::Joined { path: path(), what }.into());
        }
        if join.expires <= UnixTime::wall() {
            return Err(Error::JoinExpired(join.expires));
        }
        // A renewal under way is given up here: the operator hands out a new token only with a new epoch, which voids it.
        self.new_request(ttl_seconds, claim)
    }

    fn bound_request(&self, holding: &Holding, ttl_seconds: u32) -> Result<Pending, Error> {
        self.dir.settle(holding)?;
        let claim = Claim::BoundKey(BoundKeyClaim { agent: holding.card.agent.clone(), sequence: holding.card.next_sequence });
        match self.dir.pending()? {
            // Never another key under a sequence that may have been sent: that is what a clone would do.
            Some(pending) if pending.claim == claim => Ok(pending),
            Some(Pending { claim: Claim::Join(_), .. }) => {
                let what = "an attestation is under way; repeat `keyward agent attest --join FILE` with its join file";
                Err(StoreError::Joined { path: self.dir.path().to_path_buf(), what }.into())
            }
            // Of an earlier sequence: answered, or it could not have been promoted over.
            _ => self.new_request(ttl_seconds, claim),
        }
    }

    fn new_request(&self, ttl_seconds: u32, claim: Claim) -> Result<Pending, Error> {
        let key = Key::generate()?;
        let ask = request::ask(&key, ttl_seconds, claim.clone())?;
        Ok(self.dir.intend(key, ask, claim)?)
    }

    /// Puts an answer in force; forgets a request that was refused for what is in it, keeps it in all other cases.
    fn settle(&self, pending: &Pending, answer: Result<Credential, Error>, origin: &Origin<'_>) -> Result<Card, Error> {
        match answer {
            Ok(mut credential) => {
                let card = origin.check(pending, &mut credential)?;
                self.dir.promote(pending, &card, &credential)?;
                Ok(card)
            }
            Err(error) => {
                if error.refused().is_some_and(super::Refused::is_of_the_request) {
                    self.dir.abandon()?;
                }
                Err(error)
            }
        }
    }
}

/// What an answer must agree with.
struct Origin<'a> {
    agent: &'a AgentId,
    trust_domain: &'a TrustDomain,
    addresses: &'a [String],
    token_id: String,
    bundle: &'a Bundle,
}

impl<'a> Origin<'a> {
    fn of(holding: &'a Holding, agent: &'a AgentId, trust_domain: &'a TrustDomain, bundle: &'a Bundle) -> Self {
        let token_id = holding.card.token_id.clone();
        Self { agent, trust_domain, addresses: &holding.card.addresses, token_id, bundle }
    }

    /// The certificate must be of our key and name us; a bundle older than the one trusted already is not taken.
    fn check(&self, pending: &Pending, credential: &mut Credential) -> Result<Card, Error> {
        let against = |what: &str| Error::Answer(what.into());
        let leaf = credential.chain.first().ok_or_else(|| against("the chain is empty"))?;
        if key_of(leaf).as_ref() != Some(pending.key.public()) {
            return Err(against("the certificate is of another key"));
        }
        let spiffe_id = self.agent.spiffe_id(self.trust_domain).to_string();
        if tls::uri_names(leaf).as_deref() != Some(std::slice::from_ref(&spiffe_id)) {
            return Err(against("the certificate names another identity"));
        }
        let (not_before, not_after) = validity_of(leaf).ok_or_else(|| against("the certificate does not parse"))?;
        let usable = |bundle: &Bundle| bundle.sequence >= self.bundle.sequence && tls::anchors(&bundle.authorities).is_ok();
        let newer = credential.bundle.take().filter(usable);
        let bundle = newer.unwrap_or_else(|| self.bundle.clone());
        let bundle_sequence = bundle.sequence;
        credential.bundle = Some(bundle);
        Ok(Card {
            version: 1,
            agent: self.agent.to_string(),
            spiffe_id,
            trust_domain: self.trust_domain.to_string(),
            epoch: credential.epoch,
            next_sequence: credential.next_sequence,
            ledger_index: credential.ledger_index,
            not_before_unix_seconds: not_before,
            not_after_unix_seconds: not_after,
            bundle_sequence,
            addresses: self.addresses.to_vec(),
            token_id: self.token_id.clone(),
        })
    }
}

fn bundle_of(holding: &Holding) -> Bundle {
    Bundle { authorities: holding.authorities.clone(), sequence: holding.card.bundle_sequence, ..Bundle::default() }
}

fn validity_of(certificate: &[u8]) -> Option<(u64, u64)> {
    let (_, parsed) = x509_parser::parse_x509_certificate(certificate).ok()?;
    let validity = parsed.validity();
    Some((u64::try_from(validity.not_before.timestamp()).ok()?, u64::try_from(validity.not_after.timestamp()).ok()?))
}

#[cfg(test)]
#[path = "agent_tests.rs"]
pub(crate) mod tests;

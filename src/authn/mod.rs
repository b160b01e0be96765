//! Who is calling.
//!
//! Owns: [`Connection`] (what a TLS handshake proved), [`Operator`] (what the kernel says of a local peer), and the TLS settings
//! that make the first believable. Promises: an agent is recognised by path, extension and epoch of a certificate under our own
//! issuing authority that the ledger tells of, and is asked about anew at every call, as that authority is; keyward's own server
//! certificate is no agent. Never: decides what a caller may get.

mod operator;
mod tls;

use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};

use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::{GeneralName, ParsedExtension};
use x509_parser::prelude::FromDer;

pub use operator::{Operator, OperatorRefused};
pub use tls::{Tls, TlsError};

use crate::ledger::Ledger;
use crate::model::{
    AGENT_EXTENSION_OID_DER, AgentExtension, AgentId, Digest, KeyTag, Reason, Refusal, Serial, SpiffeId, TrustDomain, UnixTime,
};

/// One TCP connection after its handshake.
#[derive(Debug)]
pub struct Connection {
    source: IpAddr,
    agent: Option<AgentConnection>,
}

/// What the client's certificate says, checked. Whether it still counts is asked at every call.
#[derive(Debug)]
pub struct AgentConnection {
    agent: AgentId,
    epoch: u32,
    serial: Serial,
    key: KeyTag,
    not_after: UnixTime,
    /// The name of the authority that signed it, DER; and those that are trusted.
    issuer: Vec<u8>,
    anchors: Arc<tls::Anchors>,
    /// The newest key this connection has proved: the handshake's, then that of every renewal made over it.
    proved: Mutex<Digest>,
}

impl Connection {
    /// From the certificate that `tls` has verified to be an issuing authority's; none: a stranger.
    ///
    /// # Errors
    /// `UNAUTHENTICATED` when the certificate is not an agent's of this trust domain.
    pub fn identify(leaf: Option<&[u8]>, source: IpAddr, domain: &TrustDomain, tls: &Tls) -> Result<Self, Refusal> {
        let agent =
            match leaf {
                Some(der) => Some(agent_of(der, domain, tls.anchors()).ok_or_else(|| {
                    Refusal::new(Reason::Unauthenticated, "present an agent's certificate of this trust domain")
                })?),
                None => None,
            };
        Ok(Self { source, agent })
    }

    /// Where it comes from.
    #[must_use]
    pub fn source(&self) -> IpAddr {
        self.source
    }

    /// When its certificate ends, and the connection with it.
    #[must_use]
    pub fn not_after(&self) -> Option<UnixTime> {
        self.agent.as_ref().map(|agent| agent.not_after)
    }

    /// Whether a client certificate was presented.
    #[must_use]
    pub fn is_stranger(&self) -> bool {
        self.agent.is_none()
    }

    /// The agent that calls, if it may call now.
    ///
    /// # Errors
    /// `UNAUTHENTICATED` for a stranger, an expired certificate, one of an authority that is not trusted any more, or one that the ledger
    /// does not know; else as the ledger says: `AGENT_QUARANTINED`, `EPOCH_STALE`.
    pub fn agent(&self, ledger: &Ledger) -> Result<&AgentConnection, Refusal> {
        let agent = self.certified(ledger)?;
        ledger.admits_with(&agent.agent, agent.epoch, &agent.serial, &agent.key)?;
        Ok(agent)
    }

    /// The agent that asks for its next certificate. Whether it is the one that the last was given to is what its proof says, and the
    /// ledger: a certificate that is not in a restored ledger is to hear so.
    ///
    /// # Errors
    /// As [`Self::agent`], but for what the ledger does not know.
    pub fn claimant(&self, ledger: &Ledger) -> Result<&AgentConnection, Refusal> {
        let agent = self.certified(ledger)?;
        ledger.admits(&agent.agent, agent.epoch)?;
        Ok(agent)
    }

    fn certified(&self, ledger: &Ledger) -> Result<&AgentConnection, Refusal> {
        let unauthenticated = |advice| Refusal::new(Reason::Unauthenticated, advice);
        let agent = self.agent.as_ref().ok_or_else(|| unauthenticated("present a client certificate"))?;
        if agent.not_after <= ledger.clock().reckoned() {
            return Err(unauthenticated("the client certificate has expired; attest with the bound key or a join token"));
        }
        if !agent.anchors.have(&agent.issuer) {
            return Err(unauthenticated("the client certificate's authority is not trusted any more; attest with the bound key"));
        }
        Ok(agent)
    }

    /// The name of the authority that signed the client's certificate, DER; none: a stranger.
    #[must_use]
    pub fn issuer(&self) -> Option<&[u8]> {
        self.agent.as_ref().map(|agent| agent.issuer.as_slice())
    }

    /// The agent named by the certificate, whether it may call or not: for the ledger's refusals.
    #[must_use]
    pub fn named(&self) -> Option<&AgentId> {
        self.agent.as_ref().map(|agent| &agent.agent)
    }
}

impl AgentConnection {
    /// Who.
    #[must_use]
    pub fn agent(&self) -> &AgentId {
        &self.agent
    }

    /// The epoch of its certificate.
    #[must_use]
    pub fn epoch(&self) -> u32 {
        self.epoch
    }

    /// SHA-256 of the SubjectPublicKeyInfo this connection has proved last.
    #[must_use]
    pub fn proved(&self) -> Digest {
        *self.proved.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A certificate for `key` was handed out over this connection in exchange for proof of the key before it: whoever is at the
    /// other end is who holds the newest key.
    pub fn now_proves(&self, key: Digest) {
        *self.proved.lock().unwrap_or_else(PoisonError::into_inner) = key;
    }
}

/// One URI SAN, an agent of ours, the extension (SPIFFE X509-SVID §5.2; the path up to the authority was verified before).
fn agent_of(der: &[u8], domain: &TrustDomain, anchors: Arc<tls::Anchors>) -> Option<AgentConnection> {
    let (rest, certificate) = X509Certificate::from_der(der).ok()?;
    if !rest.is_empty() || certificate.is_ca() {
        return None;
    }
    let names = &certificate.subject_alternative_name().ok()??.value.general_names;
    let [GeneralName::URI(uri)] = names.as_slice() else { return None };
    let agent = SpiffeId::parse(uri).ok()?.agent(domain)?;
    let mut extensions = certificate.extensions().iter().filter(|found| found.oid.as_bytes() == AGENT_EXTENSION_OID_DER);
    let extension = extensions.next()?;
    if extensions.next().is_some() || !matches!(extension.parsed_extension(), ParsedExtension::UnsupportedExtension { .. }) {
        return None;
    }
    let extension = AgentExtension::from_der(extension.value)?;
    let key = Digest::of(certificate.public_key().raw);
    Some(AgentConnection {
        agent,
        epoch: extension.epoch,
        serial: Serial::from_slice(certificate.raw_serial())?,
        key: key.tag(),
        not_after: UnixTime::from_seconds(u64::try_from(certificate.validity().not_after.timestamp()).ok()?),
        issuer: certificate.issuer().as_raw().to_vec(),
        anchors,
        proved: Mutex::new(key),
    })
}

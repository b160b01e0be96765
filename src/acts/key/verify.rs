//! Whether a message was signed by an agent's key that is good now.

use std::sync::Arc;

use crate::authn::Connection;
use crate::formats::http_signature::Component;
use crate::formats::verify::{dpop, http_signature, jws};
use crate::formats::{VerifyingKey, Window};
use crate::model::{AgentId, Digest, Reason, Refusal, UnixTime};
use crate::proto::KeyState;

use super::{Acts, profile_of};

/// How far a signer's clock may be off, in seconds.
const SKEW_SECONDS: u64 = 60;
/// How long a message counts where the verifier does not say, in seconds.
const LIFETIME_SECONDS_DEFAULT: u32 = 300;
/// The longest.
const LIFETIME_SECONDS_MAX: u32 = 3600;

/// A message as it was received.
#[derive(Debug, Clone)]
pub enum Message {
    /// A JWS; with an audience its payload has to be claims.
    Jws {
        /// Compact.
        token: String,
        /// What did not travel.
        detached: Option<Vec<u8>>,
        /// Whom the claims have to be for.
        audience: Option<String>,
        /// 0: 300.
        lifetime_seconds_max: u32,
    },
    /// An HTTP message.
    Http {
        /// Its field Signature-Input.
        signature_input: String,
        /// Its field Signature.
        signature: String,
        /// Which of its signatures.
        label: Option<String>,
        /// Its components and their values.
        components: Vec<(String, String)>,
        /// Identifiers that have to be covered.
        required: Vec<String>,
        /// That has to be there.
        tag: Option<String>,
        /// That was given out.
        nonce: Option<String>,
        /// 0: 300.
        lifetime_seconds_max: u32,
    },
    /// A DPoP proof, and the request it came with.
    Dpop {
        /// The field DPoP.
        proof: String,
        /// HTTP method.
        method: String,
        /// Target URI.
        uri: String,
        /// SHA-256 of the access token.
        token_digest: Option<Digest>,
        /// That was given out.
        nonce: Option<String>,
    },
}

/// Who signed, and what there was to read.
#[derive(Debug, Clone)]
pub struct Signer {
    /// The agent.
    pub agent: AgentId,
    /// Its name for the key.
    pub key: String,
    /// The key's own.
    pub kid: String,
    /// Of a JWS.
    pub payload: Vec<u8>,
    /// Of an HTTP message: the identifiers of what is covered.
    pub covered: Vec<String>,
    /// Of a DPoP proof.
    pub jti: String,
}

/// A message taken apart as far as its key can be found.
enum Received {
    Jws(jws::Received),
    Http(http_signature::Received),
    Dpop(dpop::Received),
}

impl Acts {
    /// Verifies a message for the calling agent. With `agent` it has to be that one's.
    ///
    /// # Errors
    /// `KID_UNKNOWN` (also of a key that is gone, has expired, whose agent is denied or not the one expected), `SIGNATURE_INVALID`,
    /// `ALGORITHM_REFUSED`, `PROFILE_MISMATCH`, `AUDIENCE_MISMATCH`, `BINDING_MISMATCH`, `MESSAGE_EXPIRED`, `OUTSIDE_TIME_WINDOW`, `REPLAYED`,
    /// `MALFORMED_REQUEST`, `REQUEST_TOO_LARGE`, `OVERLOADED`, `RATE_LIMITED`; as the caller's standing.
    pub async fn verify(&self, source: &Arc<Connection>, agent: Option<AgentId>, message: Message) -> Result<Signer, Refusal> {
        let caller = self.may_look("Verify", source, "", 1).await?;
        let now = self.trusted_now()?;
        let received = match &message {
            Message::Jws { token, detached, .. } => Received::Jws(jws::Received::parse(token, detached.as_deref())?),
            Message::Http { signature_input, signature, label, .. } => {
                Received::Http(http_signature::Received::parse(signature_input, signature, label.as_deref())?)
            }
            Message::Dpop { proof, .. } => Received::Dpop(dpop::Received::parse(proof)?),
        };
        let kid = match &received {
            Received::Jws(received) => received.kid(),
            Received::Http(received) => received.kid(),
            Received::Dpop(received) => received.kid(),
        };
        let (key, epoch, mut signer) = self.verifying_key(kid, agent.as_ref(), now).await?;
        self.check(received, &key, &message, (caller.agent(), now), &mut signer)?;
        // The denial may have come meanwhile; and its release, in an epoch that this key is not of.
        self.ledger.admits(&signer.agent, epoch).map_err(|_| unknown_kid())?;
        Ok(signer)
    }

    /// The key of this name with the epoch that it is of, if it verifies now.
    async fn verifying_key(
        &self,
        kid: &str,
        agent: Option<&AgentId>,
        now: UnixTime,
    ) -> Result<(VerifyingKey, u32, Signer), Refusal> {
        let wanted = kid.to_owned();
        let found = self.read(move |reader| reader.agent_key_by_kid(&wanted)).await;
        let found = found.map_err(|refusal| self.as_nobodys(refusal))?.ok_or_else(unknown_kid)?;
        self.ledger.admits(&found.of.agent, found.of.epoch).map_err(|_| unknown_kid())?;
        let version = found.versions.iter().find(|version| &*version.kid == kid && version.expires > now);
        let version = version.filter(|_| found.state != KeyState::Destroyed).ok_or_else(unknown_kid)?;
        if agent.is_some_and(|agent| *agent != found.of.agent) {
            return Err(unknown_kid());
        }
        let profile = profile_of(found.terms.purpose).ok_or_else(unknown_kid)?;
        let signer = Signer {
            agent: found.of.agent.clone(),
            key: found.of.name.to_string(),
            kid: kid.to_owned(),
            payload: Vec::new(),
            covered: Vec::new(),
            jti: String::new(),
        };
        Ok((VerifyingKey::new(profile, version.public.clone()), found.of.epoch, signer))
    }

    /// By a key that is not as recorded nothing verifies. Whose it is would be told by its row, so that it is counted as a stranger's.
    fn as_nobodys(&self, refusal: Refusal) -> Refusal {
        if refusal.reason != Reason::KeyNotAsRecorded {
            return refusal;
        }
        self.ledger.refused_stranger(refusal.reason, None);
        unknown_kid().because(refusal)
    }

    fn check(
        &self,
        received: Received,
        key: &VerifyingKey,
        message: &Message,
        (reader, now): (&AgentId, UnixTime),
        signer: &mut Signer,
    ) -> Result<(), Refusal> {
        // Instances of one class are one audience.
        let class = reader.as_str().split('/').next().unwrap_or_default();
        let agent = signer.agent.clone();
        let seen = self.keys.seen.of(class, reader.as_str(), agent.as_str());
        match (received, message) {
            (Received::Jws(received), Message::Jws { audience, lifetime_seconds_max, .. }) => {
                let window = window(*lifetime_seconds_max, now)?;
                let expected = audience.as_deref().map(|audience| jws::Expected { audience, window, once: Some(seen) });
                signer.payload = received.check(key, expected.as_ref())?.payload;
            }
            (Received::Http(received), Message::Http { components, required, tag, nonce, lifetime_seconds_max, .. }) => {
                let components: Vec<_> = components.iter().map(|(identifier, value)| Component { identifier, value }).collect();
                let required: Vec<&str> = required.iter().map(String::as_str).collect();
                let window = window(*lifetime_seconds_max, now)?;
                let expected = http_signature::Expected {
                    components: &components,
                    required: &required,
                    tag: tag.as_deref(),
                    nonce: nonce.as_deref(),
                    window,
                    once: Some(seen),
                };
                signer.covered = received.check(key, &expected)?.covered;
            }
            (Received::Dpop(received), Message::Dpop { method, uri, token_digest, nonce, .. }) => {
                let request = crate::formats::dpop::Request { method, uri, token_digest: *token_digest, nonce: nonce.as_deref() };
                let expected = dpop::Expected { request, window: window(0, now)?, once: seen };
                signer.jti = received.check(key, &expected)?.jti;
            }
            _ => return Err(Refusal::internal("a message of one kind was taken apart as another")),
        }
        Ok(())
    }
}

fn window(lifetime_seconds_max: u32, now: UnixTime) -> Result<Window, Refusal> {
    if lifetime_seconds_max > LIFETIME_SECONDS_MAX {
        return Err(Refusal::new(Reason::MalformedRequest, "take messages that count for at most 3,600 seconds"));
    }
    let most = if lifetime_seconds_max == 0 { LIFETIME_SECONDS_DEFAULT } else { lifetime_seconds_max };
    Ok(Window { now, skew_seconds: SKEW_SECONDS, lifetime_seconds_max: most.into() })
}

fn unknown_kid() -> Refusal {
    Refusal::new(Reason::KidUnknown, "have it signed by a key that is good now, and name it by its kid")
}

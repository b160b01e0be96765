//! A signature by a key that the caller never holds. Told as the story of a certificate is: the wish is durable before the token is asked,
//! and what comes back passes the gate.

use std::sync::Arc;

use crate::authn::{AgentConnection, Connection};
use crate::formats::http_signature::{Component, Parameters};
use crate::formats::jws::Header;
use crate::formats::tls::Role;
use crate::formats::{self, Profile, Signed, SigningInput};
use crate::hsm::SignError;
use crate::ledger::{AgentKey, Intent, KeyVersion, in_time};
use crate::model::{Digest, KeyId, Reason, Refusal, UnixTime};
use crate::proto::KeyAccounting;

use super::{Acts, key_purpose_name, key_refusal, profile_of};

/// Signatures of one call, at most.
const BATCH_MAX: usize = 1000;

/// What is to be signed, in parts: the bytes are put together here, so that a key signs what it is for.
#[derive(Debug, Clone)]
pub enum Content {
    /// A digest that the caller answers for.
    Digest(Vec<u8>),
    /// A JWS.
    Jws {
        /// Its payload.
        payload: Vec<u8>,
        /// Its type.
        typ: Option<String>,
        /// Further header members, JSON.
        header: Vec<u8>,
        /// The payload does not travel.
        detached: bool,
    },
    /// An HTTP message.
    HttpMessage {
        /// Of the signature.
        label: String,
        /// Identifiers and values.
        components: Vec<(String, String)>,
        /// Seconds until `expires`.
        lifetime_seconds: Option<u64>,
        /// What makes it unique.
        nonce: Option<String>,
        /// The application.
        tag: Option<String>,
    },
    /// A proof of possession.
    Dpop {
        /// HTTP method.
        method: String,
        /// Target URI.
        uri: String,
        /// SHA-256 of the access token.
        token_digest: Option<Digest>,
        /// What the server gave.
        nonce: Option<String>,
    },
    /// A TLS handshake.
    Tls {
        /// The server's side.
        server: bool,
        /// Of the handshake so far.
        transcript_hash: Vec<u8>,
    },
}

impl Content {
    fn profile(&self) -> Profile {
        match self {
            Self::Digest(_) => Profile::RawDigest,
            Self::Jws { .. } => Profile::Jws,
            Self::HttpMessage { .. } => Profile::HttpMessageSignature,
            Self::Dpop { .. } => Profile::Dpop,
            Self::Tls { .. } => Profile::Tls,
        }
    }
}

/// What was signed.
#[derive(Debug, Clone)]
pub struct SignaturesMade {
    /// In the order of the contents.
    pub signed: Vec<Signed>,
    /// The key.
    pub kid: Arc<str>,
    /// Of the intent, or of the reservation.
    pub ledger_index: u64,
}

impl Acts {
    /// Signatures over all of `contents`, or none.
    ///
    /// # Errors
    /// `KEY_NOT_FOUND` (also where it is another's), `KEY_DISABLED`, `KEY_DESTROYED`, `KEY_EXPIRED`, `KEY_BUDGET_SPENT`, `KEY_LOST`,
    /// `PROFILE_MISMATCH`, `DIGEST_LENGTH_INVALID`, `MALFORMED_REQUEST`, `REQUEST_TOO_LARGE`, `RATE_LIMITED`; as the agent's standing;
    /// `DENIED_MEANWHILE`; `SIGNATURE_UNKNOWN`, `HSM_UNAVAILABLE`, `OVERLOADED`, `LEDGER_UNAVAILABLE`.
    pub async fn sign(&self, source: &Arc<Connection>, name: &str, contents: Vec<Content>) -> Result<SignaturesMade, Refusal> {
        let signed = async {
            let caller = source.agent(&self.ledger)?;
            self.sign_for(caller, name, contents).await
        };
        let signed = signed.await;
        self.refused_key_call("Sign", source, signed).await
    }

    async fn sign_for(&self, caller: &AgentConnection, name: &str, contents: Vec<Content>) -> Result<SignaturesMade, Refusal> {
        if contents.is_empty() || contents.len() > BATCH_MAX {
            return Err(Refusal::new(Reason::RequestTooLarge, "ask for 1 to 1,000 signatures at a time"));
        }
        let now = self.trusted_now()?;
        self.keys.rates.sign(caller.agent(), contents.len(), self.keys.capacity(), now.seconds())?;
        let loaded = self.load_key(&Self::own_key(caller, name)?).await?;
        // No version changes under a signature. Where one is changing, that may wait for the disk.
        let _signing = match loaded.signing.try_read() {
            Ok(signing) => signing,
            Err(_) => in_time(loaded.signing.read()).await?,
        };
        let key = &loaded.key;
        // Memory: the agent's standing and epoch, the key's state and expiry.
        self.ledger.admits_key(key)?;
        let version = key.newest()?;
        let inputs = contents.iter().map(|content| prepare(key, &version, content, now)).collect::<Result<Vec<_>, _>>()?;
        let signer = self.signer(&loaded, &version)?;
        // Who would wait too long hears so before anything is recorded.
        let _place = signer.admit().map_err(super::hsm_refusal)?;
        let for_token = inputs.iter().map(SigningInput::for_token).collect();
        let (ledger_index, signatures) = if key.terms().accounting == KeyAccounting::Counted {
            let reserved = self.ledger.reserve_signatures(key, &version, inputs.len() as u64).await?;
            let signatures = ask(&signer, for_token).await.map_err(|failed| failed.refusal)?;
            // The gate.
            self.ledger.admits_key(key).map_err(denied_meanwhile)?;
            (reserved.index, signatures)
        } else {
            let recorded: Vec<Vec<u8>> = inputs.iter().map(|input| input.recorded().to_vec()).collect();
            let whole = recorded.concat();
            // Decided in order and durable: the budget is spent. From here on the act runs to its end.
            let mut intent = self.ledger.intend_signatures(key, &version, recorded).await?;
            intent.asking(&whole)?;
            match ask(&signer, for_token).await {
                // The gate: denied meanwhile → withheld. The book has the digests, so the signature need not be there.
                Ok(signatures) => (intent.release(&[])?, signatures),
                Err(failed) => return Err(failed.end(intent)),
            }
        };
        let signed = inputs.into_iter().zip(&signatures).map(|(input, signature)| input.finish(signature));
        Ok(SignaturesMade { signed: signed.collect::<Result<_, _>>()?, kid: version.kid, ledger_index })
    }
}

/// Why there are no signatures, and whether the token may have made one all the same.
struct Failed {
    refusal: Refusal,
    unknown: Option<String>,
}

impl Failed {
    fn of(error: SignError) -> Self {
        match error {
            SignError::NotSigned(error) => Self { refusal: key_refusal(error), unknown: None },
            SignError::Unknown(error) => {
                let unknown = Some(error.to_string());
                let advice = "the token did not answer in time; ask again";
                let refusal = Refusal::new(Reason::SignatureUnknown, advice).because(error).retry_after(Refusal::SOON);
                Self { refusal, unknown }
            }
        }
    }

    fn end(self, intent: Intent) -> Refusal {
        match self.unknown {
            Some(cause) => intent.unknown(cause),
            None => intent.fail(self.refusal.reason),
        }
        self.refusal
    }
}

/// Asks the token once for each. One that is missing is reason enough to hand out none; that any was made makes it unknown.
async fn ask(signer: &crate::hsm::AgentKey, mut digests: Vec<Arc<[u8]>>) -> Result<Vec<Vec<u8>>, Failed> {
    if digests.len() == 1
        && let Some(digest) = digests.pop()
    {
        return signer.sign_digest(digest).await.map(|signature| vec![signature]).map_err(Failed::of);
    }
    let answers = signer.sign_digests(digests).await;
    let made = answers.iter().filter(|answer| answer.is_ok()).count();
    let (mut signatures, mut failed) = (Vec::with_capacity(answers.len()), None);
    for answer in answers {
        match answer {
            Ok(signature) => signatures.push(signature),
            // What may have been signed tells more than what certainly was not.
            Err(error) if failed.is_none() || matches!(error, SignError::Unknown(_)) => failed = Some(Failed::of(error)),
            Err(_) => {}
        }
    }
    match failed {
        None => Ok(signatures),
        Some(mut failed) => {
            if made > 0 && failed.unknown.is_none() {
                failed.unknown = Some(format!("{made} of the batch were signed and thrown away"));
            }
            Err(failed)
        }
    }
}

fn denied_meanwhile(refusal: Refusal) -> Refusal {
    let advice = "the agent or its key was denied while this was being signed; nothing was handed out";
    Refusal::new(Reason::DeniedMeanwhile, advice).because(refusal)
}

/// The exact bytes of one content, if it is what the key is for.
fn prepare(key: &AgentKey, version: &KeyVersion, content: &Content, now: UnixTime) -> Result<SigningInput, Refusal> {
    let (algorithm, kid) = (version.public.algorithm(), &*version.kid);
    // Before what else is wrong with it: whoever mended that would hear this next.
    is_for(key, content.profile())?;
    let input = match content {
        Content::Digest(digest) => formats::raw_digest::prepare(algorithm, digest),
        Content::Jws { payload, typ, header, detached } => {
            let header = Header { typ: typ.as_deref(), extra: header };
            formats::jws::prepare(algorithm, kid, &header, payload, *detached)
        }
        Content::HttpMessage { label, components, lifetime_seconds, nonce, tag } => {
            let components: Vec<_> = components.iter().map(|(identifier, value)| Component { identifier, value }).collect();
            let parameters = Parameters { lifetime_seconds: *lifetime_seconds, nonce: nonce.as_deref(), tag: tag.as_deref() };
            formats::http_signature::prepare(algorithm, kid, label, &components, &parameters, now)
        }
        Content::Dpop { method, uri, token_digest, nonce } => {
            let request = formats::dpop::Request { method, uri, token_digest: *token_digest, nonce: nonce.as_deref() };
            formats::dpop::prepare(&version.public, &request, &KeyId::random().to_string(), now)
        }
        Content::Tls { server, transcript_hash } => {
            let role = if *server { Role::Server } else { Role::Client };
            formats::tls::prepare(algorithm, role, transcript_hash)
        }
    }?;
    // Of the bytes themselves, whatever they were made from.
    is_for(key, input.profile())?;
    Ok(input)
}

fn is_for(key: &AgentKey, profile: Profile) -> Result<(), Refusal> {
    if profile_of(key.terms().purpose) == Some(profile) {
        return Ok(());
    }
    let purpose = key_purpose_name(key.terms().purpose);
    Err(Refusal::new(Reason::ProfileMismatch, format!("this key is for {purpose} and signs nothing else; make another")))
}

//! KeyService, on both faces: an agent has its own keys, an operator ends and lists those of any, and both learn by which to verify.

use std::sync::Arc;

use tonic::{Request, Response, Status};

use crate::acts::{Acts, Content, JwksOf, KeyShown, KeyWish, Message};
use crate::authn::{Connection, Operator};
use crate::formats::Signed;
use crate::ledger::Ends;
use crate::model::{AgentId, Digest, Reason, Refusal};
use crate::proto::key_service_server::KeyService;
use crate::proto::{self, content, signature, verify_request};

use super::gatekeeper::KeyShare;
use super::operator::{act, agent_id, checked_reason, operator};
use super::refusal::status_of;
use super::to_its_end::ToItsEnd;

pub(super) struct Keys {
    acts: Arc<Acts>,
}

/// Who asks.
enum Caller {
    Agent(Call),
    Operator(Operator),
}

/// An agent's call, one of those that it may have under way.
struct Call {
    connection: Arc<Connection>,
    share: KeyShare,
}

impl Keys {
    pub(super) fn new(acts: Arc<Acts>) -> Self {
        Self { acts }
    }
}

fn caller<T>(request: &Request<T>) -> Result<Caller, Status> {
    let Some(connection) = request.extensions().get::<Arc<Connection>>().cloned() else {
        return operator(request).map(Caller::Operator);
    };
    let share = request.extensions().get::<KeyShare>().cloned();
    let share = share.ok_or_else(|| status_of(&Refusal::internal("a call about keys that was not counted")))?;
    Ok(Caller::Agent(Call { connection, share }))
}

/// For what only the owner of a key may do.
fn owner<T>(request: &Request<T>) -> Result<Call, Status> {
    match caller(request)? {
        Caller::Agent(call) => Ok(call),
        Caller::Operator(_) => {
            let advice = "keys are made and used by their agents; an operator lists, disables and destroys them";
            Err(status_of(&Refusal::new(Reason::CallerNotAllowed, advice)))
        }
    }
}

fn refuse(reason: Reason, advice: &str) -> Status {
    status_of(&Refusal::new(reason, advice))
}

fn optional(text: String) -> Option<String> {
    (!text.is_empty()).then_some(text)
}

fn token_digest(bytes: &[u8]) -> Result<Option<Digest>, Status> {
    if bytes.is_empty() {
        return Ok(None);
    }
    let digest = Digest::from_slice(bytes);
    digest.map(Some).ok_or_else(|| refuse(Reason::MalformedRequest, "send the SHA-256 of the access token: 32 bytes"))
}

fn content_of(content: proto::Content) -> Result<Content, Status> {
    let content = content.content.ok_or_else(|| refuse(Reason::MalformedRequest, "say what is to be signed"))?;
    Ok(match content {
        content::Content::Digest(digest) => Content::Digest(digest),
        content::Content::Jws(jws) => {
            Content::Jws { payload: jws.payload, typ: optional(jws.typ), header: jws.header, detached: jws.detached }
        }
        content::Content::HttpMessage(message) => Content::HttpMessage {
            label: optional(message.label).unwrap_or_else(|| "sig1".to_owned()),
            components: message.components.into_iter().map(|one| (one.identifier, one.value)).collect(),
            lifetime_seconds: (message.lifetime_seconds > 0).then_some(message.lifetime_seconds.into()),
            nonce: optional(message.nonce),
            tag: optional(message.tag),
        },
        content::Content::Dpop(proof) => Content::Dpop {
            token_digest: token_digest(&proof.access_token_sha256)?,
            method: proof.method,
            uri: proof.uri,
            nonce: optional(proof.nonce),
        },
        content::Content::Tls(handshake) => Content::Tls { server: handshake.server, transcript_hash: handshake.transcript_hash },
    })
}

fn signature_of(signed: Signed) -> proto::Signature {
    let form = match signed {
        Signed::RawDigest(der) | Signed::Tls(der) => signature::Form::Der(der),
        Signed::Jws(token) => signature::Form::Jws(token),
        Signed::Dpop(proof) => signature::Form::Dpop(proof),
        Signed::HttpMessageSignature { signature_input, signature } => {
            signature::Form::Http(signature::HttpFields { signature_input, signature })
        }
    };
    proto::Signature { form: Some(form) }
}

fn message_of(message: verify_request::Message) -> Result<Message, Status> {
    Ok(match message {
        verify_request::Message::Jws(jws) => Message::Jws {
            token: jws.token,
            detached: jws.detached_payload,
            audience: optional(jws.audience),
            lifetime_seconds_max: jws.lifetime_seconds_max,
        },
        verify_request::Message::Http(http) => Message::Http {
            signature_input: http.signature_input,
            signature: http.signature,
            label: optional(http.label),
            components: http.components.into_iter().map(|one| (one.identifier, one.value)).collect(),
            required: http.required,
            tag: optional(http.tag),
            nonce: optional(http.nonce),
            lifetime_seconds_max: http.lifetime_seconds_max,
        },
        verify_request::Message::Dpop(dpop) => Message::Dpop {
            token_digest: token_digest(&dpop.access_token_sha256)?,
            proof: dpop.proof,
            method: dpop.method,
            uri: dpop.uri,
            nonce: optional(dpop.nonce),
        },
    })
}

/// The newest version first.
fn shown(shown: KeyShown) -> proto::Key {
    let KeyShown { key, denied } = shown;
    let version = |version: &crate::ledger::KeyVersion| proto::KeyVersion {
        number: version.number,
        kid: version.kid.to_string(),
        spki: version.public.spki().to_vec(),
        storage: version.storage.into(),
        expires_unix_seconds: version.expires.seconds(),
    };
    proto::Key {
        agent: key.of.agent.to_string(),
        epoch: key.of.epoch,
        name: key.of.name.to_string(),
        purpose: key.terms.purpose.into(),
        algorithm: key.terms.algorithm.into(),
        storage_asked: key.terms.storage_asked.into(),
        accounting: key.terms.accounting.into(),
        signatures_max: key.terms.signatures_max,
        signatures: key.used,
        state: key.state.into(),
        versions: key.versions.iter().rev().map(version).collect(),
        ttl_seconds: key.terms.ttl_seconds,
        denied,
    }
}

impl Keys {
    async fn signed(
        &self,
        Call { connection, share }: Call,
        key: String,
        contents: Vec<proto::Content>,
    ) -> Result<proto::SignBatchResponse, Status> {
        let contents = contents.into_iter().map(content_of).collect::<Result<_, _>>()?;
        let acts = Arc::clone(&self.acts);
        let made = own(share, async move { acts.sign(&connection, &key, contents).await }).await?;
        Ok(proto::SignBatchResponse {
            signatures: made.signed.into_iter().map(signature_of).collect(),
            kid: made.kid.to_string(),
            ledger_index: made.ledger_index,
        })
    }

    async fn end(
        &self,
        caller: Caller,
        (agent, epoch, key, reason): (String, u32, String, String),
        how: Ends,
    ) -> Result<u64, Status> {
        let acts = Arc::clone(&self.acts);
        let index = match caller {
            Caller::Agent(Call { connection, share }) => {
                own(share, async move { acts.end_own_key(&connection, (&agent, &key), how).await }).await?
            }
            Caller::Operator(operator) => {
                let (agent, reason) = (agent_id(&agent)?, checked_reason(reason)?);
                act(async move { acts.end_key(&operator, (agent, epoch, &key), how, &reason).await }).await?
            }
        };
        Ok(index.unwrap_or(0))
    }
}

/// What an agent asks for, also where it only reads: what a look has left with the threads that may block is under way there, whether
/// anybody waits for it or not.
async fn own<T: Send + 'static>(
    share: KeyShare,
    work: impl Future<Output = Result<T, Refusal>> + Send + 'static,
) -> Result<T, Status> {
    told(ToItsEnd::of(work, share).await)
}

fn told<T>(result: Result<T, Refusal>) -> Result<T, Status> {
    result.map_err(|refusal| status_of(&refusal))
}

#[tonic::async_trait]
impl KeyService for Keys {
    async fn create_key(&self, request: Request<proto::CreateKeyRequest>) -> Result<Response<proto::CreateKeyResponse>, Status> {
        let Call { connection, share } = owner(&request)?;
        let ask = request.into_inner();
        let wish = KeyWish {
            purpose: ask.purpose(),
            algorithm: ask.algorithm(),
            storage: ask.storage(),
            accounting: ask.accounting(),
            name: ask.name,
            signatures_max: ask.signatures_max,
            ttl_seconds: ask.ttl_seconds,
        };
        let acts = Arc::clone(&self.acts);
        let key = own(share, async move { acts.create_key(&connection, wish).await }).await?;
        Ok(Response::new(proto::CreateKeyResponse { key: Some(shown(key)) }))
    }

    async fn sign(&self, request: Request<proto::SignRequest>) -> Result<Response<proto::SignResponse>, Status> {
        let call = owner(&request)?;
        let proto::SignRequest { key, content } = request.into_inner();
        let mut made = self.signed(call, key, vec![content.unwrap_or_default()]).await?;
        let (kid, ledger_index) = (made.kid, made.ledger_index);
        Ok(Response::new(proto::SignResponse { signature: made.signatures.pop(), kid, ledger_index }))
    }

    async fn sign_batch(&self, request: Request<proto::SignBatchRequest>) -> Result<Response<proto::SignBatchResponse>, Status> {
        let call = owner(&request)?;
        let proto::SignBatchRequest { key, contents } = request.into_inner();
        Ok(Response::new(self.signed(call, key, contents).await?))
    }

    async fn get_public_key(
        &self,
        request: Request<proto::GetPublicKeyRequest>,
    ) -> Result<Response<proto::GetPublicKeyResponse>, Status> {
        let Call { connection, share } = owner(&request)?;
        let (acts, name) = (Arc::clone(&self.acts), request.into_inner().key);
        let key = own(share, async move { acts.show_key(&connection, &name).await }).await?;
        Ok(Response::new(proto::GetPublicKeyResponse { key: Some(shown(key)) }))
    }

    async fn list_keys(&self, request: Request<proto::ListKeysRequest>) -> Result<Response<proto::ListKeysResponse>, Status> {
        let caller = caller(&request)?;
        let ask = request.into_inner();
        let limit = if ask.limit == 0 { 100 } else { ask.limit.min(1000) };
        let (page, more) = match caller {
            Caller::Agent(Call { connection, share }) => {
                let acts = Arc::clone(&self.acts);
                own(share, async move { acts.list_own_keys(&connection, &ask.agent, ask.after, limit).await }).await?
            }
            Caller::Operator(_) => told(self.acts.list_keys(agent_id(&ask.agent)?, ask.epoch, ask.after, limit).await)?,
        };
        let next = page.last().filter(|_| more).map(|last| last.key.of.name.to_string());
        let keys = page.into_iter().map(shown).collect();
        Ok(Response::new(proto::ListKeysResponse { keys, next: next.unwrap_or_default() }))
    }

    async fn rotate_key(&self, request: Request<proto::RotateKeyRequest>) -> Result<Response<proto::RotateKeyResponse>, Status> {
        let Call { connection, share } = owner(&request)?;
        let proto::RotateKeyRequest { key, version } = request.into_inner();
        let acts = Arc::clone(&self.acts);
        let (key, index) = own(share, async move { acts.rotate_key(&connection, &key, version).await }).await?;
        Ok(Response::new(proto::RotateKeyResponse { key: Some(shown(key)), ledger_index: index.unwrap_or(0) }))
    }

    async fn disable_key(
        &self,
        request: Request<proto::DisableKeyRequest>,
    ) -> Result<Response<proto::DisableKeyResponse>, Status> {
        let caller = caller(&request)?;
        let proto::DisableKeyRequest { agent, key, epoch, reason } = request.into_inner();
        let ledger_index = self.end(caller, (agent, epoch, key, reason), Ends::Disabled).await?;
        Ok(Response::new(proto::DisableKeyResponse { ledger_index }))
    }

    async fn destroy_key(
        &self,
        request: Request<proto::DestroyKeyRequest>,
    ) -> Result<Response<proto::DestroyKeyResponse>, Status> {
        let caller = caller(&request)?;
        let proto::DestroyKeyRequest { agent, key, epoch, reason } = request.into_inner();
        let ledger_index = self.end(caller, (agent, epoch, key, reason), Ends::Destroyed).await?;
        Ok(Response::new(proto::DestroyKeyResponse { ledger_index }))
    }

    async fn verify(&self, request: Request<proto::VerifyRequest>) -> Result<Response<proto::VerifyResponse>, Status> {
        let Call { connection, share } = owner(&request)?;
        let proto::VerifyRequest { agent, message } = request.into_inner();
        let agent = if agent.is_empty() { None } else { Some(agent_id(&agent)?) };
        let message = message.ok_or_else(|| refuse(Reason::MalformedRequest, "say what is to be verified"))?;
        let (acts, message) = (Arc::clone(&self.acts), message_of(message)?);
        let signer = own(share, async move { acts.verify(&connection, agent, message).await }).await?;
        Ok(Response::new(proto::VerifyResponse {
            agent: signer.agent.to_string(),
            key: signer.key,
            kid: signer.kid,
            payload: signer.payload,
            covered: signer.covered,
            jti: signer.jti,
        }))
    }

    async fn get_jwks(&self, request: Request<proto::GetJwksRequest>) -> Result<Response<proto::GetJwksResponse>, Status> {
        let caller = caller(&request)?;
        let proto::GetJwksRequest { of, after } = request.into_inner();
        let of = match of {
            Some(proto::get_jwks_request::Of::Agent(agent)) => JwksOf::Agent(agent_id(&agent)?),
            // A class is what stands before the slash of an agent's name.
            Some(proto::get_jwks_request::Of::Class(class)) if AgentId::parse(&format!("{class}/x")).is_ok() => {
                JwksOf::Class(class)
            }
            _ => return Err(refuse(Reason::MalformedRequest, "name an agent as <class>/<instance>, or a class")),
        };
        let (jwks, next) = match caller {
            Caller::Agent(Call { connection, share }) => {
                let acts = Arc::clone(&self.acts);
                own(share, async move { acts.jwks_for_agent(&connection, of, &after).await }).await?
            }
            Caller::Operator(_) => told(self.acts.jwks(of, &after).await)?,
        };
        Ok(Response::new(proto::GetJwksResponse { jwks, next: next.unwrap_or_default() }))
    }
}

//! KeyService as an agent calls it, or an operator.

use keyward::proto::key_service_client::KeyServiceClient;
use keyward::proto::{
    Content, CreateKeyRequest, CreateKeyResponse, DestroyKeyRequest, DisableKeyRequest, GetJwksRequest, GetJwksResponse,
    GetPublicKeyRequest, Key, KeyPurpose, KeyStorage, ListKeysRequest, RotateKeyRequest, SignBatchRequest, SignBatchResponse,
    SignRequest, SignResponse, VerifyRequest, VerifyResponse, content, get_jwks_request, signature::Form,
};
use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tonic::transport::Channel;

use super::House;
use super::wire::{Answer, Identity, Wire};

/// A connection that stays.
pub struct Keys {
    wire: Wire,
    service: KeyServiceClient<Channel>,
}

impl House {
    /// As an agent, or as whoever holds what it holds.
    pub fn keys(&self, identity: &Identity) -> Keys {
        let wire = self.wire();
        let service = KeyServiceClient::new(wire.channel(Some(identity))).max_decoding_message_size(8 << 20);
        Keys { wire, service }
    }

    /// As an operator.
    pub fn operator_keys(&self) -> Keys {
        let wire = self.wire();
        let service = KeyServiceClient::new(wire.local());
        Keys { wire, service }
    }
}

/// A wish for a key on P-256 for raw digests.
pub fn wish(name: &str) -> CreateKeyRequest {
    CreateKeyRequest { name: name.to_owned(), purpose: KeyPurpose::RawDigest.into(), ..CreateKeyRequest::default() }
}

/// Where a key lives that was wished to live there: a class that the token lacks falls back to the next, visibly.
pub fn lives(storage: KeyStorage) -> KeyStorage {
    if storage == KeyStorage::Wrapped && !super::token::wraps() { KeyStorage::Resident } else { storage }
}

/// A digest to be signed.
pub fn digest(bytes: &[u8]) -> Content {
    use sha2::Digest as _;
    Content { content: Some(content::Content::Digest(sha2::Sha256::digest(bytes).to_vec())) }
}

/// A payload to be signed.
pub fn payload(text: &str) -> Content {
    let jws = content::Jws { payload: text.as_bytes().to_vec(), ..content::Jws::default() };
    Content { content: Some(content::Content::Jws(jws)) }
}

/// Whether it is the key's signature over the message.
pub fn verifies(key: &Key, message: &[u8], signature: Option<&Form>) -> bool {
    let Some(Form::Der(der)) = signature else { panic!("a signature in DER: {signature:?}") };
    keyward::model::PublicKey::from_spki(&key.versions[0].spki).unwrap().verifies(message, der)
}

impl Keys {
    pub fn create(&mut self, wish: CreateKeyRequest) -> Answer<Key> {
        let CreateKeyResponse { key } = self.wire.runtime.block_on(self.service.create_key(wish))?.into_inner();
        Ok(key.expect("a key"))
    }

    pub fn sign(&mut self, key: &str, content: Content) -> Answer<SignResponse> {
        let request = SignRequest { key: key.to_owned(), content: Some(content) };
        Ok(self.wire.runtime.block_on(self.service.sign(request))?.into_inner())
    }

    pub fn sign_batch(&mut self, key: &str, contents: Vec<Content>) -> Answer<SignBatchResponse> {
        let request = SignBatchRequest { key: key.to_owned(), contents };
        Ok(self.wire.runtime.block_on(self.service.sign_batch(request))?.into_inner())
    }

    /// Asks for a batch and hangs up, without an answer, when it is told to.
    pub fn sign_batch_until(self, key: &str, contents: Vec<Content>, hang_up: oneshot::Receiver<()>) {
        let Self { wire, mut service } = self;
        let request = SignBatchRequest { key: key.to_owned(), contents };
        wire.runtime.block_on(async {
            tokio::select! {
                answer = service.sign_batch(request) => panic!("it was over before: {answer:?}"),
                told = hang_up => told.expect("it is told"),
            }
        });
    }

    /// Asks for so many signatures, then for the key, all on one connection; hangs up on the signatures that have not come when the key has,
    /// and says how many those are.
    pub fn sign_and_hang_up(&mut self, key: &str, times: usize) -> Answer<usize> {
        let Self { wire, service } = self;
        let request = SignRequest { key: key.to_owned(), content: Some(digest(b"x")) };
        wire.runtime.block_on(async {
            let mut asked = JoinSet::new();
            for _ in 0..times {
                let (mut service, request) = (service.clone(), request.clone());
                asked.spawn(async move { service.sign(request).await.map(drop) });
            }
            // Asked for after them: on this thread each of them has its turn first.
            tokio::task::yield_now().await;
            service.get_public_key(GetPublicKeyRequest { key: key.to_owned() }).await?;
            // Those that wait for nothing are answered by then.
            tokio::time::timeout(std::time::Duration::from_millis(500), async { while asked.join_next().await.is_some() {} })
                .await
                .ok();
            Ok(asked.len())
        })
    }

    /// A JWS over a payload.
    pub fn jws(&mut self, key: &str, text: &str) -> Answer<String> {
        match self.sign(key, payload(text))?.signature.and_then(|signature| signature.form) {
            Some(Form::Jws(token)) => Ok(token),
            other => panic!("a JWS: {other:?}"),
        }
    }

    pub fn show(&mut self, key: &str) -> Answer<Key> {
        let request = GetPublicKeyRequest { key: key.to_owned() };
        Ok(self.wire.runtime.block_on(self.service.get_public_key(request))?.into_inner().key.expect("a key"))
    }

    pub fn list(&mut self, agent: &str) -> Answer<Vec<Key>> {
        let request = ListKeysRequest { agent: agent.to_owned(), ..ListKeysRequest::default() };
        Ok(self.wire.runtime.block_on(self.service.list_keys(request))?.into_inner().keys)
    }

    pub fn rotate(&mut self, key: &str, version: u32) -> Answer<(Key, u64)> {
        let request = RotateKeyRequest { key: key.to_owned(), version };
        let answer = self.wire.runtime.block_on(self.service.rotate_key(request))?.into_inner();
        Ok((answer.key.expect("a key"), answer.ledger_index))
    }

    /// Of an agent where an operator asks; else the caller's own.
    pub fn disable(&mut self, agent: &str, key: &str) -> Answer<u64> {
        let request = DisableKeyRequest { agent: agent.to_owned(), key: key.to_owned(), epoch: 0, reason: "a test".to_owned() };
        Ok(self.wire.runtime.block_on(self.service.disable_key(request))?.into_inner().ledger_index)
    }

    /// The same.
    pub fn destroy(&mut self, agent: &str, key: &str) -> Answer<u64> {
        let request = DestroyKeyRequest { agent: agent.to_owned(), key: key.to_owned(), epoch: 0, reason: "a test".to_owned() };
        Ok(self.wire.runtime.block_on(self.service.destroy_key(request))?.into_inner().ledger_index)
    }

    /// The kids of a JWKS.
    pub fn kids(&mut self, of: get_jwks_request::Of) -> Answer<Vec<String>> {
        let set: serde_json::Value = serde_json::from_str(&self.jwks(of, "")?.jwks).unwrap();
        Ok(set["keys"].as_array().unwrap().iter().map(|key| key["kid"].as_str().unwrap().to_owned()).collect())
    }

    pub fn jwks(&mut self, of: get_jwks_request::Of, after: &str) -> Answer<GetJwksResponse> {
        let request = GetJwksRequest { of: Some(of), after: after.to_owned() };
        Ok(self.wire.runtime.block_on(self.service.get_jwks(request))?.into_inner())
    }

    pub fn verify(&mut self, request: VerifyRequest) -> Answer<VerifyResponse> {
        Ok(self.wire.runtime.block_on(self.service.verify(request))?.into_inner())
    }
}

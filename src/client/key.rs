//! The client of KeyService: of an agent, with the credential in its directory; of an operator, over the daemon's socket.

use std::path::Path;

use tonic::transport::Channel;

use super::store::holding_in;
use super::{Error, Place, StoreError, operator, tls};
use crate::model::TrustDomain;
use crate::proto::key_service_client::KeyServiceClient;

/// A page of 1,000 keys.
const ANSWER_BYTES_MAX: usize = 8 << 20;

/// A connection to KeyService and where it leads.
pub struct Keys {
    /// The service.
    pub service: KeyServiceClient<Channel>,
    place: Place,
}

impl Keys {
    /// As the agent whose credential is in `dir`, beside whoever keeps it fresh there.
    ///
    /// # Errors
    /// `Store` without a credential; `Unreachable`, `Untrusted`.
    pub async fn of_agent(dir: &Path) -> Result<Self, Error> {
        let holding = holding_in(dir)?;
        let broken =
            |error: crate::model::InvalidName| StoreError::Broken { path: dir.join("agent.json"), what: error.to_string() };
        let domain = TrustDomain::parse(&holding.card.trust_domain).map_err(broken)?;
        let config = tls::config(&holding.authorities, &domain, Some((&holding.chain, &holding.key)))?;
        let (channel, place) = tls::connect(&holding.card.addresses, config).await?;
        Ok(Self { service: KeyServiceClient::new(channel).max_decoding_message_size(ANSWER_BYTES_MAX), place })
    }

    /// As an operator.
    ///
    /// # Errors
    /// `Unreachable`.
    pub async fn of_operator(socket: &Path) -> Result<Self, Error> {
        let service = KeyServiceClient::new(operator::channel(socket).await?).max_decoding_message_size(ANSWER_BYTES_MAX);
        Ok(Self { service, place: Place::new(&socket.display().to_string()) })
    }

    /// Sorts what a call ended in.
    #[must_use]
    pub fn failed(&self, status: &tonic::Status) -> Error {
        self.place.failed(status)
    }
}

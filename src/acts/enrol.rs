//! A new agent, and the secret that lets it in once.

use crate::authn::Operator;
use crate::ledger::Token;
use crate::model::{AgentId, Reason, Refusal, SecretBytes, TokenId, join_public_key};
use crate::proto;

use super::Acts;

/// A join token as the operator gets it: shown once, kept nowhere. The ledger knows its public key.
pub struct JoinTerms {
    /// For whom.
    pub agent: AgentId,
    /// Public name.
    pub token_id: TokenId,
    /// Secret.
    pub seed: SecretBytes,
    /// Until when, Unix seconds.
    pub expires_unix_seconds: u64,
    /// The entry.
    pub ledger_index: u64,
    /// The agent's epoch.
    pub epoch: u32,
    /// Where to go.
    pub addresses: Vec<String>,
    /// What to trust.
    pub bundle: proto::Bundle,
}

/// Longest lifetime an enrolment can grant, in seconds.
const TTL_SECONDS_MAX: u32 = 86_400;
const TTL_SECONDS_MIN: u32 = 10;
const REJOIN_SECONDS_MAX: u32 = 2_592_000;
const TOKEN_TTL_SECONDS_MAX: u32 = 604_800;

impl Acts {
    /// Enrols an agent. Zero stands for the configured default.
    ///
    /// # Errors
    /// `MALFORMED_REQUEST` for a limit out of range, `AGENT_EXISTS`, `HSM_UNAVAILABLE` (there is no bundle to hand out), `CLOCK_UNTRUSTED`.
    pub async fn enrol(
        &self,
        operator: &Operator,
        agent: AgentId,
        ttl_seconds_max: u32,
        rejoin_seconds: u32,
        token_ttl_seconds: u32,
    ) -> Result<JoinTerms, Refusal> {
        let limits = proto::Limits {
            ttl_seconds_max: in_range("ttl", ttl_seconds_max, self.limits.ttl_seconds_default, TTL_SECONDS_MIN, TTL_SECONDS_MAX)?,
            rejoin_seconds: in_range("rejoin", rejoin_seconds, self.limits.rejoin_seconds_default, 0, REJOIN_SECONDS_MAX)?,
        };
        let bundle = self.bundle()?;
        let (token, seed) = self.new_token(token_ttl_seconds)?;
        let (token_id, expires) = (token.id, token.expires);
        let ledger_index = self.ledger.enrol(&agent, limits, operator.signs(""), token).await?;
        tracing::info!(%agent, ledger_index, "enrolled");
        Ok(JoinTerms {
            agent,
            token_id,
            seed,
            expires_unix_seconds: expires.seconds(),
            ledger_index,
            epoch: 1,
            addresses: self.addresses.load().to_vec(),
            bundle,
        })
    }

    /// A fresh token: the seed leaves in the answer, the public key goes to the ledger.
    pub(super) fn new_token(&self, ttl_seconds: u32) -> Result<(Token, SecretBytes), Refusal> {
        let ttl =
            in_range("token ttl", ttl_seconds, self.limits.token_ttl_seconds_default, TTL_SECONDS_MIN, TOKEN_TTL_SECONDS_MAX)?;
        let now = self.trusted_now()?;
        let seed = SecretBytes::random::<32>();
        let token = Token {
            id: TokenId::random(),
            public_key: join_public_key(&seed),
            expires: now.plus_seconds(ttl.into()),
            spent_for: None,
        };
        Ok((token, seed))
    }
}

fn in_range(what: &str, asked: u32, default: u32, least: u32, most: u32) -> Result<u32, Refusal> {
    let value = if asked == 0 { default } else { asked };
    if (least..=most).contains(&value) {
        return Ok(value);
    }
    Err(Refusal::new(Reason::MalformedRequest, format!("choose a {what} of {least} to {most} seconds")))
}

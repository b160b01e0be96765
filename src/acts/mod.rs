//! The verbs.
//!
//! Owns: what keyward does for its callers, each act in a file of its name. Promises: an act reads as a story; from its intent on it
//! runs to its end whether the caller waits or not; refusals of a known identity become entries, of strangers counts. Never:
//! speaks a wire format, decides who a caller is, signs what the ledger has not recorded.

mod authorities;
mod bundle;
mod certificate;
mod checkpoint;
mod clock;
mod crl;
mod enrol;
mod files;
mod init;
mod issue;
mod keys;
mod quarantine;
mod release;
mod server_certificate;
mod unlock;

use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};

use crate::config::{Config, Limits};
use crate::hsm;
use crate::ledger::Ledger;
use crate::model::{Clock, Reason, Refusal, TrustDomain};

pub use authorities::Authorities;
pub use bundle::BundleWatch;
pub use certificate::{Authority, Issued, assemble};
pub use checkpoint::verifier_key;
pub use crl::Crl;
pub use enrol::JoinTerms;
pub use init::{Initialised, Root, initialise};
pub use keys::{Keys, Tokens, reconcile};
pub use server_certificate::ServerCertificate;
pub use unlock::unlock;

/// Everything an act needs. Built once by the daemon.
pub struct Acts {
    pub(crate) ledger: Ledger,
    domain: TrustDomain,
    limits: Limits,
    /// Addresses for join files, `host:port`; known once TCP is bound.
    addresses: ArcSwap<Vec<String>>,
    /// Absent while the token is.
    authorities: ArcSwapOption<Authorities>,
    bundles: bundle::Bundles,
    crl: Crl,
}

impl Acts {
    /// Without authorities: those come when the token is there.
    #[must_use]
    pub fn new(config: &Config, ledger: Ledger, crl: Crl) -> Self {
        Self {
            ledger,
            domain: config.trust_domain.clone(),
            limits: config.limits.clone(),
            addresses: ArcSwap::default(),
            authorities: ArcSwapOption::empty(),
            bundles: bundle::Bundles::default(),
            crl,
        }
    }

    /// The book.
    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// The trust domain served.
    #[must_use]
    pub fn domain(&self) -> &TrustDomain {
        &self.domain
    }

    /// Where join files send agents.
    pub fn set_addresses(&self, addresses: Vec<String>) {
        self.addresses.store(Arc::new(addresses));
    }

    /// The token is there, or authorities have changed: what the ledger has of them is in force from here on. Whoever follows the bundle
    /// hears of it.
    pub fn set_authorities(&self, authorities: Authorities) {
        let bundle = authorities.bundle();
        self.authorities.store(Some(Arc::new(authorities)));
        self.bundles.publish(bundle);
    }

    /// The authorities, if the token is there.
    ///
    /// # Errors
    /// `HSM_UNAVAILABLE`.
    pub fn authorities(&self) -> Result<Arc<Authorities>, Refusal> {
        self.authorities.load_full().ok_or_else(|| {
            Refusal::new(Reason::HsmUnavailable, "keyward's HSM is not available; ask again later")
                .retry_after(Duration::from_secs(1))
        })
    }

    fn clock(&self) -> &Arc<Clock> {
        self.ledger.clock()
    }

    fn trusted_now(&self) -> Result<crate::model::UnixTime, Refusal> {
        self.clock().now().map_err(|error| {
            Refusal::new(
                Reason::ClockUntrusted,
                "the daemon's clock jumped; issuing waits until it returns or an operator accepts it",
            )
            .because(error)
        })
    }
}

/// When to ask again what waits for an operator: soon after that one is done.
const WHEN_UNLOCKED: Duration = Duration::from_secs(10);

/// What a caller is told when the token could not be asked.
fn hsm_refusal(error: hsm::Error) -> Refusal {
    if error.is_permanent() {
        let told =
            "keyward's HSM refuses this for good, asking again does not help; an operator has to look at it (`keyward hsm test`)";
        return Refusal::new(Reason::HsmRefused, told).because(error);
    }
    if error.awaits_unlock() {
        let told = "keyward's HSM is not available until an operator has looked at it (`keyward hsm status`)";
        return Refusal::new(Reason::HsmUnavailable, told).because(error).retry_after(WHEN_UNLOCKED);
    }
    let (reason, told) = if error.is_overload() {
        (Reason::Overloaded, "more is asked of keyward's HSM than it can do; ask again in a moment")
    } else {
        (Reason::HsmUnavailable, "keyward's HSM is not available now; ask again in a moment")
    };
    Refusal::new(reason, told).because(error).retry_after(Refusal::SOON)
}

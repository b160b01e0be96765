//! The verbs.
//!
//! Owns: what keyward does for its callers, each act in a file of its name. Promises: an act reads as a story; from its intent on it
//! runs to its end whether the caller waits or not; refusals of a known identity become entries, of strangers counts. Never:
//! speaks a wire format, decides who a caller is, signs what the ledger has not recorded.

mod adopt;
mod authorities;
mod bundle;
mod certificate;
mod certify;
mod checkpoint;
mod clock;
mod crl;
mod due;
mod enrol;
mod expiry;
mod files;
mod init;
mod issue;
mod key;
mod keys;
mod label;
mod outside;
mod quarantine;
mod reconcile;
mod release;
mod rotate;
mod server_certificate;
mod unlock;

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use arc_swap::{ArcSwap, ArcSwapOption};
use tokio::sync::{Mutex, watch};

use crate::authn::Tls;
use crate::config::{Config, Limits, Rotation};
use crate::hsm;
use crate::ledger::Ledger;
use crate::model::{Clock, KeyId, Outage, Reason, Refusal, TrustDomain};

pub use authorities::Authorities;
pub use bundle::BundleWatch;
pub use certificate::{Authority, Issued, assemble};
pub use checkpoint::verifier_key;
pub use crl::Crl;
pub use due::Arrow;
pub use enrol::JoinTerms;
pub use init::{Initialised, Root, initialise};
pub use key::{
    AgentKeys, Content, JwksOf, KeyShown, KeyToken, KeyWish, Message, Rewrap, Round, SignaturesMade, Signer, key_purpose_name,
};
pub use keys::Tokens;
pub use reconcile::{Stray, Unwanted};
pub use unlock::unlock;

/// Everything an act needs. Built once by the daemon.
pub struct Acts {
    pub(crate) ledger: Ledger,
    domain: TrustDomain,
    limits: Limits,
    /// Hosts that agents dial: DNS names and IP addresses.
    names: Vec<String>,
    /// Addresses for join files, `host:port`; known once TCP is bound.
    addresses: ArcSwap<Vec<String>>,
    /// Absent while the token is.
    authorities: ArcSwapOption<Authorities>,
    bundles: bundle::Bundles,
    keys: AgentKeys,
    /// Counts changes of `authorities`.
    changes: watch::Sender<u64>,
    /// Trusts clients by the authorities, and serves under the server's own certificate.
    tls: Arc<Tls>,
    served: ArcSwapOption<server_certificate::Served>,
    rotation: Rotation,
    /// One arrow at a time.
    rotating: Mutex<()>,
    /// What the outside root is asked to sign for a planned issuing authority: its key, PKCS#10 in DER.
    request: ArcSwapOption<(KeyId, Vec<u8>)>,
    /// Which request `issuing.csr` is, or that there is none; `None` where that is not known.
    request_told: Mutex<Option<Option<KeyId>>>,
    /// Files that could not be written.
    behind: files::Behind,
    /// Checkpoints go without a signature that they should have.
    unsigned: std::sync::Mutex<Outage>,
    crl: Arc<Crl>,
    /// One set of CRLs at a time.
    publishing: Mutex<()>,
    /// The state directory.
    state: PathBuf,
}

impl Acts {
    /// Without authorities: those come when the token is there.
    #[must_use]
    pub fn new(config: &Config, ledger: Ledger, crl: Crl, tls: Arc<Tls>) -> Self {
        Self {
            keys: AgentKeys::new(&config.limits, ledger.clock()),
            ledger,
            domain: config.trust_domain.clone(),
            limits: config.limits.clone(),
            names: config.listen.names.clone(),
            addresses: ArcSwap::default(),
            authorities: ArcSwapOption::empty(),
            bundles: bundle::Bundles::default(),
            changes: watch::Sender::new(0),
            tls,
            served: ArcSwapOption::empty(),
            rotation: config.rotation.clone(),
            rotating: Mutex::new(()),
            request: ArcSwapOption::empty(),
            request_told: Mutex::new(None),
            behind: files::Behind::default(),
            unsigned: std::sync::Mutex::default(),
            crl: Arc::new(crl),
            publishing: Mutex::new(()),
            state: config.paths.state.clone(),
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

    /// The authorities in force from now on: clients are trusted by them, and new certificates are signed by them. Whoever follows the
    /// bundle hears of it.
    ///
    /// # Errors
    /// `INTERNAL`: a certificate of theirs is none.
    pub fn set_authorities(&self, authorities: Authorities) -> Result<(), Refusal> {
        // First, so that nobody holds a certificate that is not trusted yet.
        self.tls.trust(self.clock(), &authorities.anchors()).map_err(Refusal::internal)?;
        let (bundle, leaving) = (authorities.bundle(), authorities.leaving());
        self.authorities.store(Some(Arc::new(authorities)));
        self.bundles.publish(bundle, leaving);
        self.changes.send_modify(|count| *count += 1);
        Ok(())
    }

    /// No certificate of an agent is good for longer, in seconds: whatever one says that somebody made with a stolen key.
    #[must_use]
    pub fn certificate_seconds_longest(&self) -> u64 {
        u64::from(self.ttl_seconds_longest()) + due::SLACK_SECONDS
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

//! Who meets the authorities while they rotate: agents that renew all the time, and a judge of what they get.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustls::RootCertStore;
use rustls::crypto::aws_lc_rs;
use rustls::pki_types::{CertificateDer, UnixTime as VerifyAt};
use rustls::server::WebPkiClientVerifier;
use rustls::server::danger::ClientCertVerifier;
use tokio::sync::{RwLock, watch};

use super::Failed;
use crate::client::agent::Connection;
use crate::client::request::{self, Key};
use crate::client::{Error, JoinFile};
use crate::model::{AgentId, Digest, TrustDomain, UnixTime, join_sign, renew_binder};
use crate::proto::ask::Claim;
use crate::proto::{self, BoundKeyClaim, Bundle, Credential, JoinClaim};

/// Of each so many certificates one is shown to openssl as well.
const OPENSSL_EVERY: usize = 100;
/// So much of what went wrong is told in words.
pub(super) const COMPLAINTS_MAX: usize = 20;
/// Between two renewals of an agent.
const BREATH: Duration = Duration::from_millis(5);
/// A request is repeated for so long.
const PATIENCE: Duration = Duration::from_secs(60);
/// Between two tries.
const AGAIN: Duration = Duration::from_millis(100);

/// What agents have to know of the run.
#[derive(Debug, Clone, Default)]
pub(super) struct Moment {
    /// Where the daemon is.
    pub address: String,
    /// How often time has passed.
    pub hop: usize,
    /// Nothing more is asked.
    pub over: bool,
}

/// What an agent shares with the run.
pub(super) struct Run {
    pub moments: watch::Receiver<Moment>,
    /// Held for writing while time passes.
    pub pause: Arc<RwLock<()>>,
    /// For each agent the hops that it has renewed in.
    pub renewed: watch::Sender<Vec<usize>>,
    /// Its place in that.
    pub number: usize,
}

impl Run {
    fn is_at(&self, hop: usize) {
        self.renewed.send_modify(|renewed| renewed[self.number] = hop);
    }
}

/// One agent with what it holds.
pub(super) struct Agent {
    name: AgentId,
    domain: TrustDomain,
    bundle: Bundle,
    chain: Vec<Vec<u8>>,
    key: Key,
    sequence: u64,
    /// Sent without an answer: sent again as it is.
    pending: Option<(Key, Vec<u8>)>,
    judge: Arc<Judge>,
}

impl Agent {
    pub(super) async fn attest(join: proto::JoinFile, judge: Arc<Judge>) -> Result<Self, Failed> {
        let join = JoinFile::from_proto(join)?;
        let key = Key::generate()?;
        let ask = request::ask(&key, 0, Claim::Join(JoinClaim { token_id: join.token_id.0.to_vec() }))?;
        let mut connection = Connection::open(&join.addresses, &join.bundle.authorities, &join.trust_domain, None).await?;
        let sign = |binder: &Digest| Ok(join_sign(&join.token_seed, binder).to_vec());
        let credential = connection.attest(&ask, &key.public().digest(), sign).await?;
        judge.see(&credential)?;
        Ok(Self {
            name: join.agent,
            domain: join.trust_domain,
            bundle: credential.bundle.unwrap_or_default(),
            chain: credential.chain,
            key,
            sequence: credential.next_sequence,
            pending: None,
            judge,
        })
    }

    /// So many renewals each time that time has passed, until it is over. How many were not granted at once; of a `patient` agent how many
    /// were not granted for as long as it asked.
    pub(super) async fn renew_on(mut self, per_hop: usize, mut run: Run, patient: bool) -> usize {
        let mut failed = 0;
        loop {
            let hop = run.moments.borrow().hop;
            for _ in 0..per_hop {
                let until = Instant::now() + PATIENCE;
                loop {
                    let address = run.moments.borrow().address.clone();
                    let asked = {
                        let _no_jump = run.pause.read().await;
                        self.renew(address).await
                    };
                    match asked {
                        Ok(()) => break,
                        Err(error) if patient && passes(&error) && Instant::now() < until => {}
                        Err(error) => {
                            self.judge.complain(format!("{}: {error}", self.name));
                            failed += 1;
                            if Instant::now() >= until || !passes(&error) {
                                run.is_at(usize::MAX);
                                return failed;
                            }
                        }
                    }
                    tokio::time::sleep(AGAIN).await;
                }
                // Its bundle is of this hour: the next may come.
                run.is_at(hop + 1);
                tokio::time::sleep(BREATH).await;
            }
            if run.moments.wait_for(|moment| moment.hop > hop || moment.over).await.is_err() || run.moments.borrow().over {
                return failed;
            }
        }
    }

    /// On a connection of its own, as a client that trusts nothing but the bundle it was given last.
    async fn renew(&mut self, address: String) -> Result<(), Failed> {
        let (key, ask) = match self.pending.take() {
            Some(pending) => pending,
            None => {
                let key = Key::generate()?;
                let claim = BoundKeyClaim { agent: self.name.to_string(), sequence: self.sequence };
                let ask = request::ask(&key, 0, Claim::BoundKey(claim))?;
                (key, ask)
            }
        };
        let answer = self.send(address, &key, &ask).await;
        let credential = match answer {
            Ok(credential) => credential,
            Err(error) => {
                self.pending = Some((key, ask));
                return Err(error.into());
            }
        };
        self.judge.see(&credential)?;
        (self.key, self.sequence) = (key, credential.next_sequence);
        self.bundle = credential.bundle.unwrap_or_default();
        self.chain = credential.chain;
        Ok(())
    }

    async fn send(&self, address: String, key: &Key, ask: &[u8]) -> Result<Credential, Error> {
        let identity = Some((self.chain.as_slice(), &self.key));
        let mut connection = Connection::open(&[address], &self.bundle.authorities, &self.domain, identity).await?;
        let binder = renew_binder(self.sequence, &key.public().digest(), &Digest::of(ask), &self.domain);
        connection.renew(ask.to_vec(), self.key.sign(&binder)?).await
    }
}

/// Whether asking again may help: nobody was there, or could not answer.
fn passes(error: &Failed) -> bool {
    error.downcast_ref::<Error>().is_some_and(Error::is_passing)
}

/// Holds every certificate, from its making to its end, against every bundle that somebody may go by then: the one in force and any that
/// was within the last refresh.
pub(super) struct Judge {
    seen: Mutex<Seen>,
    issued: AtomicUsize,
    verified: AtomicUsize,
    verified_by_openssl: AtomicUsize,
    rejected: AtomicUsize,
    complaints: Mutex<Vec<String>>,
    work: PathBuf,
}

/// A bundle, when it was seen first, and what verifies by it as long as somebody may go by it.
struct Known {
    since: UnixTime,
    bundle: Bundle,
    verifier: Option<Arc<dyn ClientCertVerifier>>,
}

#[derive(Default)]
struct Seen {
    /// In the order of their sequences.
    bundles: Vec<Known>,
    /// Chains that have not ended.
    live: Vec<(UnixTime, Vec<Vec<u8>>)>,
}

impl Judge {
    pub(super) fn new(work: &Path) -> Result<Self, Failed> {
        Ok(Self {
            seen: Mutex::default(),
            issued: AtomicUsize::new(0),
            verified: AtomicUsize::new(0),
            verified_by_openssl: AtomicUsize::new(0),
            rejected: AtomicUsize::new(0),
            complaints: Mutex::default(),
            work: work.canonicalize()?,
        })
    }

    fn seen(&self) -> MutexGuard<'_, Seen> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What an agent was given.
    fn see(&self, credential: &Credential) -> Result<(), Failed> {
        let now = UnixTime::wall();
        let bundle = credential.bundle.clone().ok_or("a credential without a bundle")?;
        let number = self.issued.fetch_add(1, Ordering::Relaxed);
        let mut seen = self.seen();
        if seen.bundles.last().is_none_or(|newest| newest.bundle.sequence < bundle.sequence) {
            let verifier = verifier(&bundle)?;
            // Who goes by the new bundle meets what was issued before it.
            seen.live.retain(|(not_after, _)| *not_after > now);
            for (_, chain) in &seen.live {
                self.verify(&verifier, chain, now);
            }
            seen.bundles.push(Known { since: now, bundle: bundle.clone(), verifier: Some(verifier) });
        }
        let refresh = u64::from(bundle.refresh_hint_seconds);
        let (count, oldest) = (seen.bundles.len(), now.minus_seconds(refresh));
        // Superseded so long ago that nobody goes by it any more: from the one before the first that is newer.
        let first = seen.bundles.iter().rposition(|known| known.since <= oldest).unwrap_or(0);
        for (at, known) in seen.bundles.iter_mut().enumerate() {
            if at < first {
                known.verifier = None;
            } else if let Some(verifier) = &known.verifier {
                self.verify(verifier, &credential.chain, now);
            }
        }
        let not_after = UnixTime::from_seconds(credential.not_after_unix_seconds);
        seen.live.push((not_after, credential.chain.clone()));
        let oldest_in_use = seen.bundles[first.min(count - 1)].bundle.clone();
        drop(seen);
        if number.is_multiple_of(OPENSSL_EVERY) {
            self.ask_openssl(number, &credential.chain, &oldest_in_use, now)?;
        }
        Ok(())
    }

    fn verify(&self, verifier: &Arc<dyn ClientCertVerifier>, chain: &[Vec<u8>], now: UnixTime) {
        self.verified.fetch_add(1, Ordering::Relaxed);
        let chain: Vec<_> = chain.iter().map(|der| CertificateDer::from(der.as_slice())).collect();
        let at = VerifyAt::since_unix_epoch(Duration::from_micros(now.micros()));
        let verdict = match chain.split_first() {
            Some((leaf, intermediates)) => verifier.verify_client_cert(leaf, intermediates, at).map(drop),
            None => Err(rustls::Error::NoCertificatesPresented),
        };
        if let Err(error) = verdict {
            self.complain(format!("rejected: {error}"));
            self.rejected.fetch_add(1, Ordering::Relaxed);
        }
    }

    fn ask_openssl(&self, number: usize, chain: &[Vec<u8>], bundle: &Bundle, now: UnixTime) -> Result<(), Failed> {
        let pem = |ders: &[Vec<u8>]| ders.iter().map(|der| pem::encode(&pem::Pem::new("CERTIFICATE", der.as_slice()))).collect();
        let place = self.work.join(format!("openssl-{}-{number}", std::process::id()));
        std::fs::create_dir_all(&place)?;
        let files: [(&str, String); 3] =
            [("leaf", pem(&chain[..1])), ("issuing", pem(&chain[1..])), ("bundle", pem(&bundle.authorities))];
        for (name, text) in &files {
            std::fs::write(place.join(name), text)?;
        }
        let status = Command::new("openssl")
            .current_dir(&place)
            .args(["verify", "-x509_strict", "-CAfile", "bundle", "-untrusted", "issuing", "-attime"])
            .args([&now.seconds().to_string(), "leaf"])
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .status()?;
        std::fs::remove_dir_all(&place)?;
        self.verified_by_openssl.fetch_add(1, Ordering::Relaxed);
        if !status.success() {
            self.complain("rejected by openssl".to_owned());
            self.rejected.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// What went wrong, in words: the first of it.
    fn complain(&self, what: String) {
        let mut complaints = self.complaints.lock().unwrap_or_else(PoisonError::into_inner);
        if complaints.len() < COMPLAINTS_MAX {
            complaints.push(what);
        }
    }

    pub(super) fn complaints(&self) -> Vec<String> {
        self.complaints.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn issued(&self) -> usize {
        self.issued.load(Ordering::Relaxed)
    }

    pub(super) fn verified(&self) -> usize {
        self.verified.load(Ordering::Relaxed)
    }

    pub(super) fn verified_by_openssl(&self) -> usize {
        self.verified_by_openssl.load(Ordering::Relaxed)
    }

    pub(super) fn rejected(&self) -> usize {
        self.rejected.load(Ordering::Relaxed)
    }

    pub(super) fn bundles(&self) -> usize {
        self.seen().bundles.len()
    }
}

fn verifier(bundle: &Bundle) -> Result<Arc<dyn ClientCertVerifier>, Failed> {
    let mut roots = RootCertStore::empty();
    for der in &bundle.authorities {
        roots.add(CertificateDer::from(der.as_slice()))?;
    }
    let provider = Arc::new(aws_lc_rs::default_provider());
    Ok(WebPkiClientVerifier::builder_with_provider(Arc::new(roots), provider).build()?)
}

//! The rooms, opened in order; what each start and each stop has to do with them.

use std::os::unix::fs::DirBuilderExt as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::net::{TcpListener, UnixListener};
use tokio::sync::watch;

use crate::acts::{self, Acts, Authorities, Crl, KeyToken, Tokens};
use crate::api::{self, Health, Readiness};
use crate::authn::Tls;
use crate::config::{Config, section};
use crate::hsm::{self, Hsm, Modules};
use crate::ledger::{Ledger, Settings};
use crate::model::{Meter, Outage, UnixTime};
use crate::proto::{self, TokenRole, entry::Body};

use super::{Cause, duties, notify};

/// What is missing before anything was tried.
const STARTING: &str = "starting";
/// Between two looks at a token that could not be opened.
const TOKEN_RETRY: Duration = Duration::from_millis(500);
/// Longest time for opening a token: loading its module, finding it, one login, probing it.
const OPEN_DEADLINE: Duration = Duration::from_secs(60);
/// A token that takes longer to open is worth a word: its module may hang.
const OPEN_SLOW: Duration = Duration::from_secs(2);
/// How long intents under way have to end at the stop.
const SETTLE_DEADLINE: Duration = Duration::from_secs(5);
/// How long a token has to come to rest at the stop.
const TOKEN_DEADLINE: Duration = Duration::from_secs(2);

/// Everything that is open. Clones share it.
#[derive(Clone)]
pub(super) struct Rooms {
    pub config: Arc<Config>,
    pub acts: Arc<Acts>,
    pub readiness: Readiness,
    pub health: Health,
    pub tls: Arc<Tls>,
    pub waiting: Arc<Mutex<Waiting>>,
    pub tokens: Arc<watch::Sender<Option<Tokens>>>,
}

/// What the daemon is waiting for, and what the log was told of that.
pub(super) struct Waiting {
    /// What is between the start and being ready; empty when agents are served.
    pub what: Option<String>,
    /// The section of a token whose login waits for an operator.
    pub locked: Option<&'static str>,
    pub outage: Outage,
}

impl Waiting {
    /// One line when the daemon is not ready any more, one for what is missing besides and one when it is ready again. `missing` is told,
    /// `names` says whether that is something new: a fault has many faces. What is `locked` waits for an operator, who hears at once.
    pub(super) fn tell(&mut self, missing: &[String], names: &[String], locked: &[&str]) {
        match missing {
            [] => {
                if let Some(lasted) = self.outage.ends() {
                    tracing::info!("ready again after {:.1} s", lasted.as_secs_f64());
                }
            }
            [only] if only == STARTING => {}
            _ => {
                let names = names.join(", ");
                let news = match locked {
                    [] => self.outage.goes_on(&names),
                    locked => self.outage.awaits_a_person(&format!("locked: {}", locked.join(", "))),
                };
                if news {
                    tracing::warn!(?missing, "not ready");
                }
            }
        }
    }
}

/// Directories, the ledger, the acts: what is there without a token.
pub(super) async fn open(config: &Arc<Config>) -> Result<Rooms, String> {
    let runtime = &config.paths.runtime;
    std::fs::DirBuilder::new()
        .recursive(true)
        .mode(0o750)
        .create(runtime)
        .map_err(|error| format!("{}: {error}", runtime.display()))?;
    let settings = ledger_settings(config);
    let opened = Ledger::open(&settings, Arc::new(Meter::default())).map_err(|error| error.to_string())?;
    if opened.genesis.trust_domain != config.trust_domain.as_str() {
        return Err(format!(
            "the ledger is of trust domain {}, the configuration of {}",
            opened.genesis.trust_domain, config.trust_domain
        ));
    }
    let ledger = opened.ledger;
    // Of a daemon that was killed: nobody listens there until this one does.
    let _ = std::fs::remove_file(address(config));
    let started = proto::Started { version: env!("CARGO_PKG_VERSION").to_owned(), config_hash: config.hash.0.to_vec() };
    ledger.record(Body::Started(started)).await.map_err(|refusal| format!("{refusal:?}"))?;
    if opened.closed_unknown > 0 || opened.merged_denials > 0 {
        tracing::warn!(opened.closed_unknown, opened.merged_denials, "put in order what an earlier daemon left open");
    }
    // What an operator wished while no daemon ran. What fails here the duty tries again.
    let _ = acts::unlock(&ledger, config).await;
    // Until the duty looks for the first time: by itself the service would call the whole well.
    let health = Health::default();
    health.report(false, true, false).await;
    let tls = Arc::<Tls>::default();
    Ok(Rooms {
        readiness: Readiness::new(&ledger, config.hash),
        acts: Arc::new(Acts::new(config, ledger, Crl::open(&config.paths.state), Arc::clone(&tls))),
        config: Arc::clone(config),
        health,
        tls,
        waiting: Arc::new(Mutex::new(Waiting { what: Some(STARTING.to_owned()), locked: None, outage: Outage::default() })),
        tokens: Arc::new(watch::Sender::new(None)),
    })
}

/// How the ledger is opened for a configuration.
pub(super) fn ledger_settings(config: &Config) -> Settings {
    Settings {
        state: config.paths.state.clone(),
        runtime: config.paths.runtime.clone(),
        queue_max: config.limits.ledger_queue,
        live_max: config.limits.live_certificates_per_agent,
        forget_seconds: config.limits.crl_seconds.into(),
    }
}

impl Rooms {
    /// Says what agents have to wait for; `None`: nothing any more. `locked` is the section of a token that waits for an operator.
    pub(super) fn wait_for(&self, what: Option<String>, locked: Option<&'static str>) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if waiting.what != what {
            let missing: Vec<String> = what.iter().cloned().collect();
            match &what {
                Some(what) => {
                    waiting.tell(&missing, &missing, locked.as_slice());
                    notify::waiting(what);
                }
                None => {
                    waiting.outage.ends();
                    tracing::info!("ready");
                    notify::ready();
                }
            }
            self.readiness.set_missing(missing);
            (waiting.what, waiting.locked) = (what, locked);
        }
    }

    /// The last entry, the last checkpoint, the tokens.
    pub(super) async fn close(&self, cause: &Cause) {
        let ledger = self.acts.ledger();
        let _ = std::fs::remove_file(address(&self.config));
        // What has begun ends first, so that no start has to close it as unknown.
        if !ledger.settle(SETTLE_DEADLINE).await {
            tracing::warn!("intents are open at the stop");
        }
        self.acts.seal_signatures(true);
        // The duty that does this each second has ended before the last calls did.
        if let Err(refusal) = ledger.seal_refusals().await {
            tracing::warn!(?refusal, "refusals could not be sealed");
        }
        if let Err(refusal) = ledger.stop(&cause.text()).await {
            tracing::error!(?refusal, "the stop could not be recorded");
        } else if let Err(refusal) = self.acts.checkpoint(0).await {
            tracing::warn!(?refusal, "no checkpoint at the stop");
        }
        if !ledger.finish(Duration::from_secs(5)).await {
            tracing::error!("the ledger did not come to its end in time");
        }
        let tokens = self.readiness.tokens();
        if !tokens.is_empty() {
            // Who hangs inside the module is not waited for: until the next daemon serves, nobody is served.
            let patience = if *cause == Cause::TokenStuck { Duration::ZERO } else { TOKEN_DEADLINE };
            let shut = tokio::task::spawn_blocking(move || {
                for token in tokens {
                    token.shut_down(patience);
                }
            });
            let _ = tokio::time::timeout(TOKEN_DEADLINE * 3, shut).await;
        }
    }
}

/// When a face stops taking calls. After the disk has failed both go on for a while: callers hear why they get nothing, and denials are in
/// force.
async fn end_of_service(mut stopping: watch::Receiver<Option<Cause>>) {
    let _ = stopping.wait_for(Option::is_some).await;
    let failed = *stopping.borrow() == Some(Cause::LedgerFailed);
    if failed {
        tokio::time::sleep(super::GRACE_AFTER_FAILURE).await;
    }
}

/// The operators' side: from the first moment to the last.
pub(super) async fn serve_operators(
    rooms: Rooms,
    listener: Result<UnixListener, api::ApiError>,
    stop: Arc<watch::Sender<Option<Cause>>>,
) {
    let until = end_of_service(stop.subscribe());
    let served = async {
        let (acts, readiness) = (Arc::clone(&rooms.acts), rooms.readiness.clone());
        api::serve_operators(acts, &rooms.config, listener?, readiness, &rooms.health, until).await
    };
    if let Err(error) = served.await {
        stop.send_replace(Some(Cause::Transport(error.to_string())));
    }
}

/// The agents' side: when the tokens are open, the keys bound, and the server's certificate there.
pub(super) async fn serve_agents(rooms: Rooms, modules: Modules, stop: Arc<watch::Sender<Option<Cause>>>) {
    let mut stopping = stop.subscribe();
    let prepared = async {
        let tokens = open_tokens(&rooms, Arc::new(modules), &stop).await;
        rooms.tokens.send_replace(Some(tokens.clone()));
        while let Err(what) = prepare(&rooms, &tokens).await {
            rooms.wait_for(Some(what), None);
            tokio::time::sleep(TOKEN_RETRY).await;
        }
        bind(&rooms).await
    };
    let listener = tokio::select! {
        prepared = prepared => prepared,
        _ = stopping.wait_for(Option::is_some) => return,
    };
    let served = async {
        let listener = listener?;
        rooms.wait_for(None, None);
        let certificates = tokio::spawn(duties::server_certificate(rooms.clone()));
        let crl = tokio::spawn(duties::crl(rooms.clone()));
        let checkpoints = tokio::spawn(duties::checkpoints(rooms.clone()));
        let ended_keys = tokio::spawn(duties::ended_keys(rooms.clone()));
        let keys_over = tokio::spawn(duties::keys_over(rooms.clone()));
        let rotation = tokio::spawn(duties::rotation(rooms.clone()));
        let rewrapping = tokio::spawn(duties::rewrapping(rooms.clone()));
        let until = end_of_service(stopping);
        let (acts, tls) = (Arc::clone(&rooms.acts), Arc::clone(&rooms.tls));
        let served = api::serve_agents(acts, &rooms.config, listener, tls, &rooms.health, until).await;
        for duty in [certificates, crl, checkpoints, rotation, rewrapping, ended_keys, keys_over] {
            duty.abort();
        }
        served.map_err(|error| error.to_string())
    };
    if let Err(error) = served.await {
        stop.send_replace(Some(Cause::Transport(error)));
    }
}

/// Opens the tokens one after the other, each again and again until it works; one that is open stays so while the next is tried. A login
/// that needs an operator is not tried before the operator said so.
async fn open_tokens(rooms: &Rooms, modules: Arc<Modules>, stop: &watch::Sender<Option<Cause>>) -> Tokens {
    let config = &rooms.config;
    let shared = config.agents == config.authority;
    let authority = open_at_last(rooms, &modules, TokenRole::Authority, stop).await;
    rooms.readiness.set_tokens(vec![authority.clone()]);
    if shared {
        return Tokens { agents: authority.clone(), authority, shared };
    }
    let agents = open_at_last(rooms, &modules, TokenRole::Agents, stop).await;
    rooms.readiness.set_tokens(vec![authority.clone(), agents.clone()]);
    Tokens { authority, agents, shared }
}

async fn open_at_last(rooms: &Rooms, modules: &Arc<Modules>, role: TokenRole, stop: &watch::Sender<Option<Cause>>) -> Hsm {
    loop {
        let error = match open_token(rooms, modules, role, stop).await {
            Ok(token) => return token,
            Err(error) => error,
        };
        not_open(rooms, role, &error.to_string(), error.awaits_unlock());
        tokio::time::sleep(TOKEN_RETRY).await;
        if error.needs_operator() {
            // The marker goes when the operator has corrected the PIN, and that is in the ledger.
            while hsm::pin_pending(&rooms.config.paths.state, role) {
                tokio::time::sleep(TOKEN_RETRY).await;
            }
        }
    }
}

async fn open_token(
    rooms: &Rooms,
    modules: &Arc<Modules>,
    role: TokenRole,
    stop: &watch::Sender<Option<Cause>>,
) -> Result<Hsm, hsm::Error> {
    let settings = token_settings(&rooms.config, role);
    let label = settings.token.label.clone();
    let (modules, meter) = (Arc::clone(modules), Arc::clone(rooms.acts.ledger().meter()));
    let mut opening = tokio::task::spawn_blocking(move || Hsm::open(&modules, settings, meter));
    let opened = match tokio::time::timeout(OPEN_SLOW, &mut opening).await {
        Ok(opened) => opened,
        Err(_) => {
            not_open(
                rooms,
                role,
                &format!("token {label:?} is not open after {OPEN_SLOW:?}: its PKCS#11 module may hang"),
                false,
            );
            match tokio::time::timeout(OPEN_DEADLINE - OPEN_SLOW, opening).await {
                Ok(opened) => opened,
                Err(_) => {
                    // Nobody has a key yet, and the thread in there holds what another attempt would need.
                    stop.send_replace(Some(Cause::TokenStuck));
                    return Err(hsm::Error::Stuck);
                }
            }
        }
    };
    opened.unwrap_or(Err(hsm::Error::ShutDown))
}

/// Says why a token is not there yet; the one after it is not there without it.
fn not_open(rooms: &Rooms, role: TokenRole, fault: &str, locked: bool) {
    let config = &rooms.config;
    let shared = config.agents == config.authority;
    let roles = match role {
        TokenRole::Authority | TokenRole::Unspecified if !shared => vec![TokenRole::Authority, TokenRole::Agents],
        one => vec![one],
    };
    let waits = format!("not open: it waits for {}", section(role));
    // A marker is there during a login, too: of the token that was tried the answer tells, of one that waits nobody tries a login.
    let told = |one| if one == role { (fault, locked) } else { (&*waits, hsm::pin_pending(&config.paths.state, one)) };
    let pending = roles.into_iter().map(|one| pending(config, one, told(one))).collect();
    rooms.readiness.set_pending_tokens(pending);
    rooms.wait_for(Some(out_of_service(role, fault, locked)), locked.then(|| section(role)));
}

/// Why there is no signature of a token, and whether that ends by itself: of one that is locked the fault says what to do. (The marker of
/// a login does not tell: it is there during each one.)
pub(super) fn out_of_service(role: TokenRole, fault: &str, locked: bool) -> String {
    let next = if locked { "" } else { "; it is tried again by itself" };
    format!("{}: the token is out of service: {fault}{next}", section(role))
}

/// How a token is opened for a configuration.
pub(super) fn token_settings(config: &Config, role: TokenRole) -> hsm::Settings {
    let token = match role {
        TokenRole::Agents => &config.agents,
        TokenRole::Authority | TokenRole::Unspecified => &config.authority,
    };
    hsm::Settings {
        token: token.clone(),
        role,
        for_agents: role == TokenRole::Agents || config.agents == config.authority,
        state: config.paths.state.clone(),
        queue: config.limits.hsm_queue,
        sign_deadline: Duration::from_millis(config.limits.sign_deadline_ms),
    }
}

fn pending(config: &Config, role: TokenRole, (fault, pin_pending): (&str, bool)) -> proto::TokenStatus {
    let token = if role == TokenRole::Agents { &config.agents } else { &config.authority };
    proto::TokenStatus {
        role: role.into(),
        module: token.module.display().to_string(),
        label: token.label.clone(),
        fault: fault.to_owned(),
        faults: vec![proto::TokenFault { fault: fault.to_owned(), count: 1, last_unix_seconds: UnixTime::wall().seconds() }],
        pin_pending,
        ..proto::TokenStatus::default()
    }
}

/// Keys, authorities, the server's certificate.
async fn prepare(rooms: &Rooms, tokens: &Tokens) -> Result<(), String> {
    let acts = &rooms.acts;
    let told = |refusal: crate::model::Refusal| format!("{refusal:?}");
    let abandoned = acts.give_up_interrupted_keys(tokens).await.map_err(told)?;
    if abandoned > 0 {
        tracing::warn!(abandoned, "keys that a crash left half made were given up");
    }
    let authorities = Authorities::load(acts.ledger(), tokens.clone(), None).await.map_err(told)?;
    acts.set_authorities(authorities).map_err(told)?;
    acts.keep_authority_files().await;
    // Certificates do not wait for it: without it agents' keys live in sessions or in the token, visibly.
    let wrapping = acts.ensure_wrapping(tokens).await.unwrap_or_else(|refusal| {
        tracing::warn!(?refusal, "there is no wrapping key until the next start");
        None
    });
    tokens.agents.set_unwrapped_max(rooms.config.limits.keys_cached);
    acts.set_key_token(KeyToken::new(tokens.agents.clone(), wrapping));
    acts.serve_certificate().await.map(drop).map_err(told)
}

fn address(config: &Config) -> PathBuf {
    config.paths.runtime.join("address")
}

/// Binds TCP, and tells where: join files and `<runtime>/address` carry it.
async fn bind(rooms: &Rooms) -> Result<TcpListener, String> {
    let config = &rooms.config;
    let listener = TcpListener::bind(config.listen.tcp).await.map_err(|error| format!("{}: {error}", config.listen.tcp))?;
    let bound = listener.local_addr().map_err(|error| error.to_string())?;
    let addresses: Vec<String> = if config.listen.names.is_empty() {
        vec![bound.to_string()]
    } else {
        config.listen.names.iter().map(|name| with_port(name, bound.port())).collect()
    };
    let path = address(config);
    std::fs::write(&path, format!("{bound}\n")).map_err(|error| format!("{}: {error}", path.display()))?;
    rooms.acts.set_addresses(addresses.clone());
    rooms.readiness.set_listen(addresses);
    Ok(listener)
}

/// An IPv6 address needs brackets before a port.
fn with_port(name: &str, port: u16) -> String {
    match name.parse::<std::net::Ipv6Addr>() {
        Ok(address) => format!("[{address}]:{port}"),
        Err(_) => format!("{name}:{port}"),
    }
}

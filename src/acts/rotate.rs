//! Authorities replace themselves. Each arrow of a generation's life (planned, prepublished, active, retiring, retired, destroyed) is one
//! entry; what an arrow needs beside it (a key, a certificate, a CRL, a checkpoint by two keys) is there before. A crash anywhere leaves a
//! generation in one of these states, and the next look goes on from there; objects without a generation cannot come about, because a key
//! is intended under its id first.

use crate::authn::Operator;
use crate::hsm::SigningKey;
use crate::ledger::{Generation, KeyRow};
use crate::model::{KeyId, Reason, Refusal, UnixTime, hex};
use crate::proto::{self, AuthorityState as State, AuthorityStepped, Purpose, TokenRole, entry::Body};

use super::Acts;
use super::authorities::Authorities;
use super::certify::{certify_issuing, certify_root};
use super::due::{self, Arrow, Terms};
use super::keys::Tokens;
use super::{hsm_refusal, keys};

/// An operator has no further one made while so many of a purpose are trusted: each signs a CRL at every denial, and is tried at every
/// handshake.
const TRUSTED_MAX: usize = 16;

/// Who wants an authority replaced, and how soon.
pub(super) struct Wish<'a> {
    pub by: Option<proto::Operator>,
    pub now: bool,
    pub cause: &'a str,
}

/// What is to be done for an authority now.
enum Due {
    /// The next arrow of its life.
    Arrow { of: Generation, to: State },
    /// The outside root is to be asked for its certificate.
    Request(Generation),
    /// There is to be one of the purpose, and there is none.
    First(Purpose),
}

impl Due {
    /// Of a first one there is no generation yet.
    fn of(&self) -> Option<&Generation> {
        match self {
            Self::Arrow { of, .. } | Self::Request(of) => Some(of),
            Self::First(_) => None,
        }
    }

    fn purpose(&self) -> Purpose {
        match self {
            Self::Arrow { of, .. } | Self::Request(of) => of.purpose,
            Self::First(purpose) => *purpose,
        }
    }

    /// Whether it is about a key that is yet to be made.
    fn makes(&self) -> bool {
        match self {
            Self::Arrow { of, to } => of.state == State::Planned || *to == State::Retiring,
            Self::Request(_) | Self::First(_) => true,
        }
    }

    /// Whether `next` has to wait for another look because this has failed: all of the same generation; and, where one to come has failed,
    /// the making of another in its place, which would be given up as this was, over and over.
    fn holds_up(&self, next: &Self) -> bool {
        let is_same = self.of().is_some_and(|of| next.of().is_some_and(|next| next.key_id == of.key_id));
        let was_for_one_to_come = self.makes() || self.of().is_some_and(Generation::is_coming);
        is_same || was_for_one_to_come && next.makes() && next.purpose() == self.purpose()
    }
}

/// What came of one look at all that is due.
#[derive(Default)]
pub(super) struct Looked {
    taken: bool,
    failed: Vec<(Due, Refusal)>,
}

impl Looked {
    fn holds_up(&self, next: &Due) -> bool {
        self.failed.iter().any(|(failed, _)| failed.holds_up(next))
    }

    fn note(&mut self, due: Due, done: Result<(), Refusal>) {
        let Err(refusal) = done else {
            self.taken |= matches!(due, Due::Arrow { .. });
            return;
        };
        let (purpose, key) = (keys::name(due.purpose()), due.of().map(|of| tracing::field::display(of.key_id)));
        match &due {
            Due::Arrow { to, .. } => tracing::warn!(purpose, key, ?to, ?refusal, "an arrow was not taken"),
            Due::Request(_) => tracing::warn!(purpose, key, ?refusal, "the outside root could not be asked"),
            Due::First(_) => tracing::warn!(purpose, ?refusal, "an authority could not be planned"),
        }
        self.failed.push((due, refusal));
    }

    /// Whether an arrow was taken; the first that failed is the error.
    fn whole(self) -> Result<bool, Refusal> {
        self.failed.into_iter().next().map_or(Ok(self.taken), |(_, refusal)| Err(refusal))
    }

    /// The same of one generation, whatever became of the others.
    pub(super) fn of(self, key_id: &KeyId) -> Result<(), Refusal> {
        let its = |(due, _): &(Due, Refusal)| due.of().is_some_and(|of| of.key_id == *key_id);
        self.failed.into_iter().find(its).map_or(Ok(()), |(_, refusal)| Err(refusal))
    }
}

impl Acts {
    /// Takes every arrow that is due, until none is. One that fails holds up only what follows from it. Answers whether any was taken.
    ///
    /// # Errors
    /// The first that failed: `HSM_UNAVAILABLE`, `LEDGER_UNAVAILABLE`, `CLOCK_UNTRUSTED`. It is due again at the next look.
    pub async fn rotate_due(&self) -> Result<bool, Refusal> {
        let _one = self.rotating.lock().await;
        self.catch_up_files().await;
        let served = self.keep_server_trusted().await;
        let taken = self.take_arrows().await?.whole()?;
        served.map(|()| taken)
    }

    pub(super) async fn take_arrows(&self) -> Result<Looked, Refusal> {
        let mut looked = Looked::default();
        loop {
            let now = self.trusted_now()?;
            self.follow_the_ledger().await?;
            // Looked at anew after each: one decides on the next.
            let (all, _) = self.ledger.generations();
            let due = self.all_due(&all, now).find(|due| !looked.holds_up(due));
            // The file of the daemon before is there until there is another, or none is to be had.
            if !matches!(due, Some(Due::Request(_))) {
                self.keep_request_file().await;
            }
            let Some(due) = due else { return Ok(looked) };
            let done = match &due {
                Due::Arrow { of, to } => self.take(of, *to, &all).await,
                Due::Request(of) => {
                    let asked = self.ask_the_root(of).await;
                    self.keep_request_file().await;
                    asked
                }
                Due::First(purpose) => {
                    let wish = Wish { by: None, now: false, cause: "there is none" };
                    self.plan(*purpose, wish).await.map(drop)
                }
            };
            looked.note(due, done);
        }
    }

    /// Everything that is due now, in the order in which it is done.
    fn all_due<'a>(&'a self, all: &'a [Generation], now: UnixTime) -> impl Iterator<Item = Due> + 'a {
        let terms = self.terms(now);
        let first = (!terms.paused && due::lacks_token_signing(all)).then_some(Due::First(Purpose::TokenSigning));
        let request = self.awaiting_the_root().filter(|_| self.request().is_none()).map(Due::Request);
        let arrows = all.iter().filter_map(move |of| {
            let arrow = due::next(of, all, &terms).filter(|arrow| arrow.is_due(&terms))?;
            Some(Due::Arrow { of: of.clone(), to: arrow.to })
        });
        request.into_iter().chain(arrows).chain(first)
    }

    fn terms(&self, now: UnixTime) -> Terms<'_> {
        Terms {
            rotation: &self.rotation,
            ttl_seconds_longest: self.ttl_seconds_longest(),
            paused: self.is_rotation_paused(),
            now,
            freed: self.keys.freed(),
        }
    }

    /// Whether nothing is rotated but what is tainted.
    #[must_use]
    pub fn is_rotation_paused(&self) -> bool {
        self.rotation.paused || self.ledger.is_rotation_paused()
    }

    async fn take(&self, of: &Generation, to: State, all: &[Generation]) -> Result<(), Refusal> {
        match to {
            State::Retiring => {
                let cause = match () {
                    () if of.tainted => "tainted",
                    () if due::its_root_goes(of, all) => "its root was replaced",
                    () if !due::is_in_force(of, self.clock().reckoned()) => "its certificate is not in force",
                    () => "age",
                };
                self.plan(of.purpose, Wish { by: None, now: cause != "age", cause }).await.map(drop)
            }
            State::Prepublished => self.prepublish(of).await,
            State::Active => self.activate(of).await,
            State::Retired => self.retire(of, "").await,
            State::Destroyed => self.destroy(of).await,
            State::Planned | State::Unspecified => Ok(()),
        }
    }

    /// The key that agents' keys are wrapped under; made, or taken up, where there is none yet. `None` where the token cannot wrap.
    ///
    /// # Errors
    /// `HSM_UNAVAILABLE`, `LEDGER_UNAVAILABLE`.
    pub async fn ensure_wrapping(&self, tokens: &Tokens) -> Result<Option<KeyId>, Refusal> {
        let _one = self.rotating.lock().await;
        keys::ensure_wrapping(&self.ledger, tokens).await
    }

    /// Puts in order what was open when the daemon started, while no authority is being made.
    ///
    /// # Errors
    /// `HSM_UNAVAILABLE`, `LEDGER_UNAVAILABLE`.
    pub async fn give_up_interrupted_keys(&self, tokens: &Tokens) -> Result<usize, Refusal> {
        let _one = self.rotating.lock().await;
        keys::reconcile(&self.ledger, tokens).await
    }

    /// An operator wants an authority replaced. Goes as far as it can go now; gives the new generation's key, and whether it was on its way
    /// as soon as this before.
    ///
    /// # Errors
    /// `MALFORMED_REQUEST` for a purpose that does not rotate, `NO_SUCH_AUTHORITY_HERE`, `ROTATION_PAUSED`, `ROTATION_UNDER_WAY` (without `now`,
    /// or for too many), and those of its own arrows: what was planned stays planned, but one whose key the token has lost (`KEY_LOST`).
    pub async fn rotate(&self, operator: &Operator, purpose: Purpose, now: bool, reason: &str) -> Result<(KeyId, bool), Refusal> {
        use Purpose::{Issuing, Ledger, Root, TokenSigning, Wrapping};
        if !matches!(purpose, Root | Issuing | Ledger | TokenSigning | Wrapping) {
            let advice = "name one that rotates: root, issuing, ledger, token-signing or wrapping";
            return Err(Refusal::new(Reason::MalformedRequest, advice));
        }
        if self.is_rotation_paused() {
            return Err(Refusal::new(Reason::RotationPaused, "the rotation is paused; see `keyward ca resume`"));
        }
        let _one = self.rotating.lock().await;
        let (all, _) = self.ledger.generations();
        if purpose == Purpose::Root && all.iter().any(|root| root.state == State::Active && root.is_outside()) {
            let advice = "the root is outside: `keyward ca rotate issuing`, and give a new root with `keyward ca adopt`";
            return Err(Refusal::new(Reason::NoSuchAuthorityHere, advice));
        }
        if purpose == Wrapping && !self.authorities()?.tokens().agents.capabilities().wrapped_keys {
            let advice =
                "the agents' token cannot wrap keys (`keyward hsm status`): they live in it, and there is nothing to rotate";
            return Err(Refusal::new(Reason::NoSuchAuthorityHere, advice));
        }
        let are_many = || all.iter().filter(|found| found.purpose == purpose && found.is_trusted()).count() >= TRUSTED_MAX;
        let wish = Wish { by: Some(operator.signs(reason)), now, cause: "asked for" };
        let (key_id, already) = match all.iter().find(|found| found.purpose == purpose && found.is_coming()) {
            Some(coming) if now && coming.now => (coming.key_id, true),
            Some(coming) if now => {
                self.record_step(AuthorityStepped { to: coming.state.into(), ..step(coming, &wish) }).await?;
                (coming.key_id, false)
            }
            None if are_many() => {
                let advice = format!("{TRUSTED_MAX} of this purpose are in service already; wait until the oldest has retired");
                return Err(Refusal::new(Reason::RotationUnderWay, advice));
            }
            _ => (self.plan(purpose, wish).await?, false),
        };
        self.take_arrows().await?.of(&key_id)?;
        Ok((key_id, already))
    }

    /// A key may be in other hands. Goes as far as it can go now; gives the entry.
    ///
    /// # Errors
    /// `AUTHORITY_UNKNOWN`; `LEDGER_UNAVAILABLE`. With the index of its entry, those of the arrows that could not be taken: the taint stands, and
    /// is acted on when they can.
    pub async fn taint(&self, operator: &Operator, key_id: &[u8], reason: &str) -> Result<u64, Refusal> {
        let _one = self.rotating.lock().await;
        let tainted = proto::AuthorityTainted { by: Some(operator.signs(reason)), key_id: key_id.to_vec() };
        let index = self.ledger.record(Body::AuthorityTainted(tainted)).await?;
        tracing::warn!(index, key = hex(key_id), "an authority is tainted");
        let acted_on = self.take_arrows().await.and_then(|taken| taken.whole());
        acted_on.map(|_| index).map_err(|mut refusal| {
            refusal.advice =
                format!("the taint stands, and is acted on as soon as can be (`keyward ca list`); {}", refusal.advice);
            refusal.recorded_at(index)
        })
    }

    /// No arrow is taken until the resumption, but those that follow from a taint. Gives the entry; none where an operator holds it up
    /// already.
    ///
    /// # Errors
    /// `LEDGER_UNAVAILABLE`.
    pub async fn pause_rotation(&self, operator: &Operator, reason: &str) -> Result<Option<u64>, Refusal> {
        let _one = self.rotating.lock().await;
        if self.ledger.is_rotation_paused() {
            return Ok(None);
        }
        let paused = proto::RotationPaused { by: Some(operator.signs(reason)) };
        self.ledger.record(Body::RotationPaused(paused)).await.map(Some)
    }

    /// Arrows are taken again. Gives the entry; none where nobody holds it up.
    ///
    /// # Errors
    /// `LEDGER_UNAVAILABLE`; `ROTATION_PAUSED` when it is the configuration that holds it up.
    pub async fn resume_rotation(&self, operator: &Operator, reason: &str) -> Result<Option<u64>, Refusal> {
        if self.rotation.paused {
            let advice = "the configuration holds it up: [rotation] paused; change it and restart the daemon";
            return Err(Refusal::new(Reason::RotationPaused, advice));
        }
        let _one = self.rotating.lock().await;
        if !self.ledger.is_rotation_paused() {
            return Ok(None);
        }
        let resumed = proto::RotationResumed { by: Some(operator.signs(reason)) };
        self.ledger.record(Body::RotationResumed(resumed)).await.map(Some)
    }

    /// A generation to come, under an id that is nobody's yet.
    async fn plan(&self, purpose: Purpose, wish: Wish<'_>) -> Result<KeyId, Refusal> {
        let key_id = KeyId::random();
        let body = AuthorityStepped {
            purpose: purpose.into(),
            key_id: key_id.0.to_vec(),
            to: State::Planned.into(),
            by: wish.by,
            now: wish.now,
            cause: wish.cause.to_owned(),
            ..AuthorityStepped::default()
        };
        self.record_step(body).await?;
        Ok(key_id)
    }

    /// Its key, made if there is none. A crash while it is made leaves an open key intent: the key is then given up, and the generation with it.
    pub(super) async fn key_of(&self, of: &Generation) -> Result<Option<SigningKey>, Refusal> {
        let authorities = self.authorities()?;
        let tokens = authorities.tokens();
        let known = keys::rows(&self.ledger).await?.into_iter().find(|row| row.id == of.key_id);
        let public = match known {
            None => keys::make(&self.ledger, tokens, of.purpose, TokenRole::Authority, of.key_id).await?,
            Some(KeyRow { public: Some(public), .. }) => public,
            // This one alone: others may be in the making.
            Some(interrupted) => {
                keys::give_up(&self.ledger, tokens, &interrupted).await?;
                return Ok(None);
            }
        };
        tokens.of(TokenRole::Authority).key(of.key_id, public).await.map(Some).map_err(hsm_refusal)
    }

    /// Its key, looked for in the token now. One that the token has lost for certain never signs: its generation is given up, which is the
    /// error, and another one planned.
    pub(super) async fn key_to_come(&self, of: &Generation) -> Result<Option<SigningKey>, Refusal> {
        match self.key_of(of).await {
            Ok(key) => Ok(key),
            Err(refusal) => Err(self.given_up_if_gone(of, refusal).await?),
        }
    }

    /// What is to be told of a key to come that could not be had. Away is not gone: of a token that cannot be asked nothing is given up.
    async fn given_up_if_gone(&self, of: &Generation, refusal: Refusal) -> Result<Refusal, Refusal> {
        let token = self.authorities()?.tokens().of(keys::role_of(of.purpose)).clone();
        if !token.is_gone(of.key_id).await.unwrap_or(false) {
            return Ok(refusal);
        }
        let cause = "its key is not in the token any more";
        tracing::error!(purpose = keys::name(of.purpose), key = %of.key_id, "an authority that was to come is given up: {cause}");
        if of.state == State::Planned {
            let wish = Wish { by: None, now: of.now, cause };
            self.record_step(AuthorityStepped { to: State::Destroyed.into(), ..step(of, &wish) }).await?;
        } else {
            self.retire(of, cause).await?;
        }
        // A crash before this: what is due by age is planned again by itself, what was asked for is asked for again.
        self.plan(of.purpose, Wish { by: None, now: of.now, cause: "the token lost the key of the one before" }).await?;
        Ok(Refusal::new(Reason::KeyLost, "the token has lost its key; another one is planned, see `keyward ca list`"))
    }

    /// The same of a wrapping key, which signs nothing: whether it is there.
    async fn has_wrapping_key(&self, of: &Generation) -> Result<bool, Refusal> {
        let authorities = self.authorities()?;
        let known = keys::rows(&self.ledger).await?.into_iter().find(|row| row.id == of.key_id);
        match known {
            None => keys::make_wrapping(&self.ledger, authorities.tokens(), of.key_id).await?,
            Some(row) if row.active => {}
            Some(interrupted) => {
                keys::give_up(&self.ledger, authorities.tokens(), &interrupted).await?;
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Key and certificate are there: peers may trust it from now on.
    async fn prepublish(&self, of: &Generation) -> Result<(), Refusal> {
        if of.purpose == Purpose::Wrapping {
            if !self.has_wrapping_key(of).await? {
                return Ok(());
            }
            let made = step(of, &Wish { by: None, now: of.now, cause: "" });
            return self.record_step(AuthorityStepped { to: State::Prepublished.into(), ..made }).await;
        }
        let Some(key) = self.key_to_come(of).await? else { return Ok(()) };
        let now = self.trusted_now()?;
        let (certificate, intent, issuer) = match of.purpose {
            Purpose::Root => {
                let (certificate, intent) = certify_root(&self.ledger, &self.domain, &key, now).await?;
                (certificate, intent, None)
            }
            Purpose::Issuing => {
                let root = self.authorities()?.root().ok_or_else(|| Refusal::internal("the root is outside"))?;
                let (certificate, intent) = certify_issuing(&self.ledger, &self.domain, &key, &root, now).await?;
                (certificate, intent, Some(root.key().id()))
            }
            _ => (Vec::new(), 0, None),
        };
        // A crash before this leaves a certificate that nobody was given; the next look has another one signed.
        let body = AuthorityStepped {
            to: State::Prepublished.into(),
            certificate,
            intent,
            issuer: issuer.map(|id| id.0.to_vec()).unwrap_or_default(),
            ..step(of, &Wish { by: None, now: of.now, cause: "" })
        };
        self.record_step(body).await
    }

    /// From this entry on it signs, and the one before it does not.
    async fn activate(&self, of: &Generation) -> Result<(), Refusal> {
        let authorities = self.authorities()?;
        // Looked for anew: what is active has to be there at every start.
        if of.purpose == Purpose::Wrapping {
            if let Err(error) = authorities.tokens().agents.find_wrapping(of.key_id).await {
                return Err(self.given_up_if_gone(of, hsm_refusal(error)).await?);
            }
        } else if !of.is_outside() {
            let found = authorities.tokens().of(TokenRole::Authority).find(of.key_id).await.map_err(hsm_refusal)?;
            if !found.iter().any(|object| object.private) {
                self.key_to_come(of).await?;
            }
            if authorities.key(&of.key_id).is_none() {
                return Err(Refusal::new(Reason::HsmUnavailable, "the token could not find its key; it is looked for again"));
            }
        }
        let checkpoint = match of.purpose {
            // Who follows CRLs has one of it before a certificate.
            Purpose::Issuing => {
                let issuing = authorities.issuing_trusted().iter().find(|issuing| issuing.key().id() == of.key_id);
                self.publish_first_crl(issuing.ok_or_else(|| Refusal::internal("its key is bound without a certificate"))?)
                    .await?;
                String::new()
            }
            // Who trusts the old key learns of the new one by the old one's signature.
            Purpose::Ledger => self.sign_checkpoint(Some(&of.key_id)).await?.1,
            _ => String::new(),
        };
        let before = authorities.generations().iter().find(|found| found.purpose == of.purpose && found.state == State::Active);
        let body = AuthorityStepped {
            to: State::Active.into(),
            replaces: before.map(|before| before.key_id.0.to_vec()).unwrap_or_default(),
            checkpoint,
            ..step(of, &Wish { by: None, now: of.now, cause: "" })
        };
        self.record_step(body).await?;
        if of.purpose == Purpose::Issuing {
            self.keep_crls().await;
        }
        Ok(())
    }

    /// It is not trusted any more; nothing that it signed is in force.
    async fn retire(&self, of: &Generation, cause: &str) -> Result<(), Refusal> {
        if of.purpose == Purpose::Root {
            // Nobody would know the server any more.
            self.keep_server_trusted().await?;
        }
        self.record_step(AuthorityStepped { to: State::Retired.into(), ..step(of, &Wish { by: None, now: false, cause }) })
            .await?;
        if of.purpose != Purpose::Issuing {
            return Ok(());
        }
        // A crash here, or a failure: the next start has another one signed in any case, the next look tries again.
        let served = self.keep_server_trusted().await;
        self.keep_crls().await;
        served
    }

    /// The server's certificate is of an authority that is trusted, and in force, or another one is put into service: before its root can go.
    async fn keep_server_trusted(&self) -> Result<(), Refusal> {
        let Some(served) = self.served.load_full() else { return Ok(()) };
        let (now, next) = (self.clock().reckoned(), self.authorities()?.issuing_for_server());
        let (all, _) = self.ledger.generations();
        let issuer = all.iter().find(|found| found.key_id == served.issuer && found.is_trusted());
        // The clock was set, or its authority did not last: another one may do better.
        let in_force = served.not_before <= now && now < served.not_after;
        let well = in_force && issuer.is_some_and(|found| next.key().id() == served.issuer || due::is_in_force(found, now));
        if well { Ok(()) } else { self.serve_certificate().await.map(drop) }
    }

    /// The objects of our own retired generation are destroyed. A crash between the token and the entry: done again, of nothing.
    async fn destroy(&self, of: &Generation) -> Result<(), Refusal> {
        let objects_destroyed = match of.is_outside() {
            true => 0,
            false => {
                let authorities = self.authorities()?;
                authorities.tokens().of(keys::role_of(of.purpose)).destroy(of.key_id).await.map_err(hsm_refusal)?
            }
        };
        let wish = Wish { by: None, now: false, cause: "" };
        self.record_step(AuthorityStepped { to: State::Destroyed.into(), objects_destroyed, ..step(of, &wish) }).await
    }

    /// The entry, then everything that goes by what it says.
    pub(super) async fn record_step(&self, body: AuthorityStepped) -> Result<(), Refusal> {
        let (purpose, to, key) = (body.purpose(), body.to(), hex(&body.key_id));
        let index = self.ledger.record(Body::AuthorityStepped(body)).await?;
        tracing::info!(index, purpose = keys::name(purpose), key, to = to.as_str_name(), "an authority has moved on");
        self.follow_the_ledger().await
    }

    /// The authorities are what the ledger says.
    async fn follow_the_ledger(&self) -> Result<(), Refusal> {
        let current = self.authorities()?;
        let (generations, _) = self.ledger.generations();
        self.keys.wrap_under_the_active(&generations);
        if current.generations() == generations && current.is_whole() {
            return Ok(());
        }
        let next = Authorities::load(&self.ledger, current.tokens().clone(), Some(&current)).await?;
        if next.is_as(&current) {
            return Ok(());
        }
        self.set_authorities(next)?;
        self.write_authority_files().await;
        Ok(())
    }

    /// All generations, for people, with what each waits for.
    #[must_use]
    pub fn generations(&self) -> Vec<(Generation, Option<Arrow>)> {
        let (all, _) = self.ledger.generations();
        let terms = self.terms(self.clock().reckoned());
        all.iter().map(|of| (of.clone(), due::next(of, &all, &terms))).collect()
    }
}

/// An entry about a generation that is there.
pub(super) fn step(of: &Generation, wish: &Wish<'_>) -> AuthorityStepped {
    AuthorityStepped {
        purpose: of.purpose.into(),
        key_id: of.key_id.0.to_vec(),
        by: wish.by.clone(),
        now: wish.now,
        cause: wish.cause.to_owned(),
        ..AuthorityStepped::default()
    }
}

//! Key pairs: templates, reading back, finding, signing, destroying. What concerns token objects runs on the admin lane.

use std::collections::BTreeMap;

use cryptoki::mechanism::eddsa::{EddsaParams, EddsaSignatureScheme};
use cryptoki::mechanism::rsa::{PkcsMgfType, PkcsPssParams};
use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::{Session, SessionState};

use super::agent_keys::LABEL;
use super::der;
use super::error::Error;
use super::faults::{Outcome, Place};
use super::keyring::{Bound, Form};
use super::{Found, Held};
use crate::model::{Algorithm, KeyId, PublicKey, ecdsa_sig_value};

/// What a test signature signs starts with this and ends with 16 random bytes. No certificate, CRL or checkpoint starts so, and no message
/// of a profile of agents' keys: a test signature is good for nothing.
const TEST_TAG: &[u8] = b"keyward/hsm/test/v1\0";

/// CKA_MODULUS_BITS of every RSA key here. More would be slower to make by far, and no version of a key lives for long.
const RSA_BITS: u64 = 2048;
/// CKA_PUBLIC_EXPONENT: 65537.
const RSA_EXPONENT: [u8; 3] = [1, 0, 1];

/// How C_GenerateKeyPair is asked.
pub(super) struct Wanted<'a> {
    pub(super) algorithm: Algorithm,
    /// CKA_EC_PARAMS; of no meaning for RSA.
    pub(super) params: &'a [u8],
    pub(super) id: &'a [u8],
    pub(super) label: &'a str,
    /// A token object, or one that dies with the session.
    pub(super) durable: bool,
    /// Whether the private key may be wrapped.
    pub(super) extractable: bool,
}

impl Wanted<'_> {
    fn mechanism(&self) -> (Mechanism<'static>, KeyType) {
        match self.algorithm {
            Algorithm::P256 | Algorithm::P384 => (Mechanism::EccKeyPairGen, KeyType::EC),
            Algorithm::Ed25519 => (Mechanism::EccEdwardsKeyPairGen, KeyType::EC_EDWARDS),
            Algorithm::Ps256 => (Mechanism::RsaPkcsKeyPairGen, KeyType::RSA),
        }
    }

    fn both_halves(&self, class: ObjectClass, key_type: KeyType) -> Vec<Attribute> {
        vec![
            Attribute::Class(class),
            Attribute::KeyType(key_type),
            Attribute::Token(self.durable),
            // What can be wrapped is made unextractable as soon as that is done.
            Attribute::Modifiable(self.extractable),
            Attribute::Copyable(false),
            Attribute::Id(self.id.to_vec()),
            Attribute::Label(self.label.as_bytes().to_vec()),
            Attribute::Derive(false),
        ]
    }

    /// C_GenerateKeyPair with every attribute explicit, since defaults differ between tokens (SoftHSM: SENSITIVE = false;
    /// NSS: EXTRACTABLE = true). Returns public and private handle.
    pub(super) fn generate(&self, session: &Session) -> Result<(ObjectHandle, ObjectHandle), Error> {
        let (mechanism, key_type) = self.mechanism();
        let mut public = self.both_halves(ObjectClass::PUBLIC_KEY, key_type);
        public.extend(match self.algorithm {
            Algorithm::Ps256 => {
                vec![Attribute::ModulusBits(RSA_BITS.into()), Attribute::PublicExponent(RSA_EXPONENT.to_vec())]
            }
            Algorithm::P256 | Algorithm::P384 | Algorithm::Ed25519 => vec![Attribute::EcParams(self.params.to_vec())],
        });
        public.extend([Attribute::Private(false), Attribute::Verify(true), Attribute::Encrypt(false), Attribute::Wrap(false)]);
        let mut private = self.both_halves(ObjectClass::PRIVATE_KEY, key_type);
        private.extend([
            Attribute::Private(true),
            Attribute::Sensitive(true),
            Attribute::Extractable(self.extractable),
            Attribute::Sign(true),
            Attribute::SignRecover(false),
            Attribute::Decrypt(false),
            Attribute::Unwrap(false),
        ]);
        session.generate_key_pair(&mechanism, &public, &private).map_err(|error| Error::at(Place::Generate, error))
    }
}

/// One attribute; `None` where the token has none. Asked for one by one: the wrapper drops what is unavailable from a list, and
/// one odd value fails the whole list.
fn attribute(session: &Session, object: ObjectHandle, kind: AttributeType) -> Result<Option<Attribute>, Error> {
    Ok(session.get_attributes(object, &[kind]).map_err(|error| Error::at(Place::Search, error))?.pop())
}

fn bytes(session: &Session, object: ObjectHandle, kind: AttributeType) -> Result<Option<Vec<u8>>, Error> {
    Ok(match attribute(session, object, kind)? {
        Some(
            Attribute::EcPoint(value) | Attribute::EcParams(value) | Attribute::Modulus(value) | Attribute::PublicExponent(value),
        ) => Some(value),
        _ => None,
    })
}

/// Promise 1, read back from the token and not only asked for.
pub(super) fn check_private(session: &Session, object: ObjectHandle, (id, algorithm): (KeyId, Algorithm)) -> Result<(), Error> {
    let wanted = [
        ("CKA_SENSITIVE", AttributeType::Sensitive, true),
        ("CKA_EXTRACTABLE", AttributeType::Extractable, false),
        ("CKA_NEVER_EXTRACTABLE", AttributeType::NeverExtractable, true),
        ("CKA_LOCAL", AttributeType::Local, true),
        ("CKA_SIGN", AttributeType::Sign, true),
    ];
    check(session, object, id, &wanted)?;
    check_signs_alone(session, object, (id, algorithm))?;
    // A key that wants a PIN for each signature cannot be used by a daemon. Tokens without the attribute do not want one.
    match attribute(session, object, AttributeType::AlwaysAuthenticate) {
        Ok(Some(Attribute::AlwaysAuthenticate(true))) => {
            Err(Error::Attribute { id, attribute: "CKA_ALWAYS_AUTHENTICATE", found: "true".into(), wanted: false })
        }
        _ => Ok(()),
    }
}

/// What an RSA key decrypts is a signature without padding, and so is good for one with any: it does nothing but sign.
fn check_signs_alone(session: &Session, object: ObjectHandle, (id, algorithm): (KeyId, Algorithm)) -> Result<(), Error> {
    const WANTED: [Flag; 2] = [("CKA_DECRYPT", AttributeType::Decrypt, false), ("CKA_UNWRAP", AttributeType::Unwrap, false)];
    if algorithm == Algorithm::Ps256 { check(session, object, id, &WANTED) } else { Ok(()) }
}

/// A flag's name, its attribute, and what it has to be.
pub(super) type Flag = (&'static str, AttributeType, bool);

/// Reads flags back from the token: what was asked for is no proof.
pub(super) fn check(session: &Session, object: ObjectHandle, id: KeyId, wanted: &[Flag]) -> Result<(), Error> {
    for &(attribute_name, kind, wanted) in wanted {
        let found = match attribute(session, object, kind)? {
            Some(
                Attribute::Sensitive(value)
                | Attribute::Extractable(value)
                | Attribute::NeverExtractable(value)
                | Attribute::Local(value)
                | Attribute::Sign(value)
                | Attribute::Wrap(value)
                | Attribute::Unwrap(value)
                | Attribute::Encrypt(value)
                | Attribute::Decrypt(value),
            ) => Some(value),
            _ => None,
        };
        if found != Some(wanted) {
            let found = found.map_or_else(|| "absent".into(), |value| value.to_string());
            return Err(Error::Attribute { id, attribute: attribute_name, found, wanted });
        }
    }
    Ok(())
}

/// What the object of a wrapped key has to be: extractable no longer.
pub(super) fn check_unextractable(session: &Session, object: ObjectHandle, key: (KeyId, Algorithm)) -> Result<(), Error> {
    const WANTED: [Flag; 3] = [
        ("CKA_SENSITIVE", AttributeType::Sensitive, true),
        ("CKA_EXTRACTABLE", AttributeType::Extractable, false),
        ("CKA_SIGN", AttributeType::Sign, true),
    ];
    check(session, object, key.0, &WANTED)?;
    check_signs_alone(session, object, key)
}

/// Whether the label says that it is an agent's key.
fn is_agents(session: &Session, object: ObjectHandle) -> Result<bool, Error> {
    let label = attribute(session, object, AttributeType::Label)?;
    Ok(matches!(label, Some(Attribute::Label(label)) if label.starts_with(LABEL.as_bytes())))
}

/// Every token object of this id is an agent's by its label.
pub(super) fn check_labels(session: &Session, id: KeyId) -> Result<(), Error> {
    for object in search(session, id, None)? {
        if !is_agents(session, object)? {
            return Err(Error::NotAgents(id));
        }
    }
    Ok(())
}

/// Whether this handle names a session object of this id (and not another object by now, after all).
pub(super) fn is_in_session(session: &Session, object: ObjectHandle, id: KeyId) -> Result<bool, Error> {
    let read = |kind| match attribute(session, object, kind) {
        Err(error) if error.verdict().outcome == Outcome::Resolve => Ok(None),
        other => other,
    };
    let own = matches!(read(AttributeType::Id)?, Some(Attribute::Id(found)) if found == id.0);
    Ok(own && matches!(read(AttributeType::Token)?, Some(Attribute::Token(false))))
}

/// C_DestroyObject.
pub(super) fn destroy_object(session: &Session, object: ObjectHandle) -> Result<(), Error> {
    session.destroy_object(object).map_err(|error| Error::at(Place::Destroy, error))
}

/// The public key of a public-key object, if it is of a kind that is accepted.
pub(super) fn read_public(session: &Session, object: ObjectHandle) -> Result<PublicKey, Error> {
    let answer = |cause: &str| Error::Answer { place: Place::Search, cause: cause.into() };
    let key_type = attribute(session, object, AttributeType::KeyType)?;
    if let Some(Attribute::KeyType(KeyType::RSA)) = key_type {
        let absent = || answer("CKA_MODULUS or CKA_PUBLIC_EXPONENT is absent");
        let modulus = bytes(session, object, AttributeType::Modulus)?.ok_or_else(absent)?;
        let exponent = bytes(session, object, AttributeType::PublicExponent)?.ok_or_else(absent)?;
        if der::unsigned(&exponent) != RSA_EXPONENT {
            return Err(answer("CKA_PUBLIC_EXPONENT is not 65537"));
        }
        // Another size is refused there.
        return Ok(PublicKey::from_raw(Algorithm::Ps256, der::unsigned(&modulus))?);
    }
    let params = bytes(session, object, AttributeType::EcParams)?;
    let (algorithm, size) = match (key_type, params) {
        (Some(Attribute::KeyType(KeyType::EC)), Some(params)) if params == der::P256_PARAMS => (Algorithm::P256, 65),
        (Some(Attribute::KeyType(KeyType::EC)), Some(params)) if params == der::P384_PARAMS => (Algorithm::P384, 97),
        // Tokens give back either form of the parameters; the size of the point tells Ed25519 from Ed448.
        (Some(Attribute::KeyType(KeyType::EC_EDWARDS)), Some(_)) => (Algorithm::Ed25519, 32),
        (Some(Attribute::KeyType(KeyType::EC | KeyType::EC_EDWARDS)), _) => {
            return Err(answer("CKA_EC_PARAMS names another curve"));
        }
        _ => return Err(answer("CKA_KEY_TYPE is none of CKK_EC, CKK_EC_EDWARDS and CKK_RSA")),
    };
    let point = bytes(session, object, AttributeType::EcPoint)?.ok_or_else(|| answer("CKA_EC_POINT is absent"))?;
    let raw = der::ec_point(&point, size).ok_or_else(|| answer("CKA_EC_POINT has another size"))?;
    Ok(PublicKey::from_raw(algorithm, raw)?)
}

pub(super) fn search(session: &Session, id: KeyId, class: Option<ObjectClass>) -> Result<Vec<ObjectHandle>, Error> {
    let mut template = vec![Attribute::Token(true), Attribute::Id(id.0.to_vec())];
    template.extend(class.map(Attribute::Class));
    session.find_objects(&template).map_err(|error| Error::at(Place::Search, error))
}

/// Whether the private key `other` is there, and nothing with the CKA_ID `id`.
pub(super) fn shows_but(session: &Session, other: KeyId, id: KeyId) -> Result<bool, Error> {
    let shown = !search(session, other, Some(ObjectClass::PRIVATE_KEY))?.is_empty();
    Ok(shown && search(session, id, None)?.is_empty())
}

/// All token objects with this CKA_ID.
pub(super) fn find(session: &Session, id: KeyId) -> Result<Vec<Found>, Error> {
    search(session, id, None)?
        .into_iter()
        .map(|object| {
            let class = match attribute(session, object, AttributeType::Class) {
                Err(Error::Answer { .. }) => None, // a class the wrapper does not know: no key of ours
                told => told?,
            };
            let private = matches!(class, Some(Attribute::Class(ObjectClass::PRIVATE_KEY)));
            let public = matches!(class, Some(Attribute::Class(ObjectClass::PUBLIC_KEY)));
            let public = if public { read_public(session, object).ok() } else { None };
            Ok(Found { private, public })
        })
        .collect()
}

/// All token objects that have a CKA_ID, or could have one: by it, and by CKA_LABEL.
pub(super) fn inventory(session: &Session) -> Result<Vec<Held>, Error> {
    let mut held = BTreeMap::<(Vec<u8>, String), Held>::new();
    for object in session.find_objects(&[Attribute::Token(true)]).map_err(|error| Error::at(Place::Search, error))? {
        let told = |kind| match attribute(session, object, kind) {
            // Of a class or a form that the wrapper does not know: counted all the same.
            Err(Error::Answer { .. }) => Ok(None),
            told => told,
        };
        let id = match told(AttributeType::Id)? {
            Some(Attribute::Id(id)) => id,
            _ => Vec::new(),
        };
        let label = match told(AttributeType::Label)? {
            Some(Attribute::Label(label)) => String::from_utf8_lossy(&label).into_owned(),
            _ => String::new(),
        };
        let found = held.entry((id.clone(), label.clone())).or_insert_with(|| Held { id, label, objects: 0 });
        found.objects += 1;
    }
    Ok(held.into_values().collect())
}

/// Destroys all token objects with this CKA_ID, until a search finds none.
pub(super) fn destroy(session: &Session, id: KeyId) -> Result<u32, Error> {
    destroy_until_none(session, id, || search(session, id, None))
}

/// The same of those that have this CKA_LABEL as well.
pub(super) fn destroy_labelled(session: &Session, id: KeyId, label: &str) -> Result<u32, Error> {
    let template = [Attribute::Token(true), Attribute::Id(id.0.to_vec()), Attribute::Label(label.as_bytes().to_vec())];
    destroy_until_none(session, id, || session.find_objects(&template).map_err(|error| Error::at(Place::Search, error)))
}

fn destroy_until_none(session: &Session, id: KeyId, search: impl Fn() -> Result<Vec<ObjectHandle>, Error>) -> Result<u32, Error> {
    let mut destroyed = 0;
    // The second round is for what a token lists only after the first is gone; a token that never ends is not followed.
    for _ in 0..3 {
        let objects = search()?;
        if objects.is_empty() {
            return Ok(destroyed);
        }
        for object in objects {
            destroy_object(session, object)?;
            destroyed += 1;
        }
    }
    Err(Error::Answer { place: Place::Destroy, cause: format!("objects with CKA_ID {id} come back") })
}

/// Finds the one private key of this id and makes sure, attribute by attribute and by a test signature, that it is the pinned one.
pub(super) fn resolve(session: &Session, key: &Bound) -> Result<ObjectHandle, Error> {
    let privates = search(session, key.id, Some(ObjectClass::PRIVATE_KEY))?;
    let private = match privates[..] {
        [only] => only,
        [] if is_logged_in(session)? => return Err(Error::KeyLost(key.id)),
        // Private objects are hidden from a session that has lost its login.
        [] => return Err(Error::Token { place: Place::Search, code: cryptoki::error::RvError::UserNotLoggedIn }),
        _ => return Err(Error::KeyAmbiguous { id: key.id, count: privates.len() }),
    };
    for public in search(session, key.id, Some(ObjectClass::PUBLIC_KEY))? {
        if read_public(session, public)? != key.public {
            return Err(Error::KeyMismatch(key.id));
        }
    }
    if is_agents(session, private)? != matches!(key.form, Form::Raw(_)) {
        return Err(Error::NotAgents(key.id));
    }
    check_private(session, private, (key.id, key.public.algorithm()))?;
    test_sign(session, private, key)?;
    Ok(private)
}

pub(super) fn is_logged_in(session: &Session) -> Result<bool, Error> {
    let info = session.get_session_info().map_err(|error| Error::at(Place::Search, error))?;
    Ok(matches!(info.session_state(), SessionState::RoUser | SessionState::RwUser))
}

/// A tagged signature, verified against the pinned key.
pub(super) fn test_sign(session: &Session, private: ObjectHandle, key: &Bound) -> Result<(), Error> {
    let input = test_input(key);
    let signature = sign(session, private, key, &input)?;
    if key.verifies(&input, &signature) { Ok(()) } else { Err(Error::KeyMismatch(key.id)) }
}

/// What a test signature signs.
pub(super) fn test_input(key: &Bound) -> Vec<u8> {
    key.input([TEST_TAG, &KeyId::random().0].concat())
}

/// C_SignInit and C_Sign over what [`Bound::verifies`] verifies. ECDSA and RSASSA-PSS: over a digest of exactly the right size (tokens
/// sign any length without a word). Ed25519: CKM_EDDSA, 64 bytes. Not verified yet.
pub(super) fn sign(session: &Session, private: ObjectHandle, key: &Bound, input: &[u8]) -> Result<Vec<u8>, Error> {
    let algorithm = key.public.algorithm();
    let mechanism = match algorithm {
        Algorithm::P256 | Algorithm::P384 => Mechanism::Ecdsa,
        Algorithm::Ed25519 => Mechanism::Eddsa(EddsaParams::new(EddsaSignatureScheme::Ed25519)),
        // RFC 7518 §3.5: the salt is as long as the digest.
        Algorithm::Ps256 => Mechanism::RsaPkcsPss(PkcsPssParams {
            hash_alg: MechanismType::SHA256,
            mgf: PkcsMgfType::MGF1_SHA256,
            s_len: 32.into(),
        }),
    };
    let sign = |input: &[u8]| session.sign(&mechanism, private, input).map_err(Error::signing);
    match (&key.form, algorithm.digest_size()) {
        (_, None) => sign(input),
        (Form::Raw(_), Some(size)) if input.len() != size => Err(Error::Input { id: key.id, bytes: size }),
        (Form::Raw(_), Some(_)) => sign(input),
        (Form::Der(_), Some(half)) => ecdsa_sig_value(&sign(&algorithm.input(input))?, half).ok_or(Error::Corrupt(key.id)),
    }
}

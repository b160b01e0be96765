//! Token objects: templates, reading back, finding, destroying. Everything here runs on the admin lane.

use std::collections::BTreeMap;

use cryptoki::mechanism::Mechanism;
use cryptoki::mechanism::eddsa::{EddsaParams, EddsaSignatureScheme};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::{Session, SessionState};

use super::der;
use super::error::Error;
use super::faults::Place;
use super::keyring::Bound;
use super::{Found, Held};
use crate::model::{Algorithm, Digest, KeyId, PublicKey};

/// What a test signature signs starts with this and ends with 16 random bytes. No certificate, CRL or checkpoint starts so: a
/// test signature is good for nothing.
const TEST_TAG: &[u8] = b"keyward/hsm/test/v1\0";

/// How C_GenerateKeyPair is asked.
pub(super) struct Wanted<'a> {
    pub(super) algorithm: Algorithm,
    /// CKA_EC_PARAMS.
    pub(super) params: &'a [u8],
    pub(super) id: &'a [u8],
    pub(super) label: &'a str,
    /// A token object, or one that dies with the session.
    pub(super) durable: bool,
}

impl Wanted<'_> {
    fn mechanism(&self) -> (Mechanism<'static>, KeyType) {
        match self.algorithm {
            Algorithm::P256 => (Mechanism::EccKeyPairGen, KeyType::EC),
            Algorithm::Ed25519 => (Mechanism::EccEdwardsKeyPairGen, KeyType::EC_EDWARDS),
        }
    }

    fn both_halves(&self, class: ObjectClass, key_type: KeyType) -> Vec<Attribute> {
        vec![
            Attribute::Class(class),
            Attribute::KeyType(key_type),
            Attribute::Token(self.durable),
            Attribute::Modifiable(false),
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
        public.extend([
            Attribute::Private(false),
            Attribute::EcParams(self.params.to_vec()),
            Attribute::Verify(true),
            Attribute::Encrypt(false),
            Attribute::Wrap(false),
        ]);
        let mut private = self.both_halves(ObjectClass::PRIVATE_KEY, key_type);
        private.extend([
            Attribute::Private(true),
            Attribute::Sensitive(true),
            Attribute::Extractable(false),
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
        Some(Attribute::EcPoint(value) | Attribute::EcParams(value)) => Some(value),
        _ => None,
    })
}

/// Promise 1, read back from the token and not only asked for.
pub(super) fn check_private(session: &Session, object: ObjectHandle, id: KeyId) -> Result<(), Error> {
    let wanted = [
        ("CKA_SENSITIVE", AttributeType::Sensitive, true),
        ("CKA_EXTRACTABLE", AttributeType::Extractable, false),
        ("CKA_NEVER_EXTRACTABLE", AttributeType::NeverExtractable, true),
        ("CKA_LOCAL", AttributeType::Local, true),
        ("CKA_SIGN", AttributeType::Sign, true),
    ];
    for (name, kind, wanted) in wanted {
        let found = match attribute(session, object, kind)? {
            Some(
                Attribute::Sensitive(value)
                | Attribute::Extractable(value)
                | Attribute::NeverExtractable(value)
                | Attribute::Local(value)
                | Attribute::Sign(value),
            ) => Some(value),
            _ => None,
        };
        if found != Some(wanted) {
            let found = found.map_or_else(|| "absent".into(), |value| value.to_string());
            return Err(Error::Attribute { id, attribute: name, found, wanted });
        }
    }
    // A key that wants a PIN for each signature cannot be used by a daemon. Tokens without the attribute do not want one.
    match attribute(session, object, AttributeType::AlwaysAuthenticate) {
        Ok(Some(Attribute::AlwaysAuthenticate(true))) => {
            Err(Error::Attribute { id, attribute: "CKA_ALWAYS_AUTHENTICATE", found: "true".into(), wanted: false })
        }
        _ => Ok(()),
    }
}

/// The public key of a public-key object, if it is of a kind that is accepted.
pub(super) fn read_public(session: &Session, object: ObjectHandle) -> Result<PublicKey, Error> {
    let answer = |cause: &str| Error::Answer { place: Place::Search, cause: cause.into() };
    let algorithm = match attribute(session, object, AttributeType::KeyType)? {
        Some(Attribute::KeyType(KeyType::EC)) => Algorithm::P256,
        Some(Attribute::KeyType(KeyType::EC_EDWARDS)) => Algorithm::Ed25519,
        _ => return Err(answer("CKA_KEY_TYPE is neither CKK_EC nor CKK_EC_EDWARDS")),
    };
    let params = bytes(session, object, AttributeType::EcParams)?;
    let (size, known) = match algorithm {
        Algorithm::P256 => (65, params.as_deref() == Some(&der::P256_PARAMS[..])),
        // Tokens give back either form; the size of the point tells Ed25519 from Ed448.
        Algorithm::Ed25519 => (32, params.is_some()),
    };
    if !known {
        return Err(answer("CKA_EC_PARAMS names another curve"));
    }
    let point = bytes(session, object, AttributeType::EcPoint)?.ok_or_else(|| answer("CKA_EC_POINT is absent"))?;
    let raw = der::ec_point(&point, size).ok_or_else(|| answer("CKA_EC_POINT has another size"))?;
    Ok(PublicKey::from_raw(algorithm, raw)?)
}

fn search(session: &Session, id: KeyId, class: Option<ObjectClass>) -> Result<Vec<ObjectHandle>, Error> {
    let mut template = vec![Attribute::Token(true), Attribute::Id(id.0.to_vec())];
    template.extend(class.map(Attribute::Class));
    session.find_objects(&template).map_err(|error| Error::at(Place::Search, error))
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

/// All token objects that have a CKA_ID, or could have one: by it.
pub(super) fn inventory(session: &Session) -> Result<Vec<Held>, Error> {
    let mut held = BTreeMap::<Vec<u8>, Held>::new();
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
        let found = held.entry(id.clone()).or_insert_with(|| Held { id, label, objects: 0 });
        found.objects += 1;
    }
    Ok(held.into_values().collect())
}

/// Destroys all token objects with this CKA_ID, until a search finds none.
pub(super) fn destroy(session: &Session, id: KeyId) -> Result<u32, Error> {
    let mut destroyed = 0;
    // The second round is for what a token lists only after the first is gone; a token that never ends is not followed.
    for _ in 0..3 {
        let objects = search(session, id, None)?;
        if objects.is_empty() {
            return Ok(destroyed);
        }
        for object in objects {
            session.destroy_object(object).map_err(|error| Error::at(Place::Destroy, error))?;
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
    check_private(session, private, key.id)?;
    test_sign(session, private, key)?;
    Ok(private)
}

fn is_logged_in(session: &Session) -> Result<bool, Error> {
    let info = session.get_session_info().map_err(|error| Error::at(Place::Search, error))?;
    Ok(matches!(info.session_state(), SessionState::RoUser | SessionState::RwUser))
}

/// A tagged signature, verified against the pinned key.
pub(super) fn test_sign(session: &Session, private: ObjectHandle, key: &Bound) -> Result<(), Error> {
    let message = [TEST_TAG, &KeyId::random().0].concat();
    let signature = sign(session, private, key.public.algorithm(), &message, key.id)?;
    if key.verifies(&message, &signature) { Ok(()) } else { Err(Error::KeyMismatch(key.id)) }
}

/// C_SignInit and C_Sign. P-256: SHA-256 in software and CKM_ECDSA over exactly 32 bytes (tokens sign any length without a word);
/// the answer in DER. Ed25519: CKM_EDDSA, 64 bytes. Not verified yet.
pub(super) fn sign(
    session: &Session,
    private: ObjectHandle,
    algorithm: Algorithm,
    message: &[u8],
    id: KeyId,
) -> Result<Vec<u8>, Error> {
    match algorithm {
        Algorithm::P256 => {
            let raw = session.sign(&Mechanism::Ecdsa, private, &Digest::of(message).0).map_err(Error::signing)?;
            der::ecdsa_signature(&raw).ok_or(Error::Corrupt(id))
        }
        Algorithm::Ed25519 => {
            let mechanism = Mechanism::Eddsa(EddsaParams::new(EddsaSignatureScheme::Ed25519));
            session.sign(&mechanism, private, message).map_err(Error::signing)
        }
    }
}

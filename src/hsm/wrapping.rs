//! The AES key that agents' keys are wrapped under: made in the token, good for nothing but wrapping and unwrapping.
//!
//! What a wrapped key promises is less than promise 1, by need: while it is generated it is EXTRACTABLE, and its blob can be unwrapped by
//! whoever may use the wrapping key. Who has the token's PIN, the token and a blob can have the token unwrap it into an object that is
//! extractable, wrap that under a key of his own making, and so learn it: CKA_WRAP_WITH_TRUSTED, which would forbid the latter, needs the
//! security officer and is not to be had on every token. Who has the blobs alone (a stolen database) has nothing.

use cryptoki::mechanism::{Mechanism, MechanismType};
use cryptoki::object::{Attribute, AttributeType, KeyType, ObjectClass, ObjectHandle};
use cryptoki::session::Session;

use super::error::Error;
use super::faults::{Class, Place, class};
use super::keyring::Bound;
use super::objects::{self, Flag, Wanted};
use crate::model::{Algorithm, KeyId};

/// AES-256.
const KEY_BYTES: u64 = 32;
/// A blob is no longer: an RSA key of 2048 bits in PKCS#8 has about 1,220 bytes.
pub(super) const BLOB_BYTES_MAX: usize = 1536;

/// How a token wraps. Both give the key back only if nobody has touched the blob (RFC 5649, RFC 3394).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wrapping {
    /// CKM_AES_KEY_WRAP_PAD.
    Padded,
    /// CKM_AES_KEY_WRAP, which some tokens pad by themselves.
    Plain,
}

impl Wrapping {
    pub(super) const ALL: [Self; 2] = [Self::Padded, Self::Plain];

    pub(super) fn kind(self) -> MechanismType {
        match self {
            Self::Padded => MechanismType::AES_KEY_WRAP_PAD,
            Self::Plain => MechanismType::AES_KEY_WRAP,
        }
    }

    fn mechanism(self) -> Mechanism<'static> {
        match self {
            Self::Padded => Mechanism::AesKeyWrapPad,
            Self::Plain => Mechanism::AesKeyWrap,
        }
    }
}

/// C_GenerateKey, every attribute explicit. DECRYPT above all is false: it would turn a blob into the key in clear.
pub(super) fn generate(session: &Session, id: KeyId, label: &str, durable: bool) -> Result<ObjectHandle, Error> {
    let template = [
        Attribute::Class(ObjectClass::SECRET_KEY),
        Attribute::KeyType(KeyType::AES),
        Attribute::ValueLen(KEY_BYTES.into()),
        Attribute::Token(durable),
        Attribute::Private(true),
        Attribute::Modifiable(false),
        Attribute::Copyable(false),
        Attribute::Id(id.0.to_vec()),
        Attribute::Label(label.as_bytes().to_vec()),
        Attribute::Sensitive(true),
        Attribute::Extractable(false),
        Attribute::Derive(false),
        Attribute::Encrypt(false),
        Attribute::Decrypt(false),
        Attribute::Sign(false),
        Attribute::Verify(false),
        Attribute::Wrap(true),
        Attribute::Unwrap(true),
    ];
    session.generate_key(&Mechanism::AesKeyGen, &template).map_err(|error| Error::at(Place::GenerateKey, error))
}

/// What a wrapping key has to be, read back.
pub(super) fn check(session: &Session, key: ObjectHandle, id: KeyId) -> Result<(), Error> {
    const WANTED: [Flag; 8] = [
        ("CKA_SENSITIVE", AttributeType::Sensitive, true),
        ("CKA_EXTRACTABLE", AttributeType::Extractable, false),
        ("CKA_NEVER_EXTRACTABLE", AttributeType::NeverExtractable, true),
        ("CKA_LOCAL", AttributeType::Local, true),
        ("CKA_ENCRYPT", AttributeType::Encrypt, false),
        ("CKA_DECRYPT", AttributeType::Decrypt, false),
        ("CKA_WRAP", AttributeType::Wrap, true),
        ("CKA_UNWRAP", AttributeType::Unwrap, true),
    ];
    objects::check(session, key, id, &WANTED)
}

/// The one wrapping key of this id, with its attributes as they have to be.
pub(super) fn resolve(session: &Session, id: KeyId) -> Result<ObjectHandle, Error> {
    match objects::search(session, id, Some(ObjectClass::SECRET_KEY))?[..] {
        [only] => check(session, only, id).map(|()| only),
        [] if objects::is_logged_in(session)? => Err(Error::KeyLost(id)),
        [] => Err(Error::Token { place: Place::Search, code: cryptoki::error::RvError::UserNotLoggedIn }),
        [_, _, ..] => Err(Error::KeyAmbiguous { id, count: 2 }),
    }
}

/// C_WrapKey.
pub(super) fn wrap(session: &Session, way: Wrapping, by: ObjectHandle, key: ObjectHandle) -> Result<Vec<u8>, Error> {
    let mut blob = session.wrap_key(&way.mechanism(), by, key).map_err(|error| Error::at(Place::Wrap, error))?;
    // The wrapper hands back the whole buffer that the token asked for (NSS: two bytes more than it fills); a blob is a multiple of
    // eight bytes.
    blob.truncate(blob.len() & !7);
    if blob.is_empty() || blob.len() > BLOB_BYTES_MAX {
        return Err(Error::Answer { place: Place::Wrap, cause: format!("a blob of {} bytes", blob.len()) });
    }
    Ok(blob)
}

/// C_UnwrapKey into a session object. `extractable` only to wrap it again.
pub(super) fn unwrap(
    session: &Session,
    way: Wrapping,
    by: ObjectHandle,
    blob: &[u8],
    key: (KeyId, Algorithm),
    extractable: bool,
) -> Result<ObjectHandle, Error> {
    let (id, algorithm) = key;
    let key_type = match algorithm {
        Algorithm::P256 | Algorithm::P384 => KeyType::EC,
        Algorithm::Ed25519 => KeyType::EC_EDWARDS,
        Algorithm::Ps256 => KeyType::RSA,
    };
    let template = [
        Attribute::Class(ObjectClass::PRIVATE_KEY),
        Attribute::KeyType(key_type),
        Attribute::Token(false),
        Attribute::Private(true),
        // CKA_MODIFIABLE = false is refused here by SoftHSM; EXTRACTABLE cannot be set to true again anyway.
        Attribute::Copyable(false),
        Attribute::Id(id.0.to_vec()),
        Attribute::Derive(false),
        Attribute::Sensitive(true),
        Attribute::Extractable(extractable),
        Attribute::Sign(true),
        Attribute::SignRecover(false),
        Attribute::Decrypt(false),
        Attribute::Unwrap(false),
    ];
    session.unwrap_key(&way.mechanism(), by, blob, &template).map_err(|error| match Error::at(Place::Unwrap, error) {
        Error::Token { code, .. } if matches!(class(code), Class::Permanent | Class::Vague) => Error::NotUnwrapped { id, code },
        other => other,
    })
}

/// What the token's way of wrapping is worth: a key pair made, wrapped, unwrapped, and a test signature by what came back.
pub(super) fn round_trip(
    session: &Session,
    way: Wrapping,
    by: ObjectHandle,
    algorithm: Algorithm,
    params: &[u8],
) -> Result<(), Error> {
    let id = KeyId::random();
    let wanted = Wanted { algorithm, params, id: &id.0, label: "keyward/probe", durable: false, extractable: true };
    let (public, private) = wanted.generate(session)?;
    let mut made = vec![public, private];
    let tried = objects::read_public(session, public).and_then(|public| {
        let key = Bound::agents(id, public, None)?;
        let blob = wrap(session, way, by, private)?;
        let back = unwrap(session, way, by, &blob, (id, algorithm), false)?;
        made.push(back);
        objects::check_unextractable(session, back, (id, algorithm))?;
        objects::test_sign(session, back, &key)
    });
    for object in made {
        if let Err(error) = session.destroy_object(object) {
            tracing::debug!(?error, "a trial key stays until its session ends");
        }
    }
    tried
}

//! A received HTTP message signature (RFC 9421 §3.2).

use std::borrow::Cow;

use sfv::{Dictionary, InnerList, ListEntry, Parser, StringRef};

use super::{Ends, Memory, Over, SignedBytes, VerifyingKey, Window, elsewhere, missing, named_algorithm, unknown_kid};
use crate::formats::http_signature::{
    COMPONENTS_MAX, Component, Covered, FIELD_BYTES_MAX, check_identifier, identity, parse_identifier, serialized,
    serialized_item,
};
use crate::formats::signing::Profile;
use crate::formats::{NAME_BYTES_MAX, algorithm, malformed, too_large};
use crate::model::{Digest, Refusal};

/// A signature that nobody has looked at.
pub struct Received {
    list: InnerList,
    /// Of what it covers, in order.
    identities: Vec<String>,
    signature: Vec<u8>,
    kid: String,
}

/// What the message says that the signature came with.
#[derive(Clone, Copy)]
pub struct Expected<'a> {
    /// The components of the message with their values, as the verifier sees them: at least those that are covered.
    pub components: &'a [Component<'a>],
    /// Identifiers that have to be covered: no more than can be.
    pub required: &'a [&'a str],
    /// The tag that has to be there.
    pub tag: Option<&'a str>,
    /// The nonce that was given out.
    pub nonce: Option<&'a str>,
    /// A signature counts from `created` (which has to be there) for `lifetime_seconds_max`, or until `expires` if that is earlier.
    pub window: Window,
    /// With it the signature is accepted once: by its nonce, and where it has none (RFC 9421 asks for none) by what was signed. Two
    /// messages without one that are the same, made in the same second, are then one.
    pub once: Option<Memory<'a>>,
}

/// A signature that is its key's, over this message.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verified {
    /// The key.
    pub kid: String,
    /// The identifiers of what it covers, in order.
    pub covered: Vec<String>,
}

impl Received {
    /// Finds the signature `label` in the fields Signature-Input and Signature; without a label there has to be exactly one.
    ///
    /// # Errors
    /// `REQUEST_TOO_LARGE`, `MALFORMED_REQUEST`, `KID_UNKNOWN` without a keyid, `ALGORITHM_REFUSED`.
    pub fn parse(signature_input: &str, signature: &str, label: Option<&str>) -> Result<Self, Refusal> {
        let inputs = dictionary("Signature-Input", signature_input)?;
        let signatures = dictionary("Signature", signature)?;
        let label = match label {
            Some(label) => label,
            None if inputs.len() == 1 => inputs.first().map(|(label, _)| label.as_str()).unwrap_or_default(),
            None => return Err(malformed("say which of the signatures is meant")),
        };
        let Some(ListEntry::InnerList(list)) = inputs.get(label) else {
            return Err(malformed("send a Signature-Input with this label and its covered components"));
        };
        let signature = match signatures.get(label) {
            Some(ListEntry::Item(item)) => item.bare_item.as_byte_sequence(),
            _ => None,
        };
        let signature = signature.ok_or_else(|| malformed("send a Signature with this label"))?.to_vec();
        if list.items.is_empty() || list.items.len() > COMPONENTS_MAX {
            return Err(malformed(format!("send a signature that covers from 1 to {COMPONENTS_MAX} components")));
        }
        list.items.iter().try_for_each(check_identifier)?;
        let kid = match string(list, "keyid")? {
            Some(kid) if !kid.is_empty() && kid.len() <= NAME_BYTES_MAX => kid.to_owned(),
            _ => return Err(unknown_kid()),
        };
        let identities = list.items.iter().map(identity).collect();
        Ok(Self { list: list.clone(), identities, signature, kid })
    }

    /// The key that the signature names.
    #[must_use]
    pub fn kid(&self) -> &str {
        &self.kid
    }

    /// Verifies with the key that [`Received::kid`] named over the message's own values, then reads the parameters.
    ///
    /// # Errors
    /// `REQUEST_TOO_LARGE`; `BINDING_MISMATCH` for a covered component that the message lacks or a required one that is not covered, another tag
    /// or nonce; `PROFILE_MISMATCH`, `KID_UNKNOWN`, `ALGORITHM_REFUSED`, `SIGNATURE_INVALID`; `MALFORMED_REQUEST`, `MESSAGE_EXPIRED`,
    /// `OUTSIDE_TIME_WINDOW`, `REPLAYED`, `OVERLOADED`.
    pub fn check(self, key: &VerifyingKey, expected: &Expected<'_>) -> Result<Verified, Refusal> {
        if expected.required.len() > COMPONENTS_MAX {
            return Err(too_large(format!("require at most {COMPONENTS_MAX} components")));
        }
        let message = self.base(expected.components)?;
        let algorithm = string(&self.list, "alg")?.map(|name| named_algorithm(name, algorithm::http_name)).transpose()?;
        let signed = SignedBytes { kid: self.kid, algorithm, message: message.into_bytes(), signature: self.signature };
        key.check(Profile::HttpMessageSignature, &signed)?;

        for identifier in expected.required {
            if !self.identities.contains(&identity(&parse_identifier(identifier)?)) {
                return Err(elsewhere("a component that has to be covered is not"));
            }
        }
        let nonce = string(&self.list, "nonce")?;
        if expected.tag.is_some() && string(&self.list, "tag")? != expected.tag {
            return Err(elsewhere("tag"));
        }
        if expected.nonce.is_some() && nonce != expected.nonce {
            return Err(elsewhere("nonce"));
        }
        let window = &expected.window;
        let made = seconds(&self.list, "created")?.ok_or_else(|| missing("created"))?;
        let expires = seconds(&self.list, "expires")?;
        let latest = made.saturating_add(window.lifetime_seconds_max);
        let (end, by) = match expires {
            Some(expires) if expires <= latest => (expires, Ends::ByItself),
            _ => (latest, Ends::ByItsReader),
        };
        window.check_made(made)?;
        window.check_end(end)?;
        if let Some(once) = expected.once {
            let name = name(nonce, &signed.message)?;
            let over = Over { made, end: window.last_second(end), by };
            once.accept(&signed.kid, &name, over, window.now)?;
        }
        Ok(Verified { kid: signed.kid, covered: self.list.items.iter().map(serialized_item).collect() })
    }

    /// The signature base over the verifier's own values, in the signer's order.
    fn base(&self, seen: &[Component<'_>]) -> Result<String, Refusal> {
        let seen = Covered::of(seen)?;
        let identifiers: Vec<String> = self.list.items.iter().map(serialized_item).collect();
        let mut covered = Vec::with_capacity(identifiers.len());
        for (identity, identifier) in self.identities.iter().zip(&identifiers) {
            let value = seen.value_of(identity).ok_or_else(|| elsewhere("a covered component is not in the message"))?;
            covered.push(Component { identifier, value });
        }
        Ok(Covered::of(&covered)?.base(&serialized(&self.list)?))
    }
}

/// What a signature is remembered by. Not by its own bytes: of one ECDSA signature anybody makes a second one that verifies as well.
fn name<'a>(nonce: Option<&'a str>, signed: &[u8]) -> Result<Cow<'a, str>, Refusal> {
    match nonce.unwrap_or_default() {
        // No nonce has a line feed.
        "" => Ok(Cow::Owned(format!("\n{}", Digest::of(signed)))),
        long if long.len() > NAME_BYTES_MAX => Err(malformed(format!("send a nonce of at most {NAME_BYTES_MAX} bytes"))),
        nonce => Ok(Cow::Borrowed(nonce)),
    }
}

fn dictionary(field: &str, text: &str) -> Result<Dictionary, Refusal> {
    if text.len() > FIELD_BYTES_MAX {
        return Err(too_large(format!("send a {field} of at most {FIELD_BYTES_MAX} bytes")));
    }
    Parser::new(text).parse().map_err(|error| malformed(format!("send a {field} that is a structured dictionary")).because(error))
}

fn string<'a>(list: &'a InnerList, name: &str) -> Result<Option<&'a str>, Refusal> {
    let Some(value) = list.params.get(name) else { return Ok(None) };
    value.as_string().map(StringRef::as_str).map(Some).ok_or_else(|| malformed(format!("{name} is a string")))
}

fn seconds(list: &InnerList, name: &str) -> Result<Option<u64>, Refusal> {
    let Some(value) = list.params.get(name) else { return Ok(None) };
    let seconds = value.as_integer().and_then(|value| u64::try_from(value).ok());
    seconds.map(Some).ok_or_else(|| malformed(format!("{name} is a whole number of seconds since 1970")))
}

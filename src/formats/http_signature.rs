//! HTTP Message Signatures (RFC 9421). keyward does not see the request: the caller gives each covered component with its value
//! as it stands in the signature base (§2.1, §2.2), the signature parameters are keyward's.

use std::collections::BTreeSet;

use sfv::{BareItem, DictSerializer, Dictionary, InnerList, Item, ItemSerializer, KeyRef, ListEntry, Parser, StringRef};

use super::signing::{Assembly, Profile, SigningInput};
use super::{PAYLOAD_BYTES_MAX, algorithm, check_name, malformed, too_large};
use crate::model::{Algorithm, Reason, Refusal, UnixTime};

/// Most components that one signature covers.
pub const COMPONENTS_MAX: usize = 64;

/// Longest field Signature-Input or Signature, and longest component identifier, in bytes.
pub(super) const FIELD_BYTES_MAX: usize = 8192;

/// The derived components of §2.2.
const DERIVED: [&str; 9] =
    ["@method", "@target-uri", "@authority", "@scheme", "@request-target", "@path", "@query", "@query-param", "@status"];

/// A component of the message and its value.
#[derive(Debug, Clone, Copy)]
pub struct Component<'a> {
    /// `@method`, `content-type`, or with parameters as in Signature-Input: `"@query-param";name="id"`, `"digest";req`.
    pub identifier: &'a str,
    /// Its canonical value: one line, several field lines joined with `, `.
    pub value: &'a str,
}

/// What the signature says of itself beside `created`, `keyid` and `alg`, which keyward sets.
#[derive(Debug, Clone, Copy, Default)]
pub struct Parameters<'a> {
    /// Seconds from `created` to `expires`.
    pub lifetime_seconds: Option<u64>,
    /// What makes the signature unique; a verifier with a replay cache wants one.
    pub nonce: Option<&'a str>,
    /// The application, for example `web-bot-auth`.
    pub tag: Option<&'a str>,
}

/// A signature named `label` over `components`, by the key `kid`, created `now`.
///
/// # Errors
/// `MALFORMED_REQUEST` for no component, an unknown or repeated one, or a value that is not one line of ASCII;
/// `REQUEST_TOO_LARGE`; `ALGORITHM_REFUSED` for a PS256 key, whose signatures have no name there.
pub fn prepare(
    algorithm: Algorithm,
    kid: &str,
    label: &str,
    components: &[Component<'_>],
    parameters: &Parameters<'_>,
    now: UnixTime,
) -> Result<SigningInput, Refusal> {
    let named = algorithm::http_name(algorithm).ok_or_else(without_a_name)?;
    let covered = Covered::of(components)?;
    let label = KeyRef::from_str(check_name("label", label)?)
        .map_err(|error| malformed("give a label of a-z, 0-9, _, -, . and *, starting with a letter").because(error))?;
    let mut list = InnerList::new(covered.lines.iter().map(|line| line.item.clone()).collect());
    let mut set = |name: &str, value: BareItem| -> Result<(), Refusal> {
        list.params.insert(KeyRef::from_str(name).map_err(Refusal::internal)?.to_owned(), value);
        Ok(())
    };
    set("created", integer(now.seconds())?)?;
    if let Some(lifetime) = parameters.lifetime_seconds {
        set("expires", integer(now.seconds().saturating_add(lifetime))?)?;
    }
    set("keyid", string("kid", kid)?)?;
    set("alg", string("alg", named)?)?;
    if let Some(nonce) = parameters.nonce {
        set("nonce", string("nonce", nonce)?)?;
    }
    if let Some(tag) = parameters.tag {
        set("tag", string("tag", tag)?)?;
    }
    let member = serialized(&list)?;
    let base = covered.base(&member);
    let assembly = Assembly::Http { label: label.as_str().to_owned(), member };
    Ok(SigningInput::of_message(Profile::HttpMessageSignature, algorithm, base.as_bytes(), assembly))
}

pub(super) fn without_a_name() -> Refusal {
    let advice = "use a P-256, P-384 or Ed25519 key for HTTP message signatures: RFC 9421 knows RSA-PSS with SHA-512 alone";
    Refusal::new(Reason::AlgorithmRefused, advice)
}

fn integer(seconds: u64) -> Result<BareItem, Refusal> {
    BareItem::try_from(seconds).map_err(|error| malformed("give a lifetime that ends in this age of the world").because(error))
}

fn string(what: &str, value: &str) -> Result<BareItem, Refusal> {
    let value = StringRef::from_str(check_name(what, value)?).map_err(Refusal::internal)?;
    Ok(BareItem::String(value.to_owned()))
}

/// The components that a signature covers, checked, in order.
pub(super) struct Covered {
    lines: Vec<Line>,
}

struct Line {
    item: Item,
    identity: String,
    identifier: String,
    value: String,
}

impl Covered {
    pub(super) fn of(components: &[Component<'_>]) -> Result<Self, Refusal> {
        if components.is_empty() {
            return Err(malformed("cover at least one component: a signature over nothing fits every message"));
        }
        if components.len() > COMPONENTS_MAX {
            return Err(too_large(format!("cover at most {COMPONENTS_MAX} components")));
        }
        let mut lines = Vec::with_capacity(components.len());
        let mut seen = BTreeSet::new();
        let mut bytes = 0;
        for component in components {
            let item = parse_identifier(component.identifier)?;
            let identity = identity(&item);
            if !seen.insert(identity.clone()) {
                return Err(malformed(format!("cover {} once", component.identifier)));
            }
            let value = component.value.trim_matches([' ', '\t']);
            if !value.bytes().all(|byte| byte == b'\t' || (b' '..=b'~').contains(&byte)) {
                return Err(malformed(format!("give the value of {} as one line of ASCII", component.identifier)));
            }
            let identifier = serialized_item(&item);
            bytes += identifier.len() + value.len();
            if bytes > PAYLOAD_BYTES_MAX {
                return Err(too_large(format!("cover at most {PAYLOAD_BYTES_MAX} bytes; sign a Content-Digest for a body")));
            }
            lines.push(Line { item, identity, identifier, value: value.to_owned() });
        }
        Ok(Self { lines })
    }

    /// The signature base (§2.5). `member` is the serialised inner list with its parameters.
    pub(super) fn base(&self, member: &str) -> String {
        let mut base = String::new();
        for Line { identifier, value, .. } in &self.lines {
            base.push_str(identifier);
            base.push_str(": ");
            base.push_str(value);
            base.push('\n');
        }
        base + "\"@signature-params\": " + member
    }

    /// The value of the component of this [`identity`].
    pub(super) fn value_of(&self, identity: &str) -> Option<&str> {
        self.lines.iter().find(|line| line.identity == identity).map(|line| line.value.as_str())
    }
}

/// A component identifier (§2): a name, and parameters that this name may have.
pub(super) fn parse_identifier(text: &str) -> Result<Item, Refusal> {
    if text.len() > FIELD_BYTES_MAX {
        return Err(too_large(format!("give a component identifier of at most {FIELD_BYTES_MAX} bytes")));
    }
    let wrong = || malformed("name components as @method, content-type or \"name\";parameter");
    let item = if text.starts_with('"') {
        Parser::new(text).parse::<Item>().map_err(|error| wrong().because(error))?
    } else {
        Item::new(StringRef::from_str(text).map_err(|error| wrong().because(error))?.to_owned())
    };
    check_identifier(&item)?;
    Ok(item)
}

/// # Errors
/// `MALFORMED_REQUEST` for an unknown derived component, a field name that is not in lower case, and parameters that are
/// unknown or not this component's.
pub(super) fn check_identifier(item: &Item) -> Result<(), Refusal> {
    let name = item.bare_item.as_string().map(StringRef::as_str).unwrap_or_default();
    let derived = name.starts_with('@');
    let known = if derived {
        DERIVED.contains(&name)
    } else {
        !name.is_empty()
            && name.bytes().all(|byte| byte.is_ascii_lowercase() || byte.is_ascii_digit() || b"!#$%&'*+-.^_`|~".contains(&byte))
    };
    let fits = item.params.iter().all(|(parameter, value)| match parameter.as_str() {
        "req" => value.as_boolean() == Some(true) && name != "@status",
        "sf" | "bs" | "tr" => value.as_boolean() == Some(true) && !derived,
        "key" => value.as_string().is_some() && !derived,
        "name" => value.as_string().is_some() && name == "@query-param",
        _ => false,
    });
    let has = |parameter: &str| item.params.contains_key(parameter);
    let agrees = !(has("bs") && (has("sf") || has("key"))) && (name != "@query-param" || has("name"));
    if known && fits && agrees { Ok(()) } else { Err(malformed("cover components of RFC 9421 only, field names in lower case")) }
}

/// What makes two identifiers the same: the order of parameters says nothing (§2).
pub(super) fn identity(item: &Item) -> String {
    let mut sorted = item.clone();
    sorted.params.sort_unstable_keys();
    serialized_item(&sorted)
}

pub(super) fn serialized_item(item: &Item) -> String {
    ItemSerializer::new().bare_item(&item.bare_item).parameters(&item.params).finish()
}

/// An inner list as it stands behind `label=`.
pub(super) fn serialized(list: &InnerList) -> Result<String, Refusal> {
    let mut dictionary = Dictionary::new();
    let label = KeyRef::from_str("a").map_err(Refusal::internal)?;
    dictionary.insert(label.to_owned(), ListEntry::InnerList(list.clone()));
    let mut serializer = DictSerializer::new();
    serializer.members(&dictionary);
    let text = serializer.finish().unwrap_or_default();
    Ok(text.strip_prefix("a=").unwrap_or_default().to_owned())
}

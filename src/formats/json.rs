//! JSON from strangers: a member that occurs twice is refused, because two readers would read two different messages.

use std::fmt;

use serde::de::{Deserialize, Deserializer, Error, MapAccess, SeqAccess, Visitor};
use serde_json::{Map, Value};

use super::malformed;
use crate::model::Refusal;

/// The one JSON object that `text` is. Depth is bounded by the parser (128), size by the caller.
///
/// # Errors
/// `MALFORMED_REQUEST` unless it is exactly one object without a repeated member, at any depth.
pub(super) fn object(what: &str, text: &[u8]) -> Result<Map<String, Value>, Refusal> {
    let parsed: Result<Strict, _> = serde_json::from_slice(text);
    match parsed {
        Ok(Strict(Value::Object(members))) => Ok(members),
        Ok(_) => Err(malformed(format!("send a {what} that is a JSON object"))),
        Err(error) => {
            Err(malformed(format!("send a {what} that is a JSON object in which no member occurs twice")).because(error))
        }
    }
}

/// The text of a member, if it is there.
///
/// # Errors
/// `MALFORMED_REQUEST` when it is not a string.
pub(super) fn text<'a>(members: &'a Map<String, Value>, name: &str) -> Result<Option<&'a str>, Refusal> {
    match members.get(name) {
        None => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(_) => Err(malformed(format!("{name} is a string"))),
    }
}

/// Whole seconds since 1970 (a NumericDate, RFC 7519 §2, without fractions), if they are there.
///
/// # Errors
/// `MALFORMED_REQUEST` for anything but a whole number from 0 to 2^53.
pub(super) fn seconds(members: &Map<String, Value>, name: &str) -> Result<Option<u64>, Refusal> {
    let Some(value) = members.get(name) else { return Ok(None) };
    match value.as_u64() {
        Some(seconds) if seconds <= 1 << 53 => Ok(Some(seconds)),
        _ => Err(malformed(format!("{name} is a whole number of seconds since 1970"))),
    }
}

/// A value in which no member occurs twice.
struct Strict(Value);

impl<'de> Deserialize<'de> for Strict {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(StrictVisitor).map(Strict)
    }
}

struct StrictVisitor;

impl<'de> Visitor<'de> for StrictVisitor {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JSON without repeated members")
    }

    fn visit_bool<E: Error>(self, value: bool) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_u64<E: Error>(self, value: u64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_i64<E: Error>(self, value: i64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_f64<E: Error>(self, value: f64) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_str<E: Error>(self, value: &str) -> Result<Value, E> {
        Ok(value.into())
    }

    fn visit_unit<E: Error>(self) -> Result<Value, E> {
        Ok(Value::Null)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut read = Vec::new();
        while let Some(Strict(item)) = items.next_element()? {
            read.push(item);
        }
        Ok(Value::Array(read))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut members: A) -> Result<Value, A::Error> {
        let mut read = Map::new();
        while let Some((name, Strict(value))) = members.next_entry::<String, _>()? {
            if read.insert(name, value).is_some() {
                return Err(A::Error::custom("a member occurs twice"));
            }
        }
        Ok(Value::Object(read))
    }
}

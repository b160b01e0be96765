//! Names: trust domains, SPIFFE IDs, agents (SPIFFE-ID §2).

use std::fmt;

/// Longest SPIFFE ID that is accepted (SPIFFE-ID §2.3).
const SPIFFE_ID_BYTES_MAX: usize = 2048;
/// Longest `<class>` or `<instance>`.
const SEGMENT_BYTES_MAX: usize = 64;

/// A name that breaks the rules, and which rule.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{name:?} is not a valid {what}: {rule}")]
pub struct InvalidName {
    what: &'static str,
    name: String,
    rule: &'static str,
}

impl InvalidName {
    fn new(what: &'static str, name: &str, rule: &'static str) -> Self {
        // An attacker's name is cut before it is repeated anywhere.
        Self { what, name: name.chars().take(80).collect(), rule }
    }
}

/// A trust domain's name: lower case letters, digits, `.`, `-`, `_`; 1 to 255 bytes (SPIFFE-ID §2.1).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct TrustDomain(Box<str>);

impl TrustDomain {
    /// Checks `name`.
    ///
    /// # Errors
    /// When it is empty, too long, or has another character.
    pub fn parse(name: &str) -> Result<Self, InvalidName> {
        let bad = |rule| Err(InvalidName::new("trust domain", name, rule));
        if name.is_empty() || name.len() > 255 {
            return bad("1 to 255 bytes");
        }
        if !name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"-._".contains(&b)) {
            return bad("lower case letters, digits, '.', '-' and '_' only");
        }
        Ok(Self(name.into()))
    }

    /// The bare name.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The SPIFFE ID of the domain itself, as authorities carry it: no path.
    #[must_use]
    pub fn id(&self) -> SpiffeId {
        SpiffeId { text: format!("spiffe://{}", self.0).into(), domain_bytes: self.0.len() }
    }

    /// The SPIFFE ID of the keyward server.
    #[must_use]
    pub fn server(&self) -> SpiffeId {
        SpiffeId { text: format!("spiffe://{}/keyward/server", self.0).into(), domain_bytes: self.0.len() }
    }
}

impl fmt::Display for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for TrustDomain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "TrustDomain({})", self.0)
    }
}

/// An agent instance, `<class>/<instance>`. An instance is never reused.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AgentId(Box<str>);

impl AgentId {
    /// Checks `<class>/<instance>`.
    ///
    /// # Errors
    /// When it is not two segments of 1 to 64 bytes of letters, digits, `.`, `-`, `_` (SPIFFE-ID §2.2), or one is `.` or `..`.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        let bad = |rule| Err(InvalidName::new("agent", text, rule));
        let Some((class, instance)) = text.split_once('/') else {
            return bad("<class>/<instance>");
        };
        for segment in [class, instance] {
            if segment.is_empty() || segment.len() > SEGMENT_BYTES_MAX {
                return bad("class and instance have 1 to 64 bytes each");
            }
            if segment == "." || segment == ".." {
                return bad("'.' and '..' are not segments");
            }
            if !segment.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)) {
                return bad("letters, digits, '.', '-' and '_' only");
            }
        }
        Ok(Self(text.into()))
    }

    /// `<class>/<instance>`.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// `spiffe://<td>/agent/<class>/<instance>`.
    #[must_use]
    pub fn spiffe_id(&self, domain: &TrustDomain) -> SpiffeId {
        SpiffeId { text: format!("spiffe://{domain}/agent/{}", self.0).into(), domain_bytes: domain.0.len() }
    }
}

impl fmt::Display for AgentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for AgentId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "AgentId({})", self.0)
    }
}

/// A SPIFFE ID, checked (SPIFFE-ID §2).
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct SpiffeId {
    text: Box<str>,
    domain_bytes: usize,
}

impl SpiffeId {
    /// Checks `text`.
    ///
    /// # Errors
    /// When the scheme is not `spiffe`, the domain or a path segment breaks its rule, or it is longer than 2,048 bytes.
    pub fn parse(text: &str) -> Result<Self, InvalidName> {
        let bad = |rule| Err(InvalidName::new("SPIFFE ID", text, rule));
        if text.len() > SPIFFE_ID_BYTES_MAX {
            return bad("at most 2,048 bytes");
        }
        let Some(rest) = text.strip_prefix("spiffe://") else {
            return bad("the scheme is spiffe");
        };
        let (domain, path) = rest.find('/').map_or((rest, ""), |at| rest.split_at(at));
        TrustDomain::parse(domain)?;
        if !path.is_empty() {
            for segment in path[1..].split('/') {
                if segment.is_empty() || segment == "." || segment == ".." {
                    return bad("no empty, '.' or '..' segment");
                }
                if !segment.bytes().all(|b| b.is_ascii_alphanumeric() || b"-._".contains(&b)) {
                    return bad("letters, digits, '.', '-' and '_' only");
                }
            }
        }
        Ok(Self { text: text.into(), domain_bytes: domain.len() })
    }

    /// The whole text.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.text
    }

    /// Its trust domain's name.
    #[must_use]
    pub fn trust_domain(&self) -> &str {
        &self.text["spiffe://".len()..][..self.domain_bytes]
    }

    /// Its path: empty, or starting with `/`.
    #[must_use]
    pub fn path(&self) -> &str {
        &self.text["spiffe://".len() + self.domain_bytes..]
    }

    /// The agent this names, if it names one of `domain`.
    #[must_use]
    pub fn agent(&self, domain: &TrustDomain) -> Option<AgentId> {
        if self.trust_domain() != domain.as_str() {
            return None;
        }
        AgentId::parse(self.path().strip_prefix("/agent/")?).ok()
    }
}

impl fmt::Display for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

impl fmt::Debug for SpiffeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "SpiffeId({})", self.text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_agent_has_a_spiffe_id_and_back() {
        let domain = TrustDomain::parse("example.org").unwrap();
        let agent = AgentId::parse("builder/7f3a").unwrap();
        let id = agent.spiffe_id(&domain);
        assert_eq!(id.as_str(), "spiffe://example.org/agent/builder/7f3a");
        assert_eq!(SpiffeId::parse(id.as_str()).unwrap().agent(&domain), Some(agent));
        assert_eq!(domain.server().agent(&domain), None);
        assert_eq!(id.agent(&TrustDomain::parse("other.org").unwrap()), None);
    }

    #[test]
    fn names_that_break_the_standard_are_refused() {
        for bad in ["", "UPPER.org", "a b", "münchen", "a/b", &"a".repeat(256)] {
            assert!(TrustDomain::parse(bad).is_err(), "{bad}");
        }
        for bad in ["", "a", "a/", "/b", "a/b/c", "a/..", "./b", "a/b c", "a/%41", &format!("a/{}", "b".repeat(65))] {
            assert!(AgentId::parse(bad).is_err(), "{bad}");
        }
        for bad in [
            "",
            "http://a/b",
            "spiffe://",
            "spiffe://a/",
            "spiffe://a//b",
            "spiffe://A/b",
            "spiffe://a:1/b",
            "spiffe://u@a/b",
            "spiffe://a/b?q",
            "spiffe://a/b#f",
            "spiffe://a/../b",
        ] {
            assert!(SpiffeId::parse(bad).is_err(), "{bad}");
        }
    }
}

//! keyward's private certificate extension: what a certificate says of the agent beyond its name.

use super::{AgentId, Digest};

/// 2.25.177325374.1. No arc above 28 bits: real parsers (pkilint among them) refuse a certificate with a larger one.
pub const AGENT_EXTENSION_OID: [u64; 4] = [2, 25, 177_325_374, 1];
/// The same as the content of a DER OBJECT IDENTIFIER.
pub const AGENT_EXTENSION_OID_DER: &[u8] = &[0x69, 0xd4, 0xc7, 0x8a, 0x3e, 0x01];

/// SEQUENCE { version INTEGER (1), epoch INTEGER, lineageRoot UTF8String, appraisalIndex INTEGER, policyHash OCTET STRING OPTIONAL }.
/// Non-critical: a stack that does not know it goes by the certificate's lifetime.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AgentExtension {
    /// Denied as soon as the agent's epoch has moved on.
    pub epoch: u32,
    /// The first ancestor; the agent itself where nobody spawned it.
    pub lineage_root: AgentId,
    /// Size of the ledger when the evidence was appraised: the appraisal stands at this index or after.
    pub appraisal_index: u64,
    /// SHA-256 of the policy that granted, if a policy did.
    pub policy_hash: Option<Digest>,
}

const SEQUENCE: u8 = 0x30;
const INTEGER: u8 = 0x02;
const UTF8_STRING: u8 = 0x0c;
const OCTET_STRING: u8 = 0x04;

impl AgentExtension {
    /// DER. An agent's name has at most 129 bytes, so lengths need at most two bytes.
    #[must_use]
    pub fn to_der(&self) -> Vec<u8> {
        let mut content = Vec::with_capacity(64);
        tlv(&mut content, INTEGER, &[1]);
        integer(&mut content, self.epoch.into());
        tlv(&mut content, UTF8_STRING, self.lineage_root.as_str().as_bytes());
        integer(&mut content, self.appraisal_index);
        if let Some(hash) = &self.policy_hash {
            tlv(&mut content, OCTET_STRING, &hash.0);
        }
        let mut der = Vec::with_capacity(content.len() + 4);
        tlv(&mut der, SEQUENCE, &content);
        der
    }

    /// From exactly the DER that `to_der` makes; `None` for anything else.
    #[must_use]
    pub fn from_der(der: &[u8]) -> Option<Self> {
        let (mut content, rest) = take(der, SEQUENCE)?;
        if !rest.is_empty() {
            return None;
        }
        let mut next = |tag| {
            let (value, rest) = take(content, tag)?;
            content = rest;
            Some(value)
        };
        if next(INTEGER)? != [1] {
            return None;
        }
        let epoch = u32::try_from(number(next(INTEGER)?)?).ok()?;
        let lineage_root = AgentId::parse(std::str::from_utf8(next(UTF8_STRING)?).ok()?).ok()?;
        let appraisal_index = number(next(INTEGER)?)?;
        let policy_hash = next(OCTET_STRING).map(Digest::from_slice);
        let policy_hash = match policy_hash {
            None if content.is_empty() => None,
            Some(Some(hash)) if content.is_empty() => Some(hash),
            _ => return None,
        };
        let found = Self { epoch, lineage_root, appraisal_index, policy_hash };
        (found.to_der() == der).then_some(found)
    }
}

fn tlv(out: &mut Vec<u8>, tag: u8, value: &[u8]) {
    out.push(tag);
    // Lengths stay below 65,536 by construction; the two long forms are enough.
    match value.len() {
        short @ 0..128 => out.push(short as u8),
        medium @ 128..256 => out.extend([0x81, medium as u8]),
        long => out.extend([0x82, (long >> 8) as u8, long as u8]),
    }
    out.extend_from_slice(value);
}

fn integer(out: &mut Vec<u8>, value: u64) {
    let bytes = value.to_be_bytes();
    let skip = bytes.iter().take_while(|byte| **byte == 0).count().min(7);
    let mut content = bytes[skip..].to_vec();
    if content[0] & 0x80 != 0 {
        content.insert(0, 0);
    }
    tlv(out, INTEGER, &content);
}

fn number(content: &[u8]) -> Option<u64> {
    if content.is_empty() || content.len() > 9 || content[0] & 0x80 != 0 || (content.len() == 9 && content[0] != 0) {
        return None;
    }
    Some(content.iter().fold(0, |value, byte| value << 8 | u64::from(*byte)))
}

fn take(der: &[u8], tag: u8) -> Option<(&[u8], &[u8])> {
    let (head, rest) = der.split_first()?;
    let (first, rest) = rest.split_first()?;
    if *head != tag {
        return None;
    }
    let (length, rest) = match first {
        short @ 0..=0x7f => (usize::from(*short), rest),
        0x81 => (usize::from(*rest.first()?), &rest[1..]),
        0x82 => (usize::from(*rest.first()?) << 8 | usize::from(*rest.get(1)?), &rest[2..]),
        _ => return None,
    };
    rest.split_at_checked(length)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_goes_both_ways_and_nothing_else_is_taken() {
        for (epoch, index, hash) in [(1, 0, None), (128, 255, Some(Digest([7; 32]))), (u32::MAX, u64::MAX, None)] {
            let extension = AgentExtension {
                epoch,
                lineage_root: AgentId::parse(&format!("{}/b", "a".repeat(64))).unwrap(),
                appraisal_index: index,
                policy_hash: hash,
            };
            let der = extension.to_der();
            assert_eq!(AgentExtension::from_der(&der), Some(extension));
            for at in 0..der.len() {
                assert_eq!(AgentExtension::from_der(&der[..at]), None);
            }
            assert_eq!(AgentExtension::from_der(&[&der[..], &[0]].concat()), None);
        }
    }
}

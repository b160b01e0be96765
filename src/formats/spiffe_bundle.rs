//! The bundle as SPIFFE tells it (Trust Domain and Bundle §4): a JWK Set (RFC 7517).

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde::Serialize;
use serde_json::{Map, Value};
use x509_parser::oid_registry::{
    OID_EC_P256, OID_KEY_TYPE_EC_PUBLIC_KEY, OID_NIST_EC_P384, OID_NIST_EC_P521, OID_PKCS1_RSAENCRYPTION, OID_SIG_ED25519, Oid,
};
use x509_parser::public_key::PublicKey;
use x509_parser::x509::SubjectPublicKeyInfo;

use super::jwk;
use crate::model;
use crate::proto::Bundle;

/// Something that has no form here. Left out of the set it would be left out of what peers trust.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum UnknownAuthority {
    /// The certificate at this place in the bundle, from 0.
    #[error("authority {0} is no certificate of an EC (P-256, P-384, P-521), RSA or Ed25519 key")]
    Certificate(usize),
    /// The token-signing key at this place in the bundle, from 0.
    #[error("token-signing key {0} is of a kind that is not known here")]
    TokenSigningKey(usize),
}

/// The set. No parameter is in it that SPIFFE does not define.
#[derive(Debug, Serialize)]
pub struct SpiffeBundle {
    keys: Vec<Member>,
    spiffe_sequence: u64,
    spiffe_refresh_hint: u32,
}

#[derive(Debug, Serialize)]
#[serde(tag = "use")]
enum Member {
    #[serde(rename = "x509-svid")]
    X509 {
        #[serde(flatten)]
        key: Key,
        /// Exactly the one authority, no chain (X509-SVID §6.2); such a key has no `kid`.
        x5c: [String; 1],
    },
    /// Such a key has a `kid` and no `x5c` (JWT-SVID §5.1).
    #[serde(rename = "jwt-svid")]
    Jwt {
        #[serde(flatten)]
        key: Map<String, Value>,
        kid: String,
    },
}

/// RFC 7518 §6.2, §6.3; RFC 8037 §2.
#[derive(Debug, Serialize)]
#[serde(tag = "kty")]
enum Key {
    #[serde(rename = "EC")]
    Ec { crv: &'static str, x: String, y: String },
    #[serde(rename = "RSA")]
    Rsa { n: String, e: String },
    #[serde(rename = "OKP")]
    Okp { crv: &'static str, x: String },
}

impl SpiffeBundle {
    /// Of a bundle.
    ///
    /// # Errors
    /// For what has no form in it.
    pub fn of(bundle: &Bundle) -> Result<Self, UnknownAuthority> {
        let x509_svid = |(at, der): (usize, &Vec<u8>)| {
            let key = key_of(der).ok_or(UnknownAuthority::Certificate(at))?;
            Ok(Member::X509 { key, x5c: [STANDARD.encode(der)] })
        };
        let jwt_svid = |(at, spki): (usize, &Vec<u8>)| {
            let key = model::PublicKey::from_spki(spki).map_err(|_| UnknownAuthority::TokenSigningKey(at))?;
            Ok(Member::Jwt { key: jwk::Jwk::bare(&key).members().clone(), kid: jwk::Jwk::thumbprint(&key) })
        };
        let authorities = bundle.authorities.iter().enumerate().map(x509_svid);
        let keys = authorities.chain(bundle.token_signing_keys.iter().enumerate().map(jwt_svid)).collect::<Result<_, _>>()?;
        Ok(Self { keys, spiffe_sequence: bundle.sequence, spiffe_refresh_hint: bundle.refresh_hint_seconds })
    }
}

fn key_of(der: &[u8]) -> Option<Key> {
    let (rest, certificate) = x509_parser::parse_x509_certificate(der).ok()?;
    let spki = certificate.public_key();
    let bits = &spki.subject_public_key.data;
    let algorithm = &spki.algorithm.algorithm;
    match () {
        () if !rest.is_empty() => None,
        () if *algorithm == OID_KEY_TYPE_EC_PUBLIC_KEY => ec(spki, bits),
        () if *algorithm == OID_SIG_ED25519 => {
            (bits.len() == 32).then(|| Key::Okp { crv: "Ed25519", x: URL_SAFE_NO_PAD.encode(bits) })
        }
        () if *algorithm == OID_PKCS1_RSAENCRYPTION => match spki.parsed().ok()? {
            PublicKey::RSA(rsa) => Some(Key::Rsa { n: unsigned(rsa.modulus), e: unsigned(rsa.exponent) }),
            _ => None,
        },
        () => None,
    }
}

/// Both coordinates in the full width of the curve. The uncompressed form alone (RFC 5480 §2.2) says both.
fn ec(spki: &SubjectPublicKeyInfo<'_>, point: &[u8]) -> Option<Key> {
    let curve: Oid<'_> = spki.algorithm.parameters.as_ref()?.as_oid().ok()?;
    let curves = [(OID_EC_P256, "P-256", 32), (OID_NIST_EC_P384, "P-384", 48), (OID_NIST_EC_P521, "P-521", 66)];
    let (_, crv, width) = curves.into_iter().find(|(oid, ..)| *oid == curve)?;
    let (form, coordinates) = point.split_first()?;
    let (x, y) = coordinates.split_at_checked(width)?;
    let text = |coordinate| URL_SAFE_NO_PAD.encode(coordinate);
    (*form == 4 && y.len() == width).then(|| Key::Ec { crv, x: text(x), y: text(y) })
}

/// As few bytes as it takes (RFC 7518 §2, Base64urlUInt): DER puts a zero before what would be negative.
fn unsigned(number: &[u8]) -> String {
    let zeros = number.iter().take_while(|byte| **byte == 0).count();
    URL_SAFE_NO_PAD.encode(&number[zeros.min(number.len().saturating_sub(1))..])
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn authority(algorithm: &'static rcgen::SignatureAlgorithm) -> (rcgen::KeyPair, Vec<u8>) {
        let key = rcgen::KeyPair::generate_for(algorithm).unwrap();
        let mut parameters = rcgen::CertificateParams::default();
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let certificate = parameters.self_signed(&key).unwrap().der().to_vec();
        (key, certificate)
    }

    fn told(authorities: Vec<Vec<u8>>) -> Value {
        let bundle = Bundle { authorities, sequence: u64::MAX, refresh_hint_seconds: 300, token_signing_keys: Vec::new() };
        serde_json::to_value(SpiffeBundle::of(&bundle).unwrap()).unwrap()
    }

    #[test]
    fn each_kind_of_key_is_told_as_its_own_kind() {
        use rcgen::PublicKeyData as _;
        for (algorithm, crv, width) in [
            (&rcgen::PKCS_ECDSA_P256_SHA256, "P-256", 32),
            (&rcgen::PKCS_ECDSA_P384_SHA384, "P-384", 48),
            (&rcgen::PKCS_ECDSA_P521_SHA512, "P-521", 66),
        ] {
            let (key, certificate) = authority(algorithm);
            let (x, y) = key.der_bytes()[1..].split_at(width);
            let [x, y] = [x, y].map(|coordinate| URL_SAFE_NO_PAD.encode(coordinate));
            let x5c = [STANDARD.encode(&certificate)];
            let expected = json!({"kty": "EC", "use": "x509-svid", "crv": crv, "x": x, "y": y, "x5c": x5c});
            assert_eq!(told(vec![certificate])["keys"], json!([expected]));
        }
        let (key, certificate) = authority(&rcgen::PKCS_ED25519);
        let (x, x5c) = (URL_SAFE_NO_PAD.encode(key.der_bytes()), [STANDARD.encode(&certificate)]);
        let expected = json!({"kty": "OKP", "use": "x509-svid", "crv": "Ed25519", "x": x, "x5c": x5c});
        assert_eq!(told(vec![certificate])["keys"], json!([expected]));
        let (_, certificate) = authority(&rcgen::PKCS_RSA_SHA256);
        let rsa = &told(vec![certificate])["keys"][0];
        assert_eq!((&rsa["kty"], &rsa["e"]), (&json!("RSA"), &json!("AQAB")));
        let n = URL_SAFE_NO_PAD.decode(rsa["n"].as_str().unwrap()).unwrap();
        assert!(n.len() == 256 && n[0] >= 0x80, "a leading zero is DER's, not the number's");
    }

    #[test]
    fn the_set_has_its_sequence_and_hint_as_whole_numbers_and_keys_even_when_there_are_none() {
        assert_eq!(told(Vec::new()), json!({"keys": [], "spiffe_sequence": u64::MAX, "spiffe_refresh_hint": 300}));
    }

    #[test]
    fn a_token_signing_key_is_told_by_its_name_and_without_a_certificate() {
        use rcgen::PublicKeyData as _;
        let key = rcgen::KeyPair::generate().unwrap();
        let token_signing_keys = vec![key.subject_public_key_info()];
        let bundle = Bundle { token_signing_keys, sequence: 2, ..Bundle::default() };
        let told = serde_json::to_value(SpiffeBundle::of(&bundle).unwrap()).unwrap();
        let [x, y] = [1..33, 33..65].map(|range| URL_SAFE_NO_PAD.encode(&key.der_bytes()[range]));
        // RFC 7638 §3.
        let named = format!(r#"{{"crv":"P-256","kty":"EC","x":"{x}","y":"{y}"}}"#);
        let kid = URL_SAFE_NO_PAD.encode(model::Digest::of(named.as_bytes()).0);
        assert_eq!(told["keys"], json!([{"kty": "EC", "use": "jwt-svid", "crv": "P-256", "x": x, "y": y, "kid": kid}]));
    }

    #[test]
    fn what_cannot_be_told_is_an_error_and_not_left_out() {
        let (_, good) = authority(&rcgen::PKCS_ECDSA_P256_SHA256);
        let bundle = Bundle { authorities: vec![good.clone(), b"no certificate".to_vec()], ..Bundle::default() };
        assert_eq!(SpiffeBundle::of(&bundle).unwrap_err(), UnknownAuthority::Certificate(1));
        let bundle = Bundle { authorities: vec![good.clone()], token_signing_keys: vec![good], ..Bundle::default() };
        assert_eq!(SpiffeBundle::of(&bundle).unwrap_err(), UnknownAuthority::TokenSigningKey(0));
    }
}

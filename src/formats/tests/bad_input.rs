//! What strangers send: each refused with its reason.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use proptest::prelude::*;
use serde_json::json;

use super::{
    CALL, NOW, POST, Profile, Signer, cache, check_jws, component, dpop, expected_http, http_signature, jws, memory, reason,
    received_dpop, received_http, received_jws, signed_http, signed_jws, window,
};
use crate::formats::{Jwk, PAYLOAD_BYTES_MAX, raw_digest, tls};
use crate::model::{Algorithm, Digest, Reason};

/// A token with a header of the test's own making, honestly signed.
fn token(signer: &Signer, header: &str, payload: &str) -> String {
    let message = format!("{}.{}", URL_SAFE_NO_PAD.encode(header), URL_SAFE_NO_PAD.encode(payload));
    let signature = signer.message(message.as_bytes());
    format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature))
}

/// The other signature that verifies where this ECDSA signature on P-256 does: r and n - s.
fn mirrored(field: &str) -> String {
    const ORDER: [u8; 32] = [
        0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xbc, 0xe6, 0xfa, 0xad, 0xa7, 0x17,
        0x9e, 0x84, 0xf3, 0xb9, 0xca, 0xc2, 0xfc, 0x63, 0x25, 0x51,
    ];
    let base64 = field.strip_prefix("sig1=:").and_then(|rest| rest.strip_suffix(':')).unwrap();
    let mut signature = STANDARD.decode(base64).unwrap();
    let mut borrow = 0;
    for at in (0..32).rev() {
        let left = i16::from(ORDER[at]) - i16::from(signature[32 + at]) - borrow;
        borrow = i16::from(left < 0);
        signature[32 + at] = u8::try_from(left.rem_euclid(256)).unwrap();
    }
    format!("sig1=:{}:", STANDARD.encode(signature))
}

fn verdict(signer: &Signer, token: &str) -> Reason {
    let checked =
        received_jws::Received::parse(token, None).and_then(|received| received.check(&signer.verifying(Profile::Jws), None));
    checked.map_or_else(|refusal| refusal.reason, |_| Reason::Unspecified)
}

#[test]
fn no_header_talks_a_verifier_out_of_the_keys_own_algorithm() {
    let signer = Signer::new(Algorithm::P256);
    let kid = signer.kid();
    let other = Signer::new(Algorithm::P256).kid();
    let cases = [
        (format!(r#"{{"alg":"ES256","kid":"{kid}"}}"#), Reason::Unspecified),
        (format!(r#"{{"alg":"none","kid":"{kid}"}}"#), Reason::AlgorithmRefused),
        (format!(r#"{{"alg":"None","kid":"{kid}"}}"#), Reason::AlgorithmRefused),
        (format!(r#"{{"alg":"","kid":"{kid}"}}"#), Reason::AlgorithmRefused),
        (format!(r#"{{"alg":"HS256","kid":"{kid}"}}"#), Reason::AlgorithmRefused),
        (format!(r#"{{"alg":"HS512","kid":"{kid}"}}"#), Reason::AlgorithmRefused),
        (format!(r#"{{"alg":"RS256","kid":"{kid}"}}"#), Reason::AlgorithmRefused),
        (format!(r#"{{"alg":"es256","kid":"{kid}"}}"#), Reason::AlgorithmRefused),
        (format!(r#"{{"alg":"EdDSA","kid":"{kid}"}}"#), Reason::AlgorithmRefused),
        (format!(r#"{{"alg":["ES256"],"kid":"{kid}"}}"#), Reason::MalformedRequest),
        (format!(r#"{{"kid":"{kid}"}}"#), Reason::MalformedRequest),
        (r#"{"alg":"ES256"}"#.into(), Reason::KidUnknown),
        (r#"{"alg":"ES256","kid":""}"#.into(), Reason::KidUnknown),
        (r#"{"alg":"ES256","kid":7}"#.into(), Reason::MalformedRequest),
        (format!(r#"{{"alg":"ES256","kid":"{other}"}}"#), Reason::KidUnknown),
        (format!(r#"{{"alg":"ES256","kid":"{}"}}"#, "k".repeat(257)), Reason::KidUnknown),
        (format!(r#"{{"alg":"ES256","kid":"{kid}","crit":["x"],"x":1}}"#), Reason::MalformedRequest),
        (format!(r#"{{"alg":"ES256","kid":"{kid}","crit":[]}}"#), Reason::MalformedRequest),
        (format!(r#"{{"alg":"ES256","kid":"{kid}","b64":false}}"#), Reason::MalformedRequest),
        (format!(r#"{{"alg":"ES256","kid":"{kid}","b64":true}}"#), Reason::MalformedRequest),
        (format!(r#"{{"alg":"none","alg":"ES256","kid":"{kid}"}}"#), Reason::MalformedRequest),
        (format!(r#"{{"alg":"ES256","kid":"{kid}","x":{{"a":1,"a":2}}}}"#), Reason::MalformedRequest),
        (format!(r#"{{"alg":"ES256","kid":"{kid}"}} {{}}"#), Reason::MalformedRequest),
        (format!(r#"{{"alg":"ES256","kid":"{kid}","typ":"dpop+jwt"}}"#), Reason::ProfileMismatch),
        (format!(r#"{{"alg":"ES256","kid":"{kid}","typ":"AT+JWT"}}"#), Reason::ProfileMismatch),
        (format!(r#"{{"alg":"ES256","kid":"{kid}","typ":"application/wit+jwt"}}"#), Reason::ProfileMismatch),
        (format!(r#"{{"alg":"ES256","kid":"{kid}","x":"{}"}}"#, "x".repeat(8000)), Reason::RequestTooLarge),
        ("[]".into(), Reason::MalformedRequest),
        ("{".into(), Reason::MalformedRequest),
        ("[".repeat(3000), Reason::MalformedRequest),
    ];
    for (header, expected) in cases {
        assert_eq!(verdict(&signer, &token(&signer, &header, "{}")), expected, "{header}");
    }
    // A key that the message brings along is not even looked at.
    let thief = Signer::new(Algorithm::P256);
    let header = json!({ "alg": "ES256", "kid": kid, "jwk": Jwk::bare(&thief.public()).members() }).to_string();
    assert_eq!(verdict(&signer, &token(&thief, &header, "{}")), Reason::SignatureInvalid);
}

#[test]
fn a_changed_byte_anywhere_and_another_encoding_of_the_same_are_refused() {
    let signer = Signer::new(Algorithm::P256);
    let good = signed_jws(&signer, b"{\"a\":1}");
    assert_eq!(verdict(&signer, &good), Reason::Unspecified);
    for at in 0..good.len() {
        let mut changed = good.clone().into_bytes();
        changed[at] = if changed[at] == b'A' { b'B' } else { b'A' };
        assert_ne!(verdict(&signer, std::str::from_utf8(&changed).unwrap()), Reason::Unspecified, "byte {at}");
    }
    let (message, signature) = good.rsplit_once('.').unwrap();
    let raw = URL_SAFE_NO_PAD.decode(signature).unwrap();
    let encoded = |signature: &[u8]| format!("{message}.{}", URL_SAFE_NO_PAD.encode(signature));
    for signature in [&[][..], &raw[..63], &[&raw[..], &[0]].concat(), &[0; 64], &[0xff; 64]] {
        assert_eq!(verdict(&signer, &encoded(signature)), Reason::SignatureInvalid);
    }
    for other in
        [format!("{good}="), format!("{good}\n"), format!(" {good}"), format!("{good}.x"), message.to_owned(), String::new()]
    {
        assert_eq!(verdict(&signer, &other), Reason::MalformedRequest, "{other:?}");
    }
    // The last character of 64 bytes in base64url has four bits that say nothing: only zeros are accepted.
    let spare = ["A", "Q", "g", "w"].iter().filter(|last| good.ends_with(**last)).count();
    assert_eq!(spare, 1);
    let loose = format!("{}{}", &good[..good.len() - 1], char::from(good.as_bytes()[good.len() - 1] + 1));
    assert_eq!(verdict(&signer, &loose), Reason::MalformedRequest);
}

#[test]
fn claims_are_read_after_the_signature_and_to_the_letter() {
    let signer = Signer::new(Algorithm::P256);
    let now = NOW.seconds();
    let cache = cache();
    let check = |claims: serde_json::Value| {
        let expected = received_jws::Expected { audience: "https://b", window: window(), once: Some(memory(&cache)) };
        check_jws(&signer, &signed_jws(&signer, claims.to_string().as_bytes()), &expected)
            .map_or_else(|refusal| refusal.reason, |_| Reason::Unspecified)
    };
    let good = json!({ "aud": "https://b", "iat": now, "nbf": now, "exp": now + 60, "jti": "1" });
    let with = |name: &str, value: serde_json::Value| {
        let mut claims = good.clone();
        claims["jti"] = format!("{name} {value}").replace(' ', "-").chars().take(40).collect::<String>().into();
        claims[name] = value;
        claims
    };
    let without = |name: &str| {
        let mut claims = good.clone();
        claims["jti"] = format!("without-{name}").into();
        claims.as_object_mut().unwrap().remove(name);
        claims
    };
    let cases = [
        (good.clone(), Reason::Unspecified),
        (with("aud", json!("https://b/")), Reason::AudienceMismatch),
        (with("aud", json!("HTTPS://B")), Reason::AudienceMismatch),
        (with("aud", json!("https")), Reason::AudienceMismatch),
        (with("aud", json!([])), Reason::AudienceMismatch),
        (with("aud", json!(["a", ["https://b"]])), Reason::AudienceMismatch),
        (with("aud", json!(["a", "https://b"])), Reason::Unspecified),
        (with("aud", json!(7)), Reason::MalformedRequest),
        (with("aud", json!(vec!["https://b"; 65])), Reason::MalformedRequest),
        (without("aud"), Reason::MalformedRequest),
        (without("exp"), Reason::MalformedRequest),
        (without("iat"), Reason::MalformedRequest),
        (without("jti"), Reason::MalformedRequest),
        (without("nbf"), Reason::Unspecified),
        (with("exp", json!(now - 5)), Reason::MessageExpired),
        (with("exp", json!(now - 4)), Reason::Unspecified),
        (with("exp", json!(0)), Reason::MessageExpired),
        (with("exp", json!(now + 305)), Reason::Unspecified),
        (with("exp", json!(now + 306)), Reason::OutsideTimeWindow),
        (with("exp", json!(1_u64 << 53)), Reason::OutsideTimeWindow),
        (with("exp", json!(u64::MAX)), Reason::MalformedRequest),
        (with("exp", json!(-1)), Reason::MalformedRequest),
        (with("exp", json!("soon")), Reason::MalformedRequest),
        (with("exp", json!(1.5)), Reason::MalformedRequest),
        (with("iat", json!(now + 5)), Reason::Unspecified),
        (with("iat", json!(now + 6)), Reason::OutsideTimeWindow),
        (with("nbf", json!(now + 6)), Reason::OutsideTimeWindow),
        (with("jti", json!("")), Reason::MalformedRequest),
        (with("jti", json!("a b")), Reason::MalformedRequest),
        (with("jti", json!("j".repeat(257))), Reason::RequestTooLarge),
        (json!([]), Reason::MalformedRequest),
        (good, Reason::Replayed),
    ];
    for (claims, expected) in cases {
        assert_eq!(check(claims.clone()), expected, "{claims}");
    }
    // A forgery with the name of a message to come takes nothing away from that message.
    let to_come = json!({ "aud": "https://b", "iat": now, "exp": now + 60, "jti": "to-come" }).to_string();
    let expected = received_jws::Expected { audience: "https://b", window: window(), once: Some(memory(&cache)) };
    let thief = Signer::new(Algorithm::P256);
    let forged = token(&thief, &format!(r#"{{"alg":"ES256","kid":"{}"}}"#, signer.kid()), &to_come);
    assert_eq!(reason(check_jws(&signer, &forged, &expected)), Reason::SignatureInvalid);
    assert!(check_jws(&signer, &signed_jws(&signer, to_come.as_bytes()), &expected).is_ok());
}

#[test]
fn a_repeated_claim_is_refused_though_it_was_signed() {
    let signer = Signer::new(Algorithm::P256);
    let expected = received_jws::Expected { audience: "b", window: window(), once: None };
    let payload = format!(r#"{{"aud":"a","exp":{0},"aud":"b"}}"#, NOW.seconds() + 60);
    assert_eq!(reason(check_jws(&signer, &signed_jws(&signer, payload.as_bytes()), &expected)), Reason::MalformedRequest);
}

#[test]
fn a_header_or_payload_that_is_not_the_callers_is_not_signed() {
    let prepare = |typ: Option<&str>, extra: &str, payload: &[u8]| {
        let header = jws::Header { typ, extra: extra.as_bytes() };
        jws::prepare(Algorithm::P256, "kid", &header, payload, false)
            .map_or_else(|refusal| refusal.reason, |_| Reason::Unspecified)
    };
    assert_eq!(prepare(Some("vc+jwt"), r#"{"cty":"json"}"#, b"x"), Reason::Unspecified);
    for name in [
        "alg",
        "kid",
        "typ",
        "jku",
        "jwk",
        "jwks",
        "crit",
        "b64",
        "x5c",
        "x5u",
        "x5t",
        "x5t#S256",
        "trust_chain",
        "zip",
        "JKU",
        "X5u",
        "Alg",
        "\u{212a}id",
        "jw\u{212a}",
        "jwk\u{17f}",
        "kid\u{0}",
        "k id",
        "",
    ] {
        assert_eq!(prepare(None, &json!({ name: "x" }).to_string(), b"x"), Reason::MalformedRequest, "{name}");
    }
    assert_eq!(prepare(None, r#"{"a":1,"a":2}"#, b"x"), Reason::MalformedRequest);
    assert_eq!(prepare(None, "[]", b"x"), Reason::MalformedRequest);
    assert_eq!(prepare(None, &json!({ "a": "x".repeat(2048) }).to_string(), b"x"), Reason::RequestTooLarge);
    let many: serde_json::Map<_, _> = (0..17).map(|n| (n.to_string(), json!(0))).collect();
    assert_eq!(prepare(None, &serde_json::Value::Object(many).to_string(), b"x"), Reason::RequestTooLarge);
    assert_eq!(prepare(Some("at+jwt"), "", b"x"), Reason::ProfileMismatch);
    assert_eq!(prepare(Some(""), "", b"x"), Reason::MalformedRequest);
    assert_eq!(prepare(Some("a b"), "", b"x"), Reason::MalformedRequest);
    assert_eq!(prepare(None, "", &vec![0; PAYLOAD_BYTES_MAX]), Reason::Unspecified);
    assert_eq!(prepare(None, "", &vec![0; PAYLOAD_BYTES_MAX + 1]), Reason::RequestTooLarge);
    // The largest that is signed is also the largest that is verified.
    let signer = Signer::new(Algorithm::P256);
    assert_eq!(verdict(&signer, &signed_jws(&signer, &vec![0; PAYLOAD_BYTES_MAX])), Reason::Unspecified);
}

#[test]
fn a_digest_of_another_length_or_for_another_algorithm_is_refused() {
    for size in [0, 20, 31, 33, 48, 64] {
        assert_eq!(reason(raw_digest::prepare(Algorithm::P256, &vec![0; size])), Reason::DigestLengthInvalid);
    }
    assert_eq!(reason(raw_digest::prepare(Algorithm::Ed25519, &[0; 32])), Reason::AlgorithmRefused);
    for size in [0, 31, 33, 64] {
        assert_eq!(reason(tls::prepare(Algorithm::P256, tls::Role::Client, &vec![0; size])), Reason::DigestLengthInvalid);
    }
}

#[test]
fn an_rsa_key_is_of_one_size_one_exponent_and_one_padding() {
    let signer = Signer::new(Algorithm::Ps256);
    let good = Jwk::bare(&signer.public()).members().clone();
    assert_eq!(good.keys().map(String::as_str).collect::<Vec<_>>(), ["e", "kty", "n"]);
    assert_eq!(Jwk::parse(&good).unwrap(), signer.public());
    let modulus = signer.public().raw().to_vec();
    let encoded = |bytes: &[u8]| serde_json::Value::from(URL_SAFE_NO_PAD.encode(bytes));
    for (member, value) in [
        ("e", json!("Aw")),
        ("e", json!("AAEAAQ")),
        ("n", encoded(&modulus[1..])),
        ("n", encoded(&[&[0], &modulus[..]].concat())),
        ("n", encoded(&[&[0x7f], &modulus[1..]].concat())),
        ("n", encoded(&[&modulus[..255], &[modulus[255] & 0xfe]].concat())),
        ("crv", json!("P-256")),
    ] {
        let mut other = good.clone();
        other.insert(member.into(), value);
        assert_eq!(reason(Jwk::parse(&other)), Reason::KeyUnsupported, "{member}: {}", other[member]);
    }
    for (member, value) in [("alg", "RS256"), ("d", "AQAB"), ("p", "AQAB")] {
        let mut other = good.clone();
        other.insert(member.into(), value.into());
        assert_eq!(reason(Jwk::parse(&other)), Reason::MalformedRequest, "{member}");
    }
    for alg in ["RS256", "PS384", "PS512", "RSA-OAEP"] {
        let header = json!({ "alg": alg, "kid": signer.kid() }).to_string();
        assert_eq!(verdict(&signer, &token(&signer, &header, "{}")), Reason::AlgorithmRefused, "{alg}");
    }
    // In an HTTP message its signatures would be others.
    let named = http_signature::Parameters::default();
    let prepared = http_signature::prepare(Algorithm::Ps256, &signer.kid(), "sig1", &POST, &named, NOW);
    assert_eq!(reason(prepared), Reason::AlgorithmRefused);
    let ecdsa = Signer::new(Algorithm::P256);
    let (input, _) = signed_http(&ecdsa, &POST, None);
    for named in ["", ";alg=\"rsa-pss-sha512\"", ";alg=\"rsa-v1_5-sha256\""] {
        let input = input.replace(";alg=\"ecdsa-p256-sha256\"", named).replace(&ecdsa.kid(), &signer.kid());
        let signature = format!("sig1=:{}:", base64::engine::general_purpose::STANDARD.encode(signer.message(b"x")));
        let received = received_http::Received::parse(&input, &signature, None).unwrap();
        let checked = received.check(&signer.verifying(Profile::HttpMessageSignature), &expected_http(&POST));
        assert_eq!(reason(checked), Reason::AlgorithmRefused, "{named}");
    }
}

#[test]
fn a_jwk_of_another_kind_is_no_key() {
    let signer = Signer::new(Algorithm::P256);
    let good = Jwk::published(Profile::Jws, &signer.public()).unwrap().members().clone();
    assert!(Jwk::parse(&good).is_ok());
    let with = |name: &str, value: serde_json::Value| {
        let mut members = good.clone();
        members.insert(name.into(), value);
        Jwk::parse(&members).map_or_else(|refusal| refusal.reason, |_| Reason::Unspecified)
    };
    assert_eq!(with("d", json!("AAAA")), Reason::MalformedRequest);
    assert_eq!(with("k", json!("AAAA")), Reason::MalformedRequest);
    assert_eq!(with("use", json!("enc")), Reason::MalformedRequest);
    assert_eq!(with("alg", json!("ES384")), Reason::MalformedRequest);
    assert_eq!(with("key_ops", json!(["sign"])), Reason::MalformedRequest);
    assert_eq!(with("key_ops", json!(["verify"])), Reason::Unspecified);
    assert_eq!(with("kty", json!("oct")), Reason::KeyUnsupported);
    assert_eq!(with("kty", json!("OKP")), Reason::KeyUnsupported);
    assert_eq!(with("crv", json!("secp256k1")), Reason::KeyUnsupported);
    assert_eq!(with("x", json!("AAAA")), Reason::KeyUnsupported);
    assert_eq!(with("y", good["x"].clone()), Reason::KeyUnsupported, "off the curve");
    assert_eq!(with("x", json!(7)), Reason::MalformedRequest);
}

#[test]
fn a_proof_for_another_request_is_refused() {
    let signer = Signer::new(Algorithm::P256);
    let token = Digest::of(b"token");
    let request = dpop::Request { token_digest: Some(token), nonce: Some("n"), ..CALL };
    let proof = signer.compact(dpop::prepare(&signer.public(), &request, "1", NOW).unwrap());
    let cache = cache();
    let check = |proof: &str, request: dpop::Request<'_>, window| {
        let expected = received_dpop::Expected { request, window, once: memory(&cache) };
        received_dpop::Received::parse(proof)
            .and_then(|received| received.check(&signer.verifying(Profile::Dpop), &expected))
            .map_or_else(|refusal| refusal.reason, |_| Reason::Unspecified)
    };
    for other in [
        dpop::Request { method: "post", ..request },
        dpop::Request { method: "GET", ..request },
        dpop::Request { uri: "https://tools.example/run/", ..request },
        dpop::Request { uri: "https://tools.example:444/run", ..request },
        dpop::Request { uri: "http://tools.example/run", ..request },
        dpop::Request { uri: "https://tools.example.evil/run", ..request },
        dpop::Request { token_digest: Some(Digest::of(b"another")), ..request },
        dpop::Request { nonce: Some("m"), ..request },
    ] {
        assert_eq!(check(&proof, other, window()), Reason::BindingMismatch, "{other:?}");
    }
    let later = |seconds| super::Window { now: NOW.plus_seconds(seconds), ..window() };
    assert_eq!(check(&proof, request, later(305)), Reason::MessageExpired);
    let earlier = super::Window { now: NOW.minus_seconds(6), ..window() };
    assert_eq!(check(&proof, request, earlier), Reason::OutsideTimeWindow);
    // The same URI in another spelling is the same.
    let spelt = dpop::Request { uri: "HTTPS://Tools.Example:443/run", ..request };
    assert_eq!(check(&proof, spelt, window()), Reason::Unspecified);
    assert_eq!(check(&proof, request, window()), Reason::Replayed);
    let bare = signer.compact(dpop::prepare(&signer.public(), &CALL, "2", NOW).unwrap());
    assert_eq!(check(&bare, request, window()), Reason::BindingMismatch, "no ath where a token came along");

    // A proof with the private key in it, and one by a key that is not the one it is looked up under.
    let stranger = Signer::new(Algorithm::P256);
    let theirs = stranger.compact(dpop::prepare(&stranger.public(), &request, "3", NOW).unwrap());
    assert_eq!(check(&theirs, request, window()), Reason::KidUnknown);
    let mut jwk = Jwk::bare(&signer.public()).members().clone();
    jwk.insert("d".into(), "AAAA".into());
    let header = json!({ "typ": "dpop+jwt", "alg": "ES256", "jwk": jwk }).to_string();
    assert_eq!(check(&super::bad_input::token(&signer, &header, "{}"), request, window()), Reason::MalformedRequest);
    let header = json!({ "typ": "dpop+jwt", "alg": "HS256", "jwk": { "kty": "oct", "k": "AAAA" } }).to_string();
    assert_eq!(check(&super::bad_input::token(&signer, &header, "{}"), request, window()), Reason::AlgorithmRefused);
}

#[test]
fn a_proof_is_made_for_plain_uris_and_methods_alone() {
    let key = Signer::new(Algorithm::P256).public();
    let prepare = |method: &str, uri: &str| dpop::prepare(&key, &dpop::Request { method, uri, ..CALL }, "1", NOW);
    for uri in ["https://a", "https://a/", "http://a:80/b", "https://[::1]:8443/b", "https://a/b%20c"] {
        assert!(prepare("GET", uri).is_ok(), "{uri}");
    }
    for uri in [
        "",
        "/run",
        "a",
        "a/b",
        "ftp://a/b",
        "https:///b",
        "https://a/b?c",
        "https://a/b#c",
        "https://u@a/b",
        "https://u:p@a/",
        "https://a b/",
        "https://a/\u{e9}",
        "https://a\n/",
        "https://a:/b",
        "https://a:99999/b",
        "https://a:+80/b",
    ] {
        let refused = prepare("GET", uri).map_or_else(|refusal| refusal.reason, |_| Reason::Unspecified);
        assert_eq!(refused, Reason::MalformedRequest, "{uri:?}");
    }
    let long = format!("https://a/{}", "b".repeat(2048));
    assert_eq!(reason(prepare("GET", &long)), Reason::RequestTooLarge);
    for method in ["", "G T", "GET\n", &"G".repeat(33)] {
        assert_eq!(reason(prepare(method, "https://a")), Reason::MalformedRequest, "{method:?}");
    }
}

#[test]
fn an_http_signature_covers_what_it_says_and_nothing_slips_in() {
    let cover = |components: &[http_signature::Component<'_>]| {
        http_signature::prepare(Algorithm::P256, "kid", "sig", components, &http_signature::Parameters::default(), NOW)
            .map_or_else(|refusal| refusal.reason, |_| Reason::Unspecified)
    };
    for good in ["@method", "@status", "x-a_b.c", "\"@query-param\";name=\"id\"", "\"a\";req", "\"a\";sf;tr", "\"a\";key=\"b\""] {
        assert_eq!(cover(&[component(good, "v")]), Reason::Unspecified, "{good}");
    }
    for bad in [
        "",
        "@",
        "@signature-params",
        "@body",
        "Content-Type",
        "a b",
        "a\n",
        "a:",
        "\"a\"x",
        "\"a\";req=?0",
        "\"a\";req=1",
        "\"a\";x",
        "@query-param",
        "\"@query-param\"",
        "\"@method\";sf",
        "\"@status\";req",
        "\"a\";bs;sf",
        "\"a\";bs;key=\"b\"",
        "\"a\";name=\"b\"",
        "\u{e9}",
    ] {
        assert_eq!(cover(&[component(bad, "v")]), Reason::MalformedRequest, "{bad:?}");
    }
    for value in ["a\n\"@method\": GET", "a\r", "a\u{0}", "\u{e9}", "a\u{7f}"] {
        assert_eq!(cover(&[component("a", value)]), Reason::MalformedRequest, "{value:?}");
    }
    assert_eq!(cover(&[]), Reason::MalformedRequest);
    assert_eq!(cover(&[component("a", "1"), component("a", "2")]), Reason::MalformedRequest);
    assert_eq!(cover(&[component("\"a\";req;sf", "1"), component("\"a\";sf;req", "2")]), Reason::MalformedRequest);
    assert_eq!(cover(&[component("a", &"x".repeat(PAYLOAD_BYTES_MAX))]), Reason::RequestTooLarge);
    let names: Vec<String> = (0..65).map(|n| format!("x-{n}")).collect();
    let many: Vec<_> = names.iter().map(|name| component(name, "")).collect();
    assert_eq!(cover(&many), Reason::RequestTooLarge);
    for label in ["", "Sig", "1", "a b", "a\"", &"a".repeat(257)] {
        let refused = http_signature::prepare(Algorithm::P256, "kid", label, &POST, &http_signature::Parameters::default(), NOW);
        assert!(matches!(reason(refused), Reason::MalformedRequest | Reason::RequestTooLarge), "{label:?}");
    }
    let forever = http_signature::Parameters { lifetime_seconds: Some(u64::MAX), ..Default::default() };
    assert_eq!(reason(http_signature::prepare(Algorithm::P256, "kid", "sig", &POST, &forever, NOW)), Reason::MalformedRequest);
}

#[test]
fn an_http_signature_over_another_message_or_with_other_parameters_is_refused() {
    let signer = Signer::new(Algorithm::P256);
    let (input, signature) = signed_http(&signer, &POST, Some("n"));
    let cache = cache();
    let verdict = |input: &str, signature: &str, expected: &received_http::Expected<'_>| {
        received_http::Received::parse(input, signature, None)
            .and_then(|received| received.check(&signer.verifying(Profile::HttpMessageSignature), expected))
            .map_or_else(|refusal| refusal.reason, |_| Reason::Unspecified)
    };
    let good = expected_http(&POST);
    assert_eq!(verdict(&input, &signature, &good), Reason::Unspecified);

    let changed = [component("@method", "GET"), POST[1], POST[2]];
    assert_eq!(verdict(&input, &signature, &expected_http(&changed)), Reason::SignatureInvalid);
    assert_eq!(verdict(&input, &signature, &expected_http(&POST[..2])), Reason::BindingMismatch);
    let expecting = |required, tag, nonce| received_http::Expected { required, tag, nonce, ..good };
    assert_eq!(verdict(&input, &signature, &expecting(&["@method", "authorization"], None, None)), Reason::BindingMismatch);
    assert_eq!(verdict(&input, &signature, &expecting(&[], Some("other"), None)), Reason::BindingMismatch);
    assert_eq!(verdict(&input, &signature, &expecting(&[], None, Some("m"))), Reason::BindingMismatch);
    assert_eq!(verdict(&input, &signature, &expecting(&["@method"], None, Some("n"))), Reason::Unspecified);
    assert_eq!(verdict(&input, &signature, &expecting(&["@method"; 64], None, None)), Reason::Unspecified);
    assert_eq!(verdict(&input, &signature, &expecting(&["@method"; 65], None, None)), Reason::RequestTooLarge);

    let at = |now| received_http::Expected { window: super::Window { now, ..window() }, ..good };
    assert_eq!(verdict(&input, &signature, &at(NOW.plus_seconds(64))), Reason::Unspecified);
    assert_eq!(verdict(&input, &signature, &at(NOW.plus_seconds(65))), Reason::MessageExpired);
    assert_eq!(verdict(&input, &signature, &at(NOW.minus_seconds(6))), Reason::OutsideTimeWindow);

    let (unnamed, by_it) = signed_http(&signer, &POST, None);
    let once = received_http::Expected { once: Some(memory(&cache)), ..good };
    assert_eq!(verdict(&unnamed, &by_it, &once), Reason::Unspecified, "RFC 9421 asks for no nonce");
    assert_eq!(verdict(&unnamed, &by_it, &once), Reason::Replayed, "it is remembered by what was signed");
    assert_eq!(verdict(&unnamed, &mirrored(&by_it), &good), Reason::Unspecified, "of one ECDSA signature anybody makes another");
    assert_eq!(verdict(&unnamed, &mirrored(&by_it), &once), Reason::Replayed);
    let by_hand = |nonce: &str| {
        let list = format!("(\"@method\");created={};keyid=\"{}\";nonce=\"{nonce}\"", NOW.seconds(), signer.kid());
        let signature = signer.message(format!("\"@method\": POST\n\"@signature-params\": {list}").as_bytes());
        (format!("sig1={list}"), format!("sig1=:{}:", STANDARD.encode(signature)))
    };
    let once = received_http::Expected { tag: None, ..once };
    let verdict_of = |nonce: &str| {
        let (input, signature) = by_hand(nonce);
        verdict(&input, &signature, &once)
    };
    assert_eq!(verdict_of(&"n".repeat(256)), Reason::Unspecified);
    // Whoever has it count for longer accepts it no second time when it is forgotten.
    let later = |seconds, lifetime_seconds_max| received_http::Expected {
        window: super::Window { now: NOW.plus_seconds(seconds), skew_seconds: 5, lifetime_seconds_max },
        ..once
    };
    let (open, by_it) = by_hand("m");
    assert_eq!(verdict(&open, &by_it, &later(0, 1)), Reason::Unspecified);
    assert_eq!(verdict(&open, &by_it, &later(5, 300)), Reason::Replayed, "it is remembered");
    assert_eq!(verdict(&open, &by_it, &later(7, 300)), Reason::Replayed, "it is forgotten");
    let others = super::cache();
    let later = |seconds, lifetime_seconds_max| received_http::Expected {
        once: Some(memory(&others)),
        ..later(seconds, lifetime_seconds_max)
    };
    let (ends, by_it) = signed_http(&signer, &POST[..2], None);
    assert_eq!(verdict(&ends, &by_it, &later(0, 1)), Reason::Unspecified);
    assert_eq!(verdict(&ends, &by_it, &later(7, 300)), Reason::Replayed, "it counts until it expires, and was forgotten before");
    assert_eq!(verdict(&ends, &by_it, &later(65, 300)), Reason::MessageExpired);
    assert_eq!(verdict_of(&"n".repeat(257)), Reason::MalformedRequest, "what nobody remembers");
    assert_eq!(verdict(&unnamed, &signature, &good), Reason::SignatureInvalid);

    let replaced = |from: &str, to: &str| {
        assert!(input.contains(from));
        verdict(&input.replace(from, to), &signature, &good)
    };
    assert_eq!(replaced("ecdsa-p256-sha256", "hmac-sha256"), Reason::AlgorithmRefused);
    assert_eq!(replaced("ecdsa-p256-sha256", "ed25519"), Reason::AlgorithmRefused);
    assert_eq!(replaced(&signer.kid(), "another"), Reason::KidUnknown);
    assert_eq!(replaced(";keyid=", ";key="), Reason::KidUnknown);
    assert_eq!(replaced(";created=", ";Created="), Reason::MalformedRequest);
    assert_eq!(replaced("\"@method\" ", ""), Reason::SignatureInvalid);
    assert_eq!(replaced("\"@method\" ", "\"@method\" \"@method\" "), Reason::MalformedRequest);
    assert_eq!(replaced("\"@method\"", "\"@METHOD\""), Reason::MalformedRequest);
    assert_eq!(replaced("sig1=", "sig2="), Reason::MalformedRequest);
    assert_eq!(verdict(&format!("{input}, x=()"), &signature, &good), Reason::MalformedRequest, "which of the two?");
    assert_eq!(verdict("sig1=();keyid=\"a\"", &signature, &good), Reason::MalformedRequest);
    assert_eq!(verdict("sig1", &signature, &good), Reason::MalformedRequest);
    assert_eq!(verdict(&input, "sig1=1", &good), Reason::MalformedRequest);
    assert_eq!(verdict(&input, "", &good), Reason::MalformedRequest);
    assert_eq!(verdict(&" ".repeat(8193), &signature, &good), Reason::RequestTooLarge);
}

proptest! {
    #[test]
    fn no_text_makes_a_parser_panic(text in "\\PC{0,200}", other in "\\PC{0,100}", bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        let _ = received_jws::Received::parse(&text, None);
        let _ = received_jws::Received::parse(&text, Some(&bytes));
        let _ = received_dpop::Received::parse(&text);
        let _ = received_http::Received::parse(&text, &other, None);
        let _ = dpop::canonical_uri(&text);
        let _ = crate::formats::json::object("text", &bytes);
    }

    #[test]
    fn no_well_formed_stranger_makes_a_parser_panic(header in json_text(), payload in json_text(), list in "[-\"@a-z0-9=;:?() .*]{0,80}") {
        let signer = Signer::new(Algorithm::Ed25519);
        let token = token(&signer, &header, &payload);
        let _ = received_dpop::Received::parse(&token);
        if let Ok(received) = received_jws::Received::parse(&token, None) {
            let expected = received_jws::Expected { audience: "a", window: window(), once: None };
            let _ = received.check(&signer.verifying(Profile::Jws), Some(&expected));
        }
        let _ = received_http::Received::parse(&format!("sig=({list})"), "sig=:AAAA:", None);
        let _ = received_http::Received::parse(&format!("sig={list}"), "sig=:AAAA:", Some("sig"));
    }
}

/// JSON with the members that are looked for, of any kind.
fn json_text() -> impl Strategy<Value = String> {
    let value = prop_oneof![
        Just(json!("ES256")),
        Just(json!("EdDSA")),
        Just(json!("dpop+jwt")),
        Just(json!("a")),
        any::<i64>().prop_map(|n| json!(n)),
        any::<f64>().prop_map(|n| json!(n)),
        "\\PC{0,10}".prop_map(|text| json!(text)),
        Just(json!(null)),
        Just(json!([])),
        Just(json!({ "kty": "EC", "crv": "P-256", "x": "AA", "y": "AA" })),
        Just(json!({ "kty": "OKP", "crv": "Ed25519", "x": "" })),
    ];
    let name =
        prop::sample::select(vec!["alg", "kid", "typ", "jwk", "crit", "aud", "exp", "iat", "nbf", "jti", "htm", "htu", "ath"]);
    prop::collection::btree_map(name, value, 0..8).prop_map(|members| serde_json::to_string(&members).unwrap())
}

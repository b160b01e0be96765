//! No bytes of one profile are bytes of another.
//!
//! The bytes themselves are looked at, through Ed25519, which is given the message: with what a reader of each profile would take, and
//! that is written here anew, more generous than any real reader.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use proptest::prelude::*;

use super::{NOW, Profile, Signer, component, dpop, http_signature, jws, reason, received_dpop, received_http, received_jws};
use crate::formats::{Signed, SigningInput, tls};
use crate::model::{Algorithm, Reason};

/// The profiles whose reader might take these bytes for its own.
fn readers(bytes: &[u8]) -> Vec<Profile> {
    let mut readers = Vec::new();
    if bytes.starts_with(&[b' '; 64]) {
        readers.push(Profile::Tls);
    }
    if bytes.first() == Some(&b'"') {
        readers.push(Profile::HttpMessageSignature);
    }
    let typ = std::str::from_utf8(bytes)
        .ok()
        .and_then(|text| text.split_once('.'))
        .and_then(|(header, _)| URL_SAFE_NO_PAD.decode(header).ok())
        .and_then(|header| serde_json::from_slice::<serde_json::Value>(&header).ok())
        .map(|header| header["typ"].as_str().unwrap_or_default().to_ascii_lowercase());
    match typ {
        Some(typ) if typ.contains("dpop+jwt") => readers.push(Profile::Dpop),
        Some(_) => readers.push(Profile::Jws),
        None => {}
    }
    readers
}

fn only_its_own(input: &SigningInput) {
    // How what a key is tried with begins (`hsm`): those signatures are good for nothing.
    assert!(!input.for_token().starts_with(b"keyward/"));
    assert_eq!(readers(&input.for_token()), [input.profile()], "{:?}", String::from_utf8_lossy(&input.for_token()));
}

fn text() -> impl Strategy<Value = String> {
    prop_oneof![
        "[ -~]{0,40}",
        "\\PC{0,40}",
        Just(" ".repeat(64) + "TLS 1.3, client CertificateVerify"),
        Just("eyJ0eXAiOiJkcG9wK2p3dCJ9.e30".to_owned()),
        Just("\"@method\": GET".to_owned()),
        Just("dpop+jwt".to_owned()),
        Just("application/DPoP+JWT".to_owned()),
        Just("application/application/dpop+jwt".to_owned()),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(2000))]

    #[test]
    fn whatever_the_caller_says_the_bytes_stay_within_their_profile(
        a in text(), b in text(), c in text(), typ in proptest::option::of(text()), bytes in prop::collection::vec(any::<u8>(), 0..80),
        detached: bool,
    ) {
        let header = serde_json::json!({ &a: b.as_str() }).to_string();
        let jws = jws::prepare(
            Algorithm::Ed25519, "kid", &jws::Header { typ: typ.as_deref(), extra: header.as_bytes() }, &bytes, detached,
        );
        let http = http_signature::prepare(
            Algorithm::Ed25519, "kid", "sig", &[component("@path", &a), component(&b, &c)],
            &http_signature::Parameters { lifetime_seconds: None, nonce: typ.as_deref(), tag: None }, NOW,
        );
        let plain = http_signature::prepare(
            Algorithm::Ed25519, "kid", "sig", &[component("x", &a)], &http_signature::Parameters::default(), NOW,
        );
        let key = Signer::new(Algorithm::Ed25519).public();
        let request = dpop::Request { method: "GET", uri: &a, token_digest: None, nonce: typ.as_deref() };
        let dpop = dpop::prepare(&key, &request, &c, NOW);
        let fixed_uri = dpop::prepare(&key, &dpop::Request { uri: "https://a", ..request }, "n", NOW);
        let tls = tls::prepare(Algorithm::Ed25519, tls::Role::Client, &bytes);
        for input in [jws, http, plain, dpop, fixed_uri, tls].into_iter().flatten() {
            only_its_own(&input);
        }
    }

    #[test]
    fn no_reserved_type_is_ever_in_a_header_that_was_signed(
        reserved in 0..jws::RESERVED_TYPES.len(), prefix in "(application/|APPLICATION/|[a-z]{1,5}/)?", upper: bool, tail in "( |;x=1|/|\u{0})?",
    ) {
        let mut typ = prefix + jws::RESERVED_TYPES[reserved] + &tail;
        if upper {
            typ = typ.to_ascii_uppercase();
        }
        for header in [
            jws::Header { typ: Some(&typ), extra: b"" },
            jws::Header { typ: None, extra: serde_json::json!({ "typ": typ }).to_string().as_bytes() },
        ] {
            let refused = reason(jws::prepare(Algorithm::P256, "kid", &header, b"{}", false));
            prop_assert!(matches!(refused, Reason::ProfileMismatch | Reason::MalformedRequest));
        }
    }
}

#[test]
fn a_signature_of_one_profile_is_refused_by_the_verifier_of_every_other() {
    let signer = Signer::new(Algorithm::P256);
    let jws = super::signed_jws(&signer, b"{}");
    let proof = signer.compact(dpop::prepare(&signer.public(), &super::CALL, "n", NOW).unwrap());
    let (input, signature) = super::signed_http(&signer, &super::POST, None);
    // By the message.
    assert_eq!(reason(received_jws::Received::parse(&proof, None)), Reason::KidUnknown, "a proof names no kid");
    assert_eq!(reason(received_dpop::Received::parse(&jws)), Reason::ProfileMismatch);
    // By the key, though it is the very key that signed.
    let others = |own: Profile| {
        [Profile::Jws, Profile::HttpMessageSignature, Profile::Dpop, Profile::RawDigest, Profile::Tls]
            .into_iter()
            .filter(move |profile| *profile != own)
            .map(|profile| signer.verifying(profile))
    };
    for key in others(Profile::Jws) {
        assert_eq!(reason(received_jws::Received::parse(&jws, None).unwrap().check(&key, None)), Reason::ProfileMismatch);
    }
    for key in others(Profile::Dpop) {
        let cache = super::cache();
        let expected = received_dpop::Expected { request: super::CALL, window: super::window(), once: super::memory(&cache) };
        let received = received_dpop::Received::parse(&proof).unwrap();
        assert_eq!(reason(received.check(&key, &expected)), Reason::ProfileMismatch);
    }
    for key in others(Profile::HttpMessageSignature) {
        let received = received_http::Received::parse(&input, &signature, Some("sig1")).unwrap();
        assert_eq!(reason(received.check(&key, &super::expected_http(&super::POST))), Reason::ProfileMismatch);
    }
}

#[test]
fn a_raw_digest_of_another_profiles_bytes_is_believed_by_no_verifier_here() {
    // The one profile whose bytes nobody can judge: the digest of a JWS is as good as any.
    let signer = Signer::new(Algorithm::P256);
    let unsigned = super::signed_jws(&signer, b"{}");
    let message = unsigned.rsplit_once('.').unwrap().0;
    let digest = crate::model::Digest::of(message.as_bytes());
    let input = crate::formats::raw_digest::prepare(Algorithm::P256, &digest.0).unwrap();
    assert!(matches!(signer.finish(input), Signed::RawDigest(_)));
    let forged = format!("{message}.{}", URL_SAFE_NO_PAD.encode(signer.raw(&digest.0)));
    let check = |profile| received_jws::Received::parse(&forged, None).unwrap().check(&signer.verifying(profile), None);
    assert!(check(Profile::Jws).is_ok(), "the forgery is perfect");
    assert_eq!(reason(check(Profile::RawDigest)), Reason::ProfileMismatch);
    assert_eq!(crate::formats::Jwk::published(Profile::RawDigest, &signer.public()), None, "nor does a JWKS have the key");
}

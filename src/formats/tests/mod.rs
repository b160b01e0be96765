//! The room against the vectors of the RFCs, against itself, and against bad input.

mod bad_input;
mod separation;
mod vectors;

use super::http_signature::Component;
use super::signing::Signer;
use super::verify::{dpop as received_dpop, http_signature as received_http, jws as received_jws};
use super::{Bounds, Memory, Profile, ReplayCache, Window, algorithm, dpop, http_signature, jws};
use crate::model::{Reason, Refusal, UnixTime};

/// The time of every test.
const NOW: UnixTime = UnixTime::from_seconds(1_800_000_000);

fn window() -> Window {
    Window { now: NOW, skew_seconds: 5, lifetime_seconds_max: 300 }
}

fn cache() -> ReplayCache {
    ReplayCache::new(Bounds { all: 100, of_reader: 100, of_reader_scarce: 100, of_signer: 50 }, UnixTime::from_seconds(0))
}

fn memory(cache: &ReplayCache) -> Memory<'_> {
    cache.of("tools", "tools/1", "builder/1")
}

fn reason<T>(result: Result<T, Refusal>) -> Reason {
    match result {
        Ok(_) => panic!("it was accepted"),
        Err(refusal) => refusal.reason,
    }
}

fn component<'a>(identifier: &'a str, value: &'a str) -> Component<'a> {
    Component { identifier, value }
}

const POST: [Component<'_>; 3] = [
    Component { identifier: "@method", value: "POST" },
    Component { identifier: "@target-uri", value: "https://tools.example/run?task=7" },
    Component { identifier: "content-digest", value: "sha-256=:47DEQpj8HBSa+/TImW+5JCeuQeRkm5NMpJWZG3hSuFU=:" },
];

fn signed_http(signer: &Signer, components: &[Component<'_>], nonce: Option<&str>) -> (String, String) {
    let parameters = http_signature::Parameters { lifetime_seconds: Some(60), nonce, tag: Some("agent-call") };
    let algorithm = signer.public().algorithm();
    signer.fields(http_signature::prepare(algorithm, &signer.kid(), "sig1", components, &parameters, NOW).unwrap())
}

fn expected_http<'a>(components: &'a [Component<'a>]) -> received_http::Expected<'a> {
    received_http::Expected { components, required: &[], tag: Some("agent-call"), nonce: None, window: window(), once: None }
}

const CALL: dpop::Request<'_> =
    dpop::Request { method: "POST", uri: "https://tools.example/run", token_digest: None, nonce: None };

fn signed_jws(signer: &Signer, payload: &[u8]) -> String {
    let header = jws::Header { typ: Some("JWT"), extra: b"" };
    signer.compact(jws::prepare(signer.public().algorithm(), &signer.kid(), &header, payload, false).unwrap())
}

fn check_jws(signer: &Signer, token: &str, expected: &received_jws::Expected<'_>) -> Result<received_jws::Verified, Refusal> {
    received_jws::Received::parse(token, None)?.check(&signer.verifying(Profile::Jws), Some(expected))
}

#[test]
fn what_is_signed_for_each_profile_is_verified_once() {
    for algorithm in algorithm::ALL {
        let signer = Signer::new(algorithm);
        let cache = cache();

        let payload = format!(r#"{{"aud":["x","https://b"],"iat":{0},"exp":{1},"jti":"n1"}}"#, NOW.seconds(), NOW.seconds() + 60);
        let token = signed_jws(&signer, payload.as_bytes());
        let expected = received_jws::Expected { audience: "https://b", window: window(), once: Some(memory(&cache)) };
        let verified = check_jws(&signer, &token, &expected).unwrap();
        assert_eq!((verified.kid, verified.typ.as_deref()), (signer.kid(), Some("JWT")));
        assert_eq!(verified.claims.unwrap()["jti"], "n1");
        assert_eq!(reason(check_jws(&signer, &token, &expected)), Reason::Replayed);

        let request = dpop::Request { token_digest: Some(crate::model::Digest::of(b"token")), nonce: Some("abc"), ..CALL };
        let proof = signer.compact(dpop::prepare(&signer.public(), &request, "n1", NOW).unwrap());
        let expected = received_dpop::Expected { request, window: window(), once: memory(&cache) };
        // The same key and name as above: in life a key has one profile, and one memory may serve them all.
        let check =
            |proof: &str| received_dpop::Received::parse(proof).unwrap().check(&signer.verifying(Profile::Dpop), &expected);
        assert_eq!(reason(check(&proof)), Reason::Replayed);
        let proof = signer.compact(dpop::prepare(&signer.public(), &request, "n2", NOW).unwrap());
        assert_eq!(check(&proof).unwrap(), received_dpop::Verified { kid: signer.kid(), jti: "n2".into() });
        assert_eq!(reason(check(&proof)), Reason::Replayed);

        if algorithm == crate::model::Algorithm::Ps256 {
            // There is no such algorithm for HTTP messages.
            assert_eq!(cache.len(), 2);
            continue;
        }
        let (input, signature) = signed_http(&signer, &POST, Some("n3"));
        let expected = received_http::Expected { required: &["@method"], once: Some(memory(&cache)), ..expected_http(&POST) };
        let check = || {
            let received = received_http::Received::parse(&input, &signature, None).unwrap();
            received.check(&signer.verifying(Profile::HttpMessageSignature), &expected)
        };
        let verified = check().unwrap();
        assert_eq!(verified.covered, [r#""@method""#, r#""@target-uri""#, r#""content-digest""#]);
        assert_eq!(reason(check()), Reason::Replayed);
        assert_eq!(cache.len(), 3);
    }
}

#[test]
fn a_detached_payload_is_verified_with_the_payload_beside_it() {
    let signer = Signer::new(crate::model::Algorithm::P256);
    let header = jws::Header { typ: Some("JOSE"), extra: br#"{"cty":"agent-card+json"}"# };
    let input = jws::prepare(signer.public().algorithm(), &signer.kid(), &header, b"{\"name\":\"card\"}", true).unwrap();
    let token = signer.compact(input);
    assert!(token.contains(".."), "{token}");
    let check = |payload: Option<&[u8]>| {
        received_jws::Received::parse(&token, payload).and_then(|received| received.check(&signer.verifying(Profile::Jws), None))
    };
    assert_eq!(check(Some(b"{\"name\":\"card\"}")).unwrap().payload, b"{\"name\":\"card\"}");
    assert_eq!(reason(check(Some(b"{\"name\":\"Card\"}"))), Reason::SignatureInvalid);
    assert_eq!(reason(check(None)), Reason::SignatureInvalid);
    let within = signed_jws(&signer, b"inside");
    assert_eq!(reason(received_jws::Received::parse(&within, Some(b"inside"))), Reason::MalformedRequest);
}

//! The room of formats against other people's implementations: what keyward makes is read by them, what they make is read by
//! keyward, and a TLS handshake is signed with nothing but transcript hashes.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "a test fails by panicking")]

use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::Arc;

use aws_lc_rs::digest::{Digest as Hashed, SHA256};
use aws_lc_rs::encoding::AsDer as _;
use aws_lc_rs::rsa::KeySize;
use aws_lc_rs::signature::{
    ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair, Ed25519KeyPair, KeyPair as _, RSA_PSS_SHA256, RsaKeyPair,
};
use keyward::formats::http_signature::Component;
use keyward::formats::verify::{dpop as received_dpop, http_signature as received_http, jws as received_jws};
use keyward::formats::{
    Bounds, Jwk, Profile, ReplayCache, Signed, SigningInput, VerifyingKey, Window, dpop, http_signature, jwks, jws, tls,
};
use keyward::model::{Algorithm, PublicKey, UnixTime, unhex};
use serde_json::{Value, json};

#[path = "formats_room/handshake.rs"]
mod handshake;

/// A key in memory that signs what a token would be given.
#[derive(Debug)]
enum Signer {
    P256(EcdsaKeyPair),
    Ed25519(Ed25519KeyPair),
    Rsa(RsaKeyPair),
}

impl Signer {
    fn new(algorithm: &str) -> Self {
        match algorithm {
            "ES256" => Self::P256(EcdsaKeyPair::generate(&ECDSA_P256_SHA256_FIXED_SIGNING).unwrap()),
            "EdDSA" => Self::Ed25519(Ed25519KeyPair::generate().unwrap()),
            "PS256" => Self::Rsa(RsaKeyPair::generate(KeySize::Rsa2048).unwrap()),
            other => panic!("no key for {other}"),
        }
    }

    fn public(&self) -> PublicKey {
        match self {
            Self::P256(pair) => PublicKey::from_raw(Algorithm::P256, pair.public_key().as_ref()).unwrap(),
            Self::Ed25519(pair) => PublicKey::from_raw(Algorithm::Ed25519, pair.public_key().as_ref()).unwrap(),
            Self::Rsa(pair) => PublicKey::from_spki(pair.public_key().as_der().unwrap().as_ref()).unwrap(),
        }
    }

    fn finish(&self, input: SigningInput) -> Signed {
        let given = input.for_token();
        let signature = match self {
            Self::P256(pair) => pair.sign_digest(&Hashed::import_less_safe(&given, &SHA256).unwrap()).unwrap().as_ref().to_vec(),
            Self::Ed25519(pair) => pair.sign(&given).as_ref().to_vec(),
            Self::Rsa(pair) => {
                let mut signature = vec![0; pair.public_modulus_len()];
                pair.sign_digest(&RSA_PSS_SHA256, &Hashed::import_less_safe(&given, &SHA256).unwrap(), &mut signature).unwrap();
                signature
            }
        };
        input.finish(&signature).unwrap()
    }
}

/// Where scripts/test puts the others.
fn others(what: &str, case: &Value) -> Value {
    let own = concat!(env!("CARGO_MANIFEST_DIR"), "/target/others/bin/python");
    assert!(Path::new(own).exists(), "{own} is missing: scripts/test makes it");
    let mut child = Command::new(own)
        .args([concat!(env!("CARGO_MANIFEST_DIR"), "/tests/formats_room/others.py"), what])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(case.to_string().as_bytes()).unwrap();
    let done = child.wait_with_output().unwrap();
    assert!(done.status.success(), "the others disagree about {case}");
    serde_json::from_slice(&done.stdout).unwrap()
}

const URL: &str = "https://tools.example/run?task=7";

#[test]
fn others_read_what_keyward_signs() {
    for alg in ["ES256", "EdDSA", "PS256"] {
        let signer = Signer::new(alg);
        let (public, now) = (signer.public(), UnixTime::wall());
        let (algorithm, kid) = (public.algorithm(), Jwk::thumbprint(&public));
        let payload = br#"{"a":"b"}"#;
        let header = jws::Header { typ: Some("JWT"), extra: br#"{"cty":"x"}"# };
        let compact = |detached| match signer.finish(jws::prepare(algorithm, &kid, &header, payload, detached).unwrap()) {
            Signed::Jws(text) => text,
            other => panic!("{other:?}"),
        };
        let request = dpop::Request { method: "POST", uri: "https://tools.example/run", token_digest: None, nonce: Some("n") };
        let Signed::Dpop(proof) = signer.finish(dpop::prepare(&public, &request, "1", now).unwrap()) else { panic!() };
        let covered = [
            Component { identifier: "@method", value: "POST" },
            Component { identifier: "@authority", value: "tools.example" },
            Component { identifier: "@path", value: "/run" },
            Component { identifier: "\"@query-param\";name=\"task\"", value: "7" },
            Component { identifier: "x-agent", value: "a, b" },
        ];
        let parameters = http_signature::Parameters { lifetime_seconds: Some(60), nonce: Some("n"), tag: Some("agent-call") };
        // RFC 9421 has no name for what a PS256 key makes.
        let http = http_signature::prepare(algorithm, &kid, "ours", &covered, &parameters, now).ok().map(|input| {
            let Signed::HttpMessageSignature { signature_input, signature } = signer.finish(input) else { panic!() };
            json!({ "method": "POST", "url": URL, "headers": {
                "X-Agent": "a, b", "Signature-Input": signature_input, "Signature": signature,
            } })
        });
        assert_eq!(http.is_none(), alg == "PS256");
        let read = others(
            "read",
            &json!({
                "alg": alg, "kid": kid,
                "jwks": jwks([Jwk::published(Profile::Jws, &public).unwrap()]),
                "compact": compact(false), "detached": compact(true), "dpop": proof,
                "http": http,
            }),
        );
        assert_eq!(read["payload"], r#"{"a":"b"}"#);
        let claims = json!({ "htm": "POST", "htu": "https://tools.example/run", "iat": now.seconds(), "jti": "1", "nonce": "n" });
        assert_eq!(read["claims"], claims);
        assert_eq!(read["covered"].as_array().unwrap().len(), if http.is_some() { covered.len() } else { 0 });
    }
}

#[test]
fn keyward_reads_what_others_sign() {
    for alg in ["ES256", "EdDSA", "PS256"] {
        let covered = ["@method", "@authority", "@target-uri", "x-agent"];
        let http = json!({ "method": "POST", "url": URL, "headers": { "X-Agent": "a" }, "covered": covered });
        let written = others("write", &json!({ "alg": alg, "http": http }));
        let text = |name: &str| written[name].as_str().unwrap();
        let public = PublicKey::from_spki(&unhex(text("spki")).unwrap()).unwrap();
        let now = UnixTime::from_seconds(written["now"].as_u64().unwrap());
        let window = Window { now, skew_seconds: 10, lifetime_seconds_max: 300 };
        let cache =
            ReplayCache::new(Bounds { all: 10, of_reader: 10, of_reader_scarce: 10, of_signer: 10 }, UnixTime::from_seconds(0));
        let once = cache.of("tools", "tools/1", "builder/1");
        let key = |profile| VerifyingKey::new(profile, public.clone());

        let token = received_jws::Received::parse(text("compact"), None).unwrap();
        assert_eq!(token.kid(), text("kid"));
        let expected = received_jws::Expected { audience: "b", window, once: Some(once) };
        token.check(&key(Profile::Jws), Some(&expected)).unwrap();

        let proof = received_dpop::Received::parse(text("dpop")).unwrap();
        let request = dpop::Request { method: "GET", uri: "https://a.example/b", token_digest: None, nonce: None };
        proof.check(&key(Profile::Dpop), &received_dpop::Expected { request, window, once }).unwrap();

        if alg == "PS256" {
            continue;
        }
        let received = received_http::Received::parse(text("signature_input"), text("signature"), Some("theirs")).unwrap();
        let components = [
            Component { identifier: "@method", value: "POST" },
            Component { identifier: "@authority", value: "tools.example" },
            Component { identifier: "@target-uri", value: URL },
            Component { identifier: "x-agent", value: "a" },
        ];
        let expected = received_http::Expected {
            components: &components,
            required: &covered,
            tag: Some("agent-call"),
            nonce: Some("n"),
            window,
            once: Some(once),
        };
        received.check(&key(Profile::HttpMessageSignature), &expected).unwrap();
    }
}

#[test]
fn a_tls_handshake_is_signed_with_its_transcript_hashes_alone() {
    for (client, server) in [("ES256", "ES256"), ("EdDSA", "ES256"), ("ES256", "EdDSA"), ("PS256", "PS256")] {
        let signed = handshake::mutual(Arc::new(Signer::new(client)), Arc::new(Signer::new(server)));
        assert_eq!(signed, [tls::Role::Server, tls::Role::Client]);
    }
}

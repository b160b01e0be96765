//! The examples of the RFCs.

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use serde_json::json;

use super::{Profile, Window, component, dpop, http_signature, received_dpop, received_http};
use crate::formats::verify::VerifyingKey;
use crate::formats::{Jwk, algorithm, jwks, tls};
use crate::model::{Digest, PublicKey, UnixTime, hex};

fn jwk(value: &serde_json::Value) -> PublicKey {
    Jwk::parse(value.as_object().unwrap()).unwrap()
}

#[test]
fn rfc_7515_appendix_a3_is_verified() {
    let key = jwk(&json!({
        "kty": "EC", "crv": "P-256",
        "x": "f83OJ3D2xF1Bg8vub9tLe1gHMzV76e8Tus9uPHvRVEU",
        "y": "x_FEzRu9m36HLN_tue659LNpXW6pCyStikYjKIWI5a0",
    }));
    let message =
        b"eyJhbGciOiJFUzI1NiJ9.eyJpc3MiOiJqb2UiLA0KICJleHAiOjEzMDA4MTkzODAsDQogImh0dHA6Ly9leGFtcGxlLmNvbS9pc19yb290Ijp0cnVlfQ";
    let signature = "DtEhU3ljbEg8L38VWAfUAqOyKAM6-Xx-F4GawxaepmXFCgfTjDxw5djxLa8ISlSApmWQxfKTUJqPP3-Kg6NU1Q";
    assert!(algorithm::verifies(&key, message, &URL_SAFE_NO_PAD.decode(signature).unwrap()));
}

#[test]
fn rfc_8037_appendix_a_is_verified_and_named() {
    let key = jwk(&json!({ "kty": "OKP", "crv": "Ed25519", "x": "11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo" }));
    // RFC 7638's own example is an RSA key; this is A.3.
    assert_eq!(Jwk::thumbprint(&key), "kPrK_qmxVWaYVA9wwBF6Iuo3vVzz7TxHCTwXBygrS4k");
    let signature = "hgyY0il_MGCjP0JzlnLWG1PPOt7-09PGcvMg3AIbQR6dWbhijcNR4ki4iylGjg5BhVsPt9g7sVvpAr_MuM0KAg";
    let message = b"eyJhbGciOiJFZERTQSJ9.RXhhbXBsZSBvZiBFZDI1NTE5IHNpZ25pbmc";
    assert!(algorithm::verifies(&key, message, &URL_SAFE_NO_PAD.decode(signature).unwrap()));
}

#[test]
fn rfc_9449_proofs_are_verified_for_their_requests() {
    const HEADER: &str = "eyJ0eXAiOiJkcG9wK2p3dCIsImFsZyI6IkVTMjU2IiwiandrIjp7Imt0eSI6IkVDIiwieCI6Imw4dEZyaHgtMzR0VjNoUklDUkRZOXpDa0RscEJoRjQyVVFVZldWQVdCRnMiLCJ5IjoiOVZFNGpmX09rX282NHpiVFRsY3VOSmFqSG10NnY5VERWclUwQ2R2R1JEQSIsImNydiI6IlAtMjU2In19";
    let key = jwk(&json!({
        "kty": "EC", "crv": "P-256",
        "x": "l8tFrhx-34tV3hRICRDY9zCkDlpBhF42UQUfWVAWBFs",
        "y": "9VE4jf_Ok_o64zbTTlcuNJajHmt6v9TDVrU0CdvGRDA",
    }));
    let check = |claims_and_signature: &str, request: dpop::Request<'_>, now: u64| {
        let received = received_dpop::Received::parse(&format!("{HEADER}.{claims_and_signature}"))?;
        // §6.1.
        assert_eq!(received.kid(), "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I");
        let now = UnixTime::from_seconds(now);
        let window = Window { now, skew_seconds: 0, lifetime_seconds_max: 60 };
        let once = super::cache();
        received.check(
            &VerifyingKey::new(Profile::Dpop, key.clone()),
            &received_dpop::Expected { request, window, once: super::memory(&once) },
        )
    };
    // §4.1, figure 2.
    let token_request =
        dpop::Request { method: "POST", uri: "https://server.example.com/token", token_digest: None, nonce: None };
    let verified = check(
        "eyJqdGkiOiItQndDM0VTYzZhY2MybFRjIiwiaHRtIjoiUE9TVCIsImh0dSI6Imh0dHBzOi8vc2VydmVyLmV4YW1wbGUuY29tL3Rva2VuIiwiaWF0IjoxNTYyMjYyNjE2fQ.2-GxA6T8lP4vfrg8v-FdWP0A0zdrj8igiMLvqRMUvwnQg4PtFLbdLXiOSsX0x7NVY-FNyJK70nfbV37xRZT3Lg",
        token_request,
        1_562_262_620,
    );
    assert_eq!(verified.unwrap().jti, "-BwC3ESc6acc2lTc");
    // §7.1, figure 12: with the digest of the access token.
    let digest = Digest::of(b"Kz~8mXK1EalYznwH-LC-1fBAo.4Ljp~zsPE_NeO.gxU");
    let resource_request = dpop::Request {
        method: "GET",
        uri: "https://resource.example.org/protectedresource",
        token_digest: Some(digest),
        nonce: None,
    };
    let verified = check(
        "eyJqdGkiOiJlMWozVl9iS2ljOC1MQUVCIiwiaHRtIjoiR0VUIiwiaHR1IjoiaHR0cHM6Ly9yZXNvdXJjZS5leGFtcGxlLm9yZy9wcm90ZWN0ZWRyZXNvdXJjZSIsImlhdCI6MTU2MjI2MjYxOCwiYXRoIjoiZlVIeU8ycjJaM0RaNTNFc05yV0JiMHhXWG9hTnk1OUlpS0NBcWtzbVFFbyJ9.2oW9RP35yRqzhrtNP86L-Ey71EOptxRimPPToA1plemAgR6pxHF8y6-yqyVnmcw6Fy1dqd-jfxSYoMxhAJpLjA",
        resource_request,
        1_562_262_620,
    );
    assert_eq!(verified.unwrap().jti, "e1j3V_bKic8-LAEB");
}

/// Verifies a signature of RFC 9421 appendix B with everything that the checks need but a nonce.
fn rfc_9421(
    spki: &str,
    signature_input: &str,
    signature: &str,
    components: &[http_signature::Component<'_>],
) -> Result<received_http::Verified, crate::model::Refusal> {
    let received = received_http::Received::parse(signature_input, signature, None)?;
    let public = PublicKey::from_spki(&STANDARD.decode(spki).unwrap()).unwrap();
    let key = VerifyingKey::named(Profile::HttpMessageSignature, received.kid(), public);
    let window = Window { now: UnixTime::from_seconds(1_618_884_500), skew_seconds: 0, lifetime_seconds_max: 300 };
    let expected = received_http::Expected { components, required: &[], tag: None, nonce: None, window, once: None };
    received.check(&key, &expected)
}

#[test]
fn rfc_9421_appendix_b24_is_verified() {
    let components = [
        // Also what is not covered, and in another order: the verifier shows what it has.
        component("date", "Tue, 20 Apr 2021 02:07:56 GMT"),
        component("content-length", "23"),
        component("content-type", "application/json"),
        component("@status", "200"),
        component(
            "content-digest",
            "sha-512=:mEWXIS7MaLRuGgxOBdODa3xqM1XdEvxoYhvlCFJ41QJgJc4GTsPp29l5oGX69wWdXymyU0rjJuahq4l5aGgfLQ==:",
        ),
    ];
    let verified = rfc_9421(
        "MFkwEwYHKoZIzj0CAQYIKoZIzj0DAQcDQgAEqIVYZVLCrPZHGHjP17CTW0/+D9Lfw0EkjqF7xB4FivAxzic30tMM4GF+hR6Dxh71Z50VGGdldkkDXZCnTNnoXQ==",
        r#"sig-b24=("@status" "content-type" "content-digest" "content-length");created=1618884473;keyid="test-key-ecc-p256""#,
        "sig-b24=:wNmSUAhwb5LxtOtOpNa6W5xj067m5hFrj0XQ4fvpaCLx0NKocgPquLgyahnzDnDAUy5eCdlYUEkLIj+32oiasw==:",
        &components,
    );
    assert_eq!(verified.unwrap().kid, "test-key-ecc-p256");
}

#[test]
fn rfc_9421_appendix_b26_is_verified() {
    let components = [
        component("date", "Tue, 20 Apr 2021 02:07:55 GMT"),
        component("@method", "POST"),
        component("@path", "/foo"),
        component("@authority", "example.com"),
        component("content-type", "application/json"),
        component("content-length", "18"),
    ];
    let verified = rfc_9421(
        "MCowBQYDK2VwAyEAJrQLj5P/89iXES9+vFgrIy29clF9CC/oPPsw3c5D0bs=",
        r#"sig-b26=("date" "@method" "@path" "@authority" "content-type" "content-length");created=1618884473;keyid="test-key-ed25519""#,
        "sig-b26=:wqcAqbmYJ2ji2glfAMaRy4gruYYnx2nEFN2HN6jrnDnQCK1u02Gb04v9EDgwUPiu4A0w6vuQv5lIp5WPpBKRCw==:",
        &components,
    );
    assert_eq!(verified.unwrap().covered.len(), 6);
}

#[test]
fn rfc_8446_section_443_is_what_tls_signs() {
    // The example of the RFC: a server, a transcript hash of 32 bytes of 01.
    let expected = format!(
        "{}{}{}",
        "20".repeat(64),
        "544c5320312e332c207365727665722043657274696669636174655665726966790",
        ["0", &"01".repeat(32)].concat()
    );
    assert_eq!(hex(&tls::content(tls::Role::Server, &[1; 32])), expected);
}

#[test]
fn a_jwks_holds_published_keys_alone() {
    let key = jwk(&json!({
        "kty": "EC", "crv": "P-256",
        "x": "l8tFrhx-34tV3hRICRDY9zCkDlpBhF42UQUfWVAWBFs",
        "y": "9VE4jf_Ok_o64zbTTlcuNJajHmt6v9TDVrU0CdvGRDA",
    }));
    let all = [Profile::Jws, Profile::HttpMessageSignature, Profile::Dpop, Profile::RawDigest, Profile::Tls];
    let published: Vec<Jwk> = all.iter().filter_map(|profile| Jwk::published(*profile, &key)).collect();
    assert_eq!(published.len(), 2, "raw digests, TLS and DPoP have no place in a JWKS");
    let set: serde_json::Value = serde_json::from_str(&jwks(published)).unwrap();
    let first = set["keys"][0].as_object().unwrap();
    assert_eq!(first["kid"], "0ZcOCORZNYy-DWpqq30jZyJGHTN0d2HglBV3uiguA4I");
    assert_eq!((&first["use"], &first["alg"]), (&json!("sig"), &json!("ES256")));
    assert_eq!(Jwk::parse(first).unwrap(), key);
    assert_eq!(jwks([]), r#"{"keys":[]}"#);
}

"""Other people's implementations on the other side of the table: jwcrypto (JOSE) and http-message-signatures (RFC 9421).

Reads one JSON object from standard input, writes one to standard output; any disagreement ends it with a traceback.
    others.py read    what keyward signed is verified here
    others.py write   what is signed here is verified by keyward
"""

import datetime
import json
import sys
import time

import requests
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from http_message_signatures import HTTPMessageSigner, HTTPMessageVerifier, HTTPSignatureKeyResolver
from http_message_signatures.algorithms import ECDSA_P256_SHA256, ED25519
from jwcrypto import jwk, jws

HTTP = {"ES256": ECDSA_P256_SHA256, "EdDSA": ED25519}


class Keys(HTTPSignatureKeyResolver):
    def __init__(self, key):
        self.key = key

    def resolve_public_key(self, key_id):
        assert key_id == self.key.thumbprint()
        return self.key.get_op_key("verify")

    def resolve_private_key(self, key_id):
        return self.key.get_op_key("sign")


def request(asked):
    return requests.Request(asked["method"], asked["url"], headers=asked["headers"]).prepare()


def read(case):
    keys = jwk.JWKSet.from_json(case["jwks"])
    assert len(keys["keys"]) == 1
    key = keys.get_key(case["kid"])
    assert key.thumbprint() == case["kid"]

    token = jws.JWS()
    token.deserialize(case["compact"], key)
    assert token.jose_header == {"alg": case["alg"], "kid": case["kid"], "typ": "JWT", "cty": "x"}, token.jose_header
    header, nothing, signature = case["detached"].split(".")
    assert nothing == ""
    beside = jws.base64url_encode(token.payload)
    again = jws.JWS()
    again.deserialize(f"{header}.{beside}.{signature}", key)

    proof = jws.JWS()
    proof.deserialize(case["dpop"])
    shown = jwk.JWK(**proof.jose_header["jwk"])
    assert shown.thumbprint() == case["kid"] and not shown.has_private
    proof.verify(shown)
    assert proof.jose_header["typ"] == "dpop+jwt"

    covered = []
    if case["http"]:
        message = request(case["http"])
        verifier = HTTPMessageVerifier(signature_algorithm=HTTP[case["alg"]], key_resolver=Keys(key))
        results = verifier.verify(message, expect_tag="agent-call", max_age=datetime.timedelta(seconds=60))
        covered = [str(name) for name in results[0].covered_components if "@signature-params" not in str(name)]
    return {"payload": token.payload.decode(), "claims": json.loads(proof.payload), "covered": covered}


def write(case):
    kinds = {"ES256": {"kty": "EC", "crv": "P-256"}, "EdDSA": {"kty": "OKP", "crv": "Ed25519"}, "PS256": {"kty": "RSA", "size": 2048}}
    key = jwk.JWK.generate(**kinds[case["alg"]])
    kid = key.thumbprint()
    public = key.export_public(as_dict=True)
    now = int(time.time())

    def signed(header, claims):
        token = jws.JWS(json.dumps(claims))
        token.add_signature(key, protected=json.dumps({"alg": case["alg"], **header}))
        return token.serialize(compact=True)

    message = request(case["http"])
    if case["alg"] in HTTP:
        signer = HTTPMessageSigner(signature_algorithm=HTTP[case["alg"]], key_resolver=Keys(key))
        signer.sign(
            message, key_id=kid, nonce="n", tag="agent-call", label="theirs", covered_component_ids=case["http"]["covered"]
        )
    spki = key.get_op_key("verify").public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    bare = {name: public[name] for name in ("kty", "crv", "x", "y", "n", "e") if name in public}
    return {
        "kid": kid,
        "spki": spki.hex(),
        "now": now,
        "compact": signed({"kid": kid}, {"aud": ["a", "b"], "exp": now + 60, "iat": now, "jti": "1"}),
        "dpop": signed(
            {"typ": "dpop+jwt", "jwk": bare}, {"htm": "GET", "htu": "https://a.example/b", "iat": now, "jti": "2"}
        ),
        "signature_input": message.headers.get("Signature-Input"),
        "signature": message.headers.get("Signature"),
    }


print(json.dumps({"read": read, "write": write}[sys.argv[1]](json.load(sys.stdin))))

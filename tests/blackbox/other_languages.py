"""An agent in Python: stock gRPC, the committed protos, the files of its directory. Arguments: protos, agent's directory, address, the host that it thinks it dials."""

import json
import sys
import tempfile
from pathlib import Path

import grpc
from grpc_tools import protoc
from jwcrypto import jwk, jws

protos, agent, address, host = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], sys.argv[4]
with tempfile.TemporaryDirectory() as made:
    sources = [str(path.relative_to(protos)) for path in protos.glob("keyward/v1/*.proto")]
    assert protoc.main(["", f"-I{protos}", f"--python_out={made}", f"--grpc_python_out={made}", *sources]) == 0
    sys.path.insert(0, made)
    from keyward.v1 import agent_pb2, agent_pb2_grpc, key_pb2, key_pb2_grpc, ledger_pb2

    read = lambda name: (agent / name).read_bytes()
    credentials = grpc.ssl_channel_credentials(read("bundle.pem"), read("key.pem"), read("svid.pem"))
    dialled = [("grpc.ssl_target_name_override", host), ("grpc.default_authority", host)]
    with grpc.secure_channel(address, credentials, options=dialled) as channel:
        keys = key_pb2_grpc.KeyServiceStub(channel)
        wish = key_pb2.CreateKeyRequest(name="tokens", purpose=ledger_pb2.KEY_PURPOSE_JWS)
        key = keys.CreateKey(wish, timeout=20).key
        content = key_pb2.Content(jws=key_pb2.Content.Jws(payload=b'{"task":7}'))
        signed = keys.Sign(key_pb2.SignRequest(key="tokens", content=content), timeout=20)
        published = keys.GetJwks(key_pb2.GetJwksRequest(agent=key.agent), timeout=20)

        token = jws.JWS()
        token.deserialize(signed.signature.jws)
        [found] = [one for one in json.loads(published.jwks)["keys"] if one["kid"] == signed.kid]
        token.verify(jwk.JWK(**found), alg="ES256")
        assert token.payload == b'{"task":7}', token.payload

        bundles = agent_pb2_grpc.AgentServiceStub(channel).WatchBundle(agent_pb2.WatchBundleRequest(), timeout=20)
        assert next(bundles).bundle.authorities
        bundles.cancel()

        try:
            keys.Sign(key_pb2.SignRequest(key="nobodys", content=content), timeout=20)
            raise SystemExit("a key that nobody has signed")
        except grpc.RpcError as refused:
            assert refused.code() == grpc.StatusCode.NOT_FOUND, refused
print("done")

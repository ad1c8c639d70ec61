import zmq

from kv_transfer.auth import DeploymentKey
from kv_transfer.event_keys import secret_key, server_key


def test_a_pair_for_each_deployment_key() -> None:
    key, other = DeploymentKey(bytes(32)), DeploymentKey(b"x" * 32)
    assert zmq.curve_public(secret_key(key)) == server_key(key)
    assert len(server_key(key)) == 40
    assert len({secret_key(key), secret_key(other), server_key(key), server_key(other)}) == 4

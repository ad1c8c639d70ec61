"""The key pair under which an engine publishes its KV events, made from the deployment key.

KV events tell the token ids of every prompt. ZeroMQ's CURVE encrypts a connection, and a client must know the
publisher's public key to make one. Here that key is as secret as the deployment key: so it is proof of belonging.
"""

import zmq
from zmq.utils import z85

from kv_transfer.auth import DeploymentKey

_PURPOSE = "KV events"


def secret_key(key: DeploymentKey) -> bytes:
    """The publisher's half: 40 bytes of Z85. Any 32 bytes are a Curve25519 secret."""
    return bytes(z85.encode(key.mac(_PURPOSE)))


def server_key(key: DeploymentKey) -> bytes:
    """The subscribers' half, likewise."""
    return bytes(zmq.curve_public(secret_key(key)))

"""Proof of the deployment key on both sides of a stream, and the sealing of what they send then.

Each side contributes a nonce, and both MACs cover both nonces and all that the instance says of itself, under a purpose
of their own: what was recorded on one stream, or made for another purpose, is worth nothing on the next. What follows
is sealed under a key of this stream alone, with the message's number in its direction: nothing can be added, dropped,
repeated, reordered or sent back. As everywhere, the key keeps strangers out; it does not hide what is said.
"""

import secrets
import struct
from dataclasses import dataclass
from typing import Final, Literal

from kv_transfer.auth import NONCE_BYTES, DeploymentKey
from services.global_proxy.control_plane.control_plane_pb2 import DESCRIPTOR, Sealed
from services.global_proxy.control_plane.errors import NotGenuineError

SERVICE: Final[str] = DESCRIPTOR.services_by_name["ControlPlane"].full_name
PROTOCOL: Final = 1

Side = Literal["instance", "proxy"]


@dataclass(frozen=True, slots=True)
class Handshake:
    """What both sides have heard once the instance has said what it is.

    Raises:
        NotGenuineError: a nonce is too short to be one.
    """

    key: DeploymentKey
    instance_nonce: bytes
    proxy_nonce: bytes
    instance: bytes  # the Instance message as it was sent

    def __post_init__(self) -> None:
        if not len(self.instance_nonce) == len(self.proxy_nonce) == NONCE_BYTES:
            raise NotGenuineError("a nonce of the wrong length")

    def join_mac(self) -> bytes:
        """The instance's proof."""
        return self.key.mac("control plane: join", *self._said)

    def check_join(self, mac: bytes) -> None:
        """Raises NotGenuineError."""
        if not self.key.is_mac(mac, "control plane: join", *self._said):
            raise NotGenuineError("the instance has another key")

    def welcome_mac(self, report_interval_s: float) -> bytes:
        """The proxy's proof."""
        return self.key.mac("control plane: welcome", *self._said, struct.pack("<d", report_interval_s))

    def check_welcome(self, mac: bytes, report_interval_s: float) -> None:
        """Raises NotGenuineError."""
        interval = struct.pack("<d", report_interval_s)
        if not self.key.is_mac(mac, "control plane: welcome", *self._said, interval):
            raise NotGenuineError("the proxy has another key")

    def session(self, side: Side) -> "Session":
        """For what this side sends and receives from now on."""
        return Session(DeploymentKey(self.key.mac("control plane: session", *self._said)), side)

    @property
    def _said(self) -> tuple[bytes, bytes, bytes]:
        return self.instance_nonce, self.proxy_nonce, self.instance


class Session:
    """Seals one side's messages and opens the other's, each in order."""

    def __init__(self, key: DeploymentKey, side: Side) -> None:
        self._key = key
        self._own = f"control plane: from {side}"
        self._other = f"control plane: from {'proxy' if side == 'instance' else 'instance'}"
        self._num_sealed = 0
        self._num_opened = 0

    def seal(self, body: bytes) -> Sealed:
        number = self._num_sealed.to_bytes(8, "little")
        self._num_sealed += 1
        return Sealed(body=body, mac=self._key.mac(self._own, number, body))

    def open(self, sealed: Sealed) -> bytes:
        """The body. Raises NotGenuineError."""
        number = self._num_opened.to_bytes(8, "little")
        if not self._key.is_mac(sealed.mac, self._other, number, sealed.body):
            raise NotGenuineError(f"message {self._num_opened} is not the other side's")
        self._num_opened += 1
        return sealed.body


def new_nonce() -> bytes:
    return secrets.token_bytes(NONCE_BYTES)

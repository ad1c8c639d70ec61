"""vLLM's event publisher, but one that does as it is told: it forgets, drops, restarts and talks nonsense."""

import asyncio

import msgspec
import zmq

from services.global_proxy.prefix.events import KvEvent
from services.global_proxy.prefix.sockets import Endpoints, receive

END = b"\xff" * 8


class Publisher:
    """Publishes on two ports of the system's choice; the replay endpoint answers while `serve_replays` runs.

    Attributes:
        remembered: what a replay repeats: number and payload.
        num_dropped: so many of a replay's batches are lost after the first.
        num_replays: how often it was asked.
        is_mute: replays are not answered.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", secret_key: bytes | None = None) -> None:
        self.remembered: list[tuple[int, bytes]] = []
        self.num_dropped = 0
        self.num_replays = 0
        self.is_mute = False
        self._context = context
        self._secret_key = secret_key
        self._next = 0
        self._publish = self._bind(zmq.XPUB, "tcp://127.0.0.1:*")
        self._replay = self._bind(zmq.ROUTER, "tcp://127.0.0.1:*")
        self.endpoints = Endpoints(
            self._publish.getsockopt_string(zmq.LAST_ENDPOINT), self._replay.getsockopt_string(zmq.LAST_ENDPOINT)
        )

    def _bind(self, kind: int, endpoint: str) -> "zmq.Socket[bytes]":
        socket = self._context.socket(kind)
        socket.linger = 0
        if self._secret_key is not None:
            socket.curve_server = True
            socket.curve_secretkey = self._secret_key
        try:
            socket.bind(endpoint)
        except zmq.ZMQError:
            socket.close()
            raise
        return socket

    async def until_subscribed(self) -> None:
        assert await receive(self._publish) == [b"\1"]

    def remember(self, *events: KvEvent) -> bytes:
        """Publish where nobody hears it."""
        payload = encode(*events)
        self.remembered.append((self._next, payload))
        self._next += 1
        return payload

    def publish(self, *events: KvEvent) -> None:
        self.send(self._next, self.remember(*events))

    def send(self, number: int, payload: bytes) -> None:
        self._publish.send_multipart([b"topic", number.to_bytes(8, "big"), payload])

    def send_frames(self, *frames: bytes) -> None:
        self._publish.send_multipart(frames)

    async def serve_replays(self) -> None:
        while True:
            identity, _, asked = await receive(self._replay)
            self.num_replays += 1
            if self.is_mute:
                continue
            first = int.from_bytes(asked, "big")
            batches = [batch for batch in self.remembered if batch[0] >= first]
            del batches[1 : 1 + self.num_dropped]
            for number, payload in batches:
                self._replay.send_multipart([identity, b"", b"topic", number.to_bytes(8, "big"), payload])
            self._replay.send_multipart([identity, b"", b"", END, b""])

    async def restart(self) -> None:
        """As another process on the same ports, which knows nothing."""
        self.close()
        self.remembered, self._next = [], 0
        self._publish = await self._bind_again(zmq.XPUB, self.endpoints.publish)
        self._replay = await self._bind_again(zmq.ROUTER, self.endpoints.replay or "")

    async def _bind_again(self, kind: int, endpoint: str) -> "zmq.Socket[bytes]":
        """ZeroMQ gives a port back some time after its socket is closed."""
        async with asyncio.timeout(10):
            while True:
                try:
                    return self._bind(kind, endpoint)
                except zmq.ZMQError:
                    await asyncio.sleep(0.01)

    def close(self) -> None:
        self._publish.close()
        self._replay.close()


def encode(*events: KvEvent) -> bytes:
    return msgspec.msgpack.encode([0.0, list(events), 0])

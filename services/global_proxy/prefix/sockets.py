"""ZeroMQ sockets on an asyncio loop, without a poller and at little cost for each message.

pyzmq's own asyncio sockets make futures and call-backs for each message; an engine tells of every step. Here a loop
that reads takes what is there, and waits for the socket's descriptor only when there is nothing.
"""

import asyncio
from dataclasses import dataclass
from typing import Self

import zmq
from zmq.utils.monitor import parse_monitor_message

MAX_MESSAGE_BYTES = 32 << 20  # a peer that sends more is cut off
_MAX_QUEUED = 1000  # messages, in each direction


@dataclass(frozen=True)
class Endpoints:
    """Where an engine publishes its events, and where it repeats the last of them.

    Attributes:
        publish, replay: ZeroMQ addresses: "tcp://host:port", or "ipc:///path" on one host. Without `replay`, one lost
            event means that all is forgotten that was known.
        server_key: the publisher's CURVE public key (40 bytes of Z85), if it has one: then the connection is
            encrypted, and made only with whoever has its secret half.
    """

    publish: str
    replay: str | None = None
    server_key: bytes | None = None

    @classmethod
    def at(cls, address: str, server_key: bytes | None = None) -> Self:
        """As our deployments have them: HOST:PORT, and the next port for replays. Raises ValueError: it is no such."""
        host, _, port = address.rpartition(":")
        return cls(f"tcp://{host}:{port}", f"tcp://{host}:{int(port) + 1}", server_key)


def open_socket(context: "zmq.Context[zmq.Socket[bytes]]", kind: int, server_key: bytes | None) -> "zmq.Socket[bytes]":
    """A socket with bounds, that closes at once."""
    socket = context.socket(kind)
    socket.linger = 0
    socket.maxmsgsize = MAX_MESSAGE_BYTES
    socket.rcvhwm = socket.sndhwm = _MAX_QUEUED
    socket.ipv6 = True
    # The kernel finds out that a host is gone, at no cost to this process.
    socket.tcp_keepalive, socket.tcp_keepalive_idle, socket.tcp_keepalive_intvl, socket.tcp_keepalive_cnt = 1, 15, 5, 3
    socket.reconnect_ivl, socket.reconnect_ivl_max = 100, 5000  # ms
    if server_key is not None:
        socket.curve_publickey, socket.curve_secretkey = zmq.curve_keypair()
        socket.curve_serverkey = server_key
    return socket


async def receive(socket: "zmq.Socket[bytes]") -> list[bytes]:
    """The next message's frames. Does not let the loop run if there is one: who reads many must see to that."""
    while True:
        try:
            return socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            await _until_something_happens(socket)


def drop_queued(socket: "zmq.Socket[bytes]") -> None:
    """Read and forget what is there."""
    while True:
        try:
            socket.recv_multipart(zmq.NOBLOCK)
        except zmq.Again:
            return


class ConnectionWatch:
    """Tells when a socket's only connection is there, and when it is lost."""

    def __init__(self, socket: "zmq.Socket[bytes]") -> None:
        self._socket = socket
        self._monitor = socket.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED)

    async def next_change(self) -> bool:
        """Whether it is there now."""
        event = parse_monitor_message(await receive(self._monitor))
        return bool(event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED)

    def close(self) -> None:
        self._socket.disable_monitor()


async def _until_something_happens(socket: "zmq.Socket[bytes]") -> None:
    """Wait for the descriptor: it says that the socket's state may have changed, no more.

    The socket must have been read until there was nothing: only then does it report what comes next.
    """
    loop = asyncio.get_running_loop()
    happened = loop.create_future()
    descriptor: int = socket.fileno()
    loop.add_reader(descriptor, _resolve, happened)
    try:
        await happened
    finally:
        loop.remove_reader(descriptor)


def _resolve(future: "asyncio.Future[None]") -> None:
    if not future.done():
        future.set_result(None)

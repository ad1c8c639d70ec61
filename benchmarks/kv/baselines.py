"""What the machine can do without any library."""

import ctypes
import socket
import struct
import threading
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from benchmarks.kv.buffers import Buffer, new_buffer
from benchmarks.kv.contender import Contender
from kv_transfer.memory.regions import Memory, Region, Spans

_MAX_PIECES = 1024  # IOV_MAX, of one sendmsg or recvmsg
_COUNT = struct.Struct("<q")


@dataclass
class Memcpy(Contender):
    """One thread of D copies from memory of its own: one memmove for each span. P has nothing to do."""

    family = "baseline"

    def serve(self, buffer: Buffer) -> None:
        pass

    def connect(self, buffer: Buffer, served: Any) -> None:
        self.target = buffer
        self.source = new_buffer(self.memory_kind)
        self.source.fill()

    def read(self, spans: Spans) -> None:
        copy = ctypes.memmove
        sources = (spans.remote + self.source.address).tolist()
        targets = (spans.local + self.target.address).tolist()
        for target, source, size in zip(targets, sources, spans.sizes.tolist(), strict=True):
            copy(target, source, size)

    def close(self) -> None:
        """Nothing has begun."""


@dataclass
class RawSocket(Contender):
    """One connection; D sends the offsets, P answers with sendmsg from its memory, D receives into its own."""

    kind: socket.AddressFamily = socket.AF_INET
    family = "baseline"
    sock: socket.socket | None = field(default=None, init=False)

    def serve(self, buffer: Buffer) -> Any:
        self.memory = Memory([Region(buffer.address, buffer.num_bytes)])
        self.listener = socket.socket(self.kind)
        self.listener.bind(("127.0.0.1", 0) if self.kind is socket.AF_INET else "")  # "": the kernel picks a name
        self.listener.listen()
        threading.Thread(target=self._serve, daemon=True).start()
        return self.listener.getsockname()

    def connect(self, buffer: Buffer, served: Any) -> None:
        self.memory = Memory([Region(buffer.address, buffer.num_bytes)])
        self.sock = socket.socket(self.kind)
        self.sock.connect(served)
        _tune(self.sock)

    def read(self, spans: Spans) -> None:
        sock = self.sock
        if sock is None:
            raise RuntimeError("not connected")
        sock.sendall(_COUNT.pack(len(spans)) + spans.remote.tobytes() + spans.sizes.tobytes())
        _receive(sock, self.memory.views(spans.local, spans.sizes))

    def close(self) -> None:
        (self.sock or self.listener).close()

    def _serve(self) -> None:
        sock, _ = self.listener.accept()
        _tune(sock)
        with sock, sock.makefile("rb") as requests:
            while head := requests.read(_COUNT.size):
                count = _COUNT.unpack(head)[0]
                offsets, sizes = np.frombuffer(requests.read(16 * count), np.int64).reshape(2, count)
                _send(sock, self.memory.views(offsets, sizes))


def _tune(sock: socket.socket) -> None:
    if sock.family is socket.AF_INET:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


def _send(sock: socket.socket, views: list[memoryview]) -> None:
    first = 0
    while first < len(views):
        num_sent = sock.sendmsg(views[first : first + _MAX_PIECES])
        first = _advance(views, first, num_sent)


def _receive(sock: socket.socket, views: list[memoryview]) -> None:
    first = 0
    while first < len(views):
        num_received = sock.recvmsg_into(views[first : first + _MAX_PIECES], 0, socket.MSG_WAITALL)[0]
        if num_received == 0:
            raise ConnectionError("P has closed the connection")
        first = _advance(views, first, num_received)


def _advance(views: list[memoryview], first: int, num_bytes: int) -> int:
    """The first view that is not done after so many more bytes; it is cut to what is left of it."""
    while first < len(views) and num_bytes >= len(views[first]):
        num_bytes -= len(views[first])
        first += 1
    if num_bytes:
        views[first] = views[first][num_bytes:]
    return first

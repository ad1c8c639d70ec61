"""KV bytes over TCP connections to the rank server, from KV memory to KV memory without a copy in Python.

P sends from where the spans lie, D receives to where they belong; the interpreter's lock is free while bytes move. Only
spans too small for that are gathered into one buffer first.
"""

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import xxhash

from kv_transfer.errors import ChecksumError, ProtocolError
from kv_transfer.memory import gather
from kv_transfer.memory.regions import Memory, Offsets, Spans
from kv_transfer.protocol import Offer, RankEndpoint, ReadSpans, Refused, SpansFollow, TcpOffer
from kv_transfer.rank_connection import RankConnection
from kv_transfer.rank_server import RankClient, RankServer
from kv_transfer.transports.base import Transport
from kv_transfer.transports.batches import batches

_PEER_TIMEOUT_S = 30.0  # a reader that has not taken the bytes of one request by then is lost
_SPANS_PER_REQUEST = 1 << 18  # a quarter of what a message holds
_BYTES_PER_REQUEST = 64 << 20  # bounds what is gathered at a time
_BATCH_BYTES = 1 << 20  # checksums follow the bytes at this distance, while they are in the processor's cache
_MIN_BYTES_PER_CONNECTION = 4 << 20  # below twice that, one connection is faster than the threads for more


class TcpTransport(Transport):
    """Args:
    memory: what is served and read into.
    server: P's; None where nothing is served.
    client: D's connections.
    num_connections: between two ranks, for one read.
    checksum: have the peer send XXH3 of all bytes, and compare it with what arrived.
    """

    name = "tcp"

    def __init__(
        self,
        memory: Memory,
        server: RankServer | None,
        client: RankClient,
        *,
        num_connections: int = 1,
        checksum: bool = False,
    ) -> None:
        super().__init__(memory)
        self._server = server
        self._client = client
        self._num_connections = num_connections
        self._checksum = checksum

    # --- P

    def offer(self) -> Offer | None:
        if self._server is None or not self.memory.is_on_host:
            return None
        self._server.handle(ReadSpans, self._serve)
        return TcpOffer()

    def _serve(self, connection: RankConnection, request: ReadSpans) -> None:
        deadline = time.monotonic() + _PEER_TIMEOUT_S
        try:
            buffers = self._outgoing(_unpack(request.offsets), _unpack(request.sizes))
        except (IndexError, ValueError) as error:
            connection.send(Refused(str(error)), deadline)
            return
        follows = SpansFollow(sum(map(len, buffers)))
        if not request.checksum:
            connection.send(follows, deadline, buffers)
            return
        connection.send(follows, deadline)
        digest = _move_with_checksum(buffers, lambda batch: connection.send_buffers(batch, deadline), before=True)
        connection.send_buffers([memoryview(digest)], deadline)

    def _outgoing(self, offsets: Offsets, sizes: Offsets) -> list[memoryview]:
        if len(offsets) != len(sizes):
            raise ValueError(f"{len(offsets)} offsets and {len(sizes)} sizes")
        if gather.is_worth_it(sizes):
            return [gather.gather(self.memory, offsets, sizes).data]
        return self.memory.views(offsets, sizes)

    # --- D

    def can_read(self, peer: RankEndpoint, offer: Offer) -> bool:
        return isinstance(offer, TcpOffer) and self.memory.is_on_host

    def read(self, peer: RankEndpoint, offer: Offer, spans: Spans, deadline: float) -> None:
        if not len(spans):
            return
        parts = _split(spans, min(self._num_connections, spans.num_bytes // _MIN_BYTES_PER_CONNECTION))
        if len(parts) == 1:
            self._read_part(peer, spans, deadline)
            return
        # Threads of this read alone: those of a slow peer delay no read from another. All of them end, by the deadline,
        # before the block does: none may write after this method has ended.
        with ThreadPoolExecutor(len(parts), thread_name_prefix="kv-tcp") as helpers:
            others = [helpers.submit(self._read_part, peer, part, deadline) for part in parts[1:]]
            self._read_part(peer, parts[0], deadline)
        for other in others:
            other.result()

    def _read_part(self, peer: RankEndpoint, spans: Spans, deadline: float) -> None:
        with self._client.connection(peer, deadline) as connection:
            for batch in batches(spans, max_spans=_SPANS_PER_REQUEST, max_bytes=_BYTES_PER_REQUEST):
                self._read_batch(connection, batch, deadline)

    def _read_batch(self, connection: RankConnection, spans: Spans, deadline: float) -> None:
        scattered = gather.is_worth_it(spans.sizes)
        staging = np.empty(spans.num_bytes if scattered else 0, dtype=np.uint8)
        buffers = [staging.data] if scattered else self.memory.views(spans.local, spans.sizes)
        connection.send(ReadSpans(_pack(spans.remote), _pack(spans.sizes), self._checksum), deadline)
        reply = connection.receive_reply(deadline)
        if not isinstance(reply, SpansFollow) or reply.num_bytes != spans.num_bytes:
            raise ProtocolError(f"{reply} in answer to a read of {spans.num_bytes} bytes")
        self._receive(connection, buffers, deadline)
        if scattered:
            gather.scatter(self.memory, spans.local, spans.sizes, staging)

    def _receive(self, connection: RankConnection, buffers: Sequence[memoryview], deadline: float) -> None:
        if not self._checksum:
            connection.receive_into(buffers, deadline)
            return
        digest = _move_with_checksum(buffers, lambda batch: connection.receive_into(batch, deadline), before=False)
        sent = bytearray(len(digest))
        connection.receive_into([memoryview(sent)], deadline)
        if sent != digest:
            raise ChecksumError("the bytes that arrived are not the bytes that were sent")

    def forget(self, peer: RankEndpoint) -> None:
        self._client.forget(peer)

    def close(self) -> None:
        """The connections belong to the server and the client, which close them."""


def _move_with_checksum(
    buffers: Sequence[memoryview], move: Callable[[Sequence[memoryview]], None], *, before: bool
) -> bytes:
    """Move the buffers batch by batch, digesting each before or after it is moved; returns the digest."""
    digest = xxhash.xxh3_64()
    for batch in _batches(buffers):
        if before:
            for buffer in batch:
                digest.update(buffer)
            move(batch)
        else:
            move(batch)
            for buffer in batch:
                digest.update(buffer)
    return digest.digest()


def _batches(buffers: Sequence[memoryview]) -> Sequence[list[memoryview]]:
    batches: list[list[memoryview]] = []
    room = 0
    for buffer in buffers:
        for start in range(0, len(buffer), _BATCH_BYTES):
            piece = buffer[start : start + _BATCH_BYTES]
            if len(piece) > room:
                batches.append([])
                room = _BATCH_BYTES
            batches[-1].append(piece)
            room -= len(piece)
    return batches


def _split(spans: Spans, num_parts: int) -> list[Spans]:
    """Cut into so many parts of about as many bytes; a part is at least one span."""
    if num_parts < 2:
        return [spans]
    ends = np.cumsum(spans.sizes)
    cuts = np.unique(np.searchsorted(ends, np.arange(1, num_parts) * spans.num_bytes // num_parts, side="left") + 1)
    bounds = [0, *(int(cut) for cut in cuts if cut < len(spans)), len(spans)]
    return [Spans(spans.remote[a:b], spans.local[a:b], spans.sizes[a:b]) for a, b in pairwise(bounds)]


def _pack(numbers: Offsets) -> bytes:
    return numbers.astype("<i8", copy=False).tobytes()


def _unpack(packed: bytes) -> Offsets:
    """Raises ValueError."""
    return np.frombuffer(packed, dtype="<i8").astype(np.int64, copy=False)

"""KV bytes through torch.distributed's point-to-point messages: over HCCL between NPUs, over gloo between hosts.

D asks, over a connection to P's rank server, for a group of two, and then for pieces: lists of spans, which P gathers
into one message and D scatters. Nothing is received into KV memory itself, but into a staging tensor: a receive that
did not end by the deadline cannot be taken back, and could write into blocks that another request has got since.
"""

import contextlib
import secrets
import threading
import time
from collections.abc import Iterator

import numpy as np
import torch
import xxhash

from kv_transfer.auth import NONCE_BYTES
from kv_transfer.errors import AuthError, ChecksumError, DeadlineError, PeerUnreachableError, ProtocolError
from kv_transfer.memory import gather
from kv_transfer.memory.regions import Memory, Offsets, Spans
from kv_transfer.protocol import (
    GroupOpen,
    GroupProof,
    HcclOffer,
    JoinGroup,
    Offer,
    PieceFollows,
    RankEndpoint,
    ReadPiece,
    Refused,
)
from kv_transfer.rank_connection import RankConnection
from kv_transfer.rank_server import RankClient, RankServer
from kv_transfer.transports.base import Transport
from kv_transfer.transports.batches import batches
from kv_transfer.transports.rank_group import D_RANK, P_RANK, RankGroup, make_group, our_address_towards

_PEER_TIMEOUT_S = 30.0  # a reader that takes nothing for so long is lost
_JOIN_TIMEOUT_S = 10.0
_PIECE_BYTES = 16 << 20  # staging on either side, for each pair of ranks
_MAX_SPANS = 1 << 18  # in one piece


class HcclTransport(Transport):
    """Args:
    memory: what is served and read into; all of it on one device.
    server: P's; None where nothing is served.
    client: D's connections; a pair of ranks keeps one of them.
    checksum: have the peer send XXH3 of each piece, and compare it with what arrived. From a device, both sides copy
        the bytes to the host for that: for looking for faults, not for production.
    """

    name = "hccl"

    def __init__(
        self, memory: Memory, server: RankServer | None, client: RankClient, *, checksum: bool = False
    ) -> None:
        super().__init__(memory)
        self._server = server
        self._client = client
        self._checksum = checksum
        self._lock = threading.Lock()
        self._closed = False
        self._pairs: dict[RankEndpoint, _Pair] = {}
        self._groups: set[RankGroup] = set()  # of both sides, for `close`

    @property
    def _device(self) -> torch.device:
        return self.memory.tensors[0].device if self.memory.tensors else torch.device("cpu")

    @property
    def _backend(self) -> str | None:
        """What moves this memory; None where we know of nothing."""
        return {"cpu": "gloo", "npu": "hccl"}.get(self._device.type)

    # --- P

    def offer(self) -> Offer | None:
        if self._server is None or self._backend is None:
            return None
        self._server.handle(JoinGroup, self._serve)
        return HcclOffer(self._backend)

    def _serve(self, connection: RankConnection, request: JoinGroup) -> None:
        assert self._server is not None
        deadline = time.monotonic() + _JOIN_TIMEOUT_S
        if request.backend != self._backend:
            connection.send(Refused(f"this rank's memory is read by {self._backend}, not {request.backend}"), deadline)
            return
        connection.send(GroupOpen(), deadline)
        group = make_group(self._backend, self._device, P_RANK, connection, self._server.endpoint.host, deadline)
        with self._closing(group):
            self._expect_proof(connection, group, deadline)
            staging = _Staging(self._device)
            while connection.wait_for_more():
                deadline = time.monotonic() + _PEER_TIMEOUT_S
                piece = connection.receive_request(deadline)
                if not isinstance(piece, ReadPiece):
                    raise ProtocolError(f"{type(piece).__name__} does not belong on a group's connection")
                with group.on_device():
                    self._send_piece(connection, group, piece, staging, deadline)

    def _expect_proof(self, connection: RankConnection, group: RankGroup, deadline: float) -> None:
        nonce = secrets.token_bytes(NONCE_BYTES)
        with group.on_device():
            group.send(_as_tensor(nonce).to(self._device), deadline)
        proof = connection.receive_request(deadline)
        if not isinstance(proof, GroupProof) or not secrets.compare_digest(proof.nonce, nonce):
            raise AuthError("the other end of a group is not the peer that asked for it")

    def _send_piece(
        self, connection: RankConnection, group: RankGroup, piece: ReadPiece, staging: "_Staging", deadline: float
    ) -> None:
        try:
            offsets, sizes = np.frombuffer(piece.offsets, "<i8"), np.frombuffer(piece.sizes, "<i8")
            _check_piece(self.memory, offsets, sizes)
        except (IndexError, ValueError) as error:
            connection.send(Refused(str(error)), deadline)
            return
        data = staging.of(int(sizes.sum()))
        if self.memory.is_on_host:
            gather.gather(self.memory, offsets, sizes, data.numpy())
        else:
            gather.gather_tensor(self.memory, offsets, sizes, data)
        connection.send(PieceFollows(len(data), _digest(data) if piece.checksum else b""), deadline)
        group.send(data, deadline)

    # --- D

    def can_read(self, peer: RankEndpoint, offer: Offer) -> bool:
        return isinstance(offer, HcclOffer) and offer.backend == self._backend

    def read(self, peer: RankEndpoint, offer: Offer, spans: Spans, deadline: float) -> None:
        self.memory.check(spans.local, spans.sizes)
        pair = self._pair(peer)
        if not pair.lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise DeadlineError(f"{peer.host}:{peer.port}: other reads took until the deadline")
        try:
            if pair.joined is None:
                pair.joined = self._join(peer, deadline)
            with pair.joined.group.on_device():
                for piece in batches(spans, max_bytes=_PIECE_BYTES, max_spans=_MAX_SPANS):
                    self._read_piece(pair.joined, piece, deadline)
        except BaseException:
            self._leave(pair)  # messages of this read may still be under way: the next one begins with a new group
            raise
        finally:
            with self._lock:
                is_forgotten = self._pairs.get(peer) is not pair
            if is_forgotten:
                self._leave(pair)
            pair.lock.release()

    def _read_piece(self, joined: "_Joined", spans: Spans, deadline: float) -> None:
        connection, num_bytes = joined.connection, spans.num_bytes
        request = ReadPiece(spans.remote.astype("<i8").tobytes(), spans.sizes.astype("<i8").tobytes(), self._checksum)
        connection.send(request, deadline)
        reply = connection.receive_reply(deadline)
        if not isinstance(reply, PieceFollows) or reply.num_bytes != num_bytes:
            raise ProtocolError(f"{reply} in answer to a read of {num_bytes} bytes")
        data = joined.staging.of(num_bytes)
        joined.group.receive(data, deadline)
        if self._checksum and _digest(data) != reply.checksum:
            raise ChecksumError("the bytes that arrived are not the bytes that were sent")
        if self.memory.is_on_host:
            gather.scatter(self.memory, spans.local, spans.sizes, data.numpy())
        else:
            gather.scatter_tensor(self.memory, spans.local, spans.sizes, data)

    def _pair(self, peer: RankEndpoint) -> "_Pair":
        with self._lock:
            if self._closed:
                raise PeerUnreachableError("this engine is shutting down")
            return self._pairs.setdefault(peer, _Pair())

    def _join(self, peer: RankEndpoint, deadline: float) -> "_Joined":
        assert self._backend is not None
        self._leave_dead()
        deadline = min(deadline, time.monotonic() + _JOIN_TIMEOUT_S)
        with contextlib.ExitStack() as stack:
            connection = stack.enter_context(self._closed_after_use(peer, deadline))
            connection.send(JoinGroup(self._backend), deadline)
            reply = connection.receive_reply(deadline)
            if not isinstance(reply, GroupOpen):
                raise ProtocolError(f"{type(reply).__name__} in answer to a request for a group")
            host = our_address_towards(peer.host, peer.port)
            group = make_group(self._backend, self._device, D_RANK, connection, host, deadline)
            stack.enter_context(self._closing(group))
            nonce = torch.empty(NONCE_BYTES, dtype=torch.uint8, device=self._device)
            with group.on_device():
                group.receive(nonce, deadline)
            connection.send(GroupProof(nonce.cpu().numpy().tobytes()), deadline)
            return _Joined(connection, group, _Staging(self._device), stack.pop_all())

    @contextlib.contextmanager
    def _closed_after_use(self, peer: RankEndpoint, deadline: float) -> Iterator[RankConnection]:
        """A connection that is not kept for others: P ends the group with it."""
        with contextlib.suppress(_NotKept), self._client.connection(peer, deadline) as connection:
            yield connection
            raise _NotKept

    def _leave_dead(self) -> None:
        """Leave the groups whose peer has gone: nobody may ever ask for that peer again."""
        with self._lock:
            pairs = list(self._pairs.values())
        for pair in pairs:
            if pair.lock.acquire(blocking=False):
                if pair.joined is not None and not pair.joined.connection.is_quiet:
                    self._leave(pair)
                pair.lock.release()

    def _leave(self, pair: "_Pair") -> None:
        """Needs the pair's lock."""
        joined, pair.joined = pair.joined, None
        if joined is not None:
            joined.resources.close()

    # --- both

    @contextlib.contextmanager
    def _closing(self, group: RankGroup) -> Iterator[None]:
        with self._lock:
            if self._closed:
                group.abort()
                raise PeerUnreachableError("this engine is shutting down")
            self._groups.add(group)
        try:
            yield
        finally:
            with self._lock:
                self._groups.discard(group)
            group.abort()

    def forget(self, peer: RankEndpoint) -> None:
        with self._lock:
            pair = self._pairs.pop(peer, None)
        if pair is not None and pair.lock.acquire(blocking=False):  # else its reader leaves it
            self._leave(pair)
            pair.lock.release()

    def close(self) -> None:
        with self._lock:
            self._closed = True
            peers, groups = list(self._pairs), list(self._groups)
        for group in groups:
            group.abort()
        for peer in peers:
            self.forget(peer)


class _NotKept(Exception):  # noqa: N818 - raised by us, to us
    """Has RankClient close a connection."""


class _Pair:
    """D's side of one peer: reads take turns, as messages in a group are known by their order alone."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.joined: _Joined | None = None


class _Joined:
    """What a pair holds while its group lives; `resources` ends it."""

    def __init__(
        self, connection: RankConnection, group: RankGroup, staging: "_Staging", resources: contextlib.ExitStack
    ) -> None:
        self.connection = connection
        self.group = group
        self.staging = staging
        self.resources = resources


class _Staging:
    """One flat tensor, as large as the largest piece so far."""

    def __init__(self, device: torch.device) -> None:
        self._tensor = torch.empty(0, dtype=torch.uint8, device=device)

    def of(self, num_bytes: int) -> torch.Tensor:
        if num_bytes > len(self._tensor):
            self._tensor = torch.empty(num_bytes, dtype=torch.uint8, device=self._tensor.device)
        return self._tensor[:num_bytes]


def _check_piece(memory: Memory, offsets: Offsets, sizes: Offsets) -> None:
    """Raises IndexError, ValueError."""
    if len(offsets) != len(sizes) or not 0 < len(sizes) <= _MAX_SPANS:
        raise ValueError(f"{len(offsets)} offsets and {len(sizes)} sizes")
    memory.check(offsets, sizes)
    if int(sizes.sum()) > _PIECE_BYTES:
        raise ValueError(f"a piece of {int(sizes.sum())} bytes; at most {_PIECE_BYTES} are sent")


def _as_tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def _digest(data: torch.Tensor) -> bytes:
    return xxhash.xxh3_64(data.cpu().numpy()).digest()

"""KV blocks on one host, by address out of P's process, copied once by the kernel: for memory in no shared file."""

import ctypes
import os
import secrets
import time
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from kv_transfer.auth import NONCE_BYTES
from kv_transfer.errors import DeadlineError, PeerRefusedError, PeerUnreachableError
from kv_transfer.memory.regions import Memory, Offsets, Region, Spans
from kv_transfer.protocol import Offer, ProcessVmOffer, RankEndpoint
from kv_transfer.transports.base import Transport
from kv_transfer.transports.batches import batches
from kv_transfer.transports.host_identity import host_id, start_time

_MAX_BATCH_BYTES = 4 << 20  # some milliseconds
_MAX_BATCH_SPANS = 1023  # with the probe, what the kernel takes in one call
_PR_SET_PTRACER = 0x59616D61
_PR_SET_PTRACER_ANY = -1

_libc = ctypes.CDLL(None, use_errno=True)  # releases the interpreter's lock
_LONG, _POINTER = ctypes.c_ulong, ctypes.c_void_p
_libc.prctl.argtypes = (ctypes.c_int, _LONG, _LONG, _LONG, _LONG)
_libc.process_vm_readv.argtypes = (ctypes.c_int, _POINTER, _LONG, _POINTER, _LONG, _LONG)
_libc.process_vm_readv.restype = ctypes.c_ssize_t

_NOTHING = Spans(*[np.empty(0, dtype=np.int64)] * 3)

IoVectors = npt.NDArray[np.int64]  # rows of (address, size), as the kernel has them


class ProcessVmTransport(Transport):
    """Reads with process_vm_readv.

    Each call also reads the peer's probe, 16 random bytes at a known address: the kernel looks the process up once for
    a call, so bytes that come together with the right probe come from the peer, whoever may bear its pid by now.
    """

    name: ClassVar[str] = "process_vm"

    def __init__(self, memory: Memory) -> None:
        super().__init__(memory)
        self._host_id = host_id()
        self._probe = ctypes.create_string_buffer(secrets.token_bytes(NONCE_BYTES), NONCE_BYTES)
        self._closed = False

    def offer(self) -> ProcessVmOffer | None:
        started = start_time(os.getpid())
        if self._host_id is None or started is None or not self.memory.is_on_host:
            return None
        _let_others_read()
        return ProcessVmOffer(
            host_id=self._host_id,
            pid=os.getpid(),
            start_time=started,
            addresses=tuple(region.address for region in self.memory.regions),
            sizes=tuple(region.num_bytes for region in self.memory.regions),
            probe_address=ctypes.addressof(self._probe),
            probe=self._probe.raw,
        )

    def can_read(self, peer: RankEndpoint, offer: Offer) -> bool:
        if not isinstance(offer, ProcessVmOffer) or offer.host_id != self._host_id or not self.memory.is_on_host:
            return False
        if len(offer.addresses) != len(offer.sizes) or start_time(offer.pid) != offer.start_time:
            return False
        try:
            _read_proven(offer, _NOTHING)
        except PeerUnreachableError:  # as where ptrace is forbidden altogether
            return False
        return True

    def read(self, peer: RankEndpoint, offer: Offer, spans: Spans, deadline: float) -> None:
        assert isinstance(offer, ProcessVmOffer)
        self.memory.check(spans.local, spans.sizes)
        theirs = Memory([Region(*region) for region in zip(offer.addresses, offer.sizes, strict=True)])
        try:
            theirs.check(spans.remote, spans.sizes)
        except IndexError as error:
            raise PeerRefusedError(f"the peer's memory: {error}") from None
        addresses = Spans(theirs.addresses(spans.remote), self.memory.addresses(spans.local), spans.sizes)
        for batch in batches(addresses, max_spans=_MAX_BATCH_SPANS, max_bytes=_MAX_BATCH_BYTES):
            if self._closed:
                raise PeerUnreachableError("this engine is shutting down")
            if time.monotonic() >= deadline:
                raise DeadlineError(f"reading from {peer.host}:{peer.port} did not end in time")
            _read_proven(offer, batch)

    def forget(self, peer: RankEndpoint) -> None:
        """Nothing is held for a peer."""

    def close(self) -> None:
        self._closed = True


def _io_vectors(addresses: Offsets, sizes: Offsets) -> IoVectors:
    """With one more row, for the probe."""
    vectors = np.empty((len(sizes) + 1, 2), dtype=np.int64)
    vectors[:-1, 0] = addresses
    vectors[:-1, 1] = sizes
    vectors[-1, 1] = NONCE_BYTES
    return vectors


def _read_proven(offer: ProcessVmOffer, batch: Spans) -> None:
    """Read a batch of addresses, and the probe, in one call.

    Raises:
        PeerUnreachableError: not all could be read, or another process has the pid by now.
    """
    found = ctypes.create_string_buffer(NONCE_BYTES)
    local, remote = _io_vectors(batch.local, batch.sizes), _io_vectors(batch.remote, batch.sizes)
    local[-1, 0], remote[-1, 0] = ctypes.addressof(found), offer.probe_address
    num_read = _libc.process_vm_readv(offer.pid, local.ctypes.data, len(local), remote.ctypes.data, len(remote), 0)
    if num_read < 0:
        raise PeerUnreachableError(f"process {offer.pid}: {os.strerror(ctypes.get_errno())}")
    if num_read != batch.num_bytes + NONCE_BYTES:  # the kernel stops only where it cannot go on
        raise PeerUnreachableError(f"process {offer.pid}: a part of its memory is not there")
    if found.raw != offer.probe:
        raise PeerUnreachableError(f"process {offer.pid} is not the peer")


def _let_others_read() -> None:
    """Where Yama lets only ancestors look into a process (ptrace_scope 1), let every process of this user.

    That is what holds without Yama: another process of the user may then also debug this one. Without Yama the call
    fails, and where Yama forbids more, readers find out.
    """
    _libc.prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)

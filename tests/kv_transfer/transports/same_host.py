"""The two sides of a read on one host: P as a real process of its own, D in the test's."""

import contextlib
import functools
import os
import signal
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from kv_transfer.memory.regions import Memory, Region, Spans
from kv_transfer.protocol import Offer, RankEndpoint

P_BYTES = 14 << 20
D_BYTES = 12 << 20


class PrefillProcess:
    """P: a fork that sends what it offers, and does the next thing each time it is asked to."""

    def __init__(self, steps: Callable[[], Iterator[Offer | None]]) -> None:
        self._socket, theirs = socket.socketpair()
        self._socket.settimeout(20)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                for offer in steps():
                    theirs.sendall(msgspec.msgpack.encode(offer))
                    theirs.recv(1)
            finally:
                os._exit(0)
        theirs.close()
        self.is_alive = True
        self.endpoint = RankEndpoint("127.0.0.1", 1, f"run {self.pid} {time.monotonic()}")

    def next(self) -> Offer | None:
        offer: Offer | None = msgspec.msgpack.decode(self._socket.recv(1 << 16), type=Offer | None)
        return offer

    def go_on(self) -> Offer | None:
        """Have it do the next thing, and wait until it has."""
        self._socket.sendall(b".")
        return self.next()

    def kill(self) -> None:
        if self.is_alive:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.is_alive = False

    def close(self) -> None:
        self.kill()
        self._socket.close()


@contextlib.contextmanager
def prefill_process(steps: Callable[[], Iterator[Offer | None]]) -> Iterator[tuple[PrefillProcess, Offer]]:
    """The process and its offer."""
    process = PrefillProcess(steps)
    try:
        offer = process.next()
        assert offer is not None
        yield process, offer
    finally:
        process.close()


class Side:
    """Host memory that is not shared, in regions of these sizes."""

    def __init__(self, seed: int, *sizes: int) -> None:
        self.arrays = [bytes_of(seed + i, size).copy() for i, size in enumerate(sizes)]
        self.memory = Memory([Region(array.ctypes.data, array.nbytes) for array in self.arrays])

    @property
    def bytes(self) -> "np.typing.NDArray[np.uint8]":
        """All regions, one after the other: a copy."""
        return np.concatenate(self.arrays)


@functools.cache
def bytes_of(seed: int, num_bytes: int) -> "np.typing.NDArray[np.uint8]":
    """Always the same: not to be changed."""
    array = np.random.default_rng(seed).integers(0, 256, num_bytes, dtype=np.uint8)
    array.flags.writeable = False
    return array


def spans(*rows: Sequence[int]) -> Spans:
    """Rows of (remote, local, size)."""
    remote, local, sizes = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return Spans(remote, local, sizes)


def scattered(seed: int, count: int, size: int, ours: int = D_BYTES - 32768, theirs: int = P_BYTES) -> Spans:
    rng = np.random.default_rng(seed)
    remote, local = (rng.permutation(total // size)[:count] * size for total in (theirs, ours))
    return Spans(remote, local, np.full(count, size))


def expected(
    before: "np.typing.NDArray[np.uint8]", theirs: "np.typing.NDArray[np.uint8]", what: Spans
) -> "np.typing.NDArray[np.uint8]":
    """Our bytes after the read."""
    after = before.copy()
    for remote, local, size in zip(what.remote, what.local, what.sizes, strict=True):
        after[local : local + size] = theirs[remote : remote + size]
    return after


def num_mapped() -> int:
    """Shared files that this process has mapped."""
    return Path("/proc/self/maps").read_text().count("memfd:omni-kv-cache")


def between_batches(
    batches: Callable[..., Iterator[Spans]], act: Callable[[], object]
) -> Callable[..., Iterator[Spans]]:
    """`batches` that acts between the first and the second."""

    def acting(*args: object, **kwargs: object) -> Iterator[Spans]:
        for number, batch in enumerate(batches(*args, **kwargs)):
            if number == 1:
                act()
            yield batch

    return acting

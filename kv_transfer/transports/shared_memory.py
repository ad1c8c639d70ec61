"""KV blocks on one host with one copy: P's KV cache is an unnamed file, which D maps and copies from."""

import contextlib
import ctypes
import fcntl
import mmap
import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, ClassVar

from kv_transfer.errors import DeadlineError, PeerRefusedError, PeerUnreachableError
from kv_transfer.memory.gather import gather, scatter
from kv_transfer.memory.regions import Memory, Region, Spans
from kv_transfer.memory.shared_file import address_of, map_pages
from kv_transfer.protocol import Offer, RankEndpoint, SharedMemoryOffer
from kv_transfer.transports.base import Transport
from kv_transfer.transports.batches import batches
from kv_transfer.transports.host_identity import host_id

if TYPE_CHECKING:
    from kv_transfer.memory.shared_pool import SharedPool

_MAX_BATCH_BYTES = 4 << 20  # about a millisecond
_MAX_BATCH_SPANS = 1 << 14
_SMALL_SPAN_BYTES = 1024  # below this average, two copies are faster than a call for each span
_MAX_TRIAL_S = 0.5
_PIECE_BYTES = 64 << 20
_CLOSE_TIMEOUT_S = 2.0

_memcpy = ctypes.CDLL(None).memcpy  # releases the interpreter's lock
_memcpy.argtypes = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)
_memcpy.restype = None


class SharedMemoryTransport(Transport):
    """One mapping for each peer, kept between reads.

    A mapping keeps the peer's memory alive: where the peer's process ends, a thread that otherwise sleeps gives it up.

    Args:
        memory: what is served and read into.
        pool: where it was allocated; None if nothing was allocated in shared memory.
    """

    name: ClassVar[str] = "shared_memory"

    def __init__(self, memory: Memory, pool: "SharedPool | None") -> None:
        super().__init__(memory)
        self._pool = pool
        self._host_id = host_id()
        self._lock = threading.Lock()
        self._closed = False
        self._peers: dict[RankEndpoint, _PeerFile] = {}
        self._watch: _Watch | None = None

    def offer(self) -> SharedMemoryOffer | None:
        file = self._pool.file_of(self.memory) if self._pool is not None else None
        if file is None or self._host_id is None:
            return None
        stat = os.fstat(file.fd)
        return SharedMemoryOffer(self._host_id, os.getpid(), file.fd, stat.st_dev, stat.st_ino, file.num_bytes)

    def can_read(self, peer: RankEndpoint, offer: Offer) -> bool:
        if not isinstance(offer, SharedMemoryOffer) or offer.host_id != self._host_id or not self.memory.is_on_host:
            return False
        try:
            with self._using(peer, offer) as file:
                file.map_pages(time.monotonic() + _MAX_TRIAL_S)
                return not file.has_lost_its_process
        except PeerUnreachableError:
            return False

    def read(self, peer: RankEndpoint, offer: Offer, spans: Spans, deadline: float) -> None:
        assert isinstance(offer, SharedMemoryOffer)
        self.memory.check(spans.local, spans.sizes)
        with self._using(peer, offer) as file:
            try:
                file.memory.check(spans.remote, spans.sizes)
            except IndexError as error:
                raise PeerRefusedError(f"the peer's shared memory: {error}") from None
            is_small = spans.num_bytes < _SMALL_SPAN_BYTES * len(spans)
            if not is_small:
                spans = Spans(file.memory.addresses(spans.remote), self.memory.addresses(spans.local), spans.sizes)
            for batch in batches(spans, max_spans=_MAX_BATCH_SPANS, max_bytes=_MAX_BATCH_BYTES):
                self._check_may_go_on(peer, file, deadline)
                if is_small:
                    scatter(self.memory, batch.local, batch.sizes, gather(file.memory, batch.remote, batch.sizes))
                else:
                    _copy(batch)

    def forget(self, peer: RankEndpoint) -> None:
        self._drop(lambda other, _: other == peer)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            watch, self._watch = self._watch, None
        self._drop(lambda *_: True)
        if watch is not None:
            watch.close()

    def _check_may_go_on(self, peer: RankEndpoint, file: "_PeerFile", deadline: float) -> None:
        if self._closed:
            raise PeerUnreachableError("this engine is shutting down")
        if file.has_lost_its_process:
            raise PeerUnreachableError(f"the process of {peer.host}:{peer.port} has ended")
        if time.monotonic() >= deadline:
            raise DeadlineError(f"reading from {peer.host}:{peer.port} did not end in time")

    @contextlib.contextmanager
    def _using(self, peer: RankEndpoint, offer: SharedMemoryOffer) -> Iterator["_PeerFile"]:
        """The peer's file, which stays mapped meanwhile, whatever becomes of the peer."""
        with self._lock:
            file = self._peers.get(peer) or self._open(peer, offer)
            file.num_users += 1
        try:
            yield file
        finally:
            with self._lock:
                file.num_users -= 1
                is_unused = file.num_users == 0 and self._peers.get(peer) is not file
            if is_unused:
                file.close()

    def _open(self, peer: RankEndpoint, offer: SharedMemoryOffer) -> "_PeerFile":
        """Needs the lock."""
        if self._closed:
            raise PeerUnreachableError("this engine is shutting down")
        try:
            if self._watch is None:
                self._watch = _Watch(on_end=lambda: self._drop(lambda _, file: file.has_lost_its_process))
            self._peers[peer] = _PeerFile(offer, self._watch)
        except (OSError, OverflowError, RuntimeError) as error:  # the last two: a pid beyond all pids; no more threads
            raise PeerUnreachableError(f"the shared memory of {peer.host}:{peer.port}: {error}") from None
        return self._peers[peer]

    def _drop(self, is_over: "Callable[[RankEndpoint, _PeerFile], bool]") -> None:
        """Forget peers. What is being read stays mapped until its last reader is done."""
        with self._lock:
            dropped = [(peer, file) for peer, file in self._peers.items() if is_over(peer, file)]
            for peer, _ in dropped:
                del self._peers[peer]
            unused = [file for _, file in dropped if file.num_users == 0]
        for file in unused:
            file.close()  # without the lock: to free a large memory takes seconds


def _copy(addresses: Spans) -> None:
    copies = map(_memcpy, addresses.local.tolist(), addresses.remote.tolist(), addresses.sizes.tolist())
    deque(copies, maxlen=0)  # makes them all, faster than a loop


class _Watch:
    """A thread that sleeps until one of some processes has ended, and then calls `on_end`."""

    def __init__(self, on_end: Callable[[], None]) -> None:
        self._on_end = on_end
        self._thread = threading.Thread(target=self._run, name="kv-peer-memory", daemon=True)
        self._stop_fd = os.eventfd(0, os.EFD_CLOEXEC)
        self._epoll = select.epoll()
        self._epoll.register(self._stop_fd, select.EPOLLIN)
        try:
            self._thread.start()
        except RuntimeError:
            self._close_files()
            raise

    def add(self, process_fd: int) -> None:
        """Until the descriptor is closed. Safe while the thread sleeps."""
        self._epoll.register(process_fd, select.EPOLLIN | select.EPOLLONESHOT)

    def close(self) -> None:
        os.eventfd_write(self._stop_fd, 1)
        self._thread.join(timeout=_CLOSE_TIMEOUT_S)
        self._close_files()

    def _run(self) -> None:
        while all(fd != self._stop_fd for fd, _ in self._epoll.poll()):
            self._on_end()

    def _close_files(self) -> None:
        self._epoll.close()
        os.close(self._stop_fd)


class _PeerFile:
    """A peer's memory, mapped for reading, and its process.

    Raises:
        OSError, OverflowError: there is no such process, or the file that it has under this number is not the one.
    """

    def __init__(self, offer: SharedMemoryOffer, watch: _Watch) -> None:
        self.num_users = 0  # guarded by the transport's lock
        with contextlib.ExitStack() as undo:
            self._process_fd = os.pidfd_open(offer.pid)
            undo.callback(os.close, self._process_fd)
            self._mapping = _map(offer)
            undo.callback(self._mapping.close)
            if self.has_lost_its_process:  # then the file may have been that of a later process
                raise ProcessLookupError(f"process {offer.pid} has ended")
            watch.add(self._process_fd)
            undo.pop_all()
        self.memory = Memory([Region(address_of(self._mapping), offer.num_bytes)])

    @property
    def has_lost_its_process(self) -> bool:
        poll = select.poll()
        poll.register(self._process_fd, select.POLLIN)
        return bool(poll.poll(0))

    def map_pages(self, until: float) -> None:
        (region,) = self.memory.regions
        for offset in range(0, region.num_bytes, _PIECE_BYTES):
            if time.monotonic() >= until:
                return
            map_pages(region.address + offset, min(_PIECE_BYTES, region.num_bytes - offset))

    def close(self) -> None:
        self._mapping.close()
        os.close(self._process_fd)


def _map(offer: SharedMemoryOffer) -> mmap.mmap:
    path = f"/proc/{offer.pid}/fd/{offer.fd}"
    _check_file(os.stat(path), offer)  # first without opening it: under that number there may be anything by now
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        _check_file(os.fstat(fd), offer)
        if not fcntl.fcntl(fd, fcntl.F_GET_SEALS) & fcntl.F_SEAL_SHRINK:
            raise PermissionError("its owner may cut the file short, and who reads then dies")
        return mmap.mmap(fd, offer.num_bytes, prot=mmap.PROT_READ)
    finally:
        os.close(fd)


def _check_file(stat: os.stat_result, offer: SharedMemoryOffer) -> None:
    if (stat.st_dev, stat.st_ino, stat.st_size) != (offer.device, offer.inode, offer.num_bytes):
        raise FileNotFoundError("another file has its number")

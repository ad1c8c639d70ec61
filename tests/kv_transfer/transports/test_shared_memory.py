"""P is a real process with a real unnamed file; D maps it."""

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest

from kv_transfer.errors import DeadlineError, PeerRefusedError, PeerUnreachableError
from kv_transfer.memory.regions import Memory, Region
from kv_transfer.memory.shared_file import SharedFile, new_shared_file
from kv_transfer.protocol import Offer, ProcessVmOffer, SharedMemoryOffer, TcpOffer
from kv_transfer.transports import shared_memory
from kv_transfer.transports.shared_memory import SharedMemoryTransport
from tests.kv_transfer.rank_peers import num_open_files, soon, until
from tests.kv_transfer.transports.same_host import (
    D_BYTES,
    P_BYTES,
    PrefillProcess,
    Side,
    between_batches,
    bytes_of,
    expected,
    num_mapped,
    prefill_process,
    scattered,
    spans,
)

Peer = tuple[PrefillProcess, SharedMemoryOffer]


class OneFile:
    """Stands for the pool, whose torch a fork need not import."""

    def __init__(self, file: SharedFile) -> None:
        self._file = file

    def file_of(self, memory: Memory) -> SharedFile:
        return self._file


def serving(seed: int = 1, num_bytes: int = P_BYTES) -> Iterator[Offer | None]:
    file, mapping = new_shared_file(num_bytes)
    np.frombuffer(mapping, np.uint8)[:] = bytes_of(seed, num_bytes)
    transport = SharedMemoryTransport(Memory([Region(file.address, num_bytes)]), OneFile(file))  # type: ignore[arg-type]
    yield transport.offer()
    transport.close()


@pytest.fixture
def prefill() -> Iterator[Peer]:
    with prefill_process(serving) as (process, offer):
        assert isinstance(offer, SharedMemoryOffer)
        yield process, offer


@pytest.fixture(scope="module", autouse=True)
def _collected() -> None:
    """What earlier tests have left to the garbage collector may map files too."""
    gc.collect()


@pytest.fixture
def theirs() -> "np.typing.NDArray[np.uint8]":
    return bytes_of(1, P_BYTES)


@pytest.fixture
def ours() -> Side:
    return Side(7, D_BYTES - 4096, 4096)


@pytest.fixture
def decode(ours: Side) -> Iterator[SharedMemoryTransport]:
    num_files, threads = num_open_files(), threading.active_count()
    assert num_mapped() == 0
    transport = SharedMemoryTransport(ours.memory, None)
    yield transport
    transport.close()
    assert (num_mapped(), threading.active_count()) == (0, threads)
    assert num_open_files() <= num_files


READS = {
    "one block": spans((4096, 12288, 32768)),
    "blocks here and there": scattered(3, 300, 32768),
    "one span of several batches": spans((12345, 678, 9 << 20)),
    "odd sizes, both of our regions": spans((1, 5, 77), (6 << 20, D_BYTES - 4096, 4095), (P_BYTES - 1, 100, 1)),
    "tiny pieces": scattered(4, 3000, 64),
    "tiny and odd pieces": scattered(5, 1000, 77),
    "nothing": spans(),
}


@pytest.mark.parametrize("what", READS.values(), ids=READS)
def test_a_read_moves_these_bytes_and_no_others(prefill: Peer, decode, ours, theirs, what) -> None:
    process, offer = prefill
    before = ours.bytes
    assert decode.can_read(process.endpoint, offer)
    decode.read(process.endpoint, offer, what, soon())
    assert np.array_equal(ours.bytes, expected(before, theirs, what))


def test_a_peer_is_mapped_once_and_kept_between_reads(prefill: Peer, decode) -> None:
    process, offer = prefill
    for seed in range(3):
        assert decode.can_read(process.endpoint, offer)
        decode.read(process.endpoint, offer, scattered(seed, 10, 4096), soon())
    assert num_mapped() == 1


def test_several_threads_read_at_once(prefill: Peer, decode, ours, theirs) -> None:
    process, offer = prefill
    size = D_BYTES // 8 - 4096
    parts = [spans((i * size + 99, i * size, size)) for i in range(8)]
    before = ours.bytes
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda part: decode.read(process.endpoint, offer, part, soon()), parts))
    for part in parts:
        before = expected(before, theirs, part)
    assert np.array_equal(ours.bytes, before)
    assert num_mapped() == 1


def test_a_span_outside_a_memory_is_refused_before_anything_moves(prefill: Peer, decode, ours) -> None:
    process, offer = prefill
    before = ours.bytes
    good = (0, 0, 4096)
    for bad in [(P_BYTES - 10, 0, 11), (P_BYTES, 0, 1), (-1, 0, 1), (1 << 60, 0, 1)]:
        with pytest.raises(PeerRefusedError, match="the peer's shared memory: a span"):
            decode.read(process.endpoint, offer, spans(good, bad), soon())
    for bad in [(0, D_BYTES - 10, 11), (0, D_BYTES - 4100, 8), (0, -1, 1), (0, 0, 0)]:
        with pytest.raises(IndexError):
            decode.read(process.endpoint, offer, spans(good, bad), soon())
    assert np.array_equal(ours.bytes, before)


# --- what cannot be read


def test_offers_that_are_not_for_us(prefill: Peer, decode) -> None:
    process, offer = prefill
    boot, namespace, uid = offer.host_id.split("/")
    wrong: list[dict[str, object]] = [
        {"host_id": f"{boot}/{namespace}/{int(uid) + 1}"},
        {"host_id": f"{boot}/{int(namespace) + 1}/{uid}"},
        {"host_id": f"other{boot}/{namespace}/{uid}"},
        {"inode": offer.inode + 1},
        {"device": offer.device + 1},
        {"num_bytes": offer.num_bytes - 4096},
        {"num_bytes": offer.num_bytes + 4096},
        {"fd": 999_999},
        {"pid": 1 << 40},
        {"pid": (1 << 22) - 1, "fd": 1},
    ]
    for changes in wrong:
        assert not decode.can_read(process.endpoint, msgspec.structs.replace(offer, **changes)), changes
    assert not decode.can_read(process.endpoint, TcpOffer())
    assert num_mapped() == 0
    assert decode.can_read(process.endpoint, offer)


def put_under(fd: int, make: Callable[[], int]) -> None:
    other = make()
    os.dup2(other, fd)
    os.close(other)


def other_files() -> Iterator[Offer | None]:
    file, mapping = new_shared_file(P_BYTES)
    offer = SharedMemoryTransport(Memory([Region(file.address, P_BYTES)]), OneFile(file)).offer()  # type: ignore[arg-type]
    assert offer is not None
    yield offer
    put_under(file.fd, lambda: new_shared_file(P_BYTES)[0].fd)
    yield None
    put_under(file.fd, lambda: os.pipe()[1])
    yield None
    os.close(file.fd)
    yield None
    mapping.close()


def test_another_file_under_that_number_is_not_taken_for_it(decode) -> None:
    with prefill_process(other_files) as (process, offer):
        assert decode.can_read(process.endpoint, offer)
        decode.forget(process.endpoint)
        for _ in ("another shared file", "a pipe, whose opening could block", "none"):
            process.go_on()
            assert not decode.can_read(process.endpoint, offer)
            with pytest.raises(PeerUnreachableError):
                decode.read(process.endpoint, offer, spans((0, 0, 1)), soon())


def not_sealed() -> Iterator[Offer | None]:
    fd = os.memfd_create("another", os.MFD_CLOEXEC)
    os.ftruncate(fd, P_BYTES)
    file = SharedFile(fd, 0x1000, P_BYTES)
    yield SharedMemoryTransport(Memory([Region(0x1000, P_BYTES)]), OneFile(file)).offer()  # type: ignore[arg-type]


def test_a_file_that_could_be_cut_short_is_not_read(decode) -> None:
    with prefill_process(not_sealed) as (process, offer):
        assert not decode.can_read(process.endpoint, offer)
        with pytest.raises(PeerUnreachableError, match="cut the file short"):
            decode.read(process.endpoint, offer, spans((0, 0, 1)), soon())


def test_memory_outside_the_pool_is_not_offered(ours: Side) -> None:
    class NoFile:
        def file_of(self, memory: Memory) -> None:
            return None

    for pool in (None, NoFile()):
        transport = SharedMemoryTransport(ours.memory, pool)  # type: ignore[arg-type]
        assert transport.offer() is None
        transport.close()


# --- peers that die


def test_a_peer_killed_before_the_read(prefill: Peer, decode) -> None:
    process, offer = prefill
    assert decode.can_read(process.endpoint, offer)
    process.kill()
    with pytest.raises(PeerUnreachableError):
        decode.read(process.endpoint, offer, spans((0, 0, 4096)), soon())
    assert not decode.can_read(process.endpoint, offer)


def test_a_dead_peers_memory_is_given_up_though_nobody_asks_for_it(prefill: Peer, decode) -> None:
    process, offer = prefill
    num_files = num_open_files()
    assert decode.can_read(process.endpoint, offer)
    with prefill_process(serving) as (other, other_offer):
        assert decode.can_read(other.endpoint, other_offer)
        assert num_mapped() == 2
        process.kill()
        until(lambda: num_mapped() == 1, "the dead peer's memory is still mapped")
        decode.read(other.endpoint, other_offer, spans((0, 0, 4096)), soon())
    until(lambda: num_mapped() == 0, "the other dead peer's memory is still mapped")
    until(lambda: num_open_files() <= num_files + 2, "descriptors beside the thread's own two are still open")


def test_a_peer_killed_during_the_read(prefill: Peer, decode, monkeypatch) -> None:
    process, offer = prefill
    monkeypatch.setattr(shared_memory, "batches", between_batches(shared_memory.batches, process.kill))
    with pytest.raises(PeerUnreachableError, match="has ended"):
        decode.read(process.endpoint, offer, spans((0, 0, 9 << 20)), soon())
    until(lambda: num_mapped() == 0, "the dead peer's memory is still mapped")


def test_while_a_read_uses_it_a_dead_peers_memory_stays(prefill: Peer, decode, monkeypatch) -> None:
    process, offer = prefill
    wake_ups = []
    drop = decode._drop
    monkeypatch.setattr(decode, "_drop", lambda is_over: (wake_ups.append(time.monotonic()), drop(is_over)))

    def kill_and_watch() -> None:
        process.kill()
        until(lambda: not decode._peers, "the thread has not noticed")
        assert num_mapped() == 1
        threading.Event().wait(0.1)
        assert len(wake_ups) == 1, "the thread does not sleep"

    monkeypatch.setattr(shared_memory, "batches", between_batches(shared_memory.batches, kill_and_watch))
    with pytest.raises(PeerUnreachableError, match="has ended"):
        decode.read(process.endpoint, offer, spans((0, 0, 9 << 20)), soon())
    assert num_mapped() == 0


def test_a_peer_that_has_restarted_is_another_one(prefill: Peer, decode, ours) -> None:
    process, offer = prefill
    what = scattered(1, 20, 32768)
    decode.read(process.endpoint, offer, what, soon())
    process.kill()
    before = ours.bytes
    with prefill_process(lambda: serving(seed=2)) as (again, new_offer):
        decode.read(again.endpoint, new_offer, what, soon())
        assert np.array_equal(ours.bytes, expected(before, bytes_of(2, P_BYTES), what))
        with pytest.raises(PeerUnreachableError):
            decode.read(process.endpoint, offer, what, soon())


# --- deadline, forgetting, closing


def test_no_byte_moves_after_the_deadline(prefill: Peer, decode, ours, monkeypatch) -> None:
    process, offer = prefill
    before = ours.bytes
    with pytest.raises(DeadlineError):
        decode.read(process.endpoint, offer, spans((0, 0, 4096)), time.monotonic())
    assert np.array_equal(ours.bytes, before)
    deadline = time.monotonic() + 0.5

    def wait() -> None:
        until(lambda: time.monotonic() > deadline, "time stands still")

    monkeypatch.setattr(shared_memory, "batches", between_batches(shared_memory.batches, wait))
    with pytest.raises(DeadlineError):
        decode.read(process.endpoint, offer, spans((0, 0, 9 << 20)), deadline)
    moved = (ours.bytes != before).nonzero()[0]
    assert 0 < moved[-1] < 5 << 20


def test_forgetting_a_peer_unmaps_it_after_the_read_under_way(prefill: Peer, decode, ours, theirs, monkeypatch) -> None:
    process, offer = prefill
    num_files = num_open_files()
    assert decode.can_read(process.endpoint, offer)
    decode.forget(process.endpoint)
    decode.forget(process.endpoint)
    assert num_mapped() == 0
    what, before, real = spans((0, 0, 9 << 20)), ours.bytes, shared_memory.batches
    monkeypatch.setattr(shared_memory, "batches", between_batches(real, lambda: decode.forget(process.endpoint)))
    decode.read(process.endpoint, offer, what, soon())
    assert np.array_equal(ours.bytes, expected(before, theirs, what))
    assert num_mapped() == 0
    assert num_open_files() <= num_files + 2  # the thread's own
    monkeypatch.setattr(shared_memory, "batches", real)
    decode.read(process.endpoint, offer, what, soon())
    assert num_mapped() == 1


def test_closing_ends_the_read_under_way(prefill: Peer, decode, monkeypatch) -> None:
    process, offer = prefill
    monkeypatch.setattr(shared_memory, "batches", between_batches(shared_memory.batches, decode.close))
    with pytest.raises(PeerUnreachableError, match="shutting down"):
        decode.read(process.endpoint, offer, spans((0, 0, 9 << 20)), soon())
    assert num_mapped() == 0
    assert not decode.can_read(process.endpoint, offer)
    with pytest.raises(PeerUnreachableError, match="shutting down"):
        decode.read(process.endpoint, offer, spans((0, 0, 1)), soon())


def test_no_more_threads(prefill: Peer, decode, monkeypatch) -> None:
    process, offer = prefill

    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        assert not decode.can_read(process.endpoint, offer)
    assert decode.can_read(process.endpoint, offer)


def test_an_offer_of_another_kind_is_not_ours(decode, prefill: Peer) -> None:
    process, offer = prefill
    other = ProcessVmOffer(
        host_id=offer.host_id,
        pid=offer.pid,
        start_time=0,
        addresses=(),
        sizes=(),
        probe_address=0,
        probe=bytes(16),
    )
    assert not decode.can_read(process.endpoint, other)

"""Two real processes and Mooncake's own engines between them."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kv_transfer.errors import DeadlineError, KVTransferError, PeerRefusedError, PeerUnreachableError
from kv_transfer.memory.regions import Memory, Region, Spans
from kv_transfer.protocol import MooncakeOffer, RankEndpoint, TcpOffer
from kv_transfer.transports import mooncake
from kv_transfer.transports.mooncake import MooncakeTransport
from tests.kv_transfer.transports import prefill_rank
from tests.kv_transfer.transports.prefill_rank import (
    D_SEED,
    REGION_BYTES,
    PrefillRank,
    bytes_of,
    landed,
    make_memory,
    make_spans,
)

pytest.importorskip("mooncake.engine", reason="mooncake-transfer-engine-non-cuda, or libibverbs1, is not installed")

NUM_BYTES = sum(REGION_BYTES)
PEER = RankEndpoint("127.0.0.1", 1, "run")
ONE = make_spans([100], [200], [1000])
ALL = make_spans([0, REGION_BYTES[0], sum(REGION_BYTES[:2])], [0, REGION_BYTES[0], sum(REGION_BYTES[:2])], REGION_BYTES)


@pytest.fixture
def decode() -> Iterator[MooncakeTransport]:
    transport = MooncakeTransport(make_memory(D_SEED), "127.0.0.1", required=True)
    yield transport
    transport.close()


@pytest.fixture(scope="module")
def prefill() -> Iterator[PrefillRank]:
    with prefill_rank.prefill_rank("mooncake") as rank:
        yield rank


def soon() -> float:
    return time.monotonic() + 30


def read(transport: MooncakeTransport, rank: PrefillRank, spans: Spans, deadline: float | None = None) -> None:
    assert transport.can_read(rank.endpoint, rank.offer)
    transport.read(rank.endpoint, rank.offer, spans, soon() if deadline is None else deadline)


def scattered() -> Spans:
    """More spans than one call takes, in two regions."""
    places = np.arange(0, REGION_BYTES[1], 128) + REGION_BYTES[0]
    return Spans(places, places[::-1] + 64, np.full(len(places), 64))


@pytest.mark.parametrize("spans", [ONE, ALL, scattered(), make_spans([], [], [])])
def test_bytes_land_exactly(prefill: PrefillRank, decode: MooncakeTransport, spans: Spans) -> None:
    read(decode, prefill, spans)
    read(decode, prefill, spans)
    assert np.array_equal(bytes_of(decode.memory), landed(spans))


def test_many_threads_read_at_once(prefill: PrefillRank, decode: MooncakeTransport) -> None:
    places, sizes = [i << 20 for i in range(12)], [64 << 10] * 12
    whole = make_spans(places, [place + 1000 for place in places], sizes)
    with ThreadPoolExecutor(8) as pool:
        reads = [
            pool.submit(read, decode, prefill, Spans(whole.remote[[i]], whole.local[[i]], whole.sizes[[i]]))
            for i in range(12)
        ]
        for done in reads:
            done.result()
    assert np.array_equal(bytes_of(decode.memory), landed(whole))


def test_what_can_be_read(prefill: PrefillRank, decode: MooncakeTransport) -> None:
    assert isinstance(prefill.offer, MooncakeOffer)
    assert not decode.can_read(PEER, TcpOffer())
    assert not decode.can_read(PEER, MooncakeOffer("127.0.0.1:1", "ascend", (1,), (1,)))
    assert not decode.can_read(PEER, MooncakeOffer("127.0.0.1:1", "tcp", (1, 2), (1,)))
    assert decode.can_read(PEER, MooncakeOffer("127.0.0.1:1", "tcp", (1,), (1,)))


@pytest.mark.parametrize("place", [-1, NUM_BYTES, REGION_BYTES[0] - 1, 1 << 61])
def test_spans_that_p_does_not_offer_are_refused(prefill: PrefillRank, decode: MooncakeTransport, place: int) -> None:
    with pytest.raises(PeerRefusedError, match="span"):
        read(decode, prefill, make_spans([0, place], [0, 100], [2, 2]))
    assert np.array_equal(bytes_of(decode.memory), prefill_rank.content(D_SEED))


def test_memory_that_p_has_not_registered_is_not_read(prefill: PrefillRank, decode: MooncakeTransport) -> None:
    """P's engine itself refuses it."""
    assert isinstance(prefill.offer, MooncakeOffer)
    offer = MooncakeOffer(prefill.offer.session, "tcp", (prefill.offer.addresses[0] - (1 << 20),), (1 << 20,))
    with pytest.raises(PeerUnreachableError):
        decode.read(prefill.endpoint, offer, ONE, soon())
    read(decode, prefill, ONE)


def test_spans_of_ours_that_do_not_exist_are_refused_here(prefill: PrefillRank, decode: MooncakeTransport) -> None:
    with pytest.raises(IndexError):
        read(decode, prefill, make_spans([0], [NUM_BYTES], [1]))


def test_nobody_there(decode: MooncakeTransport) -> None:
    with pytest.raises(PeerUnreachableError):
        decode.read(PEER, MooncakeOffer("127.0.0.1:1", "tcp", (4096,), (1 << 20,)), ONE, soon())


def test_p_killed_and_its_successor(decode: MooncakeTransport) -> None:
    with prefill_rank.prefill_rank("mooncake") as rank:
        read(decode, rank, ONE)
        os.kill(rank.process.pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(PeerUnreachableError):
            read(decode, rank, ALL)
        assert time.monotonic() < started + 15
        decode.forget(rank.endpoint)
    with prefill_rank.prefill_rank("mooncake") as rank:
        read(decode, rank, ONE)
    assert np.array_equal(bytes_of(decode.memory), landed(ONE))


def test_p_frozen_past_the_deadline(decode: MooncakeTransport) -> None:
    with prefill_rank.prefill_rank("mooncake") as rank:
        read(decode, rank, ONE)
        before = bytes_of(decode.memory)
        os.kill(rank.process.pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            with pytest.raises(KVTransferError):
                read(decode, rank, ALL, started + 0.5)
            assert time.monotonic() < started + 5
        finally:
            os.kill(rank.process.pid, signal.SIGCONT)
        until_read(decode, rank)
        assert np.array_equal(bytes_of(decode.memory), before)  # nothing came late


def until_read(transport: MooncakeTransport, rank: PrefillRank) -> None:
    """Mooncake takes a while to speak to a peer again."""
    deadline = time.monotonic() + 20
    while True:
        try:
            return read(transport, rank, ONE)
        except PeerUnreachableError:
            assert time.monotonic() < deadline
            time.sleep(0.2)


def test_a_call_that_does_not_return_ends_at_the_deadline(
    prefill: PrefillRank, decode: MooncakeTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its buffer is put aside: what comes late must not come into the next read's."""
    read(decode, prefill, ONE)
    staging = decode._pairs[prefill.endpoint].staging
    assert staging is not None
    engine, go_on, late = decode._engine, threading.Event(), threading.Event()

    class Slow:
        def batch_transfer_sync_read(self, *args: object) -> int:
            go_on.wait(20)
            status: int = engine.batch_transfer_sync_read(*args)
            late.set()
            return status

    monkeypatch.setattr(decode, "_engine", Slow())
    with pytest.raises(DeadlineError):
        read(decode, prefill, make_spans([5000], [5000], [1000]), time.monotonic() + 0.1)
    monkeypatch.setattr(decode, "_engine", engine)
    go_on.set()
    assert late.wait(20)
    assert np.array_equal(bytes_of(decode.memory), landed(ONE))
    assert decode._put_aside == [staging]
    read(decode, prefill, ONE)
    assert decode._pairs[prefill.endpoint].staging is not staging


def test_only_so_many_buffers_are_put_aside(decode: MooncakeTransport, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mooncake, "_MAX_PUT_ASIDE", 2)
    nobody = MooncakeOffer("127.0.0.1:1", "tcp", (4096,), (1 << 20,))
    for _ in range(3):
        with pytest.raises(PeerUnreachableError) as caught:
            decode.read(PEER, nobody, ONE, soon())
    assert "restart" in str(caught.value)


def test_a_read_whose_turn_does_not_come_ends_by_its_deadline(prefill: PrefillRank, decode: MooncakeTransport) -> None:
    with decode._pair(prefill.endpoint).lock, pytest.raises(DeadlineError, match="other reads"):
        read(decode, prefill, ONE, time.monotonic() + 0.1)


def test_touching_regions_are_registered_as_one() -> None:
    regions = [Region(8192, 4096), Region(1000, 24), Region(4096, 4096), Region(20000, 1)]
    assert mooncake._merged(regions) == [Region(1000, 24), Region(4096, 8192), Region(20000, 1)]


def test_too_many_regions() -> None:
    apart = MooncakeTransport(Memory([Region(4096 * i, 1) for i in range(1, 258)]), "127.0.0.1", required=True)
    with pytest.raises(ValueError, match="256 regions"):
        apart.offer()


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mooncake.engine", None)
    memory = make_memory(D_SEED)
    assert MooncakeTransport(memory, "127.0.0.1").offer() is None
    assert not MooncakeTransport(memory, "127.0.0.1").can_read(PEER, MooncakeOffer("h:1", "tcp", (1,), (1,)))
    with pytest.raises(ValueError, match="libibverbs1"):
        MooncakeTransport(memory, "127.0.0.1", required=True).offer()


def test_forgotten_and_closed(prefill: PrefillRank) -> None:
    transport = MooncakeTransport(make_memory(D_SEED), "127.0.0.1", required=True)
    read(transport, prefill, ONE)
    transport.forget(prefill.endpoint)
    assert not transport._pairs
    read(transport, prefill, ONE)
    transport.close()
    with pytest.raises(PeerUnreachableError):
        transport.read(prefill.endpoint, prefill.offer, ONE, soon())
    transport.close()


def test_nothing_is_left_behind(prefill: PrefillRank) -> None:
    def cycle() -> None:
        transport = MooncakeTransport(make_memory(D_SEED), "127.0.0.1", required=True)
        transport.offer()
        read(transport, prefill, ONE)
        transport.close()

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    cycle()
    before = held()
    for _ in range(3):
        cycle()
    deadline = time.monotonic() + 10
    while any(now > then for now, then in zip(held(), before, strict=True)):
        assert time.monotonic() < deadline, f"{held()} after {before}"
        time.sleep(0.01)

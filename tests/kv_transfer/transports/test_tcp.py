"""Real sockets, real memory, real processes."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kv_transfer.errors import (
    PeerRefusedError,
    PeerUnreachableError,
)
from kv_transfer.memory.regions import Memory, Region, Spans
from kv_transfer.protocol import MAX_FRAME_BYTES, HcclOffer, ReadSpans, TcpOffer
from kv_transfer.rank_server import RankClient, RankServer
from kv_transfer.transports import tcp
from kv_transfer.transports.tcp import TcpTransport
from tests.kv_transfer.rank_peers import (
    KEY,
    kv_threads,
    num_open_files,
    until,
)
from tests.kv_transfer.transports.peers import (
    D_SEED,
    P_SEED,
    REGION_BYTES,
    Gate,
    Side,
    everything,
    landed,
    relay,
    shuffled,
    spans_of,
)

TOTAL = sum(REGION_BYTES)
ONE = spans_of([0], [64], [100])


# --- bytes


@pytest.mark.parametrize(
    "spans",
    [
        ONE,
        everything(),
        spans_of([5, 100, 3], [1000, 0, 500], [7, 300, 1]),
        spans_of([TOTAL - 10, 0], [0, TOTAL - 10], [10, 10]),
        shuffled(16, 1, 1000),  # so small that they are gathered
        shuffled(100, 5, 3000),
        shuffled(4096, 8, 100),
        spans_of([], [], []),
    ],
    ids=["one", "everything", "scattered", "ends", "tiny", "small", "large", "none"],
)
def test_bytes_land_exactly(prefill: Side, decode: Side, spans: Spans) -> None:
    sent, expected = prefill.content(), landed(spans, prefill.content(), decode.content())
    decode.read(prefill.endpoint, spans)
    assert np.array_equal(decode.content(), expected)
    assert np.array_equal(prefill.content(), sent)


@pytest.mark.parametrize("spans", [everything(), shuffled(512, 3, 2000)], ids=["large", "small"])
def test_over_several_connections(prefill: Side, parallel: Side, spans: Spans) -> None:
    expected = landed(spans, prefill.content(), parallel.content())
    for _ in range(2):
        parallel.read(prefill.endpoint, spans)
        assert np.array_equal(parallel.content(), expected)


def test_small_reads_use_one_connection(prefill: Side) -> None:
    with contextlib.closing(Side(D_SEED, num_connections=4)) as decode:
        decode.read(prefill.endpoint, spans_of([0], [0], [1 << 20]))
        assert sum(map(len, decode.client._idle.values())) == 1


def test_a_read_of_many_requests(prefill: Side, decode: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "_SPANS_PER_REQUEST", 70)
    monkeypatch.setattr(tcp, "_BYTES_PER_REQUEST", 300_000)
    for spans in (everything(), shuffled(16, 4, 1000)):
        expected = landed(spans, prefill.content(), decode.content())
        decode.read(prefill.endpoint, spans)
        assert np.array_equal(decode.content(), expected)


def test_more_spans_than_fit_into_a_message(prefill: Side, decode: Side) -> None:
    num_spans = MAX_FRAME_BYTES // 16 + 1  # too many for one
    offsets = np.arange(num_spans) * 4
    decode.read(prefill.endpoint, Spans(offsets, offsets, np.full(num_spans, 2)))
    assert np.array_equal(decode.content()[: 4 * num_spans : 4], prefill.content()[: 4 * num_spans : 4])


@settings(deadline=None, database=None)
@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(0, 8))
def test_parts_are_the_whole(sizes: list[int], num_parts: int) -> None:
    ends = np.cumsum(sizes)
    spans = Spans(ends, ends + 7, np.array(sizes))
    parts = tcp._split(spans, num_parts)
    assert 1 <= len(parts) <= max(1, num_parts)
    assert all(len(part) for part in parts)
    for name in ("remote", "local", "sizes"):
        assert np.concatenate([getattr(part, name) for part in parts]).tolist() == getattr(spans, name).tolist()
    assert max(part.num_bytes for part in parts) <= spans.num_bytes / max(1, num_parts) + max(sizes) + 1


def test_many_threads_read_at_once(prefill: Side, decode: Side) -> None:
    spans = shuffled(1024, 4, 64)
    expected = landed(spans, prefill.content(), decode.content())
    each = [Spans(spans.remote[i : i + 1], spans.local[i : i + 1], spans.sizes[i : i + 1]) for i in range(64)]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda one: decode.read(prefill.endpoint, one), each))
    assert np.array_equal(decode.content(), expected)


def test_who_can_serve_and_read(prefill: Side) -> None:
    assert prefill.transport.can_read(prefill.endpoint, TcpOffer())
    assert not prefill.transport.can_read(prefill.endpoint, HcclOffer("gloo"))
    device = [SimpleNamespace(device=SimpleNamespace(type="npu"))]
    memory = Memory([Region(4096, 4096)], device)
    server = RankServer("127.0.0.1", KEY)
    on_device = TcpTransport(memory, server, RankClient(KEY))
    assert on_device.offer() is None
    assert not on_device.can_read(prefill.endpoint, TcpOffer())
    assert TcpTransport(prefill.transport.memory, None, RankClient(KEY)).offer() is None
    server.close()


# --- what is asked for


@pytest.mark.parametrize(
    ("remote", "size"),
    [
        (-1, 10),
        (TOTAL, 1),
        (TOTAL - 9, 10),
        (REGION_BYTES[0] - 1, 2),
        (1 << 62, 1),
        (0, 0),
        (0, -5),
        (10, -(1 << 62)),
        (0, 1 << 62),
    ],
)
@pytest.mark.parametrize("num_spans", [1, 100], ids=["few", "gathered"])
def test_spans_outside_the_peers_memory_are_refused(prefill: Side, remote: int, size: int, num_spans: int) -> None:
    offsets = np.array([0] * (num_spans - 1) + [remote], dtype="<i8").tobytes()
    sizes = np.array([1] * (num_spans - 1) + [size], dtype="<i8").tobytes()
    for request in (ReadSpans(offsets, sizes), ReadSpans(offsets, sizes, True)):
        with prefill.client.connection(prefill.endpoint, time.monotonic() + 10) as connection:
            connection.send(request, time.monotonic() + 10)
            with pytest.raises(PeerRefusedError):
                connection.receive_reply(time.monotonic() + 10)


@pytest.mark.parametrize(("offsets", "sizes"), [(bytes(8), bytes(16)), (bytes(7), bytes(7)), (bytes(8), b"")])
def test_spans_that_are_none_are_refused(prefill: Side, decode: Side, offsets: bytes, sizes: bytes) -> None:
    with prefill.client.connection(prefill.endpoint, time.monotonic() + 10) as connection:
        connection.send(ReadSpans(offsets, sizes), time.monotonic() + 10)
        with pytest.raises(PeerRefusedError):
            connection.receive_reply(time.monotonic() + 10)
    decode.read(prefill.endpoint, ONE)  # P goes on serving


@pytest.mark.parametrize("num_spans", [1, 100], ids=["few", "gathered"])
def test_spans_outside_our_memory_are_our_mistake(prefill: Side, decode: Side, num_spans: int) -> None:
    before = decode.content()
    with pytest.raises(IndexError):
        decode.read(prefill.endpoint, spans_of([0] * num_spans, [0] * (num_spans - 1) + [TOTAL], [1] * num_spans))
    assert np.array_equal(decode.content(), before)


# --- the end


def test_closing_ends_reads_under_way_and_leaves_nothing() -> None:
    files, threads = num_open_files(), kv_threads()
    prefill, decode = Side(P_SEED, serves=True), Side(D_SEED, num_connections=2)
    gate = Gate(1 << 16)
    with relay(prefill.endpoint, gate) as peer, ThreadPoolExecutor(1) as pool:
        read = pool.submit(decode.read, peer, everything())
        until(lambda: gate.num_waiting == 2, "the read did not begin")
        decode.close()
        with pytest.raises(PeerUnreachableError):
            read.result(timeout=5)
        gate.open()
    with pytest.raises(PeerUnreachableError):
        decode.read(prefill.endpoint, ONE)
    prefill.close()
    decode.transport.forget(prefill.endpoint)
    until(lambda: kv_threads() == threads, "a thread was left")
    assert num_open_files() <= files


def test_forgetting_a_peer_closes_its_connections(prefill: Side, decode: Side) -> None:
    decode.read(prefill.endpoint, ONE)
    decode.transport.forget(prefill.endpoint)
    assert not decode.client._idle
    decode.read(prefill.endpoint, ONE)

"""Peers and wires that do harm: killed, stopped, slow, corrupting, lying."""

import contextlib
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import xxhash

from kv_transfer.errors import (
    ChecksumError,
    DeadlineError,
    KVTransferError,
    PeerRefusedError,
    PeerUnreachableError,
    ProtocolError,
)
from kv_transfer.memory.regions import Spans
from kv_transfer.protocol import RankEndpoint, ReadEnded, ReadSpans, Refused, SpansFollow
from kv_transfer.rank_connection import RankConnection
from kv_transfer.transports import tcp
from kv_transfer.transports.tcp import TcpTransport
from tests.kv_transfer.rank_peers import (
    answers,
    frame,
    stand_in,
    until,
)
from tests.kv_transfer.transports.peers import (
    D_SEED,
    P_SEED,
    Gate,
    Side,
    everything,
    prefill_process,
    relay,
    shuffled,
    spans_of,
    stop,
)

ONE = spans_of([0], [64], [100])


@pytest.mark.parametrize(
    ("data", "error"),
    [
        (frame(SpansFollow(99)) + bytes(100), ProtocolError),
        (frame(SpansFollow(101)) + bytes(101), ProtocolError),
        (frame(ReadEnded(True)), ProtocolError),
        (frame(Refused("busy")), PeerRefusedError),
        (frame(SpansFollow(100)) + bytes(99), PeerUnreachableError),
    ],
)
def test_what_is_no_answer_fails_the_read(decode: Side, data: bytes, error: type[KVTransferError]) -> None:
    with stand_in(answers(data)) as peer, pytest.raises(error):
        decode.read(peer, ONE)


def test_the_checksum_is_xxh3(decode: Side) -> None:
    digest = xxhash.xxh3_64_digest(bytes(100)) if decode.transport._checksum else b""
    with stand_in(answers(frame(SpansFollow(100)) + bytes(100) + digest)) as peer:
        decode.read(peer, ONE)
    assert not decode.content()[64:164].any()


@pytest.mark.parametrize("spans", [everything(), shuffled(16, 1, 1000)], ids=["large", "gathered"])
@pytest.mark.parametrize("where", [300, 12_345])
def test_a_flipped_byte_is_noticed(prefill: Side, spans: Spans, where: int) -> None:
    def flip(number: int, position: int, data: bytes) -> bytes:
        changed = bytearray(data)
        if 0 <= where - position < len(data):
            changed[where - position] ^= 1
        return bytes(changed)

    with (
        contextlib.closing(Side(D_SEED, checksum=True)) as decode,
        relay(prefill.endpoint, flip) as peer,
        pytest.raises(ChecksumError),
    ):
        decode.read(peer, spans)


@pytest.mark.parametrize("end", [130, 5_000, 1_000_000])
def test_a_truncated_transfer_is_noticed(prefill: Side, decode: Side, end: int) -> None:
    def cut(number: int, position: int, data: bytes) -> bytes | None:
        return data[: end - position] if position < end else None

    with relay(prefill.endpoint, cut) as peer, pytest.raises(PeerUnreachableError):
        decode.read(peer, everything())
    assert not decode.client._in_use
    assert not decode.client._idle


def test_memory_that_changes_while_it_is_sent_is_noticed(prefill: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    send_buffers = RankConnection.send_buffers

    def overwrite_and_send(connection: RankConnection, buffers: list[memoryview], deadline: float) -> None:
        if threading.current_thread().name == "kv-rank" and len(buffers[0]) > 1000:
            prefill.arrays[0][:] += 1
        send_buffers(connection, buffers, deadline)

    monkeypatch.setattr(RankConnection, "send_buffers", overwrite_and_send)
    with contextlib.closing(Side(D_SEED, checksum=True)) as decode, pytest.raises(ChecksumError):
        decode.read(prefill.endpoint, everything())


def test_a_peer_killed_in_the_middle(decode: Side) -> None:
    gate = Gate(1 << 20)
    with prefill_process() as (endpoint, process), relay(endpoint, gate) as peer, ThreadPoolExecutor(1) as pool:
        read = pool.submit(decode.read, peer, everything())
        until(lambda: gate.num_waiting == 1, "the bytes did not come")
        process.send_signal(signal.SIGKILL)
        process.wait(timeout=10)
        gate.open()
        with pytest.raises(PeerUnreachableError):
            read.result(timeout=10)
        with pytest.raises(PeerUnreachableError):
            decode.read(endpoint, ONE)


def test_a_stopped_peer_meets_the_deadline_and_comes_back(decode: Side) -> None:
    with prefill_process() as (endpoint, process):
        decode.read(endpoint, ONE)
        stop(process)
        before, began = decode.content(), time.monotonic()
        for _ in range(2):  # over the connection at hand, over a new one
            with pytest.raises(DeadlineError):
                decode.read(endpoint, everything(), time.monotonic() + 0.3)
        assert time.monotonic() - began < 5
        process.send_signal(signal.SIGCONT)
        assert np.array_equal(decode.content(), before)
        decode.read(endpoint, everything())
        with contextlib.closing(Side(P_SEED)) as same:
            assert np.array_equal(decode.content(), same.content())


def test_a_slow_link_delays_no_other_peer(prefill: Side, parallel: Side) -> None:
    """As many slow reads as have ever shared threads: none of them holds what the other needs."""
    gate, spans = Gate(1 << 16), everything()
    with (
        contextlib.closing(Side(P_SEED, serves=True)) as other,
        relay(other.endpoint, gate) as slow,
        ThreadPoolExecutor(8) as pool,
    ):
        reads = [pool.submit(parallel.read, slow, spans) for _ in range(8)]
        until(lambda: gate.num_waiting == 8 * parallel.transport._num_connections, "the slow reads did not begin")
        began = time.monotonic()
        parallel.read(prefill.endpoint, spans, began + 10)
        assert not any(read.done() for read in reads)
        gate.open()
        for read in reads:
            read.result(timeout=20)


def test_nothing_is_written_once_a_read_has_failed(prefill: Side, parallel: Side) -> None:
    """One part fails at once, another is still under way: the read ends when that one has."""
    gate = Gate(1 << 16, connections=range(1, 9))

    def fail_first(number: int, position: int, data: bytes) -> bytes | None:
        return None if number == 0 and position > 1 << 16 else gate(number, position, data)

    with relay(prefill.endpoint, fail_first) as peer:
        with pytest.raises((PeerUnreachableError, DeadlineError)):
            parallel.read(peer, everything(), time.monotonic() + 0.5)
        assert not parallel.client._in_use
        after = parallel.content()
        gate.open()
    assert np.array_equal(parallel.content(), after)  # the relay has passed on all that it held


def test_a_mistake_in_one_part_waits_for_the_others(
    prefill: Side, parallel: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error that is none of ours, in the calling thread, while the other parts write."""
    gate, read_part = Gate(1 << 16), TcpTransport._read_part

    def fail_first(transport: TcpTransport, peer: RankEndpoint, part: Spans, deadline: float) -> None:
        if part.remote[0] == 0:
            raise MemoryError
        read_part(transport, peer, part, deadline)

    monkeypatch.setattr(TcpTransport, "_read_part", fail_first)
    with relay(prefill.endpoint, gate) as peer:
        with pytest.raises(MemoryError):
            parallel.read(peer, everything(), time.monotonic() + 0.5)
        assert not parallel.client._in_use
        after = parallel.content()
        gate.open()
    assert np.array_equal(parallel.content(), after)


def test_a_reader_that_takes_nothing_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tcp, "_PEER_TIMEOUT_S", 0.2)
    region_bytes = (32 << 20,)  # more than the sockets hold
    with (
        contextlib.closing(Side(P_SEED, region_bytes=region_bytes, serves=True)) as prefill,
        prefill.client.connection(prefill.endpoint, time.monotonic() + 10) as connection,
    ):
        assert prefill.server is not None
        connection.send(ReadSpans(bytes(8), (32 << 20).to_bytes(8, "little")), time.monotonic() + 10)
        until(lambda: prefill.server.dropped.take() == 1, "the reader was kept")  # type: ignore[union-attr]
        assert not prefill.server._serving

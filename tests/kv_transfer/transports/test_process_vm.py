"""P is a real process; D reads out of its memory."""

import mmap
import os
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import msgspec
import numpy as np
import pytest

from kv_transfer.errors import DeadlineError, PeerRefusedError, PeerUnreachableError
from kv_transfer.memory.regions import Memory, Region
from kv_transfer.memory.shared_file import address_of
from kv_transfer.protocol import Offer, ProcessVmOffer, TcpOffer
from kv_transfer.transports import process_vm
from kv_transfer.transports.host_identity import start_time
from kv_transfer.transports.process_vm import ProcessVmTransport
from tests.kv_transfer.rank_peers import num_open_files, soon, until
from tests.kv_transfer.transports.same_host import (
    D_BYTES,
    P_BYTES,
    PrefillProcess,
    Side,
    between_batches,
    bytes_of,
    expected,
    prefill_process,
    scattered,
    spans,
)

Peer = tuple[PrefillProcess, ProcessVmOffer]

FIRST_BYTES = 3 << 20  # P's first region; the second has the rest


def serving(seed: int = 1) -> Iterator[Offer | None]:
    mappings = [mmap.mmap(-1, size) for size in (FIRST_BYTES, P_BYTES - FIRST_BYTES)]
    content = bytes_of(seed, P_BYTES)
    mappings[0][:], mappings[1][:] = content[:FIRST_BYTES].tobytes(), content[FIRST_BYTES:].tobytes()
    transport = ProcessVmTransport(Memory([Region(address_of(mapping), len(mapping)) for mapping in mappings]))
    yield transport.offer()
    mappings[1].close()  # unmaps
    yield None
    transport.close()


@pytest.fixture
def prefill() -> Iterator[Peer]:
    with prefill_process(serving) as (process, offer):
        assert isinstance(offer, ProcessVmOffer)
        yield process, offer


@pytest.fixture
def theirs() -> "np.typing.NDArray[np.uint8]":
    return bytes_of(1, P_BYTES)


@pytest.fixture
def ours() -> Side:
    return Side(7, D_BYTES - 4096, 4096)


@pytest.fixture
def decode(ours: Side) -> Iterator[ProcessVmTransport]:
    num_files, threads = num_open_files(), threading.active_count()
    transport = ProcessVmTransport(ours.memory)
    yield transport
    transport.close()
    assert threading.active_count() == threads
    assert num_open_files() <= num_files


READS = {
    "one block": spans((4096, 12288, 32768)),
    "more pieces than one call takes": scattered(3, 2500, 4096),
    "one span of several batches": spans((FIRST_BYTES + 12345, 678, 9 << 20)),
    "odd sizes, both regions": spans(
        (1, 5, 77), (6 << 20, D_BYTES - 4096, 4095), (P_BYTES - 1, 100, 1), (FIRST_BYTES - 7, 200, 7)
    ),
    "tiny pieces": scattered(4, 3000, 64),
    "nothing": spans(),
}


@pytest.mark.parametrize("what", READS.values(), ids=READS)
def test_a_read_moves_these_bytes_and_no_others(prefill: Peer, decode, ours, theirs, what) -> None:
    process, offer = prefill
    before = ours.bytes
    assert decode.can_read(process.endpoint, offer)
    decode.read(process.endpoint, offer, what, soon())
    assert np.array_equal(ours.bytes, expected(before, theirs, what))


def test_several_threads_read_at_once(prefill: Peer, decode, ours, theirs) -> None:
    process, offer = prefill
    size = 1 << 20
    parts = [spans((FIRST_BYTES + i * size + 99, i * size, size)) for i in range(8)]
    before = ours.bytes
    with ThreadPoolExecutor(8) as threads:
        list(threads.map(lambda part: decode.read(process.endpoint, offer, part, soon()), parts))
    for part in parts:
        before = expected(before, theirs, part)
    assert np.array_equal(ours.bytes, before)


def test_a_span_outside_a_memory_is_refused_before_anything_moves(prefill: Peer, decode, ours) -> None:
    process, offer = prefill
    before = ours.bytes
    good = (0, 0, 4096)
    for bad in [(P_BYTES - 10, 0, 11), (FIRST_BYTES - 10, 0, 11), (P_BYTES, 0, 1), (-1, 0, 1), (1 << 60, 0, 1)]:
        with pytest.raises(PeerRefusedError, match="the peer's memory: a span"):
            decode.read(process.endpoint, offer, spans(good, bad), soon())
    for bad in [(0, D_BYTES - 10, 11), (0, D_BYTES - 4100, 8), (0, -1, 1), (0, 0, 0)]:
        with pytest.raises(IndexError):
            decode.read(process.endpoint, offer, spans(good, bad), soon())
    assert np.array_equal(ours.bytes, before)


def test_offers_that_are_not_for_us(prefill: Peer, decode) -> None:
    process, offer = prefill
    boot, namespace, uid = offer.host_id.split("/")
    wrong: list[dict[str, object]] = [
        {"host_id": f"{boot}/{namespace}/{int(uid) + 1}"},
        {"host_id": f"{boot}/{int(namespace) + 1}/{uid}"},
        {"host_id": f"other{boot}/{namespace}/{uid}"},
        {"start_time": offer.start_time + 1},
        {"pid": 1 << 40},
        {"pid": os.getpid()},
        {"probe": bytes(16)},
        {"probe_address": 0},
        {"probe_address": offer.probe_address + 8},
        {"addresses": offer.addresses[:1]},
    ]
    for changes in wrong:
        assert not decode.can_read(process.endpoint, msgspec.structs.replace(offer, **changes)), changes
    assert not decode.can_read(process.endpoint, TcpOffer())


def test_what_is_on_a_device_is_not_offered(ours: Side, prefill: Peer) -> None:
    class OnDevice(Memory):
        @property
        def is_on_host(self) -> bool:
            return False

    transport = ProcessVmTransport(OnDevice(ours.memory.regions))
    assert transport.offer() is None
    assert not transport.can_read(prefill[0].endpoint, prefill[1])


# --- peers that die


def test_a_peer_killed_before_the_read(prefill: Peer, decode) -> None:
    process, offer = prefill
    assert decode.can_read(process.endpoint, offer)
    process.kill()
    with pytest.raises(PeerUnreachableError, match="No such process"):
        decode.read(process.endpoint, offer, spans((0, 0, 4096)), soon())
    assert not decode.can_read(process.endpoint, offer)


def test_a_peer_killed_during_the_read(prefill: Peer, decode, monkeypatch) -> None:
    process, offer = prefill
    monkeypatch.setattr(process_vm, "batches", between_batches(process_vm.batches, process.kill))
    with pytest.raises(PeerUnreachableError):
        decode.read(process.endpoint, offer, spans((FIRST_BYTES, 0, 9 << 20)), soon())


def test_bytes_of_a_later_process_under_that_pid_are_not_accepted(prefill: Peer, decode) -> None:
    """It has memory at the same addresses, for it is a fork of the same process; only the probe tells them apart."""
    process, offer = prefill
    what = spans((0, 0, 4096))
    decode.read(process.endpoint, offer, what, soon())
    with prefill_process(lambda: serving(seed=2)) as (other, other_offer):
        assert isinstance(other_offer, ProcessVmOffer)
        for address in (offer.probe_address, other_offer.probe_address):
            under_its_pid = msgspec.structs.replace(other_offer, probe=offer.probe, probe_address=address)
            with pytest.raises(PeerUnreachableError, match=r"is not the peer|Bad address|is not there"):
                decode.read(process.endpoint, under_its_pid, what, soon())
        process.kill()
        decode.read(other.endpoint, other_offer, what, soon())


def test_memory_that_the_peer_has_given_up(prefill: Peer, decode, ours, theirs) -> None:
    process, offer = prefill
    process.go_on()
    before, what = ours.bytes, spans((0, 0, 4096))
    decode.read(process.endpoint, offer, what, soon())
    assert np.array_equal(ours.bytes, expected(before, theirs, what))
    with pytest.raises(PeerUnreachableError, match="Bad address"):
        decode.read(process.endpoint, offer, spans((FIRST_BYTES, 0, 4096)), soon())
    with pytest.raises(PeerUnreachableError, match="is not there"):
        decode.read(process.endpoint, offer, spans((0, 0, 4096), (FIRST_BYTES, 4096, 4096)), soon())


# --- deadline, closing, who may read


def test_no_byte_moves_after_the_deadline(prefill: Peer, decode, ours, monkeypatch) -> None:
    process, offer = prefill
    before = ours.bytes
    with pytest.raises(DeadlineError):
        decode.read(process.endpoint, offer, spans((0, 0, 4096)), time.monotonic())
    assert np.array_equal(ours.bytes, before)
    deadline = time.monotonic() + 0.5

    def wait() -> None:
        until(lambda: time.monotonic() > deadline, "time stands still")

    monkeypatch.setattr(process_vm, "batches", between_batches(process_vm.batches, wait))
    with pytest.raises(DeadlineError):
        decode.read(process.endpoint, offer, spans((FIRST_BYTES, 0, 9 << 20)), deadline)
    moved = (ours.bytes != before).nonzero()[0]
    assert 0 < moved[-1] < 5 << 20


def test_closing_ends_the_read_under_way(prefill: Peer, decode, monkeypatch) -> None:
    process, offer = prefill
    decode.forget(process.endpoint)  # nothing is held
    monkeypatch.setattr(process_vm, "batches", between_batches(process_vm.batches, decode.close))
    with pytest.raises(PeerUnreachableError, match="shutting down"):
        decode.read(process.endpoint, offer, spans((FIRST_BYTES, 0, 9 << 20)), soon())


@pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")
def test_a_reader_without_the_right_finds_out() -> None:
    """P is root's and D nobody's, and D thinks that they are one user."""
    with prefill_process(serving) as (process, offer):

        def read() -> Iterator[Offer | None]:
            os.setresuid(65534, 65534, 65534)
            transport = ProcessVmTransport(Side(1, 4096).memory)
            transport._host_id = offer.host_id  # type: ignore[union-attr]
            yield TcpOffer() if transport.can_read(process.endpoint, offer) else offer

        with prefill_process(read) as (_, answer):
            assert answer == offer
    assert start_time(process.pid) is None

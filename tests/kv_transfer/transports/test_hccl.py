"""Two real processes and a real group; on the CPU with gloo, and once more, where there is torch_npu, with HCCL.

For the latter set OMNI_ASCEND_PYTHON to the interpreter of an environment with torch_npu, and, on a machine without an
NPU, OMNI_ASCEND_STANDIN to the folder of the stand-in for CANN, FAKE_CANN and LD_LIBRARY_PATH to its libraries.
"""

import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from kv_transfer.errors import (
    ChecksumError,
    DeadlineError,
    PeerRefusedError,
    PeerUnreachableError,
    ProtocolError,
)
from kv_transfer.memory.regions import Spans
from kv_transfer.protocol import (
    GroupKey,
    GroupOpen,
    GroupProof,
    HcclOffer,
    JoinGroup,
    PieceFollows,
    RankEndpoint,
    TcpOffer,
)
from kv_transfer.rank_connection import RankConnection
from kv_transfer.rank_server import RankClient, RankServer
from kv_transfer.transports import hccl
from kv_transfer.transports.hccl import HcclTransport
from kv_transfer.transports.rank_group import RankGroup
from tests.kv_transfer.transports import prefill_rank
from tests.kv_transfer.transports.prefill_rank import (
    D_SEED,
    DEVICE,
    KEY,
    P_SEED,
    REGION_BYTES,
    PrefillRank,
    bytes_of,
    landed,
    make_memory,
    make_spans,
)

OFFER = HcclOffer({"cpu": "gloo", "npu": "hccl"}[DEVICE])
NUM_BYTES = sum(REGION_BYTES)
on_gloo = pytest.mark.skipif(DEVICE != "cpu", reason="the stand-in for HCCL does not notice that a peer is gone")


@pytest.fixture(scope="module", autouse=True)
def device() -> None:
    prefill_rank.load_device()


class Side:
    """A transport with all that it needs."""

    def __init__(self, seed: int, *, checksum: bool = False) -> None:
        self.memory = make_memory(seed)
        self.server = RankServer("127.0.0.1", KEY)
        self.client = RankClient(KEY)
        self.transport = HcclTransport(self.memory, self.server, self.client, checksum=checksum)
        self.offer = self.transport.offer()
        self.server.start()

    def close(self) -> None:
        self.transport.close()
        self.client.close()
        self.server.close()


@pytest.fixture
def decode() -> Iterator[Side]:
    side = Side(D_SEED)
    yield side
    side.close()


@pytest.fixture
def checking() -> Iterator[Side]:
    side = Side(D_SEED, checksum=True)
    yield side
    side.close()


@pytest.fixture(scope="module")
def prefill() -> Iterator[PrefillRank]:
    with prefill_rank.prefill_rank("hccl") as rank:
        yield rank


def soon() -> float:
    return time.monotonic() + 30


def until(condition: Callable[[], bool], why: str) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline, why
        time.sleep(0.005)


def read(side: Side, rank: PrefillRank, spans: Spans, deadline: float | None = None) -> None:
    assert side.transport.can_read(rank.endpoint, rank.offer)
    side.transport.read(rank.endpoint, rank.offer, spans, soon() if deadline is None else deadline)


ONE = make_spans([100], [200], [1000])
ALL = make_spans([0, REGION_BYTES[0], sum(REGION_BYTES[:2])], [0, REGION_BYTES[0], sum(REGION_BYTES[:2])], REGION_BYTES)


def small_spans() -> Spans:
    """64 bytes each, scattered over the second region and over the third."""
    rng = np.random.default_rng(3)
    second, third = (rng.permutation(num_bytes // 64) * 64 for num_bytes in REGION_BYTES[1:])
    places = np.concatenate((REGION_BYTES[0] + second[:3000], sum(REGION_BYTES[:2]) + third[:6000]))
    others = np.concatenate((REGION_BYTES[0] + second[-3000:], sum(REGION_BYTES[:2]) + third[-6000:]))
    assert len(np.unique(others)) == len(others)
    return Spans(places, others, np.full(len(places), 64))


# --- bytes


@pytest.mark.parametrize("spans", [ONE, ALL, small_spans()], ids=["one", "everything, in several pieces", "small"])
def test_bytes_land_exactly(prefill: PrefillRank, decode: Side, checking: Side, spans: Spans) -> None:
    for side in (decode, checking):
        read(side, prefill, spans)
        read(side, prefill, spans)  # in the same group
        assert np.array_equal(bytes_of(side.memory), landed(spans))


def test_nothing_to_read(prefill: PrefillRank, decode: Side) -> None:
    read(decode, prefill, make_spans([], [], []))
    assert np.array_equal(bytes_of(decode.memory), prefill_rank.content(D_SEED))


def test_many_threads_read_at_once(prefill: PrefillRank, decode: Side) -> None:
    sizes = [64 << 10] * 16
    places = [i * (1 << 20) for i in range(16)]
    spans = [make_spans([place], [place + 1000], [size]) for place, size in zip(places, sizes, strict=True)]
    with ThreadPoolExecutor(8) as pool:
        for done in [pool.submit(read, decode, prefill, one) for one in spans]:
            done.result()
    whole = make_spans(places, [place + 1000 for place in places], sizes)
    assert np.array_equal(bytes_of(decode.memory), landed(whole))
    assert len(decode.transport._groups) == 1


# --- refusals


def test_who_can_read_what(decode: Side) -> None:
    peer = RankEndpoint("127.0.0.1", 1, "run")
    assert decode.offer == OFFER
    assert decode.transport.can_read(peer, OFFER)
    assert not decode.transport.can_read(peer, HcclOffer("gloo" if DEVICE == "npu" else "hccl"))
    assert not decode.transport.can_read(peer, TcpOffer())
    assert HcclTransport(decode.memory, None, decode.client).offer() is None


@pytest.mark.parametrize("place", [-1, NUM_BYTES, REGION_BYTES[0] - 1, 1 << 61])
def test_spans_that_do_not_exist_are_refused_by_p(prefill: PrefillRank, decode: Side, place: int) -> None:
    before = bytes_of(decode.memory)
    with pytest.raises(PeerRefusedError, match="span"):
        read(decode, prefill, make_spans([0, place], [0, 100], [2, 2]))
    assert np.array_equal(bytes_of(decode.memory), before)
    read(decode, prefill, ONE)  # P goes on serving


def test_spans_of_ours_that_do_not_exist_are_refused_here(decode: Side) -> None:
    with pytest.raises(IndexError):
        decode.transport.read(RankEndpoint("127.0.0.1", 1, "run"), OFFER, make_spans([0], [NUM_BYTES], [1]), soon())


def test_pieces_that_are_too_large_are_refused_by_p(
    prefill: PrefillRank, decode: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hccl, "_PIECE_BYTES", 17 << 20)
    with pytest.raises(PeerRefusedError, match="at most"):
        read(decode, prefill, ALL)


def test_an_earlier_run_and_another_backend_are_refused(prefill: PrefillRank, decode: Side) -> None:
    stale = RankEndpoint(prefill.endpoint.host, prefill.endpoint.port, "an earlier run")
    with pytest.raises(PeerRefusedError, match="restarted"):
        decode.transport.read(stale, OFFER, ONE, soon())
    with decode.client.connection(prefill.endpoint, soon()) as connection:
        connection.send(JoinGroup("carrier pigeons"), soon())
        with pytest.raises(PeerRefusedError, match="not carrier pigeons"):
            connection.receive_reply(soon())


# --- what goes wrong


def test_bytes_that_changed_on_the_way_are_noticed(prefill: PrefillRank, checking: Side) -> None:
    read(checking, prefill, make_spans([], [], []))
    (group,) = checking.transport._groups
    receive = group.receive

    def receive_and_change(data: torch.Tensor, deadline: float) -> None:
        receive(data, deadline)
        changed = data.cpu()
        changed[500] ^= 1
        data.copy_(changed)

    group.receive = receive_and_change
    with pytest.raises(ChecksumError):
        read(checking, prefill, ONE)
    assert np.array_equal(bytes_of(checking.memory), prefill_rank.content(D_SEED))
    read(checking, prefill, ONE)
    assert np.array_equal(bytes_of(checking.memory), landed(ONE))


def test_who_did_not_get_the_first_message_gets_nothing(decode: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    send = RankConnection.send

    def guess(self: RankConnection, message: object, *args: object) -> None:
        send(self, GroupProof(bytes(16)) if isinstance(message, GroupProof) else message, *args)

    other = Side(P_SEED)
    try:
        monkeypatch.setattr(RankConnection, "send", guess)
        with pytest.raises(PeerUnreachableError):
            decode.transport.read(other.server.endpoint, OFFER, ONE, soon())
    finally:
        other.close()


@on_gloo
def test_p_killed_while_it_is_read(decode: Side) -> None:
    with prefill_rank.prefill_rank("hccl") as rank:
        kill_in_first_piece(decode, rank, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(PeerUnreachableError):
            read(decode, rank, ALL)
        assert time.monotonic() < started + 10
        with pytest.raises(PeerUnreachableError):
            read(decode, rank, ONE)
    with prefill_rank.prefill_rank("hccl") as rank:  # its successor
        read(decode, rank, ONE)


@on_gloo
@pytest.mark.parametrize("is_being_read", [False, True])
def test_p_frozen_past_the_deadline(decode: Side, is_being_read: bool) -> None:
    with prefill_rank.prefill_rank("hccl") as rank:
        if is_being_read:
            kill_in_first_piece(decode, rank, signal.SIGSTOP)
        else:
            read(decode, rank, ONE)
            os.kill(rank.process.pid, signal.SIGSTOP)
        try:
            started = time.monotonic()
            with pytest.raises(DeadlineError):
                read(decode, rank, ALL, started + 1.5)
            assert started + 1 < time.monotonic() < started + 6
            before = bytes_of(decode.memory)
        finally:
            os.kill(rank.process.pid, signal.SIGCONT)
        read(decode, rank, make_spans([0], [0], [1]))
        before[0] = prefill_rank.content(P_SEED)[0]
        assert np.array_equal(bytes_of(decode.memory), before)  # nothing came late


def kill_in_first_piece(side: Side, rank: PrefillRank, what: signal.Signals) -> None:
    """Send P a signal when the next piece has been asked for. Of `ALL`, that is more than sockets hold."""
    read(side, rank, ONE)
    (group,) = side.transport._groups
    receive, signals = group.receive, [what]

    def receive_after(*args: object) -> None:
        if signals:
            os.kill(rank.process.pid, signals.pop())
        receive(*args)

    group.receive = receive_after


def test_a_read_whose_turn_does_not_come_ends_by_its_deadline(prefill: PrefillRank, decode: Side) -> None:
    read(decode, prefill, ONE)
    with decode.transport._pair(prefill.endpoint).lock:
        started = time.monotonic()
        with pytest.raises(DeadlineError, match="other reads"):
            read(decode, prefill, ONE, started + 0.2)
        assert time.monotonic() < started + 5


def test_no_time_left(prefill: PrefillRank, decode: Side) -> None:
    with pytest.raises(DeadlineError):
        read(decode, prefill, ONE, time.monotonic() - 1)
    read(decode, prefill, ONE)
    with pytest.raises(DeadlineError):
        read(decode, prefill, ONE, time.monotonic() - 1)
    read(decode, prefill, ONE)


@pytest.mark.parametrize("kind", [GroupOpen, GroupKey, PieceFollows])
def test_what_is_no_answer_fails_the_read(decode: Side, kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    send = RankConnection.send

    def lie(self: RankConnection, message: object, *args: object) -> None:
        wrong = isinstance(message, kind) and threading.current_thread().name == "kv-rank"
        send(self, PieceFollows(999) if wrong else message, *args)

    other = Side(P_SEED)
    try:
        monkeypatch.setattr(RankConnection, "send", lie)
        with pytest.raises(ProtocolError):
            decode.transport.read(other.server.endpoint, OFFER, ONE, soon())
        assert not decode.transport._groups
    finally:
        other.close()


@on_gloo
def test_nobody_there(decode: Side) -> None:
    with pytest.raises(PeerUnreachableError):
        decode.transport.read(RankEndpoint("127.0.0.1", 1, "run"), OFFER, ONE, soon())


# --- ending


def test_forgetting_a_peer_ends_its_group_on_both_sides(decode: Side) -> None:
    other = Side(P_SEED)
    try:
        decode.transport.read(other.server.endpoint, OFFER, ONE, soon())
        assert len(other.transport._groups) == 1
        decode.transport.forget(other.server.endpoint)
        assert not decode.transport._groups
        until(lambda: not other.transport._groups, "P keeps the group")
        decode.transport.read(other.server.endpoint, OFFER, ONE, soon())
    finally:
        other.close()


def test_a_peer_forgotten_while_it_is_read_is_left_after_that(prefill: PrefillRank, decode: Side) -> None:
    read(decode, prefill, ONE)
    (group,) = decode.transport._groups
    pair = decode.transport._pairs[prefill.endpoint]
    receive = group.receive

    def receive_and_forget(*args: object) -> None:
        decode.transport.forget(prefill.endpoint)
        receive(*args)

    group.receive = receive_and_forget
    read(decode, prefill, ALL)
    assert np.array_equal(bytes_of(decode.memory), landed(ALL))
    assert pair.joined is None
    assert not decode.transport._groups


def test_the_group_with_a_peer_that_is_gone_is_left(prefill: PrefillRank, decode: Side) -> None:
    with prefill_rank.prefill_rank("hccl") as rank:
        read(decode, rank, ONE)
    read(decode, prefill, ONE)
    assert len(decode.transport._groups) == 1


@on_gloo
@pytest.mark.parametrize("who", ["P", "D"])
def test_closing_either_side_fails_the_read_under_way(decode: Side, who: str, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Side(P_SEED)
    sending, go_on = threading.Event(), threading.Event()
    send_piece = HcclTransport._send_piece

    def send_slowly(self: HcclTransport, connection: object, group: RankGroup, *args: object) -> None:
        send = group.send

        def slow(*args: object) -> None:
            sending.set()
            go_on.wait(10)
            send(*args)

        group.send = slow
        send_piece(self, connection, group, *args)

    monkeypatch.setattr(HcclTransport, "_send_piece", send_slowly)
    with ThreadPoolExecutor(1) as pool:
        try:
            done = pool.submit(decode.transport.read, other.server.endpoint, OFFER, ONE, soon())
            assert sending.wait(10)
            (other if who == "P" else decode).transport.close()
            assert isinstance(done.exception(timeout=10), PeerUnreachableError)
        finally:
            go_on.set()
            other.close()


@on_gloo
def test_nothing_is_left_behind() -> None:
    def cycle() -> None:
        prefill, decode = Side(P_SEED), Side(D_SEED)
        decode.transport.read(prefill.server.endpoint, OFFER, ONE, soon())
        decode.close()
        prefill.close()

    def held() -> tuple[int, int]:
        return len(os.listdir("/proc/self/task")), len(os.listdir("/proc/self/fd"))

    others = threading.active_count()
    cycle()
    until(lambda: threading.active_count() <= others, "threads of the first cycle")
    before = held()
    for _ in range(3):
        cycle()
    until(lambda: all(now <= then for now, then in zip(held(), before, strict=True)), f"{held()} after {before}")


def test_an_idle_group_uses_no_processor_time(decode: Side, prefill: PrefillRank) -> None:
    read(decode, prefill, ONE)
    ticks = os.sysconf("SC_CLK_TCK")

    def used_s() -> float:
        times = Path(f"/proc/{prefill.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(times[11]) + int(times[12])) / ticks + time.process_time()

    before = used_s()
    time.sleep(1)
    assert used_s() - before < 0.1


# --- on an NPU


@pytest.mark.skipif(
    DEVICE != "cpu" or "OMNI_ASCEND_PYTHON" not in os.environ,
    reason="OMNI_ASCEND_PYTHON does not name the interpreter of an environment with torch_npu",
)
def test_all_of_this_on_an_npu(tmp_path: Path) -> None:
    """Checked against torch_npu's interface where CANN is a stand-in; then it has not run on Ascend hardware."""
    environment = {"OMNI_TEST_DEVICE": "npu", "TORCH_DEVICE_BACKEND_AUTOLOAD": "0", "TASK_QUEUE_ENABLE": "0"}
    subprocess.run(
        [os.environ["OMNI_ASCEND_PYTHON"], "-m", "pytest", "-q", "-c", os.devnull, "-p", "no:cacheprovider", __file__],
        cwd=Path(__file__).parents[3],
        env={**os.environ, **environment, "TMPDIR": str(tmp_path)},  # the stand-in leaves its pipes there
        check=True,
        timeout=300,
    )

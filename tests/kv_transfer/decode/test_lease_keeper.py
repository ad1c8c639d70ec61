"""Real control servers; a bound socket that never answers where a P is frozen."""

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterator, Sequence

import pytest
import zmq

from kv_transfer.auth import DeploymentKey
from kv_transfer.control import ControlServer
from kv_transfer.decode import lease_keeper
from kv_transfer.decode.lease_keeper import LeaseKeeper
from kv_transfer.prefill.lease import LeaseTable
from kv_transfer.protocol import Fingerprint, RankEndpoint, RankInfo, RankLayout, Welcome
from tests.kv_transfer.rank_peers import KEY, OTHER_KEY, cpu_seconds_of, kv_threads, until

BEAT_S = 0.05
FINGERPRINT = Fingerprint(vllm_version="0.32.0", model="m", kv_cache_dtype="bfloat16")
RANK = RankInfo(endpoint=RankEndpoint("h", 1, "r"), layout=RankLayout(block_sizes=(16,), layers=()), offers=())


class Leases(LeaseTable):
    """They note how often each was asked for."""

    def __init__(self, clock: Callable[[], float]) -> None:
        super().__init__(lease_s=30, max_lease_s=600, on_change=lambda: None, clock=clock)
        self.asked: list[str] = []

    def extend(self, lease_ids: Sequence[str]) -> list[str]:
        self.asked += lease_ids
        return super().extend(lease_ids)


class Prefill:
    """P's leases, on a clock that stands still, and the server over them."""

    def __init__(self) -> None:
        self.now_s = 1000.0
        self.leases = Leases(lambda: self.now_s)
        self.asked = self.leases.asked
        self.server = ControlServer("127.0.0.1", 0, KEY, Welcome("run", (RANK,)), FINGERPRINT, self.leases)
        self.peer = ("127.0.0.1", self.server.port)

    def grant(self) -> str:
        return self.leases.grant([1], num_readers=1).lease_id

    def beats(self, lease_id: str, num: int = 1) -> None:
        """Wait for so many more heartbeats of this lease."""
        target = self.asked.count(lease_id) + num
        until(lambda: self.asked.count(lease_id) >= target, "no heartbeat came")

    def close(self) -> None:
        self.server.close()


@pytest.fixture
def prefill() -> Iterator[Prefill]:
    with contextlib.closing(Prefill()) as prefill:
        yield prefill


@contextlib.contextmanager
def keeping(key: DeploymentKey = KEY, beat_s: float = BEAT_S) -> Iterator[LeaseKeeper]:
    """A keeper, which is closed as D's scheduler closes it."""
    threads = kv_threads()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    keeper = LeaseKeeper(context, key, beat_s)
    try:
        yield keeper
    finally:
        keeper.close()
        context.term()
        until(lambda: kv_threads() <= threads, "a thread was left")


@pytest.fixture
def keeper() -> Iterator[LeaseKeeper]:
    with keeping() as keeper:
        yield keeper


def lost_of(keeper: LeaseKeeper) -> list[str]:
    until(lambda: bool(keeper._lost), "nothing was lost")
    return keeper.take_lost()


def test_kept_leases_live_on(prefill: Prefill, keeper: LeaseKeeper) -> None:
    kept, left = prefill.grant(), prefill.grant()
    keeper.keep("request", prefill.peer, kept)
    for _ in range(5):
        prefill.beats(kept, 2)  # the second of them began after the clock stood where it stands now
        prefill.now_s += 20
    assert not prefill.leases.end_read(left, "reader", None, 1)
    assert prefill.leases.end_read(kept, "reader", None, 1)


def test_what_is_dropped_gets_no_more_heartbeats(prefill: Prefill, keeper: LeaseKeeper) -> None:
    one, other = prefill.grant(), prefill.grant()
    keeper.keep("one", prefill.peer, one)
    keeper.keep("other", prefill.peer, other)
    prefill.beats(one)
    keeper.drop("one")
    keeper.drop("never heard of")
    prefill.beats(other, 2)
    num = prefill.asked.count(one)
    prefill.beats(other, 3)
    assert prefill.asked.count(one) == num
    assert keeper.take_lost() == []


def test_heartbeats_go_on_after_a_rest(prefill: Prefill, keeper: LeaseKeeper) -> None:
    lease = prefill.grant()
    for _ in range(3):
        keeper.keep("request", prefill.peer, lease)
        prefill.beats(lease)
        keeper.drop("request")
        time.sleep(4 * BEAT_S)  # it lies down for good; where it does not, this test sees less


def test_a_lease_that_ended_is_lost_for_every_request_that_reads_under_it(
    prefill: Prefill, keeper: LeaseKeeper
) -> None:
    ended, open_ = prefill.grant(), prefill.grant()
    keeper.keep("first", prefill.peer, ended)
    keeper.keep("second", prefill.peer, ended)
    keeper.keep("third", prefill.peer, open_)
    prefill.beats(ended, 2)
    prefill.leases.end(ended)
    assert sorted(lost_of(keeper)) == ["first", "second"]
    assert keeper.take_lost() == []
    num = prefill.asked.count(ended)
    prefill.beats(open_, 3)
    assert prefill.asked.count(ended) == num


def test_a_lease_that_p_does_not_know_yet_is_not_lost(prefill: Prefill, keeper: LeaseKeeper) -> None:
    keeper.keep("request", prefill.peer, "ticket")
    prefill.beats("ticket", 3)
    assert keeper.take_lost() == []
    prefill.leases.open_early("ticket", 1)
    prefill.beats("ticket", 2)
    prefill.leases.end("ticket")
    assert lost_of(keeper) == ["request"]


def test_more_leases_than_fit_into_one_question(
    prefill: Prefill, keeper: LeaseKeeper, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lease_keeper, "_LEASES_PER_BEAT", 3)
    leases = [prefill.grant() for _ in range(10)]
    for index, lease in enumerate(leases):
        keeper.keep(str(index), prefill.peer, lease)
    for lease in leases:
        prefill.beats(lease, 2)
    prefill.leases.end(leases[7])
    assert lost_of(keeper) == ["7"]


def test_peers_that_do_not_answer_delay_no_other(
    prefill: Prefill, keeper: LeaseKeeper, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(lease_keeper, "_TIMEOUT_S", 1.0)
    lease = prefill.grant()
    with contextlib.ExitStack() as stack, caplog.at_level(logging.WARNING):
        for index in range(10):
            frozen = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
            keeper.keep(f"frozen {index}", ("127.0.0.1", frozen.getsockname()[1]), "lease")
        keeper.keep("request", prefill.peer, lease)
        prefill.beats(lease, 3)  # one after the other, the frozen would take 10 s a beat
        assert keeper.take_lost() == []
        until(lambda: "no heartbeat to 127.0.0.1" in caplog.text, "the silence was not logged")


def test_another_key_loses_nothing_and_extends_nothing(prefill: Prefill, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_keeper, "_TIMEOUT_S", 0.2)
    with keeping(OTHER_KEY) as keeper:
        keeper.keep("request", prefill.peer, prefill.grant())
        until(lambda: prefill.server.dropped.take() > 0, "the stranger was not counted")
        assert keeper.take_lost() == []
    assert prefill.asked == []


def test_closing_ends_a_heartbeat_under_way(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as frozen:
        with keeping() as keeper:
            keeper.keep("request", ("127.0.0.1", frozen.getsockname()[1]), "lease")
            until(lambda: any("kv-lease-beat" in name for name in kv_threads()), "no heartbeat began")
            began = time.monotonic()
        assert time.monotonic() - began < 1.5  # the heartbeat's own limit is 2 s
    assert not caplog.records


def test_nothing_to_keep_starts_no_thread_and_waiting_costs_no_cpu(prefill: Prefill) -> None:
    threads = kv_threads()
    with keeping(beat_s=10.0) as keeper:
        assert kv_threads() == threads
        keeper.keep("request", prefill.peer, prefill.grant())
        assert keeper._thread is not None
        with cpu_seconds_of(keeper._thread) as used_s:
            time.sleep(0.4)  # between two heartbeats
            keeper.drop("request")
            time.sleep(0.4)
            assert used_s() < 0.01

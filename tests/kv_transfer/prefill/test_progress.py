"""Followers over real connections; the forward pass is played by the test."""

import contextlib
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from kv_transfer.errors import PeerRefusedError
from kv_transfer.prefill import progress as prefill_progress
from kv_transfer.prefill.progress import HEARTBEAT_S, PrefillProgressTable, PrefillStep
from kv_transfer.protocol import FollowPrefill, PrefillProgress
from kv_transfer.rank_connection import RankConnection
from kv_transfer.rank_server import RankClient, RankServer
from tests.kv_transfer.rank_peers import KEY, cpu_seconds_of, soon, until

LAYERS = ("layer 0", "layer 1", "layer 2")


def step_of(transfer_id: str, end_token: int, *, num_prompt_tokens: int = 100, digest: str = "digest") -> PrefillStep:
    return PrefillStep(
        transfer_id=transfer_id,
        prompt_digest=digest,
        end_token=end_token,
        num_prompt_tokens=num_prompt_tokens,
        block_ids=(tuple(range(end_token)), (7,)),
    )


def state(end_token: int, partial_end_token: int, num_layers: int, *, is_last: bool = False) -> PrefillProgress:
    return PrefillProgress(
        end_token=end_token,
        partial_end_token=partial_end_token,
        num_layers=num_layers,
        is_last=is_last,
        block_ids=(tuple(range(partial_end_token)), (7,)),
    )


NOTHING = PrefillProgress(end_token=0, partial_end_token=0, num_layers=0, is_last=False)


class Prefill:
    def __init__(self) -> None:
        self.table = PrefillProgressTable(LAYERS)
        self.server = RankServer("127.0.0.1", KEY)
        self.server.handle(FollowPrefill, self.table.serve)
        self.server.start()
        self.client = RankClient(KEY)

    def compute(self, *steps: PrefillStep) -> None:
        self.table.begin_step(steps, [])
        for layer in LAYERS:
            self.table.layer_done(layer)
        self.table.step_done()

    @contextlib.contextmanager
    def follower(self, transfer_id: str, digest: str = "digest") -> Iterator[RankConnection]:
        with self.client.connection(self.server.endpoint, soon()) as connection:
            connection.send(FollowPrefill(transfer_id, digest), soon())
            yield connection
            assert connection.is_quiet  # nothing comes after the last state

    def close(self) -> None:
        self.table.close()
        self.client.close()
        self.server.close()


@pytest.fixture
def prefill() -> Iterator[Prefill]:
    with contextlib.closing(Prefill()) as prefill:
        yield prefill


def next_of(follower: RankConnection) -> PrefillProgress:
    reply = follower.receive_reply(soon())
    assert isinstance(reply, PrefillProgress)
    return reply


def next_but(follower: RankConnection, known: PrefillProgress) -> PrefillProgress:
    """The next state that is another one."""
    while (reply := next_of(follower)) == known:
        pass
    return reply


def last_of(follower: RankConnection) -> PrefillProgress:
    """What comes in the end."""
    while not (reply := next_of(follower)).is_last:
        pass
    return reply


# --- a prompt's way


def test_a_follower_sees_every_state_that_it_waits_for(prefill: Prefill) -> None:
    table = prefill.table
    with prefill.follower("t") as follower:
        table.begin_step([step_of("t", 60)], [])
        assert next_but(follower, NOTHING) == state(0, 60, 0)
        for index, layer in enumerate(LAYERS):
            table.layer_done(layer)
            assert next_but(follower, state(0, 60, index)) == state(0, 60, index + 1)
        table.step_done()
        assert next_but(follower, state(0, 60, 3)) == state(60, 60, 3)
        table.begin_step([step_of("t", 100)], [])
        assert next_but(follower, state(60, 60, 3)) == state(60, 100, 0)
        table.layer_done(LAYERS[2])  # the layers come in order: those before it are there
        assert next_but(follower, state(60, 100, 0)) == state(60, 100, 3)
        table.step_done()
        assert next_but(follower, state(60, 100, 3)) == state(100, 100, 3, is_last=True)


def test_a_late_follower_gets_all_at_once(prefill: Prefill) -> None:
    prefill.compute(step_of("t", 100))
    for _ in range(2):
        with prefill.follower("t") as follower:
            assert next_of(follower) == state(100, 100, 3, is_last=True)


def test_prompts_of_one_step_go_on_together_and_others_wait(prefill: Prefill) -> None:
    prefill.compute(step_of("waits", 40))
    prefill.table.begin_step([step_of("a", 50), step_of("b", 100)], [])
    prefill.table.layer_done(LAYERS[0])
    with prefill.follower("waits") as waits, prefill.follower("a") as a, prefill.follower("b") as b:
        assert next_of(waits) == state(40, 40, 3)
        assert next_of(a) == state(0, 50, 1)
        assert next_of(b) == state(0, 100, 1)
        prefill.table.step_done()
        assert next_but(b, state(0, 100, 1)) == state(100, 100, 1, is_last=True)
        prefill.compute(step_of("a", 100), step_of("waits", 100))
        last_of(a)
        last_of(waits)


def test_a_slow_follower_skips_states(prefill: Prefill) -> None:
    prefill.table.begin_step([step_of("t", 1)], [])
    with prefill.follower("t") as follower:
        next_of(follower)
        for end_token in range(1, 101):
            prefill.compute(step_of("t", end_token))
        states = [next_of(follower)]
        while not states[-1].is_last:
            states.append(next_of(follower))
    assert [each.end_token for each in states] == sorted(each.end_token for each in states)


def test_layers_that_are_not_moved_and_steps_without_followed_prompts(prefill: Prefill) -> None:
    prefill.table.layer_done(LAYERS[0])
    prefill.table.step_done()
    prefill.table.begin_step([step_of("t", 100)], [])
    prefill.table.layer_done("a layer without KV")
    with prefill.follower("t") as follower:
        assert next_of(follower) == state(0, 100, 0)
        prefill.table.begin_step([], [])  # a step of other prompts
        prefill.table.layer_done(LAYERS[0])
        prefill.table.step_done()
        prefill.compute(step_of("t", 100))
        assert last_of(follower) == state(100, 100, 3, is_last=True)


def test_a_device_that_runs_behind_is_waited_for(prefill: Prefill) -> None:
    """A state is announced once what it tells has been computed."""
    computed = threading.Event()
    prefill.table.begin_step([step_of("t", 100)], [])

    def ready() -> None:
        computed.wait(20)

    prefill.table.layer_done(LAYERS[0], ready)
    with prefill.follower("t") as follower:
        arrived: list[PrefillProgress] = []
        receiving = threading.Thread(target=lambda: arrived.append(next_of(follower)))
        receiving.start()
        receiving.join(timeout=0.2)
        assert not arrived
        computed.set()
        receiving.join(timeout=10)
        assert arrived == [state(0, 100, 1)]
        prefill.table.step_done()
        last_of(follower)


# --- silence


def test_a_heartbeat_comes_when_nothing_happens(prefill: Prefill, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_progress, "HEARTBEAT_S", 0.05)
    with prefill.follower("t") as follower:
        assert [next_of(follower) for _ in range(3)] == [NOTHING] * 3
        prefill.table.begin_step([step_of("t", 100)], [])
        assert next_but(follower, NOTHING) == state(0, 100, 0)
        assert [next_of(follower) for _ in range(3)] == [state(0, 100, 0)] * 3
        prefill.table.step_done()
        last_of(follower)


def test_a_follower_that_left_is_let_go(prefill: Prefill, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_progress, "HEARTBEAT_S", 0.05)
    prefill.compute(step_of("t", 50))
    with contextlib.suppress(InterruptedError), prefill.follower("t") as follower:
        next_of(follower)
        raise InterruptedError  # ends the connection
    until(lambda: not prefill.server._serving, "the follower was kept")
    assert prefill.server.dropped.take() == 0


def test_a_follower_that_takes_nothing_is_let_go(prefill: Prefill, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_progress, "HEARTBEAT_S", 0.0)
    monkeypatch.setattr(prefill_progress, "_PEER_TIMEOUT_S", 0.2)
    prefill.table.begin_step([step_of("t", 10_000, num_prompt_tokens=20_000)], [])
    with contextlib.suppress(InterruptedError), prefill.follower("t"):
        until(lambda: prefill.server.dropped.take() == 1, "the follower was kept")
        raise InterruptedError


def test_waiting_costs_no_cpu(prefill: Prefill) -> None:
    with prefill.follower("t") as follower:
        next_of(follower)
        (thread,) = prefill.server._serving.values()
        with cpu_seconds_of(thread) as used_s:
            time.sleep(0.8)  # no more than one heartbeat
            assert used_s() < 0.02
        prefill.compute(step_of("t", 100))
        last_of(follower)


# --- no


@pytest.mark.parametrize("comes", ["before", "after"])
def test_another_prompt_is_refused(prefill: Prefill, comes: str) -> None:
    if comes == "after":
        prefill.table.begin_step([step_of("t", 100)], [])
    with prefill.follower("t", "another digest") as follower:
        if comes == "before":
            prefill.table.begin_step([step_of("t", 100)], [])
        with pytest.raises(PeerRefusedError, match="different prompts"):
            next_but(follower, NOTHING)


def ended_before_it_began(table: PrefillProgressTable) -> None:
    table.begin_step([], ["t"])


def ended_in_the_middle(table: PrefillProgressTable) -> None:
    table.begin_step([step_of("t", 50)], [])
    table.begin_step([], ["t"])


def ended_though_it_is_still_computed(table: PrefillProgressTable) -> None:
    table.begin_step([step_of("t", 50)], [])
    table.begin_step([step_of("t", 100)], ["t"])
    table.step_done()
    table.begin_step([step_of("t", 100)], [])


ENDS = [ended_before_it_began, ended_in_the_middle, ended_though_it_is_still_computed]


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("comes", ["before", "after"])
def test_a_transfer_that_ended_is_refused(
    prefill: Prefill, end: Callable[[PrefillProgressTable], None], comes: str
) -> None:
    if comes == "after":
        end(prefill.table)
    with prefill.follower("t") as follower:
        if comes == "before":
            end(prefill.table)
        with pytest.raises(PeerRefusedError, match="no longer kept"):
            last_of(follower)
    assert not prefill.table._prefills  # nothing is kept for it


def test_of_ended_transfers_only_so_many_are_remembered(prefill: Prefill, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_progress, "_MAX_ENDED", 3)
    prefill.table.begin_step([], [str(index) for index in range(10)])
    assert list(prefill.table._ended) == ["7", "8", "9"]


def test_shutting_down_ends_every_follower_at_once(prefill: Prefill) -> None:
    prefill.table.begin_step([step_of("t", 50)], [])
    with prefill.follower("t") as follower, prefill.follower("not begun") as other:
        next_of(follower)
        next_of(other)
        began = time.monotonic()
        prefill.table.close()
        for each in (follower, other):
            with pytest.raises(PeerRefusedError, match="shutting down"):
                last_of(each)
        assert time.monotonic() - began < HEARTBEAT_S / 2

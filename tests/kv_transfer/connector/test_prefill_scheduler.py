"""P's part of the scheduler's half, over vLLM's real KV cache manager, block pool and requests."""

import contextlib
import queue
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import zmq

from kv_transfer.control import ControlClient
from kv_transfer.hand_off import parse_hand_off
from kv_transfer.protocol import EndRead
from tests.kv_transfer.rank_peers import KEY, cpu_seconds_of, kv_threads, soon, until
from tests.kv_transfer.with_vllm import (
    BLOCK_SIZE,
    HAND_OFF,
    Engine,
    RequestStatus,
    engine_core,
    lease_id,
    new_request,
    prompt_of,
)


@pytest.fixture
def prefill() -> Iterator[Engine]:
    with contextlib.closing(Engine("prefill")) as engine:
        yield engine
        engine.check_pool()


@pytest.fixture
def control(prefill: Engine) -> Iterator[ControlClient]:
    with zmq.Context() as context, ControlClient(context, KEY, "127.0.0.1", prefill.port) as client:
        yield client


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 32, 33])
def test_a_finished_prompt_keeps_exactly_its_blocks(prefill: Engine, num_tokens: int) -> None:
    baseline = prefill.num_free
    params = prefill.hand_off(prompt_of(num_tokens))
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    assert prefill.num_free == baseline - num_blocks
    (block_ids,) = params["remote_block_ids"]
    assert [prefill.pool.blocks[block_id].ref_cnt for block_id in block_ids] == [1] * num_blocks
    assert params["remote_num_tokens"] == num_tokens
    assert params["remote_port"] == prefill.port
    assert params["do_remote_prefill"] is True
    assert params["do_remote_decode"] is False
    assert parse_hand_off(params, KEY).omni.lease_id == lease_id(params)

    assert not prefill.side.wants_a_step()
    assert prefill.leases.end_read(lease_id(params), "reader", 0, 1)
    assert prefill.num_free == baseline - num_blocks  # not on another thread than the scheduler's
    assert prefill.side.wants_a_step()
    assert prefill.num_free == baseline
    assert prefill.side.wants_a_step()  # one step, for the metrics
    prefill.step()
    assert not prefill.side.wants_a_step()


def test_a_busy_engine_gives_blocks_back_at_its_next_step(prefill: Engine) -> None:
    baseline = prefill.num_free
    params = prefill.hand_off(prompt_of(40))
    prefill.leases.end_read(lease_id(params), "reader", 0, 1)
    prefill.step()
    assert prefill.num_free == baseline
    assert not prefill.side.wants_a_step()


def end_by_reader(control: ControlClient, lease: str, prefill: Engine) -> None:
    assert control.end_read(EndRead(lease, "reader"), soon())


def end_by_proxy(control: ControlClient, lease: str, prefill: Engine) -> None:
    assert control.end_lease(lease, soon())


def end_by_time(control: ControlClient, lease: str, prefill: Engine) -> None:
    prefill.clock_skipped_s = 30.0
    prefill.leases.expire()


@pytest.mark.parametrize("first", [end_by_reader, end_by_proxy, end_by_time])
@pytest.mark.parametrize("second", [end_by_reader, end_by_proxy, end_by_time])
def test_blocks_are_given_back_once_whoever_comes_first_and_second(
    prefill: Engine, control: ControlClient, first: Callable[..., None], second: Callable[..., None]
) -> None:
    baseline = prefill.num_free
    params = prefill.hand_off(prompt_of(40))
    first(control, lease_id(params), prefill)
    with contextlib.suppress(AssertionError):  # "it was not open"
        second(control, lease_id(params), prefill)
    assert prefill.side.wants_a_step()
    prefill.step()
    assert prefill.num_free == baseline
    with contextlib.suppress(AssertionError):
        second(control, lease_id(params), prefill)
    assert not prefill.side.wants_a_step()
    counts, num_open = prefill.side._prefill.take_lease_counts()
    assert (counts.granted, counts.released + counts.expired, num_open) == (1, 1, 0)


def test_the_control_thread_expires_leases_by_itself() -> None:
    with contextlib.closing(Engine("prefill", lease_s=0.05)) as prefill:
        baseline = prefill.num_free
        params = prefill.hand_off(prompt_of(40))
        until(prefill.side.wants_a_step, "the lease did not expire")
        assert prefill.num_free == baseline
        assert not prefill.leases.end_read(lease_id(params), "late", None, 1)


def test_blocks_shared_by_prompts_stay_until_the_last_lease_ends(prefill: Engine) -> None:
    baseline = prefill.num_free
    first, second = prefill.hand_off(prompt_of(48)), prefill.hand_off([*prompt_of(48), 5])
    assert first["remote_block_ids"][0] == second["remote_block_ids"][0][:3]
    prefill.leases.end_read(lease_id(first), "reader", 0, 1)
    prefill.step()
    assert prefill.num_free == baseline - 4
    prefill.leases.end_read(lease_id(second), "reader", 0, 1)
    prefill.step()
    assert prefill.num_free == baseline


def test_the_end_of_a_prompt_is_evicted_first(prefill: Engine) -> None:
    params = prefill.hand_off(prompt_of(64))
    prefill.leases.end_read(lease_id(params), "reader", 0, 1)
    prefill.step()
    free = [block.block_id for block in prefill.pool.free_block_queue.get_all_free_blocks()]
    assert free[-4:] == list(reversed(params["remote_block_ids"][0]))


def test_each_sequence_of_the_request_is_a_reader_with_all_its_ranks(prefill: Engine) -> None:
    params = prefill.prefill(new_request(prompt_of(20), HAND_OFF | {"omni": {"num_readers": 3}}))
    assert params is not None
    for reader in range(3):
        for rank in (1, 0):
            assert not prefill.leases.has_ended
            assert prefill.leases.end_read(lease_id(params), f"reader-{reader}", rank, 2)
    assert prefill.leases.has_ended
    prefill.step()


@pytest.mark.parametrize(
    "params",
    [
        None,
        {},
        {"do_remote_decode": False},
        {"do_remote_decode": 1},
        {"do_remote_decode": "true"},
        {"do_remote_prefill": True},
        HAND_OFF | {"omni": {"num_readers": 0}},
        HAND_OFF | {"omni": {"num_readers": 10**9}},
        HAND_OFF | {"omni": {"num_readers": "2"}},
        "a string",
        ["do_remote_decode"],
        7,
    ],
)
def test_without_a_valid_wish_nothing_is_kept(prefill: Engine, params: Any) -> None:
    baseline = prefill.num_free
    assert prefill.prefill(new_request(prompt_of(20), params)) is None
    assert prefill.num_free == baseline
    assert len(prefill.leases) == 0


@pytest.mark.parametrize(
    "status", [RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR, RequestStatus.FINISHED_IGNORED]
)
def test_a_prefill_that_did_not_succeed_keeps_nothing(prefill: Engine, status: RequestStatus) -> None:
    baseline = prefill.num_free
    request = new_request(prompt_of(20), HAND_OFF)
    prefill.compute(request, 20)
    assert prefill.finish(request, status) is None
    assert prefill.num_free == baseline


def test_a_prompt_that_is_not_all_computed_keeps_nothing(prefill: Engine) -> None:
    baseline = prefill.num_free
    request = new_request(prompt_of(20), HAND_OFF)
    prefill.compute(request, 19)
    assert prefill.finish(request, RequestStatus.FINISHED_STOPPED) is None
    assert prefill.num_free == baseline


def test_a_prompt_of_embeddings_is_not_handed_off(prefill: Engine) -> None:
    """Its tokens are all alike, so a digest of them would tell nothing."""
    request = new_request([0] * 40, HAND_OFF)
    request.prompt_embeds = torch.zeros(40, 8)
    assert prefill.prefill(request) is None


@pytest.mark.parametrize("window", [16, 20, 33])
def test_with_sliding_windows_all_that_d_needs_is_handed_off_or_nothing(window: int) -> None:
    """P, one token ahead, gives up a block of which D still needs one token: whenever the window begins at its end."""
    refused = []
    for num_tokens in range(1, 5 * BLOCK_SIZE):
        with contextlib.closing(Engine("prefill", windows=(None, window))) as prefill:
            baseline = prefill.num_free
            params = prefill.prefill(new_request(prompt_of(num_tokens), HAND_OFF))
            needed = max(0, num_tokens - window)  # the first token that D attends to, from the last
            if params is None:
                refused.append(num_tokens)
                assert (needed + 1) % BLOCK_SIZE == 0
                assert prefill.num_free == baseline
                continue
            full, windowed = params["remote_block_ids"]
            assert len(full) == len(windowed) == -(-num_tokens // BLOCK_SIZE)
            assert 0 not in full
            assert 0 not in windowed[needed // BLOCK_SIZE :]
            assert set(windowed[: needed // BLOCK_SIZE]) <= {0}
            kept = [block_id for block_id in (*full, *windowed) if block_id]
            assert all(prefill.pool.blocks[block_id].ref_cnt == 1 for block_id in kept)
            assert prefill.num_free == baseline - len(kept)
            prefill.leases.end(lease_id(params))
            prefill.step()
            assert prefill.num_free == baseline
            prefill.check_pool()
    assert refused == [n for n in range(window + 1, 5 * BLOCK_SIZE) if (n - window + 1) % BLOCK_SIZE == 0]


def test_an_ended_lease_wakes_the_idle_engine() -> None:
    """The engine is looked up among the objects of the process: here one that was never started."""
    engine = engine_core.EngineCoreProc.__new__(engine_core.EngineCoreProc)
    engine.input_queue = queue.Queue()
    with contextlib.closing(Engine("prefill", lease_s=0.05, find_engine=True)) as prefill:
        prefill.hand_off(prompt_of(20))
        while not engine.input_queue.empty():
            engine.input_queue.get_nowait()
        message = engine.input_queue.get(timeout=5)
        assert message == (engine_core.EngineCoreRequestType.WAKEUP, None)
        assert prefill.side.wants_a_step()
    del engine


def test_leases_appear_in_the_stats_once(prefill: Engine) -> None:
    assert prefill.side.take_stats() is None
    params = prefill.hand_off(prompt_of(20))
    stats = prefill.side.take_stats()
    assert stats is not None
    assert (stats.data["leases"], stats.data["open_leases"]) == ({"granted": 1}, 1)
    assert prefill.side.take_stats() is None
    prefill.leases.end_read(lease_id(params), "reader", 0, 1)
    stats = prefill.side.take_stats()
    assert stats is not None
    assert (stats.data["leases"], stats.data["open_leases"]) == ({"released": 1}, 0)


def test_an_idle_engine_spins_no_thread(prefill: Engine) -> None:
    """An open lease is waited for with the other threads asleep."""
    prefill.hand_off(prompt_of(20))
    threads = [thread for thread in threading.enumerate() if thread.name == "kv-control"]
    assert len(threads) == 1
    with cpu_seconds_of(*threads) as used_s:
        time.sleep(0.3)
        assert used_s() < 0.05


def test_closing_ends_every_thread() -> None:
    before = kv_threads()
    prefill = Engine("prefill")
    prefill.hand_off(prompt_of(20))
    prefill.close()
    assert kv_threads() == before


def test_blocks_return_to_the_baseline_after_any_sequence_of_requests() -> None:
    rng = random.Random(17)
    with contextlib.closing(Engine("prefill", num_blocks=256, windows=(None, 24))) as prefill:
        baseline = prefill.num_free
        leases: list[str] = []
        for _ in range(300):
            prompt = prompt_of(rng.randint(1, 60), seed=rng.randrange(10))
            params = prefill.prefill(new_request(prompt, HAND_OFF if rng.random() < 0.7 else None))
            if params is not None:
                leases.append(lease_id(params))
            while leases and (len(leases) > 20 or rng.random() < 0.3):
                lease = leases.pop(rng.randrange(len(leases)))
                assert prefill.leases.end(lease) if rng.random() < 0.5 else prefill.leases.end_read(lease, "d", None, 1)
            if rng.random() < 0.5:
                prefill.step()
            prefill.check_pool()
        for lease in leases:
            prefill.leases.end(lease)
        prefill.step()
        assert prefill.num_free == baseline
        assert len(prefill.leases) == 0

"""The scheduler's half over vLLM's real KV cache manager, block pool and requests."""

import queue
import random
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.kv_transfer.with_vllm import (
    BLOCK_SIZE,
    Engine,
    Request,
    RequestStatus,
    connector_scheduler,
    engine_core,
    new_request,
)

HAND_OFF = {"do_remote_decode": True}


def until(condition: Callable[[], bool], why: str) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, why
        time.sleep(0.005)


def prompt_of(num_tokens: int, seed: int = 1) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(num_tokens)]


@pytest.fixture
def prefill() -> Iterator[Engine]:
    engine = Engine("prefill")
    yield engine
    engine.close()


@pytest.fixture
def decode() -> Iterator[Engine]:
    engine = Engine("decode")
    yield engine
    engine.close()


def hand_off(prefill: Engine, prompt: list[int], **fields: Any) -> dict[str, Any]:
    params = prefill.prefill(new_request(prompt, HAND_OFF, **fields))
    assert params is not None
    return params


def lease_id(params: dict[str, Any]) -> str:
    value: str = params["omni"]["lease_id"]
    return value


# --- P


@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 32, 33])
def test_a_finished_prompt_keeps_exactly_its_blocks(prefill: Engine, num_tokens: int) -> None:
    baseline = prefill.num_free
    params = hand_off(prefill, prompt_of(num_tokens))
    num_blocks = -(-num_tokens // BLOCK_SIZE)
    assert prefill.num_free == baseline - num_blocks
    (block_ids,) = params["remote_block_ids"]
    assert [prefill.pool.blocks[block_id].ref_cnt for block_id in block_ids] == [1] * num_blocks
    assert params["remote_num_tokens"] == num_tokens
    assert params["do_remote_prefill"] is True
    assert params["do_remote_decode"] is False

    assert not prefill.side.wants_a_step()
    assert prefill.side._leases.end_read(lease_id(params), "reader", 0)
    assert prefill.num_free == baseline - num_blocks  # not on another thread than the scheduler's
    assert prefill.side.wants_a_step()
    assert prefill.num_free == baseline
    assert prefill.side.wants_a_step()  # one step, for the metrics
    prefill.side.take_loads()
    assert not prefill.side.wants_a_step()


def test_a_busy_engine_gives_blocks_back_at_its_next_step(prefill: Engine) -> None:
    baseline = prefill.num_free
    params = hand_off(prefill, prompt_of(40))
    prefill.side._leases.end_read(lease_id(params), "reader", 0)
    prefill.side.take_loads()
    assert prefill.num_free == baseline
    assert not prefill.side.wants_a_step()


def test_blocks_shared_by_prompts_stay_until_the_last_lease_ends(prefill: Engine) -> None:
    baseline = prefill.num_free
    first, second = hand_off(prefill, prompt_of(48)), hand_off(prefill, [*prompt_of(48), 5])
    assert first["remote_block_ids"][0] == second["remote_block_ids"][0][:3]
    prefill.side._leases.end_read(lease_id(first), "reader", 0)
    prefill.side.take_loads()
    assert prefill.num_free == baseline - 4
    prefill.side._leases.end_read(lease_id(second), "reader", 0)
    prefill.side.take_loads()
    assert prefill.num_free == baseline


def test_the_end_of_a_prompt_is_evicted_first(prefill: Engine) -> None:
    params = hand_off(prefill, prompt_of(64))
    prefill.side._leases.end_read(lease_id(params), "reader", 0)
    prefill.side.take_loads()
    free = [block.block_id for block in prefill.pool.free_block_queue.get_all_free_blocks()]
    assert free[-4:] == list(reversed(params["remote_block_ids"][0]))


def test_each_sequence_of_the_request_is_a_reader(prefill: Engine) -> None:
    params = prefill.prefill(new_request(prompt_of(20), HAND_OFF | {"omni": {"num_readers": 3}}))
    assert params is not None
    for reader in range(3):
        assert not prefill.side._leases.has_ended
        assert prefill.side._leases.end_read(lease_id(params), f"reader-{reader}", 0)
    assert prefill.side._leases.has_ended


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
    assert len(prefill.side._leases) == 0


@pytest.mark.parametrize(
    "status", [RequestStatus.FINISHED_ABORTED, RequestStatus.FINISHED_ERROR, RequestStatus.FINISHED_IGNORED]
)
def test_a_prefill_that_did_not_succeed_keeps_nothing(prefill: Engine, status: RequestStatus) -> None:
    baseline = prefill.num_free
    request = new_request(prompt_of(20), HAND_OFF)
    prefill.manager.allocate_slots(request, 20)
    request.num_computed_tokens = 20
    assert prefill.finish(request, status) is None
    assert prefill.num_free == baseline


def test_a_prompt_that_is_not_all_computed_keeps_nothing(prefill: Engine) -> None:
    baseline = prefill.num_free
    request = new_request(prompt_of(20), HAND_OFF)
    prefill.manager.allocate_slots(request, 19)
    request.num_computed_tokens = 19
    assert prefill.finish(request, RequestStatus.FINISHED_STOPPED) is None
    assert prefill.num_free == baseline


def test_blocks_outside_the_attention_window_are_not_handed_off(prefill: Engine) -> None:
    """vLLM has put its null block in their place; D, one token behind, may need the last of them."""
    request = new_request(prompt_of(33), HAND_OFF)
    request.num_computed_tokens, request.status = 33, RequestStatus.FINISHED_LENGTH_CAPPED
    blocks = prefill.pool.get_new_blocks(2)
    block_ids = [prefill.pool.null_block.block_id, *(block.block_id for block in blocks)]
    assert prefill.side.request_finished(request, block_ids) is None
    assert [block.ref_cnt for block in blocks] == [1, 1]


def test_a_decode_engine_grants_nothing(decode: Engine) -> None:
    baseline = decode.num_free
    assert decode.prefill(new_request(prompt_of(20), HAND_OFF)) is None
    assert decode.num_free == baseline


def test_an_ended_lease_wakes_the_idle_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is looked up among the objects of the process: here one that was never started."""
    engine = engine_core.EngineCoreProc.__new__(engine_core.EngineCoreProc)
    engine.input_queue = queue.Queue()
    prefill = Engine("prefill", lease_s=0.05, find_engine=True)
    hand_off(prefill, prompt_of(20))
    while not engine.input_queue.empty():
        engine.input_queue.get_nowait()
    message = engine.input_queue.get(timeout=5)
    assert message == (engine_core.EngineCoreRequestType.WAKEUP, None)
    assert prefill.side.wants_a_step()
    prefill.close()
    del engine


# --- D


@pytest.mark.parametrize("num_local_blocks", [0, 1, 2])
@pytest.mark.parametrize("num_tokens", [1, 15, 16, 17, 31, 32, 33, 48, 49, 50])
def test_exactly_the_missing_blocks_are_loaded(
    prefill: Engine, decode: Engine, num_tokens: int, num_local_blocks: int
) -> None:
    prompt = prompt_of(num_tokens)
    num_cached = min(num_local_blocks, (num_tokens - 1) // BLOCK_SIZE)  # vLLM never takes a whole prompt as cached
    if num_cached:
        decode.prefill(new_request(prompt[: num_cached * BLOCK_SIZE]))
    params = hand_off(prefill, prompt)
    request = new_request(prompt, params)
    decode.side.on_new_request(request)
    loads = decode.admit(request)

    num_needed = -(-(num_tokens - 1) // BLOCK_SIZE)
    if num_needed == num_cached:
        assert loads == ()
        until(lambda: prefill.side._leases.has_ended, "the lease was not released")
        return
    (load,) = loads
    assert load.request_id == request.request_id
    assert load.lease_id == lease_id(params)
    assert load.port == params["remote_port"]
    assert list(load.local_block_ids) == decode.block_ids(request)[num_cached:num_needed]
    assert list(load.remote_block_ids) == list(params["remote_block_ids"][0])[num_cached:num_needed]
    cached = set(decode.block_ids(request)[:num_cached])
    assert not cached & set(load.local_block_ids)  # blocks that others may be using are not written
    assert not prefill.side._leases.has_ended


def test_a_load_is_asked_for_once(prefill: Engine, decode: Engine) -> None:
    """After a failed load vLLM, told to recompute, asks again: the prompt is then computed."""
    prompt = prompt_of(40)
    request = new_request(prompt, hand_off(prefill, prompt))
    decode.side.on_new_request(request)
    assert len(decode.admit(request)) == 1
    decode.manager.free(request)
    assert decode.side.num_tokens_to_load(request, 0) == (0, False)
    assert decode.admit(request) == ()
    assert decode.side.request_finished(request, []) is None
    assert not decode.side._handed_off


def test_a_request_that_waits_for_room_is_asked_about_again(prefill: Engine, decode: Engine) -> None:
    prompt = prompt_of(40)
    request = new_request(prompt, hand_off(prefill, prompt))
    decode.side.on_new_request(request)
    for _ in range(3):
        assert decode.side.num_tokens_to_load(request, 0) == (39, True)
    assert decode.side.num_tokens_to_load(request, 32) == (7, True)
    assert len(decode.admit(request)) == 1


def test_a_request_aborted_before_it_was_scheduled_releases_its_lease(prefill: Engine, decode: Engine) -> None:
    prompt = prompt_of(40)
    request = new_request(prompt, hand_off(prefill, prompt))
    decode.side.on_new_request(request)
    assert decode.finish(request, RequestStatus.FINISHED_ABORTED) is None
    until(lambda: prefill.side._leases.has_ended, "the lease was not released")
    assert prefill.side._leases.take_counts().released == 1
    assert not decode.side._handed_off


def test_a_request_aborted_while_it_loads_leaves_the_lease_to_the_load(prefill: Engine, decode: Engine) -> None:
    prompt = prompt_of(40)
    request = new_request(prompt, hand_off(prefill, prompt))
    decode.side.on_new_request(request)
    decode.admit(request)
    decode.finish(request, RequestStatus.FINISHED_ABORTED)
    decode.side._releases.shutdown(wait=True)
    assert not prefill.side._leases.has_ended


def test_a_request_that_the_api_server_rejected_releases_its_lease(prefill: Engine, decode: Engine) -> None:
    """vLLM passes it on without its prompt, only to be aborted at once."""
    request = new_request([0], hand_off(prefill, prompt_of(40)), abort_immediately=True)
    decode.side.on_new_request(request)
    decode.finish(request, RequestStatus.FINISHED_ABORTED)
    until(lambda: prefill.side._leases.has_ended, "the lease was not released")


def test_a_prompt_whose_cached_kv_must_not_be_used_releases_its_lease(prefill: Engine, decode: Engine) -> None:
    """For prompt logprobs vLLM overrules us and loads nothing."""
    prompt = prompt_of(40)
    request = new_request(prompt, hand_off(prefill, prompt))
    decode.side.on_new_request(request)
    assert decode.side.num_tokens_to_load(request, 0) == (39, True)
    decode.side.blocks_allocated(request, [1, 2, 3], 0)
    until(lambda: prefill.side._leases.has_ended, "the lease was not released")
    assert decode.side.take_loads().loads == ()


def test_a_release_that_fails_is_given_up(decode: Engine, prefill: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connector_scheduler, "_RELEASE_TIMEOUT_S", 0.1)
    prompt = prompt_of(40)
    params = hand_off(prefill, prompt)
    prefill.close()
    began = time.monotonic()
    for _ in range(20):
        request = new_request(prompt, params)
        decode.side.on_new_request(request)
        decode.finish(request, RequestStatus.FINISHED_ABORTED)
    decode.side._releases.shutdown(wait=True)
    assert time.monotonic() - began < 1  # together, not one after the other


def change(params: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return params | changes


@pytest.mark.parametrize(
    "forge",
    [
        lambda params: {"do_remote_prefill": True},
        lambda params: {"do_remote_prefill": "yes"},
        lambda params: {"do_remote_prefill": True, "omni": []},
        lambda params: change(params, omni=None),
        lambda params: change(params, omni=params["omni"] | {"version": 99}),
        lambda params: change(params, omni=params["omni"] | {"prompt_digest": "0" * 32}),
        lambda params: change(params, remote_block_ids=[[1, 2]]),
        lambda params: change(params, remote_block_ids=[[]]),
        lambda params: change(params, remote_block_ids=[]),
        lambda params: change(params, remote_port=0),
        lambda params: change(params, remote_host="\ud800"),
        lambda params: "a string",
        lambda params: ["do_remote_prefill"],
        lambda params: 7,
        lambda params: {},
        lambda params: None,
    ],
)
def test_forged_parameters_change_nothing(
    prefill: Engine, decode: Engine, forge: Callable[[dict[str, Any]], Any]
) -> None:
    baseline = decode.num_free
    prompt = prompt_of(40)
    request = new_request(prompt, forge(hand_off(prefill, prompt)))
    decode.side.on_new_request(request)
    assert request.kv_transfer_params is None or isinstance(request.kv_transfer_params, dict)  # vLLM calls its .get
    assert decode.side.num_tokens_to_load(request, 0) == (0, False)
    assert decode.admit(request) == ()
    assert decode.finish(request, RequestStatus.FINISHED_ABORTED) is None
    assert decode.num_free == baseline
    decode.side._releases.shutdown(wait=True)
    assert not prefill.side._leases.has_ended


@pytest.mark.parametrize(
    ("at_prefill", "at_decode"),
    [({}, {"cache_salt": "other"}), ({"cache_salt": "salt"}, {}), ({"cache_salt": "a"}, {"cache_salt": "b"})],
)
def test_kv_of_another_salt_is_not_loaded(
    prefill: Engine, decode: Engine, at_prefill: dict[str, Any], at_decode: dict[str, Any]
) -> None:
    prompt = prompt_of(40)
    request = new_request(prompt, hand_off(prefill, prompt, **at_prefill), **at_decode)
    decode.side.on_new_request(request)
    assert decode.side.num_tokens_to_load(request, 0) == (0, False)


def test_kv_of_another_prompt_is_not_loaded_and_is_counted(prefill: Engine, decode: Engine) -> None:
    params = hand_off(prefill, prompt_of(40))
    request = new_request(prompt_of(40, seed=2), params)
    decode.side.on_new_request(request)
    assert decode.side.num_tokens_to_load(request, 0) == (0, False)
    stats = decode.side.take_stats()
    assert stats is not None
    assert stats.data["failures"] == {"hand_off": 1}
    assert not prefill.side._leases.has_ended  # a prompt that is not the lease's cannot end it


def test_prompts_of_embeddings_are_neither_kept_nor_loaded(prefill: Engine, decode: Engine) -> None:
    """Their tokens are all alike, so a digest of them would tell nothing."""
    import torch

    def of_embeddings(params: Any) -> Request:
        request = new_request([0] * 40, params)
        request.prompt_embeds = torch.zeros(40, 8)
        return request

    assert prefill.prefill(of_embeddings(HAND_OFF)) is None
    request = of_embeddings(hand_off(prefill, [0] * 40))
    decode.side.on_new_request(request)
    assert decode.side.num_tokens_to_load(request, 0) == (0, False)


def test_a_prefill_engine_loads_nothing(prefill: Engine) -> None:
    prompt = prompt_of(40)
    request = new_request(prompt, hand_off(prefill, prompt))
    prefill.side.on_new_request(request)
    assert prefill.side.num_tokens_to_load(request, 0) == (0, False)


# --- both


def test_leases_appear_in_the_stats_once(prefill: Engine) -> None:
    assert prefill.side.take_stats() is None
    params = hand_off(prefill, prompt_of(20))
    stats = prefill.side.take_stats()
    assert stats is not None
    assert (stats.data["leases"], stats.data["open_leases"]) == ({"granted": 1}, 1)
    assert prefill.side.take_stats() is None
    prefill.side._leases.end_read(lease_id(params), "reader", 0)
    stats = prefill.side.take_stats()
    assert stats is not None
    assert (stats.data["leases"], stats.data["open_leases"]) == ({"released": 1}, 0)


def test_closing_ends_a_release_under_way(decode: Engine, prefill: Engine) -> None:
    prompt = prompt_of(40)
    request = new_request(prompt, hand_off(prefill, prompt))
    prefill.close()
    decode.side.on_new_request(request)
    decode.finish(request, RequestStatus.FINISHED_ABORTED)
    began = time.monotonic()
    decode.close()
    decode.side._releases.shutdown(wait=True)
    assert time.monotonic() - began < 1


def test_blocks_return_to_the_baseline_after_any_sequence_of_requests() -> None:
    prefill, decode = Engine("prefill", num_blocks=256), Engine("decode", num_blocks=256)
    baselines = prefill.num_free, decode.num_free
    rng = random.Random(17)
    leases: list[dict[str, Any]] = []
    for _ in range(300):
        prompt = prompt_of(rng.randint(1, 60), seed=rng.randrange(10))
        params = prefill.prefill(new_request(prompt, HAND_OFF if rng.random() < 0.7 else None))
        if params is not None:
            leases.append(params)
            request = new_request(prompt, params)
            decode.side.on_new_request(request)
            if rng.random() < 0.5:
                decode.admit(request)
            decode.finish(request, RequestStatus.FINISHED_ABORTED)
        if len(leases) > 20 or rng.random() < 0.3:
            for lease in leases:
                prefill.side._leases.end_read(lease_id(lease), "reader", None)
            leases.clear()
        if rng.random() < 0.5:
            prefill.side.take_loads()
    for lease in leases:
        prefill.side._leases.end_read(lease_id(lease), "reader", None)
    prefill.side.take_loads()
    assert (prefill.num_free, decode.num_free) == baselines
    assert len(prefill.side._leases) == 0
    decode.close()
    prefill.close()

"""D's part of the scheduler's half, against a real control port of P."""

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import msgspec
import pytest
import torch

from kv_transfer.connector.prompt import digest_of_prompt
from kv_transfer.errors import HandOffError
from kv_transfer.hand_off import HandOff
from kv_transfer.ticket import new_ticket
from tests.kv_transfer.rank_peers import KEY, OTHER_KEY, kv_threads, until
from tests.kv_transfer.with_vllm import (
    BLOCK_SIZE,
    HAND_OFF,
    Engine,
    Request,
    RequestStatus,
    decode_scheduler,
    lease_id,
    new_request,
    prompt_of,
    silent,
)


@pytest.fixture
def prefill() -> Iterator[Engine]:
    with contextlib.closing(Engine("prefill")) as engine:
        yield engine


@pytest.fixture
def decode() -> Iterator[Engine]:
    with contextlib.closing(Engine("decode")) as engine:
        yield engine
        assert not engine.decode._sources
        assert not engine.decode._loading
        assert not engine.decode._keeper._kept  # heartbeats end with what they are for


def ends_load(decode: Engine, *requests: Request) -> None:
    decode.side.loads_ended([request.request_id for request in requests])


def released(prefill: Engine) -> None:
    until(lambda: prefill.leases.has_ended, "the lease was not released")
    assert prefill.leases.take_counts().released == 1


@pytest.mark.parametrize("num_local_blocks", [0, 1, 2])
@pytest.mark.parametrize("num_tokens", [1, 2, 15, 16, 17, 31, 32, 33, 49, 50])
def test_exactly_the_missing_tokens_are_loaded(
    prefill: Engine, decode: Engine, num_tokens: int, num_local_blocks: int
) -> None:
    prompt = prompt_of(num_tokens)
    num_cached = min(num_local_blocks, (num_tokens - 1) // BLOCK_SIZE)  # vLLM never takes a whole prompt as cached
    if num_cached:
        decode.prefill(new_request(prompt[: num_cached * BLOCK_SIZE]))
    params = prefill.hand_off(prompt)
    request = decode.arrives(prompt, params)
    loads = decode.admit(request)
    if num_tokens - 1 == num_cached * BLOCK_SIZE:
        assert loads == ()
        released(prefill)
        return
    (load,) = loads
    assert load.request_id == request.request_id
    assert load.lease_id == lease_id(params)
    assert (load.host, load.port, load.run_id) == ("127.0.0.1", prefill.port, params["omni"]["run_id"])
    assert (load.first_token, load.end_token) == (num_cached * BLOCK_SIZE, num_tokens - 1)
    num_blocks = -(-(num_tokens - 1) // BLOCK_SIZE)
    assert load.local_block_ids == (tuple(decode.block_ids(request)[0][:num_blocks]),)
    assert load.remote_block_ids == tuple(map(tuple, params["remote_block_ids"]))
    assert load.num_blocks == num_blocks - num_cached
    assert not prefill.leases.has_ended
    ends_load(decode, request)


def test_blocks_outside_the_window_are_not_counted() -> None:
    with (
        contextlib.closing(Engine("prefill", windows=(None, 16))) as prefill,
        contextlib.closing(Engine("decode", windows=(None, 16))) as decode,
    ):
        prompt = prompt_of(60)
        request = decode.arrives(prompt, prefill.hand_off(prompt))
        (load,) = decode.admit(request)
        full, windowed = load.local_block_ids
        assert 0 not in full
        assert windowed[:2] == (0, 0)
        assert 0 not in windowed[2:]
        assert load.num_blocks == 4 + 2
        for ours, theirs in zip(load.local_block_ids, load.remote_block_ids or (), strict=True):
            assert all(there for here, there in zip(ours, theirs, strict=True) if here)


def test_a_load_is_asked_for_once(prefill: Engine, decode: Engine) -> None:
    """After a failed load vLLM, told to recompute, asks again: the prompt is then computed."""
    prompt = prompt_of(40)
    request = decode.arrives(prompt, prefill.hand_off(prompt))
    assert len(decode.admit(request)) == 1
    decode.manager.free(request)
    ends_load(decode, request)
    assert decode.side.num_tokens_to_load(request, 0) == (0, False)
    assert decode.admit(request) == ()
    assert decode.finish(request, RequestStatus.FINISHED_STOPPED) is None
    assert decode.step().cancelled == ()


def test_a_request_that_waits_for_room_is_asked_about_again(prefill: Engine, decode: Engine) -> None:
    prompt = prompt_of(40)
    request = decode.arrives(prompt, prefill.hand_off(prompt))
    for _ in range(3):
        assert decode.side.num_tokens_to_load(request, 0) == (39, True)
    assert decode.side.num_tokens_to_load(request, 32) == (7, True)
    assert decode.side.num_tokens_to_load(request, 39) == (0, False)
    assert len(decode.admit(request)) == 1
    ends_load(decode, request)


# --- aborts


def test_a_request_aborted_before_it_was_scheduled_releases_its_lease(prefill: Engine, decode: Engine) -> None:
    prompt = prompt_of(40)
    request = decode.arrives(prompt, prefill.hand_off(prompt))
    assert decode.finish(request, RequestStatus.FINISHED_ABORTED) is None
    released(prefill)


def test_a_request_aborted_while_it_loads_cancels_the_load(prefill: Engine, decode: Engine) -> None:
    prompt = prompt_of(40)
    request = decode.arrives(prompt, prefill.hand_off(prompt))
    decode.admit(request)
    decode.finish(request, RequestStatus.FINISHED_ABORTED)
    assert decode.step().cancelled == (request.request_id,)
    assert decode.step().cancelled == ()
    assert request.request_id in decode.decode._keeper._kept  # until the workers have ended the load
    assert not prefill.leases.has_ended  # the worker's business
    ends_load(decode, request)


def test_a_request_aborted_after_its_load_changes_nothing(prefill: Engine, decode: Engine) -> None:
    prompt = prompt_of(40)
    request = decode.arrives(prompt, prefill.hand_off(prompt))
    decode.admit(request)
    ends_load(decode, request)
    decode.finish(request, RequestStatus.FINISHED_ABORTED)
    assert decode.step().cancelled == ()
    assert not prefill.leases.has_ended


def test_a_request_that_the_api_server_rejected_releases_its_lease(prefill: Engine, decode: Engine) -> None:
    """vLLM passes it on without its prompt, only to be aborted at once."""
    request = decode.arrives([0], prefill.hand_off(prompt_of(40)), abort_immediately=True)
    decode.finish(request, RequestStatus.FINISHED_ABORTED)
    released(prefill)


def test_a_prompt_whose_cached_kv_must_not_be_used_releases_its_lease(prefill: Engine, decode: Engine) -> None:
    """For prompt logprobs vLLM overrules us and loads nothing."""
    prompt = prompt_of(40)
    request = decode.arrives(prompt, prefill.hand_off(prompt))
    assert decode.side.num_tokens_to_load(request, 0) == (39, True)
    decode.side.blocks_allocated(request, ([1, 2, 3],), 0)
    released(prefill)
    assert decode.step().loads == ()


def test_releases_that_fail_are_given_up_together(
    decode: Engine, prefill: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode_scheduler, "_RELEASE_TIMEOUT_S", 0.1)
    prompt = prompt_of(40)
    params = prefill.hand_off(prompt)
    began = time.monotonic()
    with silent(prefill):
        for _ in range(50):
            decode.finish(decode.arrives(prompt, params), RequestStatus.FINISHED_ABORTED)
        decode.decode._releases.shutdown(wait=True)
    assert time.monotonic() - began < 4  # one after the other they take 5 s


# --- what is not for this prompt, or not ours


def signed(params: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """Changed by P itself, as it were."""
    return msgspec.convert(params | changes, HandOff).signed(KEY).as_params()


@pytest.mark.parametrize(
    "forge",
    [
        lambda params: {"do_remote_prefill": True},
        lambda params: {"do_remote_prefill": "yes"},
        lambda params: {"do_remote_prefill": True, "omni": []},
        lambda params: params | {"omni": None},
        lambda params: params | {"omni": params["omni"] | {"version": 99}},
        lambda params: params | {"omni": params["omni"] | {"lease_id": "0" * 32}},
        lambda params: params | {"omni": params["omni"] | {"signature": "0" * 64}},
        lambda params: params | {"remote_block_ids": [[3, 2, 1]]},
        lambda params: params | {"remote_port": 1},
        lambda params: params | {"remote_host": "\ud800"},
        lambda params: signed(params, omni=params["omni"] | {"expires_at": 1}),
        lambda params: signed(params, omni=params["omni"] | {"prompt_digest": "0" * 32}),
        lambda params: {"do_remote_prefill": True, "omni": {"ticket": {}}},
        lambda params: {"do_remote_prefill": True, "omni": {"ticket": new_ticket(OTHER_KEY, "h", 1).as_params()}},
    ],
)
def test_forged_parameters_change_nothing_and_are_counted(
    prefill: Engine, decode: Engine, forge: Callable[[dict[str, Any]], Any]
) -> None:
    baseline = decode.num_free
    prompt = prompt_of(40)
    request = decode.arrives(prompt, forge(prefill.hand_off(prompt)))
    assert decode.side.num_tokens_to_load(request, 0) == (0, False)
    stats = decode.side.take_stats()
    assert stats is not None
    assert stats.data["failures"] == {HandOffError.reason: 1}
    assert decode.admit(request) == ()
    assert decode.finish(request, RequestStatus.FINISHED_ABORTED) is None
    assert decode.num_free == baseline
    decode.decode._releases.shutdown(wait=True)
    assert not prefill.leases.has_ended


@pytest.mark.parametrize(
    ("at_prefill", "at_decode"),
    [({}, {"cache_salt": "other"}), ({"cache_salt": "salt"}, {}), ({"cache_salt": "a"}, {"cache_salt": "b"})],
)
def test_kv_of_another_salt_is_not_loaded(
    prefill: Engine, decode: Engine, at_prefill: dict[str, Any], at_decode: dict[str, Any]
) -> None:
    prompt = prompt_of(40)
    request = decode.arrives(prompt, prefill.hand_off(prompt, **at_prefill), **at_decode)
    assert decode.side.num_tokens_to_load(request, 0) == (0, False)


def test_kv_of_another_prompt_is_not_loaded_and_its_lease_is_not_ended(prefill: Engine, decode: Engine) -> None:
    request = decode.arrives(prompt_of(40, seed=2), prefill.hand_off(prompt_of(40)))
    assert decode.side.num_tokens_to_load(request, 0) == (0, False)
    decode.finish(request, RequestStatus.FINISHED_ABORTED)
    decode.decode._releases.shutdown(wait=True)
    assert not prefill.leases.has_ended


@pytest.mark.parametrize("with_ticket", [False, True])
def test_prompts_of_embeddings_are_not_loaded(prefill: Engine, decode: Engine, with_ticket: bool) -> None:
    params = prefill.hand_off([0] * 40)
    if with_ticket:
        params = {"do_remote_prefill": True, "omni": {"ticket": new_ticket(KEY, "127.0.0.1", prefill.port).as_params()}}
    request = new_request([0] * 40, params)
    request.prompt_embeds = torch.zeros(40, 8)
    decode.side.on_new_request(request)
    assert decode.side.num_tokens_to_load(request, 0) == (0, False)


def test_a_ticket_is_a_load_of_what_is_still_to_come(prefill: Engine, decode: Engine) -> None:
    ticket = new_ticket(KEY, "127.0.0.1", prefill.port)
    request = decode.arrives(prompt_of(40), {"do_remote_prefill": True, "omni": {"ticket": ticket.as_params()}})
    (load,) = decode.admit(request)
    assert (load.run_id, load.remote_block_ids, load.lease_id) == (None, None, ticket.transfer_id)
    assert (load.host, load.port) == ("127.0.0.1", prefill.port)
    assert load.prompt_digest == digest_of_prompt(request)
    ends_load(decode, request)


# --- the end


def test_closing_ends_a_release_under_way_and_every_thread(prefill: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decode_scheduler, "_RELEASE_TIMEOUT_S", 20.0)
    decode = Engine("decode")
    prompt = prompt_of(40)
    params = prefill.hand_off(prompt)
    before = kv_threads()
    with silent(prefill):
        decode.finish(decode.arrives(prompt, params), RequestStatus.FINISHED_ABORTED)
        began = time.monotonic()
        decode.close()
        until(lambda: kv_threads() <= before, "threads are left")
        assert time.monotonic() - began < 10  # it would have waited for 20 s


def test_the_same_hand_off_may_be_read_by_several_requests(prefill: Engine, decode: Engine) -> None:
    prompt = prompt_of(40)
    params = prefill.prefill(new_request(prompt, HAND_OFF | {"omni": {"num_readers": 2}}))
    first, second = decode.arrives(prompt, params), decode.arrives(prompt, params)
    assert len(decode.admit(first)) == len(decode.admit(second)) == 1
    assert not set(decode.block_ids(first)[0]) & set(decode.block_ids(second)[0])
    ends_load(decode, first)
    assert list(decode.decode._keeper._kept) == [second.request_id]
    ends_load(decode, second)

"""The two parts together: which engine has which, and what passes between vLLM and them."""

import contextlib
import pickle
from typing import Any

import pytest

from kv_transfer.ticket import new_ticket
from tests.kv_transfer.rank_peers import KEY, until
from tests.kv_transfer.with_vllm import (
    HAND_OFF,
    Engine,
    KVCacheConfig,
    RequestStatus,
    connector_scheduler,
    kv_cache_interface,
    lease_id,
    new_request,
    prompt_of,
    settings,
)


def test_a_decode_engine_grants_nothing() -> None:
    with contextlib.closing(Engine("decode")) as decode:
        baseline = decode.num_free
        assert decode.prefill(new_request(prompt_of(20), HAND_OFF)) is None
        assert decode.num_free == baseline
        assert not decode.side.wants_a_step()


def test_a_prefill_engine_loads_nothing() -> None:
    with contextlib.closing(Engine("prefill")) as prefill:
        prompt = prompt_of(40)
        request = new_request(prompt, prefill.hand_off(prompt))
        prefill.side.on_new_request(request)
        assert prefill.side.num_tokens_to_load(request, 0) == (0, False)
        assert prefill.admit(request) == ()


def test_an_engine_of_both_roles_hands_off_to_its_like_what_it_has_loaded() -> None:
    with contextlib.closing(Engine("both")) as first, contextlib.closing(Engine("both")) as second:
        prompt = prompt_of(40)
        params = first.hand_off(prompt)
        request = new_request(prompt, params)
        second.side.on_new_request(request)
        (load,) = second.admit(request)
        assert load.port == first.port
        second.side.loads_ended([request.request_id])
        assert second.finish(request, RequestStatus.FINISHED_LENGTH_CAPPED) is None  # nobody asked for it
        again = second.hand_off(prompt)
        assert again["remote_port"] == second.port
        assert lease_id(again) != lease_id(params)
        second.leases.end(lease_id(again))
        assert second.side.wants_a_step()


def test_one_engine_reads_from_itself() -> None:
    with contextlib.closing(Engine("both")) as engine:
        prompt = prompt_of(40)
        params = engine.hand_off(prompt)
        request = new_request(prompt, params)
        engine.side.on_new_request(request)
        assert engine.finish(request, RequestStatus.FINISHED_ABORTED) is None
        until(engine.side.wants_a_step, "the lease was not released")


@pytest.mark.parametrize("params", ["a string", ["do_remote_prefill"], 7, 0, "", [], True])
@pytest.mark.parametrize("role", ["prefill", "decode", "both"])
def test_parameters_that_are_no_dictionary_are_taken_away(role: str, params: Any) -> None:
    """vLLM's scheduler calls their .get."""
    with contextlib.closing(Engine(role)) as engine:
        request = new_request(prompt_of(20), params)
        engine.side.on_new_request(request)
        assert request.kv_transfer_params is None


def test_what_the_workers_are_told_crosses_vllms_pipe() -> None:
    with contextlib.closing(Engine("both")) as engine:
        ticket = new_ticket(KEY, "127.0.0.1", engine.port).as_params()
        followed = new_request(prompt_of(40), HAND_OFF | {"omni": {"ticket": ticket}})
        engine.side.on_new_request(followed)
        prompt = prompt_of(40, seed=2)
        loading = new_request(prompt, engine.hand_off(prompt))
        engine.side.on_new_request(loading)
        engine.side.blocks_allocated(loading, ([1, 2, 3],), 39)
        engine.side.request_finished(loading, ([],))
        metadata = engine.compute(followed, 40)
        assert (len(metadata.loads), len(metadata.cancelled), len(metadata.prefills)) == (1, 1, 1)
        assert pickle.loads(pickle.dumps(metadata)) == metadata  # noqa: S301
        engine.side.loads_ended([loading.request_id])
        engine.finish(followed, RequestStatus.FINISHED_ABORTED)


def test_models_that_keep_something_else_are_refused() -> None:
    spec = kv_cache_interface.MambaSpec(block_size=16, shapes=((1,),), dtypes=(None,))
    config = KVCacheConfig(8, [], [kv_cache_interface.KVCacheGroupSpec(["layer"], spec)])
    with pytest.raises(ValueError, match="cannot hand off a MambaSpec"):
        connector_scheduler.SchedulerSide(settings(), config)


def test_strangers_on_the_control_port_are_counted_once() -> None:
    with contextlib.closing(Engine("prefill")) as prefill:
        prefill.side._prefill._control.dropped.count(ValueError("stranger"))
        stats = prefill.side.take_stats()
        assert stats is not None
        assert stats.data["dropped"] == {"control": 1}
        assert prefill.side.take_stats() is None

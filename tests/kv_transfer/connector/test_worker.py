"""The worker's half against a whole P: leases, control port and rank servers, with real sockets between."""

import contextlib
import pickle
import threading
import time
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from kv_transfer import protocol
from kv_transfer.decode.block_reader import BlockReader
from kv_transfer.transports.tcp import TcpTransport
from tests.kv_transfer.rank_peers import cpu_seconds_of, kv_threads, num_open_files, until
from tests.kv_transfer.whole_engines import NUM_LAYERS, B, D, WholeEngine, check_arrived, stand_in_config
from tests.kv_transfer.with_vllm import (
    BLOCK_SIZE,
    HAND_OFF,
    RequestStatus,
    connector_worker,
    new_request,
    prompt_of,
    settings,
    silent,
    vllm_config_standin,
)


@pytest.fixture
def prefill() -> Iterator[WholeEngine]:
    with contextlib.closing(WholeEngine("prefill", seed=1)) as engine:
        yield engine


@pytest.fixture(params=[{}, {"checksum": True, "transport": "tcp"}], ids=["auto", "tcp"])
def decode(request: pytest.FixtureRequest) -> Iterator[WholeEngine]:
    with contextlib.closing(WholeEngine("decode", seed=9, **request.param)) as engine:
        yield engine


def test_a_load_brings_the_blocks_and_ends_the_lease(prefill: WholeEngine, decode: WholeEngine) -> None:
    (worker,) = decode.workers
    before = {name: cache.clone() for name, cache in worker.caches_BHNC.items()}
    prompt = prompt_of(40)
    params = prefill.engine.hand_off(prompt)
    _, load = decode.admit(prompt, params)
    decode.run(load)
    assert decode.failed == set()
    check_arrived(prefill, decode, load, params["remote_block_ids"])
    others = sorted(set(range(B)) - set(load.local_block_ids[0]))
    assert all(torch.equal(cache[others], before[name][others]) for name, cache in worker.caches_BHNC.items())
    assert prefill.engine.leases.take_counts().released == 1
    stats = worker.side.take_stats()
    assert stats.data["bytes"] == {load_transport(decode): 3 * NUM_LAYERS * 4 * BLOCK_SIZE * 2 * D * 4}
    assert stats.data["blocks"] == 3
    assert [len(seconds) for seconds in stats.data["seconds"].values()] == [1]
    assert worker.side.take_stats() is None


def load_transport(decode: WholeEngine) -> str:
    (engine,) = decode.workers[0].side._reader._engines.values()
    name: str = engine.sources[0].transport.name
    return name


def test_many_loads_at_once(prefill: WholeEngine, decode: WholeEngine) -> None:
    prompts = [prompt_of(17, seed=seed) for seed in range(12)]
    handed_off = [prefill.engine.hand_off(prompt) for prompt in prompts]
    loads = [decode.admit(prompt, params)[1] for prompt, params in zip(prompts, handed_off, strict=True)]
    decode.run(*loads)
    assert decode.failed == set()
    for load, params in zip(loads, handed_off, strict=True):
        check_arrived(prefill, decode, load, params["remote_block_ids"])
    assert len(prefill.engine.leases) == 0


@pytest.mark.parametrize(("p_ranks", "d_ranks"), [(2, 1), (1, 2), (2, 2)])
def test_ranks_of_other_numbers_get_their_heads(p_ranks: int, d_ranks: int) -> None:
    with (
        contextlib.closing(WholeEngine("prefill", tp_size=p_ranks, windows=(None, 20))) as prefill,
        contextlib.closing(WholeEngine("decode", tp_size=d_ranks, windows=(None, 20), seed=9)) as decode,
    ):
        prompt = prompt_of(60)
        params = prefill.engine.hand_off(prompt)
        _, load = decode.admit(prompt, params)
        decode.start(load)
        decode.wait_for(load)
        assert decode.failed == set()
        check_arrived(prefill, decode, load, params["remote_block_ids"])
        counts = prefill.engine.leases.take_counts()
        assert (counts.granted, counts.released) == (1, 1)  # when all ranks of D were done, not before


def test_both_halves_of_both_engines_in_a_ring() -> None:
    """Each is P for the other."""
    with (
        contextlib.closing(WholeEngine("both")) as one,
        contextlib.closing(WholeEngine("both", seed=9)) as other,
    ):
        for prefill, decode, seed in ((one, other, 1), (other, one, 2)):
            prompt = prompt_of(40, seed)
            params = prefill.engine.hand_off(prompt)
            _, load = decode.admit(prompt, params)
            decode.run(load)
            check_arrived(prefill, decode, load, params["remote_block_ids"])
        assert not one.failed | other.failed


def test_an_aborted_load_is_cancelled_reported_and_releases_its_lease(
    prefill: WholeEngine, decode: WholeEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It waits for a thread, as the others are busy."""
    go_on = threading.Event()
    read = BlockReader.read
    monkeypatch.setattr(BlockReader, "read", lambda *args: (go_on.wait(10), read(*args))[1])
    prompt = prompt_of(40)
    request, load = decode.admit(prompt, prefill.engine.hand_off(prompt))
    decode.start(load)
    decode.engine.finish(request, RequestStatus.FINISHED_ABORTED)
    decode.step()
    go_on.set()
    decode.wait_for(load)
    assert decode.failed == {load.request_id}
    assert decode.failures() == {"cancelled": 1}
    until(lambda: prefill.engine.leases.has_ended, "P still keeps the blocks")
    assert not decode.workers[0].side._under_way


def test_cancelling_what_is_not_under_way_does_nothing(decode: WholeEngine) -> None:
    decode.workers[0].side.begin_step(connector_worker.StepMetadata((), ("never heard of",), (), ()))
    assert decode.workers[0].side.take_ended() == (set(), set())


@pytest.mark.parametrize("error", [RuntimeError("unforeseen"), MemoryError(), AssertionError(), IndexError()])
def test_an_unforeseen_error_still_ends_the_load(
    prefill: WholeEngine, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: object) -> None:
        raise error

    with contextlib.closing(WholeEngine("decode", seed=9, transport="tcp")) as decode:
        prompt = prompt_of(40)
        with monkeypatch.context() as patch:
            patch.setattr(TcpTransport, "read", fail)
            _, unlucky = decode.admit(prompt, prefill.engine.hand_off(prompt))
            decode.run(unlucky)
        assert decode.failed == {unlucky.request_id}
        assert decode.failures() == {"other": 1}
        _, load = decode.admit(prompt, prefill.engine.hand_off(prompt))
        decode.run(load)
        assert decode.failed == {unlucky.request_id}


def test_a_peer_that_does_not_answer_delays_no_load_from_another(prefill: WholeEngine) -> None:
    with (
        contextlib.closing(WholeEngine("decode", seed=9, num_load_threads=1)) as decode,
        contextlib.closing(WholeEngine("prefill", seed=3)) as stuck,
    ):
        prompt = prompt_of(40)
        slow = [decode.admit(prompt, stuck.engine.hand_off(prompt))[1] for _ in range(2)]
        _, quick = decode.admit(prompt, prefill.engine.hand_off(prompt))
        with silent(stuck.engine):
            decode.start(*slow)
            decode.run(quick)
            assert decode.ended == {quick.request_id}
        decode.wait_for(*slow)
        assert decode.failed == set()


def test_loads_that_waited_too_long_for_a_thread_end(prefill: WholeEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    read = TcpTransport.read

    def slow_read(*args: Any) -> None:
        read(*args)
        time.sleep(0.25)

    monkeypatch.setattr(TcpTransport, "read", slow_read)
    changes: dict[str, Any] = {"num_load_threads": 1, "load_timeout_s": 0.2, "transport": "tcp"}
    with contextlib.closing(WholeEngine("decode", seed=9, **changes)) as decode:
        prompt = prompt_of(17)
        loads = [decode.admit(prompt, prefill.engine.hand_off(prompt))[1] for _ in range(5)]
        decode.run(*loads)
        assert decode.failed == {load.request_id for load in loads}
        assert decode.failures() == {"deadline": 5}


def test_no_loads_start_nothing(decode: WholeEngine) -> None:
    decode.start()
    assert not decode.workers[0].side._loaders
    assert decode.workers[0].side.take_ended() == (set(), set())


def test_close_ends_loads_under_way_every_thread_and_file() -> None:
    threads, num_files = kv_threads(), num_open_files()
    prefill, decode = WholeEngine("prefill"), WholeEngine("decode", seed=9)
    prompt = prompt_of(40)
    _, whole = decode.admit(prompt, prefill.engine.hand_off(prompt))
    decode.run(whole)
    _, cut_short = decode.admit(prompt, prefill.engine.hand_off(prompt))
    side = decode.workers[0].side
    with silent(prefill.engine):
        decode.start(cut_short)
        (loader,) = side._loaders.values()
        until(lambda: loader[0]._work_queue.empty(), "the load did not begin")
        decode.close()
        until(lambda: side.take_ended() == ({cut_short.request_id},) * 2, "the load went on")
    prefill.close()
    until(lambda: kv_threads() <= threads, "threads are left")
    until(lambda: num_open_files() <= num_files, "files are left")


def test_idle_engines_spin_no_thread(prefill: WholeEngine, decode: WholeEngine) -> None:
    prompt = prompt_of(40)
    decode.run(decode.admit(prompt, prefill.engine.hand_off(prompt))[1])
    threads = [thread for thread in threading.enumerate() if thread.name.startswith("kv-")]
    assert {"kv-control", "kv-rank-accept", "kv-lease-keeper"} <= {thread.name for thread in threads}
    with cpu_seconds_of(*threads) as used_s:
        time.sleep(0.3)
        assert used_s() < 0.05


def test_messages_of_strangers_on_the_rank_server_are_counted(prefill: WholeEngine) -> None:
    side = prefill.workers[0].side
    assert side.take_stats() is None
    side._server.dropped.count(ValueError("stranger"))
    assert side.take_stats().data["dropped"] == {"rank_server": 1}
    assert side.take_stats() is None


def test_a_decode_worker_serves_nothing(decode: WholeEngine) -> None:
    assert decode.workers[0].side.handshake().info is None


def test_there_is_no_handshake_before_there_is_a_cache() -> None:
    side = connector_worker.WorkerSide(settings("both"), vllm_config_standin(), stand_in_config())
    assert side.handshake() is None
    side.close()


def test_the_handshake_crosses_vllms_pipe(prefill: WholeEngine) -> None:
    handshake = prefill.workers[0].side.handshake()
    assert pickle.loads(pickle.dumps(handshake)) == handshake  # noqa: S301


def test_where_vllm_allocates_its_cache() -> None:
    """P's worker has it in shared memory, which peers of the host read with one copy; D's where vLLM likes."""
    for role, shared in (("prefill", True), ("decode", False), ("both", True)):
        side = connector_worker.WorkerSide(settings(role), vllm_config_standin(), stand_in_config())
        assert (side.memory_pool() is not None) is shared
        side.close()


def test_kv_that_is_loaded_again_after_a_failure_is_loaded_by_nobody(prefill: WholeEngine, decode: WholeEngine) -> None:
    """kv_load_failure_policy "recompute": the lease has ended before the read, and D computes the prompt."""
    prompt = prompt_of(40)
    params = prefill.engine.prefill(new_request(prompt, HAND_OFF))
    request, load = decode.admit(prompt, params)
    prefill.engine.leases.end(load.lease_id)
    decode.run(load)
    assert decode.failed == {load.request_id}
    assert decode.engine.side.num_tokens_to_load(request, 0) == (0, False)


def fingerprint(**changes: Any) -> protocol.Fingerprint:
    config = vllm_config_standin()
    for path, value in changes.items():
        holder, name = path.split("__")
        setattr(getattr(config, holder), name, value)
    result: protocol.Fingerprint = connector_worker._fingerprint(config)
    return result


def hf_config(**fields: Any) -> Any:
    return types.SimpleNamespace(to_dict=lambda: {"_name_or_path": "/elsewhere", "hidden_size": 8} | fields)


def test_the_fingerprint_is_the_same_wherever_the_model_is_kept() -> None:
    assert fingerprint() == fingerprint(model_config__hf_config=hf_config())


@pytest.mark.parametrize(
    ("changes", "field"),
    [
        ({"model_config__hf_config": hf_config(rope_theta=1)}, "model"),
        ({"model_config__quantization": "gptq"}, "model"),
        ({"model_config__dtype": torch.float16}, "kv_cache_dtype"),
        ({"cache_config__cache_dtype": "fp8"}, "kv_cache_dtype"),
    ],
)
def test_the_fingerprint_tells_models_apart(changes: dict[str, Any], field: str) -> None:
    (difference,) = fingerprint().differences(fingerprint(**changes))
    assert difference.startswith(f"{field} is")

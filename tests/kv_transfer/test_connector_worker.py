"""The worker's half against a whole P: leases, control server and block transport, with real sockets between."""

import dataclasses
import pickle
import threading
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from kv_transfer import protocol
from kv_transfer.control import ControlServer
from kv_transfer.lease import LeaseTable
from kv_transfer.protocol import Welcome
from kv_transfer.transports.tcp import TcpTransport
from tests.kv_transfer.with_vllm import connector_scheduler, connector_worker, settings, vllm_config_standin

N, H, T, D = 32, 2, 16, 8
LEASE_S = 30.0


def until(condition: Callable[[], bool], why: str) -> None:
    deadline = time.monotonic() + 5
    while not condition():
        assert time.monotonic() < deadline, why
        time.sleep(0.005)


def caches(seed: int, *, heads: int = H) -> dict[str, torch.Tensor]:
    generator = torch.manual_seed(seed)
    return {f"layer.{i}": torch.rand(N, heads, T, 2 * D, generator=generator) for i in range(3)}


def worker(role: str, kv_caches: dict[str, torch.Tensor], **changes: Any) -> Any:
    side = connector_worker.WorkerSide(
        settings(role, **changes), vllm_config_standin(), types.SimpleNamespace(num_blocks=N)
    )
    side.register_kv_caches(kv_caches)
    return side


class Prefill:
    def __init__(self, seed: int = 1, **changes: Any) -> None:
        self.kv_caches = caches(seed)
        self.clock_skipped_s = 0.0
        self.side = worker("prefill", self.kv_caches, **changes)
        handshake = self.side.handshake()
        self.leases = LeaseTable(
            lease_s=LEASE_S,
            tp_size=1,
            on_change=lambda: None,
            clock=lambda: time.monotonic() + self.clock_skipped_s,
        )
        self.control = ControlServer("127.0.0.1", Welcome((handshake.endpoint,)), handshake.fingerprint, self.leases)

    def load(self, request_id: str, remote_ids: list[int], local_ids: list[int]) -> "connector_worker.Load":
        return connector_worker.Load(
            request_id=request_id,
            host="127.0.0.1",
            port=self.control.port,
            lease_id=self.leases.grant(remote_ids, 1).lease_id,
            remote_block_ids=tuple(remote_ids),
            local_block_ids=tuple(local_ids),
        )

    def close(self) -> None:
        self.control.close()
        self.side.close()


class Decode:
    def __init__(self, **changes: Any) -> None:
        self.kv_caches = caches(2)
        self.side = worker("decode", self.kv_caches, **changes)
        self.ended: set[str] = set()
        self.failed: set[str] = set()

    def run(self, *loads: "connector_worker.Load") -> None:
        """Start these loads and step until they have ended, as the engine does."""
        self.side.start_loads(loads)
        self.wait_for({load.request_id for load in loads})

    def wait_for(self, request_ids: set[str]) -> None:
        def all_ended() -> bool:
            ended, failed = self.side.take_ended()
            assert not ended & self.ended, "an end was reported twice"
            assert failed <= ended
            self.ended |= ended
            self.failed |= failed
            return request_ids <= self.ended

        until(all_ended, f"{request_ids} did not end")

    def failures(self) -> dict[str, int]:
        stats = self.side.take_stats()
        failures: dict[str, int] = {} if stats is None else stats.data["failures"]
        return failures


@pytest.fixture
def prefill() -> Iterator[Prefill]:
    prefill = Prefill()
    yield prefill
    prefill.close()


@pytest.fixture(params=[False, True], ids=["plain", "checksum"])
def decode(request: pytest.FixtureRequest) -> Iterator[Decode]:
    decode = Decode(checksum=request.param)
    yield decode
    decode.side.close()


def test_a_load_brings_the_blocks_and_ends_the_lease(prefill: Prefill, decode: Decode) -> None:
    expected = {name: cache.clone() for name, cache in decode.kv_caches.items()}
    for name, cache in expected.items():
        cache[[4, 5, 9]] = prefill.kv_caches[name][[20, 21, 3]]
    decode.run(prefill.load("a", [20, 21, 3], [4, 5, 9]))
    assert decode.failed == set()
    for name, cache in expected.items():
        assert torch.equal(decode.kv_caches[name], cache)
    assert prefill.leases.take_counts().released == 1
    stats = decode.side.take_stats()
    assert stats.data["bytes"] == 3 * 3 * H * T * 2 * D * 4
    assert stats.data["blocks"] == 3
    assert len(stats.data["seconds"]) == 1
    assert decode.side.take_stats() is None


def test_many_loads_at_once(prefill: Prefill, decode: Decode) -> None:
    decode.run(*(prefill.load(f"{block}", [block], [(block + 5) % N]) for block in range(N)))
    assert decode.failed == set()
    for name, cache in decode.kv_caches.items():
        assert torch.equal(cache.roll(-5, dims=0), prefill.kv_caches[name])
    assert len(prefill.leases) == 0


def test_a_lease_that_ended_before_the_read_did_voids_it(prefill: Prefill, decode: Decode) -> None:
    load = prefill.load("late", [1], [2])
    prefill.clock_skipped_s = LEASE_S
    decode.run(load)
    assert decode.failed == {"late"}
    assert decode.failures() == {"lease_ended": 1}


def test_a_lease_that_never_was_voids_the_read(prefill: Prefill, decode: Decode) -> None:
    decode.run(dataclasses.replace(prefill.load("forged", [1], [2]), lease_id="forged"))
    assert decode.failed == {"forged"}
    assert len(prefill.leases) == 1


def test_blocks_that_do_not_exist_fail_their_load_alone(prefill: Prefill, decode: Decode) -> None:
    decode.run(prefill.load("bad", [N], [2]), prefill.load("good", [1], [3]))
    assert decode.failed == {"bad"}
    assert decode.failures() == {"refused": 1}


def test_a_peer_that_is_gone_fails_the_load_in_time(prefill: Prefill) -> None:
    decode = Decode(load_timeout_s=0.3)
    load = prefill.load("gone", [1], [2])
    prefill.close()
    began = time.monotonic()
    decode.run(load)
    assert decode.failed == {"gone"}
    assert decode.failures() == {"deadline": 1}
    assert time.monotonic() - began < 2
    decode.side.close()


def test_block_transport_gone_but_control_alive(prefill: Prefill, decode: Decode) -> None:
    decode.run(prefill.load("first", [1], [2]))
    prefill.side.close()
    decode.run(prefill.load("second", [1], [2]))
    assert decode.failed == {"second"}
    assert decode.failures() == {"unreachable": 1}


def test_a_restarted_peer_on_the_same_port_is_greeted_again(decode: Decode) -> None:
    """The first load after the restart may fail; the next one must not."""
    first = Prefill()
    decode.run(first.load("before", [1], [2]))
    port = first.control.port
    first.close()
    second = Prefill(seed=7)
    load = second.load("after", [1], [2])
    old_welcome = decode.side._welcomes["127.0.0.1", port]
    decode.side._welcomes["127.0.0.1", second.control.port] = old_welcome
    decode.run(load)
    assert decode.failed == {"after"}
    decode.run(second.load("again", [1], [2]))
    assert decode.failed == {"after"}
    assert torch.equal(decode.kv_caches["layer.0"][2], second.kv_caches["layer.0"][1])
    second.close()


def test_a_peer_that_does_not_fit_is_refused(prefill: Prefill, caplog: pytest.LogCaptureFixture) -> None:
    side = worker("decode", caches(2, heads=2 * H))
    side.start_loads([prefill.load("misfit", [1], [2])])
    results: list[tuple[set[str], set[str]]] = []
    until(lambda: bool(results.append(side.take_ended()) or results[-1][0]), "the load did not end")
    assert results[-1] == ({"misfit"}, {"misfit"})
    assert side.take_stats().data["failures"] == {"refused": 1}
    assert "layout is" in caplog.text
    side.close()


def test_another_number_of_ranks_is_refused(prefill: Prefill, decode: Decode) -> None:
    endpoint = prefill.side.handshake().endpoint
    prefill.control._welcome = Welcome((endpoint, endpoint))
    decode.run(prefill.load("misfit", [1], [2]))
    assert decode.failures() == {"refused": 1}


def test_each_rank_reads_from_its_own() -> None:
    config = vllm_config_standin()
    config.parallel_config.rank = 3
    side = connector_worker.WorkerSide(settings("decode", tp_size=2), config, types.SimpleNamespace(num_blocks=N))
    assert side._rank == 1
    side.close()


@pytest.mark.parametrize("error", [RuntimeError("unforeseen"), MemoryError(), AssertionError()])
def test_an_unforeseen_error_still_ends_the_load(
    prefill: Prefill, decode: Decode, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*args: object) -> int:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(TcpTransport, "read", fail)
        decode.run(prefill.load("unlucky", [1], [2]))
    assert decode.failed == {"unlucky"}
    assert decode.failures() == {"other": 1}
    decode.run(prefill.load("next", [1], [2]))
    assert decode.failed == {"unlucky"}


def test_memory_that_p_reuses_during_the_read_voids_it(
    prefill: Prefill, decode: Decode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease expires while bytes move, and P computes another prompt into the blocks."""
    read = TcpTransport.read

    def slow_read(*args: Any) -> int:
        prefill.clock_skipped_s = LEASE_S
        prefill.leases.expire()
        prefill.kv_caches["layer.1"][1] = 0
        return read(*args)

    monkeypatch.setattr(TcpTransport, "read", slow_read)
    decode.run(prefill.load("overtaken", [1], [2]))
    assert decode.failed == {"overtaken"}


def test_a_peer_that_does_not_answer_delays_no_load_from_another(prefill: Prefill) -> None:
    decode = Decode(num_load_threads=1, load_timeout_s=3.0)
    stuck = Prefill(seed=3)
    stuck_serve, go_on = stuck.control._serve_one, threading.Event()
    stuck.control._serve_one = lambda: (go_on.wait(10), stuck_serve())[1]  # type: ignore[method-assign, func-returns-value]
    decode.side.start_loads([stuck.load("stuck-1", [1], [2]), stuck.load("stuck-2", [1], [3])])
    began = time.monotonic()
    decode.run(prefill.load("quick", [1], [4]))
    assert time.monotonic() - began < 1
    assert decode.ended == {"quick"}
    go_on.set()
    decode.wait_for({"stuck-1", "stuck-2"})
    assert decode.failed == set()
    stuck.close()
    decode.side.close()


def test_loads_that_waited_too_long_for_a_thread_end(prefill: Prefill, monkeypatch: pytest.MonkeyPatch) -> None:
    decode = Decode(num_load_threads=1, load_timeout_s=0.2)
    read = TcpTransport.read

    def slow_read(*args: Any) -> int:
        num_bytes = read(*args)
        time.sleep(0.25)
        return num_bytes

    monkeypatch.setattr(TcpTransport, "read", slow_read)
    decode.run(*(prefill.load(str(i), [1], [2]) for i in range(5)))
    assert decode.failed == {"0", "1", "2", "3", "4"}
    assert decode.failures() == {"deadline": 5}
    decode.side.close()


def test_no_loads_start_nothing(decode: Decode) -> None:
    decode.side.start_loads(())
    assert not decode.side._loaders
    assert decode.side.take_ended() == (set(), set())


def kv_threads() -> set[int | None]:
    return {thread.ident for thread in threading.enumerate() if thread.name.startswith("kv-")}


def test_close_ends_loads_under_way_and_every_thread() -> None:
    before = kv_threads()
    prefill, decode = Prefill(), Decode()
    decode.run(prefill.load("whole", [1], [2]))
    prefill.control.close()  # from now on nobody answers
    decode.side._welcomes.clear()
    decode.side.start_loads([prefill.load("cut short", [1], [2])])
    (loader,) = decode.side._loaders.values()
    until(lambda: loader._work_queue.empty(), "the load did not begin")
    began = time.monotonic()
    decode.side.close()
    until(lambda: decode.side.take_ended()[1] == {"cut short"}, "the load went on")
    prefill.side.close()
    until(lambda: kv_threads() <= before, "threads are left")
    assert time.monotonic() - began < 3


def test_a_decode_worker_serves_nothing(decode: Decode) -> None:
    assert decode.side.handshake().endpoint is None


def test_there_is_no_handshake_before_there_is_a_cache() -> None:
    side = connector_worker.WorkerSide(settings("both"), vllm_config_standin(), types.SimpleNamespace(num_blocks=N))
    assert side.handshake() is None
    side.close()


def test_handshake_and_loads_cross_vllms_pipes(prefill: Prefill) -> None:
    handshake = prefill.side.handshake()
    assert pickle.loads(pickle.dumps(handshake)) == handshake  # noqa: S301
    metadata = connector_scheduler.LoadMetadata((prefill.load("a", [1], [2]),))
    assert pickle.loads(pickle.dumps(metadata)) == metadata  # noqa: S301


def fingerprint(**changes: Any) -> protocol.Fingerprint:
    config = vllm_config_standin()
    for path, value in changes.items():
        holder, name = path.split("__")
        setattr(getattr(config, holder), name, value)
    result: protocol.Fingerprint = connector_worker._fingerprint(config, settings(), "layout")
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

"""What the tests of the connector need of vLLM, whose import costs seconds and, under our rules, warns."""

import contextlib
import dataclasses
import itertools
import random
import threading
import time
import types
import warnings
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's and vLLM's own, at import
    import vllm.v1.engine.core as engine_core
    from prometheus_client import Counter, Gauge, Histogram
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1 import kv_cache_interface
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec, SlidingWindowSpec
    from vllm.v1.request import Request, RequestStatus

    from kv_transfer.connector import decode_scheduler, omni_connector, prefill_scheduler
    from kv_transfer.connector import metrics as connector_metrics
    from kv_transfer.connector import scheduler as connector_scheduler
    from kv_transfer.connector import worker as connector_worker
    from kv_transfer.decode.block_reader import Load
    from kv_transfer.prefill.progress import PrefillStep
from kv_transfer.connector.settings import ConnectorSettings
from kv_transfer.prefill.lease import LeaseTable
from kv_transfer.protocol import Fingerprint, RankEndpoint, RankInfo, RankLayout, TcpOffer
from tests.kv_transfer.rank_peers import KEY

__all__ = [
    "BLOCK_SIZE",
    "HAND_OFF",
    "Counter",
    "Engine",
    "Gauge",
    "Histogram",
    "KVCacheConfig",
    "Load",
    "PrefillStep",
    "Request",
    "RequestStatus",
    "cache_config",
    "connector_metrics",
    "connector_scheduler",
    "connector_worker",
    "decode_scheduler",
    "engine_core",
    "handshake",
    "kv_cache_interface",
    "lease_id",
    "new_request",
    "omni_connector",
    "prefill_scheduler",
    "prompt_of",
    "settings",
    "silent",
    "vllm_config_standin",
]

BLOCK_SIZE = 16  # tokens
HAND_OFF = {"do_remote_decode": True}
FINGERPRINT = Fingerprint(vllm_version="0.32.0", model="m", kv_cache_dtype="bfloat16")

init_none_hash(sha256)
_block_hasher = get_request_block_hasher(BLOCK_SIZE, sha256)
_request_numbers = itertools.count()


def settings(role: str = "both", **changes: Any) -> ConnectorSettings:
    fields: dict[str, Any] = {
        "engine_id": "engine",
        "is_producer": role in ("prefill", "both"),
        "is_consumer": role in ("decode", "both"),
        "block_size": BLOCK_SIZE,
        "tp_size": 1,
        "pp_size": 1,
        "key": KEY,
    }
    return ConnectorSettings(**(fields | changes))


def handshake(rank: int = 0) -> "connector_worker.WorkerHandshake":
    endpoint = RankEndpoint("127.0.0.1", 9000 + rank, "run")
    layout = RankLayout(block_sizes=(BLOCK_SIZE,), layers=())
    return connector_worker.WorkerHandshake(
        RankInfo(endpoint=endpoint, layout=layout, offers=(TcpOffer(),)), FINGERPRINT
    )


def cache_config(
    num_blocks: int = 64,
    windows: Sequence[int | None] = (None,),
    *,
    num_heads: int = 2,
    head_size: int = 8,
    layers_per_group: int = 1,
) -> KVCacheConfig:
    """A group for each window (tokens; None: full attention)."""
    groups = []
    names = (f"layers.{index}.attn" for index in itertools.count())
    for window in windows:
        fields: dict[str, Any] = {
            "block_size": BLOCK_SIZE,
            "num_kv_heads": num_heads,
            "head_size": head_size,
            "dtype": torch.float32,
        }
        spec = FullAttentionSpec(**fields) if window is None else SlidingWindowSpec(**fields, sliding_window=window)
        groups.append(KVCacheGroupSpec(list(itertools.islice(names, layers_per_group)), spec))
    return KVCacheConfig(num_blocks, [], groups)


def prompt_of(num_tokens: int, seed: int = 1) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(num_tokens)]


def new_request(prompt: list[int], params: Any = None, **fields: Any) -> Request:
    """vLLM's own request, as the engine makes it of what the api server sends."""
    return Request(
        request_id=f"request-{next(_request_numbers)}",
        prompt_token_ids=prompt,
        sampling_params=SamplingParams(max_tokens=1, extra_args={"kv_transfer_params": params}),
        pooling_params=None,
        block_hasher=_block_hasher,
        **fields,
    )


def lease_id(params: dict[str, Any]) -> str:
    value: str = params["omni"]["lease_id"]
    return value


class Engine:
    """vLLM's KV cache manager and the connector's scheduler half, called in the order of vLLM's scheduler.

    Args:
        handshakes: of its workers; default: stand-ins.
        find_engine: as a real one does, which takes long.
    """

    def __init__(
        self,
        role: str,
        *,
        num_blocks: int = 64,
        windows: Sequence[int | None] = (None,),
        config: KVCacheConfig | None = None,
        handshakes: "Sequence[connector_worker.WorkerHandshake] | None" = None,
        find_engine: bool = False,
        **changes: Any,
    ) -> None:
        config = config or cache_config(num_blocks, windows)
        self.manager = KVCacheManager(
            config,
            max_model_len=config.num_blocks * BLOCK_SIZE,
            scheduler_block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
        )
        self.pool = self.manager.block_pool
        self.settings = settings(role, **changes)
        self.side: Any = connector_scheduler.SchedulerSide(self.settings, config)
        self.side.bind_cache(self.manager)
        self.clock_skipped_s = 0.0
        if self.side._prefill is not None:
            self.leases._clock = lambda: time.monotonic() + self.clock_skipped_s
        with contextlib.ExitStack() as patches:
            if not find_engine:
                patches.enter_context(mock.patch.object(prefill_scheduler, "find_wake_up"))
            self.side.workers_ready(handshakes or [handshake(rank) for rank in range(self.settings.num_ranks)])

    @property
    def leases(self) -> LeaseTable:
        """P's."""
        leases: LeaseTable = self.side._prefill._leases
        return leases

    @property
    def port(self) -> int:
        """P's control port."""
        port: int = self.side._prefill._control.port
        return port

    @property
    def decode(self) -> Any:
        return self.side._decode

    @property
    def num_free(self) -> int:
        num_free: int = self.pool.get_num_free_blocks()
        return num_free

    def check_pool(self) -> None:
        """The free list holds each block that nobody refers to, once."""
        free = [block.block_id for block in self.pool.free_block_queue.get_all_free_blocks()]
        assert len(free) == len(set(free)) == self.num_free
        unused = {b.block_id for b in self.pool.blocks if b.ref_cnt == 0 and not b.is_null}
        assert set(free) == unused
        assert all(block.ref_cnt >= 0 for block in self.pool.blocks if not block.is_null)

    def block_ids(self, request: Request) -> tuple[list[int], ...]:
        block_ids: tuple[list[int], ...] = self.manager.get_block_ids(request.request_id)
        return block_ids

    def step(self, **num_scheduled_tokens: int) -> "connector_worker.StepMetadata":
        """What the workers are told with the next step. By request id."""
        output = dataclasses.replace(SchedulerOutput.make_empty(), num_scheduled_tokens=num_scheduled_tokens)
        metadata: connector_worker.StepMetadata = self.side.take_step(output)
        return metadata

    def finish(self, request: Request, status: RequestStatus) -> dict[str, Any] | None:
        request.status = status
        self.manager.remove_skipped_blocks(
            request_id=request.request_id,
            processed_computed_tokens=request.num_computed_tokens,
            num_prompt_tokens=request.num_prompt_tokens,
        )
        tables = self.manager.get_block_ids_for_computed_tokens(
            request_id=request.request_id, num_computed_tokens=request.num_computed_tokens
        )
        params: dict[str, Any] | None = self.side.request_finished(request, tables)
        self.manager.free(request)
        return params

    def compute(self, request: Request, num_tokens: int) -> "connector_worker.StepMetadata":
        """The next so many tokens of a prompt."""
        computed_blocks, num_cached = None, 0
        if request.num_computed_tokens == 0:
            computed_blocks, num_cached, _ = self.manager.get_computed_blocks(request)
        blocks = self.manager.allocate_slots(request, num_tokens - num_cached, num_cached, computed_blocks)
        assert blocks is not None
        request.num_computed_tokens += num_cached
        metadata = self.step(**{request.request_id: num_tokens - num_cached})
        request.num_computed_tokens += num_tokens - num_cached
        return metadata

    def preempt(self, request: Request) -> None:
        self.manager.free(request)
        request.num_computed_tokens = 0
        request.num_preemptions += 1

    def prefill(self, request: Request) -> dict[str, Any] | None:
        """Compute a whole prompt and finish, as with max_tokens=1."""
        self.side.on_new_request(request)
        self.compute(request, request.num_prompt_tokens)
        request.append_output_token_ids(7)
        return self.finish(request, RequestStatus.FINISHED_LENGTH_CAPPED)

    def hand_off(self, prompt: list[int], **fields: Any) -> dict[str, Any]:
        params = self.prefill(new_request(prompt, HAND_OFF, **fields))
        assert params is not None
        return params

    def arrives(self, prompt: list[int], params: Any, **fields: Any) -> Request:
        request = new_request(prompt, params, **fields)
        self.side.on_new_request(request)
        return request

    def admit(self, request: Request) -> tuple[Load, ...]:
        """Schedule a request for the first time; returns the loads that begin with the step."""
        computed_blocks, num_local, _ = self.manager.get_computed_blocks(request)
        num_external, load_async = self.side.num_tokens_to_load(request, num_local)
        assert self.manager.allocate_slots(
            request,
            0 if load_async else request.num_prompt_tokens - num_local,
            num_local,
            computed_blocks,
            num_external_computed_tokens=num_external,
            delay_cache_blocks=load_async,
        )
        self.side.blocks_allocated(request, self.block_ids(request), num_external)
        loads: tuple[Load, ...] = self.step().loads
        return loads

    def close(self) -> None:
        self.side.close()


@contextlib.contextmanager
def silent(prefill: Engine) -> Iterator[None]:
    """P's control port takes messages and does not answer, until the end of this."""
    control, go_on = prefill.side._prefill._control, threading.Event()
    serve = control._serve_one

    def serve_late() -> None:
        go_on.wait(20)
        serve()

    control._serve_one = serve_late
    try:
        yield
    finally:
        go_on.set()


def vllm_config_standin(*, rank: int = 0, tp_size: int = 1, num_heads: int = 2, **extra: Any) -> Any:
    """The fields of vLLM's configuration that the connector reads; the real one wants a model."""
    layer = types.SimpleNamespace(isa="vec")
    layers = {f"layers.{index}.attn": layer for index in range(8)}
    return types.SimpleNamespace(
        kv_transfer_config=types.SimpleNamespace(
            engine_id="engine", is_kv_producer=True, is_kv_consumer=True, kv_connector_extra_config=extra
        ),
        parallel_config=types.SimpleNamespace(
            pipeline_parallel_size=1,
            decode_context_parallel_size=1,
            prefill_context_parallel_size=1,
            tensor_parallel_size=tp_size,
            rank=rank,
        ),
        cache_config=types.SimpleNamespace(block_size=BLOCK_SIZE, cache_dtype="auto"),
        compilation_config=types.SimpleNamespace(static_forward_context=layers),
        model_config=types.SimpleNamespace(
            hf_config=types.SimpleNamespace(to_dict=lambda: {"_name_or_path": "/somewhere", "hidden_size": 8}),
            model_arch_config=types.SimpleNamespace(total_num_kv_heads=num_heads, per_layer_overrides=None),
            quantization=None,
            dtype=torch.bfloat16,
        ),
    )

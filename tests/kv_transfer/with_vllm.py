"""What the tests of the connector need of vLLM, whose import costs seconds and, under our rules, warns."""

import contextlib
import itertools
import types
import warnings
from typing import Any
from unittest import mock

import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's and vLLM's own, at import
    import vllm.v1.engine.core as engine_core
    from prometheus_client import Counter, Gauge, Histogram
    from vllm.sampling_params import SamplingParams
    from vllm.utils.hashing import sha256
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
    from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
    from vllm.v1.request import Request, RequestStatus

    from kv_transfer import connector, connector_metrics, connector_scheduler, connector_worker
from kv_transfer.connector_settings import ConnectorSettings
from kv_transfer.protocol import Fingerprint, RankEndpoint

__all__ = [
    "BLOCK_SIZE",
    "Counter",
    "Engine",
    "Gauge",
    "Histogram",
    "Request",
    "RequestStatus",
    "connector",
    "connector_metrics",
    "connector_scheduler",
    "connector_worker",
    "engine_core",
    "handshake",
    "new_request",
    "settings",
    "vllm_config_standin",
]

BLOCK_SIZE = 16  # tokens
FINGERPRINT = Fingerprint(
    vllm_version="0.32.0", model="m", kv_cache_dtype="bfloat16", block_size=BLOCK_SIZE, tp_size=1, layout="l"
)

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
    }
    return ConnectorSettings(**(fields | changes))


def handshake(rank: int = 0) -> "connector_worker.WorkerHandshake":
    return connector_worker.WorkerHandshake(RankEndpoint("127.0.0.1", 9000 + rank, "run"), FINGERPRINT)


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


class Engine:
    """vLLM's KV cache manager and the connector's scheduler half, called in the order of vLLM's scheduler."""

    def __init__(self, role: str, *, num_blocks: int = 64, find_engine: bool = False, **changes: Any) -> None:
        spec = FullAttentionSpec(block_size=BLOCK_SIZE, num_kv_heads=1, head_size=8, dtype=torch.float32)
        self.manager = KVCacheManager(
            KVCacheConfig(num_blocks, [], [KVCacheGroupSpec(["layer"], spec)]),
            max_model_len=num_blocks * BLOCK_SIZE,
            scheduler_block_size=BLOCK_SIZE,
            hash_block_size=BLOCK_SIZE,
        )
        self.pool = self.manager.block_pool
        self.side = connector_scheduler.SchedulerSide(settings(role, **changes))
        self.side.bind_block_pool(self.pool)
        tp_size = changes.get("tp_size", 1)
        with contextlib.ExitStack() as patches:
            if not find_engine:  # which takes long
                patches.enter_context(mock.patch.object(connector_scheduler, "_find_wake_up"))
            self.side.workers_ready([handshake(rank) for rank in range(tp_size)])

    @property
    def num_free(self) -> int:
        num_free: int = self.pool.get_num_free_blocks()
        return num_free

    def block_ids(self, request: Request) -> list[int]:
        block_ids: list[int] = self.manager.get_block_ids(request.request_id)[0]
        return block_ids

    def finish(self, request: Request, status: RequestStatus) -> dict[str, Any] | None:
        request.status = status
        params = self.side.request_finished(request, self.block_ids(request))
        self.manager.free(request)
        return params

    def prefill(self, request: Request) -> dict[str, Any] | None:
        """Compute a whole prompt and finish, as with max_tokens=1."""
        self.side.on_new_request(request)
        computed_blocks, num_computed, _ = self.manager.get_computed_blocks(request)
        num_new = request.num_prompt_tokens - num_computed
        assert self.manager.allocate_slots(request, num_new, num_computed, computed_blocks) is not None
        request.num_computed_tokens = request.num_prompt_tokens
        request.append_output_token_ids(7)
        return self.finish(request, RequestStatus.FINISHED_LENGTH_CAPPED)

    def admit(self, request: Request) -> "tuple[connector_worker.Load, ...]":
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
        loads: tuple[connector_worker.Load, ...] = self.side.take_loads().loads
        return loads

    def close(self) -> None:
        self.side.close()


def vllm_config_standin(**extra: Any) -> Any:
    """The fields of vLLM's configuration that the connector reads; the real one wants a model."""
    return types.SimpleNamespace(
        kv_transfer_config=types.SimpleNamespace(
            engine_id="engine", is_kv_producer=True, is_kv_consumer=True, kv_connector_extra_config=extra
        ),
        parallel_config=types.SimpleNamespace(
            pipeline_parallel_size=1, decode_context_parallel_size=1, tensor_parallel_size=1, rank=0
        ),
        cache_config=types.SimpleNamespace(block_size=BLOCK_SIZE, cache_dtype="auto"),
        model_config=types.SimpleNamespace(
            hf_config=types.SimpleNamespace(to_dict=lambda: {"_name_or_path": "/somewhere", "hidden_size": 8}),
            quantization=None,
            dtype=torch.bfloat16,
        ),
    )

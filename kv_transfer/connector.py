"""`OmniConnector`: vLLM's KV connector interface, handed on to its two halves.

vLLM makes one connector in the scheduler's process and one in every worker. The scheduler's half decides which blocks
are kept, for whom and until when (`connector_scheduler`); the worker's half moves bytes (`connector_worker`).
"""

from functools import cached_property
from typing import TYPE_CHECKING, Any

from vllm.distributed.kv_transfer.kv_connector.v1.base import (
    KVConnectorBase_V1,
    KVConnectorHandshakeMetadata,
    KVConnectorMetadata,
    KVConnectorRole,
    KVConnectorTransferResults,
)

from kv_transfer.connector_metrics import TransferPromMetrics, TransferStats
from kv_transfer.connector_scheduler import LoadMetadata, SchedulerSide
from kv_transfer.connector_settings import ConnectorSettings
from kv_transfer.connector_worker import WorkerHandshake, WorkerSide

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


class OmniConnector(KVConnectorBase_V1):
    """Pulls the prompt's KV blocks from the prefill engine into the decode engine's KV cache."""

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._settings = ConnectorSettings.of(vllm_config)
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler_side: SchedulerSide | None = SchedulerSide(self._settings)
            self._worker_side: WorkerSide | None = None
        else:
            self._scheduler_side = None
            self._worker_side = WorkerSide(self._settings, vllm_config, kv_cache_config)

    @cached_property
    def _scheduler(self) -> SchedulerSide:
        assert self._scheduler_side is not None
        return self._scheduler_side

    @cached_property
    def _worker(self) -> WorkerSide:
        assert self._worker_side is not None
        return self._worker_side

    # --- scheduler

    def bind_gpu_block_pool(self, gpu_block_pool: "BlockPool") -> None:
        self._scheduler.bind_block_pool(gpu_block_pool)

    def set_xfer_handshake_metadata(self, metadata: dict[int, KVConnectorHandshakeMetadata]) -> None:
        handshakes = {rank: data for rank, data in metadata.items() if isinstance(data, WorkerHandshake)}
        self._scheduler.workers_ready([handshakes[rank] for rank in sorted(handshakes)])

    def on_new_request(self, request: "Request") -> None:
        self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduler.num_tokens_to_load(request, num_computed_tokens)

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        self._scheduler.blocks_allocated(request, blocks.get_block_ids()[0], num_external_tokens)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        return self._scheduler.take_loads()

    def has_pending_push_work(self) -> bool:
        return self._scheduler.wants_a_step()

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        # Never True: blocks outlive the request by reference, not by keeping the request (see SchedulerSide).
        return False, self._scheduler.request_finished(request, block_ids)

    # --- worker

    def register_kv_caches(self, kv_caches: "dict[str, torch.Tensor]") -> None:
        self._worker.register_kv_caches(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._worker.handshake()

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, LoadMetadata)
        self._worker.start_loads(metadata.loads)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        ended, failed = self._worker.take_ended()
        return KVConnectorTransferResults(finished_recving=ended, failed_recving=failed)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads end between steps, never within one."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: "torch.Tensor", attn_metadata: "AttentionMetadata", **kwargs: Any
    ) -> None:
        """Nothing is saved: the blocks are read where they lie."""

    def wait_for_save(self) -> None:
        """See `save_kv_layer`."""

    # --- both

    def get_kv_connector_stats(self) -> "KVConnectorStats | None":
        side = self._scheduler_side or self._worker_side
        assert side is not None
        return side.take_stats()

    def shutdown(self) -> None:
        side = self._scheduler_side or self._worker_side
        assert side is not None
        side.close()

    @classmethod
    def build_kv_connector_stats(cls, data: dict[str, Any] | None = None) -> "KVConnectorStats | None":
        return TransferStats(data=data) if data else TransferStats()

    @classmethod
    def build_prom_metrics(
        cls,
        vllm_config: "VllmConfig",
        metric_types: dict[type[Any], type[Any]],
        labelnames: list[str],
        per_engine_labelvalues: dict[int, list[object]],
    ) -> "KVConnectorPromMetrics | None":
        return TransferPromMetrics(vllm_config, metric_types, labelnames, per_engine_labelvalues)

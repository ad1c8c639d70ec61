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
    SupportsHMA,
)

from kv_transfer.connector.metrics import TransferPromMetrics, TransferStats
from kv_transfer.connector.scheduler import SchedulerSide
from kv_transfer.connector.settings import ConnectorSettings
from kv_transfer.connector.worker import StepMetadata, WorkerHandshake, WorkerSide

if TYPE_CHECKING:
    from contextlib import AbstractContextManager

    import torch
    from vllm.config import VllmConfig
    from vllm.distributed.kv_transfer.kv_connector.v1.metrics import KVConnectorPromMetrics, KVConnectorStats
    from vllm.forward_context import ForwardContext
    from vllm.v1.attention.backend import AttentionMetadata
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks, KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.outputs import KVConnectorOutput
    from vllm.v1.request import Request


class OmniConnector(KVConnectorBase_V1, SupportsHMA):
    """Pulls the prompt's KV blocks from the prefill engine into the decode engine's KV cache."""

    def __init__(self, vllm_config: "VllmConfig", role: KVConnectorRole, kv_cache_config: "KVCacheConfig") -> None:
        super().__init__(vllm_config, role, kv_cache_config)
        self._settings = ConnectorSettings.of(vllm_config)
        if role is KVConnectorRole.SCHEDULER:
            self._scheduler_side: SchedulerSide | None = SchedulerSide(self._settings, kv_cache_config)
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

    def bind_kv_cache_manager(self, kv_cache_manager: "KVCacheManager") -> None:
        super().bind_kv_cache_manager(kv_cache_manager)
        self._scheduler.bind_cache(kv_cache_manager)

    def set_xfer_handshake_metadata_pp_aware(
        self, metadata: dict[tuple[int, int], KVConnectorHandshakeMetadata]
    ) -> None:
        """By pipeline-parallel and tensor-parallel rank."""
        handshakes = {rank: data for rank, data in metadata.items() if isinstance(data, WorkerHandshake)}
        self._scheduler.workers_ready([handshakes[rank] for rank in sorted(handshakes)])

    def on_new_request(self, request: "Request") -> None:
        self._scheduler.on_new_request(request)

    def get_num_new_matched_tokens(self, request: "Request", num_computed_tokens: int) -> tuple[int | None, bool]:
        return self._scheduler.num_tokens_to_load(request, num_computed_tokens)

    def get_loaded_kv_cache_group_ids(self, request: "Request") -> tuple[int, ...]:
        return self._scheduler.group_ids

    def update_state_after_alloc(self, request: "Request", blocks: "KVCacheBlocks", num_external_tokens: int) -> None:
        self._scheduler.blocks_allocated(request, blocks.get_block_ids(), num_external_tokens)

    def build_connector_meta(self, scheduler_output: "SchedulerOutput") -> KVConnectorMetadata:
        return self._scheduler.take_step(scheduler_output)

    def has_pending_push_work(self) -> bool:
        return self._scheduler.wants_a_step()

    def update_connector_output(self, connector_output: "KVConnectorOutput") -> None:
        self._scheduler.loads_ended(connector_output.finished_recving or ())

    def request_finished(self, request: "Request", block_ids: list[int]) -> tuple[bool, dict[str, Any] | None]:
        return self.request_finished_all_groups(request, (block_ids,))

    def request_finished_all_groups(
        self, request: "Request", block_ids: tuple[list[int], ...]
    ) -> tuple[bool, dict[str, Any] | None]:
        # Never True: blocks outlive the request by reference, not by keeping the request (see SchedulerSide).
        return False, self._scheduler.request_finished(request, block_ids)

    # --- worker

    def get_mem_pool_context(self) -> "AbstractContextManager[None] | None":
        return self._worker.memory_pool()

    def register_kv_caches(self, kv_caches: "dict[str, torch.Tensor]") -> None:
        self._worker.register_kv_caches(kv_caches)

    def get_handshake_metadata(self) -> KVConnectorHandshakeMetadata | None:
        return self._worker.handshake()

    def bind_connector_metadata(self, connector_metadata: KVConnectorMetadata) -> None:
        super().bind_connector_metadata(connector_metadata)
        assert isinstance(connector_metadata, StepMetadata)
        self._worker.begin_step(connector_metadata)

    def start_load_kv(self, forward_context: "ForwardContext", **kwargs: Any) -> None:
        metadata = self._get_connector_metadata()
        assert isinstance(metadata, StepMetadata)
        self._worker.start_loads(metadata.loads)

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        ended, failed = self._worker.take_ended()
        return KVConnectorTransferResults(finished_recving=ended, failed_recving=failed)

    def wait_for_layer_load(self, layer_name: str) -> None:
        """Loads end between steps, never within one."""

    def save_kv_layer(
        self, layer_name: str, kv_layer: "torch.Tensor", attn_metadata: "AttentionMetadata", **kwargs: Any
    ) -> None:
        """Nothing is saved: the blocks are read where they lie. But followers may now read this layer's."""
        self._worker.layer_done(layer_name)

    def wait_for_save(self) -> None:
        """See `save_kv_layer`."""
        self._worker.step_done()

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

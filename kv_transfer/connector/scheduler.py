"""The scheduler's half of the connector: P's part and D's, of which an engine may have both."""

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from kv_transfer.connector.cache_group import cache_groups
from kv_transfer.connector.decode_scheduler import DecodeScheduler
from kv_transfer.connector.metrics import TransferStats
from kv_transfer.connector.prefill_scheduler import PrefillScheduler
from kv_transfer.connector.settings import ConnectorSettings
from kv_transfer.connector.worker import StepMetadata, WorkerHandshake

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request


class SchedulerSide:
    """Raises ValueError when the model keeps what cannot be handed off."""

    def __init__(self, settings: ConnectorSettings, kv_cache_config: "KVCacheConfig") -> None:
        groups = cache_groups(kv_cache_config)
        self.group_ids = tuple(range(len(groups)))
        self._prefill = PrefillScheduler(settings, groups) if settings.is_producer else None
        self._decode = DecodeScheduler(settings, groups) if settings.is_consumer else None
        self._stats = TransferStats()

    def bind_cache(self, cache: "KVCacheManager") -> None:
        if self._prefill is not None:
            self._prefill.bind_cache(cache)

    def workers_ready(self, handshakes: Sequence[WorkerHandshake]) -> None:
        if self._prefill is not None:
            self._prefill.workers_ready(handshakes)

    def on_new_request(self, request: "Request") -> None:
        params = request.kv_transfer_params
        if params is not None and not isinstance(params, dict):
            # A client can put anything there (`vllm_xargs`), and vLLM's scheduler dies of what is not a dict.
            request.kv_transfer_params = None
            return
        if self._prefill is not None:
            self._prefill.on_new_request(request)
        if self._decode is not None:
            self._decode.on_new_request(request)

    def num_tokens_to_load(self, request: "Request", num_computed_tokens: int) -> tuple[int, bool]:
        if self._decode is None:
            return 0, False
        return self._decode.num_tokens_to_load(request, num_computed_tokens)

    def blocks_allocated(self, request: "Request", block_ids: tuple[list[int], ...], num_tokens: int) -> None:
        if self._decode is not None:
            self._decode.blocks_allocated(request, block_ids, num_tokens)

    def request_finished(self, request: "Request", block_ids: tuple[list[int], ...]) -> dict[str, Any] | None:
        """Returns the hand-off parameters for the response, if there are any."""
        if self._decode is not None:
            self._decode.request_finished(request)
        return self._prefill.request_finished(request, block_ids) if self._prefill is not None else None

    def wants_a_step(self) -> bool:
        return self._prefill is not None and self._prefill.wants_a_step()

    def take_step(self, output: "SchedulerOutput") -> StepMetadata:
        """What the workers are told with the coming step."""
        loads, cancelled = self._decode.take_loads() if self._decode is not None else ((), ())
        prefills, ended = self._prefill.take_steps(output) if self._prefill is not None else ((), ())
        return StepMetadata(loads, cancelled, prefills, ended)

    def loads_ended(self, request_ids: Iterable[str]) -> None:
        if self._decode is not None:
            self._decode.loads_ended(request_ids)

    def take_stats(self) -> TransferStats | None:
        if self._prefill is not None:
            self._stats.record_leases(*self._prefill.take_lease_counts())
            self._stats.record_dropped("control", self._prefill.take_num_dropped())
        if self._decode is not None:
            for reason in self._decode.take_failures():
                self._stats.record_failure(reason)
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, TransferStats()
        return stats

    def close(self) -> None:
        if self._decode is not None:
            self._decode.close()
        if self._prefill is not None:
            self._prefill.close()

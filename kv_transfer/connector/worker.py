"""The worker's half of the connector: P's workers serve their KV memory, D's workers read from it."""

import hashlib
import json
import logging
import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata, KVConnectorMetadata

from kv_transfer.connector.metrics import TransferStats
from kv_transfer.connector.settings import ConnectorSettings
from kv_transfer.decode.block_reader import BlockReader, Load, LoadState
from kv_transfer.errors import CancelledError, KVTransferError, LeaseEndedError
from kv_transfer.memory.layout import engine_rank_layout
from kv_transfer.memory.regions import Memory, memory_of
from kv_transfer.memory.shared_pool import SharedPool
from kv_transfer.prefill.progress import PrefillProgressTable, PrefillStep
from kv_transfer.protocol import Fingerprint, FollowPrefill, RankInfo
from kv_transfer.rank_server import RankClient, RankServer
from kv_transfer.transports.choice import Transports

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)

_MAX_FOLLOWERS = 256  # of one P, at once


@dataclass
class StepMetadata(KVConnectorMetadata):
    """Scheduler → workers, with each step."""

    loads: tuple[Load, ...]  # that begin
    cancelled: tuple[str, ...]  # request ids whose loads nobody waits for any more
    prefills: tuple[PrefillStep, ...]  # what is computed of prompts that may be followed
    transfers_ended: tuple[str, ...]  # that are not to be followed any more


@dataclass(frozen=True)
class WorkerHandshake(KVConnectorHandshakeMetadata):
    """Worker → scheduler, through vLLM's own pipe: how peers read this rank's KV (P only), and whose KV it is."""

    info: RankInfo | None
    fingerprint: Fingerprint


class WorkerSide:
    def __init__(
        self, settings: ConnectorSettings, vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig"
    ) -> None:
        self._settings = settings
        self._vllm_config = vllm_config
        self._kv_cache_config = kv_cache_config
        self._rank: int = vllm_config.parallel_config.rank % settings.num_ranks
        self._fingerprint = _fingerprint(vllm_config)
        self._info: RankInfo | None = None
        self._kv_caches: Mapping[str, torch.Tensor] = {}  # kept, as the transports have only their addresses
        self._memory: Memory | None = None
        self._pool: SharedPool | None = None
        self._server: RankServer | None = None
        self._client = RankClient(settings.key)
        self._reader: BlockReader | None = None
        self._progress: PrefillProgressTable | None = None
        self._lock = threading.Lock()
        # Two for each P (the second for followers, which mostly wait), so that one that does not answer delays no load
        # from another.
        self._loaders: dict[tuple[str, int], tuple[ThreadPoolExecutor, ThreadPoolExecutor]] = {}
        self._under_way: dict[str, LoadState] = {}  # by request id
        self._ended: set[str] = set()
        self._failed: set[str] = set()
        self._num_peers_left_alone = 0  # as last reported
        self._stats = TransferStats()

    def memory_pool(self) -> "AbstractContextManager[None] | None":
        """Where vLLM is to allocate its KV cache, so that readers on this host need one copy; None: where it likes."""
        from vllm.platforms import current_platform

        if not current_platform.is_cpu() or not self._settings.is_producer:
            return None
        self._pool = SharedPool()
        return self._pool.allocating()

    def register_kv_caches(self, kv_caches: "Mapping[str, torch.Tensor]") -> None:
        self._kv_caches = kv_caches
        self._memory = memory = memory_of(kv_caches)
        layout = engine_rank_layout(self._vllm_config, self._kv_cache_config, kv_caches, memory)
        if self._settings.is_producer:
            self._server = RankServer(self._settings.listen_host, self._settings.key)
        transports = Transports(self._settings, memory, self._pool, self._server, self._client)
        if self._server is not None:
            self._progress = PrefillProgressTable(layer.name for layer in layout.layers)
            self._server.handle(FollowPrefill, self._progress.serve)
            self._info = RankInfo(endpoint=self._server.endpoint, layout=layout, offers=transports.offers())
            self._server.start()
        self._reader = BlockReader(
            self._settings.key,
            self._fingerprint,
            layout,
            transports,
            self._client,
            rank=self._rank,
            num_ranks=self._settings.num_ranks,
            replica_offset=zlib.crc32(self._settings.engine_id.encode()),
        )
        logger.info("KV cache: %d MiB in %d regions", memory.num_bytes >> 20, len(memory.regions))

    def handshake(self) -> WorkerHandshake | None:
        return None if self._reader is None else WorkerHandshake(self._info, self._fingerprint)

    def begin_step(self, metadata: StepMetadata) -> None:
        """Before the forward pass."""
        with self._lock:
            for request_id in metadata.cancelled:
                if (state := self._under_way.get(request_id)) is not None:
                    state.is_cancelled = True
        if self._progress is not None and (metadata.prefills or metadata.transfers_ended):
            self._progress.begin_step(metadata.prefills, metadata.transfers_ended)

    def layer_done(self, name: str) -> None:
        """Within the forward pass: a layer's keys and values are written."""
        if self._progress is not None:
            self._progress.layer_done(name, self._ready())

    def step_done(self) -> None:
        """After the forward pass."""
        if self._progress is not None:
            self._progress.step_done(self._ready())

    def start_loads(self, loads: Sequence[Load]) -> None:
        """Begin to read in the background; the results come with `take_ended`."""
        now = time.monotonic()
        for load in loads:
            # A prompt that is still being computed takes as long as it takes: P tells that it is alive.
            limit_s = self._settings.max_lease_s if load.is_followed else self._settings.load_timeout_s
            state = LoadState(now + limit_s, self._settings.load_timeout_s)
            with self._lock:
                self._under_way[load.request_id] = state
                if load.peer not in self._loaders:
                    self._loaders[load.peer] = (
                        ThreadPoolExecutor(self._settings.num_load_threads, thread_name_prefix="kv-load"),
                        ThreadPoolExecutor(_MAX_FOLLOWERS, thread_name_prefix="kv-follow"),
                    )
                self._loaders[load.peer][load.is_followed].submit(self._load, load, state)

    def take_ended(self) -> tuple[set[str], set[str]]:
        """Request ids of the loads that ended since the last call, and those among them that failed."""
        with self._lock:
            ended, self._ended = self._ended, set()
            failed, self._failed = self._failed, set()
        return ended, failed

    def take_stats(self) -> TransferStats | None:
        with self._lock:
            if self._server is not None:
                self._stats.record_dropped("rank_server", self._server.dropped.take())
            if self._reader is not None and self._reader.num_peers_left_alone != self._num_peers_left_alone:
                self._num_peers_left_alone = self._reader.num_peers_left_alone
                self._stats.record_peers_left_alone(self._num_peers_left_alone)
            if self._stats.is_empty():
                return None
            stats, self._stats = self._stats, TransferStats()
        return stats

    def close(self) -> None:
        with self._lock:
            loaders = [loader for pair in self._loaders.values() for loader in pair]
        for loader in loaders:
            loader.shutdown(wait=False, cancel_futures=True)
        if self._progress is not None:
            self._progress.close()
        self._client.close()
        if self._server is not None:
            self._server.close()
        if self._reader is not None:
            self._reader.close()
        if self._pool is not None:
            self._pool.close()

    def _load(self, load: Load, state: LoadState) -> None:
        assert self._reader is not None
        start = time.monotonic()
        try:
            self._reader.read(load, state)
        except Exception as error:  # whatever it is, the scheduler waits for an end
            self._load_failed(load, error)
            return
        with self._lock:
            self._stats.record_load(state.num_bytes, load.num_blocks, time.monotonic() - start)
            self._under_way.pop(load.request_id, None)
            self._ended.add(load.request_id)

    def _load_failed(self, load: Load, error: Exception) -> None:
        reason = error.reason if isinstance(error, KVTransferError) else KVTransferError.reason
        unforeseen = None if isinstance(error, KVTransferError) else error
        source = f"{load.host}:{load.port}"
        logger.warning(
            "KV load of %s from %s failed (%s): %s", load.request_id, source, reason, error, exc_info=unforeseen
        )
        if not isinstance(error, LeaseEndedError | CancelledError):
            self._forget(load.peer)
        with self._lock:
            self._stats.record_failure(reason)
            self._under_way.pop(load.request_id, None)
            self._failed.add(load.request_id)
            self._ended.add(load.request_id)

    def _ready(self) -> Callable[[], None] | None:
        """For memory on a device, which runs behind: what waits until it has done all that it was told so far."""
        if self._memory is None or self._memory.is_on_host:
            return None
        import torch

        event = torch.Event(device=self._memory.tensors[0].device)
        event.record()
        wait: Callable[[], None] = event.synchronize
        return wait

    def _forget(self, peer: tuple[str, int]) -> None:
        """Should this P never come back, nothing is kept for it; its threads end with the loads they have."""
        assert self._reader is not None
        self._reader.forget(peer)
        with self._lock:
            loaders = self._loaders.pop(peer, ())
        for loader in loaders:
            loader.shutdown(wait=False)


def _fingerprint(vllm_config: "VllmConfig") -> Fingerprint:
    from vllm.version import __version__

    model_config = vllm_config.model_config
    hf_config = {k: v for k, v in model_config.hf_config.to_dict().items() if k != "_name_or_path"}
    model = json.dumps([hf_config, model_config.quantization], sort_keys=True, default=str)
    cache_dtype = vllm_config.cache_config.cache_dtype
    return Fingerprint(
        vllm_version=__version__,
        model=hashlib.blake2b(model.encode(), digest_size=16).hexdigest(),
        kv_cache_dtype=str(model_config.dtype if cache_dtype == "auto" else cache_dtype),
    )

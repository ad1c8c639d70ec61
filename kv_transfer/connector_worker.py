"""The worker's half of the connector: P's workers serve their KV blocks, D's workers read them."""

import hashlib
import json
import logging
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import zmq
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorHandshakeMetadata

from kv_transfer.connector_metrics import TransferStats
from kv_transfer.connector_settings import ConnectorSettings
from kv_transfer.control import ControlClient
from kv_transfer.errors import DeadlineError, KVTransferError, LeaseEndedError, PeerRefusedError
from kv_transfer.memory import BlockMemory, layout_digest, regions_of
from kv_transfer.protocol import Fingerprint, RankEndpoint, Welcome
from kv_transfer.transports.base import Transport
from kv_transfer.transports.tcp import TcpTransport

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class WorkerHandshake(KVConnectorHandshakeMetadata):
    """Worker → scheduler, through vLLM's own pipe: where this rank's blocks are read (P only), and what they mean."""

    endpoint: RankEndpoint | None
    fingerprint: Fingerprint


@dataclass(frozen=True, kw_only=True)
class Load:
    """Read P's blocks into D's, one for one, for one request."""

    request_id: str
    host: str
    port: int
    lease_id: str
    remote_block_ids: tuple[int, ...]
    local_block_ids: tuple[int, ...]


class WorkerSide:
    def __init__(
        self, settings: ConnectorSettings, vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig"
    ) -> None:
        self._settings = settings
        self._vllm_config = vllm_config
        self._num_blocks = kv_cache_config.num_blocks
        self._rank: int = vllm_config.parallel_config.rank % settings.tp_size
        self._fingerprint: Fingerprint | None = None
        self._endpoint: RankEndpoint | None = None
        self._kv_caches: Mapping[str, torch.Tensor] = {}  # kept, as the transport has only their addresses
        self._transport: Transport | None = None
        self._zmq: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._lock = threading.Lock()
        # One for each P, so that a P that does not answer delays no load from another.
        self._loaders: dict[tuple[str, int], ThreadPoolExecutor] = {}
        self._welcomes: dict[tuple[str, int], Welcome] = {}
        self._ended: set[str] = set()
        self._failed: set[str] = set()
        self._stats = TransferStats()

    def register_kv_caches(self, kv_caches: "Mapping[str, torch.Tensor]") -> None:
        self._kv_caches = kv_caches
        memory = BlockMemory(regions_of(kv_caches, self._num_blocks))
        self._fingerprint = _fingerprint(
            self._vllm_config, self._settings, layout_digest(kv_caches, self._num_blocks, _instruction_set())
        )
        self._transport = TcpTransport(memory, checksum=self._settings.checksum)
        if self._settings.is_producer:
            self._endpoint = self._transport.serve(self._settings.listen_host)
        logger.info(
            "KV cache: %d blocks of %d bytes in %d regions",
            memory.num_blocks,
            memory.bytes_per_block,
            len(memory.regions),
        )

    def handshake(self) -> WorkerHandshake | None:
        return None if self._fingerprint is None else WorkerHandshake(self._endpoint, self._fingerprint)

    def start_loads(self, loads: Sequence[Load]) -> None:
        """Begin to read in the background; the results come with `take_ended`."""
        deadline = time.monotonic() + self._settings.load_timeout_s
        for load in loads:
            with self._lock:
                loader = self._loaders.get((load.host, load.port))
                if loader is None:
                    loader = ThreadPoolExecutor(self._settings.num_load_threads, thread_name_prefix="kv-load")
                    self._loaders[load.host, load.port] = loader
                loader.submit(self._load, load, deadline)

    def take_ended(self) -> tuple[set[str], set[str]]:
        """Request ids of the loads that ended since the last call, and those among them that failed."""
        with self._lock:
            ended, self._ended = self._ended, set()
            failed, self._failed = self._failed, set()
        return ended, failed

    def take_stats(self) -> TransferStats | None:
        with self._lock:
            if self._stats.is_empty():
                return None
            stats, self._stats = self._stats, TransferStats()
        return stats

    def close(self) -> None:
        with self._lock:
            loaders = list(self._loaders.values())
        for loader in loaders:
            loader.shutdown(wait=False, cancel_futures=True)
        if self._transport is not None:
            self._transport.close()
        self._zmq.term()  # ends the waits of loads under way

    def _load(self, load: Load, deadline: float) -> None:
        start = time.monotonic()
        try:
            num_bytes = self._read(load, deadline)
        except Exception as error:  # whatever it is, the scheduler waits for an end
            reason = error.reason if isinstance(error, KVTransferError) else KVTransferError.reason
            unforeseen = None if isinstance(error, KVTransferError) else error
            source = f"{load.host}:{load.port}"
            logger.warning(
                "KV load of %s from %s failed (%s): %s", load.request_id, source, reason, error, exc_info=unforeseen
            )
            with self._lock:
                self._welcomes.pop((load.host, load.port), None)
                loader = self._loaders.pop((load.host, load.port), None)
                if loader is not None:  # should this P never come back, its threads end with the loads they have
                    loader.shutdown(wait=False)
                self._stats.record_failure(reason)
                self._failed.add(load.request_id)
                self._ended.add(load.request_id)
            return
        with self._lock:
            self._stats.record_load(num_bytes, len(load.local_block_ids), time.monotonic() - start)
            self._ended.add(load.request_id)

    def _read(self, load: Load, deadline: float) -> int:
        assert self._transport is not None
        if time.monotonic() >= deadline:
            raise DeadlineError("the load threads for this peer were busy until the deadline")
        with ControlClient(self._zmq, load.host, load.port) as control:
            endpoint = self._endpoint_of(load, control, deadline)
            num_bytes = self._transport.read(endpoint, load.remote_block_ids, load.local_block_ids, deadline)
            if not control.end_read(load.lease_id, load.request_id, self._rank, deadline):
                raise LeaseEndedError("the lease ended before the read did; the blocks may hold another prompt's KV")
        return num_bytes

    def _endpoint_of(self, load: Load, control: ControlClient, deadline: float) -> RankEndpoint:
        assert self._fingerprint is not None
        welcome = self._welcomes.get((load.host, load.port))
        if welcome is None:
            welcome = control.greet(self._fingerprint, deadline)
            if len(welcome.ranks) != self._settings.tp_size:
                raise PeerRefusedError(f"the peer has {len(welcome.ranks)} ranks, not {self._settings.tp_size}")
            with self._lock:
                self._welcomes[load.host, load.port] = welcome
        return welcome.ranks[self._rank]


def _fingerprint(vllm_config: "VllmConfig", settings: ConnectorSettings, layout: str) -> Fingerprint:
    from vllm.version import __version__

    model_config = vllm_config.model_config
    hf_config = {k: v for k, v in model_config.hf_config.to_dict().items() if k != "_name_or_path"}
    model = json.dumps([hf_config, model_config.quantization], sort_keys=True, default=str)
    cache_dtype = vllm_config.cache_config.cache_dtype
    return Fingerprint(
        vllm_version=__version__,
        model=hashlib.blake2b(model.encode(), digest_size=16).hexdigest(),
        kv_cache_dtype=str(model_config.dtype if cache_dtype == "auto" else cache_dtype),
        block_size=settings.block_size,
        tp_size=settings.tp_size,
        layout=layout,
    )


def _instruction_set() -> str:
    """What decides the order of bytes inside a CPU KV block."""
    import torch
    from vllm.platforms import current_platform

    return f"{current_platform.device_type} {torch.backends.cpu.get_cpu_capability()}"

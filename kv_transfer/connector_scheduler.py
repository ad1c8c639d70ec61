"""The scheduler's half of the connector.

On P, a finished prompt's blocks are kept by one more reference in vLLM's block pool and a lease; the request itself
is over. (vLLM's own way, to delay the freeing, keeps the engine stepping for as long as a block is held.) Only the
scheduler's thread may touch the pool, so ended leases wait until it comes by: at its next step, or, when the engine is
idle, after a wake-up.

On D, a request's hand-off parameters are checked when it arrives. Parameters that are not ours, or not for this prompt,
are ignored: D then computes the prompt itself, which is slower and never wrong.
"""

import gc
import logging
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import zmq
from vllm.distributed.kv_transfer.kv_connector.v1.base import KVConnectorMetadata
from vllm.v1.request import RequestStatus

from kv_transfer.connector_metrics import TransferStats
from kv_transfer.connector_settings import ConnectorSettings
from kv_transfer.connector_worker import Load, WorkerHandshake
from kv_transfer.control import ControlClient, ControlServer
from kv_transfer.errors import HandOffError, KVTransferError
from kv_transfer.lease import LeaseTable
from kv_transfer.protocol import (
    PROTOCOL_VERSION,
    HandOff,
    OmniHandOff,
    Welcome,
    parse_hand_off,
    parse_num_readers,
    prompt_digest,
)

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_RELEASE_TIMEOUT_S = 2.0  # from when it is asked for: one dead P does not keep the releases of others waiting


@dataclass
class LoadMetadata(KVConnectorMetadata):
    """Scheduler → workers: the loads that begin with this step."""

    loads: tuple[Load, ...]


class SchedulerSide:
    def __init__(self, settings: ConnectorSettings) -> None:
        self._settings = settings
        self._leases = LeaseTable(lease_s=settings.lease_s, tp_size=settings.tp_size, on_change=self._on_leases_changed)
        self._block_pool: BlockPool | None = None
        self._control: ControlServer | None = None
        self._wake_engine: Callable[[], None] = _nothing
        self._step_due = False
        self._handed_off: dict[str, HandOff] = {}  # by request id: arrived, not yet given blocks
        self._loads: list[Load] = []
        self._releases = ThreadPoolExecutor(1, thread_name_prefix="kv-release")
        self._zmq: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._stats = TransferStats()

    def bind_block_pool(self, block_pool: "BlockPool") -> None:
        self._block_pool = block_pool

    def workers_ready(self, handshakes: Sequence[WorkerHandshake]) -> None:
        """Open the control port, now that the workers serve their blocks."""
        if not self._settings.is_producer:
            return
        self._wake_engine = _find_wake_up()
        endpoints = tuple(handshake.endpoint for handshake in handshakes if handshake.endpoint is not None)
        assert len(endpoints) == self._settings.tp_size
        self._control = ControlServer(
            self._settings.listen_host, Welcome(endpoints), handshakes[0].fingerprint, self._leases
        )
        logger.info("KV control port: %s:%d", self._settings.listen_host, self._control.port)

    # --- P

    def request_finished(self, request: "Request", block_ids: Sequence[int]) -> dict[str, Any] | None:
        """Grant a lease for a finished prefill; returns the hand-off parameters for the response."""
        unused = self._handed_off.pop(request.request_id, None)
        if unused is not None:  # aborted, or refused by the api server, before it was scheduled
            self._release(unused, request.request_id)
        params = request.kv_transfer_params
        if not self._settings.is_producer or not params or params.get("do_remote_decode") is not True:
            return None
        finished = request.status in (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)
        if not finished or request.num_computed_tokens < request.num_prompt_tokens:
            return None
        try:
            num_readers = parse_num_readers(params)
        except HandOffError as error:
            logger.warning("request %s keeps no KV: %s", request.request_id, error)
            return None
        assert self._block_pool is not None
        assert self._control is not None
        kept = tuple(block_ids[: self._num_blocks(request.num_prompt_tokens)])
        blocks = [self._block_pool.blocks[block_id] for block_id in kept]
        if request.prompt_embeds is not None or any(block.is_null for block in blocks):
            # A prompt that its tokens do not identify; or one whose first blocks P has given up, as they lie outside
            # the attention window: D, one token behind, may need the last of them.
            return None
        self._block_pool.touch(blocks)
        lease = self._leases.grant(kept, num_readers)
        return HandOff(
            do_remote_prefill=True,
            do_remote_decode=False,
            remote_engine_id=self._settings.engine_id,
            remote_request_id=request.request_id,
            remote_host=self._settings.listen_host,
            remote_port=self._control.port,
            remote_block_ids=(kept,),
            remote_num_tokens=request.num_prompt_tokens,
            tp_size=self._settings.tp_size,
            omni=OmniHandOff(
                version=PROTOCOL_VERSION, lease_id=lease.lease_id, prompt_digest=_digest_of_prompt(request)
            ),
        ).as_params()

    def wants_a_step(self) -> bool:
        """Give back the blocks of ended leases. vLLM asks this on the scheduler's thread whenever it has nothing to do.

        One empty step afterwards brings the engine's metrics up to date.
        """
        if self._leases.has_ended:
            self._give_back_ended()
            self._step_due = True
        return self._step_due

    def _give_back_ended(self) -> None:
        assert self._block_pool is not None
        for lease in self._leases.take_ended():
            # Last block first: the end of a prompt is the first to be evicted from the prefix cache.
            self._block_pool.free_blocks([self._block_pool.blocks[block_id] for block_id in reversed(lease.block_ids)])

    def _on_leases_changed(self) -> None:
        if self._control is not None:
            self._control.wake()
        self._wake_engine()

    # --- D

    def on_new_request(self, request: "Request") -> None:
        params = request.kv_transfer_params
        if params is not None and not isinstance(params, dict):
            # A client can put anything there (`vllm_xargs`), and vLLM's scheduler dies of what is not a dict.
            request.kv_transfer_params = None
            return
        if not self._settings.is_consumer or not params or not params.get("do_remote_prefill"):
            return
        try:
            hand_off = parse_hand_off(params)
            if not request.abort_immediately:  # a rejected request comes without its prompt, to be released
                self._check_fits(hand_off, request)
        except HandOffError as error:
            logger.warning("request %s computes its prompt itself: %s", request.request_id, error)
            self._stats.record_failure(error.reason)
            return
        self._handed_off[request.request_id] = hand_off

    def _check_fits(self, hand_off: HandOff, request: "Request") -> None:
        if request.prompt_embeds is not None:
            raise HandOffError("the prompt has embeddings, which its tokens do not identify")
        if hand_off.omni.prompt_digest != _digest_of_prompt(request):
            raise HandOffError("kv_transfer_params: omni.prompt_digest is that of another prompt")
        if len(hand_off.remote_block_ids[0]) < self._num_blocks(request.num_prompt_tokens - 1):
            raise HandOffError("kv_transfer_params: remote_block_ids are fewer than the prompt needs")

    def num_tokens_to_load(self, request: "Request", num_computed_tokens: int) -> tuple[int, bool]:
        """All of the prompt that D lacks but its last token: that one is computed here, to sample the next."""
        if request.request_id not in self._handed_off:
            return 0, False
        num_tokens = request.num_prompt_tokens - 1 - num_computed_tokens
        return (num_tokens, True) if num_tokens > 0 else (0, False)

    def blocks_allocated(self, request: "Request", block_ids: Sequence[int], num_tokens: int) -> None:
        """D's blocks for the request are there: begin the load, or give P's blocks up when none is needed."""
        hand_off = self._handed_off.pop(request.request_id, None)
        if hand_off is None:
            return
        if num_tokens == 0:
            self._release(hand_off, request.request_id)
            return
        num_loaded = request.num_prompt_tokens - 1
        blocks = slice((num_loaded - num_tokens) // self._settings.block_size, self._num_blocks(num_loaded))
        self._loads.append(
            Load(
                request_id=request.request_id,
                host=hand_off.remote_host,
                port=hand_off.remote_port,
                lease_id=hand_off.omni.lease_id,
                remote_block_ids=hand_off.remote_block_ids[0][blocks],
                local_block_ids=tuple(block_ids[blocks]),
            )
        )

    def take_loads(self) -> LoadMetadata:
        if self._leases.has_ended:
            self._give_back_ended()
        self._step_due = False
        loads, self._loads = self._loads, []
        return LoadMetadata(tuple(loads))

    def _release(self, hand_off: HandOff, reader: str) -> None:
        """Tell P, in the background, that nobody will read. Should that fail, the lease ends by itself."""
        self._releases.submit(self._release_now, hand_off, reader, time.monotonic() + _RELEASE_TIMEOUT_S)

    def _release_now(self, hand_off: HandOff, reader: str, deadline: float) -> None:
        try:
            with ControlClient(self._zmq, hand_off.remote_host, hand_off.remote_port) as control:
                control.end_read(hand_off.omni.lease_id, reader, None, deadline)
        except KVTransferError as error:
            logger.warning("could not release the KV blocks of %s: %s", hand_off.remote_request_id, error)

    # --- both

    def take_stats(self) -> TransferStats | None:
        self._stats.record_leases(self._leases.take_counts(), len(self._leases))
        if self._stats.is_empty():
            return None
        stats, self._stats = self._stats, TransferStats()
        return stats

    def close(self) -> None:
        self._releases.shutdown(wait=False, cancel_futures=True)
        self._zmq.term()  # ends the wait of a release under way
        if self._control is not None:
            self._control.close()

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self._settings.block_size)


def _digest_of_prompt(request: "Request") -> str:
    images = [feature.identifier for feature in request.mm_features or ()]
    adapter = request.lora_request.lora_name if request.lora_request is not None else None
    return prompt_digest(request.prompt_token_ids or (), adapter, request.cache_salt, *images)


def _nothing() -> None:
    pass


def _find_wake_up() -> Callable[[], None]:
    """How to make this process's idle engine look for work.

    vLLM gives connectors no way to do so. Its engine sleeps on a queue and treats a WAKEUP in it as "look again" (that
    is how it shuts down), so the engine object is looked up, once, among those that exist.
    """
    from vllm.v1.engine import EngineCoreRequestType
    from vllm.v1.engine.core import EngineCoreProc

    # type(), as isinstance() asks each object for its __class__, which runs code of lazy modules and proxies.
    engine = next((o for o in gc.get_objects() if issubclass(type(o), EngineCoreProc)), None)
    if engine is None:
        logger.warning("no EngineCore in this process: an idle engine gives leased KV blocks back at its next request")
        return _nothing
    input_queue = engine.input_queue
    return lambda: input_queue.put_nowait((EngineCoreRequestType.WAKEUP, None))

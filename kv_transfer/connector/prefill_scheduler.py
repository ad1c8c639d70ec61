"""The scheduler's half of the connector on P: leases on finished prompts.

A finished prompt's blocks are kept by one more reference in vLLM's block pool and a lease; the request itself is over.
(vLLM's own way, to delay the freeing, keeps the engine stepping for as long as a block is held.) Only the scheduler's
thread may touch the pool, so ended leases wait until it comes by: at its next step, or, when the engine is idle, after
a wake-up.

A prompt that came with a ticket is handed off layer by layer: its lease opens before it is computed, and each step
tells the workers, who tell the followers.
"""

import logging
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from vllm.v1.request import RequestStatus

from kv_transfer.connector.cache_group import CacheGroup, first_blocks
from kv_transfer.connector.prompt import digest_of_prompt
from kv_transfer.connector.settings import ConnectorSettings
from kv_transfer.connector.wake_up import find_wake_up
from kv_transfer.connector.worker import WorkerHandshake
from kv_transfer.control import ControlServer
from kv_transfer.errors import HandOffError
from kv_transfer.hand_off import UNSIGNED, HandOff, OmniHandOff, parse_num_readers
from kv_transfer.memory.blocks import NULL_BLOCK, BlockTables
from kv_transfer.prefill.lease import LeaseCounts, LeaseTable
from kv_transfer.prefill.progress import PrefillStep
from kv_transfer.protocol import PROTOCOL_VERSION, Welcome
from kv_transfer.ticket import parse_ticket

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_manager import KVCacheManager
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _FollowedRequest:
    """A prompt that is handed off while it is computed."""

    transfer_id: str  # of the ticket, and its lease's id
    prompt_digest: str
    request: "Request"


class PrefillScheduler:
    def __init__(self, settings: ConnectorSettings, groups: tuple[CacheGroup, ...]) -> None:
        self._settings = settings
        self._groups = groups
        self._leases = LeaseTable(
            lease_s=settings.lease_s, max_lease_s=settings.max_lease_s, on_change=self._on_leases_changed
        )
        self._run_id = secrets.token_hex(16)
        self._cache: KVCacheManager | None = None
        self._control: ControlServer | None = None
        self._wake_engine: Callable[[], None] | None = None
        self._step_due = False
        self._followed: dict[str, _FollowedRequest] = {}  # by request id
        self._nobody_reads: set[str] = set()  # request ids: with a ticket that is void
        self._transfers_ended: list[str] = []  # that the workers have not been told of

    def bind_cache(self, cache: "KVCacheManager") -> None:
        self._cache = cache

    def workers_ready(self, handshakes: Sequence[WorkerHandshake]) -> None:
        """Open the control port, now that the workers serve their KV memory."""
        self._wake_engine = find_wake_up()
        ranks = tuple(handshake.info for handshake in handshakes if handshake.info is not None)
        assert len(ranks) == self._settings.num_ranks
        self._control = ControlServer(
            self._settings.listen_host,
            self._settings.listen_port,
            self._settings.key,
            Welcome(self._run_id, ranks),
            handshakes[0].fingerprint,
            self._leases,
        )
        logger.info("KV control port: %s:%d", self._settings.listen_host, self._control.port)

    def on_new_request(self, request: "Request") -> None:
        """Open the lease of a prompt that may be followed while it is computed."""
        params = request.kv_transfer_params
        if not params or params.get("do_remote_decode") is not True:
            return
        try:
            ticket = parse_ticket(params, self._settings.key)
            if ticket is None:
                return
            if not self._leases.open_early(ticket.transfer_id, parse_num_readers(params)):
                self._nobody_reads.add(request.request_id)
                return
        except HandOffError as error:
            logger.warning("request %s cannot be followed: %s", request.request_id, error)
            return
        self._followed[request.request_id] = _FollowedRequest(ticket.transfer_id, digest_of_prompt(request), request)

    def request_finished(self, request: "Request", block_ids: tuple[list[int], ...]) -> dict[str, Any] | None:
        """Grant a lease for a finished prefill; returns the hand-off parameters for the response."""
        if request.request_id in self._nobody_reads:
            self._nobody_reads.discard(request.request_id)
            return None
        followed = self._followed.pop(request.request_id, None)
        tables = self._tables_to_keep(request, block_ids)
        if followed is not None:
            self._settle(followed, tables)
            return None
        if tables is None:
            return None
        try:
            num_readers = parse_num_readers(request.kv_transfer_params or {})
        except HandOffError as error:
            logger.warning("request %s keeps no KV: %s", request.request_id, error)
            return None
        lease = self._leases.grant(self._keep(tables), num_readers)
        return self._hand_off(request, tables, lease.lease_id)

    def wants_a_step(self) -> bool:
        """Give back the blocks of ended leases. vLLM asks this on the scheduler's thread whenever it has nothing to do.

        One empty step afterwards brings the engine's metrics up to date, and tells the workers.
        """
        if self._leases.has_ended:
            self._give_back_ended()
            self._step_due = True
        return self._step_due

    def take_steps(self, output: "SchedulerOutput") -> tuple[tuple[PrefillStep, ...], tuple[str, ...]]:
        """What the coming step computes of followed prompts, and the transfers that have ended since the last."""
        self._end_preempted()
        if self._leases.has_ended:
            self._give_back_ended()
        self._step_due = False
        steps = tuple(
            self._step(followed, output.num_scheduled_tokens[request_id])
            for request_id, followed in self._followed.items()
            if request_id in output.num_scheduled_tokens and not followed.request.num_preemptions
        )
        ended, self._transfers_ended = tuple(self._transfers_ended), []
        return steps, ended

    def take_lease_counts(self) -> tuple[LeaseCounts, int]:
        """What happened to leases since the last call, and how many are open."""
        return self._leases.take_counts(), len(self._leases)

    def take_num_dropped(self) -> int:
        """Messages of strangers on the control port since the last call."""
        return 0 if self._control is None else self._control.dropped.take()

    def close(self) -> None:
        if self._control is not None:
            self._control.close()

    # --- blocks

    def _tables_to_keep(self, request: "Request", block_ids: tuple[list[int], ...]) -> BlockTables | None:
        """The prompt's part of each group's block table; None where there is nothing to hand off."""
        params = request.kv_transfer_params
        finished = request.status in (RequestStatus.FINISHED_LENGTH_CAPPED, RequestStatus.FINISHED_STOPPED)
        num_tokens = request.num_prompt_tokens
        if (
            not params
            or params.get("do_remote_decode") is not True
            or not finished
            or request.num_computed_tokens < num_tokens
            or request.prompt_embeds is not None  # the prompt's tokens do not identify it
        ):
            return None
        tables = first_blocks(self._groups, block_ids, num_tokens)
        for group, table in zip(self._groups, tables, strict=True):
            # D computes the last token, for which it needs those before it as far as attention reaches. At times P,
            # one token ahead, has just given up the first of them.
            if NULL_BLOCK in table[group.first_token_needed(num_tokens) // group.block_size :]:
                return None
        return tables

    def _keep(self, tables: BlockTables) -> tuple[int, ...]:
        """Take one more reference to each block; returns their ids."""
        assert self._cache is not None
        kept = tuple(block_id for table in tables for block_id in table if block_id != NULL_BLOCK)
        pool = self._cache.block_pool
        pool.touch([pool.blocks[block_id] for block_id in kept])
        return kept

    def _give_back(self, block_ids: Sequence[int]) -> None:
        """Last block first: the end of a prompt is the first to be evicted from the prefix cache."""
        assert self._cache is not None
        pool = self._cache.block_pool
        pool.free_blocks([pool.blocks[block_id] for block_id in reversed(block_ids)])

    def _give_back_ended(self) -> None:
        for lease in self._leases.take_ended():
            if lease.block_ids:
                self._give_back(lease.block_ids)
            if lease.was_early:
                self._transfers_ended.append(lease.lease_id)

    def _on_leases_changed(self) -> None:
        if self._control is not None:
            self._control.wake()
        if self._wake_engine is not None:
            self._wake_engine()

    # --- followed prompts

    def _end_preempted(self) -> None:
        """Their blocks were given up, and the coming step may write another prompt into them: what was read is void."""
        for followed in self._followed.values():
            if followed.request.num_preemptions:
                self._leases.end(followed.transfer_id)

    def _step(self, followed: "_FollowedRequest", num_scheduled_tokens: int) -> PrefillStep:
        assert self._cache is not None
        request = followed.request
        # vLLM adds what it schedules to num_computed_tokens afterwards.
        end_token = min(request.num_prompt_tokens, request.num_computed_tokens + num_scheduled_tokens)
        return PrefillStep(
            transfer_id=followed.transfer_id,
            prompt_digest=followed.prompt_digest,
            end_token=end_token,
            num_prompt_tokens=request.num_prompt_tokens,
            block_ids=first_blocks(self._groups, self._cache.get_block_ids(request.request_id), end_token),
        )

    def _settle(self, followed: "_FollowedRequest", tables: BlockTables | None) -> None:
        """The prompt is computed: keep its blocks for followers that are not done; or it never will be."""
        if tables is None:
            self._leases.end(followed.transfer_id)
            return
        kept = self._keep(tables)
        if not self._leases.fill(followed.transfer_id, kept):
            self._give_back(kept)

    def _hand_off(self, request: "Request", tables: BlockTables, lease_id: str) -> dict[str, Any]:
        assert self._control is not None
        hand_off = HandOff(
            do_remote_prefill=True,
            do_remote_decode=False,
            remote_engine_id=self._settings.engine_id,
            remote_request_id=request.request_id,
            remote_host=self._settings.listen_host,
            remote_port=self._control.port,
            remote_block_ids=tables,
            remote_num_tokens=request.num_prompt_tokens,
            tp_size=self._settings.tp_size,
            omni=OmniHandOff(
                version=PROTOCOL_VERSION,
                run_id=self._run_id,
                lease_id=lease_id,
                prompt_digest=digest_of_prompt(request),
                expires_at=int(time.time() + self._settings.max_lease_s) + 1,
                signature=UNSIGNED,
            ),
        )
        return hand_off.signed(self._settings.key).as_params()

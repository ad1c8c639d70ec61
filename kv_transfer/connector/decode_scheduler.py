"""The scheduler's half of the connector on D: which prompts are read from P, into which blocks.

A request's hand-off parameters are checked when it arrives. Parameters that are not ours, or not for this prompt, are
ignored: D then computes the prompt itself, which is slower and never wrong.
"""

import logging
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import zmq

from kv_transfer.connector.cache_group import CacheGroup, first_blocks
from kv_transfer.connector.prompt import digest_of_prompt
from kv_transfer.connector.settings import ConnectorSettings
from kv_transfer.control import ControlClient
from kv_transfer.decode.block_reader import Load
from kv_transfer.decode.lease_keeper import LeaseKeeper
from kv_transfer.errors import HandOffError, KVTransferError, LeaseEndedError
from kv_transfer.hand_off import HandOff, parse_hand_off
from kv_transfer.memory.blocks import NULL_BLOCK
from kv_transfer.protocol import EndRead
from kv_transfer.ticket import Ticket, parse_ticket

if TYPE_CHECKING:
    from vllm.v1.request import Request

logger = logging.getLogger(__name__)

_BEATS_PER_LEASE = 3
_RELEASE_TIMEOUT_S = 2.0  # from when it is asked for: one dead P does not keep the releases of others waiting


@dataclass(frozen=True)
class _Source:
    """Where a prompt's KV is, or will be."""

    peer: tuple[str, int]  # P's control port
    lease_id: str
    hand_off: HandOff | None  # None: P is still computing it, or has not begun
    prompt_digest: str


class DecodeScheduler:
    def __init__(self, settings: ConnectorSettings, groups: tuple[CacheGroup, ...]) -> None:
        self._settings = settings
        self._groups = groups
        self._sources: dict[str, _Source] = {}  # by request id: arrived, not yet given blocks
        self._loading: set[str] = set()  # request ids
        self._loads: list[Load] = []
        self._cancelled: list[str] = []  # loads that the workers are to end
        self._releases = ThreadPoolExecutor(1, thread_name_prefix="kv-release")
        self._zmq: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._keeper = LeaseKeeper(self._zmq, settings.key, settings.lease_s / _BEATS_PER_LEASE)
        self._failures: list[str] = []  # reasons, since they were last taken

    def on_new_request(self, request: "Request") -> None:
        params = request.kv_transfer_params
        if not params or not params.get("do_remote_prefill"):
            return
        try:
            ticket = parse_ticket(params, self._settings.key)
            if ticket is not None:
                source = _of_ticket(ticket, request)
            else:
                source = _of_hand_off(parse_hand_off(params, self._settings.key), request)
        except HandOffError as error:
            logger.warning("request %s computes its prompt itself: %s", request.request_id, error)
            self._failures.append(error.reason)
            return
        self._sources[request.request_id] = source
        self._keeper.keep(request.request_id, source.peer, source.lease_id)

    def num_tokens_to_load(self, request: "Request", num_computed_tokens: int) -> tuple[int, bool]:
        """All of the prompt that D lacks but its last token: that one is computed here, to sample the next."""
        if request.request_id not in self._sources:
            return 0, False
        num_tokens = request.num_prompt_tokens - 1 - num_computed_tokens
        return (num_tokens, True) if num_tokens > 0 else (0, False)

    def blocks_allocated(self, request: "Request", block_ids: tuple[list[int], ...], num_tokens: int) -> None:
        """D's blocks for the request are there: begin the load, or give P's blocks up when none is needed."""
        source = self._sources.pop(request.request_id, None)
        if source is None:
            return
        if num_tokens == 0:
            self._give_up(source, request.request_id)
            return
        end_token = request.num_prompt_tokens - 1
        first_token = end_token - num_tokens
        tables = first_blocks(self._groups, block_ids, end_token)
        self._loading.add(request.request_id)
        self._loads.append(
            Load(
                request_id=request.request_id,
                host=source.peer[0],
                port=source.peer[1],
                run_id=source.hand_off.omni.run_id if source.hand_off is not None else None,
                lease_id=source.lease_id,
                prompt_digest=source.prompt_digest,
                remote_block_ids=source.hand_off.remote_block_ids if source.hand_off is not None else None,
                local_block_ids=tables,
                first_token=first_token,
                end_token=end_token,
                num_blocks=sum(
                    block_id != NULL_BLOCK
                    for group, table in zip(self._groups, tables, strict=True)
                    for block_id in table[first_token // group.block_size :]
                ),
            )
        )

    def request_finished(self, request: "Request") -> None:
        source = self._sources.pop(request.request_id, None)
        if source is not None:  # aborted, or refused by the api server, before it was scheduled
            self._give_up(source, request.request_id)
        if request.request_id in self._loading:  # aborted; its blocks stay until the workers say that the load ended
            self._cancelled.append(request.request_id)

    def take_loads(self) -> tuple[tuple[Load, ...], tuple[str, ...]]:
        """The loads that begin with the coming step, and the requests whose loads are to end early."""
        for request_id in self._keeper.take_lost():
            if request_id in self._loading:
                self._cancelled.append(request_id)
            elif self._sources.pop(request_id, None) is not None:  # not scheduled yet: it computes its prompt itself
                self._failures.append(LeaseEndedError.reason)
        loads, self._loads = self._loads, []
        cancelled, self._cancelled = self._cancelled, []
        return tuple(loads), tuple(cancelled)

    def loads_ended(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._loading.discard(request_id)
            self._keeper.drop(request_id)

    def take_failures(self) -> list[str]:
        """Why hand-offs were not used, since the last call."""
        failures, self._failures = self._failures, []
        return failures

    def close(self) -> None:
        self._releases.shutdown(wait=False, cancel_futures=True)
        self._keeper.close()
        self._zmq.term()  # ends the waits of releases and heartbeats under way

    def _give_up(self, source: _Source, reader: str) -> None:
        """Tell P, in the background, that this reader will not read. Should that fail, the lease ends by itself."""
        self._keeper.drop(reader)
        self._releases.submit(self._release, source, reader, time.monotonic() + _RELEASE_TIMEOUT_S)

    def _release(self, source: _Source, reader: str, deadline: float) -> None:
        try:
            with ControlClient(self._zmq, self._settings.key, *source.peer) as control:
                control.end_read(EndRead(source.lease_id, reader), deadline)
        except KVTransferError as error:
            logger.warning("could not release the KV blocks that %s does not need: %s", reader, error)


def _of_ticket(ticket: Ticket, request: "Request") -> _Source:
    _check_has_tokens(request)
    peer = (ticket.prefill_host, ticket.prefill_port)
    return _Source(peer, ticket.transfer_id, None, digest_of_prompt(request))


def _of_hand_off(hand_off: HandOff, request: "Request") -> _Source:
    if not request.abort_immediately:  # a rejected request comes without its prompt, to be released
        _check_has_tokens(request)
        if hand_off.omni.prompt_digest != digest_of_prompt(request):
            raise HandOffError("kv_transfer_params.omni.prompt_digest is that of another prompt")
    peer = (hand_off.remote_host, hand_off.remote_port)
    return _Source(peer, hand_off.omni.lease_id, hand_off, hand_off.omni.prompt_digest)


def _check_has_tokens(request: "Request") -> None:
    if request.prompt_embeds is not None:
        raise HandOffError("the prompt has embeddings, which its tokens do not identify")

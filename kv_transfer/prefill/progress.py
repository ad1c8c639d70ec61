"""Layer-wise hand-off, P's worker: telling followers how much of a prompt's KV is there while the rest is computed.

The forward pass reports each layer; a thread for each follower passes the newest state on. States that a follower was
too slow for are skipped: the newest says all.
"""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from kv_transfer.memory.blocks import BlockTables
from kv_transfer.protocol import FollowPrefill, PrefillProgress, Refused
from kv_transfer.rank_connection import RankConnection

HEARTBEAT_S = 1.0
_PEER_TIMEOUT_S = 10.0  # a follower that takes no message for so long is lost


@dataclass(frozen=True, kw_only=True)
class PrefillStep:
    """Scheduler → workers: what this step computes of a prompt that may be followed."""

    transfer_id: str
    prompt_digest: str
    end_token: int  # after this step
    num_prompt_tokens: int
    block_ids: BlockTables


@dataclass
class _Prefill:
    step: PrefillStep
    end_token: int = 0  # before it, every layer is there
    num_layers: int = 0  # of the step's tokens, these layers are there
    layers_ready: Callable[[], None] | None = None  # waits until the device has computed them

    @property
    def is_complete(self) -> bool:
        return self.end_token >= self.step.num_prompt_tokens

    def progress(self) -> PrefillProgress:
        return PrefillProgress(
            end_token=self.end_token,
            partial_end_token=self.step.end_token,
            num_layers=self.num_layers,
            is_last=self.is_complete,
            block_ids=self.step.block_ids,
        )


class PrefillProgressTable:
    """Args:
    layer_names: in the order of this rank's layout.
    """

    def __init__(self, layer_names: Iterable[str]) -> None:
        self._position = {name: index for index, name in enumerate(layer_names)}
        self._changed = threading.Condition()
        self._prefills: dict[str, _Prefill] = {}
        self._in_step: list[_Prefill] = []
        self._ended: dict[str, None] = {}  # the newest of those that ended, for followers that come late
        self._closed = False

    # --- the forward pass

    def begin_step(self, steps: Iterable[PrefillStep], ended: Iterable[str]) -> None:
        """What the coming forward pass computes, and the prompts whose KV is no longer to be read."""
        with self._changed:
            for transfer_id in ended:
                self._prefills.pop(transfer_id, None)
                self._ended[transfer_id] = None
            while len(self._ended) > _MAX_ENDED:
                del self._ended[next(iter(self._ended))]
            self._in_step = []
            for step in steps:
                if step.transfer_id in self._ended:  # the lease ended early, the computing did not
                    continue
                prefill = self._prefills.setdefault(step.transfer_id, _Prefill(step))
                prefill.step = step
                prefill.num_layers = 0
                self._in_step.append(prefill)
            self._changed.notify_all()

    def layer_done(self, name: str, ready: Callable[[], None] | None = None) -> None:
        """The layer's keys and values of this step are written, or will be once `ready` returns."""
        position = self._position.get(name)
        if position is None or not self._in_step:
            return
        with self._changed:
            for prefill in self._in_step:
                prefill.num_layers = max(prefill.num_layers, position + 1)
                prefill.layers_ready = ready
            self._changed.notify_all()

    def step_done(self, ready: Callable[[], None] | None = None) -> None:
        """Every layer of this step is written, or will be once `ready` returns."""
        if not self._in_step:
            return
        with self._changed:
            for prefill in self._in_step:
                prefill.end_token = prefill.step.end_token
                prefill.layers_ready = ready
            self._in_step = []
            self._changed.notify_all()

    # --- followers

    def serve(self, connection: RankConnection, request: FollowPrefill) -> None:
        """Answer one follower until the prompt is complete. For the rank server."""
        sent: PrefillProgress | None = None
        while sent is None or not sent.is_last:
            sent, refusal, ready = self._news(request, sent)
            if refusal is None and ready is not None:
                ready()
            connection.send(sent if refusal is None else Refused(refusal), time.monotonic() + _PEER_TIMEOUT_S)
            if refusal is not None:
                return

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _news(
        self, request: FollowPrefill, sent: PrefillProgress | None
    ) -> tuple[PrefillProgress, str | None, Callable[[], None] | None]:
        """The newest state, as soon as it is another one than was sent or a heartbeat is due."""
        with self._changed:
            self._changed.wait_for(lambda: self._has_news(request, sent), timeout=HEARTBEAT_S)
            prefill = self._prefills.get(request.transfer_id)
            refusal = self._refusal(request, prefill)
            if prefill is None:
                return _NOTHING_YET, refusal, None
            return prefill.progress(), refusal, prefill.layers_ready

    def _has_news(self, request: FollowPrefill, sent: PrefillProgress | None) -> bool:
        prefill = self._prefills.get(request.transfer_id)
        if self._refusal(request, prefill) is not None:
            return True
        return prefill is not None and prefill.progress() != sent

    def _refusal(self, request: FollowPrefill, prefill: _Prefill | None) -> str | None:
        if self._closed:
            return "this engine is shutting down"
        if request.transfer_id in self._ended:
            return "the prefill ended without its KV, or it is no longer kept"
        if prefill is not None and prefill.step.prompt_digest != request.prompt_digest:
            return "prefill and decode were given different prompts"
        return None


_MAX_ENDED = 4096
_NOTHING_YET = PrefillProgress(end_token=0, partial_end_token=0, num_layers=0, is_last=False)

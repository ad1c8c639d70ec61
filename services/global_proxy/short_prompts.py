"""Which prompts are so short that D had better compute them itself."""

import time

from services.global_proxy.instances.instance import Instance
from services.global_proxy.instances.pool import Pool
from services.global_proxy.policies.base import Prompt
from services.global_proxy.policies.cost_model import break_even_tokens

_LOOK_EVERY_S = 0.02
_STALE_S = 60.0  # without a prompt for D alone: what was seen of these may have been one bad moment
_WEIGHT = 0.05  # of each newly seen hand-off


class ShortPrompts:
    """Finds the bound from what prefill, hand-off and decode were seen to cost, and from the load there is now.

    Args:
        min_prefill_tokens: the bound, if it is not to be found: shorter prompts go to D alone. 0: none do.
    """

    def __init__(self, prefill: Pool, decode: Pool, min_prefill_tokens: int | None) -> None:
        self._prefill = prefill
        self._decode = decode
        self._fixed = min_prefill_tokens
        self._handoff_s: float | None = None
        self._looked_s = float("-inf")
        self._applied_s = float("-inf")
        self._bound = 0

    @property
    def min_prefill_tokens(self) -> int:
        return self._bound if self._fixed is None else self._fixed

    @property
    def handoff_s(self) -> float:
        """From P's answer to D's first byte; 0 until one was seen."""
        return self._handoff_s or 0.0

    def applies(self, prompt: Prompt) -> bool:
        """Whether D shall compute this prompt alone."""
        if self._fixed is not None:
            return prompt.num_tokens < self._fixed
        now_s = time.monotonic()
        if now_s - self._looked_s >= _LOOK_EVERY_S:
            self._looked_s = now_s
            self._bound = self._find(is_stale=now_s - self._applied_s > _STALE_S)
        return prompt.num_tokens < self._bound

    def gave_to_decode(self) -> None:
        """D gets one of these prompts now: what its costs are will be seen."""
        self._applied_s = time.monotonic()

    def saw_handoff(self, seconds: float) -> None:
        """From P's answer to D's first byte."""
        if self._handoff_s is None:
            self._handoff_s = seconds
        self._handoff_s += _WEIGHT * (seconds - self._handoff_s)

    def _find(self, is_stale: bool) -> int:
        prefill, decode = _least_loaded(self._prefill), _least_loaded(self._decode)
        if prefill is None or decode is None or self._handoff_s is None:
            return 0
        alone = prefill.costs if is_stale or not decode.costs.has_prefill else decode.costs
        return break_even_tokens(
            prefill.costs, decode.costs, alone, self._handoff_s, prefill.num_tokens, decode.num_requests
        )


def _least_loaded(pool: Pool) -> Instance | None:
    return min(pool.up(), key=lambda instance: instance.num_tokens, default=None)

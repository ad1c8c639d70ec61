"""Which prompts are so short that D had better compute them itself."""

from services.global_proxy.instances.instance import Instance
from services.global_proxy.instances.pool import Pool
from services.global_proxy.policies.base import Prompt
from services.global_proxy.policies.cost_model import break_even_tokens

_PROBE_TOKENS = 64  # so short a prompt holds up nobody on D
_PROBE_EVERY = 16  # of them, while D's cost of a prompt is not known
_RECOMPUTE_EVERY = 64  # prompts
_WEIGHT = 0.05  # of each newly seen hand-off


class ShortPrompts:
    """Finds the bound from what prefill, hand-off and decode were seen to cost.

    Args:
        min_prefill_tokens: the bound, if it is not to be found: shorter prompts go to D alone. 0: none do.
    """

    def __init__(self, prefill: Pool, decode: Pool, min_prefill_tokens: int | None) -> None:
        self._prefill = prefill
        self._decode = decode
        self._fixed = min_prefill_tokens
        self._handoff_s: float | None = None
        self._num_seen = 0
        self._bound = 0

    @property
    def min_prefill_tokens(self) -> int:
        return self._bound if self._fixed is None else self._fixed

    def applies(self, prompt: Prompt) -> bool:
        """Whether D shall compute this prompt alone."""
        if self._fixed is not None:
            return prompt.num_tokens < self._fixed
        self._num_seen += 1
        if self._num_seen % _RECOMPUTE_EVERY == 0:
            self._bound = self._find()
        return prompt.num_tokens < self._bound or self._probes(prompt)

    def saw_handoff(self, seconds: float) -> None:
        """From P's answer to D's first byte."""
        if self._handoff_s is None:
            self._handoff_s = seconds
        self._handoff_s += _WEIGHT * (seconds - self._handoff_s)

    def _find(self) -> int:
        prefill, decode = _least_loaded(self._prefill), _least_loaded(self._decode)
        if prefill is None or decode is None or self._handoff_s is None:
            return 0
        return break_even_tokens(prefill.costs, decode.costs, self._handoff_s, prefill.num_tokens, decode.num_requests)

    def _probes(self, prompt: Prompt) -> bool:
        if self._num_seen % _PROBE_EVERY or prompt.num_tokens > _PROBE_TOKENS:
            return False
        decode = _least_loaded(self._decode)
        return decode is not None and not decode.costs.has_prefill


def _least_loaded(pool: Pool) -> Instance | None:
    return min(pool.up(), key=lambda instance: instance.num_tokens, default=None)

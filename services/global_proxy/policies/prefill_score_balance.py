"""The P that delays all requests least."""

from collections.abc import Sequence

from services.global_proxy.policies.base import C, Policy, Prompt, in_turn


class PrefillScoreBalance(Policy):
    """The P on which the prompt increases the sum of the expected response times least.

    What the prompt adds is its own response time, behind the tokens ahead of it. An engine computes first what came
    first, so those ahead are not delayed but by what fits into the same step: at most the last of them.
    Costs differ by instance: a P with slower hardware or a busy neighbour gets less.
    """

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, candidates: Sequence[C], prompt: Prompt) -> C:
        self._turn += 1
        num_tokens = prompt.num_tokens
        chosen, least_s = candidates[0], float("inf")
        for candidate in in_turn(candidates, self._turn):
            costs = candidate.costs  # Costs.prefill_s, without the call
            seconds = (
                costs.prefill_base_s + costs.prefill_token_s * num_tokens + costs.prefill_ahead_s * candidate.num_tokens
            )
            if seconds < least_s:
                chosen, least_s = candidate, seconds
        return chosen

"""D for a prompt, with an eye on the prompts that are still in prefill."""

from bisect import bisect_left, insort
from collections.abc import Sequence
from heapq import heapify, heappop, heappush
from itertools import islice

from services.global_proxy.policies.base import C, Candidate, Policy, Prompt, in_turn

_SLACK = 1.5  # an instance may have so many times the mean number of requests: the active cap
_MOST_AHEAD = 8  # longer prompts placed before the one asked for: bounds what one choice costs


class PDScoreBalance(Policy):
    """Places the prompts now in prefill on the Ds, the longest first, and gives the prompt asked for its D.

    Each goes to the D with the least expected time per token among those under the active cap (longest processing
    time first: R. Graham, "Bounds on multiprocessing timing anomalies", 1969). So a short prompt leaves the emptiest D
    to the long one that will soon need it. The cap lets a faster D take more, and bounds what a wrong cost can do.
    Nothing is promised: the next choice places all anew.
    """

    def __init__(self) -> None:
        self._turn = 0
        self._keys: dict[Prompt, tuple[int, int]] = {}
        self._in_prefill: list[tuple[int, int]] = []  # (-tokens, number), longest first

    def started(self, instance: Candidate, prompt: Prompt) -> None:
        if prompt not in self._keys:
            self._turn += 1
            key = self._keys[prompt] = (-prompt.num_tokens, self._turn)
            insort(self._in_prefill, key)

    def finished(self, instance: Candidate, prompt: Prompt) -> None:
        self._forget(prompt)

    def choose(self, candidates: Sequence[C], prompt: Prompt) -> C:
        self._forget(prompt)  # from now on it counts as a request of its D
        self._turn += 1
        num_longer = bisect_left(self._in_prefill, (-prompt.num_tokens, 0))
        ahead = islice(self._in_prefill, min(num_longer, _MOST_AHEAD))
        num_waiting = len(self._in_prefill) + 1
        total = num_waiting
        placed: list[tuple[float, int, int, C]] = []
        for number, candidate in enumerate(in_turn(candidates, self._turn)):
            costs = candidate.costs  # Costs.seconds_per_token, without the call
            num_requests = candidate.num_requests
            total += num_requests
            seconds = (
                costs.decode_base_s
                + costs.decode_request_s * num_requests
                + costs.decode_token_s * candidate.num_tokens
            )
            placed.append((seconds, number, num_requests, candidate))
        cap = _SLACK * total / len(placed)
        heapify(placed)
        for negative_tokens, _ in ahead:
            seconds, number, num_requests, candidate = _least_under(cap, placed)
            seconds += candidate.costs.decode_request_s - candidate.costs.decode_token_s * negative_tokens
            heappush(placed, (seconds, number, num_requests + 1, candidate))
        return _least_under(cap, placed)[3]

    def _forget(self, prompt: Prompt) -> None:
        key = self._keys.pop(prompt, None)
        if key is not None:
            del self._in_prefill[bisect_left(self._in_prefill, key)]


def _least_under(cap: float, placed: list[tuple[float, int, int, C]]) -> tuple[float, int, int, C]:
    """Take out the least loaded under the cap; those above it are taken out for good.

    There always is one: the cap is above the mean of all requests, those in prefill included.
    """
    while True:
        least = heappop(placed)
        if least[2] < cap:
            return least

"""Where the beginning of the prompt is already computed, unless waiting there costs more."""

from collections.abc import Mapping, Sequence
from typing import Protocol

from services.global_proxy.policies.base import C, Candidate, Policy, Prompt, Role, in_turn
from services.global_proxy.policies.response_time import answer_s
from services.global_proxy.policies.sent_prefixes import SentPrefixes

_AS_GOOD = 1.1  # D: an expected time per token so many times the least is no reason to leave the cached prefix


class PrefixIndex(Protocol):
    """Which instance has how much of a prompt cached, exactly. `services.global_proxy.prefix` has one."""

    def matches(self, prompt: Prompt) -> Mapping[str, int] | None:
        """How many of the prompt's first tokens each instance has, by its name; None: the token ids are unknown."""

    def matched_tokens(self, instance_name: str, prompt: Prompt) -> int | None:
        """The same for one; None: it is not known what that one has."""

    def learn(self, prompt: Prompt, token_ids_json: bytes) -> None:
        """The prompt's token ids are known now: a JSON list."""


class PrefixAware(Policy):
    """Weighs what an instance need not compute against its load, both in seconds of its own costs.

    P: the least expected time to the answer, where only tokens that are not cached there have to be computed. D: of
    those with nearly the least time per token, the one that has the most, for it has that much less to read from P.
    Mixed: the least expected time to the whole answer, again without the tokens that are cached.

    Args:
        role: of the candidates.
        index: exact, from the engines' KV events. Where it does not know, or without one, an instance is taken to have
            what this proxy has sent there.
    """

    def __init__(self, role: Role, index: PrefixIndex | None = None) -> None:
        self._role = role
        self._index = index
        self._sent = SentPrefixes()
        self._turn = 0

    def started(self, instance: Candidate, prompt: Prompt) -> None:
        if self._role != "decode":
            self._sent.add(instance.name, prompt)

    def choose(self, candidates: Sequence[C], prompt: Prompt) -> C:
        self._turn += 1
        matches = self._matches(prompt)
        candidates = in_turn(candidates, self._turn)
        if self._role == "prefill":
            return _soonest(candidates, prompt.num_tokens, matches)
        if self._role == "mixed":
            return min(candidates, key=lambda one: answer_s(one, prompt, matches.get(one.name, 0)))
        chosen = _most_cached(candidates, matches)
        self._sent.add(chosen.name, prompt)
        return chosen

    def tokenised(self, prompt: Prompt, token_ids_json: bytes) -> None:
        if self._index is not None:
            self._index.learn(prompt, token_ids_json)

    def cached_tokens(self, prompt: Prompt) -> Mapping[str, int]:
        return self._matches(prompt)

    def _matches(self, prompt: Prompt) -> Mapping[str, int]:
        sent = self._sent.matches(prompt)
        exact = self._index.matches(prompt) if self._index is not None else None
        if self._index is None or exact is None:
            return sent
        for name in list(sent):
            if self._index.matched_tokens(name, prompt) is not None:
                del sent[name]
        return {**sent, **exact}


def _soonest(candidates: Sequence[C], num_tokens: int, matches: Mapping[str, int]) -> C:
    """The P with the least expected time to its answer."""
    chosen, least_s = candidates[0], float("inf")
    for candidate in candidates:
        costs = candidate.costs  # Costs.prefill_s, without the call
        seconds = (
            costs.prefill_base_s
            + costs.prefill_token_s * (num_tokens - matches.get(candidate.name, 0))
            + costs.prefill_ahead_s * candidate.num_tokens
        )
        if seconds < least_s:
            chosen, least_s = candidate, seconds
    return chosen


def _most_cached(candidates: Sequence[C], matches: Mapping[str, int]) -> C:
    """Of the Ds with nearly the least time per token, the one that has the most of the prompt."""
    chosen, least_s = candidates[0], float("inf")
    times_s = []
    for candidate in candidates:
        costs = candidate.costs  # Costs.seconds_per_token, without the call
        seconds = (
            costs.decode_base_s
            + costs.decode_request_s * candidate.num_requests
            + costs.decode_token_s * candidate.num_tokens
        )
        times_s.append(seconds)
        if seconds < least_s:
            chosen, least_s = candidate, seconds
    if matches:
        most = matches.get(chosen.name, 0)
        for candidate, seconds in zip(candidates, times_s, strict=True):
            if seconds <= _AS_GOOD * least_s:
                num_matched = matches.get(candidate.name, 0)
                if num_matched > most:
                    chosen, most = candidate, num_matched
    return chosen

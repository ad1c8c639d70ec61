"""A conversation stays where it was."""

from collections.abc import Sequence
from operator import attrgetter

import xxhash

from services.global_proxy.policies.base import C, Policy, Prompt, in_turn

_BOUND = 1.25  # of the mean load: what an instance may have
_ALWAYS_ALLOWED = 4  # requests: an idle deployment does not tear a conversation's parallel requests apart

_num_requests = attrgetter("num_requests")


class ConsistentHash(Policy):
    """Rendezvous hashing of the session with bounded load; a prompt without a session goes where there is least to do.

    Of n instances, one that leaves or comes moves the n-th part of the sessions (D. Thaler, C. Ravishankar, "Using
    name-based mappings to increase hit rates", 1998). An instance above 1.25 times the mean load is passed over for the
    session's next best (V. Mirrokni et al., "Consistent hashing with bounded loads", 2018). Nothing is remembered, so
    several proxies agree.
    """

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, candidates: Sequence[C], prompt: Prompt) -> C:
        if prompt.session is None:
            self._turn += 1
            return min(in_turn(candidates, self._turn), key=_num_requests)
        total = sum(map(_num_requests, candidates)) + 1
        bound = max(_BOUND * total / len(candidates), _ALWAYS_ALLOWED)
        digest = xxhash.xxh3_64_intdigest
        seed = digest(prompt.session)
        chosen, best = candidates[0], -1
        for candidate in candidates:
            if candidate.num_requests < bound:
                score = digest(candidate.name.encode(), seed)
                if score > best:
                    chosen, best = candidate, score
        return chosen

"""Plain engines, which do prefill and decode together: what they are given, alone or beside P and D."""

import time
from collections.abc import Iterable

from services.global_proxy.call import Call
from services.global_proxy.instances.instance import Instance
from services.global_proxy.instances.pool import Pool
from services.global_proxy.legs import Legs, Opened
from services.global_proxy.observing.metrics import Metrics
from services.global_proxy.policies.base import Prompt
from services.global_proxy.policies.response_time import answer_s, tokens_s
from services.global_proxy.short_prompts import ShortPrompts

_STALE_S = 60.0  # without a request: what was seen of a way may have been one bad moment
_WEIGHT = 0.05  # of each newly seen answer

# Why one is given a request: labels.MIXED_REASONS.
ALONE = "alone"  # there is no D
OTHERS_DOWN = "others_down"  # no P or no D is up
SOONER = "sooner"  # by the costs that were seen
EVEN_SHARE = "even_share"  # these are not known yet, and the plain engines have less to do
LOOK_AGAIN = "look_again"  # for a minute P and D were always the sooner


class MixedEngines:
    """Decides which requests go to a plain engine, and sends them there whole.

    Beside P and D a request goes where its last token is expected the soonest, by what each engine was seen to cost and
    has to do now. While that is not known of both ways, all engines get equally many.
    """

    def __init__(self, legs: Legs, short: ShortPrompts, metrics: Metrics) -> None:
        self.pool = legs.mixed_pool
        self._prefill = legs.prefill_pool
        self._decode = legs.decode_pool
        self._legs = legs
        self._short = short
        self._metrics = metrics
        self._share_made = 1.0  # of `max_new_tokens`, by the answers seen
        self._turn = 0
        self._given_s = self._kept_s = time.monotonic()  # when a request last went to a plain engine; to P and D

    async def open(self, call: Call, why: str) -> Opened:
        """Raises UpstreamError, NoInstanceError."""
        self._metrics.mixed.labels(why).inc()
        return await self._legs.mixed(call)

    def why(self, call: Call, needs_one_engine: bool) -> str | None:
        """Why a plain engine is to be given the request; None: P and D are, or D alone if it needs one engine."""
        call.prompt.num_expected = round(call.prompt.max_new_tokens * self._share_made)
        if not self._decode.instances:
            return ALONE
        up, prefill, decode = (_untried(pool, call) for pool in (self.pool, self._prefill, self._decode))
        if not up:
            return None
        if not (prefill and decode):
            return OTHERS_DOWN
        if call.body.answer_may_be_kept:  # and what goes on from it is for D
            return None
        why = self._why_beside(call, needs_one_engine, up, prefill, decode)
        if why is None:
            self._kept_s = time.monotonic()
        else:
            self._given_s = time.monotonic()
        return why

    def saw_answer(self, num_new_tokens: int, max_new_tokens: int) -> None:
        """How many tokens one had of those it might have had."""
        if max_new_tokens > 0:
            self._share_made += _WEIGHT * (min(num_new_tokens / max_new_tokens, 1.0) - self._share_made)

    def _why_beside(
        self,
        call: Call,
        needs_one_engine: bool,
        up: list[Instance],
        prefill: list[Instance],
        decode: list[Instance],
    ) -> str | None:
        if not (_knows_all(up) and prefill[0].costs.has_prefill and decode[0].costs.has_decode):
            return EVEN_SHARE if self._has_less_to_do(up, (*prefill, *decode)) else None
        now_s = time.monotonic()
        if now_s - self._given_s > _STALE_S:
            return LOOK_AGAIN
        if now_s - self._kept_s > _STALE_S:
            return None
        prompt = call.prompt
        cached = self.pool.policy.cached_tokens(prompt)
        mixed_s = min(answer_s(one, prompt, cached.get(one.name, 0)) for one in up)
        if needs_one_engine:
            others_s = min(_alone_s(one, prompt, prefill[0]) for one in decode)
        else:
            others_s = self._disaggregated_s(prompt, prefill, decode)
        return SOONER if mixed_s < others_s else None

    def _has_less_to_do(self, up: list[Instance], others: tuple[Instance, ...]) -> bool:
        """Per engine; each in turn if they have the same."""
        self._turn += 1
        ours, theirs = (_num_requests(some) * len(other) for some, other in ((up, others), (others, up)))
        return ours < theirs or (ours == theirs and self._turn % 2 == 0)

    def _disaggregated_s(self, prompt: Prompt, prefill: list[Instance], decode: list[Instance]) -> float:
        cached = self._prefill.policy.cached_tokens(prompt)
        prefill_s = min(
            one.costs.prefill_s(max(prompt.num_tokens - cached.get(one.name, 0), 0), one.num_tokens) for one in prefill
        )
        return prefill_s + self._short.handoff_s + min(tokens_s(one, prompt) for one in decode)


def _untried(pool: Pool, call: Call) -> list[Instance]:
    return [instance for instance in pool.up() if instance not in call.tried]


def _knows_all(up: list[Instance]) -> bool:
    return up[0].costs.has_prefill and up[0].costs.has_decode


def _num_requests(instances: Iterable[Instance]) -> int:
    return sum(instance.num_requests for instance in instances)


def _alone_s(decode: Instance, prompt: Prompt, prefill: Instance) -> float:
    """Of D alone; where nothing is known of its prefills, as one that computes like this P."""
    costs = decode.costs if decode.costs.has_prefill else prefill.costs
    return costs.prefill_s(prompt.num_tokens, 0) + tokens_s(decode, prompt)

"""What work costs on one instance, fitted online from what was observed there.

P's answer to a prompt takes a + b * its tokens + c * the tokens ahead of it. D's time per token is a + b * requests
+ c * tokens there.

An instance that nobody knows yet is taken to be like the others of its role (`Fleet`). Taken to be what a constant
says, it would be flooded, or left without a request and so never become known: both were seen in simulation.
"""

import weakref

from services.global_proxy.policies.least_squares import Fit

_PRIOR_PREFILL = (0.01, 1e-4, 1e-4)  # s; s per token of the prompt; s per token ahead of it
_PRIOR_DECODE = (0.02, 1e-4, 2e-7)  # s; s per request; s per token

_FEWEST = 4  # samples, before an instance is believed to differ from the fleet, or D given prompts meant for P
_MOST_HELD_UP = 4.0  # tokens' time that streams on D may be held up by such a prompt
_FLEET_LEARNS = 64  # samples that its fit takes all
_SAMPLE_EVERY = 4  # the fleet's fit takes every fourth sample once it has enough
_STALE_AFTER = 100  # samples from each other instance without one from this
_OPTIMISM = 0.9  # a stale instance is taken to cost so much less, again and again, down to what the fleet costs


class Fleet:
    """What the instances of one role cost on the whole. Not thread-safe."""

    def __init__(self) -> None:
        self.prefill = Fit(_PRIOR_PREFILL)
        self.decode = Fit(_PRIOR_DECODE)
        self.num_observed = 0
        self._members: list[weakref.ref[Costs]] = []
        self._turn = 0

    def join(self, costs: "Costs") -> None:
        self._members.append(weakref.ref(costs))

    def look_after_one(self) -> None:
        """Each member in turn, one for each sample: tell it what the fleet has learned, or forget that it was there."""
        self.num_observed += 1
        self._turn = (self._turn + 1) % len(self._members)
        costs = self._members[self._turn]()
        if costs is None:
            self._members[self._turn] = self._members[-1]
            self._members.pop()
        else:
            costs.catch_up(_STALE_AFTER * len(self._members))


class Costs:
    """What work costs on one instance, of either role. Not thread-safe.

    The coefficients are plain attributes, because policies read those of every candidate for every request.

    Args:
        fleet: of the instance's role; until enough of its own was observed, its costs are the fleet's.
    """

    __slots__ = (
        "__weakref__",
        "_decode",
        "_fleet",
        "_observed_at",
        "_optimism",
        "_prefill",
        "decode_base_s",
        "decode_request_s",
        "decode_token_s",
        "prefill_ahead_s",
        "prefill_base_s",
        "prefill_token_s",
    )

    def __init__(self, fleet: Fleet | None = None) -> None:
        self._fleet = Fleet() if fleet is None else fleet
        self._fleet.join(self)
        self._prefill = Fit(self._fleet.prefill.theta)
        self._decode = Fit(self._fleet.decode.theta)
        self._observed_at = self._fleet.num_observed
        self._optimism = 1.0
        self._publish()

    def _publish(self) -> None:
        fleet = self._fleet
        self.prefill_base_s, self.prefill_token_s, self.prefill_ahead_s = self._believed(self._prefill, fleet.prefill)
        self.decode_base_s, self.decode_request_s, self.decode_token_s = self._believed(self._decode, fleet.decode)

    def _believed(self, own: Fit, of_fleet: Fit) -> tuple[float, float, float]:
        if own.num_samples < _FEWEST:
            return of_fleet.theta
        if self._optimism == 1.0:
            return own.theta
        one, two, three = (
            max(min(mine, common), mine * self._optimism)
            for mine, common in zip(own.theta, of_fleet.theta, strict=True)
        )
        return one, two, three

    def catch_up(self, stale_after: int) -> None:
        """Take over what the fleet has learned, as far as nothing is known of this instance, or only of long ago.

        An instance that was slow may be one that no policy chooses any more, so nobody would see it recover. It becomes
        cheaper little by little, until a request goes there; what that finds counts more than what was before.
        """
        if self._fleet.num_observed - self._observed_at > stale_after:
            self._observed_at = self._fleet.num_observed
            self._optimism *= _OPTIMISM
            self._prefill.discount()
            self._decode.discount()
            self._publish()
        elif self._prefill.num_samples < _FEWEST or self._decode.num_samples < _FEWEST:
            self._publish()

    @property
    def has_prefill(self) -> bool:
        """Whether enough prefills were observed to act on, here or in the fleet."""
        return max(self._prefill.num_samples, self._fleet.prefill.num_samples) >= _FEWEST

    @property
    def has_decode(self) -> bool:
        """Whether enough answers were observed to act on, here or in the fleet."""
        return max(self._decode.num_samples, self._fleet.decode.num_samples) >= _FEWEST

    def observe_prefill(self, num_tokens: int, num_tokens_ahead: int, seconds: float) -> None:
        """A prompt was answered.

        Args:
            num_tokens: of the prompt; without those that the instance says it had cached.
            num_tokens_ahead: prompt tokens in flight there when this one was sent, itself left out.
            seconds: from sending to the answer (P), or to the first token (D alone).
        """
        self._prefill.observe(num_tokens, num_tokens_ahead, seconds)
        self._observed(self._fleet.prefill, num_tokens, num_tokens_ahead, seconds)

    def observe_decode(self, num_requests: int, num_tokens: int, seconds_per_token: float) -> None:
        """An answer ended.

        Args:
            num_requests: in flight there, this one included: the mean of when its tokens began and ended. With the load
                at one of these ends, a burst would look as if load cost nothing.
            num_tokens: likewise.
            seconds_per_token: from its first token to its last, by the tokens after the first.
        """
        self._decode.observe(num_requests, num_tokens, seconds_per_token)
        self._observed(self._fleet.decode, num_requests, num_tokens, seconds_per_token)

    def _observed(self, of_fleet: Fit, load: int, more_load: int, seconds: float) -> None:
        fleet = self._fleet
        if of_fleet.num_samples < _FLEET_LEARNS or fleet.num_observed % _SAMPLE_EVERY == 0:
            of_fleet.observe(load, more_load, seconds)
        fleet.look_after_one()
        self._observed_at = fleet.num_observed
        self._optimism = 1.0
        self._publish()

    def prefill_s(self, num_tokens: int, num_tokens_ahead: int) -> float:
        """Expected seconds from sending a prompt to its answer."""
        return self.prefill_base_s + self.prefill_token_s * num_tokens + self.prefill_ahead_s * num_tokens_ahead

    def seconds_per_token(self, num_requests: int, num_tokens: int) -> float:
        """Expected TPOT of each request on an instance with this load."""
        return self.decode_base_s + self.decode_request_s * num_requests + self.decode_token_s * num_tokens


def break_even_tokens(
    prefill: Costs, decode: Costs, alone: Costs, handoff_s: float, num_tokens_ahead: int = 0, num_streams: int = 0
) -> int:
    """The longest prompt that D had better compute itself, in tokens; 0: always disaggregate.

    Up to there D alone answers sooner than P, the hand-off and D, by more than what the streams on D lose together
    while it computes the prompt, and none of them loses more than a few tokens' time. 0 until enough was observed of
    both. What streams lose is taken to be P's time for the prompt: D's own, where they go on meanwhile, is longer.

    Args:
        prefill: costs of the P that would be chosen.
        decode: costs of the D.
        alone: whose prefills tell what a prompt costs on D: its own, which are those of requests that came to it alone;
            or P's, where nothing is known of these.
        handoff_s: from P's answer to D's first token, observed.
        num_tokens_ahead: prompt tokens in flight at P.
        num_streams: requests in flight at D.
    """
    if not (prefill.has_prefill and decode.has_decode) or handoff_s < 0.0:
        return 0
    gained_s = prefill.prefill_base_s + prefill.prefill_ahead_s * num_tokens_ahead + handoff_s - alone.prefill_base_s
    if gained_s <= 0.0:
        return 0
    held_up_s = max(prefill.prefill_token_s, 1e-9)  # each stream, by each token
    bound = _MOST_HELD_UP * decode.seconds_per_token(num_streams, 0) / held_up_s
    net_s = alone.prefill_token_s + held_up_s * (num_streams - 1)  # lost by each token: D's less P's, and the streams'
    if net_s > 0.0:
        bound = min(bound, gained_s / net_s)
    return int(bound)

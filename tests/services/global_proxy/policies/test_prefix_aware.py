from collections.abc import Mapping

import pytest

from services.global_proxy.policies.base import Prompt
from services.global_proxy.policies.cost_model import Costs
from services.global_proxy.policies.prefix_aware import PrefixAware
from tests.services.global_proxy.policies.standins import StandIn, prompt, stand_ins, teach_decode, teach_prefill

SYSTEM = bytes(range(256)) * 16


def turn(number: int) -> Prompt:
    """1024 tokens that all have, then 256 of its own."""
    return prompt(1280, SYSTEM + b"%4d" % number * 256)


class ExactIndex:
    """Knows some instances; the others tell nothing."""

    def __init__(self, cached: dict[str, int], is_known: bool = True) -> None:
        self._cached = cached
        self._is_known = is_known

    def matches(self, prompt: Prompt) -> Mapping[str, int] | None:
        return {name: num for name, num in self._cached.items() if num} if self._is_known else None

    def matched_tokens(self, instance_name: str, prompt: Prompt) -> int | None:
        return self._cached.get(instance_name) if self._is_known else None


@pytest.fixture
def instances() -> list[StandIn]:
    instances, costs = stand_ins(4), Costs()
    teach_prefill(costs, 0.01, 1e-4)
    teach_decode(costs, 0.01, 1e-3)
    for instance in instances:
        instance.costs = costs
    return instances


class TestMixed:
    def test_where_the_beginning_was_sent_unless_the_answer_comes_later_there(self, instances: list[StandIn]) -> None:
        policy = PrefixAware("mixed")
        policy.started(instances[2], turn(0))
        assert policy.cached_tokens(turn(1))[instances[2].name] > 900
        assert policy.choose(instances, turn(1)) is instances[2]
        instances[2].num_requests = 20  # each new token takes so many ms more; of 1024 tokens computing takes 100
        assert policy.choose(instances, turn(2)) is not instances[2]

    def test_how_many_tokens_are_expected_counts(self, instances: list[StandIn]) -> None:
        policy = PrefixAware("mixed")
        policy.started(instances[2], turn(0))
        instances[2].num_requests = 20
        short = turn(1)
        short.num_expected = 2
        assert policy.choose(instances, short) is instances[2]


class TestP:
    def test_where_the_beginning_was_sent_unless_waiting_costs_more(self, instances: list[StandIn]) -> None:
        policy = PrefixAware("prefill")
        policy.started(instances[2], turn(0))
        assert policy.choose(instances, turn(1)) is instances[2]
        instances[2].num_tokens = 900
        assert policy.choose(instances, turn(2)) is instances[2]
        instances[2].num_tokens = 1200
        assert policy.choose(instances, turn(3)) is not instances[2]

    def test_a_prompt_was_not_sent_just_because_it_was_chosen_for(self, instances: list[StandIn]) -> None:
        policy = PrefixAware("prefill")
        first = policy.choose(instances, turn(0))
        assert policy.choose(instances, turn(1)) is not first

    def test_the_exact_index_is_believed_where_it_knows(self, instances: list[StandIn]) -> None:
        policy = PrefixAware("prefill", ExactIndex({instances[2].name: 0, instances[3].name: 512}))
        policy.started(instances[2], turn(0))  # evicted since
        assert policy.choose(instances, turn(1)) is instances[3]
        policy.started(instances[1], turn(0))  # tells no events
        assert policy.choose(instances, turn(1)) is instances[1]

    def test_without_token_ids_what_was_sent_counts(self, instances: list[StandIn]) -> None:
        policy = PrefixAware("prefill", ExactIndex({instances[3].name: 512}, is_known=False))
        policy.started(instances[2], turn(0))
        assert policy.choose(instances, turn(1)) is instances[2]


class TestD:
    def test_the_prefix_decides_among_those_that_are_about_as_fast(self, instances: list[StandIn]) -> None:
        policy = PrefixAware("decode")
        policy.started(instances[0], turn(0))  # the prefill of it, which says nothing about any D
        first = policy.choose(instances, turn(0))
        assert first is not instances[0]
        assert policy.choose(instances, turn(1)) is first
        first.num_requests = 3  # 13 ms a token, beside 10
        assert policy.choose(instances, turn(2)) is not first

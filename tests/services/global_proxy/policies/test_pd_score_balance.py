import pytest

from services.global_proxy.policies.cost_model import Costs
from services.global_proxy.policies.pd_score_balance import PDScoreBalance
from tests.services.global_proxy.policies.standins import StandIn, prompt, stand_ins, teach_decode


@pytest.fixture
def instances() -> list[StandIn]:
    """The first has the least to do, the second is next."""
    instances, costs = stand_ins(3), Costs()
    teach_decode(costs, 0.01, 5e-5, 1e-6)
    for instance, num_tokens in zip(instances, (1000, 2000, 50_000), strict=True):
        instance.costs = costs
        instance.num_requests, instance.num_tokens = 4, num_tokens
    return instances


def test_the_emptiest_d_is_left_to_the_long_prompt_that_will_need_it(instances: list[StandIn]) -> None:
    policy = PDScoreBalance()
    p = StandIn("p:1")
    short, long = prompt(100), prompt(9000)
    assert policy.choose(instances, short) is instances[0]
    policy.started(p, long)
    assert policy.choose(instances, short) is instances[1]
    assert policy.choose(instances, long) is instances[0]
    assert policy.choose(instances, short) is instances[0]  # the long one is placed, and counted by the instance itself


def test_a_shorter_prompt_in_prefill_takes_nothing_away(instances: list[StandIn]) -> None:
    policy = PDScoreBalance()
    policy.started(StandIn("p:1"), prompt(3000))
    assert policy.choose(instances, prompt(9000)) is instances[0]


def test_what_is_no_longer_in_prefill_is_forgotten(instances: list[StandIn]) -> None:
    policy = PDScoreBalance()
    p = StandIn("p:1")
    prompts = [prompt(9000) for _ in range(3)]
    for wanted in (*prompts, prompts[0]):
        policy.started(p, wanted)
    policy.choose(instances, prompts[0])
    for wanted in prompts:
        policy.finished(p, wanted)
    assert policy.choose(instances, prompt(100)) is instances[0]
    assert not policy._keys
    assert not policy._in_prefill


def test_a_d_above_the_cap_gets_nothing_however_fast_it_is(instances: list[StandIn]) -> None:
    instances[0].num_requests = 9  # 1.5 times the mean of 6 is 9, counting the one asked for
    for instance in instances[1:]:
        instance.num_requests = 4
        instance.costs = Costs()
        teach_decode(instance.costs, 0.1, 5e-4)
    assert PDScoreBalance().choose(instances, prompt(100)) is not instances[0]
    instances[0].num_requests = 8
    assert PDScoreBalance().choose(instances, prompt(100)) is instances[0]


def test_there_is_room_whatever_waits(instances: list[StandIn]) -> None:
    policy = PDScoreBalance()
    for _ in range(100):
        policy.started(StandIn("p:1"), prompt(500))
    for num in (1, 2, 3):
        assert policy.choose(instances[:num], prompt(100)) in instances[:num]

from services.global_proxy.policies.least_active import LeastActive, WeightedLeastActive
from tests.services.global_proxy.policies.standins import prompt, stand_ins


def test_the_fewest_requests_whatever_their_tokens() -> None:
    instances = stand_ins(3)
    for instance, load in zip(instances, ((2, 10), (1, 9000), (3, 0)), strict=True):
        instance.num_requests, instance.num_tokens = load
    for policy in (LeastActive(), WeightedLeastActive()):
        assert {policy.choose(instances, prompt()).name for _ in range(4)} == {instances[1].name}


def test_among_equals_the_fewest_tokens_count_if_weighted() -> None:
    instances = stand_ins(3)
    for instance, num_tokens in zip(instances, (50, 40, 60), strict=True):
        instance.num_requests, instance.num_tokens = 1, num_tokens
    weighted = WeightedLeastActive()
    assert {weighted.choose(instances, prompt()).name for _ in range(4)} == {instances[1].name}
    plain = LeastActive()
    assert len({plain.choose(instances, prompt()).name for _ in range(3)}) == 3

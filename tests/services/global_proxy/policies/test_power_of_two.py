import pytest

from services.global_proxy.policies.power_of_two import PowerOfTwo
from tests.services.global_proxy.policies.standins import prompt, stand_ins


@pytest.mark.parametrize(("role", "better"), [("prefill", 0), ("decode", 1)])
def test_of_two_the_one_with_less_of_what_counts(role: str, better: int) -> None:
    instances = stand_ins(2)
    instances[0].num_requests, instances[0].num_tokens = 5, 100
    instances[1].num_requests, instances[1].num_tokens = 1, 9000
    policy = PowerOfTwo(role)
    assert {policy.choose(instances, prompt()).name for _ in range(20)} == {instances[better].name}


def test_the_worst_of_many_is_never_chosen_and_all_others_are() -> None:
    instances = stand_ins(5)
    for number, instance in enumerate(instances):
        instance.num_requests = number
    policy = PowerOfTwo("decode")
    chosen = {policy.choose(instances, prompt()).name for _ in range(500)}
    assert chosen == {i.name for i in instances[:4]}

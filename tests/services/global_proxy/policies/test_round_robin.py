from services.global_proxy.policies.round_robin import RoundRobin
from tests.services.global_proxy.policies.standins import prompt, stand_ins


def test_each_in_turn() -> None:
    policy, instances = RoundRobin(), stand_ins(3)
    names = [policy.choose(instances, prompt()).name for _ in range(6)]
    assert sorted(names[:3]) == [i.name for i in instances]
    assert names[3:] == names[:3]

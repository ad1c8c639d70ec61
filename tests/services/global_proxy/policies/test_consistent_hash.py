from services.global_proxy.policies.consistent_hash import ConsistentHash
from tests.services.global_proxy.policies.standins import StandIn, prompt, stand_ins

SESSIONS = [b"session %d" % i for i in range(400)]


def placed(instances: list[StandIn]) -> dict[bytes, str]:
    policy = ConsistentHash()  # a new one each time: nothing is remembered
    return {session: policy.choose(instances, prompt(session=session)).name for session in SESSIONS}


def test_an_instance_that_leaves_moves_its_own_sessions_alone() -> None:
    instances = stand_ins(8)
    before = placed(instances)
    gone = instances.pop(3)
    after = placed(instances[::-1])
    moved = {session for session in SESSIONS if before[session] != after[session]}
    assert moved == {session for session in SESSIONS if before[session] == gone.name}
    assert 20 <= len(moved) <= 90  # about an eighth


def test_a_crowded_instance_is_passed_over_for_always_the_same_next() -> None:
    instances = stand_ins(8)
    first = placed(instances)[SESSIONS[0]]
    crowded = next(i for i in instances if i.name == first)
    crowded.num_requests = 4
    assert placed(instances)[SESSIONS[0]] != first
    assert len({placed(instances)[SESSIONS[0]] for _ in range(3)}) == 1
    for instance in instances:
        instance.num_requests = 4  # all alike: nothing to gain by moving
    assert placed(instances)[SESSIONS[0]] == first


def test_a_prompt_of_no_session_goes_where_there_is_least_to_do() -> None:
    instances = stand_ins(3)
    instances[0].num_requests = instances[2].num_requests = 1
    policy = ConsistentHash()
    assert {policy.choose(instances, prompt()).name for _ in range(3)} == {instances[1].name}

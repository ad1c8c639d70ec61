from services.global_proxy.policies.prefill_score_balance import PrefillScoreBalance
from tests.services.global_proxy.policies.standins import prompt, stand_ins, teach_prefill


def test_tokens_ahead_count_not_requests() -> None:
    instances = stand_ins(2)
    instances[0].num_requests, instances[0].num_tokens = 1, 8000
    instances[1].num_requests, instances[1].num_tokens = 5, 500
    policy = PrefillScoreBalance()
    assert {policy.choose(instances, prompt()).name for _ in range(4)} == {instances[1].name}


def test_a_slow_p_gets_a_prompt_only_if_it_answers_sooner_all_the_same() -> None:
    fast, slow = instances = stand_ins(2)
    teach_prefill(fast.costs, 0.01, 1e-4)
    teach_prefill(slow.costs, 0.01, 3e-4)
    policy = PrefillScoreBalance()
    fast.num_tokens = 1000  # 0.01 + 0.1 + 0.1 s there, 0.01 + 0.3 s on the other
    assert policy.choose(instances, prompt(1000)) is fast
    fast.num_tokens = 3000  # 0.01 + 0.1 + 0.3 s
    assert policy.choose(instances, prompt(1000)) is slow

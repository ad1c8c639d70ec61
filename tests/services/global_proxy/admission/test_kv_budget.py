"""What is learned of how much of `max_tokens` requests use."""

import random
from types import SimpleNamespace

from services.global_proxy.admission.kv_budget import KvBudget


def test_fraction_is_what_nine_in_ten_use() -> None:
    budget = KvBudget(1000)
    prompt = SimpleNamespace(num_tokens=100, max_new_tokens=1000)
    assert budget.need(prompt) == 1101
    rng = random.Random(1)
    for _ in range(5000):
        budget.learn(rng.randint(0, 500), 1000)
    assert 0.40 < budget.fraction < 0.50
    for _ in range(500):
        budget.learn(1000, 1000)
    assert budget.fraction > 0.99
    for _ in range(5000):
        budget.learn(0, 1000)
    assert 0.05 <= budget.fraction < 0.06
    budget.learn(0, 0)

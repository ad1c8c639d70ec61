"""Goodput beyond saturation, simulated: an engine that batches, and gets slower when too much is asked of it."""

import asyncio
import random
from types import SimpleNamespace

from services.global_proxy.admission.errors import NotAdmittedError
from services.global_proxy.admission.kv_budget import KvBudget
from services.global_proxy.admission.queue import AdmissionQueue, QueueSettings
from tests.services.global_proxy.admission.clock import now_s, run

BATCH = 16  # sequences for which a token takes no longer than for one
TOKEN_S = 0.02
MEAN_TOKENS = 50
SATURATION_PER_S = BATCH / (TOKEN_S * MEAN_TOKENS)
DEADLINE_S = 6.0
RUN_S = 60.0


class Engine:
    """More than twice its batch makes it preempt: work is done twice."""

    def __init__(self) -> None:
        self.num_running = 0

    async def generate(self, num_tokens: int) -> None:
        self.num_running += 1
        try:
            while num_tokens > 0:
                crowding = max(1.0, self.num_running / BATCH)
                if crowding > 2:
                    crowding *= 1 + (crowding - 2)
                await asyncio.sleep(10 * TOKEN_S * crowding)
                num_tokens -= 10
        finally:
            self.num_running -= 1


async def goodput(load: float, max_in_flight: int) -> float:
    """Requests a second answered by their deadline, in the second half of the run."""
    rng = random.Random(7)
    engine = Engine()
    queue = AdmissionQueue(max_in_flight, KvBudget(), QueueSettings(max_wait_s=3.0), now_s=now_s)
    num_good = 0

    async def ask() -> None:
        nonlocal num_good
        arrived_s = now_s()
        num_tokens = 10 * rng.randint(1, MEAN_TOKENS // 5 - 1)
        prompt = SimpleNamespace(num_tokens=10, max_new_tokens=num_tokens)
        try:
            reserved = queue.try_enter(prompt) or await queue.enter(prompt, 0, arrived_s + DEADLINE_S)
        except NotAdmittedError:
            return
        entered_s = now_s()
        try:
            async with asyncio.timeout(arrived_s + DEADLINE_S - entered_s):
                await engine.generate(num_tokens)
            queue.ended_well(now_s() - entered_s, num_tokens, num_tokens)
            num_good += arrived_s > RUN_S / 2
        except TimeoutError:
            pass
        finally:
            queue.leave(reserved, has_arrived=False)

    async with asyncio.TaskGroup() as scope:
        while now_s() < RUN_S:
            scope.create_task(ask())
            await asyncio.sleep(rng.expovariate(load * SATURATION_PER_S))
    assert (queue.num_in_flight, queue.num_waiting, queue.kv.reserved_tokens) == (0, 0, 0)
    return num_good / (RUN_S / 2)


def test_goodput_is_flat_beyond_saturation() -> None:
    at_saturation, at_twice, at_four_times = (run(goodput(load, BATCH + BATCH // 4)) for load in (1, 2, 4))
    assert at_saturation > 0.85 * SATURATION_PER_S
    assert at_twice > 0.9 * at_saturation
    assert at_four_times > 0.9 * at_saturation
    assert max(at_twice, at_four_times) < 1.2 * at_saturation


def test_without_a_limit_it_is_not() -> None:
    assert run(goodput(4, 10**9)) < 0.3 * SATURATION_PER_S

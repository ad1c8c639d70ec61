"""Which prompts D computes itself."""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from services.global_proxy.instances.pool import Pool
from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.observing.metrics import Metrics
from services.global_proxy.policies.base import Prompt
from services.global_proxy.policies.round_robin import RoundRobin
from services.global_proxy.short_prompts import ShortPrompts
from tests.services.global_proxy.calls import make_instance


@dataclass
class Pools:
    prefill: Pool
    decode: Pool

    def short(self, min_prefill_tokens: int | None = None) -> ShortPrompts:
        return ShortPrompts(self.prefill, self.decode, min_prefill_tokens)


@pytest.fixture
def pools() -> Iterator[Pools]:
    table, metrics = LoadTable.create(), Metrics()
    pools = Pools(Pool("prefill", RoundRobin(), table), Pool("decode", RoundRobin(), table))
    pools.prefill.set_instances([make_instance(table, metrics, 0, "prefill")])
    pools.decode.set_instances([make_instance(table, metrics, 1, "decode")])
    yield pools
    table.close()


def prompt(num_tokens: int) -> Prompt:
    return Prompt(num_tokens, max_new_tokens=1, session=None, text=b"")


def alone(short: ShortPrompts, num_tokens: int, times: int = 64) -> int:
    """How many of so many prompts D computes."""
    num_alone = 0
    for _ in range(times):
        if short.applies(prompt(num_tokens)):
            short.gave_to_decode()
            num_alone += 1
    return num_alone


def test_a_bound_that_is_given(pools: Pools) -> None:
    short = pools.short(100)
    assert (alone(short, 99), alone(short, 100)) == (64, 0)
    assert alone(pools.short(0), 1) == 0


def test_while_nothing_is_known_all_are_handed_off(pools: Pools) -> None:
    short = pools.short()
    short.saw_handoff(0.05)
    assert alone(short, 1) == 0
    assert short.min_prefill_tokens == 0


def test_the_bound_is_found_where_handing_off_costs_more_than_it_saves(pools: Pools) -> None:
    """P and D compute a token in 100 us; to hand off costs 50 ms."""
    (prefill,), (decode,) = pools.prefill.instances, pools.decode.instances
    short = pools.short()
    for num_tokens in (50, 500, 1000, 2000) * 20:
        prefill.costs.observe_prefill(num_tokens, 0, 0.01 + num_tokens * 1e-4)
        decode.costs.observe_prefill(num_tokens, 0, 0.01 + num_tokens * 1e-4)
        decode.costs.observe_decode(4, 4000, 0.02)
        short.saw_handoff(0.05)
    assert alone(short, 10_000) == 0
    assert short.min_prefill_tokens > 0
    bound = short.min_prefill_tokens
    assert (alone(short, bound - 1), alone(short, bound)) == (64, 0)


def test_the_bound_follows_the_load(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    (prefill,), (decode,) = pools.prefill.instances, pools.decode.instances
    short = pools.short()
    for num_tokens, num_ahead in ((50, 0), (500, 1000), (1000, 0), (2000, 4000)) * 20:
        prefill.costs.observe_prefill(num_tokens, num_ahead, 0.01 + (num_tokens + num_ahead) * 1e-4)
        decode.costs.observe_decode(4, 4000, 0.02)
        short.saw_handoff(0.005)
    decode.begin(100)
    alone(short, 10_000)
    idle = short.min_prefill_tokens
    prefill.begin(2000)
    alone(short, 10_000)
    assert short.min_prefill_tokens == idle  # it does not look for every prompt
    now_s = 1.0
    alone(short, 10_000)
    assert 0 < 4 * idle < short.min_prefill_tokens


def test_a_bad_moment_of_d_is_not_held_against_it_for_ever(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = 0.0
    monkeypatch.setattr(time, "monotonic", lambda: now_s)
    (prefill,), (decode,) = pools.prefill.instances, pools.decode.instances
    short = pools.short()
    for num_tokens in (50, 500, 1000, 2000) * 20:
        prefill.costs.observe_prefill(num_tokens, 0, 0.01 + num_tokens * 1e-4)
        decode.costs.observe_decode(4, 4000, 0.02)
        short.saw_handoff(0.05)
    assert alone(short, 10) == 64, "taken for a P"
    for _ in range(4):
        decode.costs.observe_prefill(10, 0, 1.5)
    now_s = 1.0
    assert alone(short, 10) == 0
    now_s = 61.0
    assert alone(short, 10) == 64


def test_with_nobody_there_there_is_no_bound(pools: Pools) -> None:
    pools.prefill.set_instances([])
    short = pools.short()
    short.saw_handoff(10.0)
    alone(short, 10_000)
    assert short.min_prefill_tokens == 0

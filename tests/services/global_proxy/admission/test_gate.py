"""The way in, over a real load table and a pool of Ds."""

import asyncio
import time
from collections.abc import Iterator

import pytest

from services.global_proxy.admission.errors import OverloadedError, QueueTimeoutError, RateLimitError
from services.global_proxy.admission.gate import Gate
from services.global_proxy.admission.queue import QueueSettings
from services.global_proxy.admission.rate_limit import RateLimits
from services.global_proxy.instances.instance import Instance
from services.global_proxy.instances.pool import Pool
from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.membership.member import InstanceSpec, LoadReport, Member
from services.global_proxy.observing.metrics import Metrics
from services.global_proxy.policies.base import Prompt
from services.global_proxy.policies.round_robin import RoundRobin
from services.global_proxy.security.api_keys import ApiKey


@pytest.fixture
def table() -> Iterator[LoadTable]:
    table = LoadTable.create()
    yield table
    table.close()


def prompt(num_tokens: int = 10, max_new_tokens: int = 10) -> Prompt:
    return Prompt(num_tokens, max_new_tokens, None, b"")


def make_gate(table: LoadTable, num_decode: int = 1, max_active: int = 4, worker: int = 0, **queueing: float) -> Gate:
    """Of a proxy that has so many Ds, and gives each 1.25 times `max_active`."""
    metrics, writer = Metrics(), table.writer(worker)
    pool = Pool("decode", RoundRobin(), table)
    instances = []
    for slot in range(num_decode):
        member = Member(InstanceSpec("decode", f"http://h:{slot + 1}"), slot, "active", "file")
        counts = metrics.instances.add("decode", member.name, slot)
        instances.append(Instance(member, table, writer, counts, connect_timeout_s=1.0))
    pool.set_instances(instances)
    settings = QueueSettings(
        max_waiting=int(queueing.get("max_waiting", 8)), max_wait_s=queueing.get("max_wait_s", 30.0)
    )
    return Gate((pool,), table, writer, settings, max_active)


def fill(gate: Gate) -> int:
    """Let in as many as there is room for."""
    count = 0
    while gate.try_enter(prompt()) is not None:
        count += 1
    return count


async def test_as_many_as_the_ds_are_to_be_given(table: LoadTable) -> None:
    assert fill(make_gate(table, num_decode=2)) == 10
    assert table.num_in_flight() == 10


async def test_a_d_that_drains_makes_room_for_nobody(table: LoadTable) -> None:
    gate = make_gate(table, num_decode=2)
    leaving = gate._answering[0].instances[0]
    leaving.set_member(leaving.member.but("draining"))
    gate.look()
    assert fill(gate) == 5


async def test_who_waits_goes_in_when_another_leaves(table: LoadTable) -> None:
    gate = make_gate(table)
    first = gate.try_enter(prompt())
    assert first is not None
    fill(gate)
    waiting = asyncio.create_task(gate.enter(prompt(), None, 0, time.monotonic() + 30))
    await asyncio.sleep(0)
    assert not waiting.done()
    assert table.num_queued() == 1
    first.leave()
    admitted = await waiting
    assert table.num_queued() == 0
    admitted.leave()
    assert table.num_in_flight() == 4


async def test_kv_that_ds_report_as_full_keeps_requests_out(table: LoadTable) -> None:
    gate = make_gate(table)
    table.set_report(0, LoadReport(1, 0, 990, 1000, 1.0))
    gate.look()
    first = gate.try_enter(prompt(5, 100))
    assert first is not None, "one must run, or none ever will"
    assert gate.try_enter(prompt(5, 100)) is None
    table.set_report(0, LoadReport(0, 0, 0, 1000, 2.0))
    gate.look()
    assert gate.try_enter(prompt(5, 100)) is not None


async def test_a_full_queue_refuses_at_once(table: LoadTable) -> None:
    gate = make_gate(table, max_waiting=0)
    fill(gate)
    with pytest.raises(OverloadedError) as refused:
        await gate.enter(prompt(), None, 0, time.monotonic() + 30)
    assert refused.value.retry_after_s is not None
    assert refused.value.retry_after_s >= 1
    assert table.num_queued() == 0


async def test_nobody_waits_longer_than_allowed(table: LoadTable) -> None:
    gate = make_gate(table, max_wait_s=0.02)
    fill(gate)
    with pytest.raises(QueueTimeoutError):
        await gate.enter(prompt(), None, 0, time.monotonic() + 30)


async def test_a_key_beyond_its_rate(table: LoadTable) -> None:
    gate = make_gate(table)
    key = ApiKey("alice", b"", b"", RateLimits(requests_per_minute=1))
    gate.charge(key, prompt())
    gate.charge(None, prompt())
    with pytest.raises(RateLimitError):
        gate.charge(key, prompt())


async def test_two_workers_have_one_rate_and_one_limit() -> None:
    table = LoadTable.create(num_workers=2)
    gates = [make_gate(table, worker=worker) for worker in range(2)]
    key = ApiKey("alice", b"", b"", RateLimits(requests_per_minute=2))
    for gate in gates:
        gate.charge(key, prompt())
    for gate in gates:
        with pytest.raises(RateLimitError):
            gate.charge(key, prompt())
    assert gates[0].try_enter(prompt()) is not None
    assert [fill(gate) for gate in reversed(gates)] == [4, 0]
    table.close()


async def test_a_client_cannot_put_itself_before_others(table: LoadTable) -> None:
    gate = make_gate(table)
    first = gate.try_enter(prompt())
    assert first is not None
    fill(gate)
    deadline_s = time.monotonic() + 30
    polite = asyncio.create_task(gate.enter(prompt(), None, 0, deadline_s))
    pushing = asyncio.create_task(gate.enter(prompt(), None, -100, deadline_s))
    await asyncio.sleep(0)
    first.leave()
    await polite
    assert not pushing.done()
    pushing.cancel()
    await asyncio.gather(pushing, return_exceptions=True)


async def test_a_key_of_higher_priority_goes_first(table: LoadTable) -> None:
    gate = make_gate(table)
    first = gate.try_enter(prompt())
    assert first is not None
    fill(gate)
    deadline_s = time.monotonic() + 30
    usual = asyncio.create_task(gate.enter(prompt(), None, 0, deadline_s))
    urgent = asyncio.create_task(gate.enter(prompt(), ApiKey("boss", b"", b"", priority=-1), 0, deadline_s))
    await asyncio.sleep(0)
    first.leave()
    await urgent
    assert not usual.done()
    usual.cancel()
    await asyncio.gather(usual, return_exceptions=True)


async def test_whole_answers_too_say_how_long_one_must_wait(table: LoadTable) -> None:
    gate = make_gate(table)
    answered = gate.try_enter(prompt())
    assert answered is not None
    answered._entered_s -= 100
    answered.ended_well(None, 10)
    answered.leave()
    fill(gate)
    with pytest.raises(OverloadedError):
        await gate.enter(prompt(), None, 0, time.monotonic() + 10)


async def test_tokens_that_were_not_generated_are_not_charged(table: LoadTable) -> None:
    gate = make_gate(table)
    key = ApiKey("alice", b"", b"", RateLimits(tokens_per_minute=120))
    gate.charge(key, prompt(10, 100))
    with pytest.raises(RateLimitError):
        gate.charge(key, prompt(10, 100))
    gate.give_back(key, 100)
    gate.charge(key, prompt(10, 100))

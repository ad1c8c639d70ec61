"""The registry's states, applied."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from kv_transfer.auth import load_or_make_key
from services.global_proxy.instances.leg import Leg
from services.global_proxy.members import Members
from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.membership.member import InstanceSpec, Member, Role, State
from services.global_proxy.observing.metrics import Metrics
from services.global_proxy.policies.least_active import LeastActive
from services.global_proxy.policies.round_robin import RoundRobin
from services.global_proxy.settings import Settings
from tests.services.global_proxy.instances.raw_engine import WHOLE, RawEngine, is_silent, says

URL = "http://127.0.0.1:9"  # nobody is asked to be there


@pytest.fixture
def table() -> Iterator[LoadTable]:
    table = LoadTable.create()
    yield table
    table.close()


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


@pytest.fixture
async def members(table: LoadTable, metrics: Metrics, tmp_path: Path) -> AsyncIterator[Members]:
    settings = Settings(
        prefill_urls=(URL,),
        decode_urls=(URL,),
        key_file=tmp_path / "key",
        prefill_policy="round_robin",
        decode_policy="round_robin",
    )
    members = Members(settings, load_or_make_key(tmp_path / "key"), table, table.writer(0), metrics)
    yield members
    await members.close()


def member(role: Role, url: str, slot: int) -> Member:
    return Member(InstanceSpec(role, url), slot, "active", "file")


def state(*members: Member) -> State:
    return State(1, members, "round_robin", "round_robin")


def names(members: Members) -> tuple[list[str], list[str]]:
    prefill, decode, _ = ([instance.name for instance in pool.instances] for pool in members.pools)
    return prefill, decode


async def test_instances_come_and_go(members: Members, metrics: Metrics) -> None:
    p, d1, d2 = member("prefill", "http://h:1", 0), member("decode", "http://h:2", 1), member("decode", "http://h:3", 2)
    members.apply(state(p, d1))
    assert names(members) == (["h:1"], ["h:2"])
    (kept,) = members.decode.instances
    members.apply(state(p, d1, d2))
    assert names(members) == (["h:1"], ["h:2", "h:3"])
    assert members.decode.instances[0] is kept
    members.apply(state(p, d2))
    assert names(members) == (["h:1"], ["h:3"])
    labels = {"role": "decode", "instance": "h:2"}
    assert metrics.registry.get_sample_value("omni_proxy_instance_up", labels) is None


async def test_one_that_comes_again_in_another_slot_is_another(members: Members) -> None:
    members.apply(state(member("decode", "http://h:1", 0)))
    (before,) = members.decode.instances
    members.apply(state(member("decode", "http://h:1", 1)))
    (after,) = members.decode.instances
    assert after is not before
    assert (before.slot, after.slot) == (0, 1)


async def test_a_draining_one_is_still_there_but_not_chosen(members: Members, metrics: Metrics) -> None:
    one = member("decode", "http://h:1", 0)
    members.apply(state(one))
    assert members.decode.has_healthy()
    members.apply(state(replace(one, state="draining")))
    assert names(members) == ([], ["h:1"])
    assert not members.decode.has_healthy()
    labels = {"role": "decode", "instance": "h:1"}
    assert metrics.registry.get_sample_value("omni_proxy_instance_draining", labels) == 1


async def test_policies_are_replaced_when_they_change(members: Members) -> None:
    before = members.decode.policy
    members.apply(state())
    assert members.decode.policy is before
    members.apply(State(2, (), "round_robin", "least_active"))
    assert isinstance(members.decode.policy, LeastActive)
    assert isinstance(members.prefill.policy, RoundRobin)


async def test_others_hear_of_each_change(members: Members) -> None:
    heard: list[int] = []
    members.changed = lambda: heard.append(len(members.decode.instances))
    members.apply(state())
    members.apply(state(member("decode", "http://h:1", 0)))
    assert heard == [0, 1]


async def test_what_one_that_leaves_has_goes_on(members: Members) -> None:
    async with RawEngine(is_silent) as engine:
        members.apply(state(member("decode", engine.url, 0)))
        (instance,) = members.decode.instances
        leg = Leg(instance, 7)
        request = asyncio.create_task(leg.send(instance.endpoint.request(b"GET", b"/")))
        while engine.num_requests < 2:  # noqa: ASYNC110 (this one and its health check)
            await asyncio.sleep(0.001)
        members.apply(state())
        await engine.gone.wait()  # the check
        assert not request.done()
        assert instance.num_requests == 1
        request.cancel()
        await asyncio.wait([request])
        leg.close()
        assert instance.num_requests == 0


async def test_missing_roles(members: Members) -> None:
    async with RawEngine(says(WHOLE)) as engine:
        assert await members.missing_roles() == ["prefill", "decode"]
        members.apply(state(member("decode", engine.url, 0)))
        assert await members.missing_roles() == ["prefill"]


async def test_a_mixed_one_makes_up_for_all_others(members: Members) -> None:
    async with RawEngine(says(WHOLE)) as engine:
        members.apply(state(member("mixed", URL, 0)))
        assert await members.missing_roles() == ["mixed"]
        members.apply(state(member("mixed", URL, 0), member("decode", engine.url, 1)))
        assert await members.missing_roles() == ["prefill", "mixed"]
        members.apply(state(member("mixed", engine.url, 2), member("decode", URL, 3)))
        assert await members.missing_roles() == []


async def test_whether_a_role_is_missing_does_not_wait_for_one_that_has_left(members: Members) -> None:
    async with RawEngine(is_silent) as engine:
        members.apply(state(member("decode", engine.url, 0)))
        asked = asyncio.create_task(members.missing_roles())
        await engine.asked.wait()
        members.apply(state())
        assert await asked == ["prefill", "decode"]

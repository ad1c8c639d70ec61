"""Who is a member, who is told, and when an instance may go."""

import asyncio

import pytest

from services.global_proxy.membership.errors import StillBusyError, UnknownInstanceError
from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.membership.member import InstanceSpec, LoadReport, State
from services.global_proxy.membership.registry import Registry
from tests.services.global_proxy.membership.conftest import POLICIES, make_registry, spec

NAME = "10.0.0.1:8000"


def test_every_change_is_told_once_in_order(registry: Registry) -> None:
    states: list[State] = []
    registry.subscribe(states.append)
    registry.add(spec(1), "file")
    registry.add(spec(1), "joined")  # knows it already
    registry.drain(NAME)
    registry.drain(NAME)
    registry.set_policy("decode", "least_active")
    registry.set_policy("decode", "least_active")
    registry.remove(NAME)
    assert [state.version for state in states] == [1, 2, 3, 4, 5]
    assert [[member.state for member in state.members] for state in states] == [
        [],
        ["active"],
        ["draining"],
        ["draining"],
        [],
    ]
    assert [state.decode_policy for state in states] == ["round_robin"] * 3 + ["least_active"] * 2
    assert {state.prefill_policy for state in states} == {"round_robin"}


def test_an_agents_loss_takes_only_what_the_agent_named(registry: Registry) -> None:
    registry.add(spec(1), "file")
    registry.add(spec(2), "admin")
    registry.add(spec(3), "joined")
    for number in (1, 2, 3):
        registry.add(spec(number), "joined")
        registry.leave(f"10.0.0.{number}:8000")
    assert [(member.name, member.source) for member in registry.members()] == [
        (NAME, "file"),
        ("10.0.0.2:8000", "admin"),
    ]


def test_an_agents_own_drain_ends_as_it_joins_again_or_leaves(registry: Registry) -> None:
    registry.add(spec(1), "file")
    assert registry.drain(NAME, by="joined").state == "draining"
    assert registry.add(spec(1), "joined").state == "active"
    registry.drain(NAME, by="joined")
    registry.leave(NAME)
    assert registry.members()[0].state == "active"


def test_an_operators_drain_ends_only_by_the_operator(registry: Registry) -> None:
    registry.add(spec(1), "file")
    registry.drain(NAME, by="joined")
    registry.drain(NAME)
    assert registry.add(spec(1), "joined").state == "draining"
    registry.leave(NAME)
    assert registry.members()[0].state == "draining"
    assert registry.add(spec(1), "admin").state == "active"
    assert registry.members()[0].source == "file"


def test_an_agent_may_correct_its_addresses_and_an_operator_may_not(registry: Registry) -> None:
    old = registry.add(InstanceSpec("prefill", "http://h:1", kv_address="h:2"), "file")
    moved = InstanceSpec("prefill", "http://h:1", kv_address="h:3")
    with pytest.raises(ValueError, match=r"h:1: is a member already, as prefill instance .* remove it first"):
        registry.add(moved, "admin")
    new = registry.add(moved, "joined")
    assert (new.spec, new.slot, new.source) == (moved, old.slot, "file")
    with pytest.raises(ValueError, match="is a member already"):
        registry.add(InstanceSpec("decode", "http://h:1"), "joined")


def test_an_agent_that_tells_no_kv_events_leaves_them_as_they_are(registry: Registry) -> None:
    told = InstanceSpec("prefill", "http://10.0.0.1:8000", kv_events="10.0.0.1:9000")
    registry.add(told, "file")
    assert registry.add(InstanceSpec("prefill", "http://10.0.0.1:8000"), "joined").spec == told


def test_a_slot_is_given_again_only_when_nobody_can_write_to_it(registry: Registry, table: LoadTable) -> None:
    writer = table.writer(0)
    subscription = registry.subscribe(lambda state: None, is_remote=True)
    assert registry.add(spec(1), "admin").slot == 0
    assert registry.add(spec(2), "admin").slot == 1
    subscription.acknowledge(registry.state.version)
    writer.add(0, 1, 50)
    writer.set_down(0, 60.0)
    registry.remove(NAME)
    subscription.acknowledge(registry.state.version)
    assert registry.add(spec(3), "admin").slot == 2  # a request is there
    writer.add(0, -1, -50)
    registry.remove("10.0.0.2:8000")
    assert registry.add(spec(4), "admin").slot == 0
    assert not table.is_down(0)
    assert registry.add(spec(5), "admin").slot == 3  # the worker may still choose what was in slot 1
    with pytest.raises(ValueError, match="the load table has 4 slots, all in use: remove an instance first"):
        registry.add(spec(6), "admin")
    subscription.close()
    assert registry.add(spec(6), "admin").slot == 1


async def test_removing_waits_for_the_last_request(registry: Registry, table: LoadTable) -> None:
    states: list[State] = []
    registry.subscribe(states.append)
    member = registry.add(spec(1), "file")
    table.writer(1).add(member.slot, 1, 10)
    removing = asyncio.create_task(registry.remove_when_idle(NAME, 20.0))
    await asyncio.sleep(0.05)
    assert states[-1].members[0].state == "draining"
    assert not removing.done()
    table.writer(1).add_leases(member.slot, 1)
    table.writer(1).add(member.slot, -1, -10)
    await asyncio.sleep(0.05)
    assert not removing.done()  # somebody has yet to read its KV
    table.writer(1).add_leases(member.slot, -1)
    await removing
    assert states[-1].members == ()


async def test_removing_waits_for_a_worker_that_has_not_heard_of_it(registry: Registry) -> None:
    subscription = registry.subscribe(lambda state: None, is_remote=True)
    registry.add(spec(1), "file")
    removing = asyncio.create_task(registry.remove_when_idle(NAME, 20.0))
    await asyncio.sleep(0.05)
    assert not removing.done()
    subscription.acknowledge(registry.state.version)
    await removing


async def test_what_is_busy_stays_draining_unless_forced(registry: Registry, table: LoadTable) -> None:
    member = registry.add(spec(1), "file")
    table.writer(0).add(member.slot, 3, 10)
    with pytest.raises(StillBusyError, match=f"{NAME}: has 3 requests and the KV of 0 prompts after 0 s"):
        await registry.remove_when_idle(NAME, 0.0)
    assert registry.members()[0].state == "draining"
    await registry.remove_when_idle(NAME, 0.0, by_force=True)
    assert registry.members() == ()


async def test_adding_again_calls_a_removal_off(registry: Registry, table: LoadTable) -> None:
    member = registry.add(spec(1), "admin")
    table.writer(0).add(member.slot, 1, 10)
    removing = asyncio.create_task(registry.remove_when_idle(NAME, 20.0))
    await asyncio.sleep(0)
    registry.add(spec(1), "admin")
    table.writer(0).add(member.slot, -1, -10)
    with pytest.raises(ValueError, match="was added again while it drained"):
        await removing
    assert registry.members()[0].state == "active"


def test_reports_go_with_the_member(registry: Registry, table: LoadTable) -> None:
    member = registry.add(spec(1), "joined")
    registry.report(NAME, LoadReport(1, 2, 3, 4, 5.0))
    assert table.report(member.slot) is not None
    registry.leave(NAME)
    assert table.report(member.slot) is None
    with pytest.raises(UnknownInstanceError, match=f"no instance is called '{NAME}'; must be one of: there are none"):
        registry.report(NAME, LoadReport(1, 2, 3, 4, 5.0))


def test_values_that_are_wrong(table: LoadTable) -> None:
    with pytest.raises(ValueError, match="prefill policy: must be one of round_robin, least_active, got 'best'"):
        Registry(table, POLICIES, "best", "round_robin", mixed_policy="round_robin")
    registry = make_registry(table)
    with pytest.raises(ValueError, match="role: must be one of prefill, decode, mixed, got 'x'"):
        registry.set_policy("x", "round_robin")  # type: ignore[arg-type]

    def check(spec: InstanceSpec) -> None:
        raise ValueError("kv_address: layerwise needs one")

    with pytest.raises(ValueError, match="layerwise needs one"):
        Registry(table, POLICIES, "round_robin", "round_robin", check, mixed_policy="round_robin").add(
            spec(1), "joined"
        )

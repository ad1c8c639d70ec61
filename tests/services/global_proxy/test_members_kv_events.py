"""Whose KV events are followed, as members come and go."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from kv_transfer.auth import load_or_make_key
from services.global_proxy.members import Members
from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.membership.member import InstanceSpec, Member, State
from services.global_proxy.observing.metrics import Metrics
from services.global_proxy.prefix.index import KvEventIndex
from services.global_proxy.prefix.sockets import Endpoints
from services.global_proxy.settings import Settings
from tests.services.global_proxy.conftest import until

SPEC = InstanceSpec("prefill", "http://127.0.0.1:1", kv_events="127.0.0.1:2000")
NAME = SPEC.name


class Subscribers:
    """Whose events are followed; ending takes until `gate` is set."""

    def __init__(self, index: KvEventIndex) -> None:
        self.followed: dict[str, str] = {}
        self.gate = asyncio.Event()

    def add(self, name: str, endpoints: Endpoints) -> None:
        assert name not in self.followed
        self.followed[name] = endpoints.publish

    async def remove(self, name: str) -> None:
        del self.followed[name]
        await self.gate.wait()

    async def close(self) -> None:
        self.followed.clear()


@pytest.fixture
async def members(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Members]:
    monkeypatch.setattr("services.global_proxy.members.Subscribers", Subscribers)
    settings = Settings(prefill_urls=(), decode_urls=(), control_port=0)
    table = LoadTable.create(num_slots=4)
    key = load_or_make_key(tmp_path / "key")
    members = Members(settings, key, table, table.writer(0), Metrics(None, 0, 4))
    yield members
    members._subscribers.gate.set()  # type: ignore[attr-defined]
    await members.close()
    table.close()


def state(*members: Member) -> State:
    return State(1, members, "round_robin", "least_active")


def member(spec: InstanceSpec, slot: int = 0) -> Member:
    return Member(spec, slot, "active", "joined")


async def test_kv_events_are_followed_as_long_as_their_instance_is_a_member(members: Members) -> None:
    subscribers = members._subscribers
    assert isinstance(subscribers, Subscribers)
    members.apply(state(member(SPEC), member(InstanceSpec("prefill", "http://127.0.0.1:9"), 1)))
    assert subscribers.followed == {NAME: "tcp://127.0.0.1:2000"}
    members.apply(state())
    await asyncio.sleep(0)
    assert subscribers.followed == {}

    members.apply(state(member(SPEC, 2)))  # it is back before the first subscription has ended
    assert subscribers.followed == {}
    subscribers.gate.set()
    await until(lambda: subscribers.followed == {NAME: "tcp://127.0.0.1:2000"})
    members.apply(state(member(replace(SPEC, kv_events="127.0.0.1:3000"), 2)))
    await until(lambda: subscribers.followed == {NAME: "tcp://127.0.0.1:3000"})
    members.apply(state(member(replace(SPEC, kv_events=None), 2)))
    await until(lambda: not subscribers.followed)

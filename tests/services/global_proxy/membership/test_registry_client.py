"""A worker's end and the registry's, over a socketpair in one loop."""

import asyncio
import socket
from collections.abc import AsyncIterator

import msgspec
import pytest

from services.global_proxy.membership.channel import Channel
from services.global_proxy.membership.errors import ChannelClosedError, StillBusyError, UnknownInstanceError
from services.global_proxy.membership.load_table import LoadTable
from services.global_proxy.membership.member import State
from services.global_proxy.membership.messages import Add, Answer, Ready, StateChanged, ToRegistry, ToWorker
from services.global_proxy.membership.registry import Registry
from services.global_proxy.membership.registry_client import ChannelClient
from services.global_proxy.membership.worker_link import WorkerLink
from tests.services.global_proxy.membership.conftest import soon, spec, until

NAME = "10.0.0.1:8000"


@pytest.fixture
async def link(registry: Registry) -> AsyncIterator[tuple[WorkerLink, ChannelClient]]:
    registry.add(spec(1), "file")
    ours, theirs = socket.socketpair()
    link = WorkerLink(registry, await Channel.open(ours, ToRegistry))
    running = asyncio.create_task(link.run())
    client = await ChannelClient.open(theirs)
    yield link, client
    await client.close()
    await soon(running)
    link.close()


async def test_a_change_is_known_when_its_command_returns(
    registry: Registry, link: tuple[WorkerLink, ChannelClient]
) -> None:
    _, client = link
    seen: list[State] = []
    client.subscribe(seen.append)
    member = await client.add(spec(2, "prefill"))
    assert member == client.state.member("10.0.0.2:8000") == registry.members()[1]
    assert member.source == "admin"
    assert (await client.drain(NAME)).state == "draining"
    await client.set_policy("decode", "least_active")
    await client.remove(NAME, 20.0, by_force=False)
    assert client.state == registry.state
    assert seen[-1] == registry.state
    assert [state.version for state in seen] == list(range(2, 7))


async def test_the_change_is_sent_before_its_answer(registry: Registry) -> None:
    ours, theirs = socket.socketpair()
    link = WorkerLink(registry, await Channel.open(ours, ToRegistry))
    running = asyncio.create_task(link.run())
    channel: Channel[ToWorker] = await Channel.open(theirs, ToWorker)
    async with asyncio.timeout(20):
        assert await channel.receive() == StateChanged(registry.state)
        await channel.send(Add(7, spec(1)))
        (changed, answer) = (await channel.receive(), await channel.receive())
    assert changed == StateChanged(registry.state)
    assert answer == Answer(7, registry.members()[0])
    channel.close()
    await soon(running)
    link.close()


async def test_errors_are_the_registrys(
    registry: Registry, table: LoadTable, link: tuple[WorkerLink, ChannelClient]
) -> None:
    _, client = link
    with pytest.raises(UnknownInstanceError, match=f"must be one of: {NAME}"):
        await client.drain("nobody:1")
    with pytest.raises(ValueError, match="decode policy: must be one of"):
        await client.set_policy("decode", "best")
    table.writer(0).add(0, 1, 1)
    with pytest.raises(StillBusyError, match="has 1 requests and the KV of 0 prompts after 0 s"):
        await client.remove(NAME, 0.0, by_force=False)


async def test_the_registry_knows_how_far_a_worker_follows(
    registry: Registry, link: tuple[WorkerLink, ChannelClient]
) -> None:
    worker_link, client = link
    registry.drain(NAME)
    assert registry.applied_version < registry.state.version
    assert not worker_link.ready.is_set()
    await client.ready()
    await soon(worker_link.ready.wait())
    await client.set_policy("decode", "least_active")  # all that was sent before has arrived
    await client.ready()
    await until(lambda: registry.applied_version == registry.state.version)


async def test_a_worker_learns_that_the_registry_is_gone(registry: Registry, table: LoadTable) -> None:
    registry.add(spec(1), "file")
    table.writer(0).add(0, 1, 1)
    ours, theirs = socket.socketpair()
    link = WorkerLink(registry, await Channel.open(ours, ToRegistry))
    running = asyncio.create_task(link.run())
    client = await ChannelClient.open(theirs)
    removing = asyncio.create_task(client.remove(NAME, 300.0, by_force=False))
    await asyncio.sleep(0.05)
    running.cancel()
    with pytest.raises(ChannelClosedError, match="the registry's process is gone"):
        await removing
    ended, _ = await asyncio.wait({running}, timeout=20)  # and with it what the worker had asked for
    assert ended
    await soon(client.wait_closed())
    with pytest.raises(ChannelClosedError, match="the registry's process is gone"):
        await client.drain(NAME)
    await client.close()
    link.close()
    registry.set_policy("decode", "least_active")  # nobody waits for the worker that is gone
    assert registry.applied_version == registry.state.version


async def test_a_worker_that_does_not_read_gets_the_newest_state_alone(registry: Registry) -> None:
    ours, theirs = socket.socketpair()
    link = WorkerLink(registry, await Channel.open(ours, ToRegistry))
    running = asyncio.create_task(link.run())
    for _ in range(1000):
        for policy in ("least_active", "round_robin"):
            registry.set_policy("decode", policy)
        await asyncio.sleep(0)
    channel: Channel[StateChanged] = await Channel.open(theirs, StateChanged)
    count = 0
    version = 0
    async with asyncio.timeout(20):
        while version < registry.state.version:
            message = await channel.receive()
            assert message is not None
            assert message.state.version > version
            version = message.state.version
            count += 1
    assert count <= 1001
    channel.close()
    await soon(running)
    link.close()


@pytest.mark.parametrize(
    ("sent", "message"),
    [
        (b"\xff\xff\xff\xff", "a frame of 4294967295 bytes came"),
        (b"\x01\x00\x00\x00\xc1", "what came is no message"),
        (b"\x07\x00\x00\x00\x81\xa4type\xa1x"[:4] + b"\x81\xa4type\xa1", "what came is no message"),
    ],
)
async def test_nonsense_closes_the_channel(sent: bytes, message: str) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        channel: Channel[ToRegistry] = await Channel.open(ours, ToRegistry)
        theirs.send(sent)
        with pytest.raises(ChannelClosedError, match=message):
            async with asyncio.timeout(20):
                await channel.receive()
        channel.close()


async def test_a_frame_that_ends_early_is_the_end() -> None:
    ours, theirs = socket.socketpair()
    channel: Channel[ToRegistry] = await Channel.open(ours, ToRegistry)
    body = msgspec.msgpack.encode(Ready())
    with theirs:
        theirs.send(len(body).to_bytes(4, "little") + body + b"\x05\x00")
    async with asyncio.timeout(20):
        assert await channel.receive() == Ready()
        assert await channel.receive() is None
    channel.close()

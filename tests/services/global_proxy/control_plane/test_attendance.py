"""What becomes of an instance whose stream breaks, falls silent or comes again, and of one that the registry drains."""

import asyncio

import grpc
import pytest

from services.global_proxy.control_plane.server import ControlPlane
from services.global_proxy.membership.member import InstanceSpec
from tests.services.global_proxy.control_plane.planes import (
    KEY,
    NAME,
    URL,
    EndedError,
    instance,
    new_registry,
    plane,
    stream,
    until,
)


async def test_a_broken_stream_takes_the_instance_away_after_a_while() -> None:
    async with plane(rejoin_s=0.3) as proxy:
        async with stream(proxy.address) as agent:
            await agent.join(instance())
        assert proxy.is_there()  # it may come again
        await until(lambda: not proxy.is_there())
        assert proxy.server.num_joined == 0


async def test_a_silent_instance_is_lost() -> None:
    """Its connection stands: it is stopped, or its host is gone."""
    async with plane(silent_s=0.5) as proxy, stream(proxy.address) as agent:
        await agent.join(instance())
        with pytest.raises(EndedError) as ended:
            await agent.hear()
        assert (ended.value.code, ended.value.details) == (
            grpc.StatusCode.DEADLINE_EXCEEDED,
            "nothing heard for 0.5 s",
        )
        assert not proxy.is_there()


async def test_one_that_is_back_in_time_is_the_same_member() -> None:
    async with plane(rejoin_s=0.4) as proxy:
        async with stream(proxy.address) as agent:
            await agent.join(instance())
            before = proxy.member()
        async with stream(proxy.address) as agent:
            await agent.join(instance())
            await asyncio.sleep(0.6)
            assert proxy.member() == before
            assert proxy.server.num_joined == 1


@pytest.mark.parametrize("start_id", [b"first", b"second"])
async def test_the_newest_stream_of_an_instance_counts(start_id: bytes) -> None:
    """A new process has nothing of what the old one had: neither its drain nor its place in the load table's counts."""
    async with plane(rejoin_s=0.1) as proxy, stream(proxy.address) as old, stream(proxy.address) as new:
        await old.join(instance())
        proxy.registry.drain(NAME)
        await new.join(instance(start_id=start_id))
        assert (await old.command()).WhichOneof("kind") == "drain"
        assert (await old.until_ended()).code is grpc.StatusCode.OK
        if start_id == b"first":
            assert (await new.command()).WhichOneof("kind") == "drain"
        await asyncio.sleep(0.3)
        member = proxy.member()
        assert member is not None
        assert member.state == ("draining" if start_id == b"first" else "active")
        assert proxy.server.num_joined == 1


async def test_a_drain_is_told_once_and_again_after_a_new_join() -> None:
    async with plane() as proxy:
        async with stream(proxy.address) as agent:
            await agent.join(instance())
            proxy.registry.drain(NAME)
            assert (await agent.command()).WhichOneof("kind") == "drain"
            proxy.registry.add(InstanceSpec("prefill", "http://10.0.0.9:1"), "admin")  # another change of the state
            proxy.registry.add(InstanceSpec("prefill", URL), "admin")  # ends the drain
            proxy.registry.drain(NAME)
            assert (await agent.command()).WhichOneof("kind") == "drain"
            proxy.registry.remove(NAME)
            assert (await agent.command()).dismiss.reason == "removed from this proxy"
            assert (await agent.until_ended()).code is grpc.StatusCode.OK
        assert not proxy.is_there()
        assert proxy.server.num_joined == 0


async def test_what_the_deployment_file_names_stays() -> None:
    async with plane(rejoin_s=0.1) as proxy:
        proxy.registry.add(InstanceSpec("prefill", URL), "file")
        async with stream(proxy.address) as agent:
            await agent.join(instance())
            await agent.report(num_running=1)
            slot = proxy.registry.members()[0].slot
            await until(lambda: proxy.table.report(slot) is not None)
        await until(lambda: not proxy.server.num_joined)
        assert proxy.is_there()
        assert proxy.table.report(slot) is None


async def test_a_proxy_that_stops_removes_nobody() -> None:
    async with plane(rejoin_s=0.1) as proxy, stream(proxy.address) as agent, stream(proxy.address) as broken:
        await broken.join(instance(url="http://10.0.0.2:1"))
        broken.call.cancel()
        await agent.join(instance())
        await proxy.server.stop()
        await asyncio.sleep(0.3)
        assert len(proxy.registry.members()) == 2


@pytest.mark.parametrize("times", [{"report_interval_s": 0}, {"rejoin_s": -1}, {"silent_s": 1.5}])
async def test_times_that_cannot_work(times: dict[str, float]) -> None:
    _, registry = new_registry()
    with pytest.raises(ValueError, match=next(iter(times))):
        ControlPlane(registry, KEY, **times)

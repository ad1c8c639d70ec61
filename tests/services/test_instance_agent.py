"""The agent before real control planes: joining several, coming back, leaving, and whom it does not believe."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

import grpc
import pytest

from kv_transfer.auth import DeploymentKey
from services.global_proxy.control_plane import control_plane_pb2 as pb
from services.global_proxy.control_plane.handshake import SERVICE
from services.instance_agent import AgentSettings, InstanceAgent
from tests.services.global_proxy.control_plane.planes import KEY, OTHER_KEY, plane, until


@dataclass
class Load:
    num_running: int = 0
    num_waiting: int = 0
    kv_used_tokens: int = 0
    kv_total_tokens: int = 1000


@dataclass
class Engine:
    """Listens, and takes no requests."""

    port: int

    @property
    def name(self) -> str:
        return f"127.0.0.1:{self.port}"

    def agent(
        self,
        *proxies: str,
        key: DeploymentKey = KEY,
        load: Load | None = None,
        role: str = "decode",
        facts: dict[str, str] | None = None,
        **options: Any,
    ) -> InstanceAgent:
        facts = {"model": "m"} | (facts or {})
        settings = AgentSettings(proxies=proxies, role=role, url=f"http://{self.name}", facts=facts)
        return InstanceAgent(settings, key, lambda: load or Load(), **{"first_backoff_s": 0.05, **options})


@asynccontextmanager
async def engine(port: int = 0) -> AsyncIterator[Engine]:
    server = await asyncio.start_server(lambda _, writer: writer.close(), "127.0.0.1", port)
    async with server:
        yield Engine(server.sockets[0].getsockname()[1])


async def test_it_joins_every_proxy_reports_and_leaves() -> None:
    load = Load()
    async with plane() as first, plane() as second, engine() as at:
        async with at.agent(first.address, "127.0.0.1:1", second.address, load=load):
            for proxy in (first, second):
                await until(lambda proxy=proxy: proxy.is_there(at.name))
                member = proxy.member(at.name)
                assert member is not None
                assert (member.spec.role, member.source) == ("decode", "joined")
            load.num_running, load.kv_used_tokens = 3, 70
            for proxy in (first, second):
                await until(lambda proxy=proxy: (said := proxy.table.report(0)) and said.num_running == 3)
                report = proxy.table.report(0)
                assert report is not None
                assert (report.kv_used_tokens, report.kv_total_tokens) == (70, 1000)
        assert not first.is_there(at.name)
        assert not second.is_there(at.name)


async def test_it_comes_back_to_a_proxy_that_was_away() -> None:
    async with plane() as proxy:
        port = proxy.port
    async with engine() as at, at.agent(f"127.0.0.1:{port}"):
        for _ in range(2):  # late at first, then started again
            await asyncio.sleep(0.2)
            async with plane(port) as proxy:
                await until(lambda proxy=proxy: proxy.is_there(at.name))


async def test_a_proxy_by_its_name() -> None:
    async with plane() as proxy, engine() as at, at.agent(f"localhost:{proxy.port}"):
        await until(lambda: proxy.is_there(at.name))


async def test_a_name_that_nobody_knows_is_said_once_and_looked_up_again(caplog: pytest.LogCaptureFixture) -> None:
    """As a service's in a cluster, before it has an address."""
    caplog.set_level(logging.WARNING, "services.instance_agent")
    async with engine() as at, at.agent("nobody.invalid:7001"):
        await until(lambda: caplog.records)
        await asyncio.sleep(0.5)
    (said,) = [record.message for record in caplog.records]
    assert said.startswith("proxy nobody.invalid:7001: UNAVAILABLE: ")
    assert said.endswith("; trying again")


async def test_one_that_starts_again_elsewhere_is_another_and_the_old_one_is_forgotten() -> None:
    """As a pod with a new address: nobody has said that the old one leaves."""
    async with plane(report_interval_s=0.1, silent_s=0.4, rejoin_s=0.2) as proxy:
        async with engine() as before:
            agent = before.agent(proxy.address, role="mixed")
            await agent.__aenter__()
            await until(lambda: proxy.is_there(before.name))
            for task in agent._tasks:  # as SIGKILL would
                task.cancel()
            await asyncio.wait(agent._tasks)
        async with engine() as after, after.agent(proxy.address, role="mixed"):
            await until(lambda: proxy.is_there(after.name))
            await until(lambda: not proxy.is_there(before.name))
            assert [member.name for member in proxy.registry.members()] == [after.name]
            assert proxy.server.num_joined == 1


async def test_one_that_is_not_heard_any_more_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its stream stands, as when its host is cut off."""

    async def for_long(agent: InstanceAgent, timeout_s: float) -> None:
        await agent._leaving.wait()

    monkeypatch.setattr(InstanceAgent, "_wait", for_long)
    times: dict[str, Any] = {"report_interval_s": 0.1, "silent_s": 0.4, "rejoin_s": 30}
    async with plane(**times) as proxy, engine() as at, at.agent(proxy.address, role="mixed"):
        await until(lambda: proxy.is_there(at.name))
        await until(lambda: not proxy.is_there(at.name))


async def test_a_plain_engine_need_not_agree_in_what_hands_off() -> None:
    async with plane() as proxy, engine() as at, engine() as other, AsyncExitStack() as stack:
        for joining, role, connector in ((at, "mixed", "none"), (other, "decode", "omni")):
            facts = {"connector": connector, "mode": connector}
            await stack.enter_async_context(joining.agent(proxy.address, role=role, facts=facts))
            await until(lambda joining=joining: proxy.is_there(joining.name))


async def test_it_says_once_that_its_instance_does_not_listen(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("services.instance_agent._READY_INTERVAL_S", 0.01)
    monkeypatch.setattr("services.instance_agent._SAY_UNREADY_AFTER_S", 0.05)
    caplog.set_level(logging.WARNING, "services.instance_agent")
    async with engine() as at:
        pass
    async with plane() as proxy, at.agent(proxy.address):
        await until(lambda: caplog.records)
        await asyncio.sleep(0.1)
    (said,) = [record.message for record in caplog.records]
    assert said.startswith(f"http://{at.name} does not listen yet (")


async def test_it_waits_until_its_instance_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.instance_agent._READY_INTERVAL_S", 0.05)
    async with engine() as at:
        pass
    async with plane() as proxy, at.agent(proxy.address):
        await asyncio.sleep(0.3)
        assert not proxy.is_there(at.name)
        async with engine(at.port):
            await until(lambda: proxy.is_there(at.name))
    async with at.agent(proxy.address):  # and may leave while it waits
        pass


async def test_drained_and_dismissed_it_stays_away() -> None:
    drains = []
    async with plane() as proxy, engine() as at, at.agent(proxy.address, on_drain=drains.append) as agent:
        await until(lambda: proxy.is_there(at.name))
        proxy.registry.drain(at.name)
        await until(lambda: drains == [proxy.address])
        proxy.registry.remove(at.name)
        await until(lambda: all(task.done() for task in agent._tasks))
        assert not proxy.is_there(at.name)


async def test_with_another_key_it_goes_on_trying_and_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING, "services.instance_agent")
    async with plane() as proxy, engine() as at:
        async with at.agent(proxy.address, key=OTHER_KEY):
            await until(lambda: proxy.refused["not_genuine"] >= 3)
        assert not proxy.registry.members()
    (said,) = [record.message for record in caplog.records if record.name == "services.instance_agent"]
    assert said == f"proxy {proxy.address}: UNAUTHENTICATED: the deployment key was not proven; trying again"


@pytest.mark.parametrize("answer", ["a welcome without proof", "garbage", "nothing"])
async def test_what_is_no_proxy_of_ours_is_told_nothing_and_obeyed_in_nothing(
    answer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.instance_agent._ANSWER_S", 0.5)
    heard: list[pb.FromInstance] = []
    drains: list[str] = []

    async def join(_: object, context: Any) -> None:
        while isinstance(raw := await context.read(), bytes):
            heard.append(pb.FromInstance.FromString(raw))
            if answer == "garbage":
                await context.write(b"\xff\xff\xff")
            elif answer == "a welcome without proof":
                await context.write(pb.ToInstance(challenge=pb.Challenge(nonce=b"p" * 16)).SerializeToString())
                welcome = pb.Welcome(mac=b"m" * 32, report_interval_s=0.1)
                await context.write(pb.ToInstance(welcome=welcome).SerializeToString())
                drain = pb.ProxyMessage(drain=pb.Drain()).SerializeToString()
                await context.write(pb.ToInstance(sealed=pb.Sealed(body=drain, mac=b"m" * 32)).SerializeToString())

    server = grpc.aio.server()
    handler = grpc.stream_stream_rpc_method_handler(join)
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"Join": handler}),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        async with engine() as at, at.agent(f"127.0.0.1:{port}", on_drain=drains.append):
            await until(lambda: [said.WhichOneof("kind") for said in heard].count("hello") == 2)
    finally:
        await server.stop(0)
    assert {said.WhichOneof("kind") for said in heard} <= {"hello", "joining"}
    assert not drains

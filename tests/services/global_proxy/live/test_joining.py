"""Instances that join two proxies at once, are used by both, leave, are lost and come back."""

import asyncio
import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from kv_transfer.auth import load_or_make_key
from tests.services.global_proxy.faults.load import Load
from tests.services.global_proxy.faults.processes import EngineProcess, ServerProcess
from tests.services.global_proxy.live.conftest import Client, LiveProxy, Stage, eventually


async def start_agent(
    stage: Stage, engine: EngineProcess, controls: list[str], key_file: Path | None = None
) -> ServerProcess:
    agent = ServerProcess(stage.folder / f"agent{len(stage.processes)}.log")
    stage.processes.append(agent)
    key = str(key_file or stage.folder / "deployment.key")
    program = "tests.services.global_proxy.live.agent_program"
    await agent.run("-m", program, engine.role, engine.url, key, *controls)
    return agent


async def names(client: Client) -> set[str]:
    _, answer = await client.call("GET", "/admin/v1/instances")
    return {one["name"] for one in answer["instances"] if one["state"] == "active"}


async def report_of(client: Client, engine: EngineProcess) -> dict[str, Any]:
    _, state = await client.call("GET", "/admin/v1/state")
    report = next((one["report"] for one in state["instances"] if one["name"] == engine.name), None) or {}
    return {name: value for name, value in report.items() if name != "age_s"}


async def health(proxy: LiveProxy) -> tuple[int, bytes]:
    status, _, body = await proxy.call("GET", "/health")
    return status, body


async def test_instances_join_two_proxies_and_leave(stage: Stage) -> None:
    prefill, decode = await stage.engines(1, 2)
    controls = [f"127.0.0.1:{stage.free_port()}" for _ in range(2)]
    options = [("--control-port", control.partition(":")[2]) for control in controls]
    proxies = await asyncio.gather(stage.proxy([], *options[0], "--workers", "2"), stage.proxy([], *options[1]))
    for proxy in proxies:
        assert await health(proxy) == (503, b'{"status":"unavailable","missing":["prefill","decode"]}')
    first_worker, second_worker = proxies[0].workers()
    clients = [
        await proxies[0].client_of(first_worker),
        await proxies[0].client_of(second_worker),
        await proxies[1].client(),
    ]

    agents = {engine.name: await start_agent(stage, engine, controls) for engine in prefill + decode}
    for client in clients:
        await eventually(partial(names, client), {engine.name for engine in prefill + decode})
        for engine in prefill + decode:
            load = {"num_running": 3, "num_waiting": 1, "kv_used_tokens": 700, "kv_total_tokens": 10_000}
            await eventually(partial(report_of, client, engine), load)
    for proxy in proxies:
        await eventually(partial(status_of_health, proxy), 200)
    async with Load(proxies[0].url, 10) as first, Load(proxies[1].url, 10) as second:
        await asyncio.gather(first.successes(30), second.successes(30))
        assert all([len(await engine.seen("answered")) > 5 for engine in decode])

        leaver = agents[decode[0].name]
        os.kill(leaver.pid, signal.SIGTERM)
        for client in clients:
            await eventually(partial(names, client), {prefill[0].name, decode[1].name})
        assert leaver.process is not None
        async with asyncio.timeout(30):
            assert await leaver.process.wait() == 0
        num_seen = len(await decode[0].seen())
        await asyncio.gather(first.successes(20), second.successes(20))
        assert len(await decode[0].seen()) == num_seen

        await start_agent(stage, decode[0], controls)
        for client in clients:
            await eventually(partial(names, client), {engine.name for engine in prefill + decode})
        await asyncio.gather(first.successes(20), second.successes(20))
        assert len(await decode[0].seen()) > num_seen

        await agents[decode[1].name].kill()  # its requests have time to end: the engine lives
        for client in clients:
            await eventually(partial(names, client), {prefill[0].name, decode[0].name})
        await asyncio.gather(first.successes(20), second.successes(20))
    assert not first.failed_since()
    assert not second.failed_since()


async def status_of_health(proxy: LiveProxy) -> int:
    return (await health(proxy))[0]


async def test_a_stranger_is_refused_and_counted(stage: Stage, tmp_path_factory: pytest.TempPathFactory) -> None:
    (engine,), _ = await stage.engines(1, 0)
    control = f"127.0.0.1:{stage.free_port()}"
    proxy = await stage.proxy([], "--control-port", control.partition(":")[2])
    client = await proxy.client()
    other_key = tmp_path_factory.mktemp("stranger") / "deployment.key"
    load_or_make_key(other_key)
    await start_agent(stage, engine, [control], other_key)

    async def counted() -> bool:
        return await proxy.metric("joins_refused_total", reason="not_genuine") >= 1

    await eventually(counted, True)
    assert await names(client) == set()

"""Plain engines behind the real command: named at its start, joined, added by the command line, lost and back."""

import asyncio
import os
import signal
from collections import Counter
from functools import partial

import pytest

from tests.services.global_proxy.faults.load import Client, Load
from tests.services.global_proxy.faults.processes import EngineProcess
from tests.services.global_proxy.live.conftest import Stage, eventually
from tests.services.global_proxy.live.test_joining import names, report_of, start_agent, status_of_health
from tests.services.global_proxy.live.test_scale import listed, omni_cli


async def plain_engines(stage: Stage, num: int) -> list[EngineProcess]:
    first = len(stage.processes)
    engines = [EngineProcess("mixed", first + number, stage.folder, None) for number in range(num)]
    stage.processes += engines
    await asyncio.gather(*(engine.start() for engine in engines))
    return engines


async def num_seen(engines: list[EngineProcess]) -> list[int]:
    return [len(await engine.seen("answered")) for engine in engines]


async def test_they_join_serve_are_lost_and_come_back_elsewhere(stage: Stage) -> None:
    engines = await plain_engines(stage, 2)
    port = stage.free_port()
    proxy = await stage.proxy([], "--control-port", str(port), "--workers", "2")
    status, headers, _ = await proxy.call("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1})
    assert (status, headers["retry-after"]) == (503, "1")
    clients = [await proxy.client_of(worker) for worker in proxy.workers()]
    agents = [await start_agent(stage, engine, [f"localhost:{port}"]) for engine in engines]
    for client in clients:
        await eventually(partial(names, client), {engine.name for engine in engines})
        told = {"num_running": 3, "num_waiting": 1, "kv_used_tokens": 700, "kv_total_tokens": 10_000}
        for engine in engines:
            await eventually(partial(report_of, client, engine), told)
    await eventually(partial(status_of_health, proxy), 200)
    assert await proxy.metric("kv_tokens", role="mixed", part="total") == 20_000

    async with Load(proxy.url, 10) as load:
        await load.successes(40)
        assert all(number > 5 for number in await num_seen(engines))
        os.kill(agents[0].pid, signal.SIGTERM)
        for client in clients:
            await eventually(partial(names, client), {engines[1].name})
        await load.successes(20)
        assert not load.failed_since()

        await asyncio.gather(engines[1].kill(), agents[1].kill())
        (new,) = await plain_engines(stage, 1)
        await start_agent(stage, new, [f"localhost:{port}"])
        for client in clients:
            await eventually(partial(names, client), {new.name})
        await eventually(partial(status_of_health, proxy), 200)
        await load.successes(20)


async def test_beside_p_and_d_and_by_the_command_line(stage: Stage) -> None:
    prefill, decode = await stage.engines(1, 1)
    first, second = await plain_engines(stage, 2)
    proxy = await stage.proxy([*prefill, *decode, first], "--workers", "2")
    assert (await omni_cli(proxy, stage, "add", "mixed", second.url))[0] == 0
    mine = {first.name: ("active", "file"), second.name: ("active", "admin")}
    assert mine.items() <= (await listed(proxy, stage)).items()
    paths: Counter[str] = Counter()
    body = {"prompt": "a", "max_tokens": 1}
    for _ in range(24):
        status, headers, _ = await proxy.call("POST", "/v1/completions", body)
        assert status == 200
        paths[headers["x-omni-path"]] += 1
    assert set(paths) == {"mixed", "disaggregated"}
    assert all(await num_seen([*prefill, *decode, first, second]))

    async with Load(proxy.url, 10) as load:
        await load.successes(20)
        assert (await omni_cli(proxy, stage, "remove", second.name))[0] == 0
        assert second.name not in await listed(proxy, stage)
        await load.successes(20)
        for lost in (decode[0], first):  # whichever kind is lost, the other takes over
            failed_before = len(load.failed_since())
            await lost.kill()
            await proxy.is_without(lost)
            await load.successes(20)
            failed = load.failed_since()[failed_before:]
            assert all(outcome.is_stream and outcome.kind == "error_event" for outcome in failed)  # it had begun there
            await lost.start()
            await proxy.each_is_ready()
    assert "Traceback" not in proxy.log_file.read_text()


@pytest.mark.parametrize("slow_role", ["mixed", "decode"])
async def test_requests_go_where_they_were_seen_to_end_sooner(stage: Stage, slow_role: str) -> None:
    prefill, decode = await stage.engines(1, 1)
    mixed = await plain_engines(stage, 1)
    for engine in decode + mixed:
        await engine.set(prefill_s=0.005, step_s=0.1 if engine.role == slow_role else 0.005)
    proxy = await stage.proxy(prefill + decode + mixed)
    paths: list[str] = []
    async with Client(proxy.url) as client:
        for number in range(40):
            outcome = await client.ask(f"request {number}", num_tokens=8, stream=True)
            assert outcome.kind == "good"
            assert outcome.headers is not None
            paths.append(outcome.headers["x-omni-path"])
    sooner = "disaggregated" if slow_role == "mixed" else "mixed"
    assert set(paths[:8]) == {"mixed", "disaggregated"}
    assert paths[-20:].count(sooner) >= 19, paths

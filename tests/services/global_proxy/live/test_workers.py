"""`--workers 3`: no worker is special, and what one does all know."""

import asyncio
import os
import signal
from functools import partial

import aiohttp

from omni.process import start_ticks
from tests.services.global_proxy.faults.load import Load
from tests.services.global_proxy.faults.processes import EngineProcess, until
from tests.services.global_proxy.live.conftest import Client, LiveProxy, Stage, eventually, num_running
from tests.standins.fast_engine import SLOW_DECODE, expected_text

LEAST_ACTIVE = ("--prefill-policy", "least_active", "--decode-policy", "least_active")


async def metric(client: Client, name: str, **labels: str) -> float:
    """As this worker says, summed over the series that have these labels."""
    wanted = [f'{label}="{value}"' for label, value in labels.items()]
    lines = [line for line in (await client.text("/metrics")).splitlines() if line.startswith(f"omni_proxy_{name}")]
    return sum(float(line.rpartition(" ")[2]) for line in lines if all(label in line for label in wanted))


async def complete(client: Client, prompt: str) -> None:
    status, answer = await client.call("POST", "/v1/completions", {"prompt": prompt, "max_tokens": 3})
    assert (status, answer["choices"][0]["text"]) == (200, expected_text(prompt, 3))


async def one_client_each(proxy: LiveProxy) -> list[Client]:
    return [await proxy.client_of(worker) for worker in proxy.workers()]


async def hold(client: Client, number: int) -> asyncio.Task[object]:
    """A request that D does not answer."""
    body = {"prompt": f"{SLOW_DECODE} {number}", "max_tokens": 3}
    return asyncio.create_task(client.call("POST", "/v1/completions", body))


async def test_each_knows_what_all_do(stage: Stage) -> None:
    prefill, decode = await stage.engines(1, 3)
    proxy = await stage.proxy(prefill + decode, "--workers", "3", *LEAST_ACTIVE)
    assert len(proxy.workers()) == 3
    clients = await one_client_each(proxy)
    for number, client in enumerate(clients):
        for sequence in range(number + 1):
            await complete(client, f"client {number} asks {sequence}")
    done = [await metric(client, "requests_total", endpoint="/v1/completions", code="200") for client in clients]
    assert done == [6, 6, 6]

    held = []
    for number in range(2):  # each worker has two in flight
        for worker in proxy.workers():
            held.append(await hold(await proxy.client_of(worker), number))
            await eventually(lambda: num_held(decode), len(held))
    assert await num_running(decode) == [2, 2, 2]
    for client in clients:
        assert [await metric(client, "active_requests", instance=engine.name) for engine in decode] == [2, 2, 2]
        assert await in_flight(client) == 6
    for request in held:
        request.cancel()
    await asyncio.wait(held)
    for client in clients:
        await eventually(partial(in_flight, client), 0)
    assert await num_running(decode) == [0, 0, 0]

    assert (await clients[0].call("PUT", "/admin/v1/policies/decode", {"policy": "round_robin"}))[0] == 200
    before = [len(await engine.seen()) for engine in decode]
    for number, client in enumerate(clients):
        for _ in range(4 - number):
            await complete(client, "in turn")
    assert [len(await engine.seen()) for engine in decode] == [count + 3 for count in before]


async def num_held(engines: list[EngineProcess]) -> int:
    return sum(await num_running(engines))


async def in_flight(client: Client) -> int:
    return int((await client.call("GET", "/admin/v1/state"))[1]["num_in_flight"])


async def test_one_killed_under_load_takes_only_its_own_with_it(stage: Stage) -> None:
    prefill, decode = await stage.engines(1, 2)
    proxy = await stage.proxy(prefill + decode, "--workers", "3", *LEAST_ACTIVE)
    victim, other, _ = proxy.workers()
    its_client, client = await proxy.client_of(victim), await proxy.client_of(other)
    its_request, request = await hold(its_client, 1), await hold(client, 2)
    await eventually(lambda: num_held(decode), 2)
    async with Load(proxy.url) as load:
        await load.successes(40)
        assert not load.failed_since()
        os.kill(victim, signal.SIGKILL)
        await load.successes(100)
        await eventually(lambda: num_workers(proxy), 3)
        await load.successes(40)
    failed = load.failed_since()
    assert {outcome.kind for outcome in failed} <= {"broken"}
    assert len(failed) <= 10  # of 20 clients a third were its
    await asyncio.wait({its_request}, timeout=20)
    assert isinstance(its_request.exception(), aiohttp.ClientError)
    assert not request.done()

    assert victim not in proxy.workers()
    for worker in proxy.workers():
        shown = await proxy.client_of(worker)
        await eventually(partial(in_flight, shown), 1)
        assert sum([await metric(shown, "active_requests", instance=engine.name) for engine in decode]) == 1
        assert await metric(shown, "requests_total", endpoint="/v1/completions", code="200") >= load_good(load)
    request.cancel()
    await asyncio.wait({request})
    await eventually(partial(in_flight, shown), 0)


async def num_workers(proxy: LiveProxy) -> int:
    return len(proxy.workers())


def load_good(load: Load) -> int:
    return sum(outcome.kind == "good" for outcome in load.outcomes)


async def test_sigterm_lets_all_of_them_finish(stage: Stage) -> None:
    prefill, decode = await stage.engines(1, 2)
    proxy = await stage.proxy(prefill + decode, "--workers", "3")
    workers = proxy.workers()
    for engine in decode:
        await engine.set(step_s=0.03)
    clients = [await proxy.client_of(worker) for worker in workers]
    body = {"prompt": "to the end", "max_tokens": 60, "stream": True}
    streams = [asyncio.create_task(stream(client, body)) for client in clients]
    await eventually(lambda: num_held(decode), 3)
    proxy.terminate()
    await eventually(partial(status_of, proxy, "/health"), 503)
    assert (await proxy.call("GET", "/live"))[0] == 200
    assert (await proxy.call("POST", "/v1/completions", {"prompt": "a", "max_tokens": 1}))[0] == 503
    for text in await asyncio.gather(*streams):
        assert text.endswith("data: [DONE]\n\n")
        assert text.count("data: ") == 61
    assert proxy.process is not None
    async with asyncio.timeout(30):
        assert await proxy.process.wait() == 0, proxy.log_file.read_text()
    assert [start_ticks(worker) for worker in workers] == [None, None, None]
    assert "Traceback" not in proxy.log_file.read_text()


async def stream(client: Client, body: dict[str, object]) -> str:
    async with client.session.post(client.url + "/v1/completions", json=body) as answer:
        assert answer.status == 200
        return await answer.text()


async def status_of(proxy: LiveProxy, path: str) -> int:
    return (await proxy.call("GET", path))[0]


async def test_none_outlives_its_parent(stage: Stage) -> None:
    prefill, decode = await stage.engines(1, 1)
    proxy = await stage.proxy(prefill + decode, "--workers", "2")
    workers = proxy.workers()
    requests = [await hold(await proxy.client_of(worker), number) for number, worker in enumerate(workers)]
    await eventually(lambda: num_held(decode), 2)  # not even to drain
    os.kill(proxy.pid, signal.SIGKILL)
    await until(lambda: all(start_ticks(worker) is None for worker in workers), "the workers are gone")
    await asyncio.wait(requests)
    assert all(isinstance(request.exception(), aiohttp.ClientError) for request in requests)

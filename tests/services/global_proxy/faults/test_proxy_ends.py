"""The proxy stopped, killed or misled about the time, under load: rows 12, 13 and 27 of the table of faults."""

import asyncio
import time
from pathlib import Path

import aiohttp
import pytest

from tests.services.global_proxy.faults.conftest import Fault, Fleet, StartFleet
from tests.services.global_proxy.faults.load import Client, Load
from tests.services.global_proxy.faults.processes import ProxyProcess, until

_DRAIN_S = 2.0
_LONG = 3000  # tokens: far beyond any deadline of these tests

# Found by the interpreter in PYTHONPATH. Four times a second the wall clock is set forth or back by an hour.
_JUMPING_CLOCK = """
import sys, time
real_time, real_time_ns, monotonic = time.time, time.time_ns, time.monotonic
def jump_s():
    return 3600 * (-1 if int(monotonic() * 4) % 2 else 1)
time.time = lambda: real_time() + jump_s()
time.time_ns = lambda: real_time_ns() + jump_s() * 10**9
print("the clock jumps", file=sys.stderr)
"""


async def test_a_terminated_proxy_drains_up_to_its_limit(fleet: Fleet) -> None:
    proxy = await fleet.start_proxy("--drain-timeout-s", str(_DRAIN_S))
    async with Load(proxy.url) as load, Client(proxy.url) as client:
        await load.successes(20)
        long = asyncio.create_task(client.ask("a long one", _LONG, stream=True))
        await until(lambda: _is_running(fleet, "a long one"), "the stream runs")
        fault = Fault(load, proxy)
        fault.happens_now()
        proxy.terminate()
        await until(lambda: _answers(proxy.url, "/health", 503), "it is not ready any more")
        assert await _answers(proxy.url, "/live", 200)
        refused = await client.ask("too late")
        assert (refused.kind, refused.status) == ("refused", 503)
        assert int((refused.headers or {})["retry-after"]) >= 1
        ended = await long
        assert proxy.process is not None
        assert await asyncio.wait_for(proxy.process.wait(), 20) == 0
        ended_s = time.monotonic() - fault.began_s
    assert ended.ended_s - fault.began_s >= _DRAIN_S
    assert ended_s < _DRAIN_S + 10
    assert ended.kind == "error_event"
    assert ended.error is not None
    assert ended.error["code"] == 503
    in_flight = [outcome for outcome in load.outcomes if outcome.sent_s < fault.began_s]
    kinds = {(outcome.kind, outcome.status) for outcome in in_flight}
    # What was sent just before may reach the proxy just after: refused then, but never broken off.
    assert {("good", 200)} <= kinds <= {("good", 200), ("refused", 503)}
    await until(lambda: _none_is_running(fleet), "nothing runs on the engines")
    print(f"\n12: SIGTERM: refused after {refused.ended_s - fault.began_s:.2f} s, ended after {ended_s:.2f} s")


@pytest.mark.parametrize("joins", [False, True], ids=["told of the engines", "joined by the engines"])
async def test_a_killed_proxy_is_started_again(start_fleet: StartFleet, joins: bool) -> None:
    """On the same port at once. The engines abort what it had asked for, and it has all of them again."""
    fleet = await start_fleet(joins=joins)
    proxy = await fleet.start_proxy()
    await _has_all(proxy, fleet)
    async with fleet.under_load(proxy, spare_fds=4) as fault:
        fault.happens_now()
        await proxy.kill()
        await until(lambda: _none_is_running(fleet), "the engines have aborted the orphans")
        aborted_s = time.monotonic() - fault.began_s
        assert sum([len(await engine.seen("aborted")) for engine in fleet.engines]) >= 1
        await proxy.start()
        await fault.load.successes(20)
        kinds = {(outcome.kind, outcome.status) for outcome in fault.load.failed_since()}
        assert kinds <= {("broken", 0), ("broken", 200), *([("refused", 503)] if joins else [])}
        await _has_all(proxy, fleet)
        how = "engines join again" if joins else "started at once"
        fault.report(f"13: kill -9 of the proxy, {how} (orphans aborted after {aborted_s:.2f} s)")


async def test_deadlines_hold_while_the_clock_jumps(fleet: Fleet, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(_JUMPING_CLOCK)
    proxy = await fleet.start_proxy("--request-timeout-s", "3", PYTHONPATH=str(tmp_path))
    assert proxy.log_lines("the clock jumps")
    async with fleet.under_load(proxy) as fault, Client(proxy.url) as client:
        fault.happens_now()
        late = await client.ask("a long one", _LONG, stream=True)
        assert late.kind == "error_event"
        assert late.error is not None
        assert late.error["code"] == 504
        assert 3 <= late.ended_s - late.sent_s < 13
        await fault.load.successes(20)
        assert not fault.load.failed_since()
        assert await proxy.metric("ejections_total") == 0
        fault.report("27: the wall clock jumps by an hour, 4 times a second")


async def _has_all(proxy: ProxyProcess, fleet: Fleet) -> None:
    async def are_up() -> bool:
        return all([await proxy.of(engine, "instance_up") == 1 for engine in fleet.engines])

    await until(are_up, "all engines are up")


async def _answers(url: str, path: str, status: int) -> bool:
    async with aiohttp.request("GET", url + path) as answer:
        return answer.status == status


async def _is_running(fleet: Fleet, prompt: str) -> bool:
    running = [seen["prompt"] for engine in fleet.decode for seen in await engine.seen("running")]
    return prompt in running


async def _none_is_running(fleet: Fleet) -> bool:
    return not any([await engine.seen("running") for engine in fleet.engines])

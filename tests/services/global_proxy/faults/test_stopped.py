"""Engines that say nothing, stopped or cut off, under load: rows 6, 7 and 9 of the table of faults."""

import asyncio
import socket
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import pytest

from tests.services.global_proxy.faults.conftest import Fleet
from tests.services.global_proxy.faults.processes import EngineProcess, ProxyProcess, until
from tests.standins.fast_engine import BACKLOG

_SHORT_S = 1.0  # one health check of these proxies misses its 0.6 s
_WINDOW_S = 3 * (0.2 + 0.6)  # three do

with_workers = pytest.mark.parametrize("num_workers", [1, 2], ids=["1 worker", "2 workers"])


@with_workers
async def test_a_short_stop_aborts_no_request(fleet: Fleet, num_workers: int) -> None:
    proxy = await fleet.start_proxy("--workers", str(num_workers))
    async with fleet.under_load(proxy) as fault:
        fault.happens_now()
        with fleet.prefill[0].stopped(), fleet.decode[0].stopped():
            await asyncio.sleep(_SHORT_S)
        await fault.load.successes(20)
        assert not fault.load.failed_since()
        for engine in fleet.engines:
            assert not await engine.seen("aborted")
            assert await proxy.of(engine, "instance_up") == 1
        assert await proxy.metric("retries_total") == 0
        assert not proxy.log_lines("unhealthy") + proxy.log_lines("ejected")
        fault.report(f"6: SIGSTOP of a P and a D, {_SHORT_S:g} s, workers: {num_workers}")


@with_workers
async def test_a_long_stop_ejects_until_it_is_over(fleet: Fleet, num_workers: int) -> None:
    """What was in flight there is done by others; what the stopped ones still do is nobody's answer."""
    proxy = await fleet.start_proxy("--workers", str(num_workers))
    victims = (fleet.prefill[0], fleet.decode[0])
    async with fleet.under_load(proxy) as fault:
        for victim in victims:
            await victim.set(prefill_s=0.2, step_s=0.05)
        await asyncio.sleep(0.5)
        fault.happens_now()
        with victims[0].stopped(), victims[1].stopped():
            await proxy.is_without(*victims)
            await fault.load.successes(20)
        for victim in victims:
            await victim.set()
            await _takes_requests(proxy, victim)
        assert not fault.load.failed_since()
        for victim in victims:
            assert await victim.seen("aborted")
            assert await proxy.of(victim, "upstream_failures_total", reason="died") >= 1
            noticed_s = fault.noticed_s(victim.name, "is unhealthy", num_workers=num_workers)
            assert noticed_s < _WINDOW_S + 5
            fault.noticed_s(victim.name, "is healthy again", num_workers=num_workers)
        fault.report(f"7: SIGSTOP of a P and a D, longer, workers: {num_workers}", noticed_s)


async def test_a_cut_connection_is_noticed_by_connecting(fleet: Fleet) -> None:
    """New connections are not answered, old ones say nothing. Afterwards one request goes first."""
    proxy = await fleet.start_proxy()
    victim = fleet.decode[0]
    async with fleet.under_load(proxy) as fault:
        await victim.set(first_token_s=1.0)  # for the probe
        await victim.call("POST", "/standin/close_idle")  # or what comes goes unanswered on old connections
        fault.happens_now()
        with _cut(victim):
            await proxy.is_without(victim)
            await fault.load.successes(20)
        healed_s = time.monotonic()
        await _takes_requests(proxy, victim)
        served = [seen for seen in await victim.seen("answered", "running") if seen["arrived_s"] > healed_s]
        await victim.set()
        assert not fault.load.failed_since()
        assert await proxy.of(victim, "upstream_failures_total", reason="unreachable") >= 1
        assert proxy.log_lines(victim.name, "unreachable", "no connection within 0.5 s")
        assert await proxy.of(victim, "ejections_total") == 1
        fault.report("9: network cut between proxy and D", fault.noticed_s(victim.name, "is ejected"))
    probed_s = min(seen["first_byte_s"] for seen in served if seen["first_byte_s"])
    assert len([seen for seen in served if seen["arrived_s"] < probed_s]) == 1


@contextmanager
def _cut(engine: EngineProcess) -> Iterator[None]:
    """As if packets vanished: the kernel answers a stopped process's peers only while its backlog has room."""
    with engine.stopped(), ExitStack() as stack:
        for _ in range(2 * BACKLOG):
            sock = stack.enter_context(socket.socket())
            sock.setblocking(False)
            sock.connect_ex(("127.0.0.1", engine.port))
        yield


async def _takes_requests(proxy: ProxyProcess, engine: EngineProcess) -> None:
    num_before = len(await engine.seen("answered"))

    async def answers() -> bool:
        is_in = not await proxy.of(engine, "instance_ejected")
        return is_in and len(await engine.seen("answered")) > num_before + 1

    await until(answers, f"{engine.role} {engine.name} serves again")

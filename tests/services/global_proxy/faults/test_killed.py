"""kill -9 of engines under load: rows 1, 3, 4 and 23 of the table of faults."""

import asyncio
import time

import pytest

from tests.services.global_proxy.faults.conftest import Fleet, StartFleet
from tests.services.global_proxy.faults.load import REQUEST_TIMEOUT_S, Client, Outcome
from tests.services.global_proxy.faults.processes import EngineProcess, ProxyProcess, until


async def _is_back(proxy: ProxyProcess, engine: EngineProcess) -> None:
    """It answers requests again, and the proxy knows."""

    async def answers() -> bool:
        return bool(await engine.seen("answered")) and not await proxy.of(engine, "instance_ejected")

    await until(answers, f"{engine.role} {engine.name} serves again")


_NUM_DEATHS = 3  # so many, and it is ejected; then no more of them are logged

_CASES = [
    ("1: kill -9 P mid-prefill", "prefill", {"prefill_s": 0.5}),
    ("3: kill -9 D before the first token", "decode", {"first_token_s": 0.5}),
    ("4: kill -9 D mid-stream, another is up", "decode", {"step_s": 0.1}),
]


@pytest.mark.parametrize(("row", "role", "knobs"), _CASES, ids=[row for row, *_ in _CASES])
async def test_what_a_killed_engine_had_is_done_by_another(
    fleet: Fleet, row: str, role: str, knobs: dict[str, float]
) -> None:
    proxy = await fleet.start_proxy()
    victim = (fleet.prefill if role == "prefill" else fleet.decode)[0]
    async with fleet.under_load(proxy) as fault:
        await victim.set(**knobs)

        async def is_busy() -> bool:
            return await proxy.of(victim, "active_requests") >= 6

        await until(is_busy, "requests are in flight there")
        await asyncio.sleep(0.2)  # streams have begun
        fault.happens_now()
        await victim.kill()
        await fault.load.successes(20)

        assert await proxy.of(victim, "upstream_failures_total", reason="died") >= _NUM_DEATHS
        assert await proxy.metric("retries_total", role=role, reason="died") >= _NUM_DEATHS
        assert await proxy.of(victim, "ejections_total") == 1
        assert await proxy.of(victim, "instance_up") == 0
        assert len(proxy.log_lines(victim.name, "died")) <= _NUM_DEATHS
        assert bool(await proxy.metric("continued_streams_total")) == ("mid-stream" in row)
        await victim.start()
        await _is_back(proxy, victim)
        assert not fault.load.failed_since()
        fault.report(row, fault.noticed_s(victim.name, "is ejected"))
    fault.noticed_s(victim.name, "is unhealthy")


async def test_a_stream_whose_only_d_is_killed_ends_with_an_error(start_fleet: StartFleet) -> None:
    """And without [DONE]: the clients of the load see to that."""
    fleet = await start_fleet(2, 1)
    proxy = await fleet.start_proxy()
    decode = fleet.decode[0]
    async with fleet.under_load(proxy) as fault:
        await decode.set(step_s=0.1)
        await asyncio.sleep(0.5)
        fault.happens_now()
        await decode.kill()
        await until(lambda: len(fault.load.failed_since()) > 40, "all requests fail")
        await decode.start()
        await _is_back(proxy, decode)
    failed = fault.load.failed_since()
    assert {outcome.error["code"] for outcome in failed if outcome.kind == "error_event" and outcome.error} == {502}
    assert {outcome.status for outcome in failed if outcome.kind == "refused"} <= {502, 503}
    _come_again_later(failed)
    fault.report("4: kill -9 D mid-stream, no other is up", fault.noticed_s(decode.name, "is ejected"))


@pytest.mark.parametrize("role", ["prefill", "decode"])
async def test_all_engines_of_a_role_are_killed(fleet: Fleet, role: str) -> None:
    """Refused at once, but for the proxy that may have D compute prompts."""
    proxy, decode_only = await asyncio.gather(fleet.start_proxy(), fleet.start_proxy("--fallback", "decode_only"))
    victims = fleet.prefill if role == "prefill" else fleet.decode
    async with fleet.under_load(proxy) as fault, Client(decode_only.url) as other:
        fault.happens_now()
        for victim in victims:
            await victim.kill()
        for one in (proxy, decode_only):
            await one.is_without(*victims)
        assert (await proxy.call("GET", "/health"))[0] == 503
        known_s = time.monotonic()
        await until(lambda: len(fault.load.failed_since(known_s)) > 40, "requests fail")
        outcome = await other.ask("with a fallback", stream=True)
        if role == "prefill":
            assert outcome.headers is not None
            assert (outcome.kind, outcome.headers["x-omni-path"]) == ("good", "decode_only")
        else:
            assert (outcome.kind, outcome.status) == ("refused", 503)
        for victim in victims:
            await victim.start()
            await _is_back(proxy, victim)
    later = [outcome for outcome in fault.load.failed_since(known_s) if outcome.sent_s > known_s]
    assert {outcome.status for outcome in later} == {503}
    _come_again_later(fault.load.failed_since())
    assert max(outcome.ended_s - outcome.sent_s for outcome in later) < REQUEST_TIMEOUT_S / 3
    assert await proxy.metric("requests_total", code="503") >= len(later)
    fault.report(f"23: all {role} engines are down", fault.noticed_s(victims[0].name, "is unhealthy"))


def _come_again_later(outcomes: list[Outcome]) -> None:
    """Every 503 says when."""
    assert all(int((o.headers or {})["retry-after"]) >= 1 for o in outcomes if o.status == 503)

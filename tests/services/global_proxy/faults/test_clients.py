"""Clients that leave, lie or come in crowds: rows 14, 20, 21 and 24 of the table of faults."""

import asyncio
import contextlib
import statistics
import time
from pathlib import Path
from typing import Any

from kv_transfer.auth import DeploymentKey, load_or_make_key
from services.global_proxy.security.api_keys import new_key
from tests.services.global_proxy.faults.conftest import Fleet
from tests.services.global_proxy.faults.load import Client, Load
from tests.services.global_proxy.faults.processes import EngineProcess, ProxyProcess, until
from tests.standins.fast_engine import SLOW_DECODE, SLOW_PREFILL
from tests.standins.lease_holder import LeaseHolder

_LONG = 3000  # tokens: far beyond any deadline of these tests
_AT_ONCE_S = 5  # 1 s on a machine that has nothing else to do


async def test_what_a_client_left_behind_is_ended(fleet: Fleet) -> None:
    """In prefill: P stops, D is not asked. Before D's answer: the lease ends. Mid-stream: D stops."""
    holder = LeaseHolder(load_or_make_key(fleet.folder / "deployment.key"))
    proxy = await fleet.start_proxy("--connector", "omni")
    try:
        await _end_first_lease(proxy, fleet, holder)
        async with fleet.under_load(proxy) as fault, Client(proxy.url) as client:
            fault.happens_now()
            await _leave(client, fleet.prefill, SLOW_PREFILL)
            in_prefill_s = await _until_aborted(fleet.prefill, SLOW_PREFILL)
            assert not await _seen(fleet.decode, SLOW_PREFILL)

            await _give_up(client, fleet, holder.grant())
            await until(lambda: len(holder.leases) == 0, "the lease of the request has ended")

            await _leave(client, fleet.decode, "a long one", stream=True)
            in_decode_s = await _until_aborted(fleet.decode, "a long one")
            assert max(in_prefill_s, in_decode_s) < _AT_ONCE_S
            assert await proxy.metric("requests_total", code="499") == 4
            assert not fault.load.failed_since()
            fault.report(f"14: clients leave (P stops after {in_prefill_s:.2f} s, D after {in_decode_s:.2f} s)")
    finally:
        holder.close()


async def test_a_queued_request_whose_client_left_is_never_sent(fleet: Fleet) -> None:
    proxy = await fleet.start_proxy("--max-active-per-decode", "1")
    async with Client(proxy.url) as client:
        slow = [asyncio.create_task(client.ask(f"{SLOW_DECODE} {number}")) for number in range(2)]
        await until(lambda: _has_metric(proxy, "requests_in_flight", 2), "all places are taken")
        queued = asyncio.create_task(client.ask("queued"))
        await until(lambda: _has_metric(proxy, "requests_queued", 1), "one request waits")
        for task in (queued, *slow):
            task.cancel()
            await until(task.done, "the client has left")
        await until(lambda: _has_metric(proxy, "requests_in_flight", 0), "all are gone")
        assert (await client.ask("another")).kind == "good"
        assert not await _seen(fleet.engines, "queued")


async def test_keys_and_hand_offs_of_strangers(fleet: Fleet, tmp_path: Path) -> None:
    holder = LeaseHolder(load_or_make_key(fleet.folder / "deployment.key"))
    key, entry = new_key("somebody")
    keys_file = tmp_path / "keys"
    keys_file.write_text(entry.line() + "\n")
    keys_file.chmod(0o600)
    proxy, guarded = await asyncio.gather(
        fleet.start_proxy("--connector", "omni"), fleet.start_proxy("--api-keys", str(keys_file))
    )
    try:
        await _end_first_lease(proxy, fleet, holder)
        async with fleet.under_load(proxy) as fault, Client(proxy.url) as client, Client(guarded.url) as other:
            fault.happens_now()
            for wrong in (None, {"authorization": f"Bearer {key[:-1]}x"}, {"authorization": "Bearer x"}):
                refused = await other.ask("without a key", headers=wrong)
                assert (refused.kind, refused.status) == ("refused", 401)
            assert (await other.ask("with a key", headers={"authorization": f"Bearer {key}"})).kind == "good"
            assert not await _seen(fleet.engines, "without a key")
            assert {seen["has_key"] for seen in await _seen(fleet.engines, "with a key")} == {False}

            foreign = {"do_remote_prefill": True, "do_remote_decode": False, "digest": 1}
            for stream in (False, True):
                outcome = await client.ask("with foreign KV", stream=stream, kv_transfer_params=foreign)
                assert outcome.kind == "good"
            asked = await _seen(fleet.engines, "with foreign KV")
            assert len(asked) == 4
            assert all((seen["params"] or {}).get("digest") != 1 for seen in asked)

            forged = holder.grant(DeploymentKey(b"x" * 32))  # it names a lease that another request may have
            for params in (forged, holder.grant()):
                await _give_up(client, fleet, params)
            await until(lambda: len(holder.leases) == 1, "the second lease has ended, so the first was looked at")
            assert not fault.load.failed_since()
            fault.report("20: wrong keys, foreign kv_transfer_params, forged hand-offs")
    finally:
        holder.close()


async def test_one_request_id_for_all(fleet: Fleet) -> None:
    """Each gets its own answer, from its own KV: it goes by an id of the proxy's."""
    proxy = await fleet.start_proxy()
    async with fleet.under_load(proxy) as fault, Client(proxy.url) as client:
        fault.happens_now()
        headers = {"x-request-id": "the same"}
        outcomes = await asyncio.gather(
            *(client.ask(f"twin {number}", stream=number % 2 == 0, headers=headers) for number in range(20))
        )
        assert {outcome.kind for outcome in outcomes} == {"good"}
        assert {(outcome.headers or {})["x-request-id"] for outcome in outcomes} == {"the same"}
        asked = await _seen(fleet.engines, "twin")
        by_id: dict[str, set[str]] = {}
        for seen in asked:
            by_id.setdefault(seen["id"], set()).add(seen["prompt"])
        assert len(by_id) == 20
        assert all(len(prompts) == 1 for prompts in by_id.values())
        assert "the same" not in by_id
        fault.report("21: one request id for 20 requests")


async def test_overload_is_refused_early_and_costs_no_goodput(fleet: Fleet) -> None:
    proxy = await fleet.start_proxy("--max-active-per-decode", "4", "--max-queued", "10")
    for engine in fleet.decode:
        await engine.set(step_s=0.04)
    async with fleet.under_load(proxy, num_clients=12) as fault:
        usual = await _goodput(fault.load)
        fault.happens_now()
        async with Load(proxy.url, 80, pause_s=0.4) as crowd:
            await crowd.successes(5)
            num_before = len(fault.load.outcomes) + len(crowd.outcomes)
            goodput = await _goodput(fault.load, crowd)
            num_ended = len(fault.load.outcomes) + len(crowd.outcomes) - num_before
        refused = fault.load.failed_since() + crowd.failed_since()
        assert len(refused) >= num_ended / 4, "no overload"
        assert {outcome.status for outcome in refused} == {503}
        assert all(int((outcome.headers or {})["retry-after"]) >= 1 for outcome in refused)
        early_s = statistics.median(outcome.ended_s - outcome.sent_s for outcome in refused)
        assert early_s < 1
        assert await proxy.metric("refused_total", reason="overloaded") == len(refused)
        assert goodput > 0.5 * usual
        fault.report(
            f"24: 8 times the clients ({usual:.0f} → {goodput:.0f} good answers/s, refused in {early_s:.3f} s)"
        )


async def _goodput(*loads: Load) -> float:
    """Good answers per second, for two seconds."""
    began_s = time.monotonic()
    await asyncio.sleep(2)
    return sum(o.kind == "good" and o.ended_s >= began_s for load in loads for o in load.outcomes) / 2


async def _leave(client: Client, engines: list[EngineProcess], prompt: str, stream: bool = False) -> None:
    """Ask, and hang up once one of these engines works on it."""
    task = asyncio.create_task(client.ask(prompt, _LONG, stream))

    async def is_running() -> bool:
        return any(seen["outcome"] == "running" for seen in await _seen(engines, prompt))

    await until(is_running, "the request arrives")
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


async def _give_up(client: Client, fleet: Fleet, params: dict[str, object]) -> None:
    """Have P hand these parameters off to a D that does not answer, and hang up."""
    for engine in fleet.prefill:
        await engine.set(params=params)
    await _leave(client, fleet.decode, SLOW_DECODE)
    await _until_aborted(fleet.decode, SLOW_DECODE)
    for engine in fleet.prefill:
        await engine.set()


async def _end_first_lease(proxy: ProxyProcess, fleet: Fleet, holder: LeaseHolder) -> None:
    """The first one opens what the proxy keeps for all others: threads and file descriptors of ZeroMQ's."""
    async with Client(proxy.url) as client:
        await _give_up(client, fleet, holder.grant())
    await until(lambda: len(holder.leases) == 0, "the lease has ended")


async def _until_aborted(engines: list[EngineProcess], prompt: str) -> float:
    """How long it took until nothing of it was running there."""
    began_s = time.monotonic()

    async def is_aborted() -> bool:
        return {seen["outcome"] for seen in await _seen(engines, prompt)} == {"aborted"}

    await until(is_aborted, "the request is aborted")
    return time.monotonic() - began_s


async def _seen(engines: list[EngineProcess], prompt: str) -> list[dict[str, Any]]:
    """What these engines were asked of prompts that begin so."""
    return [seen for engine in engines for seen in await engine.seen() if seen["prompt"].startswith(prompt)]


async def _has_metric(proxy: ProxyProcess, name: str, value: float) -> bool:
    return await proxy.metric(name) == value

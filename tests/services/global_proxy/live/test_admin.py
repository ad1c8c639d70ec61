"""Instances added, drained and removed under load, and policies switched, through any worker: no request fails."""

from functools import partial
from typing import Any

import pytest

from kv_transfer.auth import DeploymentKey, load_or_make_key
from services.global_proxy.membership.admin_route import admin_token
from tests.services.global_proxy.faults.load import Load
from tests.services.global_proxy.faults.processes import EngineProcess
from tests.services.global_proxy.live.conftest import Client, Stage, eventually, num_running


async def status_of(client: Client, engine: EngineProcess) -> dict[str, Any]:
    _, answer = await client.call("GET", "/admin/v1/instances")
    return next((one for one in answer["instances"] if one["name"] == engine.name), {})


async def num_seen(engine: EngineProcess) -> int:
    return len(await engine.seen())


async def has_new(engine: EngineProcess, num_before: int) -> bool:
    return await num_seen(engine) >= num_before + 5


async def test_live_changes_under_load_fail_no_request(stage: Stage) -> None:
    prefill, decode = await stage.engines(1, 1)
    more_prefill, more_decode = await stage.engines(1, 1)
    proxy = await stage.proxy(prefill + decode, "--workers", "2")
    one, other = [await proxy.client_of(worker) for worker in proxy.workers()]
    async with Load(proxy.url) as load:
        await load.successes(40)
        for engine in more_prefill + more_decode:
            new = {"role": engine.role, "url": engine.url}
            assert (await one.call("POST", "/admin/v1/instances", new))[0] == 201
            assert (await other.call("POST", "/admin/v1/instances", new))[0] == 200
            assert (await status_of(other, engine))["source"] == "admin"
            await eventually(partial(has_new, engine, 0), True)
        for role in ("prefill", "decode"):
            for policy in ("round_robin", "power_of_two", "consistent_hash", "weighted_least_active"):
                assert (await other.call("PUT", f"/admin/v1/policies/{role}", {"policy": policy}))[0] == 200
                await load.successes(20)
            assert (await one.call("GET", "/admin/v1/state"))[1]["policies"][role] == policy
        for engine in prefill + decode:
            status, drained = await one.call("POST", f"/admin/v1/instances/{engine.name}/drain")
            assert (status, drained["state"]) == (200, "draining")
            assert (await other.call("DELETE", f"/admin/v1/instances/{engine.name}?wait_s=60"))[0] == 204
            assert await num_running([engine]) == [0]
            num_before = await num_seen(engine)
            await load.successes(40)
            assert await num_seen(engine) == num_before
            assert await status_of(one, engine) == {}
        assert (await one.call("POST", "/admin/v1/instances", {"role": "decode", "url": decode[0].url}))[0] == 201
        await eventually(partial(has_new, decode[0], num_before), True)
    assert not load.failed_since()


async def test_a_decode_instance_that_streams_is_not_removed_before_its_last_token(stage: Stage) -> None:
    prefill, decode = await stage.engines(1, 2)
    proxy = await stage.proxy(prefill + decode, "--workers", "2", "--decode-policy", "round_robin")
    client, streaming = await proxy.client(), await proxy.client()
    for engine in decode:
        await engine.set(step_s=0.02)
    body = {"prompt": "a", "max_tokens": 50, "stream": True}
    async with streaming.session.post(f"{proxy.url}/v1/completions", json=body) as answer:
        await answer.content.readany()
        busy = next(engine for engine, count in zip(decode, await num_running(decode), strict=True) if count)
        path = f"/admin/v1/instances/{busy.name}"
        status, refusal = await client.call("DELETE", f"{path}?wait_s=0.05")
        assert (status, refusal["error"]["type"]) == (409, "ConflictError")
        assert (await status_of(client, busy))["num_requests"] == 1
        assert (await client.call("DELETE", f"{path}?wait_s=60"))[0] == 204
        assert (await answer.text()).endswith("data: [DONE]\n\n")
    assert await num_running([busy]) == [0]


@pytest.mark.parametrize("connector", ["nixl", "omni"])
async def test_only_for_those_with_the_deployment_key(stage: Stage, connector: str) -> None:
    """Every connector's proxy has the admin API: whoever may change a deployment can scale it."""
    prefill, decode = await stage.engines(1, 1)
    proxy = await stage.proxy(prefill + decode, "--connector", connector)
    client = await proxy.client()
    assert (await client.call("GET", "/admin/v1/state"))[0] == 200
    for token in ("", "0" * 64, admin_token(other_key(stage))):
        stranger = Client(proxy.url, token)
        status, answer = await stranger.call("DELETE", f"/admin/v1/instances/{decode[0].name}")
        assert (status, answer["error"]["type"]) == (401, "AuthenticationError")
        await stranger.session.close()
    assert (await status_of(client, decode[0]))["state"] == "active"


def other_key(stage: Stage) -> DeploymentKey:
    return load_or_make_key(stage.folder / "other.key")

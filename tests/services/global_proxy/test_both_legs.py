"""P and D at once, in the way of vLLM's MooncakeConnector: who is told what, who waits for whom, who ends whom."""

import asyncio
import json
from collections.abc import Coroutine
from typing import Any

import pytest

from services.global_proxy.ways import mooncake
from tests.services.global_proxy.conftest import FOREVER_S, Deploy, Deployment, Logged, until
from tests.standins.engine import StandinEngine

NOT_YET_S = 0.3  # long enough for anything that wrongly does not wait


@pytest.fixture
async def pd(deploy: Deploy) -> Deployment:
    return await deploy(connector="mooncake")


async def finishes(task: asyncio.Task[Any]) -> bool:
    await asyncio.wait([task], timeout=NOT_YET_S)
    return task.done()


def post(pd: Deployment, stream: bool) -> Coroutine[Any, Any, tuple[int, Any, Any]]:
    return pd.stream() if stream else pd.complete()


def params(engine: StandinEngine, number: int = -1) -> dict[str, Any]:
    sent: dict[str, Any] = engine.received[number].body["kv_transfer_params"]
    return sent


class TestMooncakesParameters:
    @pytest.mark.parametrize("stream", [False, True])
    async def test_each_is_told_how_it_will_know_the_other(self, pd: Deployment, stream: bool) -> None:
        status, _, headers = await post(pd, stream)
        assert status == 200
        assert headers["x-omni-path"] == "disaggregated"
        (prefill,), (decode,) = pd.prefill, pd.decode
        transfer_id = params(prefill)["transfer_id"]
        assert params(prefill) == {
            "do_remote_decode": True,
            "do_remote_prefill": False,
            "transfer_id": transfer_id,
        }
        assert params(decode) == {
            "do_remote_decode": False,
            "do_remote_prefill": True,
            "transfer_id": transfer_id,
            "remote_engine_id": "p0-1",
            "remote_bootstrap_addr": prefill.url,
        }
        assert prefill.received[0].body["max_tokens"] == 1
        assert prefill.received[0].body["stream"] is False
        assert decode.received[0].body["max_tokens"] == 9

    async def test_no_two_requests_have_the_same_transfer_id(self, pd: Deployment) -> None:
        await asyncio.gather(*(pd.complete() for _ in range(20)))
        ids = [params(pd.prefill[0], number)["transfer_id"] for number in range(20)]
        assert len(set(ids)) == 20

    async def test_the_engine_id_is_asked_for_once(self, pd: Deployment) -> None:
        await asyncio.gather(*(pd.complete() for _ in range(20)))
        assert pd.prefill[0].num_queries == 1

    async def test_the_engine_id_of_a_prefill_that_has_started_again(
        self, pd: Deployment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        await pd.complete()
        pd.prefill[0].bootstrap = {"0": {"engine_id": "p0-2", "worker_addr": {}}}
        monkeypatch.setattr(mooncake, "_REMEMBER_S", 0)
        await pd.complete()
        assert params(pd.decode[0])["remote_engine_id"] == "p0-2"

    @pytest.mark.parametrize("bootstrap", [{}, [], {"0": {}}, {"0": {"engine_id": "a"}, "1": {"engine_id": "b"}}])
    async def test_a_bootstrap_server_that_names_no_engine(self, deploy: Deploy, bootstrap: object) -> None:
        pd = await deploy(2, 1, connector="mooncake")
        pd.prefill[0].bootstrap = bootstrap
        assert (await pd.complete())[0] == 200
        assert pd.prefill[0].received == []
        assert await pd.failures(pd.prefill[0], "nonsense") == 1

    async def test_no_bootstrap_server_names_an_engine(self, pd: Deployment) -> None:
        pd.prefill[0].bootstrap = {}
        status, body, _ = await pd.complete()
        assert status == 502
        assert body["error"]["message"] == "The prefill instance's answer is nonsense"
        assert pd.engines[0].received == pd.engines[1].received == []

    async def test_several_choices_go_to_decode_alone(self, pd: Deployment) -> None:
        _, _, headers = await pd.complete(n=2)
        assert headers["x-omni-path"] == "decode_only"
        assert pd.prefill[0].received == []


class TestOrder:
    async def test_decode_is_asked_while_prefill_computes(self, pd: Deployment) -> None:
        pd.prefill[0].gate.clear()
        request = asyncio.create_task(pd.complete())
        await pd.decode[0].wait_for(1)
        await pd.prefill[0].wait_for(1)
        assert pd.prefill[0].num_answered == 0
        pd.prefill[0].gate.set()
        status, body, _ = await request
        assert status == 200
        assert body["choices"][0]["text"] == "d0!"

    @pytest.mark.parametrize("stream", [False, True])
    async def test_nothing_is_relayed_before_prefill_is_done(self, pd: Deployment, stream: bool) -> None:
        pd.prefill[0].gate.clear()
        body = pd.prompt | {"stream": stream}
        request = asyncio.create_task(_headers(pd, body))
        await until(lambda: pd.decode[0].num_answered == 1)
        assert not await finishes(request)
        pd.prefill[0].gate.set()
        status, text = await request
        assert status == 200
        assert ("data: [DONE]" if stream else "d0!") in text

    async def test_what_is_held_back_is_bounded(self, pd: Deployment) -> None:
        pd.prefill[0].gate.clear()
        pd.decode[0].num_chunks = 500_000  # more than sockets can hold
        request = asyncio.create_task(pd.stream())
        await pd.decode[0].wait_for(1)
        num_sent = -1
        while num_sent < pd.decode[0].num_chunks_sent:
            num_sent = pd.decode[0].num_chunks_sent
            assert not await finishes(request)
        assert 0 < num_sent < 500_000
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await pd.decode[0].wait_for(num_aborted=1)
        await pd.idle()

    async def test_chunks_arrive_as_they_are_made(self, pd: Deployment) -> None:
        (decode,) = pd.decode
        decode.gate.clear()
        decode.gate_after = 1
        async with pd.client.post(pd.url + "/v1/completions", json=pd.prompt | {"stream": True}) as response:
            assert b"t0 " in await response.content.readany()
            decode.gate.set()
            assert (await response.content.read()).endswith(b"data: [DONE]\n\n")

    async def test_both_legs_are_measured(self, deploy: Deploy, logged: Logged) -> None:
        pd = await deploy(connector="mooncake")
        await pd.complete()
        await pd.idle()
        assert await pd.metric("omni_proxy_prefill_seconds_count") == 1
        assert await pd.metric("omni_proxy_ttft_seconds_count") == 1
        (line,) = await logged(1)
        assert line["prefill"] == pd.prefill[0].url[7:]
        assert line["decode"] == pd.decode[0].url[7:]
        assert line["decode_only"] is None


async def _headers(pd: Deployment, body: dict[str, Any]) -> tuple[int, str]:
    async with pd.client.post(pd.url + "/v1/completions", json=body) as response:
        return response.status, await response.text()


class TestPrefillFails:
    @pytest.mark.parametrize("stream", [False, True])
    async def test_its_error_is_the_answer_and_decode_is_ended(self, pd: Deployment, stream: bool) -> None:
        pd.decode[0].gate.clear()
        pd.prefill[0].gate.clear()
        pd.prefill[0].error = (500, '{"error":  "mine"}')
        request = asyncio.create_task(_headers(pd, pd.prompt | {"stream": stream}))
        await pd.decode[0].wait_for(1)
        pd.prefill[0].gate.set()
        status, text = await request
        assert (status, json.loads(text)["error"]["message"]) == (500, "The prefill instance failed")
        await pd.decode[0].wait_for(num_aborted=1)
        await pd.idle()

    async def test_its_error_wins_over_an_answer_of_decode(self, pd: Deployment) -> None:
        pd.prefill[0].gate.clear()
        pd.prefill[0].error = (500, "{}")
        request = asyncio.create_task(pd.complete())
        await until(lambda: pd.decode[0].num_answered == 1)
        pd.prefill[0].gate.set()
        assert (await request)[0] == 500

    async def test_its_nonsense_wins_over_an_answer_of_decode(self, pd: Deployment) -> None:
        pd.prefill[0].answer_text = "not json"
        assert (await pd.complete())[0] == 502
        await pd.idle()

    async def test_what_it_refuses_is_for_decode_to_judge(self, pd: Deployment) -> None:
        pd.decode[0].gate.clear()  # waits for KV
        pd.prefill[0].error = (400, "{}")
        request = asyncio.create_task(pd.complete())
        await pd.decode[0].wait_for(2, num_aborted=1)
        pd.decode[0].gate.set()
        status, _, headers = await request
        assert (status, headers["x-omni-path"]) == (200, "decode_only")
        assert "kv_transfer_params" not in pd.decode[0].received[1].body
        await pd.idle()

    async def test_another_is_tried_under_another_name(self, deploy: Deploy) -> None:
        pd = await deploy(2, 1, connector="mooncake")
        pd.prefill[0].die_after = 0
        pd.decode[0].gate.clear()  # waits for KV
        request = asyncio.create_task(pd.complete())
        await pd.decode[0].wait_for(2, num_aborted=1)
        pd.decode[0].gate.set()
        assert (await request)[0] == 200
        assert params(pd.decode[0], 0)["transfer_id"] == params(pd.prefill[0])["transfer_id"]
        assert params(pd.decode[0], 1)["transfer_id"] == params(pd.prefill[1])["transfer_id"]
        assert params(pd.decode[0], 0)["transfer_id"] != params(pd.decode[0], 1)["transfer_id"]
        assert params(pd.decode[0], 1)["remote_engine_id"] == "p1-1"
        await pd.idle()

    async def test_as_many_are_tried_as_the_settings_say(self, deploy: Deploy) -> None:
        pd = await deploy(3, 1, connector="mooncake", max_retries=1)
        pd.decode[0].gate.clear()
        for engine in pd.prefill:
            engine.die_after = 0
        status, body, _ = await pd.complete()
        assert status == 502
        assert body["error"]["type"] == "BadGatewayError"
        assert sum(len(e.received) for e in pd.prefill) == 2
        await pd.decode[0].wait_for(2, num_aborted=2)
        await pd.idle()

    async def test_one_that_refuses_connections_is_avoided(self, deploy: Deploy) -> None:
        pd = await deploy(2, 1, connector="mooncake", health_interval_s=FOREVER_S)
        await pd.checked()
        await pd.prefill[0].stop()
        for _ in range(4):
            assert (await pd.complete())[0] == 200
        assert await pd.failures(pd.prefill[0], "unreachable") == 1
        assert len(pd.decode[0].received) == 4

    async def test_nobody_there(self, deploy: Deploy) -> None:
        pd = await deploy(connector="mooncake", health_interval_s=FOREVER_S)
        await pd.checked()
        await pd.prefill[0].stop()
        status, _, headers = await pd.complete()
        assert status == 503
        assert headers["retry-after"] == "1"
        assert pd.decode[0].received == []
        assert await pd.failures(pd.prefill[0], "unreachable") == 2  # the only one is asked twice

    async def test_a_prefill_that_is_being_introduced_is_not_idle(self, pd: Deployment) -> None:
        """Who drains it waits for that, too."""
        pd.prefill[0].bootstrap_gate.clear()
        request = asyncio.create_task(pd.complete())
        (instance,) = pd.proxy.members.prefill.instances
        await until(lambda: pd.proxy.table.leases(instance.slot) == 1)
        pd.prefill[0].bootstrap_gate.set()
        assert (await request)[0] == 200
        assert pd.proxy.table.leases(instance.slot) == 0

    async def test_those_who_wait_for_a_silent_bootstrap_server_do_so_together(
        self, deploy: Deploy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(mooncake, "_QUERY_TIMEOUT_S", 0.2)
        pd = await deploy(connector="mooncake")
        pd.prefill[0].bootstrap_gate.clear()
        answers = await asyncio.gather(*(pd.complete() for _ in range(10)))
        assert [status for status, _, _ in answers] == [503] * 10
        assert pd.prefill[0].num_queries <= 2
        pd.prefill[0].bootstrap_gate.set()


class TestDecodeFails:
    @pytest.mark.parametrize("stream", [False, True])
    @pytest.mark.parametrize("status", [400, 500])
    async def test_its_error_is_the_answer_and_prefill_is_ended(
        self, pd: Deployment, stream: bool, status: int
    ) -> None:
        pd.prefill[0].gate.clear()
        pd.decode[0].gate.clear()
        pd.decode[0].error = (status, '{"error":  "mine"}')
        request = asyncio.create_task(_headers(pd, pd.prompt | {"stream": stream}))
        await pd.prefill[0].wait_for(1)
        pd.decode[0].gate.set()
        told, text = await request
        assert told == status
        assert ("mine" in text) == (status == 400), "its own words, where the request is at fault"
        await pd.prefill[0].wait_for(num_aborted=1)
        await pd.idle()

    @pytest.mark.parametrize("stream", [False, True])
    async def test_one_that_dies_ends_prefill(self, pd: Deployment, stream: bool) -> None:
        pd.prefill[0].gate.clear()
        pd.decode[0].die_after = 0
        status, body, _ = await pd.complete(stream=stream)
        assert status == 502
        assert body["error"]["type"] == "BadGatewayError"
        await pd.prefill[0].wait_for(num_aborted=1)
        await pd.idle()

    async def test_one_that_refuses_connections_is_replaced_for_the_same_transfer(self, deploy: Deploy) -> None:
        pd = await deploy(1, 2, connector="mooncake", health_interval_s=FOREVER_S)
        await pd.checked()
        await pd.decode[0].stop()
        assert (await pd.complete())[0] == 200
        (to_prefill,) = pd.prefill[0].received
        assert params(pd.decode[1])["transfer_id"] == to_prefill.body["kv_transfer_params"]["transfer_id"]

    async def test_nobody_there(self, deploy: Deploy) -> None:
        pd = await deploy(connector="mooncake", health_interval_s=FOREVER_S)
        await pd.checked()
        await pd.decode[0].stop()
        pd.prefill[0].gate.clear()
        status, _, headers = await pd.complete()
        assert status == 503
        assert headers["retry-after"] == "1"
        await pd.idle()
        assert pd.prefill[0].num_aborted == len(pd.prefill[0].received)

    async def test_one_that_dies_mid_stream(self, pd: Deployment) -> None:
        pd.decode[0].die_after = 2
        status, text, _ = await pd.stream()
        assert status == 200
        events = text.split("\n\n")
        assert [json.loads(e[6:])["choices"][0]["text"] for e in events[:2]] == ["t0 ", "t1 "]
        assert json.loads(events[-2][6:])["error"]["code"] == 502
        assert "[DONE]" not in text
        await pd.idle()


class TestTheRequestEnds:
    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_client_that_leaves_ends_both(self, pd: Deployment, stream: bool) -> None:
        pd.prefill[0].gate.clear()
        pd.decode[0].gate.clear()
        request = asyncio.create_task(post(pd, stream))
        for engine in pd.engines:
            await engine.wait_for(1)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        for engine in pd.engines:
            await engine.wait_for(num_aborted=1)
        await pd.idle()
        assert await pd.metric("omni_proxy_requests_total", endpoint="/v1/completions", code="499") == 1

    async def test_a_client_that_leaves_while_an_answer_is_held_back(self, pd: Deployment) -> None:
        pd.prefill[0].gate.clear()
        request = asyncio.create_task(pd.complete())
        await until(lambda: pd.decode[0].num_answered == 1)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        await pd.prefill[0].wait_for(num_aborted=1)
        await pd.idle()

    @pytest.mark.parametrize("stream", [False, True])
    async def test_the_deadline_ends_both(self, deploy: Deploy, stream: bool) -> None:
        pd = await deploy(request_timeout_s=0.3, connector="mooncake")
        pd.prefill[0].gate.clear()
        pd.decode[0].gate.clear()
        status, body, _ = await pd.complete(stream=stream)
        assert status == 504
        assert body["error"]["type"] == "GatewayTimeoutError"
        for engine in pd.engines:
            await engine.wait_for(num_aborted=1)
        await pd.idle()

    async def test_connections_are_reused(self, pd: Deployment) -> None:
        await pd.checked()
        for stream in (False, True, False, True):
            await post(pd, stream)
        assert pd.num_connections == 2

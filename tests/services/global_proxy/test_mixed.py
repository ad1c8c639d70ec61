"""Plain engines, alone and beside P and D: where requests go, what is sent there, and what the client gets."""

import json
from typing import Any

import pytest

from services.global_proxy.instances.instance import Instance
from services.global_proxy.policies.base import Candidate, Prompt
from services.global_proxy.policies.cost_model import Costs
from services.global_proxy.policies.round_robin import RoundRobin
from tests.services.global_proxy.conftest import FOREVER_S, Deploy, Deployment, Logged, until
from tests.services.global_proxy.policies.standins import teach_decode, teach_prefill

CHAT: dict[str, Any] = {"prompt": None, "messages": [{"role": "user", "content": "Hi"}]}
BAD_REQUEST = '{"error": {"message": "too  long",  "type": "BadRequestError", "param": null, "code": 400}}'


@pytest.fixture
async def alone(deploy: Deploy) -> Deployment:
    """Two plain engines."""
    return await deploy(0, 0, num_mixed=2)


@pytest.fixture
async def beside(deploy: Deploy) -> Deployment:
    """A P, a D and a plain engine, of which the costs of none are known."""
    return await deploy(1, 1, num_mixed=1)


def teach(instance: Instance, token_s: float, base_s: float = 0.01) -> None:
    """A prompt's token takes so long, and so does each new token a hundred times."""
    teach_prefill(instance.costs, base_s, token_s)
    teach_decode(instance.costs, 100 * token_s, 1e-6)


def teach_all(pd: Deployment, mixed_token_s: float, other_token_s: float) -> None:
    for pool in pd.proxy.members.pools:
        for instance in pool.instances:
            teach(instance, mixed_token_s if pool.role == "mixed" else other_token_s)


async def given(pd: Deployment, num_requests: int = 6, **fields: Any) -> list[str]:
    """How so many requests, one after the other, were served."""
    answers = [await pd.complete(**fields) for _ in range(num_requests)]
    assert {status for status, _, _ in answers} == {200}
    return [headers["x-omni-path"] for _, _, headers in answers]


class TestAlone:
    async def test_each_request_goes_to_one_of_them_as_the_client_sent_it(self, alone: Deployment) -> None:
        fields: dict[str, Any] = {"n": 3, "stop": ["x"], "logprobs": 2, "min_tokens": 3, "seed": 2**80, "echo": True}
        for engine in alone.mixed:
            status, body, headers = await alone.complete(**fields)
            assert (status, headers["x-omni-path"]) == (200, "mixed")
            assert [choice["text"] for choice in body["choices"]] == [f"{engine.name}!"] * 3
            (received,) = engine.received
            assert received.body == alone.prompt | fields
        assert await alone.metric("omni_proxy_mixed_total", reason="alone") == 2
        assert await alone.metric("omni_proxy_decode_only_total", reason="prompt_logprobs") == 0
        await alone.idle()

    async def test_what_a_client_must_not_set_does_not_come_through(self, alone: Deployment) -> None:
        await alone.complete(kv_transfer_params={"do_remote_prefill": True}, request_id="mine")
        (received,) = alone.mixed[0].received
        assert received.body == alone.prompt

    @pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
    async def test_a_whole_answer_is_the_engine_s_byte_for_byte(self, alone: Deployment, path: str) -> None:
        text = '{"id": "x",  "choices": [{"text": "\\u00e9"}], "usage": {"prompt_tokens": 7}, "kept": 1e-05}'
        for engine in alone.mixed:
            engine.answer_text = text
        body = alone.prompt | (CHAT if "chat" in path else {})
        async with alone.client.post(alone.url + path, json=body) as response:
            assert response.status == 200
            assert await response.text() == text
            assert response.headers["content-type"] == "application/json; charset=utf-8"

    async def test_a_stream_is_relayed_as_it_is_made(self, alone: Deployment) -> None:
        engine = alone.mixed[0]
        engine.gate.clear()
        engine.gate_after = 1
        body = alone.prompt | {"stream": True, "temperature": 0}
        async with alone.client.post(alone.url + "/v1/completions", json=body) as response:
            assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
            assert response.headers["x-omni-path"] == "mixed"
            first = await response.content.readany()
            assert b"t0 " in first
            engine.gate.set()
            events = (first + await response.content.read()).decode().split("\n\n")
        assert [json.loads(event[6:])["choices"][0]["text"] for event in events[:3]] == ["t0 ", "t1 ", "t2 "]
        assert events[3:] == ["data: [DONE]", ""]

    @pytest.mark.parametrize("stream", [False, True])
    async def test_a_refusal_is_in_the_engine_s_words(self, alone: Deployment, stream: bool) -> None:
        alone.mixed[0].error = (400, BAD_REQUEST)
        async with alone.client.post(alone.url + "/v1/completions", json=alone.prompt | {"stream": stream}) as response:
            assert (response.status, await response.text()) == (400, BAD_REQUEST)
            assert response.headers["x-omni-path"] == "mixed"
        assert alone.mixed[1].received == []

    async def test_what_one_engine_answers_comes_from_them_too(self, alone: Deployment) -> None:
        async with alone.client.get(alone.url + "/v1/models") as response:
            assert (await response.json())["data"][0]["id"] in ("m0", "m1")
        async with alone.client.post(alone.url + "/tokenize", json={"prompt": "a"}) as response:
            assert (await response.json())["from"] in ("m0", "m1")

    async def test_it_is_in_the_log(self, logged: Logged, deploy: Deploy) -> None:
        alone = await deploy(0, 0, num_mixed=1)
        await alone.complete()
        (line,) = await logged(1)
        assert line["mixed"] == alone.mixed[0].url[7:]
        assert (line["prefill"], line["decode"], line["decode_only"]) == (None, None, None)

    @pytest.mark.parametrize("error", [None, (500, "{}")])
    async def test_their_policy_hears_of_each_prompt_twice(self, deploy: Deploy, error: tuple[int, str] | None) -> None:
        heard: list[str] = []

        class Listening(RoundRobin):
            def started(self, instance: Candidate, prompt: Prompt) -> None:
                heard.append(f"started {instance.name}")

            def finished(self, instance: Candidate, prompt: Prompt) -> None:
                heard.append(f"finished {instance.name}")

        pd = await deploy(0, 0, num_mixed=1, max_retries=0)
        pd.proxy.members.mixed.policy = Listening()
        pd.mixed[0].error = error
        await pd.complete()
        name = pd.mixed[0].url[7:]
        assert heard == [f"started {name}", f"finished {name}"]

    async def test_as_many_at_once_as_they_are_to_be_given(self, deploy: Deploy) -> None:
        pd = await deploy(0, 0, num_mixed=2, max_active_per_decode=4)
        await pd.complete()
        assert pd.proxy._gate.queue.max_in_flight == 2 * 5


class TestBeside:
    async def test_while_costs_are_unknown_every_engine_gets_as_many(self, beside: Deployment) -> None:
        assert await given(beside) == ["disaggregated", "mixed"] * 3
        assert await beside.metric("omni_proxy_mixed_total", reason="even_share") == 3
        await beside.idle()

    async def test_the_even_share_is_one_of_engines(self, beside: Deployment) -> None:
        """One that is held by P keeps the next one away from there."""
        beside.prefill[0].gate.clear()
        held = [beside.complete_soon() for _ in range(2)]
        await beside.prefill[0].wait_for(1)
        await until(lambda: len(beside.mixed[0].received) == 1)
        assert await given(beside, 2) == ["mixed"] * 2
        beside.prefill[0].gate.set()
        for request in held:
            assert (await request)[0] == 200

    @pytest.mark.parametrize(("mixed_token_s", "path"), [(1e-5, "mixed"), (1e-3, "disaggregated")])
    async def test_where_the_answer_is_expected_sooner(
        self, beside: Deployment, mixed_token_s: float, path: str
    ) -> None:
        teach_all(beside, mixed_token_s, 1e-4)
        assert await given(beside) == [path] * 6
        assert await beside.metric("omni_proxy_mixed_total", reason="sooner") == (6 if path == "mixed" else 0)

    async def test_load_changes_what_is_sooner(self, beside: Deployment) -> None:
        teach_all(beside, 1e-5, 1e-4)
        (mixed,) = beside.proxy.members.mixed.instances
        mixed.begin(500_000)
        assert await given(beside, 2) == ["disaggregated"] * 2
        mixed.end(500_000)
        assert await given(beside, 2) == ["mixed"] * 2

    async def test_what_needs_one_engine_goes_to_the_sooner_one(self, beside: Deployment) -> None:
        teach_all(beside, 1e-3, 1e-4)
        assert await given(beside, 2, prompt_logprobs=1) == ["decode_only"] * 2
        for _ in range(4):  # and forgets
            teach_all(beside, 1e-5, 1e-4)
        assert await given(beside, 2, prompt_logprobs=1) == ["mixed"] * 2

    async def test_answers_that_may_be_kept_are_d_s(self, beside: Deployment) -> None:
        teach_all(beside, 1e-5, 1e-4)
        body = {"model": "m", "input": "Hello"}
        async with beside.client.post(beside.url + "/v1/responses", json=body):
            pass  # the stand-ins know no such path
        await beside.idle()
        assert await beside.metric("omni_proxy_mixed_total", reason="sooner") == 0

    async def test_a_way_that_was_not_gone_for_long_is_tried_again(
        self, beside: Deployment, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        teach_all(beside, 1e-3, 1e-4)
        assert await given(beside, 2) == ["disaggregated"] * 2
        mixed = beside.proxy._serving._parts.mixed
        mixed._given_s -= 61
        assert await given(beside, 2) == ["mixed", "disaggregated"]
        assert await beside.metric("omni_proxy_mixed_total", reason="look_again") == 1
        for _ in range(4):
            teach_all(beside, 1e-5, 1e-4)
        mixed._kept_s -= 61
        assert await given(beside, 2) == ["disaggregated", "mixed"]

    async def test_streams_teach_what_a_plain_engine_costs(
        self, deploy: Deploy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("services.global_proxy.instances.instance._COSTS_EVERY_S", 0.0)
        pd = await deploy(0, 0, num_mixed=1)
        (mixed,) = pd.proxy.members.mixed.instances
        (engine,) = pd.mixed
        engine.gate_after = 1
        for _ in range(4):
            assert not mixed.costs.has_prefill
            assert not mixed.costs.has_decode
            engine.gate.clear()
            async with pd.client.post(pd.url + "/v1/completions", json=pd.prompt | {"stream": True}) as response:
                await response.content.readany()
                engine.gate.set()
                await response.read()
        await pd.idle()
        assert pd.proxy._serving._parts.mixed._share_made < 1.0  # two chunks, of 9 tokens
        assert mixed.costs.has_prefill
        assert mixed.costs.has_decode

    async def test_what_was_cached_is_not_taken_to_have_been_computed(
        self, deploy: Deploy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        computed: list[int] = []
        monkeypatch.setattr(Costs, "observe_prefill", lambda costs, num, ahead, seconds: computed.append(num))
        monkeypatch.setattr("services.global_proxy.instances.instance._COSTS_EVERY_S", 0.0)
        pd = await deploy(0, 0, num_mixed=1, mixed_policy="prefix_aware")
        for _ in range(2):
            await pd.stream(prompt="a conversation so far " * 100)
        first, second = computed
        assert first > 500
        assert second < first / 4

    async def test_how_much_of_the_limit_is_used_is_learned(self, deploy: Deploy) -> None:
        """An engine with slow tokens and a fast prompt is the sooner one if answers end early."""
        pd = await deploy(1, 1, num_mixed=1)
        teach_all(pd, 1e-4, 1e-4)
        (mixed,) = pd.proxy.members.mixed.instances
        for _ in range(6):
            teach_prefill(mixed.costs, 1e-4, 1e-7)
            teach_decode(mixed.costs, 0.012, 1e-6)  # the others' take 10 ms
        assert (await given(pd, 1, max_tokens=1000)) == ["disaggregated"]
        for _ in range(300):
            pd.proxy._serving._parts.mixed.saw_answer(3, 1000)
        assert (await given(pd, 1, max_tokens=1000)) == ["mixed"]

    async def test_without_them_all_is_as_it_was(self, pd: Deployment) -> None:
        assert await given(pd) == ["disaggregated"] * 6
        assert b"omni_proxy_mixed_total{" not in pd.proxy.metrics.render()[0]


class TestFailures:
    @pytest.mark.parametrize("role", ["prefill", "decode"])
    @pytest.mark.parametrize("how", ["refuses", "dies", "fails"])
    async def test_mixed_takes_over_from_p_and_d(self, deploy: Deploy, role: str, how: str) -> None:
        pd = await deploy(1, 1, num_mixed=1, health_interval_s=FOREVER_S, max_retries=1)
        await pd.checked()
        (engine,) = getattr(pd, role)
        await break_engine(engine, how)
        paths = await given(pd, 6)
        assert paths == ["mixed"] * 6
        assert len(pd.mixed[0].received) == 6
        await pd.idle()

    @pytest.mark.parametrize("first", ["disaggregated", "decode_only", "mixed"])
    async def test_the_log_names_who_was_asked_last(self, logged: Logged, deploy: Deploy, first: str) -> None:
        pd = await deploy(1, 1, num_mixed=1)
        teach_all(pd, 1e-5 if first == "mixed" else 1e-3, 1e-4)
        (failing,) = pd.mixed if first == "mixed" else pd.decode
        failing.error = (500, "{}")
        fields: dict[str, Any] = {"prompt_logprobs": 1} if first == "decode_only" else {}
        _, _, headers = await pd.complete(**fields)
        (line,) = await logged(1)
        names = {role: line[role] is not None for role in ("prefill", "decode", "mixed")}
        if first == "mixed":
            assert headers["x-omni-path"] == "disaggregated"
            assert names == {"prefill": True, "decode": True, "mixed": False}
        else:
            assert headers["x-omni-path"] == "mixed"
            assert names == {"prefill": False, "decode": False, "mixed": True}
        assert line["decode_only"] is None
        assert line["retries"] == 1

    @pytest.mark.parametrize("how", ["refuses", "dies", "fails"])
    async def test_p_and_d_take_over_from_mixed(self, deploy: Deploy, how: str) -> None:
        pd = await deploy(1, 1, num_mixed=1, health_interval_s=FOREVER_S, max_retries=1)
        await pd.checked()
        await break_engine(pd.mixed[0], how)
        assert await given(pd, 6) == ["disaggregated"] * 6
        await pd.idle()

    @pytest.mark.parametrize("how", ["refuses", "dies", "fails"])
    async def test_one_takes_over_from_another(self, alone: Deployment, how: str) -> None:
        await break_engine(alone.mixed[0], how)
        assert await given(alone, 6) == ["mixed"] * 6
        reason = {"refuses": "unreachable", "dies": "died", "fails": "status_500"}[how]
        assert await alone.failures(alone.mixed[0], reason) >= 1
        assert await alone.metric("omni_proxy_retries_total", role="mixed", reason=reason) >= 1
        await alone.idle()

    async def test_one_that_fails_again_and_again_is_ejected(self, alone: Deployment) -> None:
        alone.mixed[0].error = (500, "{}")
        await given(alone, 12)
        assert len(alone.mixed[0].received) == 3
        labels = {"role": "mixed", "instance": alone.mixed[0].url[7:]}
        assert await alone.metric("omni_proxy_ejections_total", **labels) == 1
        assert await alone.metric("omni_proxy_instance_ejected", **labels) == 1

    async def test_its_failure_is_told_in_our_words(self, deploy: Deploy) -> None:
        pd = await deploy(0, 0, num_mixed=1, max_retries=0)
        pd.mixed[0].error = (500, "/home/secret")
        status, body, headers = await pd.complete()
        assert (status, body["error"]["message"]) == (500, "The mixed instance failed")
        assert headers["x-omni-path"] == "mixed"

    async def test_the_only_one_is_asked_once_more_if_nothing_came_to_it(self, deploy: Deploy) -> None:
        pd = await deploy(0, 0, num_mixed=1, health_interval_s=FOREVER_S)
        await pd.checked()
        await pd.mixed[0].stop()
        status, body, headers = await pd.complete()
        assert (status, headers["retry-after"]) == (503, "1")
        assert body["error"]["message"] == "No connection to the mixed instance"
        assert await pd.failures(pd.mixed[0], "unreachable") == 2

    async def test_an_ejected_one_is_asked_where_no_p_is(self, deploy: Deploy) -> None:
        pd = await deploy(1, 1, num_mixed=1, health_interval_s=FOREVER_S)
        await pd.checked()
        pd.registry.drain(pd.prefill[0].url[7:])
        (mixed,) = pd.proxy.members.mixed.instances
        pd.proxy.table.writer(0).set_down(mixed.slot, 60.0)
        pd.proxy.members.mixed.changed()
        assert await given(pd, 1) == ["mixed"]

    async def test_d_s_fallback_comes_after_them(self, deploy: Deploy, refused_url: str) -> None:
        pd = await deploy(0, 1, (refused_url,), num_mixed=1, fallback="decode_only", health_interval_s=FOREVER_S)
        await pd.checked()
        assert await given(pd, 2) == ["mixed"] * 2
        pd.mixed[0].error = (500, "{}")
        assert await given(pd, 2) == ["decode_only"] * 2


async def break_engine(engine: Any, how: str) -> None:
    if how == "refuses":
        await engine.stop()
    elif how == "dies":
        engine.die_after = 0
    else:
        engine.error = (500, "{}")


class TestHealth:
    async def health(self, pd: Deployment) -> tuple[int, Any]:
        async with pd.client.get(pd.url + "/health") as response:
            return response.status, await response.json()

    async def test_one_of_them_is_enough(self, deploy: Deploy) -> None:
        pd = await deploy(0, 0, num_mixed=1)
        assert await self.health(pd) == (200, {"status": "ok"})
        pd = await deploy(1, 0, extra_decode_urls=("http://127.0.0.1:1",), num_mixed=1)
        assert await self.health(pd) == (200, {"status": "ok"})

    async def test_p_and_d_are_enough(self, deploy: Deploy, refused_url: str) -> None:
        pd = await deploy(1, 1, extra_mixed_urls=(refused_url,))
        assert await self.health(pd) == (200, {"status": "ok"})

    async def test_what_is_missing(self, deploy: Deploy, refused_urls: tuple[str, str]) -> None:
        pd = await deploy(0, 0, extra_mixed_urls=refused_urls[:1])
        assert await self.health(pd) == (503, {"status": "unavailable", "missing": ["mixed"]})
        pd = await deploy(1, 0, extra_decode_urls=refused_urls[1:], extra_mixed_urls=refused_urls[:1])
        assert await self.health(pd) == (503, {"status": "unavailable", "missing": ["decode", "mixed"]})


class TestNobodyYet:
    """All instances are to join later."""

    async def test_503_until_then(self, deploy: Deploy) -> None:
        pd = await deploy(0, 0, control_port=0)
        for path in ("/v1/completions", "/v1/chat/completions", "/tokenize"):
            status, body, headers = await pd.complete(path, **(CHAT if "chat" in path else {}))
            assert (status, headers["Retry-After"]) == (503, "1")
            assert body["error"]["type"] == "ServiceUnavailableError"
        async with pd.client.get(pd.url + "/health") as response:
            assert (response.status, (await response.json())["missing"]) == (503, ["prefill", "decode"])
        async with pd.client.get(pd.url + "/live") as response:
            assert response.status == 200


async def test_who_holds_a_conversation_is_asked_to_go_on_with_it(beside: Deployment) -> None:
    """While P is down, too: another engine would deny that there is an answer to go on from."""
    await beside.checked()
    (prefill,) = beside.proxy.members.prefill.instances
    prefill.set_unhealthy(True)
    beside.proxy.members.prefill.changed()
    body = {"model": "m", "input": "Hello", "previous_response_id": "resp_1"}
    async with beside.client.post(beside.url + "/v1/responses", json=body) as response:
        assert response.headers["x-omni-path"] == "decode_only"
    assert await beside.metric("omni_proxy_mixed_total", reason="others_down") == 0


async def test_one_that_another_worker_ejects_between_two_looks(deploy: Deploy) -> None:
    pd = await deploy(1, 1, num_mixed=1, health_interval_s=FOREVER_S)
    await pd.checked()
    pool = pd.proxy.members.mixed
    (instance,) = pool.instances
    look, num_looks = pool.up, 0

    def look_again() -> Any:
        nonlocal num_looks
        num_looks += 1
        if num_looks == 2:  # another worker's verdict
            pd.proxy.table.writer(0).set_down(instance.slot, 60.0)
            pool.changed()
        return look()

    pool.up = look_again  # type: ignore[method-assign]
    for _ in range(3):
        status, _, _ = await pd.complete()
        assert status == 200


async def test_answers_that_were_broken_off_say_nothing_of_their_length(deploy: Deploy) -> None:
    pd = await deploy(0, 0, num_mixed=1)
    mixed, engine = pd.proxy._serving._parts.mixed, pd.mixed[0]
    engine.num_chunks = 1000
    for _ in range(3):
        engine.gate.clear()
        engine.gate_after = 1
        body = pd.prompt | {"stream": True, "max_tokens": 1000}
        async with pd.client.post(pd.url + "/v1/completions", json=body) as response:
            await response.content.readuntil(b"\n\n")
            engine.gate_after = 2
            engine.gate.set()
            engine.gate.clear()
            await response.content.readuntil(b"\n\n")
            response.close()
        await until(lambda: not len(pd.proxy.in_flight))
    assert mixed._share_made == 1.0

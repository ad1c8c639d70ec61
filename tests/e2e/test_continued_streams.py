"""Row 4 of the faults: D dies by SIGKILL in the middle of a stream. Another D goes on, and the client cannot tell."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.e2e.deployments import Deployment, Server, deployed, eventually, proxy_over
from tests.e2e.equality import CHAT, COMPLETIONS, chat, completion
from tests.e2e.kv_faults.injectors import kill

pytestmark = pytest.mark.engine

BACK_S = 240.0
NUM_TOKENS = 600
BODIES = {COMPLETIONS: completion("A long tale: " * 20), CHAT: chat("Tell me a long tale. " * 20)}
CONTINUED = "omni_proxy_continued_streams_total"


@dataclass(frozen=True)
class Lost:
    number: int  # of the D
    pid: int  # that it had


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int]) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("continued-streams")
    with deployed(folder, free_ports, model="embedded:tiny", prefill_groups=1, decode_groups=2) as running:
        yield running


@pytest.fixture(scope="module")
def layerwise(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int]) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("continued-layerwise")
    mode = {"mode": "layerwise"}
    with deployed(
        folder, free_ports, model="embedded:tiny", prefill_groups=1, decode_groups=2, kv_transfer=mode
    ) as running:
        yield running


def _streamed(path: str) -> dict[str, Any]:
    more = {"max_tokens": NUM_TOKENS, "ignore_eos": True, "return_token_ids": None}
    options = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    return BODIES[path] | more | options


def _pid_of_decode(deployment: Deployment, number: int) -> int | None:
    """None while it is not running."""
    folder = Path(deployment.env["OMNI_STATE_DIR"], deployment.name)
    state = json.loads((folder / f"decode.group{number + 1}.rank0.process.json").read_text())
    pid: int | None = state["pid"]
    return pid


def _kill_busy_decode(deployment: Deployment, servers: tuple[Server, ...]) -> Lost:
    """kill -9 of the D that has the stream, api server and all."""
    busy = [n for n, server in enumerate(servers) if server.metric("vllm:num_requests_running") > 0]
    (number,) = busy
    process = psutil.Process(_pid_of_decode(deployment, number))
    kill([process, *process.children(recursive=True)])
    return Lost(number, process.pid)


def _events(response: Any, during: Callable[[], None], after: int) -> list[bytes]:
    """The events of a stream; `during` is called once, behind so many of them."""
    events = []
    for line in response:
        if line.startswith(b"data: "):
            events.append(line.removeprefix(b"data: ").strip())
            if len(events) == after:
                during()
    return events


def _texts(events: list[dict[str, Any]]) -> str:
    choices = [choice for event in events for choice in event["choices"]]
    return "".join(c["text"] if "text" in c else c["delta"].get("content") or "" for c in choices)


def goes_on(deployment: Deployment, proxy: Server, plain: Server, body: dict[str, Any], after: int) -> None:
    """Lose the D that has the stream, behind so many events: the client's stream is a plain server's."""
    path = COMPLETIONS if "prompt" in body else CHAT
    assert eventually(lambda: all(d.is_ready() for d in deployment.decode), BACK_S)
    assert eventually(lambda: proxy.metric("omni_proxy_instance_up", role="decode") == 2, BACK_S)
    expected = plain.stream(path, body)
    continued = proxy.metric(CONTINUED)
    lost: list[Lost] = []
    with proxy.open(path, body) as response:
        assert response.headers["x-omni-continuable"] == "exact"
        events = _events(response, lambda: lost.append(_kill_busy_decode(deployment, deployment.decode)), after)
    assert events.pop() == b"[DONE]"
    got = [json.loads(event) for event in events]

    assert _texts(got) == _texts(expected)
    assert got[-1]["usage"] == expected[-1]["usage"]
    assert got[-1]["usage"]["completion_tokens"] == NUM_TOKENS
    assert got[-2]["choices"][0]["finish_reason"] == "length"
    counts = [event["usage"]["completion_tokens"] for event in got]
    assert counts == sorted(counts), "no token twice"
    assert len({(event["id"], event["created"]) for event in got}) == 1
    assert not any(c.get("token_ids") for event in got for c in event["choices"])
    assert proxy.metric(CONTINUED) == continued + 1

    assert eventually(lambda: _pid_of_decode(deployment, lost[0].number) not in (None, lost[0].pid), BACK_S)
    assert eventually(deployment.decode[lost[0].number].is_ready, BACK_S), "the lost D is back"
    assert eventually(deployment.prefill_is_idle, 60)


@pytest.mark.parametrize("after", [1, 3, 200])
@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_another_goes_on(deployment: Deployment, plain_tiny: Server, path: str, after: int) -> None:
    goes_on(deployment, deployment.proxy, plain_tiny, _streamed(path), after)


def test_several_tokens_in_an_event(deployment: Deployment, plain_tiny: Server) -> None:
    """Where the text ends among them, another D's tokenizer tells."""
    body = _streamed(COMPLETIONS) | {"stream_interval": 5}
    goes_on(deployment, deployment.proxy, plain_tiny, body, 10)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_without_prefill(
    deployment: Deployment, plain_tiny: Server, tmp_path: Path, free_ports: Callable[[int], int], path: str
) -> None:
    """D computed the prompt itself, and so does the next one."""
    engines = (deployment.prefill, deployment.decode)
    with proxy_over(tmp_path, free_ports, *engines, "--min-prefill-tokens", "100000") as proxy:
        goes_on(deployment, proxy, plain_tiny, _streamed(path), 5)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
def test_layer_by_layer(layerwise: Deployment, plain_tiny: Server, path: str) -> None:
    goes_on(layerwise, layerwise.proxy, plain_tiny, _streamed(path), 5)


def test_without_another_the_stream_ends_in_an_error(
    deployment: Deployment, plain_tiny: Server, tmp_path: Path, free_ports: Callable[[int], int]
) -> None:
    assert eventually(lambda: all(d.is_ready() for d in deployment.decode), BACK_S)
    only = deployment.decode[:1]
    lost: list[Lost] = []
    body = _streamed(COMPLETIONS)
    expected = _texts(plain_tiny.stream(COMPLETIONS, body))
    with (
        proxy_over(tmp_path, free_ports, deployment.prefill, only) as proxy,
        proxy.open(COMPLETIONS, body) as response,
    ):
        assert "x-omni-continuable" not in response.headers
        events = _events(response, lambda: lost.append(_kill_busy_decode(deployment, only)), 5)
    assert json.loads(events.pop())["error"]["code"] == 502
    text = _texts([json.loads(event) for event in events])
    assert 0 < len(text) < len(expected)
    assert expected.startswith(text)
    assert eventually(only[0].is_ready, BACK_S)
    assert eventually(deployment.prefill_is_idle, 60)

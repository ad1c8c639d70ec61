"""Real engines, tiny model: a plain engine beside P and D, behind the same proxy."""

import os
import signal
from collections.abc import Callable, Iterator

import pytest

from tests.e2e.deployments import Deployment, Server, deployed, eventually
from tests.e2e.equality import CHAT, COMPLETIONS, chat, choices, completion

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int]) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("mixed")
    sizes = {"prefill_groups": 1, "decode_groups": 1, "mixed_groups": 1}
    with deployed(folder, free_ports, model="embedded:tiny", **sizes) as running:
        yield running


def way(proxy: Server, body: dict[str, object]) -> str:
    with proxy.open(COMPLETIONS, body) as response:
        response.read()
        path: str = response.headers["x-omni-path"]
        return path


def test_both_ways_answer_like_plain_vllm(deployment: Deployment, plain_tiny: Server) -> None:
    for number in range(12):
        body = completion(f"{number} green bottles hanging on the wall, " * 4)
        assert choices(deployment.proxy.post(COMPLETIONS, body)) == choices(plain_tiny.post(COMPLETIONS, body))
    body = chat("Who are you?")
    assert choices(deployment.proxy.post(CHAT, body)) == choices(plain_tiny.post(CHAT, body))
    assert deployment.mixed[0].metric("vllm:request_success_total") > 0
    assert deployment.decode[0].metric("vllm:omni_kv_load_seconds_count") > 0


def test_a_stream_is_whole_on_either_way(deployment: Deployment, plain_tiny: Server) -> None:
    for number in range(4):
        body = completion(f"{number} streamed bottles hanging on the wall, " * 4)
        text = "".join(event["choices"][0]["text"] for event in deployment.proxy.stream(COMPLETIONS, body))
        assert text == plain_tiny.post(COMPLETIONS, body)["choices"][0]["text"]


def test_the_plain_engine_takes_over_and_comes_back(deployment: Deployment, plain_tiny: Server) -> None:
    (victim,) = [p for p in deployment.status()["processes"] if p["name"] == "decode.group1.rank0"]
    os.kill(victim["pid"], signal.SIGKILL)
    for number in range(4):
        body = completion(f"{number} bottles while D is away, " * 4)
        assert choices(deployment.proxy.post(COMPLETIONS, body)) == choices(plain_tiny.post(COMPLETIONS, body))
        assert way(deployment.proxy, body) == "mixed"
    assert eventually(lambda: all(p["state"] == "ready" for p in deployment.status()["processes"]), 240)
    (plain,) = [p for p in deployment.status()["processes"] if p["name"] == "mixed.group1.rank0"]
    os.kill(plain["pid"], signal.SIGKILL)
    body = completion("bottles while the plain engine is away, " * 4)
    assert choices(deployment.proxy.post(COMPLETIONS, body)) == choices(plain_tiny.post(COMPLETIONS, body))
    assert way(deployment.proxy, body) == "disaggregated"

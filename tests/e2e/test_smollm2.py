"""Real engines, SmolLM2-135M, 1P1D: a real model's answers, and what happens when its engines are killed."""

import os
import signal
from collections.abc import Callable, Iterator

import psutil
import pytest

from omni.deployment.embedded_model import ensure_embedded_model
from tests.e2e.deployments import Deployment, Server, deployed, eventually, plain_vllm
from tests.e2e.equality import COMPLETIONS, AnswersLikePlainVllm, choices, completion
from tests.e2e.prompts import prompts

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int]) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("smollm2")
    with deployed(folder, free_ports, model="embedded:smollm2-135m", prefill_groups=1, decode_groups=1) as running:
        yield running


@pytest.fixture(scope="module")
def plain(
    deployment: Deployment, tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int]
) -> Iterator[Server]:
    with plain_vllm(
        tmp_path_factory.mktemp("plain"), free_ports, model_path=ensure_embedded_model("smollm2-135m")
    ) as server:
        yield server


@pytest.fixture(scope="module")
def texts(plain: Server) -> list[str]:
    def count(text: str) -> int:
        return len(plain.post("/tokenize", {"model": "test-model", "prompt": text})["tokens"])

    return prompts(count)


class TestSmolLM2(AnswersLikePlainVllm):
    @pytest.fixture
    def served(self, deployment: Deployment) -> Server:
        return deployment.proxy

    def test_it_knows_the_capital_of_france(self, served: Server) -> None:
        answer = served.post(COMPLETIONS, completion("The capital of France is", max_tokens=1))
        assert answer["choices"][0]["text"] == " Paris"


class TestRestart:
    """After the equality tests, which need the engines' prefix caches undisturbed."""

    def test_a_killed_engine_comes_back(self, deployment: Deployment) -> None:
        expected = choices(deployment.proxy.post(COMPLETIONS, completion("The capital of Spain is")))
        victim = _process(deployment, "decode.group1.rank0")
        os.kill(victim["pid"], signal.SIGKILL)
        assert eventually(lambda: _process(deployment, "decode.group1.rank0")["restarts"] == 1, 10)
        assert eventually(lambda: _process(deployment, "decode.group1.rank0")["state"] == "ready", 120)
        assert eventually(deployment.proxy.is_ready, 10)
        answer = deployment.proxy.post(COMPLETIONS, completion("The capital of Spain is"))
        assert choices(answer) == expected

    def test_nothing_outlives_a_killed_launcher(self, deployment: Deployment) -> None:
        launcher = psutil.Process(deployment.status()["deployment"]["launcher_pid"])
        descendants = launcher.children(recursive=True)
        assert len(descendants) > 6
        config = deployment.log_folder.parent / "deployment.yaml"
        launcher.kill()
        _, alive = psutil.wait_procs([launcher, *descendants], timeout=10)
        assert not alive
        again = deployment.cli("serve", "--detach", str(config))
        assert again.returncode == 0, again.stdout + again.stderr
        answer = deployment.proxy.post(COMPLETIONS, completion("The capital of France is", max_tokens=1))
        assert answer["choices"][0]["text"] == " Paris"


def _process(deployment: Deployment, name: str) -> dict[str, object]:
    processes = deployment.status()["processes"]
    return next(p for p in processes if p["name"] == name)

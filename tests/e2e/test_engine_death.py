"""Row 5 of the faults: the engine dies by SIGKILL, and its api server lives.

The instance says so at once, ends by itself, and is started again, each time a little later.
"""

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError

import psutil
import pytest

from tests.e2e.deployments import Deployment, Server, deployed, eventually
from tests.e2e.equality import COMPLETIONS, choices, completion
from tests.e2e.kv_faults.injectors import shared_memory_of

pytestmark = pytest.mark.engine

UNHEALTHY_S = 2.0
BACK_S = 120.0  # vLLM's api server ends up to 5 s after its engine; then the backoff, and the start of an engine
ROLES = pytest.mark.parametrize("role", ["prefill", "decode"])


@dataclass(frozen=True)
class Instance:
    """One api server, its EngineCore and its worker."""

    deployment: Deployment
    role: str

    @property
    def server(self) -> Server:
        (server,) = self.deployment.prefill if self.role == "prefill" else self.deployment.decode
        return server

    def state(self) -> dict[str, Any]:
        """What `omni_cli status` reads."""
        folder = Path(self.deployment.env["OMNI_STATE_DIR"], self.deployment.name)
        state: dict[str, Any] = json.loads((folder / f"{self.role}.group1.rank0.process.json").read_text())
        return state

    def kill_engine(self) -> int:
        """kill -9 of the EngineCore alone; returns the api server's pid."""
        pid: int = self.state()["pid"]
        (engine,) = [p for p in psutil.Process(pid).children() if "EngineCore" in p.name()]
        engine.kill()
        return pid

    def is_back(self, instead_of: int) -> bool:
        """Another process serves."""
        state = self.state()
        return state["state"] == "ready" and state["pid"] != instead_of and self.server.is_ready()


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int]) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("engine-death")
    with deployed(folder, free_ports, model="embedded:tiny", prefill_groups=1, decode_groups=1) as running:
        yield running


@ROLES
def test_it_says_so_and_comes_back(deployment: Deployment, plain_tiny: Server, role: str) -> None:
    instance = Instance(deployment, role)
    restarts = instance.state()["restarts"]
    pid = instance.kill_engine()
    assert eventually(lambda: not instance.server.is_ready(), UNHEALTHY_S)
    assert eventually(lambda: not deployment.proxy.is_ready(), UNHEALTHY_S), "the proxy has no such instance left"
    assert json.loads(deployment.proxy.get("/live"))["status"] == "ok"

    assert eventually(lambda: instance.is_back(pid), BACK_S)
    assert instance.state()["restarts"] == restarts + 1
    assert not psutil.pid_exists(pid)
    assert not shared_memory_of(pid)
    assert eventually(deployment.proxy.is_ready, 30)
    _answers_right(deployment, plain_tiny, f"{role} is back")


def test_each_restart_in_a_row_waits_longer(deployment: Deployment) -> None:
    instance = Instance(deployment, "decode")
    log = deployment.log_folder / "engine_host.log"
    before = len(log.read_text())
    for _ in range(3):
        pid = instance.kill_engine()
        assert eventually(lambda pid=pid: instance.is_back(pid), BACK_S)  # type: ignore[misc]
    waits_s = [float(s) for s in re.findall(r"decode.*it starts again in ([\d.]+) s", log.read_text()[before:])]
    assert len(waits_s) == 3
    assert waits_s == sorted(set(waits_s)), "no backoff"


@ROLES
def test_requests_end_soon_in_an_error_that_is_one(deployment: Deployment, role: str) -> None:
    """With no other instance there is nothing better; what must not be is silence, or a 200 that is none."""
    instance = Instance(deployment, role)
    pid = instance.kill_engine()
    refusals = []
    for number in count():
        try:
            deployment.proxy.post(COMPLETIONS, completion(f"{role} {number} " * 30, max_tokens=4))
        except HTTPError as error:
            with error:
                refusals.append((error.code, json.load(error)["error"]))
        if instance.is_back(pid):
            break
    assert refusals
    for status, refusal in refusals:
        assert status in (500, 502, 503)
        assert refusal["code"] == status
        assert refusal["message"]
        assert refusal["type"]
    assert eventually(deployment.proxy.is_ready, 30)
    assert eventually(deployment.prefill_is_idle, 40)


def test_a_stream_is_not_ended_as_if_it_were_whole(deployment: Deployment, plain_tiny: Server) -> None:
    """The only D dies in the middle: what was sent is right, then comes an error, and no [DONE]."""
    instance = Instance(deployment, "decode")
    body = {**completion("A long tale: " * 20, max_tokens=1000, ignore_eos=True), "stream": True}
    expected = plain_tiny.post(COMPLETIONS, {**body, "stream": False})["choices"][0]["text"]
    pid = 0
    events: list[bytes] = []
    with deployment.proxy.open(COMPLETIONS, body) as response:
        for line in response:
            if line.startswith(b"data: "):
                events.append(line.removeprefix(b"data: ").strip())
            if len(events) == 5 and not pid:
                pid = instance.kill_engine()
    assert events[-1] != b"[DONE]", "vLLM's api server says so after its error event; it is not true"
    assert json.loads(events.pop())["error"]["message"]
    text = "".join(json.loads(event)["choices"][0]["text"] for event in events)
    assert 0 < len(text) < len(expected)
    assert expected.startswith(text)
    assert eventually(lambda: instance.is_back(pid), BACK_S)
    assert eventually(deployment.proxy.is_ready, 30)
    _answers_right(deployment, plain_tiny, "after the stream")


def _answers_right(deployment: Deployment, plain: Server, start: str) -> None:
    body = completion(f"{start}: " + "tell me more " * 30)
    loads = deployment.decode[0].metric("vllm:omni_kv_load_seconds_count")

    def is_disaggregated() -> bool:
        """The first requests may still find P or D left alone for a while."""
        try:
            answer = deployment.proxy.post(COMPLETIONS, body)
        except (HTTPError, URLError):
            return False
        assert choices(answer) == choices(plain.post(COMPLETIONS, body))
        return deployment.decode[0].metric("vllm:omni_kv_load_seconds_count") > loads

    assert eventually(is_disaggregated, 60)
    assert eventually(deployment.prefill_is_idle, 40)

"""What the containers run, with what their ConfigMap says: read by our own programs, up to where vLLM would start."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from omni.deployment.plan_types import LaunchPlan, ProcessPlan
from services import engine_host

from ...samples import put
from .samples import Manifest, Rendered, engine, in_cluster, on_devices, rendered, with_known_model

POD_IP = "127.0.0.1"

Run = tuple[LaunchPlan, tuple[ProcessPlan, ...]]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Run]]:
    """What would be supervised."""
    found: list[Run] = []

    def run(plan: LaunchPlan, engines: tuple[ProcessPlan, ...]) -> int:
        found.append((plan, engines))
        return 0

    monkeypatch.setattr(engine_host, "run", run)
    handler = signal.getsignal(signal.SIGUSR1)
    yield found
    signal.signal(signal.SIGUSR1, handler)


def start(folder: Path, result: Rendered, pod: Manifest, monkeypatch: pytest.MonkeyPatch, **lws: str) -> int:
    """What the kubelet does with a container's command, as far as that goes here."""
    config = folder / "deployment.yaml"
    config.write_text(result.config_text())
    values = {"$(POD_IP)": POD_IP, "/etc/omni/deployment.yaml": str(config)}
    values |= {f"$(LWS_{name})": value for name, value in lws.items()}
    words = [values.get(word, word) for word in engine(pod)["command"] if word != "with-cann"]
    python, flag, module, *arguments = words
    assert (python, flag) == ("python3", "-m")
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    role = module.removeprefix("services.")
    assert role in ("prefill", "decode", "mixed")
    return engine_host.main(role)  # type: ignore[arg-type]


@pytest.mark.parametrize("ending", ["prefill-group1", "prefill-group2", "decode-group1"])
def test_a_group_at_the_address_of_its_pod(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[Run], ending: str
) -> None:
    data = with_known_model(tmp_path, put(in_cluster(2), "services/decode/data_parallel_size", 2))
    result = rendered(tmp_path, data)
    pod = result.pod(ending)
    assert start(tmp_path, result, pod, monkeypatch) == 0
    ((plan, engines),) = runs
    role, group = ending.split("-")
    assert {(e.role, e.group, e.host) for e in engines} == {(role, group, POD_IP)}
    assert [e.port for e in engines] == [port["containerPort"] for port in engine(pod)["ports"]]
    assert plan.control_addresses == ("omni-chat-control:7001",)
    assert plan.key_file is None, "it is where $OMNI_STATE_DIR says"
    assert {str(e.log_file.parent) for e in engines} == {"/var/log/omni"}


def test_each_node_of_a_group_has_its_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[Run]) -> None:
    data = with_known_model(tmp_path, on_devices("10.0.0.1", "10.0.0.2,10.0.0.3"))
    result = rendered(tmp_path, data)
    (manifest,) = result.of_kind("LeaderWorkerSet")
    template = manifest["spec"]["leaderWorkerTemplate"]
    for name, index in (("leaderTemplate", "0"), ("workerTemplate", "1")):
        lws = {"WORKER_INDEX": index, "LEADER_ADDRESS": "chat-0.chat.ns"}
        assert start(tmp_path, result, template[name]["spec"], monkeypatch, **lws) == 0
    ranks = [[engine.dp_rank for engine in engines] for _, engines in runs]
    assert ranks == [[0, 1, 2, 3], [4, 5, 6, 7]]
    ports = [port["containerPort"] for port in engine(template["workerTemplate"]["spec"])["ports"]]
    assert [e.port for e in runs[1][1]] == ports
    devices = [e.env["ASCEND_RT_VISIBLE_DEVICES"] for e in runs[1][1]]
    assert devices == ["0", "1", "2", "3"], "of the pod, not of a host"


def test_a_rank_over_two_nodes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[Run]) -> None:
    data = with_known_model(tmp_path, on_devices("10.0.0.1,10.0.0.3", "10.0.0.2", devices="0,1"))
    result = rendered(tmp_path, data)
    (manifest,) = result.of_kind("LeaderWorkerSet")
    worker = manifest["spec"]["leaderWorkerTemplate"]["workerTemplate"]["spec"]
    lws = {"WORKER_INDEX": "1", "LEADER_ADDRESS": "chat-0.chat.ns"}
    assert start(tmp_path, result, worker, monkeypatch, **lws) == 0
    ((_, (process,)),) = runs
    assert process.is_headless
    assert "chat-0.chat.ns" in process.command


def test_gpus_are_counted_from_0_in_each_pod(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, runs: list[Run]) -> None:
    data = with_known_model(tmp_path, put(in_cluster(2), "platform", "cuda"))
    result = rendered(tmp_path, data)
    assert start(tmp_path, result, result.pod("decode-group1"), monkeypatch) == 0
    ((_, (process,)),) = runs
    assert process.env["CUDA_VISIBLE_DEVICES"] == "0"

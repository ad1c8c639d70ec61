"""`backend: ray` on a cluster of three nodes on this machine: real actors, real engines, the tiny model, the proxy.

The prefill group computes with tensor parallelism over two nodes, each with an address of its own.
"""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError

import psutil
import pytest
import yaml

from tests.e2e.deployments import Server, eventually
from tests.e2e.equality import COMPLETIONS, completion
from tests.e2e.ray_cluster import CommandError, RayCluster, ray_cluster, shared_memory

pytest.importorskip("ray", reason="the extra ray is not installed")
pytestmark = pytest.mark.engine

NAME = "ray-test"
BACK_S = 120.0
FIRST = ["prefill.group1.rank0", "prefill.group1.rank0.node1", "decode.group1.rank0", "proxy"]
LOADS = "vllm:omni_kv_load_seconds_count"


@dataclass(frozen=True)
class Deployment:
    cluster: RayCluster
    config: Path
    proxy: Server
    decode: Server  # group1
    logs: Path

    def states(self) -> dict[str, dict[str, Any]]:
        return {state["name"]: state for state in self.cluster.command("status", NAME)}

    def pid(self, name: str) -> int:
        pid: int = self.states()[name]["pid"]
        return pid

    def actor_of(self, name: str) -> psutil.Process:
        """The Ray worker above a process."""
        parents = psutil.Process(self.pid(name)).parents()
        return next(parent for parent in parents if parent.name().startswith("ray::"))

    def answers(self) -> bool:
        try:
            answer = self.proxy.post(COMPLETIONS, completion("Tell me a tale. " * 20, max_tokens=4))
        except (URLError, OSError):
            return False
        return bool(answer["choices"][0]["text"])

    def is_disaggregated(self) -> bool:
        before = self.decode.metric(LOADS)
        return self.answers() and self.decode.metric(LOADS) > before


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    with ray_cluster(tmp_path_factory.mktemp("ray") / "state", num_nodes=2, num_cpus=2) as running:
        yield running


@pytest.fixture(scope="module")
def deployment(
    cluster: RayCluster, tmp_path_factory: pytest.TempPathFactory, free_ports: Callable[[int], int]
) -> Iterator[Deployment]:
    folder = tmp_path_factory.mktemp("ray-deployment")
    port = free_ports(30)
    config = folder / "deployment.yaml"
    config.write_text(yaml.safe_dump(content(port, folder / "logs")))
    state = cluster.command("serve", str(config))
    (host,) = [state["host"] for state in cluster.command("status", NAME) if state["name"] == "decode.group1.rank0"]
    decode = Server(f"http://{host}:{port + 10}")
    yield Deployment(cluster, config, Server(state["proxy_url"]), decode, folder / "logs")
    if cluster.command("left")["actors"]:  # the last test did not come to it
        cluster.command("stop", NAME)


def content(port: int, logs: Path) -> dict[str, Any]:
    role = {"max_model_len": 2048, "kv_cache_gib": 0.5}
    return {
        "name": NAME,
        "backend": "ray",
        "platform": "cpu",
        "deployment": {
            "prefill": {"group1": {"hosts": "node0,node1", "tensor_parallel_size": 2, "base_api_port": port}},
            "decode": {"group1": {"base_api_port": port + 10}},
            "proxy": {"listen_port": port + 20, "extra_args": ["--min-prefill-tokens", "0"]},
        },
        "services": {
            "model_path": "embedded:tiny",
            "served_model_name": "test-model",
            "dtype": "float32",
            "log_path": str(logs),
            "prefill": role,
            "decode": role,
        },
    }


def test_what_the_cluster_has_not_is_refused_before_anything_starts(cluster: RayCluster, tmp_path: Path) -> None:
    wanting = content(9000, tmp_path) | {"name": "wanting"}
    wanting["deployment"]["decode"]["group1"]["tensor_parallel_size"] = 4
    _refused(
        cluster, wanting, tmp_path, "deployment.decode.group1: needs 4 CPU on one node; the most that any of 3 has"
    )


def test_what_all_groups_need_together_is_counted(cluster: RayCluster, tmp_path: Path) -> None:
    wanting = content(9000, tmp_path) | {"name": "wanting"}
    wanting["deployment"]["decode"]["group2"] = {"base_api_port": 9100, "tensor_parallel_size": 2}
    message = "deployment.decode.group2: needs 2 CPU; of the cluster's 4 the groups above leave 1"
    _refused(cluster, wanting, tmp_path, message)


def _refused(cluster: RayCluster, wanting: dict[str, Any], folder: Path, message: str) -> None:
    config = folder / "wanting.yaml"
    config.write_text(yaml.safe_dump(wanting))
    with pytest.raises(CommandError) as refusal:
        cluster.command("serve", str(config))
    assert message in str(refusal.value)
    assert cluster.command("left") == {"actors": [], "placement_groups": []}
    assert not (cluster.state_folder / "wanting" / "deployment.json").exists()


def test_a_request_goes_through_p_and_d(deployment: Deployment) -> None:
    assert eventually(deployment.is_disaggregated, 30)
    states = deployment.states()
    assert list(states) == FIRST
    assert {state["state"] for state in states.values()} == {"ready"}
    assert all(state["host"] for state in states.values())


def test_it_cannot_be_served_twice(deployment: Deployment) -> None:
    with pytest.raises(CommandError, match=f"deployment '{NAME}' is running already"):
        deployment.cluster.command("serve", str(deployment.config))


def test_what_others_use_is_refused_in_time(deployment: Deployment, tmp_path: Path) -> None:
    """It would fit, were the cluster free."""
    wanting = content(9000, tmp_path) | {"name": "wanting"}
    config = tmp_path / "wanting.yaml"
    config.write_text(yaml.safe_dump(wanting))
    with pytest.raises(CommandError, match=r"group1: 2 CPU on 2 node\(s\) were not to be had .* nothing was started"):
        deployment.cluster.command("serve", str(config))
    left = deployment.cluster.command("left")
    assert sorted(left["placement_groups"]) == ["decode.group1", "prefill.group1"]
    assert len(left["actors"]) == 4


def test_what_is_on_a_node_is_this_users_alone(deployment: Deployment) -> None:
    (folder,) = deployment.cluster.folder.glob("omni-ray-*/*")
    keys = list(folder.glob("*/state/deployment.key"))
    assert len(keys) == 4
    assert {key.stat().st_mode & 0o777 for key in keys} == {0o600}
    assert folder.stat().st_mode & 0o777 == 0o700
    secret = keys[0].read_text().strip()
    command_lines = [" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"])]
    assert not [line for line in command_lines if secret in line]
    logs = [path for path in deployment.cluster.folder.rglob("*") if path.is_file() and path.name != "deployment.key"]
    assert not [path for path in logs if secret.encode() in path.read_bytes()]


@pytest.mark.parametrize("name", ["prefill.group1.rank0", "prefill.group1.rank0.node1", "proxy"])
def test_a_killed_actor_comes_back_and_its_processes_end_with_it(deployment: Deployment, name: str) -> None:
    pid = deployment.pid(name)
    family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    os.kill(deployment.actor_of(name).pid, signal.SIGKILL)
    _, alive = psutil.wait_procs(family, timeout=15)
    assert not alive

    def is_back() -> bool:
        state = deployment.states()[name]
        return state["state"] == "ready" and state["pid"] != pid and state["restarts"] == 1

    assert eventually(is_back, BACK_S)
    assert eventually(deployment.is_disaggregated, 60)


def test_started_again_on_demand(deployment: Deployment) -> None:
    pid = deployment.pid("proxy")
    deployment.cluster.command("restart", NAME, "proxy")
    assert deployment.pid("proxy") != pid
    assert eventually(deployment.is_disaggregated, 60)


def test_scaled_to_two_d_and_back(deployment: Deployment) -> None:
    deployment.cluster.command("scale", NAME, "2")
    states = deployment.states()
    assert list(states) == [*FIRST[:-1], "decode.group2.rank0", "proxy"]
    assert {state["state"] for state in states.values()} == {"ready"}
    assert deployment.answers()

    pid = states["decode.group2.rank0"]["pid"]
    deployment.cluster.command("scale", NAME, "1")
    assert list(deployment.states()) == FIRST
    assert not psutil.pid_exists(pid)
    assert deployment.is_disaggregated()


def test_stopped_it_leaves_nothing(deployment: Deployment) -> None:
    actors = [deployment.actor_of(name) for name in FIRST]
    family = [process for actor in actors for process in (actor, *actor.children(recursive=True))]
    shared = shared_memory(family)
    deployment.cluster.command("stop", NAME)
    assert deployment.cluster.command("left") == {"actors": [], "placement_groups": []}
    assert not psutil.wait_procs(family, timeout=10)[1]
    assert not [path for path in shared if path.exists()]
    assert not list(deployment.cluster.folder.glob("omni*"))
    assert not (deployment.cluster.state_folder / NAME).exists()
    assert {path.name for path in deployment.logs.iterdir()} >= {f"{name}.log" for name in FIRST}

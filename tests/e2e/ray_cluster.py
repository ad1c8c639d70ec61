"""A Ray cluster of several nodes on this machine, in a process of its own: Ray's threads and signal handlers are not in
that of the tests. That process also runs the backend's methods, as `omni_cli` does, for it has imported Ray.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

_OBJECT_STORE_BYTES = 80 << 20  # of a node: Ray's least
_MARK = "RESULT "  # what else is on stdout is Ray's


class CommandError(Exception):
    """The backend's DeploymentError."""


@dataclass(frozen=True)
class RayCluster:
    """A running cluster.

    Attributes:
        state_folder: $OMNI_STATE_DIR of the commands.
        folder: the temporary folder of all that runs on it; a short path, for sockets lie there.
    """

    state_folder: Path
    folder: Path
    process: "subprocess.Popen[str]"

    def command(self, *arguments: str) -> Any:
        """Raises CommandError."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(arguments) + "\n")
        self.process.stdin.flush()
        while (answer := self.answer())["of"] != list(arguments):
            continue  # an interrupted test has not read it
        if "error" in answer:
            raise CommandError(answer["error"])
        return answer["result"]

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = next((line for line in self.process.stdout if line.startswith(_MARK)), None)
        assert line is not None, "the process with the cluster has ended"
        answer: dict[str, Any] = json.loads(line.removeprefix(_MARK))
        return answer


@contextmanager
def ray_cluster(state_folder: Path, *, num_nodes: int, num_cpus: int) -> Iterator[RayCluster]:
    """A head without cores, and nodes with addresses of their own. At the end nothing is left on disk or in memory."""
    with tempfile.TemporaryDirectory(prefix="omr") as name:
        Path(name, "ray").mkdir()
        env = {
            **os.environ,
            "TMPDIR": name,
            "RAY_TMPDIR": name,
            "RAY_USAGE_STATS_ENABLED": "0",
            "OMNI_STATE_DIR": str(state_folder),
        }
        command = [sys.executable, "-m", "tests.e2e.ray_cluster", str(num_nodes), str(num_cpus)]
        with state_folder.with_name("cluster.log").open("w") as log:
            process = subprocess.Popen(
                command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
            )
        assert process.stdin is not None
        assert process.stdout is not None
        with process.stdin, process.stdout:
            cluster = RayCluster(state_folder, Path(name), process)
            cluster.answer()
            try:
                yield cluster
            finally:
                family = psutil.Process(process.pid).children(recursive=True)
                shared = shared_memory(family)
                process.stdin.close()
                process.wait(timeout=60)
                _, alive = psutil.wait_procs(family, timeout=15)
                for left in alive:
                    left.kill()
        assert not alive, f"left by the cluster: {alive}"
        assert not [path for path in shared if path.exists()]


def shared_memory(processes: list[psutil.Process]) -> set[Path]:
    """Files in /dev/shm that they have mapped."""
    found = set()
    for process in processes:
        try:
            found |= {Path(mapping.path) for mapping in process.memory_maps()}
        except psutil.Error:
            continue
    return {path for path in found if path.parent == Path("/dev/shm")}  # noqa: S108


def _serve(num_nodes: int, num_cpus: int) -> None:
    from ray.cluster_utils import Cluster

    common = {"object_store_memory": _OBJECT_STORE_BYTES, "include_dashboard": False}
    temporary = str(Path(os.environ["TMPDIR"], "ray"))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "temp_dir": temporary, **common})
    addresses = [f"127.0.0.{2 + number}" for number in range(num_nodes)]  # nodes of their own to all who ask
    for address in addresses:
        cluster.add_node(num_cpus=num_cpus, node_ip_address=address, **common)
    cluster.wait_for_nodes()
    os.environ["RAY_ADDRESS"] = cluster.address
    _answer({"result": None})
    for line in sys.stdin:
        method, *arguments = command = json.loads(line)
        answer = {"result": _left()} if method == "left" else _backend_command(method, *arguments)
        _answer({"of": command, **answer})
    cluster.shutdown()


def _left() -> dict[str, list[str]]:
    """What is on the cluster that outlives a command."""
    import ray

    ray.init(logging_level=logging.ERROR)
    try:
        groups = ray.util.placement_group_table().values()
        return {
            "actors": [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)],
            "placement_groups": [group["name"] for group in groups if group["state"] != "REMOVED"],
        }
    finally:
        ray.shutdown()


def _backend_command(method: str, argument: str, *more: str) -> dict[str, Any]:
    """A method of the backend: of the deployment file, or the deployment's name."""
    from omni.deployment.errors import DeploymentError

    try:
        return {"result": _result(method, argument, *more)}
    except DeploymentError as error:
        return {"error": str(error)}


def _result(method: str, argument: str, *more: str) -> Any:
    from omni.deployment.backends.ray.backend import Backend
    from omni.deployment.load import load_plan
    from omni.deployment.run_state import RunFolder

    backend = Backend(reserve_s=10, start_s=200)
    if method == "serve":
        return asdict(backend.serve(load_plan(argument), _say))
    deployment = RunFolder.of(argument).deployment()
    assert deployment is not None
    if method == "status":
        return [asdict(state) for state in backend.process_states(deployment)]
    if method == "scale":
        return backend.scale(deployment, {"decode": int(more[0])}, 30, _say)
    if method == "restart":
        return backend.restart(deployment, more, _say)
    assert method == "stop"
    return backend.stop(deployment, _say)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _answer(answer: dict[str, Any]) -> None:
    print(_MARK + json.dumps(answer), flush=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))

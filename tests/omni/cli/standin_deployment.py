"""A deployment that really runs, but for its engines: supervisors, states, the proxy, and stand-ins for vLLM.

`python -m tests.omni.cli.standin_deployment launcher|engines NAME PORT CONTROL_PORT KEY_FILE [PROXY_OPTION...]`
is run by `standing_in`.
"""

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from kv_transfer.auth import load_or_make_key
from omni.deployment.admin_client import AdminClient
from omni.deployment.backends.local import ENGINE_HOST
from omni.deployment.engines_file import read_engines, write_engines
from omni.deployment.run_state import DeploymentState, ProcessState, RunFolder
from omni.process import obey_parent, parent_environment, start_ticks
from omni.supervisor import Child, Supervisor
from tests.omni.deployment.samples import content, planned, put

_START_S = 60
_REPOSITORY = Path(__file__).parents[3]
HOST = "127.0.0.1"


@dataclass(frozen=True)
class Standing:
    """It runs."""

    name: str
    proxy_url: str
    key_file: Path

    @property
    def states(self) -> dict[str, ProcessState]:
        return RunFolder.of(self.name).processes()

    @property
    def client(self) -> AdminClient:
        return AdminClient(self.proxy_url, load_or_make_key(self.key_file))

    def instance(self, name: str) -> dict[str, Any] | None:
        """The proxy's, by the name of the process."""
        engine = next(engine for engine in read_engines(RunFolder.of(self.name)) or () if engine.name == name)
        return {one["name"]: one for one in self.client.instances()}.get(f"{HOST}:{engine.port}")


@contextmanager
def standing_in(
    folder: Path, free_ports: Callable[[int], int], *, num_prefill: int = 1, num_decode: int = 1, **proxy: Any
) -> Iterator[Standing]:
    """The states are where $OMNI_STATE_DIR says. Engines join by the control plane.

    Args:
        proxy: more keys of deployment.proxy.
    """
    first_port = free_ports(2 + num_prefill + num_decode)
    key_file = folder / "deployment.key"
    load_or_make_key(key_file)
    written = put(content(), "services/log_path", str(folder / "logs"))
    written = put(written, "services/kv_transfer", {"key_file": str(key_file)})
    written["deployment"].setdefault("proxy", {}).update(proxy)
    plan = planned(folder, written)
    plan.config_file.write_text(yaml.safe_dump(written))
    plan.proxy.log_file.parent.mkdir()
    samples = {process.role: process for process in plan.processes}
    ports = iter(range(first_port + 2, first_port + 100))
    engines = tuple(
        replace(
            samples[role],
            name=f"{role}.group{number}.rank0",
            group=f"group{number}",
            port=next(ports),
            log_file=folder / "logs" / f"{role}.group{number}.rank0.log",
        )
        for role, count in (("prefill", num_prefill), ("decode", num_decode))
        for number in range(1, count + 1)
    )
    run_folder = RunFolder.of(plan.name)
    write_engines(run_folder, engines)
    command = [sys.executable, "-m", __name__, "launcher", plan.name, str(first_port), str(first_port + 1)]
    with (folder / "launcher.log").open("wb") as log:
        launcher = subprocess.Popen(
            [*command, str(key_file), *_proxy_options(proxy)],
            cwd=_REPOSITORY,
            env={**os.environ, **parent_environment()},
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        run_folder.write_deployment(
            DeploymentState(
                name=plan.name,
                config_file=str(plan.config_file),
                log_folder=str(folder / "logs"),
                proxy_url=f"http://{HOST}:{first_port}",
                served_model_name=plan.served_model_name,
                process_names=(*(engine.name for engine in engines), "proxy"),
                launcher_pid=launcher.pid,
                launcher_start_ticks=start_ticks(launcher.pid),
            )
        )
        standing = Standing(plan.name, f"http://{HOST}:{first_port}", key_file)
        _wait_until_ready(standing, launcher, len(engines), folder)
        yield standing
    finally:
        launcher.terminate()
        launcher.wait(_START_S)


def _wait_until_ready(standing: Standing, launcher: "subprocess.Popen[bytes]", num_engines: int, folder: Path) -> None:
    deadline_s = time.monotonic() + _START_S
    while True:
        ready = [state for state in standing.states.values() if state.state == "ready"]
        if len(ready) == num_engines + 2 and len(standing.client.instances()) == num_engines:  # engine host, proxy
            return
        logs = "".join(path.read_text() for path in [folder / "launcher.log", *(folder / "logs").iterdir()])
        assert launcher.poll() is None, logs
        assert time.monotonic() < deadline_s, logs
        time.sleep(0.05)


def _child(name: str, folder: Path, port: int, path: str, *arguments: str) -> Child:
    def start(output: int) -> int:
        actions = [(os.POSIX_SPAWN_DUP2, output, 1), (os.POSIX_SPAWN_DUP2, output, 2)]
        command = [sys.executable, "-m", *arguments]
        return os.posix_spawn(command[0], command, os.environ | parent_environment(), file_actions=actions)

    ready_url = f"http://{HOST}:{port}{path}" if path else None
    return Child(name=name, start=start, log_file=folder / "logs" / f"{name}.log", ready_url=ready_url)


def _proxy_options(written: dict[str, Any]) -> list[str]:
    return ["--api-keys", written["api_keys_file"]] if "api_keys_file" in written else []


def main(part: str, name: str, port: str, control_port: str, key_file: str, *more: str) -> int:
    obey_parent()
    run_folder, folder = RunFolder.of(name), Path(key_file).parent
    if part == "engines":
        joins = (f"{HOST}:{control_port}", key_file)
        return Supervisor(
            [
                _child(
                    e.name, folder, e.port, "/health", "tests.standins.fast_engine", e.name, str(e.port), e.role, *joins
                )
                for e in read_engines(run_folder) or ()
            ],
            run_folder,
        ).run()
    proxy = ("services.global_proxy", "--host", HOST, "--port", port, "--control-port", control_port)
    options = (
        "--key-file",
        key_file,
        "--connector",
        "nixl",
        "--min-prefill-tokens",
        "0",
        "--health-interval-s",
        "0.2",
        *more,
    )
    engines = (__spec__.name, "engines", name, port, control_port, key_file)
    children = [
        _child(ENGINE_HOST, folder, 0, "", *engines),
        _child("proxy", folder, int(port), "/live", *proxy, *options),
    ]
    return Supervisor(children, run_folder).run()


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))

"""Deployments without engines: plans, states and launchers that only seem to serve."""

import json
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from omni.deployment.plan_types import LaunchPlan
from omni.deployment.run_state import DeploymentState, ProcessState, RunFolder
from omni.process import start_ticks
from tests.omni.deployment.samples import content, planned, put


def plan_of(folder: Path, *, proxy_port: int = 7000) -> LaunchPlan:
    """One prefill engine, one decode engine, the proxy; logs under `folder`."""
    plan = planned(folder, put(content(), "services/log_path", str(folder / "logs")))
    return replace(plan, processes=(*plan.processes[:-1], replace(plan.proxy, port=proxy_port)))


@contextmanager
def running(plan: LaunchPlan, *, states: dict[str, ProcessState] | None = None) -> Iterator[DeploymentState]:
    """A deployment whose launcher is a process that sleeps."""
    with subprocess.Popen(["/bin/sleep", "1000"]) as launcher:
        try:
            yield registered(plan, launcher.pid, states or {})
        finally:
            launcher.kill()


def registered(plan: LaunchPlan, launcher_pid: int, states: dict[str, ProcessState]) -> DeploymentState:
    state = DeploymentState(
        name=plan.name,
        config_file=str(plan.config_file),
        log_folder=str(plan.proxy.log_file.parent),
        proxy_url=plan.proxy.url,
        served_model_name=plan.served_model_name,
        process_names=tuple(process.name for process in plan.processes),
        launcher_pid=launcher_pid,
        launcher_start_ticks=start_ticks(launcher_pid),
    )
    folder = RunFolder.of(plan.name)
    folder.write_deployment(state)
    for process in states.values():
        folder.write(process)
    return state


def all_ready(plan: LaunchPlan) -> dict[str, ProcessState]:
    return {p.name: ProcessState(name=p.name, state="ready", pid=os.getpid()) for p in plan.processes}


def launcher_script(folder: Path, *, body: str) -> Path:
    """A program to take the interpreter's place when a launcher is started; it writes its pid to `folder`/pid."""
    script = folder / "launcher.sh"
    script.write_text(f"#!/bin/sh\necho $$ > {folder}/pid.new && mv {folder}/pid.new {folder}/pid\n{body}\n")
    script.chmod(0o755)
    return script


def writes_ready_states(plan: LaunchPlan) -> str:
    """Shell commands that report every process of the plan as ready."""
    folder = RunFolder.of(plan.name).path
    lines = [f"mkdir -p '{folder}'"]
    for process in plan.processes:
        state = {"name": process.name, "state": "ready", "pid": os.getpid()}
        lines.append(f"echo '{json.dumps(state)}' > '{folder}/{process.name}.process.json'")
    return "\n".join(lines)

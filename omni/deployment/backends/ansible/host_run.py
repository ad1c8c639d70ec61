"""Run on a host by the playbook: what runs here under a name, and whether from the plan that is wanted.

    python -m omni.deployment.backends.ansible.host_run report RUN [--file FILE --on HOST]
    python -m omni.deployment.backends.ansible.host_run settle RUN --file FILE --on HOST

`report` prints one JSON object. `settle` waits until every process is ready and notes the plan.
"""

import argparse
import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final, Literal

import yaml

from omni.deployment.run_state import DeploymentState, ProcessState, RunFolder, state_folder
from omni.process import start_ticks

Verdict = Literal["absent", "outdated", "current"]

_POOLS: Final = ("prefill", "decode", "mixed")
_DIGEST: Final = "plan.digest"  # in the run folder: it goes as the run goes
_BESIDE: Final = ("code.digest", "pip.digest")  # in the deployment's own folder: of what is installed
_READY_TIMEOUT_S: Final = 3600.0
_POLL_S: Final = 0.5


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 0, or 1 with a message on stderr."""
    chosen = _parse(arguments)
    folder = RunFolder.of(chosen.run)
    wanted = None if chosen.file is None else wanted_digest(chosen.file, chosen.on, chosen.run.rpartition(".")[2])
    if chosen.command == "report":
        print(json.dumps(report(folder, wanted)))
        return 0
    problem = wait_until_ready(folder, _READY_TIMEOUT_S)
    if problem:
        print(problem, file=sys.stderr)
        return 1
    assert wanted is not None, "argparse asks for --file"
    digest_file = folder.path / _DIGEST
    if _read(digest_file) == wanted:
        print("unchanged")
    else:
        digest_file.write_text(wanted)
        print("noted")
    return 0


def report(folder: RunFolder, wanted: str | None) -> dict[str, Any]:
    """What runs, as the playbook and the backend read it."""
    deployment = folder.deployment()
    is_running = deployment is not None and deployment.is_running
    states = process_states(folder, deployment) if is_running and deployment is not None else []
    verdict: Verdict = "current"
    if not is_running:
        verdict = "absent"
    elif _read(folder.path / _DIGEST) != wanted or any(state.state == "failed" for state in states):
        verdict = "outdated"
    return {
        "run": folder.path.name,
        "is_running": is_running,
        "verdict": verdict,
        "processes": [asdict(state) for state in states],
    }


def process_states(folder: RunFolder, deployment: DeploymentState) -> list[ProcessState]:
    """One for each process of the run, in its order."""
    states = folder.processes()
    return [_present(states.get(name, ProcessState(name=name))) for name in deployment.process_names]


def wait_until_ready(folder: RunFolder, timeout_s: float) -> str:
    """Returns why it is not, or an empty text."""
    deadline_s = time.monotonic() + timeout_s
    while True:
        deployment = folder.deployment()
        if deployment is None or not deployment.is_running:
            return f"{folder.path.name} has ended: see its launcher.log"
        states = process_states(folder, deployment)
        if failed := [f"{state.name}: {state.message}" for state in states if state.state == "failed"]:
            return "\n".join(failed)
        waiting = [state.name for state in states if state.state != "ready"]
        if not waiting:
            return ""
        if time.monotonic() > deadline_s:
            return f"not ready after {timeout_s:.0f} s: {', '.join(waiting)}"
        time.sleep(_POLL_S)


def wanted_digest(file: Path, host: str, part: str) -> str:
    """Of what this part on this host depends on. Another host's group that comes or goes stops nothing here."""
    data = own_part(yaml.safe_load(file.read_text(encoding="utf-8")), host, part)
    parts = [json.dumps(data, sort_keys=True), *(_read(state_folder() / name) for name in _BESIDE)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def own_part(data: Mapping[str, Any], host: str, part: str) -> dict[str, Any]:
    """A deployment file's content without what does not concern the host's engines; all of it for the proxy.

    Of the proxy they know where it is.
    """
    if part != "engines":
        return dict(data)
    pools = data["deployment"]
    own = {
        role: {name: group for name, group in pools[role].items() if host in _hosts(group)}
        for role in _POOLS
        if role in pools
    }
    proxy = pools.get("proxy", pools.get("c0", {}))
    known = {key: proxy[key] for key in ("host", "listen_port", "control_port") if key in proxy}
    return {**data, "deployment": {**own, "proxy": known}}


def _hosts(group: Mapping[str, Any]) -> list[str]:
    written = group.get("hosts", "127.0.0.1")
    names = written.split(",") if isinstance(written, str) else written
    return [str(name).strip() for name in names]


def _present(state: ProcessState) -> ProcessState:
    """A killed supervisor cannot write that its processes ended with it."""
    if state.pid is None or start_ticks(state.pid) is not None:
        return state
    return state.changed(state="restarting", pid=None, message="ended with its supervisor")


def _read(path: Path) -> str:
    return path.read_text() if path.exists() else ""


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="host_run", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("report", "settle"):
        command = commands.add_parser(name)
        command.add_argument("run", help="<deployment>.engines or <deployment>.proxy")
        command.add_argument("--file", type=Path, required=name == "settle", help="the deployment file")
        command.add_argument("--on", default="", help="this host, as the file names it")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())

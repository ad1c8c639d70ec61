"""Start a deployment in the background and wait until it is ready."""

import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from rich.console import Console

from omni.cli.progress import StartProgress
from omni.deployment.backends.local import claim_folder
from omni.deployment.errors import DeploymentError
from omni.deployment.plan_types import LaunchPlan

START_TIMEOUT_S: Final = 3600.0  # the largest models load for half an hour; an engine that fails is noticed at once


def start(
    plan: LaunchPlan,
    console: Console,
    *,
    on: str | None = None,
    part: str | None = None,
    timeout_s: float = START_TIMEOUT_S,
) -> None:
    """Returns when every process is ready.

    Args:
        on: the host whose part the plan is, and `part` which one: as for `omni_cli serve`.
        timeout_s: for every process to be ready.

    Whoever waits no longer (Ctrl-C) stops what was started.

    Raises:
        DeploymentError: it is running already, or the launcher ended; the message has the end of its log.
    """
    folder = claim_folder(plan)
    log_file = plan.proxy.log_file.with_name("launcher.log" if part is None else f"launcher.{part}.log")
    log_file.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "omni.cli.main", "serve", "--quiet", str(plan.config_file)]
    command += [word for flag, value in (("--on", on), ("--part", part)) if value is not None for word in (flag, value)]
    with log_file.open("wb") as log:
        launcher = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        with StartProgress(folder, tuple(p.name for p in plan.processes), console) as progress:
            _wait_until_ready(plan, progress, launcher, log_file, timeout_s)
    except BaseException:
        launcher.terminate()
        launcher.wait(timeout=60)
        raise
    launcher.returncode = 0  # it goes on by itself: Popen must neither wait for it nor warn


def _wait_until_ready(
    plan: LaunchPlan, progress: StartProgress, launcher: "subprocess.Popen[bytes]", log_file: Path, timeout_s: float
) -> None:
    deadline = time.monotonic() + timeout_s
    while progress.update():
        if launcher.poll() is not None:
            end = log_file.read_text(errors="replace")[-3000:]
            raise DeploymentError(f"{plan.folder_name} did not start:\n{end}\n(all of it: {log_file})")
        if time.monotonic() > deadline:
            text = f"{plan.folder_name} was not ready after {timeout_s:g} s, and is stopped (--start-timeout-s)"
            raise DeploymentError(f"{text}; see {log_file.parent}")
        time.sleep(0.1)

"""Logs from all hosts into one folder."""

import shutil
import tempfile
from pathlib import Path

from omni.deployment.backends.ansible.playbook_run import run_playbook
from omni.deployment.errors import DeploymentError


def fetch(rendered: Path, folder: Path, timeout_s: int) -> None:
    """Copies every process's log to `folder`. What each host has of the same name gets the host's name before it.

    Raises:
        DeploymentError: not every host could be asked; the logs of the others are there.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="omni-logs-") as temporary:
        outcome = run_playbook(rendered, tags=("fetch_log",), variables={"log_folder": temporary}, timeout_s=timeout_s)
        for log in sorted(Path(temporary).glob("*/*.log*")):
            is_process = log.name.startswith(("prefill.", "decode.", "mixed.", "proxy."))
            shutil.move(log, folder / (log.name if is_process else f"{log.parent.name}.{log.name}"))
    if not outcome.is_good:
        raise DeploymentError(f"some logs could not be fetched; those of the other hosts are in {folder}:\n{outcome}")

"""Writes what Ansible needs into a folder: the playbook as it is, and what differs between deployments."""

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from omni.deployment.backends.ansible.copied_file import copied_file
from omni.deployment.backends.ansible.inventory import inventory_text, password_texts
from omni.deployment.backends.ansible.machines import inventory_hosts, machines_of
from omni.deployment.errors import Problem
from omni.deployment.model import Deployment
from omni.deployment.plan_types import LaunchPlan

PLAYBOOK_FOLDER: Final = Path(__file__).with_name("playbook")
_PASSWORDS: Final = "passwords.yml"  # in host_vars/<host>
_ANY_ADDRESS: Final = ("0.0.0.0", "::")
_LOOPBACK: Final = ("127.0.0.1", "localhost", "::1")


def render(plan: LaunchPlan, folder: Path) -> tuple[Path, ...]:
    """Returns the files, those to look at first."""
    written = [*write_inventory(plan, folder), *_copy_playbook(folder)]
    num_hosts = len(inventory_hosts(plan.deployment))
    written.append(_write(folder / "ansible.cfg", _configuration(num_hosts)))
    return tuple(written)


def write_inventory(plan: LaunchPlan, folder: Path) -> Iterator[Path]:
    """What differs between deployments: inventory.yml, deployment.yml and the files with passwords."""
    folder.mkdir(parents=True, exist_ok=True)
    yield _write(folder / "inventory.yml", inventory_text(plan.deployment))
    yield _write(folder / "deployment.yml", copied_file(plan), mode=0o600)
    passwords = password_texts(plan.deployment)
    for stale in (path for path in folder.glob(f"host_vars/*/{_PASSWORDS}") if path.parent.name not in passwords):
        stale.unlink()
    for host, text in passwords.items():
        yield _write(folder / "host_vars" / host / _PASSWORDS, text, mode=0o600)


def backend_problems(deployment: Deployment) -> Iterator[Problem]:
    """What this backend cannot do with an otherwise good file."""
    hosts = inventory_hosts(deployment)
    machines = machines_of(hosts)
    proxy = deployment.deployment.proxy.host
    if proxy in _ANY_ADDRESS:
        text = f"{proxy}: engines on other hosts cannot join there"
        yield Problem("deployment.proxy.host", text, "write the proxy host's own address")
    for machine in machines:
        if machine.first.address in _LOOPBACK and len(machines) > 1:
            names = ", ".join(host.instance or "proxy" for host in machine.hosts)
            text = f"{machine.first.address} ({names}): means another machine to each of the hosts"
            yield Problem("deployment", text, "write the machine's address in the network of all hosts")
    services = deployment.services
    if deployment.runtime == "docker" and not services.docker_image:
        yield Problem("services.docker_image", "is missing for runtime docker", "write it, or runtime: host")
    if deployment.runtime == "host" and not (services.venv_path or services.code_path):
        text = "is missing for runtime host"
        yield Problem("services.venv_path", text, "write the virtual environment's path there, or a code_path")
    if services.local_code_path and not services.code_path:
        yield Problem("services.code_path", "is missing for local_code_path", "write where the code goes on the hosts")
    for key in ("code_path", "venv_path", "local_code_path", "rank_table_path"):
        value = getattr(services, key)
        if value and not Path(value).is_absolute():
            yield Problem(f"services.{key}", f"{value}: is not an absolute path", "start it with /")


def _copy_playbook(folder: Path) -> Iterator[Path]:
    for source in sorted(PLAYBOOK_FOLDER.rglob("*")):
        if source.is_file():
            target = folder / source.relative_to(PLAYBOOK_FOLDER)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)
            yield target


def _configuration(num_hosts: int) -> str:
    lines = ("[defaults]", f"forks = {num_hosts}", "interpreter_python = auto_silent", "retry_files_enabled = False")
    return "\n".join((*lines, ""))


def _write(path: Path, text: str, mode: int = 0o644) -> Path:
    """Replaced whole, and never open to others for a moment when it is not to be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "w", encoding="utf-8") as file:
        file.write(text)
    temporary.replace(path)
    return path

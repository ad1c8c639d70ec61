"""Which hosts of a deployment file are this machine, and what is wrong where they should be and are not."""

from collections.abc import Callable, Iterator

from omni.deployment.errors import Problem
from omni.deployment.groups import group_settings
from omni.deployment.machine import Machine
from omni.deployment.model import Deployment

_OTHERS = "backend: ansible for processes on other machines"


def is_here(deployment: Deployment, machine: Machine, on: str | None) -> Callable[[str], bool]:
    """Args:
    on: the host of the file that this machine is; None: with backend local all of them, otherwise none.
    """
    if on is not None:
        return on.__eq__
    return machine.is_host if deployment.backend == "local" else lambda _host: False


def host_problems(deployment: Deployment, machine: Machine, on: str | None) -> Iterator[Problem]:
    if on is not None:
        yield from _own_host_problems(deployment, machine, on)
    elif deployment.backend == "local":
        yield from _local_problems(deployment, machine)


def _own_host_problems(deployment: Deployment, machine: Machine, on: str) -> Iterator[Problem]:
    hosts = dict.fromkeys(
        [*(host for g in group_settings(deployment) for host in g.hosts), deployment.deployment.proxy.host]
    )
    if on not in hosts:
        yield Problem("--on", f"{on} is no host of the deployment file", f"write one of {', '.join(hosts)}")
    elif not machine.is_host(on):
        yield Problem("--on or --listen", f"{on} is not this machine", "run it there")


def _local_problems(deployment: Deployment, machine: Machine) -> Iterator[Problem]:
    mend = f"write 127.0.0.1, or {_OTHERS}"
    for group in group_settings(deployment):
        field = f"{group.path}.hosts"
        if others := [host for host in group.hosts if not machine.is_host(host)]:
            yield Problem(field, f"{', '.join(others)}: not this machine", mend)
        elif len(group.hosts) > 1:
            yield Problem(field, f"{', '.join(group.hosts)}: several names for this machine", "write one of them")
    proxy = deployment.deployment.proxy
    if not machine.is_host(proxy.host):
        yield Problem("deployment.proxy.host", f"{proxy.host}: not this machine", mend)

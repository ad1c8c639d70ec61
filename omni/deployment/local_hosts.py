"""What the local backend asks of a deployment: every process runs on this machine."""

from collections.abc import Iterator

from omni.deployment.errors import Problem
from omni.deployment.groups import group_settings
from omni.deployment.machine import Machine
from omni.deployment.model import Deployment
from omni.deployment.translate import LATER_BACKENDS


def host_problems(deployment: Deployment, machine: Machine) -> Iterator[Problem]:
    mend = f"write 127.0.0.1 (backends for other machines, {', '.join(LATER_BACKENDS)}, are not in this version)"
    for group in group_settings(deployment):
        field = f"{group.path}.hosts"
        if others := [host for host in group.hosts if not machine.is_host(host)]:
            yield Problem(field, f"{', '.join(others)}: not this machine", mend)
        elif len(group.hosts) > 1:
            yield Problem(field, f"{', '.join(group.hosts)}: several names for this machine", "write one of them")
    proxy = deployment.deployment.proxy
    if not machine.is_host(proxy.host):
        yield Problem("deployment.proxy.host", f"{proxy.host}: not this machine", mend)

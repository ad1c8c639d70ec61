"""The machine from which a deployment on other hosts is started: its tools, keys and way to the hosts."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from omni.deployment.doctor import network
from omni.deployment.doctor.finding import Finding, ok, problem
from omni.deployment.doctor.tool import find_tool
from omni.deployment.model import Access, Backend, Deployment

# Programs that a backend runs here, each with its mend. Python libraries are among the versions.
_PROGRAMS: Final[Mapping[Backend, Mapping[str, str]]] = {
    "local": {},
    "ansible": {"ssh": "apt install openssh-client"},
    "ray": {},
    "kubernetes": {"kubectl": "install it (https://kubernetes.io/docs/tasks/tools); `omni_cli render` needs none"},
}
_SSHPASS: Final = "sshpass"


def controller_findings(
    deployment: Deployment, hosts: Sequence[str], port: int = network.SSH_PORT
) -> Iterator[Finding]:
    programs = dict(_PROGRAMS[deployment.backend])
    if deployment.backend == "ansible" and any(block.password for block in logins(deployment)):
        programs[_SSHPASS] = "apt install sshpass, which gives ssh the password; or write private_key"
    for name, mend in programs.items():
        tool = find_tool(name)
        yield problem("host", name, "not on the PATH", mend) if tool is None else ok("host", name, str(tool.path))
    if deployment.backend == "ansible":
        yield from network.login_keys(logins(deployment))
        yield from network.ssh_hosts(hosts, port)


def logins(deployment: Deployment) -> list[Access]:
    """Every block of the file that may say how to log in."""
    pools = deployment.deployment
    blocks: list[Access] = [pools.proxy]
    for group in (*pools.prefill.values(), *pools.decode.values(), *pools.mixed.values()):
        blocks += [group, *group.host_overrides.values()]
    return blocks

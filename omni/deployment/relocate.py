"""One group of a deployment at an address that a cluster has given it, rather than at the one that the file names.

Ray and Kubernetes decide where a group runs. It joins the proxies then: their addresses are given too.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from omni.deployment.errors import ConfigError, DeploymentError, Problem, raise_any
from omni.deployment.groups import POOLS, GroupSettings, Pool, group_settings
from omni.deployment.model import Deployment, Group


@dataclass(frozen=True, kw_only=True)
class Relocation:
    """Where one group, or one node of a group that spans several hosts, runs.

    Attributes:
        listen: the address of this node.
        join: HOST:PORT of each proxy's control plane.
        node: which of the group's hosts this is.
        master: the address of node 0; None: this one.
        base_api_port: instead of the file's, where a node has several groups; its other ports follow it.
    """

    role: Pool
    group: str
    listen: str
    join: tuple[str, ...] = ()
    node: int = 0
    master: str | None = None
    base_api_port: int | None = None

    def of(self, deployment: Deployment) -> Deployment:
        """The deployment with this group here and every other group elsewhere.

        Raises:
            DeploymentError: there is no such group or node, the master is not named, or it is not one alone.
        """
        pools = {role: dict(getattr(deployment.deployment, role)) for role in POOLS}
        if self.group not in pools[self.role]:
            names = list(pools[self.role])
            raise DeploymentError(
                f"--group: there is no {self.role} group {self.group!r}; the deployment file has {names}"
            )
        own = pools[self.role][self.group]
        self._check_node(len(own.hosts))
        for group in group_settings(deployment):
            if (group.role, group.name) == (self.role, self.group):
                raise_any(master_problems(group))
        for groups in pools.values():
            groups.update({name: _at(group, _elsewhere(group)) for name, group in groups.items()})
        hosts = list(_elsewhere(own))
        hosts[0] = self.master or hosts[0]
        hosts[self.node] = self.listen
        pools[self.role][self.group] = _at(own, tuple(hosts), self.base_api_port)
        proxy = deployment.deployment.proxy.model_copy(update={"control_port": 0, "other_control_addresses": self.join})
        changes: dict[str, object] = {role: pools[role] for role in POOLS}
        changed = deployment.deployment.model_copy(update={**changes, "proxy": proxy})
        return deployment.model_copy(update={"deployment": changed})

    def _check_node(self, num_nodes: int) -> None:
        problems = []
        if not 0 <= self.node < num_nodes:
            problems.append(Problem("--node", f"{self.node} of {num_nodes}", f"write 0 to {num_nodes - 1}"))
        if self.node > 0 and self.master is None:
            problems.append(Problem("--master", "is missing", "write the address of node 0"))
        if problems:
            raise ConfigError(problems)


def master_problems(group: GroupSettings) -> Iterator[Problem]:
    """A node is told where node 0 is and nothing of the others, so it finds no other rank's first node."""
    if group.data_parallel_size > 1 and any(len(nodes) > 1 for nodes in group.ranks):
        text = f"{group.data_parallel_size} ranks, each over several nodes, which are told the first rank's master only"
        yield Problem(group.field("data_parallel_size"), text, "write 1, and a group for each rank")


def _elsewhere(group: Group) -> tuple[str, ...]:
    """As many hosts, none of them this one."""
    return tuple(f"elsewhere-{index}" for index in range(len(group.hosts)))


def _at(group: Group, hosts: tuple[str, ...], base_api_port: int | None = None) -> Group:
    overrides = group.host_overrides
    moved = {new: overrides[old] for old, new in zip(group.hosts, hosts, strict=True) if old in overrides}
    changes: dict[str, object] = {"hosts": hosts, "host_overrides": moved}
    if base_api_port is not None:
        ports = dict.fromkeys(("master_port", "base_kv_port", "base_event_port"), None)
        changes |= {"base_api_port": base_api_port, **ports}
    return group.model_copy(update=changes)

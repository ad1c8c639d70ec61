"""What one pod of a group computes, and what it asks of the machine that it gets."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from omni.deployment.groups import GroupSettings
from omni.deployment.memory import GIB, KEPT_FREE
from omni.deployment.model import Platform
from omni.deployment.plan_types import ProcessPlan

_MIB = 1 << 20
_SUPERVISOR_BYTES = GIB // 2  # the engine host itself; engines share most of what it has imported
_SHM_BYTES_PER_RANK = GIB  # what vLLM's processes tell one another, and collectives within a host
_CORES_PER_RANK = 2  # beside a device: an api server and an EngineCore; each worker has one more

# The devices that their plugins offer. Other Ascend products have other names: Ascend310P, Ascend910B4...
DEVICE: Mapping[Platform, str] = {"npu": "huawei.com/Ascend910", "cuda": "nvidia.com/gpu"}

Quantities = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class PodNode:
    """One host's part of a group, in the plan; a pod, in Kubernetes."""

    group: GroupSettings
    platform: Platform
    host: str
    processes: tuple[ProcessPlan, ...]  # of the group, on this host
    model_is_known: bool  # else nothing is known of the memory

    @property
    def num_api_servers(self) -> int:
        """0: all its workers belong to ranks whose api server is on another node."""
        return sum(not process.is_headless for process in self.processes)

    @property
    def api_ports(self) -> tuple[int, ...]:
        """Those of the group: a pod has an address of its own, so what the file says of single hosts is not needed."""
        first = self.group.group.base_api_port
        return tuple(range(first, first + self.num_api_servers))

    @cached_property
    def num_workers(self) -> int:
        parts = ((len(nodes), node.host) for nodes in self.group.ranks for node in nodes)
        return sum(self.group.num_workers // num_nodes for num_nodes, host in parts if host == self.host)

    @property
    def shm_bytes(self) -> int:
        """For /dev/shm. The KV cache is not in it: shared memory of ours has no name."""
        return _SHM_BYTES_PER_RANK * len(self.processes)

    def resources(self) -> dict[str, Quantities]:
        """Requests and limits. Memory is limited where the plan knows all of it; cores are not: vLLM takes as many
        threads as the node has cores, and with fewer of them to run on, these would wait for one another."""
        requests, limits = {"cpu": str(self._num_cores)}, {}
        if self.model_is_known:
            requests["memory"] = f"{math.ceil(self._memory_bytes / _MIB)}Mi"
            if self.platform == "cpu" and all(process.kv_bytes for process in self.processes):
                limits["memory"] = requests["memory"]
        if (device := DEVICE.get(self.platform)) is not None:
            limits[device] = requests[device] = str(len(self.group.devices(self.host)) or self.num_workers)
        return {"requests": requests} | ({"limits": limits} if limits else {})

    @property
    def _memory_bytes(self) -> int:
        """So much that the pod, which leaves KEPT_FREE of it alone, has room for what the plan says."""
        engines_bytes = sum(process.memory_bytes for process in self.processes)
        return int((engines_bytes + _SUPERVISOR_BYTES) / (1 - KEPT_FREE))

    @property
    def _num_cores(self) -> int:
        if self.platform != "cpu":
            return _CORES_PER_RANK * len(self.processes) + self.num_workers
        return len({core for process in self.processes for core in process.cpu_cores}) or self.num_workers


def pod_nodes(
    group: GroupSettings, processes: Sequence[ProcessPlan], platform: Platform, *, model_is_known: bool
) -> tuple[PodNode, ...]:
    """One for each host that computes something, in the file's order, the master first."""
    nodes = (
        PodNode(
            group=group,
            platform=platform,
            host=host,
            processes=tuple(process for process in processes if process.host == host),
            model_is_known=model_is_known,
        )
        for host in group.hosts
    )
    return tuple(node for node in nodes if node.processes)

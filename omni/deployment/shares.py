"""Each engine's share of its host: cores, KV memory, devices.

CPU engines share cores and memory (`cores`, `memory`); on devices vLLM measures the memory itself. Of a host other than
this one nothing is known: the shares there are decided by the plan that it makes for itself.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from omni.deployment.cores import Cores, share_cores
from omni.deployment.engine_command import number_of
from omni.deployment.groups import GroupSettings
from omni.deployment.layout import Node, Rank
from omni.deployment.machine import Machine
from omni.deployment.memory import PROXY_BYTES, KvNeed, engine_bytes_without_kv, kv_need, kv_sizes
from omni.deployment.model import Deployment
from omni.deployment.model_info import ModelInfo

CPU_BLOCK_SIZE = 128  # tokens; vLLM's default on a CPU
CPU_MLA_BLOCK_SIZE = 16  # the only one that its CPU kernel for MLA has


@dataclass(frozen=True, kw_only=True)
class EngineShare:
    """What one node of one DP rank gets of its host."""

    group: GroupSettings
    dp_rank: int
    node_rank: int
    nodes: Rank  # all of the DP rank's
    workers: tuple[Cores, ...]  # the cores of each of its workers; empty: decided on the host, or devices
    kv_bytes: int | None  # of its workers; None: decided on the host, or measured on the device
    memory_bytes: int  # host memory
    first_device: int  # how many devices the engines before it on this host have

    @property
    def node(self) -> Node:
        return self.nodes[self.node_rank]

    @property
    def num_workers(self) -> int:
        return self.group.num_workers // len(self.nodes)


def engine_shares(
    deployment: Deployment,
    groups: Sequence[GroupSettings],
    model: ModelInfo,
    machine: Machine,
    dtype: str,
    is_here: Callable[[str], bool],
) -> Iterator[EngineShare]:
    """One for each node of each DP rank, in the file's order.

    Args:
        is_here: whether a host is the machine.
    """
    parts = [
        (group, dp_rank, node_rank, nodes)
        for group in groups
        for dp_rank, nodes in enumerate(group.ranks)
        for node_rank in range(len(nodes))
    ]
    is_cpu = deployment.effective_platform == "cpu"
    sizes = [group.num_workers // len(nodes) for group, _, _, nodes in parts]
    needs = [_part_of(group_kv_need(group, model, dtype), len(nodes)) for group, _, _, nodes in parts]
    own_bytes = [_bytes_without_kv(model, dtype, group.num_workers, len(nodes)) for group, _, _, nodes in parts]
    here = [index for index, (_, _, node_rank, nodes) in enumerate(parts) if is_here(nodes[node_rank].host)]
    kv_bytes: list[int | None] = [need.written_bytes for need in needs]
    cores: list[tuple[Cores, ...]] = [()] * len(parts)
    if is_cpu and here:
        others = [*(own_bytes[index] for index in here), PROXY_BYTES]
        for index, size in zip(here, kv_sizes([needs[i] for i in here], machine.available_bytes, others), strict=True):
            kv_bytes[index] = size
        for index, own in zip(here, share_cores(machine.cores, [sizes[i] for i in here]), strict=True):
            cores[index] = own
    num_devices: Counter[str] = Counter()
    for index, (group, dp_rank, node_rank, nodes) in enumerate(parts):
        host, kv = nodes[node_rank].host, kv_bytes[index]
        weights = model.weight_bytes_as(dtype) // len(nodes)
        yield EngineShare(
            group=group,
            dp_rank=dp_rank,
            node_rank=node_rank,
            nodes=nodes,
            workers=cores[index],
            kv_bytes=kv,
            memory_bytes=own_bytes[index] + (kv or 0) if is_cpu else own_bytes[index] - weights,
            first_device=num_devices[host],
        )
        num_devices[host] += sizes[index]


def group_kv_need(group: GroupSettings, model: ModelInfo, dtype: str) -> KvNeed:
    """Of one whole DP rank."""
    default_block_size = CPU_MLA_BLOCK_SIZE if model.mla_width else CPU_BLOCK_SIZE
    return kv_need(
        model,
        dtype=dtype,
        tp=group.tensor_parallel_size,
        block_size=number_of(group.extra_args, "--block-size") or default_block_size,
        max_model_len=max_model_len(group, model),
        kv_cache_gib=group.kv_cache_gib,
    )


def max_model_len(group: GroupSettings, model: ModelInfo) -> int:
    """A default shrinks to what the model can do; a written value that does not fit is refused elsewhere."""
    return min(group.max_model_len, model.max_position_embeddings or group.max_model_len)


def _part_of(need: KvNeed, num_nodes: int) -> KvNeed:
    written = need.written_bytes
    return replace(
        need,
        block_bytes=need.block_bytes // num_nodes,
        written_bytes=None if written is None else written // num_nodes,
    )


def _bytes_without_kv(model: ModelInfo, dtype: str, num_workers: int, num_nodes: int) -> int:
    whole, weights = engine_bytes_without_kv(model, dtype, num_workers // num_nodes), model.weight_bytes_as(dtype)
    return whole - weights + weights // num_nodes

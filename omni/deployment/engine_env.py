"""The environment of one engine."""

from collections.abc import Iterator, Mapping

from omni.deployment.cores import Cores, omp_binding
from omni.deployment.errors import Problem
from omni.deployment.groups import GroupSettings
from omni.deployment.model import KvConnector, Platform

# Set by the plan: these always, those for one connector. VLLM_CPU_KVCACHE_SPACE would win over the plan's
# --kv-cache-memory-bytes.
_RESERVED = ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE", "ASCEND_RT_VISIBLE_DEVICES")
_RESERVED_FOR: Mapping[KvConnector, tuple[str, ...]] = {
    "omni": (),
    "nixl": ("VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT"),
    "mooncake": ("VLLM_MOONCAKE_BOOTSTRAP_PORT", "VLLM_HOST_IP"),
}


def engine_env(
    group: GroupSettings,
    dp_rank: int,
    *,
    kv_env: Mapping[str, str],
    platform: Platform,
    workers: tuple[Cores, ...],
    first_device: int,
) -> Mapping[str, str]:
    """The user's variables and the plan's.

    vLLM reads VLLM_DP_* too: a dense model would refuse to start with a size above 1, so the api server hides them
    from vLLM unless its command line has --data-parallel-size. They are for the user's own scripts and logs.

    Args:
        kv_env: what the connector reads.
        workers: the cores of each worker, on a CPU.
        first_device: the first GPU that no earlier engine uses, on CUDA.
    """
    count = group.num_workers
    env = {
        "VLLM_DP_SIZE": str(group.data_parallel_size),
        "VLLM_DP_RANK": str(dp_rank),
        "VLLM_DP_RANK_LOCAL": str(dp_rank),  # a group is on one host
        "VLLM_DP_MASTER_IP": group.hosts[0],
        "VLLM_DP_MASTER_PORT": str(group.master_port),
        **kv_env,
    }
    if platform == "cpu":
        env["VLLM_CPU_OMP_THREADS_BIND"] = omp_binding(workers)
    if devices := group.devices(group.hosts[0]):
        env["ASCEND_RT_VISIBLE_DEVICES"] = ",".join(map(str, devices[dp_rank * count : (dp_rank + 1) * count]))
    if platform == "cuda":
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(first_device, first_device + count)))
    return {**env, **group.env}  # the user may choose other GPUs


def env_problems(group: GroupSettings, connector: KvConnector) -> Iterator[Problem]:
    for name in group.env:
        if name in _RESERVED or name in _RESERVED_FOR[connector] or name.startswith("VLLM_DP_"):
            own = group.group.env or {}
            field = f"{group.path}.env" if name in own else f"services.{group.role}.env"
            yield Problem(f"{field}.{name}", "is set by the plan", "delete it")

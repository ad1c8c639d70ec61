"""The environment of one engine."""

from collections.abc import Iterator, Mapping

from omni.deployment.cores import omp_binding
from omni.deployment.errors import Problem
from omni.deployment.groups import GroupSettings
from omni.deployment.model import Deployment, KvConnector, Platform
from omni.deployment.shares import EngineShare

# Set by the plan: these always, those for one connector. VLLM_CPU_KVCACHE_SPACE would win over the plan's
# --kv-cache-memory-bytes.
_RESERVED = (
    "VLLM_CPU_OMP_THREADS_BIND",
    "VLLM_CPU_KVCACHE_SPACE",
    "OMNI_STATE_DIR",
    "ASCEND_RT_VISIBLE_DEVICES",
    "RANK_TABLE_FILE_PATH",
    "GLOBAL_RANK_TABLE_FILE_PATH",
)
_RESERVED_FOR: Mapping[KvConnector, tuple[str, ...]] = {
    "omni": (),
    "nixl": ("VLLM_NIXL_SIDE_CHANNEL_HOST", "VLLM_NIXL_SIDE_CHANNEL_PORT"),
    "mooncake": ("VLLM_MOONCAKE_BOOTSTRAP_PORT", "VLLM_HOST_IP"),
}


def deployment_env(deployment: Deployment) -> dict[str, str]:
    """What every process gets: how to reach the outside, and that the deployment's own hosts are reached directly."""
    proxy = deployment.services.http_proxy
    if not proxy:
        return {}
    pools = deployment.deployment
    groups = [*pools.prefill.values(), *pools.decode.values(), *pools.mixed.values()]
    own = dict.fromkeys(
        ["localhost", "127.0.0.1", pools.proxy.host, *(host for group in groups for host in group.hosts)]
    )
    direct = ",".join(own)
    env = {"http_proxy": proxy, "https_proxy": proxy, "no_proxy": direct}
    return env | {name.upper(): value for name, value in env.items()}


def rank_table_env(deployment: Deployment, group: GroupSettings) -> Iterator[tuple[str, str]]:
    """Where an Ascend engine finds the rank tables of its instance and of the deployment."""
    folder = rank_table_folder(deployment)
    if folder is None:
        return
    yield "RANK_TABLE_FILE_PATH", f"{folder}/{group.role}.{group.name}.json"
    yield "GLOBAL_RANK_TABLE_FILE_PATH", f"{folder}/global.json"
    yield "ROLE", group.role
    yield "PREFILL_POD_NUM", str(len(deployment.deployment.prefill))
    yield "DECODE_POD_NUM", str(len(deployment.deployment.decode))


def rank_table_folder(deployment: Deployment) -> str | None:
    """A folder on every host; None: no tables are made. The Ansible backend makes them, others find them there."""
    if deployment.effective_platform != "npu":
        return None
    written = deployment.services.rank_table_path
    default = f"{deployment.log_folder}/ranktable" if deployment.backend == "ansible" else None
    return written or default


def engine_env(share: EngineShare, *, kv_env: Mapping[str, str], platform: Platform) -> Mapping[str, str]:
    """The user's variables and the plan's.

    vLLM reads VLLM_DP_* too: a dense model would refuse to start with a size above 1, so the api server hides them
    from vLLM unless its command line has --data-parallel-size. They are for the user's own scripts and logs.

    Args:
        kv_env: what the connector reads.
    """
    group, node = share.group, share.node
    env = {
        "VLLM_DP_SIZE": str(group.data_parallel_size),
        "VLLM_DP_RANK": str(share.dp_rank),
        "VLLM_DP_RANK_LOCAL": str(node.index_on_host),
        "VLLM_DP_MASTER_IP": group.hosts[0],
        "VLLM_DP_MASTER_PORT": str(group.master_port),
        **kv_env,
    }
    if len(group.hosts) > 1:
        env["VLLM_HOST_IP"] = node.host
    if platform == "cpu" and share.workers:
        env["VLLM_CPU_OMP_THREADS_BIND"] = omp_binding(share.workers)
    if node.devices:
        env["ASCEND_RT_VISIBLE_DEVICES"] = ",".join(map(str, node.devices))
    if platform == "cuda":
        devices = range(share.first_device, share.first_device + share.num_workers)
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, devices))
    return {**env, **group.env}  # the user may choose other GPUs


def env_problems(group: GroupSettings, connector: KvConnector) -> Iterator[Problem]:
    for name in group.env:
        is_own_address = name == "VLLM_HOST_IP" and len(group.hosts) > 1
        if name in (*_RESERVED, *_RESERVED_FOR[connector]) or name.startswith("VLLM_DP_") or is_own_address:
            own = group.group.env or {}
            field = f"{group.path}.env" if name in own else f"services.{group.role}.env"
            yield Problem(f"{field}.{name}", "is set by the plan", "delete it")

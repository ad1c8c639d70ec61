"""Deployment + model + machine → the launch plan. Pure: equal inputs give equal plans, nothing is looked up."""

from collections.abc import Iterator, Sequence
from pathlib import Path

from omni.deployment.engine_command import EngineCommand
from omni.deployment.engine_env import deployment_env, engine_env, env_problems, rank_table_env
from omni.deployment.errors import Problem, raise_any
from omni.deployment.groups import GroupSettings, group_settings
from omni.deployment.local_hosts import host_problems, is_here
from omni.deployment.machine import Machine
from omni.deployment.memory import GIB, PROXY_BYTES
from omni.deployment.model import Deployment
from omni.deployment.model_info import DTYPE_BYTES, ModelInfo
from omni.deployment.plan_types import LaunchPlan, ProcessPlan
from omni.deployment.ports import control_port
from omni.deployment.proxy_command import control_addresses, proxy_command, proxy_problems
from omni.deployment.shares import EngineShare, engine_shares, group_kv_need, max_model_len
from omni.deployment.switches import switch_problems


def make_plan(
    deployment: Deployment, model: ModelInfo, machine: Machine, *, config_file: Path, on: str | None = None
) -> LaunchPlan:
    """Plans every process of a deployment.

    Args:
        machine: this machine. With backend local all hosts are it, otherwise `on` alone.
        on: the host of the file that this machine is.

    Raises:
        ConfigError: the plan could not work, however free the machine is.
    """
    dtype = _dtype(deployment, model, machine)
    groups = list(group_settings(deployment))
    services, platform = deployment.services, deployment.effective_platform
    problems = [*host_problems(deployment, machine, on), *proxy_problems(deployment.deployment.proxy)]
    for group in groups:
        problems += [*env_problems(group, services.kv_transfer.connector)]
        if model.is_known:
            problems += [*_length_problems(group, model), *_kv_problems(group, model, dtype)]
            problems += [*_head_problems(group, model), *_step_problems(group, model)]
    if model.is_known:
        problems += switch_problems(services, groups, platform, model)
    shares = list(engine_shares(deployment, groups, model, machine, dtype, is_here(deployment, machine, on)))
    commands = [_command(deployment, share, model, dtype) for share in shares]
    for command in commands:
        if command.dp_rank == command.node_rank == 0:  # the ranks of a group differ in nothing a user writes
            problems += command.problems()
    raise_any(dict.fromkeys(problems))  # what a role says wrongly shows once, not once per group
    every_env = deployment_env(deployment)
    engines = [_engine(deployment, share, command, every_env) for share, command in zip(shares, commands, strict=True)]
    return LaunchPlan(
        name=deployment.name,
        config_file=config_file,
        model_path=model.path,
        model_is_known=model.is_known,
        served_model_name=deployment.model_name,
        dtype=dtype,
        connector=services.kv_transfer.connector,
        key_file=services.kv_transfer.key_file,
        mode=services.kv_transfer.mode,
        control_addresses=control_addresses(deployment),
        deployment=deployment,
        processes=(*engines, _proxy(deployment, engines, commands)),
    )


def _dtype(deployment: Deployment, model: ModelInfo, machine: Machine) -> str:
    if deployment.services.dtype != "auto":
        return deployment.services.dtype
    if deployment.effective_platform == "cpu":
        return machine.cpu_dtype()
    return model.stored_dtype if DTYPE_BYTES.get(model.stored_dtype) == 2 else "bfloat16"


def _length_problems(group: GroupSettings, model: ModelInfo) -> Iterator[Problem]:
    limit = model.max_position_embeddings
    if "max_model_len" in group.shared.model_fields_set and limit is not None and group.max_model_len > limit:
        text = f"{group.max_model_len} is more than the model's {limit} tokens"
        yield Problem(f"services.{group.role}.max_model_len", text, f"write at most {limit}, or delete the line")


def _kv_problems(group: GroupSettings, model: ModelInfo, dtype: str) -> Iterator[Problem]:
    need = group_kv_need(group, model, dtype)
    if need.written_bytes is not None and need.written_bytes < need.least_bytes:
        text = (
            f"{group.kv_cache_gib:g} GiB holds less than one sequence of {max_model_len(group, model)} tokens, "
            f"which takes {need.least_bytes / GIB:.3f} GiB"
        )
        mend = f"raise it, delete it, or lower services.{group.role}.max_model_len"
        yield Problem(group.field("kv_cache_gib"), text, mend)


def _head_problems(group: GroupSettings, model: ModelInfo) -> Iterator[Problem]:
    if model.num_heads % group.tensor_parallel_size:
        text = f"{group.tensor_parallel_size} does not divide the model's {model.num_heads} attention heads"
        mend = f"write a number that divides {model.num_heads}"
        yield Problem(group.field("tensor_parallel_size"), text, mend)


def _step_problems(group: GroupSettings, model: ModelInfo) -> Iterator[Problem]:
    """vLLM can spread a DP rank over hosts, and a mixture of experts over DP ranks; both at once it was not seen to."""
    if model.is_moe and group.data_parallel_size > 1 and any(len(nodes) > 1 for nodes in group.ranks):
        text = f"{group.data_parallel_size} ranks in step, each spread over several hosts, are not supported"
        yield Problem(group.field("data_parallel_size"), text, "write 1, or a tensor_parallel_size that a host holds")


def _command(deployment: Deployment, share: EngineShare, model: ModelInfo, dtype: str) -> EngineCommand:
    group, node, services = share.group, share.node, deployment.services
    name = f"{group.role}.{group.name}.rank{share.dp_rank}"
    with_kv_port = group.role in services.kv_transfer.roles_with_port and share.node_rank == 0
    return EngineCommand(
        group=group,
        dp_rank=share.dp_rank,
        node_rank=share.node_rank,
        nodes=share.nodes,
        name=name,
        deployment_name=deployment.name,
        host=node.host,
        port=_port(share, share.node_rank),
        model_path=model.path,
        served_model_name=deployment.model_name,
        dtype=dtype,
        max_model_len=max_model_len(group, model),
        kv_bytes_per_worker=None if share.kv_bytes is None else share.kv_bytes // share.num_workers,
        services=services,
        kv_port=group.base_kv_port(node.host) + node.index_on_host if with_kv_port else None,
        event_port=_event_port(deployment, share),
        platform=deployment.effective_platform,
        is_moe=model.is_moe,
    )


def _engine(
    deployment: Deployment, share: EngineShare, command: EngineCommand, every_env: dict[str, str]
) -> ProcessPlan:
    name = command.name if share.node_rank == 0 else f"{command.name}.node{share.node_rank}"
    own_env = engine_env(share, kv_env=command.kv_env(), platform=deployment.effective_platform)
    return ProcessPlan(
        name=name,
        role=share.group.role,
        group=share.group.name,
        dp_rank=share.dp_rank,
        node_rank=share.node_rank,
        host=command.host,
        port=command.port if share.node_rank == 0 else 0,
        command=command.argv(),
        env={**every_env, **dict(rank_table_env(deployment, share.group)), **own_env},
        log_file=deployment.log_folder / f"{name}.log",
        cpu_cores=tuple(sorted({core for cores in share.workers for core in cores})),
        kv_bytes=share.kv_bytes or 0,
        memory_bytes=share.memory_bytes,
        kv_port=command.kv_port,
        event_port=command.event_port,
        link_address=_link_address(share),
        leader_url=f"http://{share.nodes[0].host}:{_port(share, 0)}" if share.node_rank > 0 else None,
    )


def _port(share: EngineShare, node_rank: int) -> int:
    node = share.nodes[node_rank]
    return share.group.base_api_port(node.host) + node.index_on_host


def _link_address(share: EngineShare) -> str | None:
    first = share.nodes[0].host
    return f"{first}:{share.group.link_port_of(first)}" if len(share.nodes) > 1 else None


def _event_port(deployment: Deployment, share: EngineShare) -> int | None:
    """Two for each P."""
    group = share.group
    if group.role != "prefill" or not deployment.services.prefill.kv_events or share.node_rank > 0:
        return None
    return group.base_event_port(share.node.host) + 2 * share.node.index_on_host


def _proxy(deployment: Deployment, engines: Sequence[ProcessPlan], commands: Sequence[EngineCommand]) -> ProcessPlan:
    proxy = deployment.deployment.proxy
    return ProcessPlan(
        name="proxy",
        role="proxy",
        group="",
        dp_rank=0,
        host=proxy.host,
        port=proxy.listen_port,
        command=proxy_command(deployment, engines, commands),
        env=deployment_env(deployment),
        log_file=deployment.log_folder / "proxy.log",
        cpu_cores=(),
        kv_bytes=0,
        memory_bytes=PROXY_BYTES,
        control_port=control_port(deployment),
        scheme="http" if proxy.tls_certificate_file is None else "https",
    )

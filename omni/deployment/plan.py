"""Deployment + model + machine → the launch plan. Pure: equal inputs give equal plans, nothing is looked up.

CPU engines share cores and memory (`cores`, `memory`); on devices vLLM measures the memory itself.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from omni.deployment.cores import Cores, share_cores
from omni.deployment.engine_command import EngineCommand, number_of
from omni.deployment.engine_env import engine_env, env_problems
from omni.deployment.errors import Problem, raise_any
from omni.deployment.groups import GroupSettings, group_settings
from omni.deployment.local_hosts import host_problems
from omni.deployment.machine import Machine
from omni.deployment.memory import GIB, PROXY_BYTES, KvNeed, engine_bytes_without_kv, kv_need, kv_sizes
from omni.deployment.model import Deployment
from omni.deployment.model_info import DTYPE_BYTES, ModelInfo
from omni.deployment.plan_types import LaunchPlan, ProcessPlan
from omni.deployment.ports import control_port
from omni.deployment.proxy_command import control_addresses, proxy_command, proxy_problems

CPU_BLOCK_SIZE = 128  # tokens; vLLM's default on a CPU
CPU_MLA_BLOCK_SIZE = 16  # the only one that its CPU kernel for MLA has


@dataclass(frozen=True, kw_only=True)
class _Rank:
    """One engine, with its share of the machine."""

    group: GroupSettings
    dp_rank: int
    workers: tuple[Cores, ...]  # the cores of each TP rank
    kv_bytes: int | None  # of all TP ranks; None: vLLM measures the device
    memory_bytes: int
    first_device: int


def make_plan(deployment: Deployment, model: ModelInfo, machine: Machine, *, config_file: Path) -> LaunchPlan:
    """Plans every process of a deployment on this machine.

    Raises:
        ConfigError: the plan could not work, however free the machine is.
    """
    dtype = _dtype(deployment, model, machine)
    groups = list(group_settings(deployment))
    connector = deployment.services.kv_transfer.connector
    problems = [*host_problems(deployment, machine), *proxy_problems(deployment.deployment.proxy)]
    for group in groups:
        problems += [
            *_length_problems(group, model),
            *_kv_problems(group, model, dtype),
            *env_problems(group, connector),
        ]
    ranks = list(_ranks(deployment, groups, model, machine, dtype))
    commands = [_command(deployment, rank, model, dtype) for rank in ranks]
    for command in commands:
        if command.dp_rank == 0:  # the ranks of a group differ in nothing a user writes
            problems += command.problems()
    raise_any(dict.fromkeys(problems))  # what a role says wrongly shows once, not once per group
    engines = [_engine(deployment, rank, command) for rank, command in zip(ranks, commands, strict=True)]
    return LaunchPlan(
        name=deployment.name,
        config_file=config_file,
        model_path=model.path,
        served_model_name=deployment.model_name,
        dtype=dtype,
        connector=connector,
        key_file=deployment.services.kv_transfer.key_file,
        mode=deployment.services.kv_transfer.mode,
        control_addresses=control_addresses(deployment),
        processes=(*engines, _proxy(deployment, engines, commands)),
    )


def _dtype(deployment: Deployment, model: ModelInfo, machine: Machine) -> str:
    if deployment.services.dtype != "auto":
        return deployment.services.dtype
    if deployment.effective_platform == "cpu":
        return machine.cpu_dtype()
    return model.stored_dtype if DTYPE_BYTES.get(model.stored_dtype) == 2 else "bfloat16"


def _max_model_len(group: GroupSettings, model: ModelInfo) -> int:
    """A default shrinks to what the model can do; a written value that does not fit is `_length_problems`' matter."""
    return min(group.max_model_len, model.max_position_embeddings or group.max_model_len)


def _length_problems(group: GroupSettings, model: ModelInfo) -> Iterator[Problem]:
    limit = model.max_position_embeddings
    if "max_model_len" in group.shared.model_fields_set and limit is not None and group.max_model_len > limit:
        text = f"{group.max_model_len} is more than the model's {limit} tokens"
        yield Problem(f"services.{group.role}.max_model_len", text, f"write at most {limit}, or delete the line")


def _kv_need(group: GroupSettings, model: ModelInfo, dtype: str) -> KvNeed:
    default_block_size = CPU_MLA_BLOCK_SIZE if model.mla_width else CPU_BLOCK_SIZE
    return kv_need(
        model,
        dtype=dtype,
        tp=group.tensor_parallel_size,
        block_size=number_of(group.extra_args, "--block-size") or default_block_size,
        max_model_len=_max_model_len(group, model),
        kv_cache_gib=group.kv_cache_gib,
    )


def _kv_problems(group: GroupSettings, model: ModelInfo, dtype: str) -> Iterator[Problem]:
    need = _kv_need(group, model, dtype)
    if need.written_bytes is not None and need.written_bytes < need.least_bytes:
        text = (
            f"{group.kv_cache_gib:g} GiB holds less than one sequence of {_max_model_len(group, model)} tokens, "
            f"which takes {need.least_bytes / GIB:.3f} GiB"
        )
        mend = f"raise it, delete it, or lower services.{group.role}.max_model_len"
        yield Problem(group.field("kv_cache_gib"), text, mend)


def _ranks(
    deployment: Deployment, groups: Sequence[GroupSettings], model: ModelInfo, machine: Machine, dtype: str
) -> Iterator[_Rank]:
    is_cpu = deployment.effective_platform == "cpu"
    engines = [(group, dp_rank) for group in groups for dp_rank in range(group.data_parallel_size)]
    num_workers = [group.num_workers for group, _ in engines]
    needs = [_kv_need(group, model, dtype) for group, _ in engines]
    own_bytes = [engine_bytes_without_kv(model, dtype, count) for count in num_workers]
    if is_cpu:
        kv_bytes: list[int | None] = [*kv_sizes(needs, machine.available_bytes, [*own_bytes, PROXY_BYTES])]
        cores = share_cores(machine.cores, num_workers)
    else:
        kv_bytes, cores = [need.written_bytes for need in needs], [()] * len(engines)
    for index, (group, dp_rank) in enumerate(engines):
        kv = kv_bytes[index]
        yield _Rank(
            group=group,
            dp_rank=dp_rank,
            workers=cores[index],
            kv_bytes=kv,
            memory_bytes=own_bytes[index] + (kv or 0) if is_cpu else own_bytes[index] - model.weight_bytes_as(dtype),
            first_device=sum(num_workers[:index]),
        )


def _command(deployment: Deployment, rank: _Rank, model: ModelInfo, dtype: str) -> EngineCommand:
    group, host, kv_transfer = rank.group, rank.group.hosts[0], deployment.services.kv_transfer
    return EngineCommand(
        group=group,
        dp_rank=rank.dp_rank,
        name=f"{group.role}.{group.name}.rank{rank.dp_rank}",
        deployment_name=deployment.name,
        host=host,
        port=group.base_api_port(host) + rank.dp_rank,
        model_path=model.path,
        served_model_name=deployment.model_name,
        dtype=dtype,
        max_model_len=_max_model_len(group, model),
        kv_bytes_per_worker=None if rank.kv_bytes is None else rank.kv_bytes // group.num_workers,
        kv_transfer=kv_transfer,
        kv_port=group.base_kv_port(host) + rank.dp_rank if group.role in kv_transfer.roles_with_port else None,
        event_port=_event_port(deployment, rank),
        is_cpu=deployment.effective_platform == "cpu",
        is_moe=model.is_moe,
    )


def _engine(deployment: Deployment, rank: _Rank, command: EngineCommand) -> ProcessPlan:
    return ProcessPlan(
        name=command.name,
        role=rank.group.role,
        group=rank.group.name,
        dp_rank=rank.dp_rank,
        host=command.host,
        port=command.port,
        command=command.argv(),
        env=engine_env(
            rank.group,
            rank.dp_rank,
            kv_env=command.kv_env(),
            platform=deployment.effective_platform,
            workers=rank.workers,
            first_device=rank.first_device,
        ),
        log_file=deployment.log_folder / f"{command.name}.log",
        cpu_cores=tuple(sorted({core for cores in rank.workers for core in cores})),
        kv_bytes=rank.kv_bytes or 0,
        memory_bytes=rank.memory_bytes,
        kv_port=command.kv_port,
        event_port=command.event_port,
    )


def _event_port(deployment: Deployment, rank: _Rank) -> int | None:
    """Two for each P."""
    group = rank.group
    if group.role != "prefill" or not deployment.services.prefill.kv_events:
        return None
    return group.base_event_port(group.hosts[0]) + 2 * rank.dp_rank


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
        env={},
        log_file=deployment.log_folder / "proxy.log",
        cpu_cores=(),
        kv_bytes=0,
        memory_bytes=PROXY_BYTES,
        control_port=control_port(deployment),
    )

"""Deployment + model + machine → the launch plan. Pure: equal inputs give equal plans, nothing is looked up.

CPU engines share cores and memory (`cores`, `memory`); on devices vLLM measures the memory itself.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from omni.deployment.cores import Cores, omp_binding, share_cores
from omni.deployment.engine_command import EngineCommand, block_size_of
from omni.deployment.errors import Problem, raise_any
from omni.deployment.groups import GroupSettings, group_settings
from omni.deployment.local import host_problems
from omni.deployment.machine import Machine
from omni.deployment.memory import GIB, PROXY_BYTES, KvNeed, engine_bytes_without_kv, kv_need, kv_sizes
from omni.deployment.model import Deployment
from omni.deployment.model_info import DTYPE_BYTES, ModelInfo
from omni.deployment.plan_types import LaunchPlan, ProcessPlan

CPU_BLOCK_SIZE = 128  # tokens; vLLM's default on a CPU
CPU_MLA_BLOCK_SIZE = 16  # the only one its CPU kernel for MLA has

# Set by the plan, or by vLLM's old way to size the KV cache, which would win over the plan's.
_RESERVED_ENV = ("VLLM_CPU_OMP_THREADS_BIND", "VLLM_CPU_KVCACHE_SPACE")


@dataclass(frozen=True)
class _Rank:
    """One engine to be planned."""

    group: GroupSettings
    dp_rank: int
    need: KvNeed
    max_model_len: int

    @property
    def name(self) -> str:
        return f"{self.group.role}.{self.group.name}.rank{self.dp_rank}"


def make_plan(deployment: Deployment, model: ModelInfo, machine: Machine, *, config_file: Path) -> LaunchPlan:
    """Plans every process of a deployment on this machine.

    Raises:
        ConfigError: the plan would not work, whatever the state of the machine.
    """
    dtype = _dtype(deployment, model, machine)
    groups = list(group_settings(deployment))
    raise_any(host_problems(deployment, machine))
    raise_any(problem for group in groups for problem in _group_problems(group, model))
    ranks = [rank for group in groups for rank in _ranks(group, model, dtype)]
    raise_any(problem for rank in ranks if rank.dp_rank == 0 for problem in _kv_problems(rank))
    engines = list(_engines(deployment, model, machine, dtype, ranks))
    return LaunchPlan(
        name=deployment.name,
        config_file=config_file,
        model_path=model.path,
        served_model_name=deployment.model_name,
        dtype=dtype,
        processes=(*engines, _proxy(deployment, engines)),
    )


def _dtype(deployment: Deployment, model: ModelInfo, machine: Machine) -> str:
    if deployment.services.dtype != "auto":
        return deployment.services.dtype
    if deployment.effective_platform == "cpu":
        return machine.cpu_dtype()
    return model.stored_dtype if DTYPE_BYTES.get(model.stored_dtype) == 2 else "bfloat16"


def _group_problems(group: GroupSettings, model: ModelInfo) -> Iterator[Problem]:
    limit = model.max_position_embeddings
    if "max_model_len" in group.shared.model_fields_set and limit is not None and group.max_model_len > limit:
        text = f"{group.max_model_len} is more than the model's {limit} tokens"
        yield Problem(f"services.{group.role}.max_model_len", text, f"write at most {limit}, or delete the line")
    for name in group.env:
        if name in _RESERVED_ENV or name.startswith("VLLM_DP_"):
            yield Problem(group.field("env"), f"{name} is set by the plan", "delete it")


def _ranks(group: GroupSettings, model: ModelInfo, dtype: str) -> Iterator[_Rank]:
    length = min(group.max_model_len, model.max_position_embeddings or group.max_model_len)
    default_block_size = CPU_MLA_BLOCK_SIZE if model.mla_width else CPU_BLOCK_SIZE
    need = kv_need(
        model,
        dtype=dtype,
        tp=group.tensor_parallel_size,
        block_size=block_size_of(group.extra_args) or default_block_size,
        max_model_len=length,
        kv_cache_gib=group.kv_cache_gib,
    )
    for dp_rank in range(group.data_parallel_size):
        yield _Rank(group, dp_rank, need, length)


def _kv_problems(rank: _Rank) -> Iterator[Problem]:
    need = rank.need
    if need.written_bytes is not None and need.written_bytes < need.least_bytes:
        text = (
            f"{need.written_bytes / GIB:.3f} GiB holds less than one sequence of {rank.max_model_len} tokens, "
            f"which takes {need.least_bytes / GIB:.3f} GiB"
        )
        mend = f"raise it, delete it, or lower services.{rank.group.role}.max_model_len"
        yield Problem(rank.group.field("kv_cache_gib"), text, mend)


def _engines(
    deployment: Deployment, model: ModelInfo, machine: Machine, dtype: str, ranks: Sequence[_Rank]
) -> Iterator[ProcessPlan]:
    is_cpu = deployment.effective_platform == "cpu"
    tp_sizes = [rank.group.tensor_parallel_size for rank in ranks]
    fixed_bytes = [engine_bytes_without_kv(model, dtype, tp) for tp in tp_sizes]
    kv_bytes = kv_sizes([rank.need for rank in ranks], machine.available_bytes, [*fixed_bytes, PROXY_BYTES])
    first_device = 0
    problems: list[Problem] = []
    planned: list[ProcessPlan] = []
    for rank, cores, own_bytes, kv in zip(ranks, share_cores(machine.cores, tp_sizes), fixed_bytes, kv_bytes, strict=True):
        ...
    raise_any(problems)
    yield from planned

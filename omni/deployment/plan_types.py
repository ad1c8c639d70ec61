"""The launch plan's types: what runs, where, and with which share of the machine.

A plan is plain data. `omni.deployment.plan` computes it from a deployment file; backends and supervisors read it.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from omni.deployment.model import KvConnector

Role = Literal["prefill", "decode", "proxy"]


@dataclass(frozen=True, kw_only=True)
class ProcessPlan:
    """One api server with its EngineCore and workers (one DP rank), or the proxy."""

    name: str  # "prefill.group1.rank0"; "proxy"
    role: Role
    group: str  # "group1"; "" for the proxy
    dp_rank: int  # 0 for the proxy
    host: str
    port: int
    command: tuple[str, ...]  # argv, the interpreter first
    env: Mapping[str, str]  # added to the inherited environment
    log_file: Path
    cpu_cores: tuple[int, ...]  # empty: wherever the system puts it
    kv_bytes: int  # KV cache, bytes; 0 for the proxy
    memory_bytes: int  # all memory the process is expected to need, bytes
    event_port: int | None = None  # where it publishes its KV events; repeats them on the next one; None: nowhere
    kv_port: int | None = None  # where it is asked for KV; None: nowhere, or on a port of the system's choice
    control_port: int | None = None  # the proxy's, where engines join it; None: nowhere

    @property
    def arguments(self) -> tuple[str, ...]:
        """What follows `python -m MODULE` in the command."""
        return self.command[3:]

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    @property
    def ports(self) -> tuple[int, ...]:
        """All that it listens on."""
        events = () if self.event_port is None else (self.event_port, self.event_port + 1)
        return (self.port, *(port for port in (self.kv_port, self.control_port) if port is not None), *events)

    @property
    def kv_address(self) -> str | None:
        return None if self.kv_port is None else f"{self.host}:{self.kv_port}"

    @property
    def event_address(self) -> str | None:
        return None if self.event_port is None else f"{self.host}:{self.event_port}"


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """Every process of a deployment, the proxy last."""

    name: str  # the deployment's name: the file's stem
    config_file: Path
    model_path: Path
    served_model_name: str
    dtype: str
    connector: KvConnector
    key_file: Path | None  # as written; None: this user's own
    processes: tuple[ProcessPlan, ...]
    mode: str = "pull"  # how KV gets from P to D, with our connector
    control_addresses: tuple[str, ...] = ()  # HOST:PORT of each proxy's control plane: the engines join there

    def instance(self, role: Role, group: str) -> tuple[ProcessPlan, ...]:
        """The DP ranks of one prefill or decode group, in rank order."""
        return tuple(p for p in self.processes if (p.role, p.group) == (role, group))

    @property
    def proxy(self) -> ProcessPlan:
        return self.processes[-1]

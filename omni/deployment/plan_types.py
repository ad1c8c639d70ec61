"""The launch plan's types: what runs, where, and with which share of the machine.

A plan is plain data. `omni.deployment.plan` computes it from a deployment file; backends and supervisors read it.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from omni.deployment.model import Deployment, KvConnector

Role = Literal["prefill", "decode", "mixed", "proxy"]
Part = Literal["engines", "proxy"]


@dataclass(frozen=True, kw_only=True)
class ProcessPlan:
    """One api server with its EngineCore and workers (one DP rank), another node's workers of it, or the proxy."""

    name: str  # "prefill.group1.rank0"; "prefill.group1.rank0.node1"; "proxy"
    role: Role
    group: str  # "group1"; "" for the proxy
    dp_rank: int  # 0 for the proxy
    host: str
    port: int  # 0 for workers on a further node: they are asked for nothing
    command: tuple[str, ...]  # argv, the interpreter first
    env: Mapping[str, str]  # added to the inherited environment
    log_file: Path
    cpu_cores: tuple[int, ...]  # empty: wherever the system puts it
    kv_bytes: int  # KV cache, bytes; 0 for the proxy, and where the host itself decides
    memory_bytes: int  # all memory the process is expected to need, bytes
    node_rank: int = 0  # which of the hosts that a DP rank spans
    link_address: str | None = None  # HOST:PORT where those hosts hold on to one another; None: it has one host
    scheme: str = "http"
    leader_url: str | None = None  # of a further node: the api server of its DP rank
    event_port: int | None = None  # where it publishes its KV events; repeats them on the next one; None: nowhere
    kv_port: int | None = None  # where it is asked for KV; None: nowhere, or on a port of the system's choice
    control_port: int | None = None  # the proxy's, where engines join it; None: nowhere

    @property
    def is_headless(self) -> bool:
        """Whether it is a further node of a DP rank: workers without an api server."""
        return self.node_rank > 0

    @property
    def arguments(self) -> tuple[str, ...]:
        """What follows `python -m MODULE` in the command."""
        return self.command[3:]

    @property
    def url(self) -> str:
        return f"{self.scheme}://{self.host}:{self.port}"

    @property
    def ports(self) -> tuple[int, ...]:
        """All that it listens on."""
        if self.is_headless:
            return ()
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
    """Every process of a deployment, the proxy last; or those of them that one host runs."""

    name: str  # the deployment's name: the file's stem
    config_file: Path
    model_path: Path
    served_model_name: str
    dtype: str
    connector: KvConnector
    key_file: Path | None  # as written; None: this user's own
    processes: tuple[ProcessPlan, ...]
    deployment: Deployment  # what it was planned from
    model_is_known: bool = True  # False: the model is on other hosts alone, which plan with it once more
    mode: str = "pull"  # how KV gets from P to D, with our connector
    proxy_elsewhere: ProcessPlan | None = None  # where another host, or another launcher here, runs it
    run_name: str = ""  # under which this part runs; "": the deployment's name
    control_addresses: tuple[str, ...] = ()  # HOST:PORT of each proxy's control plane: the engines join there

    def instance(self, role: Role, group: str) -> tuple[ProcessPlan, ...]:
        """What one group consists of, in rank order."""
        return tuple(p for p in self.processes if (p.role, p.group) == (role, group))

    @property
    def hosts(self) -> tuple[str, ...]:
        """Each host once, in the plan's order."""
        return tuple(dict.fromkeys(process.host for process in self.processes))

    def on(self, host: str) -> tuple[ProcessPlan, ...]:
        return tuple(process for process in self.processes if process.host == host)

    def part(self, on: str, kind: Part | None = None) -> "LaunchPlan":
        """What `on` runs: its engines, the proxy, or (None) both. Each kind has a run of its own name."""
        roles = {"engines": ("prefill", "decode", "mixed"), "proxy": ("proxy",), None: get_args(Role)}[kind]
        return replace(
            self,
            processes=tuple(process for process in self.on(on) if process.role in roles),
            proxy_elsewhere=self.proxy,
            run_name=self.name if kind is None else f"{self.name}.{kind}",
        )

    @property
    def engines(self) -> tuple[ProcessPlan, ...]:
        return tuple(process for process in self.processes if process.role != "proxy")

    @property
    def proxy(self) -> ProcessPlan:
        proxy = next((process for process in self.processes if process.role == "proxy"), self.proxy_elsewhere)
        assert proxy is not None, "a plan without a proxy"
        return proxy

    @property
    def runs_proxy(self) -> bool:
        return any(process.role == "proxy" for process in self.processes)

    @property
    def folder_name(self) -> str:
        """Of its run folder."""
        return self.run_name or self.name

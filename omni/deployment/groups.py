"""A group with every default filled in: what the plan and the rules across fields work with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from omni.deployment.layout import LayoutError, Rank, lay_out
from omni.deployment.model import (
    EVENT_PORT_OFFSET,
    KV_PORT_OFFSET,
    MASTER_PORT_OFFSET,
    Deployment,
    EngineOptions,
    Group,
    HostOverride,
)

Pool = Literal["prefill", "decode", "mixed"]
_NO_OVERRIDE = HostOverride()
POOLS: tuple[Pool, ...] = ("prefill", "decode", "mixed")


@dataclass(frozen=True, kw_only=True)
class GroupSettings:
    """One prefill, decode or mixed group."""

    role: Pool
    name: str  # "group1"
    group: Group  # as written
    shared: EngineOptions  # services.prefill, .decode or .mixed
    max_model_len: int  # as written, or the default
    use_devices: bool  # elsewhere than on an NPU ascend_rt_visible_devices counts for nothing

    @property
    def path(self) -> str:
        return f"deployment.{self.role}.{self.name}"

    def field(self, key: str) -> str:
        """Where the value that counts was, or would be, written."""
        on_group = getattr(self.group, key, None) is not None
        return f"{self.path}.{key}" if on_group else f"services.{self.role}.{key}"

    @property
    def size_field(self) -> str:
        """The first size that is written, else the group itself."""
        sizes = ("data_parallel_size", "tensor_parallel_size", "pipeline_parallel_size")
        blocks = (self.group, self.shared)
        written = (key for key in sizes if any(getattr(block, key) is not None for block in blocks))
        return next(map(self.field, written), self.path)

    @property
    def hosts(self) -> tuple[str, ...]:
        return self.group.hosts

    @property
    def tensor_parallel_size(self) -> int:
        written = self.group.tensor_parallel_size or self.shared.tensor_parallel_size
        if written or self.role == "decode":
            return written or 1
        num_ranks = self._written_data_parallel_size or 1
        return max(1, self.num_devices // (num_ranks * self.pipeline_parallel_size))

    @property
    def pipeline_parallel_size(self) -> int:
        return self.group.pipeline_parallel_size or self.shared.pipeline_parallel_size or 1

    @property
    def num_workers(self) -> int:
        """Of one DP rank: each has a device, or cores, of its own."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """As written, else as many ranks as the hosts' devices allow: whole ones on each, or spread over several."""
        if self._written_data_parallel_size:
            return self._written_data_parallel_size
        on_one_host = sum(len(self.devices(host)) // self.num_workers for host in self.hosts)
        return on_one_host or max(1, self.num_devices // self.num_workers)

    @property
    def _written_data_parallel_size(self) -> int | None:
        return self.group.data_parallel_size or self.shared.data_parallel_size

    @cached_property
    def num_devices(self) -> int:
        return sum(len(self.devices(host)) for host in self.hosts)

    @property
    def extra_args(self) -> tuple[str, ...]:
        own = self.group.extra_args
        return own if own is not None else self.shared.extra_args or ()

    @property
    def env(self) -> Mapping[str, str]:
        return {**(self.shared.env or {}), **(self.group.env or {})}

    @property
    def kv_cache_gib(self) -> float | None:
        return self.group.kv_cache_gib or self.shared.kv_cache_gib

    def override(self, host: str) -> HostOverride:
        return self.group.host_overrides.get(host, _NO_OVERRIDE)

    def devices(self, host: str) -> tuple[int, ...]:
        if not self.use_devices:
            return ()
        return self.override(host).ascend_rt_visible_devices or self.group.ascend_rt_visible_devices or ()

    def base_api_port(self, host: str) -> int:
        return self.override(host).base_api_port or self.group.base_api_port

    def base_kv_port(self, host: str) -> int:
        written = self.override(host).base_kv_port or self.group.base_kv_port
        return written or self.base_api_port(host) + KV_PORT_OFFSET

    def base_event_port(self, host: str) -> int:
        written = self.override(host).base_event_port or self.group.base_event_port
        return written or self.base_api_port(host) + EVENT_PORT_OFFSET

    @property
    def master_port(self) -> int:
        return self.master_port_of(self.hosts[0])

    def master_port_of(self, host: str) -> int:
        written = self.override(host).master_port or self.group.master_port
        return written or self.base_api_port(host) + MASTER_PORT_OFFSET

    def link_port_of(self, host: str) -> int:
        """Where the hosts of a DP rank that spans several hold on to one another."""
        return self.master_port_of(host) + 1

    @cached_property
    def ranks(self) -> tuple[Rank, ...]:
        """Where each DP rank is computed. Empty when that cannot be: see `layout_problem`."""
        try:
            return self._lay_out()
        except LayoutError:
            return ()

    @property
    def layout_problem(self) -> str | None:
        try:
            self._lay_out()
        except LayoutError as error:
            return str(error)
        return None

    def ranks_on_host(self, host: str) -> int:
        """How many api servers the host runs."""
        return sum(nodes[0].host == host for nodes in self.ranks)

    def _lay_out(self) -> tuple[Rank, ...]:
        devices = {host: self.devices(host) for host in self.hosts}
        return lay_out(self.hosts, devices, num_ranks=self.data_parallel_size, num_workers=self.num_workers)


def group_settings(deployment: Deployment) -> Iterator[GroupSettings]:
    """Every group: prefill, decode, mixed, each in the file's order."""
    use_devices = deployment.effective_platform == "npu"
    for role in POOLS:
        shared = getattr(deployment.services, role)
        for name, group in getattr(deployment.deployment, role).items():
            yield GroupSettings(
                role=role,
                name=name,
                group=group,
                shared=shared,
                max_model_len=_max_model_len(deployment, role),
                use_devices=use_devices,
            )


def _max_model_len(deployment: Deployment, role: Pool) -> int:
    """The proxy gives a request to D or to a mixed group, so what is not written of the latter is as of the former."""
    shared = getattr(deployment.services, role)
    if role == "mixed" and deployment.deployment.decode and "max_model_len" not in shared.model_fields_set:
        shared = deployment.services.decode
    number: int = shared.max_model_len
    return number

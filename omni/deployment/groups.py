"""A group with every default filled in: what the plan and the rules across fields work with."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from omni.deployment.model import (
    EVENT_PORT_OFFSET,
    KV_PORT_OFFSET,
    MASTER_PORT_OFFSET,
    Deployment,
    EngineOptions,
    Group,
    HostOverride,
)

Pool = Literal["prefill", "decode"]


@dataclass(frozen=True, kw_only=True)
class GroupSettings:
    """One prefill or decode group."""

    role: Pool
    name: str  # "group1"
    group: Group  # as written
    shared: EngineOptions  # services.prefill or services.decode
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
    def hosts(self) -> tuple[str, ...]:
        return self.group.hosts

    @property
    def tensor_parallel_size(self) -> int:
        return self.group.tensor_parallel_size or self.shared.tensor_parallel_size or 1

    @property
    def pipeline_parallel_size(self) -> int:
        return self.group.pipeline_parallel_size or self.shared.pipeline_parallel_size or 1

    @property
    def num_workers(self) -> int:
        """Of one DP rank: each has a device, or cores, of its own."""
        return self.tensor_parallel_size * self.pipeline_parallel_size

    @property
    def data_parallel_size(self) -> int:
        """As written, else as many ranks as the devices of all hosts allow, else 1."""
        written = self.group.data_parallel_size or self.shared.data_parallel_size
        return written or max(1, self.num_devices // self.num_workers)

    @property
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
        return self.group.host_overrides.get(host, HostOverride())

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
        written = self.override(self.hosts[0]).master_port or self.group.master_port
        return written or self.base_api_port(self.hosts[0]) + MASTER_PORT_OFFSET

    def ranks_on_host(self, host: str) -> int:
        """How many api servers the host runs: the DP ranks in equal shares, the first hosts one more."""
        share, more = divmod(self.data_parallel_size, len(self.hosts))
        return share + (self.hosts.index(host) < more)


def group_settings(deployment: Deployment) -> Iterator[GroupSettings]:
    """Every group, prefill first, in the file's order."""
    pools, services = deployment.deployment, deployment.services
    use_devices = deployment.effective_platform == "npu"
    for name, group in pools.prefill.items():
        yield GroupSettings(
            role="prefill",
            name=name,
            group=group,
            shared=services.prefill,
            max_model_len=services.prefill.max_model_len,
            use_devices=use_devices,
        )
    for name, group in pools.decode.items():
        yield GroupSettings(
            role="decode",
            name=name,
            group=group,
            shared=services.decode,
            max_model_len=services.decode.max_model_len,
            use_devices=use_devices,
        )

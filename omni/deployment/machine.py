"""What the machine that plans and runs has to offer."""

import os
import socket
from dataclasses import dataclass
from pathlib import Path

import psutil

# Processors with none of these compute bfloat16 by emulation, several times slower than float32.
_BFLOAT16_FLAGS = frozenset({"avx512_bf16", "amx_bf16", "bf16"})  # the last is Arm's


@dataclass(frozen=True, kw_only=True)
class Machine:
    cores: tuple[int, ...]  # the ones this process may use
    available_bytes: int  # memory that can be taken without swapping
    total_bytes: int
    cpu_flags: frozenset[str]
    addresses: frozenset[str]  # host names and IPv4 addresses that mean this machine

    def cpu_dtype(self) -> str:
        """The dtype in which this processor is fast."""
        return "bfloat16" if self.cpu_flags & _BFLOAT16_FLAGS else "float32"

    def is_host(self, host: str) -> bool:
        """Whether a process can listen on `host` here."""
        return host.startswith("127.") or host in self.addresses


def this_machine() -> Machine:
    memory = psutil.virtual_memory()
    limit = _cgroup_available_bytes(Path("/sys/fs/cgroup"))
    return Machine(
        cores=tuple(sorted(os.sched_getaffinity(0))),
        available_bytes=memory.available if limit is None else min(memory.available, limit),
        total_bytes=memory.total,
        cpu_flags=_cpu_flags(Path("/proc/cpuinfo")),
        addresses=_addresses(),
    )


def _cgroup_available_bytes(root: Path) -> int | None:
    """What a container's own limit leaves, of which psutil knows nothing; None without a limit.

    File cache counts as available: the kernel gives it up first.
    """
    for limit_file, usage_file, cache_key in (
        ("memory.max", "memory.current", "inactive_file"),  # cgroup v2
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes", "total_inactive_file"),  # v1
    ):
        try:
            limit = int((root / limit_file).read_text())
            used = int((root / usage_file).read_text())
            stat = (root / usage_file).with_name("memory.stat").read_text()
        except (OSError, ValueError):  # another version, or no limit: "max"
            continue
        cache = {key: int(value) for key, value in map(str.split, stat.splitlines())}
        return max(0, limit - used + cache.get(cache_key, 0))
    return None


def _cpu_flags(cpuinfo: Path) -> frozenset[str]:
    for line in cpuinfo.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):  # x86, Arm
            return frozenset(value.split())
    return frozenset()


def _addresses() -> frozenset[str]:
    own = {a.address for card in psutil.net_if_addrs().values() for a in card if a.family == socket.AF_INET}
    return frozenset({"localhost", "0.0.0.0", socket.gethostname(), *own})


def interface_of(address: str) -> str | None:
    """The network interface that has this IPv4 address; None: there is none, or it is a name."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(own.family == socket.AF_INET and own.address == address for own in addresses):
            return name
    return None

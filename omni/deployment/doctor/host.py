"""The host itself: processor, memory, limits, and what moving KV between its processes needs."""

import ctypes
import os
import resource
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from omni.deployment.doctor.finding import Finding, ok, problem, warning
from omni.deployment.machine import Machine
from omni.deployment.memory import GIB

_LEAST_FILES: Final = 1024
_GOOD_FILES: Final = 16384  # the proxy has up to four for each request in flight
_GOOD_SHM_BYTES: Final = 1 * GIB
_LEAST_MEMORY_BYTES: Final = 2 * GIB  # one engine without a model: omni.deployment.memory
_GOOD_MEMORY_BYTES: Final = 8 * GIB  # configs/demo.yaml
_VECTOR_FLAGS: Final = frozenset({"avx2", "avx512f", "asimd"})  # vLLM's CPU kernels are built for these
_YAMA: Final = Path("/proc/sys/kernel/yama/ptrace_scope")
_NOBODY_BUT_ROOT: Final = 2  # kernel: Documentation/admin-guide/LSM/Yama


def cpu(machine: Machine, *, engines_on_cpu: bool) -> Finding:
    found = f"{len(machine.cores)} cores, computes fast in {machine.cpu_dtype()}"
    if machine.cpu_flags & _VECTOR_FLAGS or not engines_on_cpu:
        return ok("host", "processor", found)
    mend = "use a processor with AVX2 or AVX-512 (x86) or Advanced SIMD (Arm), or another platform"
    return problem("host", "processor", f"{found}; it has none of {', '.join(sorted(_VECTOR_FLAGS))}", mend)


def numa_library(name: str = "libnuma.so.1") -> Finding:
    """Without it vLLM's CPU kernels do not load, of which it says so only minutes later, in other words."""
    try:
        ctypes.CDLL(name)
    except OSError:
        return problem(
            "host", "libnuma", f"{name} cannot be loaded; vLLM's CPU kernels need it", "apt-get install libnuma1"
        )
    return ok("host", "libnuma", name)


def memory(machine: Machine) -> Finding:
    """Without a deployment file nobody knows what is needed; with one, the plan's own check speaks."""
    found = f"{machine.available_bytes / GIB:.1f} GiB of {machine.total_bytes / GIB:.1f} GiB available"
    if machine.available_bytes < _LEAST_MEMORY_BYTES:
        mend = "end other programs, or raise the container's limit: an engine takes 2 GiB before any model"
        return problem("memory", "memory", found, mend)
    if machine.available_bytes < _GOOD_MEMORY_BYTES:
        return warning("memory", "memory", found, "configs/demo.yaml wants 8 GiB: end other programs")
    return ok("memory", "memory", found)


def open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    found = f"{_limit(soft)} of at most {_limit(hard)}"
    # The proxy raises its own limit to the hard one.
    if hard != resource.RLIM_INFINITY and hard < _LEAST_FILES:
        return problem("host", "open files", found, f"as root, `ulimit -Hn {_GOOD_FILES}`, or `nofile` in limits.conf")
    if hard != resource.RLIM_INFINITY and hard < _GOOD_FILES:
        mend = f"as root, `ulimit -Hn {_GOOD_FILES}`; it bounds the proxy's connections"
        return warning("host", "open files", found, mend)
    return ok("host", "open files", found)


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:  # noqa: S108 (it is only looked at)
    """vLLM's processes exchange messages through files there. KV caches are elsewhere, in unnamed memory."""
    try:
        size_bytes, free_bytes = _sizes(folder)
    except OSError as error:
        return problem("host", str(folder), f"not there ({error.strerror})", f"mount -t tmpfs -o size=1g shm {folder}")
    if not os.access(folder, os.W_OK | os.X_OK):
        return problem("host", str(folder), "this user cannot write there", f"chmod 1777 {folder}")
    found = f"{free_bytes / GIB:.2f} GiB of {size_bytes / GIB:.2f} GiB free"
    if free_bytes < _GOOD_SHM_BYTES:
        mend = f"mount -o remount,size=16g {folder}; in docker: --shm-size 16g"
        return warning("host", str(folder), f"{found}; engines of several workers exchange messages there", mend)
    return ok("host", str(folder), found)


def reading_memory(yama: Path = _YAMA) -> Finding:
    """Whether one process may read another's memory: how KV moves where it is in no shared memory.

    A prefill engine lets others read it, which is enough up to Yama's scope 1.
    """
    subject = "process_vm_readv"
    if (error := _probe_process_vm()) is not None:
        mend = "in docker: --cap-add SYS_PTRACE, or a seccomp profile that allows it; else KV goes over TCP"
        return warning("host", subject, f"refused ({error})", mend)
    try:
        scope = int(yama.read_text())
    except (OSError, ValueError):  # a kernel without Yama
        scope = 0
    if scope > _NOBODY_BUT_ROOT or (scope == _NOBODY_BUT_ROOT and os.geteuid() != 0):
        mend = "sysctl kernel.yama.ptrace_scope=1; else KV goes over TCP where it is in no shared memory"
        return warning("host", subject, f"{yama} says {scope}", mend)
    return ok("host", subject, "allowed")


def disk(folder: Path, area_of: str = "log_path") -> Finding:
    """Whether logs can be written to `folder`, which is made when a deployment starts."""
    subject = f"{area_of} {folder}"
    present = next(parent for parent in (folder, *folder.parents) if parent.exists())
    if not present.is_dir():
        return problem("disk", subject, f"{present} is not a folder", "write another services.log_path")
    if not os.access(present, os.W_OK | os.X_OK):
        return problem("disk", subject, f"this user cannot write to {present}", f"chown {os.geteuid()} {present}")
    free_bytes = shutil.disk_usage(present).free
    found = f"{free_bytes / GIB:.1f} GiB free"
    if free_bytes < GIB // 10:
        return problem("disk", subject, found, f"make room: du -xh {present} | sort -h | tail")
    if free_bytes < GIB:
        return warning("disk", subject, found, f"make room: du -xh {present} | sort -h | tail")
    return ok("disk", subject, found)


def host_findings(machine: Machine, *, engines_on_cpu: bool) -> Iterator[Finding]:
    yield cpu(machine, engines_on_cpu=engines_on_cpu)
    if engines_on_cpu:
        yield numa_library()
    yield open_files()
    yield shared_memory()
    yield reading_memory()


def _limit(number: int) -> str:
    return "unlimited" if number == resource.RLIM_INFINITY else str(number)


def _sizes(folder: Path) -> tuple[int, int]:
    """Bytes: all, and free for this user."""
    status = os.statvfs(folder)
    return status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize


class _IoVector(ctypes.Structure):
    _fields_ = (("base", ctypes.c_void_p), ("length", ctypes.c_size_t))


def _probe_process_vm() -> str | None:
    """Reads this process's own bytes by the call; what stopped it, or None. A container's filter stops it for all."""
    libc = ctypes.CDLL(None, use_errno=True)
    source, target = ctypes.create_string_buffer(b"omni", 4), ctypes.create_string_buffer(4)
    here = _IoVector(ctypes.addressof(target), 4)
    there = _IoVector(ctypes.addressof(source), 4)
    one, none = ctypes.c_ulong(1), ctypes.c_ulong(0)
    num_bytes = libc.process_vm_readv(os.getpid(), ctypes.byref(here), one, ctypes.byref(there), one, none)
    if num_bytes == 4 and target.raw == b"omni":
        return None
    return os.strerror(ctypes.get_errno())

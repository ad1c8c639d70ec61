"""What a process of ours does about its parent, its signals and what it leaves in shared memory."""

import contextlib
import ctypes
import os
import signal
from multiprocessing import shared_memory
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 (where Linux keeps POSIX shared memory)
_PARENT_VARIABLE = "OMNI_PARENT_PID"


def die_with_parent(parent_pid: int) -> None:
    """Have the kernel kill this process when its parent ends, even by SIGKILL.

    Args:
        parent_pid: the parent's pid, read before the fork: a parent that died meanwhile is noticed.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent_pid:
        os.kill(os.getpid(), signal.SIGKILL)


def parent_environment() -> dict[str, str]:
    """Environment for a program that shall end with this process; it calls `obey_parent` first thing."""
    return {_PARENT_VARIABLE: str(os.getpid())}


def obey_parent() -> None:
    """End with the process that started this one, if that one asked for it."""
    parent_pid = os.environ.pop(_PARENT_VARIABLE, None)
    if parent_pid is not None:
        die_with_parent(int(parent_pid))


def start_ticks(pid: int) -> int | None:
    """When a process began, in clock ticks since boot, which no change of the clock moves; None unless it lives.

    Tells the process from a later one with its pid.
    """
    try:
        stat = Path("/proc", str(pid), "stat").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, *numbers = stat.rpartition(")")[2].split()  # the program's name may hold anything
    return None if state in ("Z", "X") else int(numbers[18])


def name_shared_memory() -> None:
    """Have all that this process and its forks create in /dev/shm bear its pid, so that it can be found afterwards."""
    prefix = f"/{_prefix(os.getpid())}"
    shared_memory._SHM_NAME_PREFIX = prefix  # type: ignore[attr-defined]
    shared_memory._SHM_SAFE_NAME_LENGTH = len(prefix) + 12  # type: ignore[attr-defined]


def remove_shared_memory(pid: int | None = None) -> None:
    """Remove what a dead process left in /dev/shm; without a pid, what any dead process of ours left."""
    for path in _SHARED_MEMORY.glob(f"{_prefix('*' if pid is None else pid)}*"):
        owner = path.name.split("_")[2]
        if owner.isdigit() and (pid is not None or not Path("/proc", owner).exists()):
            with contextlib.suppress(PermissionError):  # another user's
                path.unlink(missing_ok=True)


def _prefix(pid: int | str) -> str:
    """Containers may share /dev/shm while each numbers its own processes: the number of that namespace comes first."""
    return f"omni_{os.stat('/proc/self/ns/pid').st_ino}_{pid}_"

"""What a process of ours does about its parent, and about what it leaves behind when it is killed."""

import contextlib
import ctypes
import os
import shutil
import signal
import tempfile
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


def mark_traces() -> None:
    """Have what this process and its forks leave in /dev/shm and the temporary folder be found by its pid.

    vLLM's files in /dev/shm have random names. Those that Python makes get a prefix here. Those of tensor-parallel
    workers are named after a file in the temporary folder, so that becomes a folder of this process's own.

    Raises:
        FileExistsError: another user has made that folder.
    """
    remove_traces(os.getpid())  # of an earlier process with this pid
    prefix = _prefix(os.getpid())
    shared_memory._SHM_NAME_PREFIX = f"/{prefix}"  # type: ignore[attr-defined]
    shared_memory._SHM_SAFE_NAME_LENGTH = len(prefix) + 13  # type: ignore[attr-defined]
    folder = Path(tempfile.gettempdir(), prefix)
    folder.mkdir(mode=0o700)
    tempfile.tempdir = str(folder)


def remove_traces(pid: int | None = None) -> None:
    """Remove what a dead process left; without a pid, what any dead process of ours left."""
    pattern = f"{_prefix('*' if pid is None else pid)}*"
    for path in [*_SHARED_MEMORY.glob(pattern), *Path(tempfile.gettempdir()).glob(pattern)]:
        owner = path.name.split("_")[2]
        if owner.isdigit() and (pid is not None or not Path("/proc", owner).exists()):
            with contextlib.suppress(PermissionError):  # another user's
                _remove(path)


def _remove(path: Path) -> None:
    if not path.is_dir():
        path.unlink(missing_ok=True)
        return
    for store in path.glob("vllm_dist_*"):
        for shared in _SHARED_MEMORY.glob(f"{store.name}-*"):
            shared.unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def _prefix(pid: int | str) -> str:
    """Containers may share /dev/shm while each numbers its own processes: the number of that namespace comes first."""
    return f"omni_{os.stat('/proc/self/ns/pid').st_ino}_{pid}_"

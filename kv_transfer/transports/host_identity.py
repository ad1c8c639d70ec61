"""Which processes can look at each other's memory, and which process a pid means. Linux; elsewhere nobody is told apart
and nothing is offered."""

import os
from pathlib import Path


def host_id() -> str | None:
    """Equal in two processes if a pid means the same to both and they belong to one user; None without Linux's /proc.

    Boot and pid namespace, not a host name: containers of one machine have their own pids, and names may be equal.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return None
    return f"{boot}/{namespace}/{os.getuid()}"


def start_time(pid: int) -> int | None:
    """When the process started, in the kernel's ticks since boot; None if there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except (OSError, OverflowError):
        return None
    after_name = stat.rpartition(b")")[2].split()  # the name, in parentheses, may hold spaces and parentheses
    return int(after_name[19])

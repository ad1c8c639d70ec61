"""Ports and cores of a node, shared out among the actors there, which know nothing of one another.

A claim is a bound abstract Unix socket. The kernel lets one process at a time have a name, in this network namespace,
and takes it back when that process ends: there is no file to be left behind.
"""

import os
import socket
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from omni.deployment.errors import DeploymentError

_PORT_STEP: Final = 10
_NUM_TRIES: Final = 500


class Claims:
    """What one actor has; until it ends, or `release`."""

    def __init__(self) -> None:
        self._held: list[socket.socket] = []

    def ports(self, first: int, ports_from: Callable[[int], Sequence[int]]) -> int:
        """The first base port at or above `first` of which all ports are free; they are claimed.

        Args:
            ports_from: all ports that a base port stands for.

        Raises:
            DeploymentError: there is none.
        """
        for base in range(first, first + _NUM_TRIES * _PORT_STEP, _PORT_STEP):
            ports = ports_from(base)
            if max(ports) > 65535:
                break
            if all(map(_is_free, ports)) and self._take(f"port/{port}" for port in ports):
                return base
        raise DeploymentError(f"no ports from {first} on are free: end what listens there, or lower base_api_port")

    def cores(self, number: int) -> tuple[int, ...]:
        """So many cores that no other actor has; none, if there are not enough: then the system shares them out."""
        taken: list[int] = []
        for core in sorted(os.sched_getaffinity(0)):
            if len(taken) < number and self._take([f"core/{core}"]):
                taken.append(core)
        return tuple(taken) if len(taken) == number else ()

    def release(self) -> None:
        for held in self._held:
            held.close()
        self._held.clear()

    def _take(self, names: Iterable[str]) -> bool:
        """All of them or none."""
        new: list[socket.socket] = []
        for name in names:
            claim = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
            new.append(claim)
            try:
                claim.bind(f"\0omni/ray/{name}")
            except OSError:
                for one in new:
                    one.close()
                return False
        self._held += new
        return True


def _is_free(port: int) -> bool:
    try:
        socket.create_server(("", port)).close()
    except OSError:
        return False
    return True

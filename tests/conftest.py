"""Fixtures for all tests."""

import os
import random
import socket
from collections.abc import Callable

import pytest

# Some tests fork this process, as the engine host does, which never has gRPC loaded. Here other tests have loaded it,
# and it would start its threads anew in the child, on descriptors that the child has closed.
os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"


@pytest.fixture(scope="session")
def free_ports() -> Callable[[int], int]:
    """A function that finds N consecutive free TCP ports and returns the first."""

    def find(count: int) -> int:
        for _ in range(1000):
            first = random.randrange(20000, 32000 - count)
            if all(_is_free(port) for port in range(first, first + count)):
                return first
        raise RuntimeError(f"no {count} consecutive ports are free")

    return find


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True

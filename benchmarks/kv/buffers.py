"""Memory that P serves and D reads into."""

import mmap
import os
from typing import Literal

import numpy as np
import numpy.typing as npt

from benchmarks.kv.cases import BUFFER_BYTES

MemoryKind = Literal["anonymous", "memfd"]


class Buffer:
    """BUFFER_BYTES of memory, every page of which has been touched."""

    def __init__(self, memory: npt.NDArray[np.uint8]) -> None:
        self.bytes = memory
        self.bytes[:] = 0
        self.address = int(memory.ctypes.data)
        self.num_bytes = BUFFER_BYTES

    def fill(self) -> None:
        """With the bytes that P serves: no two blocks are alike."""
        self.bytes[:] = np.random.default_rng(1).integers(0, 256, BUFFER_BYTES, np.uint8)


def new_buffer(kind: MemoryKind) -> Buffer:
    """Private anonymous memory, or an unnamed file in shared memory."""
    if kind == "anonymous":
        return Buffer(np.frombuffer(mmap.mmap(-1, BUFFER_BYTES, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8))
    fd = os.memfd_create("bench_kv")
    try:
        os.ftruncate(fd, BUFFER_BYTES)
        return Buffer(np.frombuffer(mmap.mmap(fd, BUFFER_BYTES), np.uint8))
    finally:
        os.close(fd)

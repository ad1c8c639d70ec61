"""Memory that other processes can map, as a file without a name: it is gone with the last process that holds it."""

import ctypes
import errno
import fcntl
import mmap
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np

_PIECE_BYTES = 64 << 20
_MAX_THREADS = 8
_SEAL_FUTURE_WRITE = 0x10  # of Linux 5.1; Python 3.11 does not name these three
_POPULATE_READ = 22  # of Linux 5.14
_POPULATE_WRITE = 23

_libc = ctypes.CDLL(None, use_errno=True)  # releases the interpreter's lock
_libc.madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
_libc.memset.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t)


@dataclass(frozen=True)
class SharedFile:
    """An open file and where it is mapped. Nobody else can write into it or make it shorter."""

    fd: int
    address: int
    num_bytes: int

    def close(self) -> None:
        """Nobody can open it any more; its memory lasts until nobody has it mapped."""
        os.close(self.fd)


def new_shared_file(num_bytes: int) -> tuple[SharedFile, mmap.mmap]:
    """A file of zeros, all of it in memory already, and its only mapping for writing, which is the caller's to keep.

    Raises:
        MemoryError: there is not so much memory.
        OSError: this system has no such files.
    """
    with _closed_on_error(os.memfd_create("omni-kv-cache", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)) as fd:
        try:
            os.ftruncate(fd, num_bytes)
            mapping = mmap.mmap(fd, num_bytes)
            seals = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _SEAL_FUTURE_WRITE
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals | fcntl.F_SEAL_SEAL)
            _fill(address_of(mapping), num_bytes)
        except OSError as error:
            if error.errno in (errno.ENOMEM, errno.EFBIG):
                raise MemoryError(f"{num_bytes} bytes of shared memory: {error.strerror}") from None
            raise
    return SharedFile(fd, address_of(mapping), num_bytes), mapping


def address_of(mapping: mmap.mmap) -> int:
    return int(np.frombuffer(mapping, np.uint8).ctypes.data)


def map_pages(address: int, num_bytes: int) -> None:
    """Have a mapping's pages at hand before they are read. Where that fails, the first read does it."""
    _libc.madvise(address, num_bytes, _POPULATE_READ)


def _fill(address: int, num_bytes: int) -> None:
    """Take the memory now: a lack of it shows at the start, and no request waits for pages.

    In several threads: in one, the kernel clears some 2 GB a second.
    """
    _libc.madvise(address, num_bytes, mmap.MADV_HUGEPAGE)  # a hint, which most systems ignore for files

    def fill(offset: int) -> None:
        size = min(_PIECE_BYTES, num_bytes - offset)
        if _libc.madvise(address + offset, size, _POPULATE_WRITE) == 0:
            return
        code = ctypes.get_errno()
        if code != errno.EINVAL:
            raise OSError(code, os.strerror(code))
        _libc.memset(address + offset, 0, size)  # before Linux 5.14

    with ThreadPoolExecutor(min(_MAX_THREADS, len(os.sched_getaffinity(0)))) as threads:
        list(threads.map(fill, range(0, num_bytes, _PIECE_BYTES)))


@contextmanager
def _closed_on_error(fd: int) -> Iterator[int]:
    try:
        yield fd
    except BaseException:
        os.close(fd)
        raise

"""Unnamed files, and what the kernel refuses to do to them."""

import errno
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from kv_transfer.memory import shared_file
from kv_transfer.memory.shared_file import address_of, new_shared_file
from kv_transfer.protocol import Offer, TcpOffer
from tests.kv_transfer.rank_peers import num_open_files
from tests.kv_transfer.transports.same_host import num_mapped, prefill_process

NUM_BYTES = (3 << 20) + 77


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    num_files, num_files_mapped = num_open_files(), num_mapped()
    yield
    assert num_mapped() == num_files_mapped
    assert num_open_files() <= num_files


def test_zeros_that_lie_in_memory_already() -> None:
    file, mapping = new_shared_file(NUM_BYTES)
    assert os.fstat(file.fd).st_size == len(mapping) == file.num_bytes == NUM_BYTES
    assert os.fstat(file.fd).st_blocks * 512 >= NUM_BYTES
    assert not os.get_inheritable(file.fd)
    array = np.frombuffer(mapping, np.uint8)
    assert array.ctypes.data == file.address
    assert not array.any()
    array[-1] = 5
    assert os.pread(file.fd, 1, NUM_BYTES - 1) == b"\x05"
    del array
    file.close()
    mapping.close()


def test_pages_are_taken_before_linux_5_14_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_file, "_POPULATE_WRITE", 9999)
    file, mapping = new_shared_file(NUM_BYTES)
    assert os.fstat(file.fd).st_blocks * 512 >= NUM_BYTES
    file.close()
    mapping.close()


def test_nobody_else_can_write_or_cut_it() -> None:
    file, mapping = new_shared_file(NUM_BYTES)
    for refused in (
        lambda: os.ftruncate(file.fd, 4096),
        lambda: os.ftruncate(file.fd, 2 * NUM_BYTES),
        lambda: os.pwrite(file.fd, b"x", 0),
        lambda: mmap.mmap(file.fd, NUM_BYTES),
    ):
        with pytest.raises(PermissionError):
            refused()
    mmap.mmap(file.fd, NUM_BYTES, prot=mmap.PROT_READ).close()
    mapping[0] = 7
    file.close()
    mapping.close()


def test_too_little_memory() -> None:
    for too_much in (1 << 50, (1 << 62) + 4096):
        with pytest.raises(MemoryError, match=f"{too_much} bytes of shared memory"):
            new_shared_file(too_much)


def test_a_system_that_refuses(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object) -> None:
        raise OSError(errno.EINVAL, "no seals")

    monkeypatch.setattr(shared_file.fcntl, "fcntl", refuse)
    with pytest.raises(OSError, match="no seals"):
        new_shared_file(NUM_BYTES)


def test_it_has_no_name_anywhere() -> None:
    def hold() -> Iterator[Offer | None]:
        _held = new_shared_file(NUM_BYTES)
        yield TcpOffer()

    with prefill_process(hold) as (process, _):
        (fd,) = [fd for fd in Path(f"/proc/{process.pid}/fd").iterdir() if "memfd:omni" in os.readlink(fd)][:1]
        file = fd.stat()
        assert file.st_nlink == 0
        mounted = {line.split()[2] for line in Path("/proc/self/mountinfo").read_text().splitlines()}
        assert f"{os.major(file.st_dev)}:{os.minor(file.st_dev)}" not in mounted


def test_the_address_is_that_of_the_mapping() -> None:
    with mmap.mmap(-1, 4096) as mapping:
        mapping[:3] = b"abc"
        assert shared_file.ctypes.string_at(address_of(mapping), 3) == b"abc"

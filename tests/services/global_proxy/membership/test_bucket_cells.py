"""All workers call a bucket by the same number, whoever saw it first."""

import os
import subprocess
import sys
from collections.abc import Iterator

import pytest

from services.global_proxy.membership import bucket_cells
from services.global_proxy.membership.bucket_cells import NUM_BUCKETS, BucketCells
from services.global_proxy.membership.load_table import LoadTable


@pytest.fixture
def table() -> Iterator[LoadTable]:
    table = LoadTable.create(num_workers=3, num_slots=2)
    yield table
    table.close()


def cells_of(table: LoadTable, worker: int = 0) -> BucketCells:
    cells = table.writer(worker).buckets
    assert cells is not None
    return cells


def write(cells: BucketCells, name: bytes, value: float) -> None:
    """In this worker's first cell of a bucket."""
    bucket = cells.of(name)
    assert bucket is not None
    bucket[cells.worker] = value


def read(cells: BucketCells, name: bytes) -> list[float] | None:
    bucket = cells.of(name)
    return None if bucket is None else list(bucket)


def test_one_worker_needs_none() -> None:
    table = LoadTable.create(num_slots=2)
    assert table.writer(0).buckets is None
    assert os.fstat(table.fd).st_size < 4096
    table.close()


def test_what_one_writes_all_read(table: LoadTable) -> None:
    for worker, name in ((0, b"a"), (1, b"b"), (2, b"a"), (0, b"b")):
        write(cells_of(table, worker), name, worker + 1.0)
    again = LoadTable(table.fd)  # as in another process
    for view in (table, again):
        assert read(cells_of(view, 1), b"a") == [1.0, 0.0, 3.0, 0.0, 0.0, 0.0]
        assert read(cells_of(view, 2), b"b") == [1.0, 2.0, 0.0, 0.0, 0.0, 0.0]
        assert read(cells_of(view), b"c") == [0.0] * 6


def test_a_dead_workers_cells_stay_and_nothing_else_is_touched(table: LoadTable) -> None:
    write(cells_of(table, 1), b"a", 5.0)
    writer = table.writer(1)
    writer.add(0, 2, 30)
    table.clear_worker(1)
    assert table.requests(0) == 0
    assert read(cells_of(table), b"a") == [0.0, 5.0, 0.0, 0.0, 0.0, 0.0]


def test_there_is_an_end_to_them(table: LoadTable) -> None:
    write(cells_of(table), b"first", 1.0)
    size = os.fstat(table.fd).st_size
    os.pwritev(table.fd, [os.urandom(8 * (NUM_BUCKETS - 2))], 0, os.RWF_APPEND)
    write(cells_of(table, 1), b"last", 2.0)
    assert [read(cells_of(table), b"more"), read(cells_of(table), b"and more")] == [None, None]
    assert os.fstat(table.fd).st_size == size + 8 * (NUM_BUCKETS - 1), "nor does the list grow"
    assert read(cells_of(table), b"last") == [0.0, 2.0, 0.0, 0.0, 0.0, 0.0]
    assert read(cells_of(table), b"first") == [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]


def test_a_name_across_two_others_is_none(table: LoadTable, monkeypatch: pytest.MonkeyPatch) -> None:
    hashes = {b"a": b"ABCDEFGH", b"b": b"IJKLMNOP", b"c": b"EFGHIJKL"}

    class Hash:
        def __init__(self, name: bytes, digest_size: int) -> None:
            self._name = name

        def digest(self) -> bytes:
            return hashes[self._name]

    monkeypatch.setattr(bucket_cells, "blake2b", Hash)
    cells = cells_of(table)
    for number, name in enumerate(hashes):
        write(cells, name, float(number + 1))
    assert [(read(cells, name) or [])[0] for name in hashes] == [1.0, 2.0, 3.0]


# Names many buckets, in an order of its own, and adds 1 to its cell of each.
NAMER = """
import random, sys
from services.global_proxy.membership.load_table import LoadTable
fd, worker, num_names = map(int, sys.argv[1:])
cells = LoadTable(fd).writer(worker).buckets
names = [b"%d" % number for number in range(num_names)]
random.Random(worker).shuffle(names)
print("ready", flush=True)
sys.stdin.readline()
for name in names:
    cells.of(name)[worker] += 1
"""


def test_processes_that_name_them_at_once(table: LoadTable) -> None:
    num_names = 2000
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", NAMER, *map(str, (table.fd, worker, num_names))],
            pass_fds=(table.fd,),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        for worker in range(3)
    ]
    try:
        for process in processes:
            assert process.stdout is not None
            assert process.stdout.readline() == b"ready\n"
        for process in processes:
            assert process.stdin is not None
            process.stdin.write(b"go\n")
            process.stdin.flush()
        for process in processes:
            process.communicate(timeout=60)
        assert [process.returncode for process in processes] == [0, 0, 0]
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    cells = cells_of(table)
    seen = [read(cells, b"%d" % number) for number in range(num_names)]
    assert all(bucket == [1.0, 1.0, 1.0, 0.0, 0.0, 0.0] for bucket in seen)

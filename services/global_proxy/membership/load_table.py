"""How loaded each instance is, over all workers: shared memory that everybody reads and each cell of which one process
writes. So there are no locks, and a count is exact: what a worker adds, it adds to a cell of its own.

The memory has no name. It is made before the workers, which inherit it (`fd`), and goes with the last of them.

    header   magic, num_workers, num_slots
    requests workers x slots        in flight, sent by this worker                       written by that worker
    tokens   workers x slots        of these requests                                    written by that worker
    leases   workers x slots        prompts whose KV this P keeps for a D to read        written by that worker
    totals   workers x 6            this worker's requests in flight and queued, its     written by that worker
                                    connections, and its choices of each role
    verdicts (workers + 1) x slots  the latest that this worker says of an instance      written by that worker; the
                                                                                         last row by the registry
    reports  slots x 5              what an instance says of itself                      written by the registry
    buckets  65536 x 2 x workers    rate limits, if there are several workers: see `bucket_cells`

Cells are 64-bit integers, or floating-point numbers where they are buckets', at multiples of 8 bytes, which our
processors (x86-64, AArch64) load and store whole.
A verdict is one cell: its time in milliseconds in the high bits, for how long the instance is to be passed over in the
low ones. So the newest of all workers is their maximum, and any worker may speak of any instance.
"""

import mmap
import os
import struct
import time
from collections.abc import Callable
from typing import Final, Self

from services.global_proxy.membership.bucket_cells import BucketCells, num_bucket_cells
from services.global_proxy.membership.load_writer import TURN_COLUMNS, VerdictWriter, Writer, down_until_s
from services.global_proxy.membership.member import LoadReport, Role

__all__ = ["DEFAULT_NUM_SLOTS", "LoadTable", "VerdictWriter", "Writer"]

DEFAULT_NUM_SLOTS: Final = 1024
_MAGIC: Final = 0x6F6D6E695F6C7431
_HEADER_CELLS: Final = 8
_CELL_BYTES: Final = 8
_REPORT_CELLS: Final = 5
_TOTAL_CELLS: Final = 6


class LoadTable:
    """The shared table, seen from any process.

    Attributes:
        fd: the memory; a worker process that inherits it makes its own table of it.
        num_workers: rows; a single process has one.
        num_slots: how many instances there can be at once.
    """

    def __init__(self, fd: int, now_s: Callable[[], float] = time.monotonic) -> None:
        """The table in memory that was inherited; see `create` for a new one. Raises ValueError: it is no table."""
        self.fd = fd
        with mmap.mmap(fd, _HEADER_CELLS * _CELL_BYTES) as header:
            magic, self.num_workers, self.num_slots, *_ = memoryview(header).cast("q").tolist()
        if magic != _MAGIC:
            raise ValueError(f"file descriptor {fd} is no load table: start workers by their parent only")
        self._now_s = now_s
        cells = memoryview(mmap.mmap(fd, _num_cells(self.num_workers, self.num_slots) * _CELL_BYTES)).cast("q")
        self._lay_out(cells)

    @classmethod
    def create(
        cls, num_workers: int = 1, num_slots: int = DEFAULT_NUM_SLOTS, now_s: Callable[[], float] = time.monotonic
    ) -> Self:
        """A new table, all zero.

        Raises:
            ValueError: a number is below 1.
        """
        for name, number in (("num_workers", num_workers), ("num_slots", num_slots)):
            if number < 1:
                raise ValueError(f"{name}: must be 1 or more, got {number}")
        fd = os.memfd_create("omni_load_table")
        try:
            os.ftruncate(fd, _num_cells(num_workers, num_slots) * _CELL_BYTES)
            os.pwrite(fd, struct.pack("=3q", _MAGIC, num_workers, num_slots), 0)
            return cls(fd, now_s)
        except BaseException:
            os.close(fd)
            raise

    def _lay_out(self, cells: memoryview) -> None:
        workers, slots = self.num_workers, self.num_slots
        rest = cells[_HEADER_CELLS:]

        def take(num_rows: int, num_columns: int) -> tuple[memoryview, ...]:
            nonlocal rest
            rows = tuple(rest[row * num_columns : (row + 1) * num_columns] for row in range(num_rows))
            rest = rest[num_rows * num_columns :]
            return rows

        self._requests = take(workers, slots)
        self._tokens = take(workers, slots)
        self._leases = take(workers, slots)
        self._totals = take(workers, _TOTAL_CELLS)
        self._verdicts = take(workers + 1, slots)
        self._reports = take(slots, _REPORT_CELLS)
        self._buckets = rest
        self._only_requests = self._requests[0] if workers == 1 else None
        self._only_tokens = self._tokens[0] if workers == 1 else None

    def writer(self, worker: int) -> Writer:
        """For worker `worker`, counted from 0, and its process alone."""
        assert 0 <= worker < self.num_workers, f"worker {worker} of {self.num_workers}"
        return Writer(
            self._requests[worker],
            self._tokens[worker],
            self._leases[worker],
            self._totals[worker],
            self._verdicts[worker],
            self._now_s,
            self._bucket_cells(worker),
        )

    def _bucket_cells(self, worker: int) -> BucketCells | None:
        if self.num_workers == 1:
            return None
        names_at = _num_cells(self.num_workers, self.num_slots) * _CELL_BYTES
        return BucketCells(self._buckets.cast("B").cast("d"), self.num_workers, worker, self.fd, names_at)

    def requests(self, slot: int) -> int:
        """Requests in flight at an instance."""
        if self._only_requests is not None:
            count: int = self._only_requests[slot]
            return count
        total = 0
        for row in self._requests:
            total += row[slot]
        return total

    def tokens(self, slot: int) -> int:
        """Tokens of the requests in flight at an instance."""
        if self._only_tokens is not None:
            count: int = self._only_tokens[slot]
            return count
        total = 0
        for row in self._tokens:
            total += row[slot]
        return total

    def leases(self, slot: int) -> int:
        """Prompts whose KV an instance keeps for others to read."""
        return sum(row[slot] for row in self._leases)

    def num_in_flight(self) -> int:
        """Over all workers. Several that add after reading it can pass a limit by one request each."""
        return sum(row[0] for row in self._totals)

    def num_queued(self) -> int:
        return sum(row[1] for row in self._totals)

    def turns(self, role: Role) -> int:
        """How often an instance of this role has been chosen in turn."""
        column = TURN_COLUMNS[role]
        return sum(row[column] for row in self._totals)

    def is_ahead(self, worker: int) -> bool:
        """Whether this worker has more connections than some other: it should leave the next one to that for a moment.

        Only for a moment: the other may be dead, and then has none.
        """
        return self._totals[worker][2] > min(row[2] for row in self._totals)

    def down_until_s(self, slot: int) -> float:
        """Until when the newest verdict has an instance passed over, on the monotonic clock; 0: it is up."""
        newest = 0
        for row in self._verdicts:
            verdict = row[slot]
            if verdict > newest:
                newest = verdict
        return down_until_s(newest)

    def is_down(self, slot: int) -> bool:
        """Whether it is to be passed over now."""
        until_s = self.down_until_s(slot)
        return until_s != 0.0 and self._now_s() < until_s

    def report(self, slot: int) -> LoadReport | None:
        """The latest that the instance has said; None: nothing yet. Two fields may be of two successive reports."""
        running, waiting, used, total, at_ns = self._reports[slot]
        return LoadReport(running, waiting, used, total, at_ns / 1e9) if at_ns else None

    def close(self) -> None:
        """Close `fd`: no worker can be started any more. The table goes on to be readable."""
        os.close(self.fd)

    # What follows is for the registry's process alone.

    def registry_verdicts(self) -> VerdictWriter:
        return VerdictWriter(self._verdicts[self.num_workers], self._now_s)

    def set_report(self, slot: int, report: LoadReport) -> None:
        row = self._reports[slot]
        row[0] = report.num_running
        row[1] = report.num_waiting
        row[2] = report.kv_used_tokens
        row[3] = report.kv_total_tokens
        row[4] = int(report.at_s * 1e9)  # last: it makes the others count

    def clear_report(self, slot: int) -> None:
        self._reports[slot][4] = 0

    def is_empty(self, slot: int) -> bool:
        """Whether nobody has anything to do with the instance any more."""
        return self.requests(slot) == 0 and self.tokens(slot) == 0 and self.leases(slot) == 0

    def forget_verdicts(self, slot: int) -> None:
        """For a slot's next instance: it begins as one that is up."""
        self.registry_verdicts().set_up_after(slot, max(row[slot] for row in self._verdicts))

    def clear_worker(self, worker: int) -> None:
        """Forget a dead worker's requests, once it has been reaped: its connections are closed, so they have ended.

        Its verdicts hold until there are newer ones: the instances are no better for its death. What it took of rate
        limits stays taken: the next worker in its place goes on with these cells.
        """
        for row in (self._requests[worker], self._tokens[worker], self._leases[worker], self._totals[worker]):
            row[:] = memoryview(bytes(row.nbytes)).cast("q")


def _num_cells(num_workers: int, num_slots: int) -> int:
    loads = 3 * num_workers * num_slots
    verdicts = (num_workers + 1) * num_slots
    reports = _REPORT_CELLS * num_slots
    return _HEADER_CELLS + loads + _TOTAL_CELLS * num_workers + verdicts + reports + num_bucket_cells(num_workers)

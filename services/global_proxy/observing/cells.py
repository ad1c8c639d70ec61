"""Counters, gauges and histograms as numbers in memory that all worker processes share.

Each worker writes its own row and nobody else's, so there are no locks, and a sum over the rows is right on whichever
worker is asked. A number that is being written is read as it was before or after: eight aligned bytes are one store.
A worker that is started anew takes over its predecessor's row, so that counters never go back.
"""

import mmap
import os
from bisect import bisect_left

_ROW_CELLS = 1 << 15  # per worker; pages that no metric uses are never touched, so they cost nothing
_CELL_BYTES = 8


class Cells:
    """The rows, in memory without a name.

    Attributes:
        fd: the memory; a worker process that inherits it makes its own Cells of it.
    """

    def __init__(self, num_workers: int = 1, fd: int | None = None) -> None:
        num_bytes = num_workers * _ROW_CELLS * _CELL_BYTES
        if fd is None:
            fd = os.memfd_create("omni_metrics")
            os.ftruncate(fd, num_bytes)
        self.fd = fd
        self.num_workers = num_workers
        self._all = memoryview(mmap.mmap(fd, num_bytes)).cast("d")

    def close(self) -> None:
        """Close `fd`: no worker can be started any more. The rows go on to be readable."""
        os.close(self.fd)

    def row(self, worker: int) -> "memoryview[float]":
        assert 0 <= worker < self.num_workers, worker
        return self._all[worker * _ROW_CELLS : (worker + 1) * _ROW_CELLS]


class Layout:
    """Hands out cells of one worker's row, and sums them over all workers.

    Every worker must reserve the same cells in the same order.

    Attributes:
        own: the row that this process writes.
        rows: of all workers.
    """

    def __init__(self, cells: Cells, worker: int) -> None:
        self.own = cells.row(worker)
        self.rows = [cells.row(index) for index in range(cells.num_workers)]
        self._num_used = 0

    def reserve(self, num_cells: int) -> int:
        """The first of so many cells in a row. Raises ValueError when the memory is too small for them."""
        first = self._num_used
        if first + num_cells > _ROW_CELLS:
            raise ValueError(f"metrics: {first + num_cells} numbers do not fit {_ROW_CELLS}: ask for fewer slots")
        self._num_used += num_cells
        return first

    def total(self, at: int) -> float:
        return sum(row[at] for row in self.rows)


class _Number:
    """One cell of this worker's row."""

    __slots__ = ("_at", "_cells")

    def __init__(self, layout: Layout, at: int) -> None:
        self._cells = layout.own
        self._at = at

    def detach(self) -> None:
        """The cell will be somebody else's: what comes late is lost."""
        self._cells = memoryview(bytearray(_CELL_BYTES)).cast("d")
        self._at = 0


class Counter(_Number):
    __slots__ = ()

    def inc(self, amount: float = 1.0) -> None:
        self._cells[self._at] += amount


class Gauge(_Number):
    """A number of things that this worker has now; a worker that starts has none."""

    __slots__ = ()

    def __init__(self, layout: Layout, at: int) -> None:
        super().__init__(layout, at)
        self.set(0.0)

    def inc(self) -> None:
        self._cells[self._at] += 1.0

    def dec(self) -> None:
        self._cells[self._at] -= 1.0

    def set(self, value: float) -> None:
        self._cells[self._at] = value


class Histogram:
    """Counts per bucket, not cumulative (`upper_bounds` and one more for what is above), then the sum."""

    __slots__ = ("_at", "_cells", "_sum_at", "_upper_bounds")

    def __init__(self, layout: Layout, at: int, upper_bounds: tuple[float, ...]) -> None:
        self._cells = layout.own
        self._at = at
        self._sum_at = at + len(upper_bounds) + 1
        self._upper_bounds = upper_bounds

    def observe(self, value: float) -> None:
        cells = self._cells
        cells[self._at + bisect_left(self._upper_bounds, value)] += 1.0
        cells[self._sum_at] += value

"""Where the workers of one proxy keep what they must know of each other's rate limits.

Each bucket has a number, and with it two cells of every worker: `taken`, then `marks`, which
`services.global_proxy.admission.shared_bucket` explains. A worker writes its own cells alone, and nobody ever clears
them: a worker that is started anew goes on with its predecessor's, so that what was taken is neither forgotten nor
counted twice.

A bucket's number is the place of its name's hash in a list that only grows, at the end of the memory's file. The kernel
appends as a whole. So whoever misses a name appends it and looks again, and should two workers append one at the same
time, both find the first of the two: there are no locks, and all use the same numbers.
"""

import os
from hashlib import blake2b

NUM_BUCKETS = 1 << 16  # names, ever; pages that no bucket uses are never touched, so they cost nothing
_NAME_BYTES = 8


def num_bucket_cells(num_workers: int) -> int:
    """64-bit floating-point numbers. One worker alone needs none."""
    return 2 * num_workers * NUM_BUCKETS if num_workers > 1 else 0


class BucketCells:
    """The cells as one worker sees them.

    Args:
        cells: of all buckets.
        fd, names_at: the memory's file, and at which byte of it the list of names begins.
    """

    def __init__(self, cells: "memoryview[float]", num_workers: int, worker: int, fd: int, names_at: int) -> None:
        self.num_workers = num_workers
        self.worker = worker
        self._cells = cells
        self._fd = fd
        self._names_at = names_at

    def of(self, name: bytes) -> "memoryview[float] | None":
        """A bucket's cells: what each worker has taken, then each one's mark. At first all are 0.

        None: there are NUM_BUCKETS others.
        """
        number = self._number(blake2b(name, digest_size=_NAME_BYTES).digest())
        if number is None:
            return None
        num_cells = 2 * self.num_workers
        return self._cells[number * num_cells : (number + 1) * num_cells]

    def _number(self, name: bytes) -> int | None:
        number, num_names = self._find(name)
        if number is None and num_names < NUM_BUCKETS:
            os.pwritev(self._fd, [name], 0, os.RWF_APPEND)
            number, _ = self._find(name)
        return number

    def _find(self, name: bytes) -> tuple[int | None, int]:
        """The name's place, if it is there, and how many names are."""
        names = os.pread(self._fd, NUM_BUCKETS * _NAME_BYTES, self._names_at)
        at = names.find(name)
        while at > 0 and at % _NAME_BYTES:  # the end of one name and the beginning of the next
            at = names.find(name, at + 1)
        return (at // _NAME_BYTES if at >= 0 else None), len(names) // _NAME_BYTES

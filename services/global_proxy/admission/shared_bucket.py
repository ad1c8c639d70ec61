"""A token bucket that the workers of one proxy take from together, without locks.

Let `free` be the rate times the time, less all that was ever taken. It rises by the rate and falls by what is taken.
A bucket that overflowed never would hold `free`, less a constant. A real one is full whenever `free` reaches its
highest value so far, its mark, so at any time it lacks just what `free` is below its mark:

    level = size - (mark - free),   free = rate x now - sum of `taken` over the workers,   mark = max of `free` so far

`free` is highest right before something is taken, so it is enough that whoever takes notes, as a mark of its own, what
it saw: the mark of all is the maximum. Every cell has one writer, sums and maxima do not depend on who comes first,
and cells of 0 are a full bucket. A worker that looks rarely loses nothing, and a dead one's cells go on to count.

Workers that look at the same moment may all take the last that was there; the bucket then owes it. So at most one
request per other worker passes too early, and none is forgotten.
"""

_MINUTE_S = 60.0


class SharedBucket:
    """Of so many requests or tokens a minute; a minute's worth may come at once.

    Args:
        cells: what each worker has taken, then each one's mark.
        worker: whose process this is.
    """

    __slots__ = ("_mark", "_marks", "_per_s", "_size", "_taken", "_worker")

    def __init__(self, per_minute: int, cells: "memoryview[float]", worker: int) -> None:
        num_workers = len(cells) // 2
        self._size = float(per_minute)
        self._per_s = per_minute / _MINUTE_S
        self._taken = cells[:num_workers]
        self._marks = cells[num_workers:]
        self._worker = worker
        self._mark = self._marks[worker]

    def wait_s(self, amount: float, now_s: float) -> float:
        """How long until `amount` is there. More than a bucket holds is taken from a full one, which then owes."""
        size = self._size
        free = now_s * self._per_s - sum(self._taken)
        mark = max(self._marks)  # read after `taken`, as it is written before
        self._mark = mark = mark if mark > free else free
        lacking = (amount if amount < size else size) - (size - (mark - free))
        return lacking / self._per_s if lacking > 0 else 0.0

    def take(self, amount: float) -> None:
        """After `wait_s`, with no await in between. A negative amount gives back, at any time."""
        self._marks[self._worker] = self._mark
        self._taken[self._worker] += amount

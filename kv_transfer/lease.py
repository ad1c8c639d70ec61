"""Leases: P keeps a prompt's KV blocks until every reader is done with them, or until time is up.

Two threads meet here. The scheduler's thread grants leases and takes back the blocks of ended ones (it alone may touch
vLLM's block pool). The control thread ends reads and expires leases. A block leaves the table in one step, under the
lock, and is given back only afterwards: a read that ends while its lease is in the table has read good bytes.
"""

import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field


@dataclass(kw_only=True)
class Lease:
    lease_id: str
    block_ids: tuple[int, ...]
    num_reads: int  # readers times tensor-parallel ranks
    deadline: float  # on the table's clock
    ended_reads: set[tuple[str, int]] = field(default_factory=set)

    def __post_init__(self) -> None:
        assert self.num_reads >= 1


@dataclass
class LeaseCounts:
    granted: int = 0
    released: int = 0  # every reader is done, or none will come
    expired: int = 0


class LeaseTable:
    """Open leases, and the blocks of ended ones that wait to be given back.

    Args:
        lease_s: how long a lease lives, seconds.
        tp_size: ranks that read each block.
        on_change: called, without the lock, after a first lease was granted or one ended; must not block.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        lease_s: float,
        tp_size: int,
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lease_s = lease_s
        self._tp_size = tp_size
        self._on_change = on_change
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[str, Lease] = {}  # in the order of their deadlines: all live equally long
        self._ended: list[Lease] = []
        self._counts = LeaseCounts()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def has_ended(self) -> bool:
        return bool(self._ended)

    def grant(self, block_ids: Sequence[int], num_readers: int) -> Lease:
        lease = Lease(
            lease_id=secrets.token_hex(16),
            block_ids=tuple(block_ids),
            num_reads=num_readers * self._tp_size,
            deadline=self._clock() + self._lease_s,
        )
        with self._lock:
            first = not self._open
            self._open[lease.lease_id] = lease
            self._counts.granted += 1
        if first:
            self._on_change()
        return lease

    def end_read(self, lease_id: str, reader: str, rank: int | None) -> bool:
        """Note that `reader` is done on `rank` (None: on all).

        Returns:
            Whether the lease was open until now, that is, whether what was read is good.
        """
        if rank is not None and rank >= self._tp_size:
            return False  # a reader that we would not have welcomed
        self.expire()
        with self._lock:
            lease = self._open.get(lease_id)
            if lease is None:
                return False
            ranks = range(self._tp_size) if rank is None else [rank]
            lease.ended_reads.update((reader, r) for r in ranks)
            over = len(lease.ended_reads) >= lease.num_reads
            if over:
                self._ended.append(self._open.pop(lease_id))
                self._counts.released += 1
        if over:
            self._on_change()
        return True

    def end(self, lease_id: str) -> bool:
        """End a lease that nobody needs any more; returns whether it was open."""
        with self._lock:
            lease = self._open.pop(lease_id, None)
            if lease is None:
                return False
            self._ended.append(lease)
            self._counts.released += 1
        self._on_change()
        return True

    def expire(self) -> None:
        """End every lease whose time is up."""
        now = self._clock()
        with self._lock:
            over = [lease for lease in self._open.values() if lease.deadline <= now]
            for lease in over:
                self._ended.append(self._open.pop(lease.lease_id))
            self._counts.expired += len(over)
        if over:
            self._on_change()

    def seconds_to_expiry(self) -> float | None:
        """Until the next lease expires; None when none is open."""
        with self._lock:
            first = next(iter(self._open.values()), None)
        return None if first is None else max(0.0, first.deadline - self._clock())

    def take_ended(self) -> list[Lease]:
        """The leases that ended since the last call, whose blocks the caller now gives back."""
        with self._lock:
            ended, self._ended = self._ended, []
        return ended

    def take_counts(self) -> LeaseCounts:
        """What happened since the last call."""
        with self._lock:
            counts, self._counts = self._counts, LeaseCounts()
        return counts

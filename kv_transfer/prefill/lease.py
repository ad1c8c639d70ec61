"""Leases: P keeps a prompt's KV blocks until every reader is done with them, or until time is up.

Two threads meet here. The scheduler's thread grants leases and takes back the blocks of ended ones (it alone may touch
vLLM's block pool). The control thread ends reads and expires leases. A block leaves the table in one step, under the
lock, and is given back only afterwards: a read that ends while its lease is in the table has read good bytes.
"""

import math
import secrets
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

_MAX_REMEMBERED = 1 << 16
_EVERY_READER: set[str] = {"every reader"}


@dataclass(kw_only=True)
class Lease:
    """One prompt's claim on P's blocks. Its id is never used again, so it stands for one generation of the blocks."""

    lease_id: str
    block_ids: tuple[int, ...]  # none while the prompt is still being computed
    num_readers: int
    granted_at: float  # on the table's clock, like `deadline`
    deadline: float
    was_early: bool = False  # it began before the prompt was computed
    ended_reads: dict[str, set[int]] = field(default_factory=dict)  # reader → its ranks that are done
    num_done: int = 0  # readers

    def __post_init__(self) -> None:
        assert self.num_readers >= 1


@dataclass
class LeaseCounts:
    granted: int = 0
    released: int = 0  # every reader is done, or none will come
    expired: int = 0


class LeaseTable:
    """Open leases, and the blocks of ended ones that wait to be given back.

    Args:
        lease_s: how long a lease lives after its grant and after each extension, seconds.
        max_lease_s: how long it can live with extensions, seconds.
        on_change: called, without the lock, after a lease ended, or one can expire while none could; must not block.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        *,
        lease_s: float,
        max_lease_s: float,
        on_change: Callable[[], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._lease_s = lease_s
        self._max_lease_s = max(lease_s, max_lease_s)
        self._on_change = on_change
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[str, Lease] = {}
        self._ended: list[Lease] = []
        self._early_ids: dict[str, None] = {}  # the newest, ended ones too: none of them names a second lease
        # What was waived before its early lease was opened: D and the proxy can be faster than P's queue.
        self._waived: dict[str, set[str]] = {}  # lease id → readers, or `_EVERY_READER`
        self._counts = LeaseCounts()

    def __len__(self) -> int:
        return len(self._open)

    @property
    def has_ended(self) -> bool:
        return bool(self._ended)

    def grant(self, block_ids: Sequence[int], num_readers: int) -> Lease:
        """A lease on a finished prompt's blocks."""
        now = self._clock()
        lease = Lease(
            lease_id=secrets.token_hex(16),
            block_ids=tuple(block_ids),
            num_readers=num_readers,
            granted_at=now,
            deadline=now + self._lease_s,
        )
        self._add(lease)
        return lease

    def open_early(self, lease_id: str, num_readers: int) -> bool:
        """A lease on a prompt that is about to be computed; it cannot expire before `fill`.

        Returns:
            Whether it was opened: not if there is one of that name already, or was, or nobody will read.
        """
        with self._lock:
            if lease_id in self._early_ids:
                return False
            self._early_ids[lease_id] = None
            _drop_oldest(self._early_ids)
            waived = self._waived.pop(lease_id, set())
            if waived is _EVERY_READER or len(waived) >= num_readers:
                return False
        self._add(
            Lease(
                lease_id=lease_id,
                block_ids=(),
                num_readers=num_readers,
                granted_at=self._clock(),
                deadline=math.inf,
                was_early=True,
                num_done=len(waived),
            )
        )
        return True

    def fill(self, lease_id: str, block_ids: Sequence[int]) -> bool:
        """The prompt of an early lease is computed; these are its blocks.

        Returns:
            Whether anybody still needs them.
        """
        with self._lock:
            lease = self._open.get(lease_id)
            if lease is None:
                return False
            lease.block_ids = tuple(block_ids)
            lease.granted_at = self._clock()
            lease.deadline = lease.granted_at + self._lease_s
        self._on_change()
        return True

    def _add(self, lease: Lease) -> None:
        with self._lock:
            first = not math.isinf(lease.deadline) and all(math.isinf(other.deadline) for other in self._open.values())
            self._open[lease.lease_id] = lease
            self._counts.granted += 1
        if first:
            self._on_change()

    def extend(self, lease_ids: Sequence[str]) -> list[str]:
        """Let these live on for another `lease_s`, within `max_lease_s` of the grant; returns those that are open."""
        self.expire()
        now = self._clock()
        with self._lock:
            leases = [lease for lease_id in lease_ids if (lease := self._open.get(lease_id)) is not None]
            for lease in leases:
                latest = min(now + self._lease_s, lease.granted_at + self._max_lease_s)
                lease.deadline = max(lease.deadline, latest)
        return [lease.lease_id for lease in leases]

    def end_read(self, lease_id: str, reader: str, rank: int | None, num_ranks: int) -> bool:
        """Note that `reader` is done on `rank` of its `num_ranks` (None: on all).

        Returns:
            Whether the lease was open until now, that is, whether what was read is good.
        """
        self.expire()
        with self._lock:
            lease = self._open.get(lease_id)
            if lease is None:
                if rank is None and lease_id not in self._early_ids:
                    self._waived.setdefault(lease_id, set()).add(reader)
                    _drop_oldest(self._waived)
                return False
            ended_ranks = lease.ended_reads.setdefault(reader, set())
            was_done = len(ended_ranks) >= num_ranks
            ended_ranks.update(range(num_ranks) if rank is None else [rank])
            lease.num_done += not was_done and len(ended_ranks) >= num_ranks
            over = lease.num_done >= lease.num_readers
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
                if lease_id not in self._early_ids:
                    self._waived[lease_id] = _EVERY_READER
                    _drop_oldest(self._waived)
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
        """Until the next lease expires; None when none can."""
        with self._lock:
            deadline = min((lease.deadline for lease in self._open.values()), default=math.inf)
        return None if deadline == math.inf else max(0.0, deadline - self._clock())

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


def _drop_oldest(remembered: dict[str, Any]) -> None:
    """Keep so many of the newest."""
    while len(remembered) > _MAX_REMEMBERED:
        del remembered[next(iter(remembered))]

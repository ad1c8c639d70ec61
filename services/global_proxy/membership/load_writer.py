"""The cells of the load table that one process writes."""

from collections.abc import Callable
from typing import Final

from services.global_proxy.membership.bucket_cells import BucketCells
from services.global_proxy.membership.member import Role

_DOWN_BITS: Final = 21
_DOWN_MASK: Final = (1 << _DOWN_BITS) - 1  # of a verdict: for how long the instance is down; all zero: it is up
_DOWN_UNIT_MS: Final = 10  # so the longest is 5.8 hours
TURN_COLUMNS: Final[dict[Role, int]] = {"prefill": 3, "decode": 4, "mixed": 5}  # of the totals


def down_until_s(verdict: int) -> float:
    """Until when a verdict has an instance passed over, on the monotonic clock; 0: it is up."""
    units = verdict & _DOWN_MASK
    return ((verdict >> _DOWN_BITS) + units * _DOWN_UNIT_MS) / 1e3 if units else 0.0


class VerdictWriter:
    """Says which instances are up, to all workers. The newest verdict holds, whoever gave it."""

    __slots__ = ("_now_s", "_verdicts")

    def __init__(self, verdicts: memoryview, now_s: Callable[[], float]) -> None:
        self._verdicts = verdicts
        self._now_s = now_s

    def set_down(self, slot: int, for_s: float) -> None:
        """Have every worker pass over an instance for `for_s` seconds (5.8 hours at most), or until a newer verdict."""
        units = min(max(round(for_s * 1e3 / _DOWN_UNIT_MS), 1), _DOWN_MASK)
        self._verdicts[slot] = int(self._now_s() * 1e3) << _DOWN_BITS | units

    def set_up(self, slot: int) -> None:
        """Every worker may choose the instance."""
        self._verdicts[slot] = int(self._now_s() * 1e3) << _DOWN_BITS

    def set_up_after(self, slot: int, verdict: int) -> None:
        """The same, newer than this verdict even if that was given in this very millisecond."""
        at_ms = max(int(self._now_s() * 1e3), (verdict >> _DOWN_BITS) + 1)
        self._verdicts[slot] = at_ms << _DOWN_BITS


class Writer(VerdictWriter):
    """A worker's cells. Nobody else writes them, so reading a cell and then writing it loses nothing.

    Attributes:
        buckets: of rate limits; None: there is one worker alone.
    """

    __slots__ = ("_leases", "_requests", "_tokens", "_totals", "buckets")

    def __init__(
        self,
        requests: memoryview,
        tokens: memoryview,
        leases: memoryview,
        totals: memoryview,
        verdicts: memoryview,
        now_s: Callable[[], float],
        buckets: BucketCells | None,
    ) -> None:
        super().__init__(verdicts, now_s)
        self.buckets = buckets
        self._requests = requests
        self._tokens = tokens
        self._leases = leases
        self._totals = totals

    def add(self, slot: int, requests: int, tokens: int) -> None:
        """Count requests and their tokens as sent to an instance; negative numbers when they have ended.

        Do it without an await since the instance was chosen: whoever drains it relies on that.
        """
        self._requests[slot] += requests
        self._tokens[slot] += tokens

    def add_leases(self, slot: int, leases: int) -> None:
        """Count prompts whose KV an instance keeps for others to read; negative when they have, or never will.

        Do it before the request that made the KV counts as ended: whoever drains the instance relies on that.
        """
        self._leases[slot] += leases

    def add_in_flight(self, requests: int) -> None:
        """Count requests that this worker serves."""
        self._totals[0] += requests

    def add_queued(self, requests: int) -> None:
        """Count requests that wait in this worker."""
        self._totals[1] += requests

    def add_turn(self, role: Role) -> None:
        """Count a choice of an instance in turn."""
        self._totals[TURN_COLUMNS[role]] += 1

    def add_connections(self, connections: int) -> None:
        """Count clients' connections that this worker has accepted; negative when they have ended."""
        self._totals[2] += connections

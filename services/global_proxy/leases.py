"""The leases that P grants for the requests being served: who reads the blocks, and who ends the lease if nobody does.

D ends a lease itself once it has read, also for a request that it then drops. What is left to the proxy is a request
that D never took: refused, unreachable, or the client left between the legs. Should the release fail, the lease ends
by itself after its time.
"""

from collections.abc import Callable

from services.global_proxy.observing.cells import Gauge


class OpenLease:
    """Settle it once: D has taken the request, or the lease is given up."""

    def __init__(self, ledger: "LeaseLedger", release: Callable[[], None]) -> None:
        self._ledger = ledger
        self._release = release

    def taken(self) -> None:
        """D has answered: it has read the blocks, and told P so."""
        self._ledger._close(self)

    def give_up(self) -> None:
        """Nobody will read: P may have its blocks back. After `taken` nothing happens."""
        if self._ledger._close(self):
            self._release()


class LeaseLedger:
    """Every open lease; empty when the proxy is idle."""

    def __init__(self, gauge: Gauge) -> None:
        self._open: set[OpenLease] = set()
        self._gauge = gauge

    def __len__(self) -> int:
        return len(self._open)

    def open(self, release: Callable[[], None]) -> OpenLease:
        """Args: release: begins to end the lease on P."""
        lease = OpenLease(self, release)
        self._open.add(lease)
        self._gauge.inc()
        return lease

    def _close(self, lease: OpenLease) -> bool:
        if lease not in self._open:
            return False
        self._open.discard(lease)
        self._gauge.dec()
        return True

"""Counting what strangers send, without letting them fill the log."""

import logging
import threading

logger = logging.getLogger(__name__)


class DropCounter:
    """Args:
    where: which port, for the log.
    """

    def __init__(self, where: str) -> None:
        self._where = where
        self._lock = threading.Lock()
        self._total = 0
        self._taken = 0

    def count(self, error: Exception) -> None:
        """One more message was dropped. The 1st, 2nd, 4th, 8th... is logged."""
        with self._lock:
            self._total += 1
            total = self._total
        if total.bit_count() == 1:
            logger.warning("dropped a message on the %s, %d so far: %s", self._where, total, error)

    def take(self) -> int:
        """How many since the last call."""
        with self._lock:
            since, self._taken = self._total - self._taken, self._total
        return since

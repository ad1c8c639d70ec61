"""Not waiting, request after request, for a P that does not answer: after a failure it is left alone for a while."""

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from kv_transfer.errors import PeerUnreachableError

_FIRST_PAUSE_S = 0.5
_LONGEST_PAUSE_S = 10.0
_FORGOTTEN_AFTER_S = 60.0  # of not being asked for: a P that has restarted elsewhere is never asked for again


@dataclass
class _Pause:
    seconds: float
    until: float


class PeerBackoff:
    """Pauses per peer, each twice as long as the one before. After a pause one load tries; the others still wait.

    Args:
        clock: seconds, monotonic.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._pauses: dict[tuple[str, int], _Pause] = {}

    def __len__(self) -> int:
        """How many peers are left alone."""
        with self._lock:
            oldest = self._clock() - _FORGOTTEN_AFTER_S
            self._pauses = {peer: pause for peer, pause in self._pauses.items() if pause.until > oldest}
            return len(self._pauses)

    def check(self, peer: tuple[str, int]) -> None:
        """Raises PeerUnreachableError: the peer is left alone at the moment."""
        with self._lock:
            pause = self._pauses.get(peer)
            if pause is None:
                return
            now = self._clock()
            if now < pause.until:
                raise PeerUnreachableError(f"{peer[0]}:{peer[1]} did not answer before and is left alone for now")
            pause.until = now + pause.seconds  # this load tries; should it fail, the next pause is longer

    def failed(self, peer: tuple[str, int]) -> None:
        """The peer did not answer."""
        with self._lock:
            pause = self._pauses.get(peer)
            seconds = min(2 * pause.seconds, _LONGEST_PAUSE_S) if pause is not None else _FIRST_PAUSE_S
            self._pauses[peer] = _Pause(seconds, self._clock() + seconds)

    def answered(self, peer: tuple[str, int]) -> None:
        with self._lock:
            self._pauses.pop(peer, None)

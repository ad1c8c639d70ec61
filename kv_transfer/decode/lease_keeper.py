"""D keeps the leases alive of the prompts that it has accepted and not yet read: heartbeats to each P."""

import logging
import threading
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import zmq

from kv_transfer.auth import DeploymentKey
from kv_transfer.control import ControlClient
from kv_transfer.errors import KVTransferError

logger = logging.getLogger(__name__)

_TIMEOUT_S = 2.0
_PEERS_AT_ONCE = 16  # only as many that do not answer delay the beats to others, by the timeout
_LEASES_PER_BEAT = 1024

Peer = tuple[str, int]


@dataclass
class _Kept:
    peer: Peer
    lease_id: str
    was_open: bool = False  # at a heartbeat; before that P may not know it yet


class LeaseKeeper:
    """One thread, which sleeps while there is nothing to keep; while it sends, one more for each P.

    Args:
        context: outlives the keeper.
        beat_s: seconds between two heartbeats of a lease; a third of a lease's time lets one or two get lost.
    """

    def __init__(self, context: "zmq.Context[zmq.Socket[bytes]]", key: DeploymentKey, beat_s: float) -> None:
        self._context = context
        self._key = key
        self._beat_s = beat_s
        self._kept: dict[str, _Kept] = {}  # by request id: several requests may read under one lease
        self._lost: list[str] = []
        self._changed = threading.Condition()
        self._stopping = False
        self._thread: threading.Thread | None = None

    def keep(self, request_id: str, peer: Peer, lease_id: str) -> None:
        with self._changed:
            self._kept[request_id] = _Kept(peer, lease_id)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="kv-lease-keeper", daemon=True)
                self._thread.start()
            elif len(self._kept) == 1:
                self._changed.notify()

    def drop(self, request_id: str) -> None:
        """Its lease is read, released, or of no more use. Unknown ids are ignored."""
        with self._changed:
            self._kept.pop(request_id, None)

    def take_lost(self) -> list[str]:
        """The requests whose leases were found to have ended, since the last call; they are no longer kept."""
        if not self._lost:
            return []
        with self._changed:
            lost, self._lost = self._lost, []
        return lost

    def close(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._kept or self._stopping)
                self._changed.wait_for(lambda: self._stopping, timeout=self._beat_s)
                if self._stopping:
                    return
                by_peer: dict[Peer, list[_Kept]] = defaultdict(list)
                for kept in self._kept.values():
                    by_peer[kept.peer].append(kept)
            with ThreadPoolExecutor(_PEERS_AT_ONCE, thread_name_prefix="kv-lease-beat") as beats:
                for peer, leases in by_peer.items():
                    beats.submit(self._beat, peer, leases)

    def _beat(self, peer: Peer, leases: Sequence[_Kept]) -> None:
        lease_ids = sorted({kept.lease_id for kept in leases})
        extended: set[str] = set()
        try:
            with ControlClient(self._context, self._key, *peer) as control:
                for start in range(0, len(lease_ids), _LEASES_PER_BEAT):
                    some = lease_ids[start : start + _LEASES_PER_BEAT]
                    extended.update(control.extend_leases(some, time.monotonic() + _TIMEOUT_S))
        except KVTransferError as error:
            if not self._stopping:
                logger.warning("no heartbeat to %s:%d: %s", *peer, error)
            return
        for kept in leases:
            kept.was_open |= kept.lease_id in extended
        ended = {kept.lease_id for kept in leases if kept.was_open and kept.lease_id not in extended}
        with self._changed:
            lost = [request_id for request_id, kept in self._kept.items() if kept.lease_id in ended]
            for request_id in lost:
                del self._kept[request_id]
            self._lost += lost

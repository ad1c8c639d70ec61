"""Ending P's lease on a prompt's KV blocks when no D will read them.

D ends the lease itself once it has read, also for a request that it then drops. What is left to the proxy is a request
that D never took: refused, unreachable, or the client left between the legs. Should the release fail, the lease ends
by itself after its time.
"""

import asyncio
import logging
import time

import msgspec
import zmq

from kv_transfer.auth import DeploymentKey
from kv_transfer.control import ControlClient
from kv_transfer.errors import HandOffError, KVTransferError
from kv_transfer.hand_off import parse_hand_off

logger = logging.getLogger(__name__)

_TIMEOUT_S = 2.0


class LeaseReleaser:
    """Releases in the background, each in a thread for at most two seconds.

    Args:
        key: the deployment's, with which hand-offs and control messages are signed.
    """

    def __init__(self, key: DeploymentKey) -> None:
        self._key = key
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._tasks: set[asyncio.Task[None]] = set()

    def release_hand_off(self, kv_transfer_params: msgspec.Raw) -> None:
        """Begin to end the lease that these parameters name. Those that P did not sign name none."""
        try:
            hand_off = parse_hand_off(msgspec.json.decode(kv_transfer_params), self._key)
        except (HandOffError, msgspec.DecodeError, UnicodeDecodeError):
            return
        self.release(hand_off.remote_host, hand_off.remote_port, hand_off.omni.lease_id)

    def release(self, host: str, port: int, lease_id: str) -> None:
        """Begin to end a lease of the P whose control port this is."""
        task = asyncio.create_task(asyncio.to_thread(self._release, host, port, lease_id))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Wait for what was begun."""
        await asyncio.gather(*self._tasks)
        self._context.term()

    def _release(self, host: str, port: int, lease_id: str) -> None:
        try:
            with ControlClient(self._context, self._key, host, port) as control:
                control.end_lease(lease_id, time.monotonic() + _TIMEOUT_S)
        except KVTransferError as error:
            logger.warning("could not release the KV blocks of lease %s: %s", lease_id, error)

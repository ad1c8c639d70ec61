"""A group of two workers, one of P and one of D, for torch.distributed's point-to-point messages.

The process's default group belongs to vLLM: the group here is built directly, beside it. What torch.distributed would
exchange through a TCPStore, a port without authentication, goes over the rank server's connection that both sides have
proven the deployment key on. The group's own connections (gloo's over TCP, HCCL's) have no authentication: D shows that
it received P's random first message, so P sends no KV to whoever took D's place. Who can change packets on that network
can change KV.
"""

import contextlib
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from kv_transfer.errors import DeadlineError, KVTransferError, PeerUnreachableError, ProtocolError
from kv_transfer.protocol import GroupKey
from kv_transfer.rank_connection import RankConnection

P_RANK, D_RANK = 0, 1
_TAG, _ABORT_TAG = 0, 1
_FIRST_POLL_S, _LONGEST_POLL_S = 20e-6, 1e-3
_SHORTEST_WAIT_S = 1e-3  # gloo takes zero for no limit


class RankGroup(ABC):
    """One end. Messages arrive in the order in which they were sent; one thread at a time may send or receive.

    Every method raises PeerUnreachableError or DeadlineError; after either the group is good for `close` alone.
    """

    backend: ClassVar[str]

    @abstractmethod
    def send(self, tensor: torch.Tensor, deadline: float) -> None:
        """Returns when the tensor may be changed again."""

    @abstractmethod
    def receive(self, tensor: torch.Tensor, deadline: float) -> None:
        """Returns when the tensor is filled. If this raises, something may be written into it as long as it exists."""

    @abstractmethod
    def abort(self) -> None:
        """Let what another thread sends or receives fail, and end the group. May be called again."""

    @abstractmethod
    def on_device(self) -> contextlib.AbstractContextManager[None]:
        """Around everything that this thread does with tensors for the group; when it ends, the device has done it."""


class KeyExchange(dist.Store):  # type: ignore[misc]  # torch is not followed
    """torch.distributed's store between two processes, over their connection, while the group is made.

    Either side sends what it sets, and waits for what it misses. Used by the thread that makes the group, alone.
    """

    def __init__(
        self, send: Callable[[GroupKey, float], None], receive: Callable[[float], object], deadline: float
    ) -> None:
        super().__init__()
        self._send = send
        self._receive = receive
        self._deadline = deadline
        self._values: dict[str, bytes] = {}
        self.error: KVTransferError | None = None  # why a call failed: torch.distributed does not keep what was raised

    def set(self, key: str, value: bytes | str) -> None:
        self._values[key] = value.encode() if isinstance(value, str) else bytes(value)
        with self._kept_error():
            self._send(GroupKey(key, self._values[key]), self._deadline)

    def get(self, key: str) -> bytes:
        with self._kept_error():
            while key not in self._values:
                message = self._receive(self._deadline)
                if not isinstance(message, GroupKey):
                    raise ProtocolError(f"{type(message).__name__} while a group is made")
                self._values[message.key] = message.value
        return self._values[key]

    def wait(self, keys: list[str], timeout: timedelta | None = None) -> None:
        for key in keys:
            self.get(key)

    def check(self, keys: list[str]) -> bool:
        return all(key in self._values for key in keys)

    def has_extended_api(self) -> bool:
        return False

    @contextlib.contextmanager
    def _kept_error(self) -> Iterator[None]:
        try:
            yield
        except KVTransferError as error:
            self.error = error
            raise


def make_group(
    backend: str, device: torch.device, rank: int, connection: RankConnection, host: str, deadline: float
) -> RankGroup:
    """Make this process's end; the other makes its own at the same time.

    Args:
        connection: to the other; nothing else may use it meanwhile.
        host: gloo listens on this address of ours.

    Raises:
        PeerUnreachableError, DeadlineError; what the connection raises.
    """
    receive = connection.receive_request if rank == P_RANK else connection.receive_reply
    store = KeyExchange(connection.send, receive, deadline)
    try:
        return _KINDS[backend](store, rank, device, host, deadline, connection)
    except (RuntimeError, KVTransferError) as error:
        raise store.error or _as_ours(error, deadline) from None


class _GlooGroup(RankGroup):
    backend = "gloo"

    def __init__(
        self,
        store: KeyExchange,
        rank: int,
        device: torch.device,
        host: str,
        deadline: float,
        connection: RankConnection,
    ) -> None:
        self._store = store  # torch holds its C++ half only
        self._other = 1 - rank
        self._aborted = False
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(hostname=host)]
        options._timeout = _remaining(deadline)
        options._threads = 1
        self._group = dist.ProcessGroupGloo(store, rank, 2, options)

    def send(self, tensor: torch.Tensor, deadline: float) -> None:
        self._end_of(lambda: self._group.send([tensor], self._other, _TAG), deadline)

    def receive(self, tensor: torch.Tensor, deadline: float) -> None:
        self._end_of(lambda: self._group.recv([tensor], self._other, _TAG), deadline)

    def abort(self) -> None:
        """ProcessGroupGloo's own `abort` wakes nobody. A message that does not come in time ends every connection."""
        self._aborted = True
        with contextlib.suppress(RuntimeError):
            never_sent = self._group.recv([torch.empty(1, dtype=torch.uint8)], self._other, _ABORT_TAG)
            never_sent.wait(timedelta(seconds=_SHORTEST_WAIT_S))

    def on_device(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def _end_of(self, start: Callable[[], Any], deadline: float) -> None:
        try:
            start().wait(_remaining(deadline))
        except RuntimeError as error:
            if self._aborted:
                raise PeerUnreachableError("the group was ended") from None
            raise _as_ours(error, deadline) from None


class _HcclGroup(RankGroup):
    """Checked against torch_npu 2.13.0 on a stand-in for CANN; not run on Ascend hardware.

    The communicator is made with the first message: if the peer dies just then, HCCL gives up after
    HCCL_CONNECT_TIMEOUT (120 s unless set), and so does the thread that waits for it.
    """

    backend = "hccl"

    def __init__(
        self,
        store: KeyExchange,
        rank: int,
        device: torch.device,
        host: str,
        deadline: float,
        connection: RankConnection,
    ) -> None:
        from torch_npu._C._distributed_c10d import ProcessGroupHCCL  # type: ignore[import-not-found]

        self._store = store
        self._other = 1 - rank
        # Nothing comes over it while D receives: HCCL does not notice that a peer has gone, its connection does.
        self._quiet = connection if rank == D_RANK else None
        self._npu = torch.get_device_module(device)
        self._device = device
        self._stream = self._npu.Stream(device)  # vLLM's computing does not wait for ours, nor ours for it
        self._aborted = False
        with self._npu.device(device):
            self._group = ProcessGroupHCCL(store, rank, 2, ProcessGroupHCCL.Options())

    def send(self, tensor: torch.Tensor, deadline: float) -> None:
        self._end_of(lambda: self._group.send([tensor], self._other, _TAG), deadline)

    def receive(self, tensor: torch.Tensor, deadline: float) -> None:
        self._end_of(lambda: self._group.recv([tensor], self._other, _TAG), deadline)

    def abort(self) -> None:
        """In a thread of its own: how long torch_npu takes to end what hangs on the device is not known."""
        if not self._aborted:
            self._aborted = True
            threading.Thread(target=self._group.abort, name="kv-hccl-abort", daemon=True).start()

    @contextlib.contextmanager
    def on_device(self) -> Iterator[None]:
        with self._npu.device(self._device), self._npu.stream(self._stream):
            yield
            self._stream.synchronize()

    def _end_of(self, start: Callable[[], Any], deadline: float) -> None:
        """A work's own `wait` makes the stream wait, not this thread, and knows no deadline: look at an event."""
        try:
            start().wait()
            done = self._npu.Event()
            done.record()
            pause_s = _FIRST_POLL_S
            while not done.query():
                if self._aborted:
                    raise PeerUnreachableError("the group was ended")
                if self._quiet is not None and not self._quiet.is_quiet:
                    raise PeerUnreachableError("the peer left while HCCL moved bytes")
                if time.monotonic() > deadline:
                    raise DeadlineError("the deadline passed while HCCL moved bytes")
                time.sleep(pause_s)
                pause_s = min(2 * pause_s, _LONGEST_POLL_S)
        except RuntimeError as error:
            raise self._store.error or _as_ours(error, deadline) from None


_KINDS: dict[str, Callable[[KeyExchange, int, torch.device, str, float, RankConnection], RankGroup]] = {
    "gloo": _GlooGroup,
    "hccl": _HcclGroup,
}


def our_address_towards(host: str, port: int) -> str:
    """The address of ours from which the system would connect there. Raises PeerUnreachableError."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0][0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:  # connecting it sends nothing
            probe.connect((host, port))
            return str(probe.getsockname()[0])
    except (OSError, UnicodeError) as error:
        raise PeerUnreachableError(f"{host}:{port}: {error}") from None


def _remaining(deadline: float) -> timedelta:
    return timedelta(seconds=max(_SHORTEST_WAIT_S, deadline - time.monotonic()))


def _as_ours(error: RuntimeError | KVTransferError, deadline: float) -> KVTransferError:
    if isinstance(error, KVTransferError):
        return error
    if time.monotonic() >= deadline - _SHORTEST_WAIT_S:
        return DeadlineError("the deadline passed while torch.distributed moved bytes")
    return PeerUnreachableError(f"torch.distributed: {str(error).splitlines()[0]}")

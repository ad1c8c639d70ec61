"""The transports of this project, each driven as the connector does."""

import time
from abc import abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, cast

from benchmarks.kv.buffers import Buffer
from benchmarks.kv.cases import BUFFER_BYTES
from benchmarks.kv.contender import Contender
from kv_transfer.auth import KEY_BYTES, DeploymentKey
from kv_transfer.memory.regions import Memory, Region, Spans
from kv_transfer.rank_server import RankClient, RankServer
from kv_transfer.transports.base import Transport

_KEY = DeploymentKey(bytes(KEY_BYTES))
_HOST = "127.0.0.1"
_TIMEOUT_S = 30.0


@dataclass
class Ours(Contender):
    """A transport, with the rank server that some need. Leases and plans are made before a read and do not belong."""

    family = "ours"
    wants_tensors: ClassVar[bool] = False

    @abstractmethod
    def make_transport(self, memory: Memory, server: RankServer | None, client: RankClient) -> Transport:
        """P and D."""

    def serve(self, buffer: Buffer) -> Any:
        self.server: RankServer | None = RankServer(_HOST, _KEY)
        self._start(buffer)
        offer = self.transport.offer()
        if offer is None:
            raise RuntimeError("P has nothing to offer")
        self.server.start()
        return self.server.endpoint, offer

    def connect(self, buffer: Buffer, served: Any) -> None:
        self.server = None
        self._start(buffer)
        self.peer, self.offer = served
        if not self.transport.can_read(self.peer, self.offer):
            raise RuntimeError("D cannot take up what P offers")

    def _start(self, buffer: Buffer) -> None:
        tensors = [_tensor(buffer)] if self.wants_tensors else []
        self.client = RankClient(_KEY)
        memory = Memory([Region(buffer.address, buffer.num_bytes)], tensors)
        self.transport = self.make_transport(memory, self.server, self.client)

    def read(self, spans: Spans) -> None:
        self.transport.read(self.peer, self.offer, spans, time.monotonic() + _TIMEOUT_S)

    def close(self) -> None:
        self.transport.close()
        self.client.close()
        if self.server is not None:
            self.server.close()


def _tensor(buffer: Buffer) -> Any:
    import torch

    return torch.from_numpy(buffer.bytes)


@dataclass
class Tcp(Ours):
    num_connections: int = 1
    checksum: bool = False

    def make_transport(self, memory: Memory, server: RankServer | None, client: RankClient) -> Transport:
        from kv_transfer.transports.tcp import TcpTransport

        return TcpTransport(memory, server, client, num_connections=self.num_connections, checksum=self.checksum)


@dataclass
class SharedMemory(Ours):
    """Both sides' memory comes from the pool that the connector gives to vLLM."""

    def make_buffer(self) -> Buffer:
        from kv_transfer.memory.shared_pool import SharedPool

        self.pool = SharedPool()
        return Buffer(self.pool.allocate(BUFFER_BYTES).numpy())

    def make_transport(self, memory: Memory, server: RankServer | None, client: RankClient) -> Transport:
        from kv_transfer.transports.shared_memory import SharedMemoryTransport

        return SharedMemoryTransport(memory, self.pool)

    def close(self) -> None:
        super().close()
        self.pool.close()


@dataclass
class ProcessVm(Ours):
    def make_transport(self, memory: Memory, server: RankServer | None, client: RankClient) -> Transport:
        from kv_transfer.transports.process_vm import ProcessVmTransport

        return cast(Transport, ProcessVmTransport(memory))


@dataclass
class Hccl(Ours):
    """Over gloo, for there is no NPU here."""

    wants_tensors = True

    def make_transport(self, memory: Memory, server: RankServer | None, client: RankClient) -> Transport:
        from kv_transfer.transports.hccl import HcclTransport

        return cast(Transport, HcclTransport(memory, server, client, checksum=False))


@dataclass
class OurMooncake(Ours):
    needs = ("mooncake.engine",)

    def make_transport(self, memory: Memory, server: RankServer | None, client: RankClient) -> Transport:
        from kv_transfer.transports.mooncake import MooncakeTransport

        return cast(Transport, MooncakeTransport(memory, _HOST, required=True))

"""The libraries that other serving systems move KV blocks with."""

import importlib
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.kv.buffers import Buffer
from benchmarks.kv.cases import BLOCK_BYTES, NUM_BLOCKS
from benchmarks.kv.contender import Contender
from kv_transfer.memory.regions import Spans

_HOST = "127.0.0.1"


@dataclass
class Nixl(Contender):
    """NIXL's UCX backend: D posts READs and polls until they are done.

    Blocks are read as vLLM's NixlConnector does: a list of all blocks is prepared once on either side, a read names
    the indices. One run of bytes, or everything with `prepared=False`, gets its descriptors with each read.
    """

    num_threads: int = 0
    prepared: bool = True
    family = "peer"
    needs = ("nixl",)

    def serve(self, buffer: Buffer) -> Any:
        self._start("P", buffer)
        return self.agent.get_agent_metadata(), buffer.address

    def connect(self, buffer: Buffer, served: Any) -> None:
        self._start("D", buffer)
        metadata, self.remote_address = served
        self.peer = self.agent.add_remote_agent(metadata).decode()
        self.local_address = buffer.address
        blocks = np.arange(NUM_BLOCKS) * BLOCK_BYTES
        sizes = np.full(NUM_BLOCKS, BLOCK_BYTES)
        self.local_list = self.agent.prep_xfer_dlist(
            "NIXL_INIT_AGENT", _descriptors(blocks + self.local_address, sizes), "DRAM"
        )
        self.remote_list = self.agent.prep_xfer_dlist(
            self.peer, _descriptors(blocks + self.remote_address, sizes), "DRAM"
        )

    def _start(self, name: str, buffer: Buffer) -> None:
        nixl = importlib.import_module("nixl._api")
        config = nixl.nixl_agent_config(num_threads=self.num_threads)
        self.agent = nixl.nixl_agent(f"{name}-{time.monotonic_ns()}", config)
        self.registered = self.agent.register_memory([(buffer.address, buffer.num_bytes, 0, "")], "DRAM")

    def read(self, spans: Spans) -> None:
        agent = self.agent
        if self.prepared and len(spans) > 1:
            local = (spans.local // BLOCK_BYTES).astype(np.int32)
            remote = (spans.remote // BLOCK_BYTES).astype(np.int32)
            handle = agent.make_prepped_xfer("READ", self.local_list, local, self.remote_list, remote)
        else:
            handle = agent.initialize_xfer(
                "READ",
                agent.get_xfer_descs(_descriptors(spans.local + self.local_address, spans.sizes), "DRAM"),
                agent.get_xfer_descs(_descriptors(spans.remote + self.remote_address, spans.sizes), "DRAM"),
                self.peer,
            )
        state = agent.transfer(handle)
        while state == "PROC":
            state = agent.check_xfer_state(handle)
        agent.release_xfer_handle(handle)
        if state != "DONE":
            raise RuntimeError(f"the transfer ended with {state}")

    def close(self) -> None:
        self.agent.deregister_memory(self.registered)


def _descriptors(addresses: npt.NDArray[np.int64], sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.uint64]:
    return np.column_stack((addresses, sizes, np.zeros_like(sizes))).astype(np.uint64)


@dataclass
class Mooncake(Contender):
    """Mooncake's transfer engine over tcp: D reads batches, synchronously."""

    family = "peer"
    needs = ("mooncake.engine",)

    def serve(self, buffer: Buffer) -> Any:
        self._start(buffer)
        return f"{_HOST}:{self.engine.get_rpc_port()}", buffer.address

    def connect(self, buffer: Buffer, served: Any) -> None:
        self._start(buffer)
        self.session, self.remote_address = served

    def _start(self, buffer: Buffer) -> None:
        self.engine = importlib.import_module("mooncake.engine").TransferEngine()
        self.address = buffer.address
        if self.engine.initialize(_HOST, "P2PHANDSHAKE", "tcp", ""):
            raise RuntimeError("the engine did not start")
        if self.engine.register_memory(buffer.address, buffer.num_bytes):
            raise RuntimeError("the engine did not register the memory")

    def read(self, spans: Spans) -> None:
        code = self.engine.batch_transfer_sync_read(
            self.session,
            (spans.local + self.address).tolist(),
            (spans.remote + self.remote_address).tolist(),
            spans.sizes.tolist(),
        )
        if code:
            raise RuntimeError(f"batch_transfer_sync_read returned {code}")

    def close(self) -> None:
        self.engine.unregister_memory(self.address)

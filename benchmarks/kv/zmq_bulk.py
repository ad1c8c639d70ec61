"""Bulk bytes through zmq, which omni uses for control messages only: here is why."""

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
import zmq

from benchmarks.kv.buffers import Buffer
from benchmarks.kv.contender import Contender
from kv_transfer.memory.regions import Memory, Region, Spans


@dataclass
class ZmqBulk(Contender):
    """One pair of sockets over TCP. P sends each span as a frame, uncopied; D copies each frame to its place."""

    family = "baseline"
    needs = ("zmq",)

    def serve(self, buffer: Buffer) -> Any:
        self.memory = Memory([Region(buffer.address, buffer.num_bytes)])
        self.context = zmq.Context()
        listener = self.context.socket(zmq.PAIR)
        port = listener.bind_to_random_port("tcp://127.0.0.1")
        threading.Thread(target=self._serve, args=(listener,), daemon=True).start()
        return port

    def connect(self, buffer: Buffer, served: Any) -> None:
        self.memory = Memory([Region(buffer.address, buffer.num_bytes)])
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.PAIR)
        self.socket.connect(f"tcp://127.0.0.1:{served}")

    def read(self, spans: Spans) -> None:
        self.socket.send_multipart([spans.remote.tobytes(), spans.sizes.tobytes()])
        frames = self.socket.recv_multipart(copy=False)
        for view, frame in zip(self.memory.views(spans.local, spans.sizes), frames, strict=True):
            view[:] = frame.buffer

    def close(self) -> None:
        self.context.destroy(linger=0)

    def _serve(self, listener: "zmq.Socket[bytes]") -> None:
        while True:
            try:
                offsets, sizes = (np.frombuffer(frame, np.int64) for frame in listener.recv_multipart())
                listener.send_multipart(self.memory.views(offsets, sizes), copy=False)
            except zmq.ZMQError:  # the context has ended
                return

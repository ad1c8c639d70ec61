"""Who is measured, and which of them is to be how much faster than which."""

import socket
from dataclasses import dataclass

from benchmarks.kv.baselines import Memcpy, RawSocket
from benchmarks.kv.contender import Contender
from benchmarks.kv.ours import Hccl, OurMooncake, ProcessVm, SharedMemory, Tcp
from benchmarks.kv.peers import Mooncake, Nixl
from benchmarks.kv.zmq_bulk import ZmqBulk

CONTENDERS: tuple[Contender, ...] = (
    Memcpy("memcpy"),
    Memcpy("memcpy memfd", memory_kind="memfd"),
    RawSocket("raw tcp"),
    RawSocket("raw unix", kind=socket.AF_UNIX),
    ZmqBulk("zmq tcp"),
    Nixl("NIXL"),
    Nixl("NIXL unprepared", prepared=False),
    # NIXL's progress threads compete with its readers where they are pinned: once more as NixlConnector sets it up.
    Nixl("NIXL unpinned", num_threads=4, is_pinned=False),
    Nixl("NIXL tcp", environment={"UCX_TLS": "tcp"}),
    Mooncake("Mooncake tcp"),
    SharedMemory("shared_memory", memory_kind="memfd"),
    ProcessVm("process_vm"),
    Tcp("tcp"),
    Tcp("tcp 2 connections", num_connections=2),
    Tcp("tcp checksum", checksum=True),
    Hccl("hccl over gloo"),
    OurMooncake("mooncake"),
)


@dataclass(frozen=True)
class Goal:
    """`ours` moves at least `factor` times as many bytes a second as the best of `others`, in the same shape."""

    ours: str
    others: tuple[str, ...]
    factor: float


_NIXL = ("NIXL", "NIXL unprepared", "NIXL unpinned")
GOALS = (
    Goal("shared_memory", ("memcpy",), 0.9),
    Goal("shared_memory", _NIXL, 1.2),
    Goal("process_vm", ("memcpy",), 0.9),
    Goal("process_vm", _NIXL, 1.2),
    Goal("tcp", ("raw tcp",), 0.9),
    Goal("tcp", ("NIXL tcp",), 1.0),
    Goal("tcp", ("Mooncake tcp",), 1.0),
)
SCATTERED_FACTOR = 0.8  # of the speed in one run of bytes, for each transport of ours

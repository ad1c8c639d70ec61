"""A worker of P in a process of its own, for tests of transports.

It serves memory with known content until its standard input closes.
"""

import contextlib
import functools
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
import torch

from kv_transfer.auth import DeploymentKey
from kv_transfer.memory import gather
from kv_transfer.memory.regions import Memory, Region, Spans
from kv_transfer.protocol import Offer, RankEndpoint
from kv_transfer.rank_server import RankClient, RankServer
from kv_transfer.transports.base import Transport
from kv_transfer.transports.hccl import HcclTransport
from kv_transfer.transports.mooncake import MooncakeTransport

KEY = DeploymentKey(b"k" * 32)
DEVICE = os.environ.get("OMNI_TEST_DEVICE", "cpu")
REGION_BYTES = (18 << 20, 256 << 10, 512 << 10)
P_SEED, D_SEED = 1, 2


@functools.cache
def content(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, sum(REGION_BYTES), dtype=np.uint8)


def make_memory(seed: int) -> Memory:
    """Regions with random content, on `DEVICE`."""
    parts = torch.from_numpy(content(seed)).split(list(REGION_BYTES))
    tensors = [part.clone().to(DEVICE) for part in parts]
    return Memory([Region(tensor.data_ptr(), tensor.numel()) for tensor in tensors], tensors)


def bytes_of(memory: Memory) -> np.ndarray:
    return torch.cat([tensor.cpu() for tensor in memory.tensors]).numpy()


def make_spans(remote: Sequence[int], local: Sequence[int], sizes: Sequence[int]) -> Spans:
    return Spans(*(np.array(numbers, dtype=np.int64) for numbers in (remote, local, sizes)))


def landed(spans: Spans) -> np.ndarray:
    """D's memory once the spans have arrived."""
    expected, sent = content(D_SEED).copy(), content(P_SEED)
    for remote, local, size in zip(spans.remote.tolist(), spans.local.tolist(), spans.sizes.tolist(), strict=True):
        expected[local : local + size] = sent[remote : remote + size]
    return expected


def load_device() -> None:
    """Make `DEVICE` known to torch; on a stand-in for CANN, give the operators used here their meaning."""
    if DEVICE != "npu":
        return
    if standin := os.environ.get("OMNI_ASCEND_STANDIN"):
        sys.path.append(standin)
    import torch_npu  # noqa: F401

    torch.npu.set_device(0)
    if standin:
        from npu_emul import EmulNPU

        gather.gather_tensor = _under(EmulNPU, gather.gather_tensor)
        gather.scatter_tensor = _under(EmulNPU, gather.scatter_tensor)


def _under(
    mode: Callable[[], contextlib.AbstractContextManager[object]], move: Callable[..., None]
) -> Callable[..., None]:
    def moved(*args: object) -> None:
        with mode():
            move(*args)

    return moved


@dataclass(frozen=True)
class PrefillRank:
    process: subprocess.Popen[bytes]
    endpoint: RankEndpoint
    offer: Offer


class _Published(msgspec.Struct):
    endpoint: RankEndpoint
    offer: Offer


@contextlib.contextmanager
def prefill_rank(kind: str, **environment: str) -> Iterator[PrefillRank]:
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, kind],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, **environment},
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        line = next((line for line in process.stdout if line.startswith(b"serves ")), None)
        assert line is not None, "the worker of P ended"
        published = msgspec.msgpack.decode(bytes.fromhex(line.split()[1].decode()), type=_Published)
        yield PrefillRank(process, published.endpoint, published.offer)
    finally:
        process.stdin.close()
        try:
            process.wait(timeout=30)  # Mooncake takes seconds to end
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise
        finally:
            process.stdout.close()


def _serve(kind: str) -> None:
    load_device()
    memory, server = make_memory(P_SEED), RankServer("127.0.0.1", KEY)
    transport: Transport = (
        HcclTransport(memory, server, RankClient(KEY))
        if kind == "hccl"
        else MooncakeTransport(memory, "127.0.0.1", required=True)
    )
    offer = transport.offer()
    assert offer is not None
    server.start()
    print("serves", msgspec.msgpack.encode(_Published(server.endpoint, offer)).hex(), flush=True)
    sys.stdin.read()
    server.close()
    transport.close()


if __name__ == "__main__":
    _serve(sys.argv[1])

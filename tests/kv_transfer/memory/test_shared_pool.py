"""torch's large byte tensors in shared memory, as vLLM allocates its KV cache."""

import os
import warnings
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from kv_transfer.memory import shared_pool
from kv_transfer.memory.regions import Memory, memory_of
from kv_transfer.memory.shared_pool import SharedPool
from kv_transfer.protocol import SharedMemoryOffer
from kv_transfer.transports.shared_memory import SharedMemoryTransport
from tests.kv_transfer.rank_peers import num_open_files
from tests.kv_transfer.transports.same_host import num_mapped

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's and vLLM's own, at import
    from vllm.v1 import kv_cache_interface as vllm_kv
    from vllm.v1.kv_cache_layout import KVCacheLayout
    from vllm.v1.worker.utils import allocate_kv_cache

LARGE = (1 << 20) + 77


@pytest.fixture
def pool() -> Iterator[SharedPool]:
    num_files, num_files_mapped = num_open_files(), num_mapped()
    pool = SharedPool()
    yield pool
    pool.close()
    assert num_mapped() == num_files_mapped
    assert num_open_files() <= num_files


def is_shared(tensor: torch.Tensor, pool: SharedPool) -> bool:
    return pool.file_of(memory_of({"0": tensor})) is not None


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(LARGE, dtype=torch.int8, device=torch.device("cpu")),  # vLLM 0.32's call
        lambda: torch.zeros(LARGE, dtype=torch.uint8),
        lambda: torch.zeros((3, LARGE), dtype=torch.uint8, device="cpu"),
        lambda: torch.zeros(3, LARGE, dtype=torch.int8),
        lambda: torch.zeros(size=(3, LARGE), dtype=torch.int8, pin_memory=False),
        lambda: torch.empty(torch.Size([LARGE]), dtype=torch.int8),
    ],
)
def test_large_byte_tensors_are_shared(pool: SharedPool, make: Any) -> None:
    plain = make()
    with pool.allocating():
        tensor = make()
    assert is_shared(tensor, pool)
    assert (tensor.shape, tensor.dtype, tensor.device) == (plain.shape, plain.dtype, plain.device)
    assert tensor.untyped_storage().nbytes() == plain.nbytes
    assert not tensor.any()
    assert tensor.data_ptr() % 4096 == 0
    tensor.fill_(3)
    file = pool.file_of(memory_of({"0": tensor}))
    assert file is not None
    assert os.pread(file.fd, 10, LARGE - 10) == b"\x03" * 10


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.zeros(100, dtype=torch.int8),
        lambda: torch.zeros(LARGE, dtype=torch.float32),
        lambda: torch.zeros(LARGE),
        lambda: torch.zeros(LARGE, dtype=torch.int8, device="meta"),
        lambda: torch.zeros(LARGE, dtype=torch.int8, out=torch.empty(0, dtype=torch.int8)),
        lambda: torch.ones(LARGE, dtype=torch.int8),
        lambda: torch.zeros(LARGE, dtype=torch.int8, layout=torch.sparse_coo),
    ],
)
def test_all_else_is_left_to_torch(pool: SharedPool, make: Any) -> None:
    with pool.allocating():
        tensor = make()
    assert (tensor.shape, tensor.dtype, tensor.device) == (make().shape, make().dtype, make().device)
    assert num_mapped() == 0


def test_outside_the_context_torch_allocates(pool: SharedPool) -> None:
    with pool.allocating():
        pass
    assert not is_shared(torch.zeros(LARGE, dtype=torch.int8), pool)


def test_in_inference_mode(pool: SharedPool) -> None:
    with torch.inference_mode(), pool.allocating():
        assert is_shared(torch.zeros(LARGE, dtype=torch.int8), pool)


def test_the_memory_lasts_as_long_as_a_tensor_uses_it(pool: SharedPool) -> None:
    with pool.allocating():
        view = torch.zeros(LARGE, dtype=torch.int8)[100:].view(torch.uint8)
    pool.close()
    assert num_mapped() == 1
    view.fill_(9)
    assert int(view.sum()) == 9 * (LARGE - 100)
    del view
    assert num_mapped() == 0


def test_only_a_whole_allocation_is_found(pool: SharedPool) -> None:
    with pool.allocating():
        first, second = (torch.zeros(LARGE, dtype=torch.int8) for _ in range(2))
    files = [pool.file_of(memory_of({"0": tensor})) for tensor in (first, second)]
    assert files[0] is not None
    assert files[1] is not None
    assert files[0] != files[1]
    assert pool.file_of(memory_of({"0": first, "1": second})) is None
    assert pool.file_of(memory_of({"0": first, "1": torch.zeros(8)})) is None
    assert pool.file_of(memory_of({})) is None
    (region,) = memory_of({"0": first}).regions
    assert pool.file_of(Memory([type(region)(region.address, region.num_bytes - 1)])) is None
    assert pool.file_of(Memory([type(region)(region.address + 1, region.num_bytes - 1)])) is None


def test_its_file_is_what_the_transport_offers(pool: SharedPool) -> None:
    with pool.allocating():
        cache = torch.zeros(LARGE, dtype=torch.int8)
    memory = memory_of({"0": cache.view(torch.uint8)})
    offer = SharedMemoryTransport(memory, pool).offer()
    assert isinstance(offer, SharedMemoryOffer)
    stat = os.stat(f"/proc/{offer.pid}/fd/{offer.fd}")
    assert (stat.st_dev, stat.st_ino, stat.st_size) == (offer.device, offer.inode, LARGE)


def test_too_little_memory_shows_at_once(pool: SharedPool) -> None:
    with pool.allocating(), pytest.raises(MemoryError):
        torch.zeros(1 << 50, dtype=torch.int8)


def test_a_system_without_such_files(pool: SharedPool, monkeypatch: pytest.MonkeyPatch, caplog: Any) -> None:
    def refuse(num_bytes: int) -> None:
        raise OSError("no unnamed files here")

    monkeypatch.setattr(shared_pool, "new_shared_file", refuse)
    with pool.allocating():
        tensor = torch.zeros(LARGE, dtype=torch.int8)
    assert not is_shared(tensor, pool)
    assert "no unnamed files here" in caplog.text
    monkeypatch.setattr(shared_pool.sys, "platform", "darwin")
    assert isinstance(pool.allocating(), nullcontext)


def test_vllms_own_allocation_is_one_file(pool: SharedPool) -> None:
    """The call that vLLM's worker makes inside the context, for a cache of two layers."""
    spec = vllm_kv.FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=64, dtype=torch.bfloat16)
    layers, num_blocks = ["0", "1"], 128
    layer_bytes = num_blocks * spec.page_size_bytes
    config = vllm_kv.KVCacheConfig(
        num_blocks=num_blocks,
        kv_cache_tensors=[
            vllm_kv.KVCacheTensor(
                size=2 * layer_bytes, layers=layers, layer_stride=layer_bytes, block_stride=spec.page_size_bytes
            )
        ],
        kv_cache_groups=[vllm_kv.KVCacheGroupSpec(layers, spec)],
    )
    with pool.allocating():
        caches = allocate_kv_cache(config, torch.device("cpu"), KVCacheLayout.LBHNC)
    assert set(caches) == set(layers)
    file = pool.file_of(memory_of(caches))
    assert file is not None
    assert file.num_bytes == 2 * layer_bytes
    caches["1"].fill_(1)
    assert os.pread(file.fd, 4, 0) == bytes(4)
    assert os.pread(file.fd, 4, layer_bytes) != bytes(4)

# ruff: noqa: N806 - tensor names carry their shape
"""Which bytes of a KV cache are a block's. Shapes: N blocks, H heads, T tokens of a block, D head dimension."""

import random

import pytest
import torch

from kv_transfer.memory import BlockMemory, Region, layout_digest, regions_of

N, H, T, D = 12, 2, 4, 8


def filled(*shape: int, dtype: torch.dtype = torch.int16) -> torch.Tensor:
    return torch.arange(torch.Size(shape).numel(), dtype=torch.int64).to(dtype).reshape(shape)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def read(memory: BlockMemory, block_ids: list[int]) -> bytes:
    return b"".join(memory.buffers(block_ids))


# --- where the blocks lie


def test_one_tensor_per_layer() -> None:
    caches = {"0": filled(N, H, T, D), "1": filled(N, H, T, D) + 1000}
    memory = BlockMemory(regions_of(caches, N))
    assert memory.num_blocks == N
    assert memory.bytes_per_block == 2 * H * T * D * 2
    assert read(memory, [3, 7]) == b"".join(bytes_of(cache_NHTD[[3, 7]]) for cache_NHTD in caches.values())


def test_keys_and_values_as_leading_axis() -> None:
    kv_2NTHD = filled(2, N, T, H, D)
    memory = BlockMemory(regions_of({"0": kv_2NTHD}, N))
    assert len(memory.regions) == 2
    assert read(memory, [3, 7]) == bytes_of(kv_2NTHD[:, [3, 7]])


def test_keys_and_values_as_a_tuple() -> None:
    k_NTHD, v_NTHD = filled(N, T, H, D), filled(N, T, H, D) + 5000
    memory = BlockMemory(regions_of({"0": (k_NTHD, v_NTHD)}, N))
    assert read(memory, [3, 7]) == bytes_of(k_NTHD[[3, 7]]) + bytes_of(v_NTHD[[3, 7]])


def test_keys_and_values_inside_the_block() -> None:
    kv_N2THD = filled(N, 2, T, H, D)
    memory = BlockMemory(regions_of({"0": kv_N2THD}, N))
    assert len(memory.regions) == 1
    assert read(memory, [11, 0]) == bytes_of(kv_N2THD[[11, 0]])


def test_a_block_whose_axes_lie_in_another_order() -> None:
    kv_NHTD = filled(N, T, H, D).permute(0, 2, 1, 3)  # as vLLM shows an NHD cache to a backend that wants HND
    memory = BlockMemory(regions_of({"0": kv_NHTD}, N))
    assert read(memory, [5]) == bytes_of(kv_NHTD.permute(0, 2, 1, 3)[5])


def test_blocks_of_several_layers_interleaved() -> None:
    kv_NLTD = filled(N, 3, T, D)
    memory = BlockMemory(regions_of({str(layer): kv_NLTD[:, layer] for layer in range(3)}, N))
    assert [region.stride_bytes // region.block_bytes for region in memory.regions] == [3, 3, 3]
    expected = b"".join(bytes_of(kv_NLTD[[4, 5, 6], layer]) for layer in range(3))
    assert read(memory, [4, 5, 6]) == expected
    assert len(memory.buffers([4, 5, 6])) == 9  # neighbours that do not touch are not merged


def test_latent_attention_pair() -> None:
    latent_NT1D, rope_NT1D = filled(N, T, 1, 16), filled(N, T, 1, 4)
    memory = BlockMemory(regions_of({"0": (latent_NT1D, rope_NT1D)}, N))
    assert [region.block_bytes for region in memory.regions] == [T * 16 * 2, T * 4 * 2]
    assert read(memory, [2]) == bytes_of(latent_NT1D[2]) + bytes_of(rope_NT1D[2])


def test_memory_shared_between_layers_counts_once() -> None:
    kv_NHTD = filled(N, H, T, D)
    shared = regions_of({"0": kv_NHTD, "1": kv_NHTD, "2": kv_NHTD.view(N, H, T, D)}, N)
    assert shared == regions_of({"0": kv_NHTD}, N)


def test_another_axis_may_be_as_long_as_the_cache() -> None:
    kv_NHTD = filled(8, 8, 8, 8)
    memory = BlockMemory(regions_of({"0": kv_NHTD}, 8))
    assert read(memory, [6]) == bytes_of(kv_NHTD[6])


def test_a_cache_of_one_block() -> None:
    kv_NHTD = filled(1, H, T, D)
    assert read(BlockMemory(regions_of({"0": kv_NHTD}, 1)), [0]) == bytes_of(kv_NHTD)


def test_blocks_that_are_not_dense_are_refused() -> None:
    gap_NHTD = filled(N, H, T, 2 * D)[..., :D]
    with pytest.raises(ValueError, match=r"KV cache of layer\.7: the bytes of one block are not contiguous"):
        regions_of({"layer.7": gap_NHTD}, N)
    repeated_NHTD = filled(N, H, T, 1).expand(N, H, T, D)
    with pytest.raises(ValueError, match="not contiguous"):
        regions_of({"0": repeated_NHTD}, N)


def test_a_cache_without_an_axis_of_blocks_is_refused() -> None:
    with pytest.raises(ValueError, match=rf"KV cache of layer\.7 has shape .*no axis counts its {N} blocks"):
        regions_of({"layer.7": filled(N + 1, H, T, D)}, N)


def test_a_region_without_bytes_is_our_own_mistake() -> None:
    with pytest.raises(AssertionError):
        Region(address=0, num_blocks=1, stride_bytes=0, block_bytes=0)
    with pytest.raises(AssertionError):
        Region(address=0, num_blocks=1, stride_bytes=8, block_bytes=16)


# --- buffers


@pytest.mark.parametrize(
    ("block_ids", "num_buffers"),
    [([], 0), ([4], 1), ([4, 5, 6], 1), ([4, 6], 2), ([6, 5, 4], 3), ([0, 1, 5, 6, 7, 2], 3), ([4, 4], 2)],
)
def test_touching_neighbours_are_one_buffer(block_ids: list[int], num_buffers: int) -> None:
    kv_NHTD = filled(N, H, T, D)
    memory = BlockMemory(regions_of({"0": kv_NHTD}, N))
    assert len(memory.buffers(block_ids)) == num_buffers
    assert read(memory, block_ids) == bytes_of(kv_NHTD[block_ids])


def test_buffers_write_into_the_tensor_and_nowhere_else() -> None:
    kv_2NTHD = filled(2, N, T, H, D)
    before = kv_2NTHD.clone()
    for buffer in BlockMemory(regions_of({"0": kv_2NTHD}, N)).buffers([2, 3, 9]):
        buffer[:] = b"\x55" * len(buffer)
    assert (kv_2NTHD[:, [2, 3, 9]] == 0x5555).all()
    others = [block for block in range(N) if block not in (2, 3, 9)]
    assert torch.equal(kv_2NTHD[:, others], before[:, others])


@pytest.mark.parametrize("block_ids", [[N], [-1], [0, 1, N], [1 << 30]])
def test_blocks_that_do_not_exist_are_refused(block_ids: list[int]) -> None:
    memory = BlockMemory(regions_of({"0": filled(N, H, T, D)}, N))
    with pytest.raises(IndexError, match=rf"0\.\.{N - 1}"):
        memory.buffers(block_ids)


def test_more_ids_than_blocks_are_refused() -> None:
    memory = BlockMemory(regions_of({"0": filled(N, H, T, D)}, N))
    assert len(memory.buffers([0] * N)) == N
    with pytest.raises(IndexError, match=f"{N + 1} block ids; there are {N} blocks"):
        memory.buffers([0] * (N + 1))


def test_every_selection_of_every_layout_is_the_same_as_indexing() -> None:
    rng = random.Random(3)
    kv_2NTHD, k_NTHD, kv_NLTD = filled(2, N, T, H, D), filled(N, T, H, D), filled(N, 3, T, D)
    memory = BlockMemory(regions_of({"a": kv_2NTHD, "b": (k_NTHD,), "c": kv_NLTD[:, 1]}, N))
    for _ in range(300):
        ids = rng.sample(range(N), rng.randint(0, N))
        expected = bytes_of(kv_2NTHD[:, ids]) + bytes_of(k_NTHD[ids]) + bytes_of(kv_NLTD[ids, 1])
        assert read(memory, ids) == expected


# --- layout digest


def test_the_digest_is_the_same_for_another_number_of_blocks() -> None:
    for one, other in [
        (filled(N, H, T, D), filled(3 * N, H, T, D)),
        (filled(2, N, H, T, D), filled(2, 3 * N, H, T, D)),
    ]:
        num_blocks = one.shape[-4]
        assert layout_digest({"0": one}, num_blocks, "cpu") == layout_digest({"0": other}, 3 * num_blocks, "cpu")


def test_the_digest_tells_layouts_apart() -> None:
    layouts = [
        ({"0": filled(N, H, T, D)}, "cpu AVX2"),
        ({"0": filled(N, H, T, D)}, "cpu AVX512"),
        ({"1": filled(N, H, T, D)}, "cpu AVX2"),
        ({"0": filled(N, H, T, D), "1": filled(N, H, T, D)}, "cpu AVX2"),
        ({"0": filled(N, H, T, D, dtype=torch.bfloat16)}, "cpu AVX2"),
        ({"0": filled(N, T, H, D)}, "cpu AVX2"),
        ({"0": filled(N, T, H, D).permute(0, 2, 1, 3)}, "cpu AVX2"),
        ({"0": filled(N, 2 * H, T, D)}, "cpu AVX2"),
        ({"0": filled(2, N, H, T, D)}, "cpu AVX2"),
        ({"0": (filled(N, H, T, D), filled(N, H, T, D))}, "cpu AVX2"),
        ({"0": filled(N, 2, H, T, D)}, "cpu AVX2"),
    ]
    digests = {layout_digest(caches, N, instruction_set) for caches, instruction_set in layouts}
    assert len(digests) == len(layouts)

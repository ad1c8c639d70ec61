"""KV cache memory as regions of equally spaced blocks.

A layer's KV cache is a tensor with one axis that counts blocks. Axes that vary slower than it (K and V as two planes)
split the tensor into regions; axes that vary faster make up one block, which must be dense. What the bytes of a block
mean is nobody's business here: P and D compare a digest of the layout before they exchange any.
"""

import ctypes
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import torch

    KVCache: TypeAlias = torch.Tensor | Sequence[torch.Tensor]


@dataclass(frozen=True)
class Region:
    """`num_blocks` blocks of `block_bytes` bytes each, `stride_bytes` apart, from `address` on."""

    address: int
    num_blocks: int
    stride_bytes: int
    block_bytes: int

    def __post_init__(self) -> None:
        assert 0 < self.block_bytes <= self.stride_bytes


def regions_of(kv_caches: Mapping[str, "KVCache"], num_blocks: int) -> tuple[Region, ...]:
    """The regions of every layer's KV cache, in the layers' order; memory shared between layers once.

    Args:
        kv_caches: layer name → tensor, or tuple of tensors (K, V), each with an axis of `num_blocks`.
        num_blocks: KV blocks of the engine.

    Raises:
        ValueError: a tensor has no axis of that size, or its blocks are not dense.
    """
    regions: dict[Region, None] = {}
    for layer, tensor in _tensors(kv_caches):
        regions.update(dict.fromkeys(_regions_of_tensor(layer, tensor, num_blocks)))
    return tuple(regions)


def layout_digest(kv_caches: Mapping[str, "KVCache"], num_blocks: int, instruction_set: str) -> str:
    """A digest of what gives meaning to a block's bytes: each layer's shape, strides and type, block count aside."""
    digest = hashlib.blake2b(instruction_set.encode(), digest_size=16)
    for layer, tensor in _tensors(kv_caches):
        block_axis = _block_axis(layer, tensor, num_blocks)
        block_stride = tensor.stride(block_axis)
        axes = [  # strides outside the blocks grow with their number, so they are left out
            (size, stride if stride < block_stride else None)
            for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True))
            if axis != block_axis
        ]
        digest.update(f"{layer} {tensor.dtype} {axes};".encode())
    return digest.hexdigest()


class BlockMemory:
    """Blocks of a set of regions as writable buffers, in the order in which they cross the wire."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions = tuple(regions)
        self.num_blocks = min((region.num_blocks for region in regions), default=0)
        self.bytes_per_block = sum(region.block_bytes for region in regions)
        self._views = [
            memoryview(
                (ctypes.c_char * (r.stride_bytes * (r.num_blocks - 1) + r.block_bytes)).from_address(r.address)
            ).cast("B")
            for r in regions
        ]

    def buffers(self, block_ids: Sequence[int]) -> list[memoryview]:
        """The memory of these blocks, region by region; neighbours that touch are one buffer.

        Raises:
            IndexError: there is no such block.
        """
        if len(block_ids) > self.num_blocks:
            raise IndexError(f"{len(block_ids)} block ids; there are {self.num_blocks} blocks")
        if any(not 0 <= block_id < self.num_blocks for block_id in block_ids):
            raise IndexError(f"block ids must lie in 0..{self.num_blocks - 1}")
        buffers = []
        for region, view in zip(self.regions, self._views, strict=True):
            touching = region.block_bytes == region.stride_bytes
            for first, last in _runs(block_ids) if touching else ((b, b) for b in block_ids):
                start = first * region.stride_bytes
                buffers.append(view[start : last * region.stride_bytes + region.block_bytes])
        return buffers


def _tensors(kv_caches: Mapping[str, "KVCache"]) -> Iterator[tuple[str, "torch.Tensor"]]:
    for layer, kv_cache in kv_caches.items():
        for tensor in kv_cache if isinstance(kv_cache, Sequence) else (kv_cache,):
            yield layer, tensor


def _runs(block_ids: Iterable[int]) -> Iterator[tuple[int, int]]:
    """Consecutive ascending ids as (first, last)."""
    first = last = None
    for block_id in block_ids:
        if last is not None and block_id == last + 1:
            last = block_id
            continue
        if first is not None and last is not None:
            yield first, last
        first = last = block_id
    if first is not None and last is not None:
        yield first, last


def _block_axis(layer: str, tensor: "torch.Tensor", num_blocks: int) -> int:
    axes = [axis for axis, size in enumerate(tensor.shape) if size == num_blocks]
    if not axes:
        raise ValueError(f"KV cache of {layer} has shape {tuple(tensor.shape)}: no axis counts its {num_blocks} blocks")
    return max(axes, key=tensor.stride)


def _regions_of_tensor(layer: str, tensor: "torch.Tensor", num_blocks: int) -> Iterator[Region]:
    block_axis = _block_axis(layer, tensor, num_blocks)
    block_stride = tensor.stride(block_axis)
    outer: list[tuple[int, int]] = []
    inner: list[tuple[int, int]] = []
    for axis, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if axis != block_axis and size > 1:
            (inner if stride < block_stride else outer).append((size, stride))
    num_elements = 1
    for size, _ in inner:
        num_elements *= size
    if sum((size - 1) * stride for size, stride in inner) + 1 != num_elements:
        raise ValueError(f"KV cache of {layer}: the bytes of one block are not contiguous (strides {tensor.stride()})")
    item_bytes = tensor.element_size()
    offsets = [0]
    for size, stride in outer:
        offsets = [offset + index * stride for offset in offsets for index in range(size)]
    for offset in sorted(offsets):
        yield Region(
            address=tensor.data_ptr() + offset * item_bytes,
            num_blocks=num_blocks,
            stride_bytes=block_stride * item_bytes,
            block_bytes=num_elements * item_bytes,
        )

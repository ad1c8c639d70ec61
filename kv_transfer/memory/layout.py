"""Where the KV of each token, head and layer lies in a worker's memory: tensors described as planes of runs of bytes.

Axes: B blocks, H KV heads of this rank, N tokens of a block (or fewer states, where a state covers several tokens),
C content of one token and head (K and V, or a latent), D head dimension.

vLLM shows every layer as one tensor [B, H, N, C] of any strides; vLLM-Ascend as a tuple of [B, N, H, D], K and V, or
the parts of a latent.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from kv_transfer.memory.regions import Memory, tensors_of
from kv_transfer.protocol import LayerLayout, Plane, RankLayout

if TYPE_CHECKING:
    import torch
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

    from kv_transfer.memory.regions import KVCache


@dataclass(frozen=True, kw_only=True)
class LayerFormat:
    """What a layer's tensors do not say of themselves."""

    group: int  # KV cache group
    num_heads: int  # the model's KV heads that lie here
    first_head: int  # the first of them
    order: str = "by token"  # of the bytes of one block and head: a key of `ORDERS`
    heads_apart: bool = True  # False: the tensor's axis H counts parts (as K and V) of all heads together
    instruction_set: str = ""  # where that decides the order too


@dataclass(frozen=True, kw_only=True)
class Slab:
    """One block of one head, as its tensor says. In bytes, but for `num_states` and the tokens."""

    block_tokens: int
    num_states: int
    state_stride: int
    state_bytes: int
    element_bytes: int

    @property
    def is_dense(self) -> bool:
        return self.num_states == 1 or self.state_stride == self.state_bytes


@dataclass(frozen=True, kw_only=True)
class Grid:
    """The rows and units of a plane within one block and head; the fields are those of `Plane`."""

    offset: int = 0
    num_rows: int = 1
    row_stride: int = 0
    unit_tokens: int
    unit_stride: int
    unit_bytes: int


def _by_token(slab: Slab) -> tuple[Grid, ...]:
    """One token after the other, all of a token together."""
    unit_tokens = slab.block_tokens // slab.num_states
    return (Grid(unit_tokens=unit_tokens, unit_stride=slab.state_stride, unit_bytes=slab.state_bytes),)


def _whole_blocks(slab: Slab) -> tuple[Grid, ...]:
    """In an order that we do not know: moved as one."""
    num_bytes = slab.num_states * slab.state_bytes
    return (Grid(unit_tokens=slab.block_tokens, unit_stride=num_bytes, unit_bytes=num_bytes),)


def _cpu_columns(slab: Slab) -> tuple[Grid, ...]:
    """vLLM's CPU kernels "vec" and "vec16": all K as [D, N], then all V as [N, D] (vllm csrc/cpu/cpu_attn_vec.hpp)."""
    element, column = slab.element_bytes, slab.block_tokens * slab.element_bytes
    v_bytes = slab.state_bytes // 2  # of a token, like K's
    k_rows = v_bytes // element
    return (
        Grid(num_rows=k_rows, row_stride=column, unit_tokens=1, unit_stride=element, unit_bytes=element),
        Grid(offset=k_rows * column, unit_tokens=1, unit_stride=v_bytes, unit_bytes=v_bytes),
    )


def _cpu_amx(slab: Slab) -> tuple[Grid, ...]:
    """vLLM's CPU kernel "amx": all K as [N / 16, D / p, 16, p], then all V as [D / 16, N / p, 16, p], p being 2 or what
    4 bytes hold: 16 tokens lie together in both (vllm csrc/cpu/cpu_attn_amx.hpp)."""
    k_bytes = slab.state_bytes // 2  # of a token, like V's
    k_unit, v_unit = 16 * k_bytes, 16 * 16 * slab.element_bytes
    v_rows, v_row = k_unit // v_unit, slab.block_tokens // 16 * v_unit
    return (
        Grid(unit_tokens=16, unit_stride=k_unit, unit_bytes=k_unit),
        Grid(
            offset=v_rows * v_row,
            num_rows=v_rows,
            row_stride=v_row,
            unit_tokens=16,
            unit_stride=v_unit,
            unit_bytes=v_unit,
        ),
    )


ORDERS: Mapping[str, Callable[[Slab], tuple[Grid, ...]]] = {
    "by token": _by_token,
    "whole blocks": _whole_blocks,
    "CPU columns": _cpu_columns,
    "CPU AMX tiles": _cpu_amx,
}
_CPU_ORDERS = {"vec": "CPU columns", "vec16": "CPU columns", "amx": "CPU AMX tiles"}  # the others: whole blocks


def first_head(num_heads: int, total_heads: int, tp_rank: int, tp_size: int) -> int:
    """The first of the model's `total_heads` KV heads that lies on a rank which holds `num_heads` of them.

    Heads are split among the ranks in order; with fewer heads than ranks, neighbouring ranks hold the same one.

    Raises:
        ValueError: the two numbers contradict each other, so that replicas cannot be told from parts.
    """
    if num_heads > 1 or tp_size == 1:
        return tp_rank * num_heads
    if total_heads > tp_size:
        raise ValueError(f"one KV head on each of {tp_size} ranks, of {total_heads} in the model")
    return tp_rank * total_heads // tp_size


def rank_layout(
    kv_caches: "Mapping[str, KVCache]",
    memory: Memory,
    *,
    num_blocks: int,
    block_sizes: Sequence[int],
    formats: Mapping[str, LayerFormat],
) -> RankLayout:
    """Describe one worker's KV caches.

    Args:
        kv_caches: layer name → tensor [B, H, N, C], or tuple of tensors [B, N, H, C].
        memory: in which they lie.
        num_blocks: blocks that block tables count; tensors may have more and smaller ones.
        block_sizes: tokens in such a block, for each KV cache group.
        formats: layer name → what its tensors do not say.

    Raises:
        ValueError: a layer's cache cannot be described; the message names it.
    """
    layers = []
    described = set()
    for name in sorted(kv_caches, key=_place):
        kv_cache, layer = kv_caches[name], formats[name]
        tensors = [t.transpose(1, 2) for t in kv_cache] if isinstance(kv_cache, Sequence) else [kv_cache]
        block_size = block_sizes[layer.group]
        try:
            planes = tuple(p for t in tensors for p in _planes(t, memory, num_blocks, block_size, layer))
        except ValueError as error:
            raise ValueError(f"KV transfer cannot move the KV cache of layer {name}: {error}") from None
        if (layer.group, planes) in described:  # a layer that shares another's cache
            continue
        described.add((layer.group, planes))
        element_types = "+".join(dict.fromkeys(str(t.dtype).removeprefix("torch.") for t in tensors))
        encoding = f"{element_types} {layer.order} {layer.instruction_set} {sys.byteorder}-endian"
        encoding = " ".join(encoding.split())
        layers.append(
            LayerLayout(name=name, group=layer.group, encoding=encoding, first_head=layer.first_head, planes=planes)
        )
    return RankLayout(block_sizes=tuple(block_sizes), layers=tuple(layers))


def engine_rank_layout(
    vllm_config: "VllmConfig", kv_cache_config: "KVCacheConfig", kv_caches: "Mapping[str, KVCache]", memory: Memory
) -> RankLayout:
    """`rank_layout` with what vLLM knows of this worker's caches. Call it when vLLM registers them.

    Raises:
        ValueError: like `rank_layout`; also where the engine splits a prompt's tokens among ranks, or a cache holds
            something else than attention's keys and values.
    """
    parallel = vllm_config.parallel_config
    if parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1:
        raise ValueError("KV transfer needs all tokens of a head on one rank: set the context parallel sizes to 1")
    groups = kv_cache_config.kv_cache_groups
    formats = {}
    for index, group in enumerate(groups):
        specs = getattr(group.kv_cache_spec, "kv_cache_specs", None)
        for name in group.layer_names:
            spec = group.kv_cache_spec if specs is None else specs[name]
            formats[name] = _format(vllm_config, name, index, spec)
    known = {name: kv_cache for name, kv_cache in kv_caches.items() if name in formats}
    addresses = {tensor.data_ptr() for tensor in tensors_of(known.values())}
    for name, kv_cache in kv_caches.items():  # a layer that shares another's cache may be in no group
        if any(tensor.data_ptr() not in addresses for tensor in tensors_of([kv_cache])):
            raise ValueError(f"KV transfer cannot move the cache of layer {name}: it is in no KV cache group")
    return rank_layout(
        known,
        memory,
        num_blocks=kv_cache_config.num_blocks,
        block_sizes=[group.kv_cache_spec.block_size for group in groups],
        formats=formats,
    )


def _planes(
    tensor_BHNC: "torch.Tensor",  # noqa: N803 - shape suffix
    memory: Memory,
    num_blocks: int,
    block_size: int,
    layer: LayerFormat,
) -> list[Plane]:
    if tensor_BHNC.dim() != 4:
        raise ValueError(f"its tensor has {tensor_BHNC.dim()} axes, not 4")
    num_kernel_blocks, num_parts, num_states, content = tensor_BHNC.shape
    split = num_kernel_blocks // num_blocks
    element_bytes = tensor_BHNC.element_size()
    block_stride, part_stride, state_stride, content_stride = (s * element_bytes for s in tensor_BHNC.stride())
    slab = Slab(
        block_tokens=block_size // max(split, 1),
        num_states=num_states,
        state_stride=state_stride,
        state_bytes=content * element_bytes,
        element_bytes=element_bytes,
    )
    if split * num_blocks != num_kernel_blocks or block_size % split or slab.block_tokens % num_states:
        raise ValueError(f"its shape {tuple(tensor_BHNC.shape)} is not {num_blocks} blocks of {block_size} tokens")
    if layer.heads_apart and num_parts != layer.num_heads:
        raise ValueError(f"its shape {tuple(tensor_BHNC.shape)} does not have {layer.num_heads} heads")
    if content_stride != element_bytes or not (layer.order == "by token" or slab.is_dense):
        raise ValueError(f"its strides {tensor_BHNC.stride()} leave gaps between a token's bytes")
    planes = []
    for grid in ORDERS[layer.order](slab):
        assert layer.heads_apart or grid.num_rows == 1
        planes.append(
            Plane(
                offset=memory.offset_of(tensor_BHNC.data_ptr()) + grid.offset,
                num_blocks=num_kernel_blocks,
                block_stride=block_stride,
                split=split,
                num_heads=num_parts if layer.heads_apart else 1,
                head_stride=part_stride if layer.heads_apart else 0,
                num_rows=grid.num_rows if layer.heads_apart else num_parts,
                row_stride=grid.row_stride if layer.heads_apart else part_stride,
                unit_tokens=grid.unit_tokens,
                unit_stride=grid.unit_stride,
                unit_bytes=grid.unit_bytes,
            )
        )
    return planes


def _format(vllm_config: "VllmConfig", name: str, group: int, spec: Any) -> LayerFormat:
    import torch
    from vllm.platforms import current_platform
    from vllm.v1.kv_cache_interface import (
        ChunkedLocalAttentionSpec,
        FullAttentionSpec,
        KVQuantMode,
        MLAAttentionSpec,
        SlidingWindowMLASpec,
        SlidingWindowSpec,
    )

    if not isinstance(spec, FullAttentionSpec | SlidingWindowSpec | ChunkedLocalAttentionSpec):
        raise ValueError(f"KV transfer cannot move the cache of layer {name}: it is a {type(spec).__name__}")
    parallel = vllm_config.parallel_config
    is_latent = isinstance(spec, MLAAttentionSpec | SlidingWindowMLASpec)
    total_heads = spec.max_tp_shards or (1 if is_latent else _total_heads(vllm_config, name))
    tp_size = parallel.tensor_parallel_size
    # Formats that are not simply elements may keep, at a block's end, what belongs to all of its tokens.
    elements = spec.dtype.is_floating_point or spec.kv_quant_mode is KVQuantMode.FP8_PER_TENSOR
    is_plain = (elements and spec.state_content_bytes is None) or spec.kv_quant_mode.is_per_token_head
    order, instruction_set = ("by token" if is_plain else "whole blocks"), ""
    if current_platform.is_cpu() and not is_latent:
        isa = vllm_config.compilation_config.static_forward_context[name].isa
        order = _CPU_ORDERS.get(isa, "whole blocks")
        instruction_set = "" if isa in _CPU_ORDERS else f"{isa} {torch.backends.cpu.get_cpu_capability()}"
    return LayerFormat(
        group=group,
        num_heads=spec.num_kv_heads,
        first_head=first_head(spec.num_kv_heads, total_heads, parallel.rank % tp_size, tp_size),
        order=order,
        heads_apart=spec.num_head_slots is None,
        instruction_set=instruction_set,
    )


def _total_heads(vllm_config: "VllmConfig", name: str) -> int:
    """KV heads of a layer in all ranks together; some models have more in some layers."""
    arch = vllm_config.model_config.model_arch_config
    index = next(iter(_place(name)), 0)
    overrides = arch.per_layer_overrides
    total: int = (arch if overrides is None or index >= len(overrides) else arch[index]).total_num_kv_heads
    return total


def _place(name: str) -> list[int]:
    """Sorts layers by the numbers in their names, which is the order in which they are computed."""
    return [int(number) for number in re.findall(r"\d+", name)]

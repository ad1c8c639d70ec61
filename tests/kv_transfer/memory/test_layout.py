# ruff: noqa: N803, N806 - tensor names carry their shape
"""How a worker's tensors are described; and that the CPU kernels of vLLM keep KV where we say they do."""

import warnings
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from kv_transfer.errors import PeerRefusedError
from kv_transfer.memory.copy_plan import plan_copies
from kv_transfer.memory.layout import LayerFormat, engine_rank_layout, first_head, rank_layout
from kv_transfer.memory.regions import memory_of
from kv_transfer.protocol import Plane, RankLayout

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's and vLLM's own, at import
    import vllm._custom_ops as ops
    from vllm.v1 import kv_cache_interface as vllm_kv
    from vllm.v1.worker.utils import allocate_kv_cache

B, H, N, D = 9, 2, 32, 16
LAYER = "model.layers.0.attn"


def layout_of(
    *tensors: torch.Tensor, num_blocks: int = B, block_size: int = N, num_heads: int = H, **format_: Any
) -> RankLayout:
    """Of one layer: a tensor, or several as a tuple."""
    caches = {LAYER: tensors if len(tensors) > 1 else tensors[0]}
    layer = LayerFormat(**{"group": 0, "num_heads": num_heads, "first_head": 0, **format_})
    return rank_layout(
        caches, memory_of(caches), num_blocks=num_blocks, block_sizes=[block_size], formats={LAYER: layer}
    )


def planes_of(*tensors: torch.Tensor, **kwargs: Any) -> tuple[Plane, ...]:
    return layout_of(*tensors, **kwargs).layers[0].planes


# --- heads


@pytest.mark.parametrize(
    ("here", "total", "tp_size", "expected"),
    [
        (8, 8, 1, [0]),
        (1, 8, 1, [0]),  # a draft model's: fewer heads than the model's
        (4, 8, 2, [0, 4]),
        (1, 8, 8, list(range(8))),
        (1, 2, 8, [0, 0, 0, 0, 1, 1, 1, 1]),
        (1, 1, 4, [0, 0, 0, 0]),  # also a latent
        (2, 16, 4, [0, 2, 4, 6]),  # likewise
    ],
)
def test_heads_are_split_in_order_and_then_repeated(here: int, total: int, tp_size: int, expected: list[int]) -> None:
    assert [first_head(here, total, rank, tp_size) for rank in range(tp_size)] == expected


def test_heads_of_which_replicas_cannot_be_told_from_parts() -> None:
    with pytest.raises(ValueError, match="one KV head on each of 4 ranks, of 16 in the model"):
        first_head(1, 16, 0, 4)


# --- tensors


def test_one_tensor_of_keys_and_values() -> None:
    (plane,) = planes_of(torch.zeros(B, N, H, 2 * D, dtype=torch.int16).transpose(1, 2))
    assert plane == Plane(
        offset=0,
        num_blocks=B,
        block_stride=N * H * 2 * D * 2,
        num_heads=H,
        head_stride=2 * D * 2,
        num_rows=1,
        row_stride=0,
        unit_tokens=1,
        unit_stride=H * 2 * D * 2,
        unit_bytes=2 * D * 2,
    )


def test_keys_and_values_in_memory_of_their_own() -> None:
    k_BNHD, v_BNHD = torch.zeros(B, N, H, D), torch.zeros(B, N, H, D)
    first, second = sorted((k_BNHD, v_BNHD), key=torch.Tensor.data_ptr)
    planes = planes_of(first, second)
    assert [plane.offset for plane in planes] == [0, B * N * H * D * 4]
    assert [plane.offset for plane in planes_of(second, first)] == [B * N * H * D * 4, 0]
    assert all(p.num_heads == H and p.head_stride == D * 4 and p.unit_stride == H * D * 4 for p in planes)


def test_a_latent_in_two_parts() -> None:
    planes = planes_of(torch.zeros(B, N, 1, 512), torch.zeros(B, N, 1, 64), num_heads=1)
    assert [plane.unit_bytes for plane in planes] == [512 * 4, 64 * 4]


def test_kernel_blocks_smaller_than_the_block_tables() -> None:
    (plane,) = planes_of(torch.zeros(B * 4, H, N // 4, 2 * D))
    assert (plane.num_blocks, plane.split, plane.unit_tokens) == (B * 4, 4, 1)
    assert plane.block_stride == H * N // 4 * 2 * D * 4


def test_a_state_for_several_tokens() -> None:
    (plane,) = planes_of(torch.zeros(B, 1, N // 4, D), num_heads=1)
    assert (plane.unit_tokens, plane.unit_bytes, plane.unit_stride) == (4, D * 4, D * 4)


def test_whole_blocks_fit_blocks_of_the_same_size_only() -> None:
    whole = layout_of(torch.zeros(B, H, N, 2 * D), order="whole blocks")
    assert whole.layers[0].planes[0].unit_tokens == N
    (plan,) = plan_copies(whole, [whole], 0)
    assert plan.spans([[3, 1]], [[2, 4]], 0, 33).sizes.tolist() == [H * N * 2 * D * 4] * 2
    larger = layout_of(torch.zeros(B, H, 2 * N, 2 * D), block_size=2 * N, order="whole blocks")
    with pytest.raises(PeerRefusedError, match="with the same attention backend, block size"):
        plan_copies(whole, [larger], 0)


def test_heads_that_lie_together_fit_the_same_split_only() -> None:
    """[B, 2, N, heads and D]: K of all heads, then V of all heads."""

    def engine(tp_size: int) -> list[RankLayout]:
        heads = 4 // tp_size
        content = torch.zeros(B, 2, N, heads * D)
        return [
            layout_of(content, num_heads=heads, first_head=rank * heads, heads_apart=False) for rank in range(tp_size)
        ]

    for tp_size in (1, 2, 4):
        for rank, local in enumerate(engine(tp_size)):
            (plan,) = plan_copies(local, engine(tp_size), rank)
            assert plan.source == rank
            assert plan.spans([[3]], [[2]], 0, N).num_bytes == 2 * N * (4 // tp_size) * D * 4
    for prefill, decode in ((1, 2), (2, 1), (4, 1), (2, 4)):
        with pytest.raises(PeerRefusedError):
            plan_copies(engine(decode)[decode - 1], engine(prefill), decode - 1)


def test_layers_in_the_order_of_computing_and_shared_caches_once() -> None:
    caches = {f"model.layers.{i}.attn": torch.zeros(B, H, N, 2 * D) for i in (10, 2, 9)}
    caches["model.layers.11.attn"] = caches["model.layers.9.attn"]  # shares its cache
    caches["model.layers.12.attn"] = caches["model.layers.2.attn"]  # the same memory, for blocks of another group
    groups = {"model.layers.12.attn": 1}
    layout = rank_layout(
        caches,
        memory_of(caches),
        num_blocks=B,
        block_sizes=[N, N],
        formats={name: LayerFormat(group=groups.get(name, 0), num_heads=H, first_head=0) for name in caches},
    )
    assert [(layer.name.split(".")[2], layer.group) for layer in layout.layers] == [
        ("2", 0),
        ("9", 0),
        ("10", 0),
        ("12", 1),
    ]


@pytest.mark.parametrize(
    ("tensor", "format_", "why"),
    [
        (torch.zeros(2, B, H, N, D), {}, "its tensor has 5 axes, not 4"),
        (torch.zeros(B + 1, H, N, D), {}, "is not 9 blocks of 32 tokens"),
        (torch.zeros(B - 1, H, N, D), {}, "is not 9 blocks of 32 tokens"),
        (torch.zeros(B, H, N - 2, D), {}, "is not 9 blocks of 32 tokens"),
        (torch.zeros(B * 3, H, N, D), {}, "is not 9 blocks of 32 tokens"),
        (torch.zeros(B, H + 1, N, D), {}, "does not have 2 heads"),
        (torch.zeros(B, H, N, D, 2)[..., 0], {}, "leave gaps"),
        (torch.zeros(B, N, H, D).transpose(1, 2), {"order": "whole blocks"}, "leave gaps"),
    ],
)
def test_tensors_that_cannot_be_described(tensor: torch.Tensor, format_: dict[str, str], why: str) -> None:
    with pytest.raises(ValueError, match=rf"the KV cache of layer {LAYER}: .*{why}"):
        layout_of(tensor, **format_)


# --- vLLM's CPU kernels


def cpu_cache(
    isa: str, block_size: int, split: int, slots: torch.Tensor, k_THD: torch.Tensor, v_THD: torch.Tensor, fp8: bool
) -> torch.Tensor:
    """A cache that vLLM's own kernel has written tokens to, as bytes."""
    num_heads, head_dim = k_THD.shape[1:]
    dtype = torch.uint8 if fp8 else k_THD.dtype
    cache = torch.zeros(B * split, num_heads, block_size // split, 2 * head_dim, dtype=dtype)
    k_cache, v_cache = cache.view(B * split, num_heads, 2 * (block_size // split), head_dim).chunk(2, dim=2)
    kv_cache_dtype = "fp8_e4m3" if fp8 else "auto"
    ops.cpu_attn_reshape_and_cache(k_THD, v_THD, k_cache, v_cache, slots, isa, kv_cache_dtype=kv_cache_dtype)
    return cache


@pytest.mark.parametrize(
    ("isa", "order", "head_dim", "block_sizes", "splits", "dtype", "fp8"),
    [
        ("vec", "CPU columns", 64, (32, 32), (1, 1), torch.float32, False),
        ("vec", "CPU columns", 64, (64, 32), (1, 1), torch.bfloat16, False),
        ("vec", "CPU columns", 32, (32, 96), (1, 1), torch.float16, False),
        ("vec", "CPU columns", 32, (128, 64), (4, 1), torch.float32, False),
        ("vec", "CPU columns", 64, (64, 32), (1, 1), torch.bfloat16, True),
        ("vec16", "CPU columns", 80, (16, 48), (1, 1), torch.float32, False),
        ("amx", "CPU AMX tiles", 64, (32, 64), (1, 1), torch.bfloat16, False),
        ("amx", "CPU AMX tiles", 64, (128, 32), (2, 1), torch.float32, False),
        ("amx", "CPU AMX tiles", 64, (64, 32), (1, 1), torch.bfloat16, True),
    ],
)
def test_what_the_cpu_kernels_write_is_moved_to_where_they_would_write_it(
    isa: str,
    order: str,
    head_dim: int,
    block_sizes: tuple[int, int],
    splits: tuple[int, int],
    dtype: torch.dtype,
    fp8: bool,
) -> None:
    """P holds four heads, D the last two of them; the blocks of the prompt are all filled."""
    num_tokens = max(block_sizes) * 2
    generator = torch.Generator().manual_seed(1)
    # eighths up to 4: every element type keeps them as they are
    k_THD, v_THD = (torch.randint(-8, 8, (2, num_tokens, 4, head_dim), generator=generator) / 8).to(dtype)
    caches, layouts, tables = [], [], []
    for block_size, split, heads in zip(block_sizes, splits, (slice(0, 4), slice(2, 4)), strict=True):
        num_blocks = num_tokens // block_size
        table = torch.randperm(B - 1, generator=generator)[:num_blocks] + 1
        token = torch.arange(num_tokens)
        slots = table[token // block_size] * block_size + token % block_size
        k, v = k_THD[:, heads].contiguous(), v_THD[:, heads].contiguous()
        cache = cpu_cache(isa, block_size, split, slots, k, v, fp8)
        caches.append(cache)
        layouts.append(
            layout_of(cache, block_size=block_size, num_heads=k.shape[1], first_head=heads.start, order=order)
        )
        tables.append([table.tolist()])
    source = caches[0].view(torch.uint8).flatten()
    target = torch.zeros_like(caches[1]).view(torch.uint8).flatten()
    (plan,) = plan_copies(layouts[1], layouts[:1], 0)
    spans = plan.spans(*tables, 0, num_tokens)
    for remote, local, size in zip(spans.remote.tolist(), spans.local.tolist(), spans.sizes.tolist(), strict=True):
        target[local : local + size] = source[remote : remote + size]
    assert torch.equal(target, caches[1].view(torch.uint8).flatten())
    assert target.count_nonzero() > 0


# --- what vLLM knows

FULL = vllm_kv.FullAttentionSpec(block_size=N, num_kv_heads=H, head_size=D, dtype=torch.float32)
LATENT = vllm_kv.MLAAttentionSpec(block_size=N, num_kv_heads=1, head_size=D, dtype=torch.float32, max_tp_shards=1)
WINDOW = vllm_kv.SlidingWindowSpec(block_size=N, num_kv_heads=H, head_size=D, dtype=torch.float32, sliding_window=2 * N)


class Arch(SimpleNamespace):
    """Like vLLM's: of one layer, where layers differ."""

    def __getitem__(self, layer: int) -> "Arch":
        return Arch(**{**vars(self), **self.per_layer_overrides[layer]})


def vllm_config(
    layers: Sequence[str] = (LAYER,),
    *,
    rank: int = 0,
    tp_size: int = 1,
    total_heads: int = H,
    per_layer: list[dict[str, int]] | None = None,
    isa: str = "vec",
    dcp_size: int = 1,
    pcp_size: int = 1,
) -> Any:
    return SimpleNamespace(
        parallel_config=SimpleNamespace(
            rank=rank,
            tensor_parallel_size=tp_size,
            decode_context_parallel_size=dcp_size,
            prefill_context_parallel_size=pcp_size,
        ),
        model_config=SimpleNamespace(
            model_arch_config=Arch(total_num_kv_heads=total_heads, per_layer_overrides=per_layer)
        ),
        compilation_config=SimpleNamespace(static_forward_context=dict.fromkeys(layers, SimpleNamespace(isa=isa))),
    )


def cache_config(groups: dict[vllm_kv.KVCacheSpec, Sequence[str]]) -> vllm_kv.KVCacheConfig:
    """Groups overlay each other, as vLLM lays them."""
    tensors = [
        vllm_kv.KVCacheTensor(
            max(s.page_size_bytes * B * len(n) for s, n in groups.items()),
            list(names),
            layer_stride=spec.page_size_bytes * B,
            block_stride=spec.page_size_bytes,
        )
        for spec, names in groups.items()
    ]
    return vllm_kv.KVCacheConfig(
        num_blocks=B,
        kv_cache_tensors=tensors,
        kv_cache_groups=[vllm_kv.KVCacheGroupSpec(list(names), spec) for spec, names in groups.items()],
    )


def engine_layout(config: Any, spec: vllm_kv.KVCacheSpec, *tensors: torch.Tensor) -> RankLayout:
    """Of an engine of one layer, or with as many tensors as layers."""
    caches = {f"model.layers.{i}.attn": tensor for i, tensor in enumerate(tensors)}
    return engine_rank_layout(config, cache_config({spec: list(caches)}), caches, memory_of(caches))


@pytest.fixture
def no_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vllm.platforms.current_platform.is_cpu", lambda: False)


@pytest.mark.parametrize("kernel_block_size", [N, N // 2])
@pytest.mark.usefixtures("no_cpu")
def test_what_vllm_allocates_is_where_the_planes_say(kernel_block_size: int) -> None:
    names = [f"model.layers.{i}.attn" for i in range(4)]
    config = cache_config({FULL: names[::2], WINDOW: names[1::2]})
    caches = allocate_kv_cache(config, torch.device("cpu"), vllm_kv.KVCacheLayout.LBNHC, [kernel_block_size] * 2)
    memory = memory_of(caches)
    layout = engine_rank_layout(vllm_config(names, rank=5, tp_size=4, total_heads=8), config, caches, memory)
    assert layout.block_sizes == (N, N)
    assert [(layer.name, layer.group, layer.first_head) for layer in layout.layers] == [
        (name, i % 2, 2) for i, name in enumerate(names)
    ]
    for layer in layout.layers:
        (plane,) = layer.planes
        assert plane.split == N // kernel_block_size
        view_BHNC = caches[layer.name]
        blocks, heads, tokens = np.indices(view_BHNC.shape[:3])
        offsets = plane.offset + blocks * plane.block_stride + heads * plane.head_stride + tokens * plane.unit_stride
        strides = [stride * 4 for stride in view_BHNC.stride()]
        addresses = view_BHNC.data_ptr() + blocks * strides[0] + heads * strides[1] + tokens * strides[2]
        np.testing.assert_array_equal(memory.addresses(offsets.ravel()), addresses.ravel())


@pytest.mark.parametrize(
    ("isa", "encoding"),
    [
        ("vec", "float32 CPU columns little-endian"),
        ("vec16", "float32 CPU columns little-endian"),
        ("amx", "float32 CPU AMX tiles little-endian"),
        ("neon", f"float32 whole blocks neon {torch.backends.cpu.get_cpu_capability()} little-endian"),
    ],
)
def test_the_order_of_the_cpu_kernel(isa: str, encoding: str) -> None:
    layout = engine_layout(vllm_config(isa=isa), FULL, torch.zeros(B, H, N, 2 * D))
    assert layout.layers[0].encoding == encoding


def test_a_latent_is_kept_by_token_also_on_a_cpu_and_whole_on_every_rank() -> None:
    for rank in range(4):
        layout = engine_layout(vllm_config(rank=rank, tp_size=4, total_heads=16), LATENT, torch.zeros(B, 1, N, D))
        assert (layout.layers[0].first_head, layout.layers[0].encoding) == (0, "float32 by token little-endian")


def test_layers_of_one_group_with_specs_of_their_own() -> None:
    names = ["model.layers.0.attn", "model.layers.1.attn"]
    wide = vllm_kv.FullAttentionSpec(block_size=N, num_kv_heads=1, head_size=2 * D, dtype=torch.float32)
    group = vllm_kv.UniformTypeKVCacheSpecs(block_size=N, kv_cache_specs=dict(zip(names, (FULL, wide), strict=True)))
    caches = {names[0]: torch.zeros(B, H, N, 2 * D), names[1]: torch.zeros(B, 1, N, 4 * D)}
    config = vllm_config(names, rank=3, tp_size=4, total_heads=8, per_layer=[{}, {"total_num_kv_heads": 2}])
    layout = engine_rank_layout(
        config,
        vllm_kv.KVCacheConfig(B, [], [vllm_kv.KVCacheGroupSpec(names, group)]),
        caches,
        memory_of(caches),
    )
    assert [layer.first_head for layer in layout.layers] == [6, 1]  # of 8 heads; of 2, each on two ranks


@pytest.mark.parametrize(
    ("changes", "order"),
    [
        ({}, "by token"),
        ({"dtype": torch.uint8}, "whole blocks"),  # as an indexer's keys, with their scales at the block's end
        ({"dtype": torch.uint8, "kv_quant_mode": vllm_kv.KVQuantMode.FP8_PER_TENSOR}, "by token"),
        ({"state_content_bytes": 2 * D * 4, "kv_quant_mode": vllm_kv.KVQuantMode.NVFP4}, "whole blocks"),
        ({"state_content_bytes": 2 * D * 4, "kv_quant_mode": vllm_kv.KVQuantMode.INT8_PER_TOKEN_HEAD}, "by token"),
    ],
)
@pytest.mark.usefixtures("no_cpu")
def test_the_order_of_other_formats(changes: dict[str, Any], order: str) -> None:
    fields: dict[str, Any] = {"dtype": torch.float32, **changes}
    spec = vllm_kv.FullAttentionSpec(block_size=N, num_kv_heads=H, head_size=D, **fields)
    layout = engine_layout(vllm_config(), spec, torch.zeros(B, H, N, 2 * D))
    assert order in layout.layers[0].encoding


@pytest.mark.usefixtures("no_cpu")
def test_slots_that_are_not_heads() -> None:
    spec = vllm_kv.FullAttentionSpec(block_size=N, num_kv_heads=H, head_size=D, dtype=torch.float32, num_head_slots=2)
    (plane,) = engine_layout(vllm_config(), spec, torch.zeros(B, 2, N, H * D)).layers[0].planes
    assert (plane.num_heads, plane.num_rows, plane.row_stride) == (1, 2, N * H * D * 4)


def test_caches_that_are_no_attentions() -> None:
    mamba = vllm_kv.MambaSpec(block_size=N, shapes=((4,),), dtypes=(torch.float32,))
    cross = vllm_kv.CrossAttentionSpec(block_size=N, num_kv_heads=H, head_size=D, dtype=torch.float32)
    for spec in (mamba, cross):
        with pytest.raises(ValueError, match=f"the cache of layer {LAYER}: it is a {type(spec).__name__}"):
            engine_layout(vllm_config(), spec, torch.zeros(B, H, N, 2 * D))


@pytest.mark.parametrize("sizes", [{"dcp_size": 2}, {"pcp_size": 2}])
def test_tokens_split_among_ranks(sizes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="set the context parallel sizes to 1"):
        engine_layout(vllm_config(**sizes), FULL, torch.zeros(B, H, N, 2 * D))


def test_a_layer_of_no_group_shares_anothers_cache_or_is_refused() -> None:
    caches = {LAYER: torch.zeros(B, H, N, 2 * D)}
    caches["model.layers.1.attn"] = caches[LAYER]
    config = cache_config({FULL: [LAYER]})
    layout = engine_rank_layout(vllm_config(), config, caches, memory_of(caches))
    assert [layer.name for layer in layout.layers] == [LAYER]
    caches["model.layers.2.attn"] = torch.zeros(B, H, N, 2 * D)
    with pytest.raises(ValueError, match=r"the cache of layer model\.layers\.2\.attn: it is in no KV cache group"):
        engine_rank_layout(vllm_config(), config, caches, memory_of(caches))

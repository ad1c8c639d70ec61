"""Tiny random models for tests: the same bytes on every machine, made in well under a second.

A byte is a token: token ids 0..255 are the bytes, then come the special tokens. The output layer is zero but for the
printable ASCII bytes, so that a generation is readable, never ends by itself, and one token is one character.
Weights are drawn so that the choice of the next token depends on the whole prompt, and the best logit leads by far more
than float32 noise; in bfloat16 two engines may still differ after some tokens.
"""

import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from omni.deployment.hf_folder import Uint16Array, to_bfloat16, write_config, write_tokenizer, write_weights

if TYPE_CHECKING:
    import tokenizers

_SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_PAD, _END = 256, 258
_MAX_LENGTH = 4096  # tokens
_PRINTABLE = slice(32, 127)

_CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_HIDDEN, _INTERMEDIATE, _VOCABULARY = 128, 256, 256 + len(_SPECIAL_TOKENS)
_NUM_DENSE_LAYERS, _NUM_MOE_LAYERS = 4, 2
_NUM_HEADS, _NUM_KV_HEADS, _HEAD_DIM = 4, 2, 32
_NUM_EXPERTS, _EXPERT_INTERMEDIATE = 4, 64

_SHARED_CONFIG = {
    "vocab_size": _VOCABULARY,
    "hidden_size": _HIDDEN,
    "intermediate_size": _INTERMEDIATE,
    "num_attention_heads": _NUM_HEADS,
    "num_key_value_heads": _NUM_KV_HEADS,
    "head_dim": _HEAD_DIM,
    "attention_bias": False,
    "max_position_embeddings": _MAX_LENGTH,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "use_sliding_window": False,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": _END,
    "pad_token_id": _PAD,
}
# Qwen3 and not Qwen2: for a qwen2 model, transformers puts Qwen's own tokenizer rules in the place of ours.
_DENSE_CONFIG = _SHARED_CONFIG | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": _NUM_DENSE_LAYERS,
}
_MOE_CONFIG = _SHARED_CONFIG | {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_hidden_layers": _NUM_MOE_LAYERS,
    "num_experts": _NUM_EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": _EXPERT_INTERMEDIATE,
    "decoder_sparse_step": 1,
    "norm_topk_prob": True,
    "mlp_only_layers": [],
}

_Shapes = dict[str, tuple[int, ...]]


def build_dense(folder: Path) -> None:
    """Qwen3, 4 layers, 4 query and 2 KV heads of 32; `folder` exists and is empty."""
    shapes = _model_shapes(_NUM_DENSE_LAYERS, _mlp_shapes("mlp", _INTERMEDIATE))
    _write(folder, _DENSE_CONFIG, shapes)


def build_moe(folder: Path) -> None:
    """Qwen3-MoE, 2 layers, 2 of 4 experts for each token; `folder` exists and is empty."""
    mlp: _Shapes = {"mlp.gate.weight": (_NUM_EXPERTS, _HIDDEN)}
    for expert in range(_NUM_EXPERTS):
        mlp |= _mlp_shapes(f"mlp.experts.{expert}", _EXPERT_INTERMEDIATE)
    _write(folder, _MOE_CONFIG, _model_shapes(_NUM_MOE_LAYERS, mlp))


def _write(folder: Path, config: Mapping[str, object], shapes: _Shapes) -> None:
    write_config(folder, config)
    write_weights(folder, {name: _random_weight(name, shape) for name, shape in shapes.items()})
    write_tokenizer(
        folder,
        _byte_tokenizer(),
        special_tokens={"eos_token": _SPECIAL_TOKENS[_END - 256], "pad_token": _SPECIAL_TOKENS[_PAD - 256]},
        chat_template=_CHAT_TEMPLATE,
        max_length=_MAX_LENGTH,
    )


def _model_shapes(num_layers: int, mlp: _Shapes) -> _Shapes:
    query, key_value = _NUM_HEADS * _HEAD_DIM, _NUM_KV_HEADS * _HEAD_DIM
    layer: _Shapes = {
        "input_layernorm.weight": (_HIDDEN,),
        "self_attn.q_proj.weight": (query, _HIDDEN),
        "self_attn.k_proj.weight": (key_value, _HIDDEN),
        "self_attn.v_proj.weight": (key_value, _HIDDEN),
        "self_attn.q_norm.weight": (_HEAD_DIM,),
        "self_attn.k_norm.weight": (_HEAD_DIM,),
        "self_attn.o_proj.weight": (_HIDDEN, query),
        "post_attention_layernorm.weight": (_HIDDEN,),
        **mlp,
    }
    return {
        "model.embed_tokens.weight": (_VOCABULARY, _HIDDEN),
        **{f"model.layers.{i}.{name}": shape for i in range(num_layers) for name, shape in layer.items()},
        "model.norm.weight": (_HIDDEN,),
        "lm_head.weight": (_VOCABULARY, _HIDDEN),
    }


def _mlp_shapes(prefix: str, intermediate: int) -> _Shapes:
    return {
        f"{prefix}.gate_proj.weight": (intermediate, _HIDDEN),
        f"{prefix}.up_proj.weight": (intermediate, _HIDDEN),
        f"{prefix}.down_proj.weight": (_HIDDEN, intermediate),
    }


def _random_weight(name: str, shape: tuple[int, ...]) -> Uint16Array:
    """One tensor; its random stream depends on its name alone, so that a new tensor leaves the others as they were."""
    import numpy as np

    if name.endswith("norm.weight"):
        # q and k above 1: attention picks out a few tokens instead of averaging all, and the text repeats less.
        scale = 1.4 if name.endswith(("q_norm.weight", "k_norm.weight")) else 1.0
        return to_bfloat16(np.full(shape, scale, np.float32))
    # The legacy generator: numpy promises that its stream never changes.
    values = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape)
    if name == "model.embed_tokens.weight":
        scale = 1.0
    elif name == "lm_head.weight":
        scale = 3.0 / shape[1] ** 0.5  # logits of standard deviation 3
        values[: _PRINTABLE.start] = 0
        values[_PRINTABLE.stop :] = 0
    else:
        scale = 1.0 / shape[1] ** 0.5
    return to_bfloat16((values * scale).astype(np.float32))


def _byte_tokenizer() -> "tokenizers.Tokenizer":
    """A BPE without merges over the byte-level alphabet."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokenizer = Tokenizer(models.BPE({character: byte for byte, character in enumerate(_byte_characters())}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in _SPECIAL_TOKENS])
    return tokenizer


def _byte_characters() -> list[str]:
    """The character that stands for each byte in byte-level BPE (`bytes_to_unicode` in OpenAI's GPT-2 encoder.py)."""
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    substitutes = iter(range(256, 512))
    return [chr(byte if byte in visible else next(substitutes)) for byte in range(256)]

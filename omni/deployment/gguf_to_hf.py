"""A Llama model in a GGUF file (llama.cpp's format) becomes a Hugging Face folder in bfloat16.

The tokenizer is built here as well: transformers' own GGUF reader drops the splitting of numbers into digits and takes
longer than the whole conversion.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omni.deployment.hf_folder import Float32Array, to_bfloat16, write_config, write_tokenizer, write_weights

if TYPE_CHECKING:
    import tokenizers

_CONTROL_TOKEN = 3  # gguf.TokenType.CONTROL: a special token

_TENSOR_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_BLOCK_TENSOR_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def convert_llama(gguf_file: Path, folder: Path) -> None:
    """Writes the model of `gguf_file` into `folder`, which exists and is empty.

    Raises ValueError when the file holds another architecture or tokenizer than Llama with byte-level BPE.
    """
    import gguf

    reader = gguf.GGUFReader(gguf_file)
    metadata = {name: field.contents() for name, field in reader.fields.items()}
    kind = (metadata["general.architecture"], metadata["tokenizer.ggml.model"], metadata["tokenizer.ggml.pre"])
    if kind != ("llama", "gpt2", "smollm"):
        raise ValueError(f"{gguf_file}: cannot convert {kind}; only SmolLM2-like models: (llama, gpt2, smollm)")

    config = _llama_config(
        metadata, tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors)
    )
    write_config(folder, config)
    write_weights(folder, {name: to_bfloat16(values) for name, values in _weights(reader, config)})
    tokens = metadata["tokenizer.ggml.tokens"]
    write_tokenizer(
        folder,
        _smollm_tokenizer(metadata),
        special_tokens={
            role: tokens[metadata[f"tokenizer.ggml.{key}_token_id"]]
            for role, key in {
                "bos_token": "bos",
                "eos_token": "eos",
                "pad_token": "padding",
                "unk_token": "unknown",
            }.items()
        },
        chat_template=metadata["tokenizer.chat_template"],
        max_length=metadata["llama.context_length"],
    )


def hf_tensor_name(gguf_name: str) -> str:
    """`blk.3.attn_q.weight` → `model.layers.3.self_attn.q_proj.weight`."""
    match gguf_name.split("."):
        case ["blk", layer, part, kind]:
            return f"model.layers.{layer}.{_BLOCK_TENSOR_NAMES[part]}.{kind}"
        case [part, kind]:
            return f"{_TENSOR_NAMES[part]}.{kind}"
        case _:
            raise ValueError(f"unknown GGUF tensor name: {gguf_name}")


def unpermute_rotary(rows: Float32Array, num_heads: int) -> Float32Array:
    """Undoes llama.cpp's reordering of the q and k projections; `rows` is [num_heads * head_dim, hidden].

    llama.cpp rotates neighbouring pairs, Hugging Face the two halves of a head. The reordering is `permute` in
    llama.cpp's convert_hf_to_gguf.py (class LlamaModel); this is its inverse.
    """
    pairs = rows.reshape(num_heads, rows.shape[0] // num_heads // 2, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def _llama_config(metadata: dict[str, Any], *, tie_word_embeddings: bool) -> dict[str, Any]:
    num_heads = metadata["llama.attention.head_count"]
    hidden_size = metadata["llama.embedding_length"]
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": metadata["llama.vocab_size"],
        "hidden_size": hidden_size,
        "intermediate_size": metadata["llama.feed_forward_length"],
        "num_hidden_layers": metadata["llama.block_count"],
        "num_attention_heads": num_heads,
        "num_key_value_heads": metadata["llama.attention.head_count_kv"],
        "head_dim": hidden_size // num_heads,
        "max_position_embeddings": metadata["llama.context_length"],
        # Six digits undo the detour through float32: 9.999999747378752e-06 is 1e-5.
        "rms_norm_eps": float(f"{metadata['llama.attention.layer_norm_rms_epsilon']:.6g}"),
        "rope_theta": float(f"{metadata['llama.rope.freq_base']:.6g}"),
        "rope_scaling": None,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": tie_word_embeddings,
        "bos_token_id": metadata["tokenizer.ggml.bos_token_id"],
        "eos_token_id": metadata["tokenizer.ggml.eos_token_id"],
        "pad_token_id": metadata["tokenizer.ggml.padding_token_id"],
    }


def _weights(reader: Any, config: dict[str, Any]) -> Iterator[tuple[str, Float32Array]]:
    import gguf

    num_heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for tensor in reader.tensors:
        name = hf_tensor_name(tensor.name)
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        projection = name.split(".")[-2]
        yield name, unpermute_rotary(values, num_heads[projection]) if projection in num_heads else values


def _smollm_tokenizer(metadata: dict[str, Any]) -> "tokenizers.Tokenizer":
    """Byte-level BPE over single digits, as in SmolLM2's own tokenizer.json; no token is added at the beginning."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE({token: token_id for token_id, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    token_types = metadata["tokenizer.ggml.token_type"]
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, token_type in zip(tokens, token_types, strict=True)
            if token_type == _CONTROL_TOKEN
        ]
    )
    return tokenizer

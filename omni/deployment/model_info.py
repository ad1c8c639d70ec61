"""A model folder's facts that decide memory: how large the weights are and how many bytes a token's KV takes."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omni.deployment.errors import ConfigError, Problem

FIELD = "services.model_path"
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}

# The names models use, in the order in which vLLM asks for them.
_KV_HEADS = ("n_head_kv", "num_kv_heads", "num_key_value_heads", "multi_query_group_num", "num_attention_groups")
_HEADS = ("num_attention_heads", "n_head")
_LAYERS = ("num_hidden_layers", "n_layer")
_HIDDEN = ("hidden_size", "n_embd")
_EXPERTS = ("num_experts", "moe_num_experts", "n_routed_experts", "num_local_experts")
_LENGTH = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
# Where vLLM looks for the number of layers for multi-token prediction (vllm/config/speculative.py).
_MTP_LAYERS = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
# There it takes one for granted in these models.
_WITH_MTP = ("dots3_note", "longcat_flash", "step3p5", "step3p7", "minimax_m3", "mimo_v2", "mimov2")
# Rope types whose max_position_embeddings is the stretched length (vllm/config/model.py).
_ROPE_COUNTED_IN = ("su", "longrope", "llama3", "yarn", "deepseek_yarn", "deepseek_llama_scaling")


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    path: Path
    weight_bytes: int  # as stored
    stored_dtype: str
    is_quantized: bool
    num_layers: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int | None  # tokens; None: the model names no limit
    is_moe: bool
    is_known: bool = True  # False: the folder is not on this machine, and all else is made up
    num_heads: int = 0  # of attention; 0: not known
    num_mtp_layers: int = 0  # for multi-token prediction
    mla_width: int = 0  # elements of the compressed KV of one token and layer; 0: ordinary attention

    def weight_bytes_as(self, dtype: str) -> int:
        """The weights in memory when they are computed in `dtype`; quantised ones stay as they are."""
        if self.is_quantized:
            return self.weight_bytes
        return self.weight_bytes * DTYPE_BYTES[dtype] // DTYPE_BYTES.get(self.stored_dtype, 2)

    def kv_bytes_per_token(self, dtype: str, tp: int) -> int:
        """KV bytes of one token on one TP rank. MLA's compressed KV is the same, whole, on every rank."""
        if self.mla_width:
            return self.num_layers * self.mla_width * DTYPE_BYTES[dtype]
        heads = max(1, self.num_kv_heads // tp)  # with more ranks than heads, ranks hold copies
        return 2 * self.num_layers * heads * self.head_dim * DTYPE_BYTES[dtype]


def unknown_model(folder: Path) -> ModelInfo:
    """For a folder that is on other hosts alone. They plan with what they read there."""
    return ModelInfo(
        path=folder,
        weight_bytes=0,
        stored_dtype="bfloat16",
        is_quantized=False,
        num_layers=0,
        num_kv_heads=0,
        head_dim=0,
        max_position_embeddings=None,
        is_moe=False,
        is_known=False,
    )


def read_model_info(folder: Path) -> ModelInfo:
    """Reads config.json and the sizes of the weight files.

    Raises:
        ConfigError: the folder, its config.json or its weights are missing or unreadable.
    """
    whole = _read_config(folder)
    nested = whole.get("text_config")
    config = whole | nested if isinstance(nested, dict) else whole  # multimodal models keep theirs in text_config
    layers, heads, hidden = (_first(config, names) for names in (_LAYERS, _HEADS, _HIDDEN))
    if not layers or not heads or not hidden:
        names = "num_hidden_layers, num_attention_heads or hidden_size"
        raise _error(f"{folder / 'config.json'} lacks {names}", "use a Hugging Face model folder")
    lora_rank = _first(config, ("kv_lora_rank",))
    return ModelInfo(
        path=folder,
        weight_bytes=_weight_bytes(folder),
        stored_dtype=_dtype(config),
        is_quantized="quantization_config" in config,
        num_layers=layers,
        num_kv_heads=_first(config, _KV_HEADS) or heads,
        head_dim=_first(config, ("head_dim", "hidden_size_per_head")) or hidden // heads,
        max_position_embeddings=_max_length(config),
        is_moe=bool(_first(config, _EXPERTS)),
        num_heads=heads,
        num_mtp_layers=_num_mtp_layers(whole, config),
        mla_width=lora_rank + (_first(config, ("qk_rope_head_dim",)) or 0) if lora_rank else 0,
    )


def _read_config(folder: Path) -> dict[str, Any]:
    mend = "write the path of a Hugging Face model folder, or embedded:smollm2-135m"
    if not folder.is_dir():
        raise _error(f"{folder} is not a folder", mend)
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise _error(f"{folder} holds no config.json", mend) from None
    except OSError as error:
        raise _error(f"{path} cannot be read ({error.strerror})", "make it a file you may read") from None
    except ValueError as error:
        raise _error(f"{path} is not JSON ({error})", "download or convert the model again") from None
    if not isinstance(config, dict):
        raise _error(f"{path} is not a JSON object", "download or convert the model again")
    return config


def _weight_bytes(folder: Path) -> int:
    for pattern in ("*.safetensors", "*.bin"):  # vLLM's order: it reads the second only without the first
        files = sorted(folder.glob(pattern))
        # Mistral's folders hold the same weights twice; either copy alone is what gets loaded.
        sharded = [file for file in files if not file.name.startswith("consolidated")]
        if files:
            return sum(file.stat().st_size for file in sharded or files)
    raise _error(f"{folder} holds no weights (*.safetensors or *.bin)", "download or convert the model again")


def _first(config: dict[str, Any], names: tuple[str, ...]) -> int | None:
    for name in names:
        value = config.get(name)
        if isinstance(value, list) and value:  # one entry per layer or modality
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _num_mtp_layers(whole: dict[str, Any], config: dict[str, Any]) -> int:
    nested = whole.get("mtp_config")
    for block in (config, nested if isinstance(nested, dict) else {}):
        if any(name in block for name in _MTP_LAYERS):
            return _first(block, _MTP_LAYERS) or 0
    architectures = whole.get("architectures")
    first = architectures[0] if isinstance(architectures, list) and architectures else ""
    names = (str(whole.get("model_type", "")), str(first).lower())
    return int(any(name.startswith(_WITH_MTP) for name in names))


def _dtype(config: dict[str, Any]) -> str:
    name = config.get("dtype") or config.get("torch_dtype") or "float32"  # transformers 5 writes dtype
    return str(name).removeprefix("torch.")


def _max_length(config: dict[str, Any]) -> int | None:
    """The model's longest sequence, by vLLM's rule: a rope factor stretches it, unless it is counted in already."""
    length = _first(config, _LENGTH)
    rope = config.get("rope_parameters") or config.get("rope_scaling")
    if length is None or not isinstance(rope, dict) or not isinstance(rope.get("factor"), int | float):
        return length
    is_counted_in = rope.get("rope_type", rope.get("type")) in _ROPE_COUNTED_IN
    return length if is_counted_in else int(length * rope["factor"])


def _error(text: str, mend: str) -> ConfigError:
    return ConfigError([Problem(FIELD, text, mend)])

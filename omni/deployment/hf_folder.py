"""Writing a Hugging Face model folder without torch or transformers, whose imports take longer than the writing."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing
    import tokenizers

Float32Array: TypeAlias = "np.typing.NDArray[np.float32]"
Uint16Array: TypeAlias = "np.typing.NDArray[np.uint16]"


def to_bfloat16(values: Float32Array) -> Uint16Array:
    """The bit patterns of bfloat16, which numpy lacks: rounded to nearest, ties to even. No NaNs."""
    import numpy as np

    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounding = ((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF)
    return ((bits + rounding) >> np.uint32(16)).astype(np.uint16)


def write_weights(folder: Path, weights: Mapping[str, Uint16Array]) -> None:
    """Writes `model.safetensors`; `weights` are bfloat16 bit patterns by Hugging Face name.

    The format (https://huggingface.co/docs/safetensors): the header's length in 8 bytes, a JSON header, the tensors.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, values in weights.items():
        header[name] = {"dtype": "BF16", "shape": values.shape, "data_offsets": [offset, offset + values.nbytes]}
        offset += values.nbytes
    header_bytes = json.dumps(header).encode()
    header_bytes += b" " * (-len(header_bytes) % 8)  # tensors begin on a multiple of 8 bytes
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(header_bytes).to_bytes(8, "little"))
        file.write(header_bytes)
        for values in weights.values():
            file.write(values.astype("<u2", copy=False).tobytes())


def write_config(folder: Path, config: Mapping[str, object]) -> None:
    """Writes `config.json`, and `generation_config.json` with its end-of-sequence and padding tokens."""
    write_json(folder / "config.json", {"dtype": "bfloat16", "use_cache": True} | dict(config))
    token_ids = {key: config[key] for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(folder / "generation_config.json", token_ids)


def write_tokenizer(
    folder: Path,
    tokenizer: "tokenizers.Tokenizer",
    *,
    special_tokens: Mapping[str, str],
    chat_template: str,
    max_length: int,
) -> None:
    """Writes the tokenizer files and the chat template.

    `special_tokens` goes from role ("eos_token", ...) to token; `max_length` is the longest prompt, in tokens.
    """
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": max_length,
            "clean_up_tokenization_spaces": False,
        }
        | dict(special_tokens),
    )
    (folder / "chat_template.jinja").write_text(chat_template, encoding="utf-8")


def write_json(path: Path, value: Mapping[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")

"""What a model folder's files say about memory."""

import re
from pathlib import Path
from typing import Any

import pytest

from omni.deployment.errors import ConfigError
from omni.deployment.model_info import read_model_info

from .samples import model, model_folder


def test_an_ordinary_model(tmp_path: Path) -> None:
    info = read_model_info(model_folder(tmp_path))
    assert (info.weight_bytes, info.stored_dtype, info.num_layers, info.num_kv_heads) == (1000, "bfloat16", 2, 4)
    assert (info.head_dim, info.max_position_embeddings, info.is_moe) == (8, 512, False)


def test_weights_at_the_dtype_in_use() -> None:
    assert model(weight_bytes=100).weight_bytes_as("float32") == 200
    assert model(weight_bytes=100).weight_bytes_as("float16") == 100
    assert model(weight_bytes=100, stored_dtype="float32").weight_bytes_as("bfloat16") == 50
    assert model(weight_bytes=100, is_quantized=True).weight_bytes_as("float32") == 100


def test_kv_of_a_token() -> None:
    assert model().kv_bytes_per_token("bfloat16", 1) == 23040  # SmolLM2: measured
    assert model().kv_bytes_per_token("float32", 1) == 46080
    assert model(num_kv_heads=4).kv_bytes_per_token("bfloat16", 2) == 2 * 30 * 2 * 64 * 2
    assert model(num_kv_heads=2).kv_bytes_per_token("bfloat16", 8) == 2 * 30 * 1 * 64 * 2
    assert model(mla_width=576).kv_bytes_per_token("bfloat16", 4) == 30 * 576 * 2


def test_names_that_models_use(tmp_path: Path) -> None:
    config = {"torch_dtype": "float16", "dtype": None, "num_key_value_heads": None, "head_dim": 16}
    info = read_model_info(model_folder(tmp_path, **config, n_routed_experts=8, kv_lora_rank=512, qk_rope_head_dim=64))
    assert (info.stored_dtype, info.num_kv_heads, info.head_dim) == ("float16", 8, 16)
    assert (info.is_moe, info.mla_width) == (True, 576)


def test_a_quantised_model(tmp_path: Path) -> None:
    assert not read_model_info(model_folder(tmp_path)).is_quantized
    assert read_model_info(model_folder(tmp_path, quantization_config={"quant_method": "fp8"})).is_quantized


def test_zero_means_not_given(tmp_path: Path) -> None:
    info = read_model_info(model_folder(tmp_path, head_dim=0, num_experts=0, num_local_experts=4))
    assert (info.head_dim, info.is_moe) == (8, True)


def test_a_nested_text_config(tmp_path: Path) -> None:
    info = read_model_info(model_folder(tmp_path, text_config={"num_hidden_layers": 7, "num_experts": [4, 4]}))
    assert (info.num_layers, info.is_moe) == (7, True)


@pytest.mark.parametrize(
    ("rope", "length"),
    [
        ({"rope_type": "linear", "factor": 4.0}, 2048),
        ({"type": "dynamic", "factor": 2}, 1024),
        ({"rope_type": "yarn", "factor": 4.0}, 512),
        ({"rope_type": "llama3", "factor": 8.0}, 512),
        ({"rope_type": "default"}, 512),
        (None, 512),
    ],
)
def test_the_longest_sequence(tmp_path: Path, rope: object, length: int) -> None:
    assert read_model_info(model_folder(tmp_path, rope_scaling=rope)).max_position_embeddings == length


def test_which_weight_files_count(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    (folder / "pytorch_model.bin").write_bytes(b"\0" * 7)
    (folder / "consolidated.safetensors").write_bytes(b"\0" * 999)
    assert read_model_info(folder).weight_bytes == 1000
    (folder / "model.safetensors").unlink()
    assert read_model_info(folder).weight_bytes == 999
    (folder / "consolidated.safetensors").unlink()
    assert read_model_info(folder).weight_bytes == 7


def test_what_is_missing(tmp_path: Path) -> None:
    def refusal(folder: Path) -> str:
        with pytest.raises(ConfigError, match=r"^services\.model_path: ") as caught:
            read_model_info(folder)
        return str(caught.value)

    mend = "; write the path of a Hugging Face model folder, or embedded:smollm2-135m"
    assert refusal(tmp_path / "no") == f"services.model_path: {tmp_path / 'no'} is not a folder{mend}"
    assert refusal(tmp_path) == f"services.model_path: {tmp_path} holds no config.json{mend}"
    folder = model_folder(tmp_path / "model")
    (folder / "model.safetensors").unlink()
    assert re.search(r"holds no weights \(\*\.safetensors or \*\.bin\); download", refusal(folder))
    (folder / "config.json").write_text("{")
    assert "config.json is not JSON (Expecting" in refusal(folder)
    (folder / "config.json").write_text("[]")
    assert "config.json is not a JSON object; download or convert" in refusal(folder)
    (folder / "config.json").write_text("{}")
    assert "lacks num_hidden_layers, num_attention_heads or hidden_size; use a Hugging Face" in refusal(folder)
    (folder / "config.json").unlink()
    (folder / "config.json").mkdir()
    assert "config.json cannot be read (Is a directory); make it a file you may read" in refusal(folder)


@pytest.mark.parametrize(
    ("config", "number"),
    [
        ({}, 0),
        ({"num_nextn_predict_layers": 1}, 1),
        ({"text_config": {"mtp_num_hidden_layers": 2}}, 2),
        ({"num_mtp_modules": 3}, 3),
        ({"mtp_config": {"num_nextn_predict_layers": 8}}, 8),
        # vLLM takes one for granted.
        ({"model_type": "longcat_flash"}, 1),
        ({"model_type": "longcat_flash", "num_nextn_predict_layers": 0}, 0),
        ({"architectures": ["MiMoV2FlashForCausalLM"]}, 1),
        ({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}, 0),
    ],
)
def test_layers_for_multi_token_prediction(tmp_path: Path, config: dict[str, Any], number: int) -> None:
    assert read_model_info(model_folder(tmp_path, **config)).num_mtp_layers == number


def test_attention_heads(tmp_path: Path) -> None:
    assert read_model_info(model_folder(tmp_path)).num_heads == 8

"""Deployment files, a machine and models for the tests of this folder."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

from omni.deployment.deployment_file import load_deployment
from omni.deployment.errors import ConfigError
from omni.deployment.machine import Machine
from omni.deployment.memory import GIB
from omni.deployment.model import Deployment
from omni.deployment.model_info import ModelInfo
from omni.deployment.plan import make_plan
from omni.deployment.plan_types import LaunchPlan

FIELD_FILE = Path(__file__).with_name("field_4p1d.yml")  # as users of this field write it; accepted unchanged


def machine(*, cores: int = 2, gib: float = 24.0, flags: tuple[str, ...] = ("avx512_bf16",)) -> Machine:
    return Machine(
        cores=tuple(range(cores)),
        available_bytes=int(gib * GIB),
        total_bytes=int(gib * GIB),
        cpu_flags=frozenset(flags),
        addresses=frozenset({"localhost", "127.0.0.1", "0.0.0.0", "198.51.100.7"}),
    )


def model(**changes: Any) -> ModelInfo:
    """SmolLM2-135M's sizes."""
    facts: dict[str, Any] = {
        "path": Path("/models/smollm2"),
        "weight_bytes": 270_000_000,
        "stored_dtype": "bfloat16",
        "is_quantized": False,
        "num_layers": 30,
        "num_kv_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "is_moe": False,
    }
    return ModelInfo(**(facts | changes))


def content(prefill: int = 1, decode: int = 1) -> dict[str, Any]:
    """A deployment file's content, to be changed before it is written."""
    return {
        "deployment": {
            "prefill": {f"group{i + 1}": {"base_api_port": 9000 + 10 * i} for i in range(prefill)},
            "decode": {f"group{i + 1}": {"base_api_port": 9500 + 10 * i} for i in range(decode)},
            "proxy": {"listen_port": 7000},
        },
        "services": {"model_path": "/models/smollm2", "prefill": {}, "decode": {}},
    }


def put(data: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """`data` with `value` at a/path/with/slashes."""
    block = data
    *parents, last = path.split("/")
    for parent in parents:
        block = block.setdefault(parent, {})
    block[last] = value
    return data


def loaded(folder: Path, data: dict[str, Any]) -> Deployment:
    file = folder / "trial.yaml"
    file.write_text(yaml.safe_dump(data))
    return load_deployment(file)


def planned(
    folder: Path, data: dict[str, Any], *, on: Machine | None = None, of: ModelInfo | None = None
) -> LaunchPlan:
    return make_plan(loaded(folder, data), of or model(), on or machine(), config_file=folder / "trial.yaml")


def model_folder(folder: Path, **config: Any) -> Path:
    """A folder with a config.json and 1000 bytes of weights."""
    folder.mkdir(exist_ok=True)
    facts: dict[str, Any] = {
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "hidden_size": 64,
    }
    facts |= {"max_position_embeddings": 512, "dtype": "bfloat16"} | config
    (folder / "config.json").write_text(json.dumps(facts))
    (folder / "model.safetensors").write_bytes(b"\0" * 1000)
    return folder


def lines(error: ConfigError) -> list[str]:
    """The text of each problem, without file and line: those are test_line_numbers' matter."""
    return [line for problem in error.problems for line in str(replace(problem, place="")).splitlines()]

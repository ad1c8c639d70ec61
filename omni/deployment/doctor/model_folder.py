"""The model's folder: all of its weights are there and whole, and it has what serving needs besides."""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

from omni.deployment.doctor.finding import Finding, of_problems, ok, problem, warning
from omni.deployment.errors import ConfigError
from omni.deployment.machine import Machine
from omni.deployment.memory import GIB
from omni.deployment.model import EMBEDDED, Platform
from omni.deployment.model_info import DTYPE_BYTES, ModelInfo, read_model_info

_INDEXES: Final = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_TOKENIZERS: Final = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "tekken.json", "vocab.json")
_LFS_POINTER: Final = b"version "  # what a clone without git-lfs leaves in a weight file's place
_MOST_HEADER_BYTES: Final = 100_000_000  # of the safetensors format
_AGAIN: Final = "download the model again: hf download MODEL --local-dir"


def model_findings(written: str, machine: Machine, platform: Platform, dtype: str) -> Iterator[Finding]:
    """`written` is services.model_path, and `dtype` services.dtype."""
    if written.startswith(EMBEDDED):
        yield from _embedded(written.removeprefix(EMBEDDED))
        return
    folder = Path(written).expanduser().absolute()
    try:
        info = read_model_info(folder)
    except ConfigError as error:
        yield from of_problems("model", error.problems)
        return
    bad_files = [*_index_findings(folder), *_file_findings(folder)]
    yield from bad_files
    if not bad_files:
        yield ok("model", str(folder), f"weights whole, {info.weight_bytes / GIB:.2f} GiB as {info.stored_dtype}")
    yield from _tokenizer_findings(folder)
    yield from _size_findings(info, machine, platform, dtype)


def _embedded(name: str) -> Iterator[Finding]:
    # Imported here: most deployments need neither the converters nor what they import.
    from omni.deployment.embedded_model import EMBEDDED_MODELS, embedded_model_path

    if name not in EMBEDDED_MODELS:
        mend = f"write one of {', '.join(EMBEDDED + known for known in EMBEDDED_MODELS)}"
        yield problem("model", "services.model_path", f"there is no embedded model {name!r}", mend)
        return
    folder = embedded_model_path(name)
    state = f"in {folder}" if folder.is_dir() else f"is made in {folder} when first needed"
    yield ok("model", EMBEDDED + name, state)


def _index_findings(folder: Path) -> Iterator[Finding]:
    """Weight files that the index names and that are not there."""
    for index in (folder / name for name in _INDEXES):
        if not index.is_file():
            continue
        try:
            files = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
            missing = [name for name in files if not (folder / name).is_file()]
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            yield problem("model", str(index), f"is no index of weights ({error!r:.80})", f"{_AGAIN} {folder}")
            continue
        if missing:
            found = f"names {len(files)} files; not there: {_some(missing)}"
            yield problem("model", str(index), found, f"{_AGAIN} {folder}")
        return  # vLLM reads the first kind that is there


def _file_findings(folder: Path) -> Iterator[Finding]:
    for path in sorted(folder.glob("*.safetensors")):
        if (wrong := _safetensors_fault(path)) is not None:
            yield problem("model", str(path), wrong, f"{_AGAIN} {folder}")


def _safetensors_fault(path: Path) -> str | None:
    """What is wrong with the file, by its header alone: where its tensors end is where it must end.

    The format: https://huggingface.co/docs/safetensors
    """
    try:
        with path.open("rb") as file:
            start = file.read(8)
            if start == _LFS_POINTER:
                return "is a Git LFS pointer, not the weights: git lfs pull"
            num_bytes = int.from_bytes(start, "little")
            if len(start) < 8 or num_bytes > min(_MOST_HEADER_BYTES, path.stat().st_size):
                return "is not a safetensors file"
            header: dict[str, Any] = json.loads(file.read(num_bytes))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except (ValueError, LookupError, TypeError, AttributeError):
        return "is not a safetensors file"
    expected, present = 8 + num_bytes + max(ends, default=0), path.stat().st_size
    return None if present == expected else f"has {present} bytes of {expected}: the download was cut off"


def _tokenizer_findings(folder: Path) -> Iterator[Finding]:
    if not any((folder / name).is_file() for name in _TOKENIZERS):
        found = f"holds no tokenizer ({', '.join(_TOKENIZERS[:3])})"
        yield warning("model", str(folder), found, f"{_AGAIN} {folder}; or name one: extra_args --tokenizer")


def _size_findings(info: ModelInfo, machine: Machine, platform: Platform, dtype: str) -> Iterator[Finding]:
    """Whether one engine's weights fit at all. With a plan, `omni.deployment.checks` counts every engine."""
    if platform != "cpu":
        return  # each device holds a part, which vLLM measures
    chosen = machine.cpu_dtype() if dtype == "auto" else dtype
    needed_bytes = info.weight_bytes_as(chosen)
    found = f"{needed_bytes / GIB:.2f} GiB in {chosen}; {machine.available_bytes / GIB:.1f} GiB is available"
    if needed_bytes > machine.available_bytes:
        yield problem("memory", "one engine's weights", found, "use a smaller model, or end other programs")
    elif chosen != info.stored_dtype and not info.is_quantized and DTYPE_BYTES[chosen] == 4:
        mend = "write services.dtype: bfloat16 to halve them; this processor computes that slowly"
        yield warning("model", "one engine's weights", f"{found} (stored as {info.stored_dtype})", mend)


def _some(names: Sequence[str], most: int = 3) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return f"{', '.join(names[:most])}{more}"

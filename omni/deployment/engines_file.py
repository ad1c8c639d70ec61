"""Which engines a running deployment has: a file in its run folder, between `omni_cli scale` and the engine host.

The engine host writes what it starts with. `omni_cli scale` writes what there shall be and sends SIGUSR1: the host then
starts what is new and stops what is gone.
"""

import os
from pathlib import Path
from typing import Any, Final

import msgspec

from omni.deployment.plan_types import ProcessPlan
from omni.deployment.run_state import RunFolder

_NAME: Final = "engines.json"
Engines = tuple[ProcessPlan, ...]


def write_engines(folder: RunFolder, engines: Engines) -> None:
    """Replace the file whole. Raises OSError."""
    folder.make()
    temporary = folder.path / f".{_NAME}.{os.getpid()}"
    temporary.touch(0o600)  # environments have tokens in them
    temporary.write_bytes(msgspec.json.encode(engines, enc_hook=str))  # paths
    temporary.replace(folder.path / _NAME)


def read_engines(folder: RunFolder) -> Engines | None:
    """None: there is none, or not of this version."""
    try:
        return msgspec.json.decode((folder.path / _NAME).read_bytes(), type=Engines, dec_hook=_decoded)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None


def _decoded(kind: type, value: Any) -> object:
    if kind is Path:
        return Path(value)
    raise NotImplementedError(kind)

"""Every test of the command line has states, and a configuration of its own."""

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def state_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "state"
    monkeypatch.setenv("OMNI_STATE_DIR", str(folder))
    monkeypatch.setenv("COLUMNS", "160")
    return folder

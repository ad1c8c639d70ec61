from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def state_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's state, with the deployment key, for one test."""
    folder = tmp_path / "state"
    monkeypatch.setenv("OMNI_STATE_DIR", str(folder))
    return folder

"""Requests to start a process of a running deployment again: an empty file in its run folder for each.

`omni_cli restart` writes them and sends SIGUSR1 to the supervisor of the process, which takes them.
"""

from omni.deployment.run_state import RunFolder


def ask_for_restart(folder: RunFolder, name: str) -> None:
    """Raises OSError."""
    folder.path.mkdir(parents=True, exist_ok=True)
    (folder.path / f"{name}.restart").touch()


def take_restart(folder: RunFolder, name: str) -> bool:
    """Whether it was asked for; it is not any more."""
    try:
        (folder.path / f"{name}.restart").unlink()
    except OSError:  # there is none
        return False
    return True

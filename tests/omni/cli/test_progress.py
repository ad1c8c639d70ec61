"""What a start looks like, on a terminal and elsewhere."""

import io
from pathlib import Path

from rich.console import Console

from omni.cli.progress import StartProgress
from omni.deployment.run_state import ProcessState, RunFolder


def test_a_line_for_each_process_where_there_is_no_terminal(tmp_path: Path) -> None:
    output = io.StringIO()
    folder = RunFolder(tmp_path / "run")
    with StartProgress(folder, ("a", "b"), Console(file=output)) as progress:
        assert progress.update()
        assert output.getvalue() == ""
        folder.write(ProcessState(name="a", state="ready"))
        folder.write(ProcessState(name="engine_host", state="ready"))
        assert progress.update()
        assert progress.update()
        folder.write(ProcessState(name="b", state="restarting", message="exited with code 1"))
        assert progress.update()
        folder.write(ProcessState(name="b", state="ready"))
        assert not progress.update()
    first, second = output.getvalue().splitlines()
    assert first.startswith("a ready after 0.")
    assert second.startswith("b ready after 0.")


def test_a_bar_for_each_process_on_a_terminal(tmp_path: Path) -> None:
    output = io.StringIO()
    folder = RunFolder(tmp_path / "run")
    with StartProgress(folder, ("a", "b"), Console(file=output, force_terminal=True, width=120)) as progress:
        folder.write(ProcessState(name="a", stage="loading [/weights]", progress=0.5))
        assert progress.update()
        assert "loading [/weights]" in output.getvalue()
        assert "importing vLLM" in output.getvalue(), "what b does before it is forked"
        folder.write(ProcessState(name="b", state="restarting", message="exited with code 1"))
        assert progress.update()
        assert "restarting: exited with code 1" in output.getvalue()
        folder.write(ProcessState(name="a", state="ready", progress=1.0))
        folder.write(ProcessState(name="b", state="ready", progress=1.0))
        assert not progress.update()
    assert "ready after" not in output.getvalue()

"""Folders with programs that print what a vendor's tools would, to be put on the PATH."""

import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

# Looks its arguments up; what it does not know it refuses.
_PROGRAM = """#!{python} -I
import sys
answers = {answers!r}
asked = " ".join(sys.argv[1:])
if asked not in answers:
    sys.exit("unknown: " + asked)
print(answers[asked])
"""


def only_tools(folder: Path, monkeypatch: pytest.MonkeyPatch, tools: Mapping[str, Mapping[str, str] | str]) -> None:
    """A PATH with these alone: each with its answers by arguments, or with a shell script's body."""
    folder.mkdir(exist_ok=True)
    for name, answers in tools.items():
        path = folder / name
        if isinstance(answers, str):
            path.write_text(f"#!/bin/sh\n{answers}\n")
        else:
            path.write_text(_PROGRAM.format(python=sys.executable, answers=dict(answers)))
        path.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))

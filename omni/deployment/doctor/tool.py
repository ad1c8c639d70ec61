"""Asking a vendor's tool, which may be missing or hang."""

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ranktable.sources import DRIVER_TOOLS

TOOL_TIMEOUT_S: Final = 10.0


class ToolError(Exception):
    """The tool is there and gave no answer; the text says why."""


@dataclass(frozen=True)
class Tool:
    path: Path

    def ask(self, *arguments: str, timeout_s: float = TOOL_TIMEOUT_S) -> str:
        """What it prints. Raises ToolError."""
        shown = " ".join((self.path.name, *arguments))
        try:
            done = subprocess.run(
                [self.path, *arguments], capture_output=True, text=True, errors="replace", timeout=timeout_s,
                env=os.environ | {"LC_ALL": "C"}, stdin=subprocess.DEVNULL, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise ToolError(f"`{shown}` gave no answer within {timeout_s:g} s") from None
        except OSError as error:
            raise ToolError(f"`{shown}` cannot be run ({error.strerror})") from None
        if done.returncode != 0:
            said = " ".join((done.stdout + done.stderr).split())[:200]
            raise ToolError(f"`{shown}` ended with status {done.returncode}: {said or 'it said nothing'}")
        return done.stdout


def find_tool(name: str) -> Tool | None:
    """On the PATH, or where Ascend's driver puts its tools."""
    path = shutil.which(name) or shutil.which(name, path=DRIVER_TOOLS)
    return None if path is None else Tool(Path(path))

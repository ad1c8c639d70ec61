"""Where a host's facts come from: its tools, run here and now, or files with what they said."""

import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, TypeVar

from ranktable import hccn_tool, npu_smi
from ranktable.errors import SourceError
from ranktable.hccn_tool import DeviceAddress
from ranktable.npu_smi import Chip, SuperPodChip

T = TypeVar("T")

TOOL_TIMEOUT_S = 30.0
DRIVER_TOOLS = "/usr/local/Ascend/driver/tools"  # where the driver's installer puts hccn_tool


class Source(Protocol):
    """All methods raise SourceError."""

    def chips(self) -> list[Chip]:
        """The host's chips, by device id."""

    def addresses(self, chips: Sequence[Chip], generation: str) -> list[DeviceAddress]:
        """One for each of the chips that `chips()` gave or some of them."""

    def super_pod_chips(self, chips: Sequence[Chip]) -> list[SuperPodChip]:
        """One for each of the chips; asked on A3 alone."""


@dataclass(frozen=True)
class Tools:
    """The tools of this host."""

    hccn_tool: str = "hccn_tool"
    npu_smi: str = "npu-smi"

    def chips(self) -> list[Chip]:
        return npu_smi.parse_map(*self._run(self.npu_smi, "info", "-m"))

    def addresses(self, chips: Sequence[Chip], generation: str) -> list[DeviceAddress]:
        found = []
        for chip in chips:
            query = ("-i", str(chip.logic_id), hccn_tool.QUERY[generation], "-g")
            text, where = self._run(self.hccn_tool, *query)
            found += _exactly(1, hccn_tool.parse(text, where, generation), where)
        return found

    def super_pod_chips(self, chips: Sequence[Chip]) -> list[SuperPodChip]:
        found = []
        for chip in chips:
            query = ("-i", str(chip.npu_id), "-c", str(chip.chip_id))
            text, where = self._run(self.npu_smi, "info", "-t", "spod-info", *query)
            found += _exactly(1, npu_smi.parse_super_pod(text, where), where)
        return found

    @staticmethod
    def _run(tool: str, *arguments: str) -> tuple[str, str]:
        """What it prints, and the command for messages."""
        shown = f"`{' '.join((Path(tool).name, *arguments))}`"
        if (path := shutil.which(tool) or shutil.which(tool, path=DRIVER_TOOLS)) is None:
            raise SourceError.of(shown, f"{tool!r} is not installed", "name its path, or give files with its output")
        environment = os.environ | {"LC_ALL": "C"}
        try:
            done = subprocess.run(
                [path, *arguments], capture_output=True, text=True, errors="replace", timeout=TOOL_TIMEOUT_S,
                env=environment, stdin=subprocess.DEVNULL, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise SourceError.of(
                shown, f"did not end within {TOOL_TIMEOUT_S:g} s", "see whether the driver is well"
            ) from None
        except OSError as error:
            raise SourceError.of(shown, f"cannot be run ({error.strerror})", "name another path") from None
        if done.returncode != 0:
            said = " ".join((done.stdout + done.stderr).split())[:200]
            raise SourceError.of(shown, f"ended with status {done.returncode}: {said!r}", "mend what it says")
        return done.stdout, shown


@dataclass(frozen=True)
class Recorded:
    """Files with what the tools said of all of a host's chips, in the order of device ids.

    Without the map of chips they are numbered 0, 1, ...
    """

    hccn_tool_file: Path
    map_file: Path | None = None
    super_pod_file: Path | None = None

    def chips(self) -> list[Chip]:
        if self.map_file is not None:
            return npu_smi.parse_map(read_text(self.map_file), str(self.map_file))
        text = read_text(self.hccn_tool_file)
        if not (count := text.count("ipaddr")):
            raise SourceError.of(str(self.hccn_tool_file), "tells of no device", "name a file with hccn_tool's output")
        return [Chip(npu_id=i, chip_id=0, logic_id=i, device_id=i) for i in range(count)]

    def addresses(self, chips: Sequence[Chip], generation: str) -> list[DeviceAddress]:
        where = str(self.hccn_tool_file)
        everything = hccn_tool.parse(read_text(self.hccn_tool_file), where, generation)
        return self._of(chips, everything, where)

    def super_pod_chips(self, chips: Sequence[Chip]) -> list[SuperPodChip]:
        assert self.super_pod_file is not None, "the command line asks for it"
        where = str(self.super_pod_file)
        return self._of(chips, npu_smi.parse_super_pod(read_text(self.super_pod_file), where), where)

    def _of(self, chips: Sequence[Chip], everything: list[T], where: str) -> list[T]:
        known = [chip.device_id for chip in self.chips()]
        by_id = dict(zip(known, _exactly(len(known), everything, where), strict=True))
        return [by_id[chip.device_id] for chip in chips]


def read_text(path: Path) -> str:
    """Raises SourceError."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise SourceError.of(
            str(path), f"cannot be read ({error.strerror})", "name a file with the tool's output"
        ) from None
    except ValueError:
        raise SourceError.of(str(path), "is not UTF-8 text", "name a file with the tool's output") from None


def _exactly(count: int, found: list[T], where: str) -> list[T]:
    if len(found) != count:
        raise SourceError.of(where, f"tells of {len(found)} devices, not of {count}", "ask for every device, once each")
    return found

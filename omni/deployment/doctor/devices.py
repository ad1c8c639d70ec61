"""Accelerators: the driver's tools answer, the devices that the file names are there, their links are up.

Written after Huawei's and NVIDIA's references, and tried on tools that print what these show; not run on Ascend
hardware.
"""

import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from omni.deployment.doctor.finding import Finding, ok, problem, warning
from omni.deployment.doctor.tool import Tool, ToolError, find_tool
from omni.deployment.memory import GIB
from ranktable import npu_smi
from ranktable.errors import RankTableError
from ranktable.npu_smi import Chip

_HEALTH: Final = re.compile(r"^\s*Health(?: Status)?\s*:\s*(\S+)", re.MULTILINE)
_LINK: Final = re.compile(r"^\s*link status\s*:\s*(\S+)", re.MULTILINE)
_CANN_VARIABLES: Final = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME")
_SET_ENV: Final = "source /usr/local/Ascend/ascend-toolkit/set_env.sh"
_MIB: Final = 1 << 20


def npu_findings(wanted: Sequence[int], *, is_needed: bool) -> Iterator[Finding]:
    """`wanted` are the device numbers that the file gives this host's engines."""
    tool = find_tool("npu-smi")
    if tool is None:
        if is_needed:
            mend = "install Ascend's driver, or run where it is; in docker: -v /usr/local/bin/npu-smi and the driver"
            yield problem("driver", "npu-smi", "not on the PATH", mend)
        return
    try:
        chips = npu_smi.parse_map(tool.ask("info", "-m"), "`npu-smi info -m`")
    except (ToolError, RankTableError) as error:
        yield problem("driver", "npu-smi", str(error), "see what `npu-smi info` says; load the driver, or reboot")
        return
    yield _present_devices("NPUs", [chip.device_id for chip in chips], wanted, "ascend_rt_visible_devices")
    used = [chip for chip in chips if not wanted or chip.device_id in wanted]
    yield _health(tool, used)
    yield from _links(used)
    if is_needed and not any(os.environ.get(name) for name in _CANN_VARIABLES):
        found = f"neither of {' and '.join(_CANN_VARIABLES)} is set"
        yield problem("driver", "CANN toolkit", found, f"{_SET_ENV} (where it is installed), then ask again")


@dataclass(frozen=True)
class Gpu:
    index: int
    name: str
    total_bytes: int
    free_bytes: int


def gpu_findings(num_wanted: int, *, is_needed: bool) -> Iterator[Finding]:
    """`num_wanted` GPUs are what this host's engines take, counted from 0."""
    tool = find_tool("nvidia-smi")
    if tool is None:
        if is_needed:
            yield problem("driver", "nvidia-smi", "not on the PATH", "install NVIDIA's driver; in docker: --gpus all")
        return
    try:
        gpus = parse_gpus(tool.ask("--query-gpu=index,name,memory.total,memory.free", "--format=csv,noheader,nounits"))
    except (ToolError, ValueError) as error:
        yield problem("driver", "nvidia-smi", str(error), "see what `nvidia-smi` says; load the driver, or reboot")
        return
    yield _present_devices("GPUs", [gpu.index for gpu in gpus], range(num_wanted), "the file's parallel sizes")
    for gpu in gpus:
        found = f"{gpu.name}, {gpu.free_bytes / GIB:.1f} GiB of {gpu.total_bytes / GIB:.1f} GiB free"
        if gpu.free_bytes < gpu.total_bytes * 0.9 and gpu.index < num_wanted:
            mend = "end the processes that `nvidia-smi` shows on it, or lower --gpu-memory-utilization in extra_args"
            yield warning("memory", f"GPU {gpu.index}", found, mend)
        else:
            yield ok("memory", f"GPU {gpu.index}", found)


def parse_gpus(text: str) -> list[Gpu]:
    """nvidia-smi's rows "0, NAME, MiB, MiB". Raises ValueError."""
    gpus = []
    for line in filter(None, map(str.strip, text.splitlines())):
        parts = [part.strip() for part in line.split(",")]
        if len(parts) != 4 or not all(parts[place].isdecimal() for place in (0, 2, 3)):
            raise ValueError(f"nvidia-smi's line {line[:80]!r} is not of a GPU")
        gpus.append(Gpu(int(parts[0]), parts[1], int(parts[2]) * _MIB, int(parts[3]) * _MIB))
    if not gpus:
        raise ValueError("nvidia-smi tells of no GPU")
    return gpus


def _present_devices(what: str, present: Sequence[int], wanted: Sequence[int], field: str) -> Finding:
    found = f"{len(present)} {what}: {_numbers(present)}"
    if missing := [device for device in wanted if device not in present]:
        mend = f"take them out of {field}, or make them visible here"
        return problem("driver", what, f"{found}; {_numbers(missing)} of {field} are not here", mend)
    return ok("driver", what, found)


def _health(tool: Tool, chips: Sequence[Chip]) -> Finding:
    sick = {}
    for chip in chips:
        try:
            text = tool.ask("info", "-t", "health", "-i", str(chip.npu_id), "-c", str(chip.chip_id))
        except ToolError as error:
            return warning("driver", "NPU health", str(error), "ask as root, or see `npu-smi info`")
        state = _HEALTH.search(text)
        if state is None or state[1].upper() != "OK":
            sick[chip.device_id] = state[1] if state else "no answer that is known"
    if not sick:
        return ok("driver", "NPU health", f"{len(chips)} are OK")
    found = ", ".join(f"{device}: {state}" for device, state in sick.items())
    return problem("driver", "NPU health", found, "see `npu-smi info -t health -i NPU -c CHIP`, and the driver's log")


def _links(chips: Sequence[Chip]) -> Iterator[Finding]:
    """The RoCE ports, by which hosts exchange KV and experts."""
    tool = find_tool("hccn_tool")
    if tool is None:
        mend = "name it on the PATH (/usr/local/Ascend/driver/tools); rank tables are made with it, too"
        yield warning("network", "hccn_tool", "not found", mend)
        return
    down = []
    for chip in chips:
        try:
            state = _LINK.search(tool.ask("-i", str(chip.logic_id), "-link", "-g"))
        except ToolError as error:
            yield warning("network", "NPU links", str(error), "ask as root")
            return
        if state is None or state[1].upper() != "UP":
            down.append(chip.device_id)
    if down:
        mend = "see `hccn_tool -i N -link -g` and `hccn_tool -i N -optical -g`, the cable and the switch's port"
        yield problem("network", "NPU links", f"not up: {_numbers(down)}", mend)
    else:
        yield ok("network", "NPU links", f"{len(chips)} are up")


def _numbers(numbers: Sequence[int]) -> str:
    """0-3,8"""
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ",".join("-".join(map(str, part)) for part in parts)

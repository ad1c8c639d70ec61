"""What npu-smi says of a host's chips.

    npu-smi info -m                          NPU ID   Chip ID   Chip Logic ID   [Chip Phy-ID]   Chip Name
                                             0        0         0               0               Ascend910
                                             0        2         -               -               Mcu

    npu-smi info -t spod-info -i NPU -c CHIP      SDID              : 16777216
                                                  Super Pod Size    : 384
                                                  Super Pod ID      : 0
                                                  Server Index      : 4

The chip's number in rank tables is its physical id; older npu-smi shows the logical one alone, and outside of
containers they are the same. A host of the A3 generation has two such chips on an NPU.

Source: Huawei's npu-smi command reference. The spod-info of several chips, one after the other, is read as well.
"""

from dataclasses import dataclass

from ranktable.errors import SourceError
from ranktable.json_part import MOST_DIGITS
from ranktable.model import NO_DEVICE

_HEADING = ("NPU ID", "Chip ID", "Chip Logic ID", "Chip Phy-ID", "Chip Name")
_PHYSICAL = "Chip Phy-ID"


@dataclass(frozen=True)
class Chip:
    npu_id: int
    chip_id: int  # on its NPU
    logic_id: int
    device_id: int  # physical


@dataclass(frozen=True)
class SuperPodChip:
    super_device_id: int
    super_pod_id: str
    where: str  # the line with the SDID


def parse_map(text: str, where: str) -> list[Chip]:
    """The chips that compute, by device id. Raises SourceError when this is not the table, or has no such chip."""
    lines = [(number, line.strip()) for number, line in enumerate(text.splitlines(), start=1) if line.strip()]
    has_physical = bool(lines) and _has_physical(lines[0][1])
    if not lines or has_physical is None:
        what = f"{lines[0][1][:80]!r} is not the heading NPU ID, Chip ID, ..." if lines else "is empty"
        raise SourceError.of(where, what, "see what `npu-smi info -m` says")
    found: dict[int, Chip] = {}
    for number, line in lines[1:]:
        chip = _chip(line, f"{where}: line {number}", has_physical)
        if chip is None:
            continue
        if chip.device_id in found:
            what = f"device {chip.device_id} stands twice"
            raise SourceError.of(f"{where}: line {number}", what, "keep the output of one host")
        found[chip.device_id] = chip
    if not found:
        raise SourceError.of(where, "has no chip that computes", "see what `npu-smi info` says of them")
    return [found[device_id] for device_id in sorted(found)]


def _has_physical(heading: str) -> bool | None:
    """Whether the table tells physical ids; None if this is not its heading."""
    words = " ".join(heading.split())
    if words == " ".join(_HEADING):
        return True
    return False if words == " ".join(name for name in _HEADING if name != _PHYSICAL) else None


def _chip(line: str, where: str, has_physical: bool) -> Chip | None:
    """The row's chip; None for one that does not compute (Mcu), whose logical id is "-"."""
    numbers = line.split()[: 4 if has_physical else 3]
    if len(numbers) >= 3 and numbers[2] == "-":
        return None
    if len(numbers) < 3 + has_physical or not all(map(_is_number, numbers)):
        raise SourceError.of(where, f"{line[:80]!r} is not a chip's row", "see what `npu-smi info -m` says")
    npu_id, chip_id, logic_id, *physical = map(int, numbers)
    return Chip(npu_id, chip_id, logic_id, physical[0] if physical else logic_id)


def parse_super_pod(text: str, where: str) -> list[SuperPodChip]:
    """The chips in the order of the text.

    Raises SourceError for a line that is not `key : value` or a chip that is in no super pod.
    """
    found: list[SuperPodChip] = []
    sdid: tuple[int, str] | None = None
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        at = f"{where}: line {number}"
        key, colon, value = (part.strip() for part in line.partition(":"))
        if not colon:
            raise SourceError.of(at, f"{line.strip()[:80]!r} is not key : value", "mend that chip, then ask again")
        if key == "SDID":
            if sdid is not None:
                raise SourceError.of(sdid[1], "is an SDID without a Super Pod ID", "ask npu-smi again")
            sdid = (_number(value, at, key), at)
        elif key == "Super Pod ID":
            if sdid is None:
                raise SourceError.of(at, "is a Super Pod ID without an SDID before it", "ask npu-smi again")
            found.append(SuperPodChip(sdid[0], str(_number(value, at, key)), sdid[1]))
            sdid = None
    if sdid is not None:
        raise SourceError.of(sdid[1], "is an SDID without a Super Pod ID", "ask npu-smi again")
    return found


def _is_number(word: str) -> bool:
    return word.isascii() and word.isdigit() and len(word) <= MOST_DIGITS


def _number(value: str, where: str, key: str) -> int:
    if not (_is_number(value) and int(value) < NO_DEVICE):
        raise SourceError.of(
            where, f"{key} {value[:20]!r} is no chip of a super pod", "use this on A3 hosts in super pods"
        )
    return int(value)

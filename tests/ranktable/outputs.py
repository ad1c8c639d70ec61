"""What an A2 and an A3 host's tools print, for the tests.

Written after the published forms (Huawei's HCCN Tool and npu-smi references); not recorded on hardware.
"""

from collections.abc import Sequence
from pathlib import Path


def ip_output(ip: str) -> str:
    """hccn_tool -i N -ip -g, on A2."""
    return f"ipaddr:{ip}\nnetmask:255.255.255.0\n\n"


def vnic_output(ip: str, link: str = "UP") -> str:
    """hccn_tool -i N -vnic -g, on A3."""
    return f"vnic link status: {link}\nvnic ipaddr: {ip}\nvnic netmask: 255.255.255.0\n"


def super_pod_output(sdid: int, pod: int = 0) -> str:
    """npu-smi info -t spod-info -i NPU -c CHIP."""
    rows = (("SDID", sdid), ("Super Pod Size", 384), ("Super Pod ID", pod), ("Server Index", 4))
    return "".join(f"\t{key:<31}: {value}\n" for key, value in rows)


def map_output(rows: Sequence[tuple[int | str, ...]]) -> str:
    """npu-smi info -m: rows of NPU, chip, logical id, or those and the physical id."""
    heading = ["NPU ID", "Chip ID", "Chip Logic ID", *(["Chip Phy-ID"] if len(rows[0]) == 4 else []), "Chip Name"]
    lines = [heading, *([*map(str, row), "Mcu" if row[2] == "-" else "Ascend 910"] for row in rows)]
    return "".join("\t" + "".join(f"{cell:<31}" for cell in line).rstrip() + "\n" for line in lines)


A2_IPS = tuple(f"192.168.1.{8 + i}" for i in range(8))
A2_MAP = map_output([row for npu in range(8) for row in ((npu, 0, npu), (npu, 1, "-"))])
A2_CONF = "".join(
    f"address_{i}={ip}\nnetmask_{i}=255.255.255.0\nnetdetect_{i}=192.168.1.254\nsend_arp_status_{i}=1\n"
    for i, ip in enumerate(A2_IPS)
)

A3_IPS = tuple(f"192.168.2.{199 - i}" for i in range(16))
A3_SDIDS = tuple(100663296 + 65537 * i for i in range(16))
A3_MAP = map_output(
    [row for npu in range(8) for row in (*((npu, c, 2 * npu + c, 2 * npu + c) for c in (0, 1)), (npu, 2, "-", "-"))]
)


def write(folder: Path, **texts: str) -> None:
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")

"""What hccn_tool says of device addresses.

    hccn_tool -i N -ip -g      A2       ipaddr:192.168.1.8
                                        netmask:255.255.255.0

    hccn_tool -i N -vnic -g    A3       vnic link status: UP
                                        vnic ipaddr: 192.168.2.199
                                        vnic netmask: 255.255.255.0

Source: Huawei's HCCN Tool interface reference. The output of several devices, one after the other, is read as well:
what `for i in {0..7}; do hccn_tool -i $i -ip -g; done > FILE` leaves in a file.
"""

import re
from dataclasses import dataclass

from ranktable.errors import SourceError
from ranktable.json_part import ip_address

QUERY = {"a2": "-ip", "a3": "-vnic"}  # generation → what is asked for

_LINE = re.compile(r"(?P<vnic>vnic )?(?P<key>link status|ipaddr|netmask)\s*:\s*(?P<value>\S+)")


@dataclass(frozen=True)
class DeviceAddress:
    ip: str
    where: str  # the line that says so
    is_up: bool = True  # False: the tool says that the link is down


def parse(text: str, where: str, generation: str) -> list[DeviceAddress]:
    """The addresses in the order of the text. Raises SourceError for any line that is not of such an answer: it is a
    device's error, and to read past it would give its address to the next one.
    """
    found: list[DeviceAddress] = []
    is_up = True
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        at = f"{where}: line {number}"
        match = _LINE.fullmatch(line.strip())
        if match is None:
            raise SourceError.of(at, f"{line.strip()[:80]!r} is not an address", "mend that device, then ask again")
        if bool(match["vnic"]) != (generation == "a3"):
            mend = f"ask with `hccn_tool -i N {QUERY[generation]} -g`"
            raise SourceError.of(at, f"{line.strip()!r} is not for {generation.upper()}", mend)
        if match["key"] == "link status":
            is_up = match["value"] == "UP"
        elif match["key"] == "ipaddr":
            found.append(DeviceAddress(_ip(match["value"], at), at, is_up))
            is_up = True
    return found


def _ip(value: str, where: str) -> str:
    if (ip := ip_address(value)) is None:
        raise SourceError.of(where, f"{value!r} is not an IP address", "give the device one")
    return ip

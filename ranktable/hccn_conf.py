"""/etc/hccn.conf of an A2 host: the driver's network settings, among them `address_N=IP` for device N.

Source: Huawei's HCCN Tool interface reference. Lines with other keys (netmask_N, gateway_N, netdetect_N, ...) are read
past.
"""

import re

from ranktable.errors import SourceError
from ranktable.hccn_tool import DeviceAddress
from ranktable.json_part import ip_address

_ADDRESS = re.compile(r"address_(\d{1,4})")


def parse(text: str, where: str) -> dict[int, DeviceAddress]:
    """Device id → address, by id.

    Raises SourceError for a line that is no setting, a bad or a second address, or none at all.
    """
    found: dict[int, DeviceAddress] = {}
    for number, raw in enumerate(text.splitlines(), start=1):
        line = raw.partition("#")[0].strip()
        if not line:
            continue
        at = f"{where}: line {number}"
        key, equals, value = (part.strip() for part in line.partition("="))
        if not equals:
            raise SourceError.of(
                at, f"{line[:80]!r} is not key=value", "mend the line; the driver reads this file, too"
            )
        if not (match := _ADDRESS.fullmatch(key)):
            continue
        device_id = int(match[1])
        if device_id in found:
            raise SourceError.of(at, f"{key} stands twice", f"keep one; the other is {found[device_id].where}")
        if (ip := ip_address(value)) is None:
            raise SourceError.of(at, f"{key}: {value[:80]!r} is not an IP address", "write one, as 192.168.1.8")
        found[device_id] = DeviceAddress(ip, at)
    if not found:
        raise SourceError.of(where, "has no line address_N=IP", "configure the devices' addresses, or ask hccn_tool")
    return dict(sorted(found.items()))

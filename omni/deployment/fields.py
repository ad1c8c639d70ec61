"""The kinds of value a deployment file holds, each with its own check and its own words.

Values come from YAML, where people write numbers with and without quotes; both are read. A refusal reads
"is not X; write Y": `omni.deployment.translate` puts the field's path and the value in front.
"""

import ipaddress
import re
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator
from pydantic_core import PydanticCustomError

from kv_transfer.connector.settings import MAX_CONNECTIONS

MAX_PARALLEL_SIZE = 4096  # what a slip of the pen writes beyond it would take for ever to plan

REFUSED = "omni_field"  # marks our own refusals among pydantic's errors

_HOST_NAME = re.compile(r"(?!-)[A-Za-z0-9-]{1,63}(?<!-)(\.(?!-)[A-Za-z0-9-]{1,63}(?<!-))*")
_ENV_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def refusal(problem: str, mend: str) -> PydanticCustomError:
    return PydanticCustomError(REFUSED, "{text}", {"text": f"{problem}; {mend}"})


def _whole_number(value: Any) -> int | None:
    """`value` as a number, or None. True is an int in Python and not a number here; neither is "8_0" or "٣"."""
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,18}", value.strip()):
        return int(value)
    return None


def _port(value: Any) -> int:
    number = _whole_number(value)
    if number is None or not 1024 <= number <= 65535:
        raise refusal("is not a port number", "write a number from 1024 to 65535")
    return number


def _control_port(value: Any) -> int:
    """Whether an empty value meant the default or none could only be guessed, so it is refused."""
    number = _whole_number(value)
    if number is None or not (number == 0 or 1024 <= number <= 65535):
        raise refusal("is not a port number", "write a number from 1024 to 65535, 0 for none, or delete the line")
    return number


def _count(value: Any) -> int:
    number = _whole_number(value)
    if number is None or number < 1:
        raise refusal("is not a number of at least 1", "write a whole number such as 1")
    return number


def _parallel_size(value: Any) -> int:
    number = _whole_number(value)
    if number is None or not 1 <= number <= MAX_PARALLEL_SIZE:
        raise refusal(f"is not a number from 1 to {MAX_PARALLEL_SIZE}", "write a whole number such as 1")
    return number


def _number(value: Any) -> int:
    number = _whole_number(value)
    if number is None:
        raise refusal("is not a whole number", "write one such as 0")
    return number


def _connections(value: Any) -> int:
    number = _whole_number(value)
    if number is None or not 1 <= number <= MAX_CONNECTIONS:
        raise refusal("is not a number of connections", f"write a whole number from 1 to {MAX_CONNECTIONS}")
    return number


def _positive(value: Any) -> float:
    try:
        number = -1.0 if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = -1.0
    if not 0 < number < 1e9:  # also refuses nan
        raise refusal("is not a number above 0", "write a number such as 30 or 0.5")
    return number


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise refusal("is not text", "put it in quotes")
    if not value.strip():
        raise refusal("is empty", "write a value or delete the line")
    return value.strip()


def _host(value: Any) -> str:
    text = value.strip() if isinstance(value, str) else ""
    is_address = re.fullmatch(r"[0-9.]+", text) is not None
    try:
        if is_address:
            ipaddress.IPv4Address(text)
    except ValueError:
        text = ""
    if not _HOST_NAME.fullmatch(text):
        raise refusal("is not an IPv4 address or host name", "write one such as 127.0.0.1")
    return text


def _address(value: Any) -> str:
    text = value.strip() if isinstance(value, str) else ""
    host, _, port = text.rpartition(":")
    try:
        _host(host)
    except PydanticCustomError:
        port = ""
    if not re.fullmatch(r"[0-9]{1,5}", port) or not 1 <= int(port) <= 65535:
        raise refusal("is not HOST:PORT", "write an IPv4 address or host name and a port, such as 10.0.0.2:7001")
    return text


def _hosts(value: Any) -> tuple[str, ...]:
    if not isinstance(value, str) or not value.strip():
        raise refusal("is not a list of hosts", 'write them with commas between, the master first: "10.0.0.1,10.0.0.2"')
    hosts = tuple(_host(part) for part in value.split(","))
    if "0.0.0.0" in hosts:
        raise refusal("holds 0.0.0.0, which nobody can connect to", "write this machine's address, such as 127.0.0.1")
    for host in hosts:
        if hosts.count(host) > 1:
            raise refusal(f"names {host} twice", "name each host once")
    return hosts


def _devices(value: Any) -> tuple[int, ...]:
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    if not isinstance(text, str) or not re.fullmatch(r"[0-9]{1,6}(,[0-9]{1,6})*", text):
        raise refusal("is not a list of device numbers", 'write them without spaces or a trailing comma: "0,1,2,3"')
    devices = tuple(map(int, text.split(",")))
    for device in devices:
        if devices.count(device) > 1:
            raise refusal(f"names device {device} twice", "name each device once")
    return devices


def _scalar(value: Any) -> str | None:
    """YAML text or number as the text a command line or the environment takes; None for anything else."""
    return str(value) if isinstance(value, str | int | float) and not isinstance(value, bool) else None


def _arguments(value: Any) -> tuple[str, ...]:
    parts = [_scalar(part) for part in value] if isinstance(value, list) else [None]
    if None in parts:
        raise refusal("is not a list of texts", 'write a list such as ["--max-num-seqs", "8"]')
    return tuple(part for part in parts if part is not None)


def _environment(value: Any) -> dict[str, str]:
    pairs = {name: _scalar(text) for name, text in value.items()} if isinstance(value, dict) else {"": None}
    for name, text in pairs.items():
        if text is None or "\0" in text or not _ENV_NAME.fullmatch(name):
            raise refusal("is not a block of NAME: text lines", 'write lines such as OMP_PROC_BIND: "true"')
    return {name: text for name, text in pairs.items() if text is not None}


def _name(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", value):
        raise refusal(
            "is not a deployment name",
            "write `name:` with at most 64 letters, digits, dots, dashes and underscores, such as chat-1",
        )
    return value


def _prefill_group(name: str) -> str:
    return _group(name, "p")


def _decode_group(name: str) -> str:
    return _group(name, "d")


def _mixed_group(name: str) -> str:
    return _group(name, "m")


def _group(name: str, letter: str) -> str:
    if not re.fullmatch(rf"(group|{letter})[0-9]{{1,6}}", name):
        raise refusal("is not a group name", f"write group1, group2, ... or {letter}1, {letter}2, ...")
    return name


def _at_least_one(groups: dict[str, Any]) -> dict[str, Any]:
    if not groups:
        raise refusal("holds no group", "write at least one, such as group1:")
    return groups


Port = Annotated[int, BeforeValidator(_port)]
ControlPort = Annotated[int | None, BeforeValidator(_control_port)]  # None: not written
Connections = Annotated[int, BeforeValidator(_connections)]
Count = Annotated[int, BeforeValidator(_count)]
ParallelSize = Annotated[int, BeforeValidator(_parallel_size)]
Number = Annotated[int, BeforeValidator(_number)]
Positive = Annotated[float, BeforeValidator(_positive)]
Text = Annotated[str, BeforeValidator(_text)]
LocalPath = Annotated[Path, BeforeValidator(_text), AfterValidator(lambda path: path.expanduser().absolute())]
Host = Annotated[str, BeforeValidator(_host)]
Address = Annotated[str, BeforeValidator(_address)]  # HOST:PORT
Hosts = Annotated[tuple[str, ...], BeforeValidator(_hosts)]
Devices = Annotated[tuple[int, ...], BeforeValidator(_devices)]
Arguments = Annotated[tuple[str, ...], BeforeValidator(_arguments)]
Environment = Annotated[dict[str, str], BeforeValidator(_environment)]
Name = Annotated[str, BeforeValidator(_name)]
PrefillGroupName = Annotated[str, BeforeValidator(_prefill_group)]
DecodeGroupName = Annotated[str, BeforeValidator(_decode_group)]
MixedGroupName = Annotated[str, BeforeValidator(_mixed_group)]
AtLeastOne = AfterValidator(_at_least_one)
Switch = BeforeValidator(lambda value: {} if value is True else None if value is False else value)  # of a block

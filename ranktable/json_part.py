"""One JSON object of a file with its path: reads typed fields, and collects what is wrong with them."""

import ipaddress
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ranktable.errors import Problem, at

MOST_DIGITS = 10  # of a 32-bit number
MOST_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True)
class JsonPart:
    """Fields that are missing or of a wrong kind become a problem and a stand-in ("", 0), so that reading goes on and
    one look finds all of them. Whoever reads raises when there are problems, and never returns stand-ins.
    """

    value: Mapping[str, Any]
    where: str  # "a.json: server_list[0]"; "a.json: " for the whole file
    problems: list[Problem]

    def path(self, key: str) -> str:
        return at(self.where, key)

    def has(self, key: str) -> bool:
        return key in self.value

    def text(self, key: str) -> str:
        value = self.value.get(key)
        if isinstance(value, str) and value.strip() and value.isprintable():
            return value
        if key not in self.value:
            self.wrong(key, "is missing", "add it")
        else:
            self.wrong(key, f"{_shown(value)} is not printable text", f'write it so: "{key}": "..."')
        return ""

    def number(self, key: str, *, bare: bool = False) -> int:
        """A number from 0 as text; with `bare`, as a JSON number too."""
        return self.number_if_right(key, bare=bare) or 0

    def number_if_right(self, key: str, *, bare: bool = False) -> int | None:
        """None where there is a problem."""
        value = self.value.get(key)
        if bare and isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            return value
        if isinstance(value, str) and value.isascii() and value.isdigit() and len(value) <= MOST_DIGITS:
            return int(value)
        if key not in self.value:
            self.wrong(key, "is missing", "add it")
        elif isinstance(value, int) and not isinstance(value, bool) and value >= 0:
            self.wrong(key, f"{value} is a JSON number, HCCL reads text", f'write "{key}": "{value}"')
        else:
            self.wrong(key, f"{_shown(value)} is not a number from 0", f'write it so: "{key}": "0"')
        return None

    def address(self, key: str) -> str:
        """An IP address in its usual spelling."""
        if not (text := self.text(key)):
            return ""
        if (found := ip_address(text)) is None:
            self.wrong(key, f"{_shown(text)} is not an IP address", "write one, as 192.168.1.8")
            return ""
        return found

    def parts(self, key: str) -> list["JsonPart"]:
        """A list of objects."""
        value = self.value.get(key)
        if not isinstance(value, list):
            what = f"{_shown(value)} is not a list" if key in self.value else "is missing"
            self.wrong(key, what, f'write "{key}": [...]')
            return []
        found = []
        for index, item in enumerate(value):
            if isinstance(item, dict):
                found.append(JsonPart(item, f"{self.path(key)}[{index}]", self.problems))
            else:
                self.wrong(f"{key}[{index}]", f"{_shown(item)} is not an object", "write {...}")
        return found

    def rest(self, *known: str) -> dict[str, Any]:
        """The keys that are not known, in the file's order."""
        return {key: value for key, value in self.value.items() if key not in known}

    def wrong(self, key: str, text: str, mend: str) -> None:
        self.problems.append(Problem(self.path(key), text, mend))


def ip_address(text: str) -> str | None:
    """An address of one host in its usual spelling; None if the text is no such address."""
    try:
        found = ipaddress.ip_address(text)
    except ValueError:
        return None
    return None if found.is_unspecified or found.is_multicast else str(found)


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}..."

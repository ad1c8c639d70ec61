"""Everything that ranktable raises.

RankTableError (ValueError)
├── TableError      a table breaks a rule, or is not a table
└── SourceError     a tool, or a file with its output, does not say what a table needs
"""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing to mend.

    `where` is the file and the field in it ("a.json: server_list[1].device[0].device_ip"), or the command that was run.
    `text` says what is wrong, starting with the value where it helps, and `mend` what to do.
    """

    where: str
    text: str
    mend: str

    def __str__(self) -> str:
        return f"{self.where}: {self.text}; {self.mend}"


def at(where: str, key: str) -> str:
    """A key of the part at `where`, which is "a.json: " for a whole file."""
    return f"{where}{key}" if where.endswith(": ") else f"{where}.{key}"


class RankTableError(ValueError):
    """The root of this package's errors. Its text names every problem, one per line."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        assert self.problems, "an error without a problem"
        super().__init__("\n".join(map(str, self.problems)))


class TableError(RankTableError):
    """A table that engines could not use."""


class SourceError(RankTableError):
    """Output that no table can be made from."""

    @classmethod
    def of(cls, where: str, text: str, mend: str) -> "SourceError":
        return cls([Problem(where, text, mend)])

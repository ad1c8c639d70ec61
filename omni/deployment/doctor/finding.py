"""One thing that was looked at, what was found, and what to do about it."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from omni.deployment.errors import Problem

Area = Literal["host", "driver", "network", "memory", "disk", "model", "versions", "key", "file"]
Level = Literal["ok", "warning", "problem"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    area: Area
    subject: str  # what was looked at: "/dev/shm", "deployment.proxy.listen_port"
    found: str
    level: Level = "ok"
    mend: str = ""  # what to do, a command where there is one; of what is well, nothing

    def __post_init__(self) -> None:
        assert (self.level == "ok") == (not self.mend), "a mend for what is not well, and for nothing else"


def ok(area: Area, subject: str, found: str) -> Finding:
    return Finding(area=area, subject=subject, found=found)


def warning(area: Area, subject: str, found: str, mend: str) -> Finding:
    return Finding(area=area, subject=subject, found=found, level="warning", mend=mend)


def problem(area: Area, subject: str, found: str, mend: str) -> Finding:
    return Finding(area=area, subject=subject, found=found, level="problem", mend=mend)


def of_problems(area: Area, problems: Iterable[Problem]) -> Iterator[Finding]:
    """A refusal's problems, each as a finding."""
    for each in problems:
        place = f"{each.place}: " if each.place else ""
        yield problem(area, f"{place}{each.field}", each.text, each.mend)

"""Everything that omni.deployment raises.

DeploymentError (ValueError)
└── ConfigError         the deployment file, or what it points to, cannot be used
    └── MachineError    the file is good, but this machine cannot run it now
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Self


@dataclass(frozen=True)
class Problem:
    """One thing to mend.

    `field` is where: a path into the deployment file ("services.prefill.max_model_len") or a file's name.
    `text` says what is wrong, starting with the value where it helps, and `mend` what to write instead.
    `place` is the file and line of `field` ("deploy.yml, line 12"), or "": `omni.deployment.line_numbers` adds it.
    """

    field: str
    text: str
    mend: str
    place: str = ""

    def __str__(self) -> str:
        place = f"{self.place}: " if self.place else ""
        return f"{place}{self.field}: {self.text}; {self.mend}"


class DeploymentError(ValueError):
    """The root of this package's errors."""


class ConfigError(DeploymentError):
    """The deployment cannot be started as written. Its text names every problem, one per line."""

    def __init__(self, problems: Iterable[Problem]) -> None:
        self.problems = tuple(problems)
        assert self.problems, "an error without a problem"
        super().__init__("\n".join(map(str, self.problems)))

    def placed(self, place_of: Callable[[str], str]) -> Self:
        """The same error with the place of every field that had none."""
        return type(self)(replace(problem, place=problem.place or place_of(problem.field)) for problem in self.problems)


class MachineError(ConfigError):
    """This machine lacks a free port, memory or a file that the deployment needs."""


def raise_any(problems: Iterable[Problem], error: type[ConfigError] = ConfigError) -> None:
    """Raises `error` when there is at least one problem."""
    if found := tuple(problems):
        raise error(found)

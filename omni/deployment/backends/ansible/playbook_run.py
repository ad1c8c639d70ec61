"""One run of the playbook by ansible-runner: quietly, with what matters of it as plain data."""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from omni.deployment.errors import DeploymentError

try:
    import ansible_runner  # type: ignore[import-untyped]
except ImportError as error:
    text = "backend: ansible needs Ansible on this machine: pip install 'omni_infer[ansible]'"
    raise DeploymentError(text) from error

_LAST_LINES: Final = 15


@dataclass(frozen=True)
class Failure:
    """Of one host: it does not go on after it."""

    host: str  # as the inventory names it
    task: str
    text: str
    is_unreachable: bool

    def __str__(self) -> str:
        if self.is_unreachable:
            return f"{self.host}: cannot be reached: {self.text}"
        return f"{self.host}: {self.task}:\n{_indented(self.text)}"

    @property
    def short(self) -> str:
        """On one line."""
        last_line = next(reversed(self.text.splitlines()), "failed")
        return str(self).splitlines()[0] if self.is_unreachable else f"{self.host}: {last_line}"


@dataclass
class Outcome:
    """What a run has done."""

    failures: list[Failure] = field(default_factory=list)
    outputs: dict[tuple[str, str], str] = field(default_factory=dict)  # (host, task) -> stdout
    num_changed: dict[str, int] = field(default_factory=dict)  # by host
    trouble: str = ""  # of Ansible itself: no host was asked

    @property
    def failed_hosts(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(failure.host for failure in self.failures))

    @property
    def is_good(self) -> bool:
        return not self.failures and not self.trouble

    def __str__(self) -> str:
        return "\n".join([*map(str, self.failures), *([self.trouble] if self.trouble else [])])


def run_playbook(
    folder: Path,
    *,
    tags: Iterable[str] = (),
    hosts: Iterable[str] = (),
    variables: Mapping[str, Any] | None = None,
    say: Callable[[str], None] | None = None,
    timeout_s: int,
) -> Outcome:
    """Args:
    folder: where it was rendered.
    tags: none: the steps that are needed to serve.
    hosts: none: all.
    say: gets the name of each part of the playbook as it begins, and what has changed on which host.
    """
    outcome = Outcome()
    with tempfile.TemporaryDirectory(prefix="omni-ansible-") as private:
        result = ansible_runner.run(
            private_data_dir=private,
            project_dir=str(folder),
            playbook="playbook.yml",
            inventory=str(folder / "inventory.yml"),
            tags=",".join(tags) or None,
            limit=",".join(hosts) or None,
            extravars=dict(variables or {}),
            envvars=_environment(),
            settings={"idle_timeout": 0, "job_timeout": timeout_s},
            event_handler=_Listener(outcome, say),
            quiet=True,
        )
        if result.status == "timeout":
            outcome.trouble = f"not done after {timeout_s} s"
        elif result.status == "canceled":
            outcome.trouble = "interrupted"
        elif result.rc != 0 and not outcome.failures:
            outcome.trouble = _last_lines(result.stdout.read() if result.stdout else f"Ansible ended with {result.rc}")
    return outcome


def _environment() -> dict[str, str]:
    """Ansible's programs are those beside this Python; what a user has set for Ansible counts on."""
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)))
    return {"PATH": path, "ANSIBLE_NOCOLOR": "1", "ANSIBLE_NOCOWS": "1", "ANSIBLE_DEPRECATION_WARNINGS": "0"}


class _Listener:
    """Sees each event as it comes."""

    def __init__(self, outcome: Outcome, say: Callable[[str], None] | None) -> None:
        self._outcome = outcome
        self._say = say
        self._play = ""

    def __call__(self, event: Mapping[str, Any]) -> bool:
        data = event.get("event_data") or {}
        kind, task, host = event.get("event"), str(data.get("task", "")), str(data.get("host", ""))
        result = data.get("res") or {}
        if kind == "playbook_on_play_start":
            self._play = str(data.get("play", ""))
        elif kind == "runner_on_ok":
            self._tell(self._play)
            self._play = ""  # said once, and not where nothing is done
            self._outcome.outputs[host, task] = str(result.get("stdout", ""))
            if result.get("changed"):
                self._tell(f"  {host}: {task}")
        elif kind == "runner_on_failed" and not data.get("ignore_errors"):
            self._outcome.failures.append(Failure(host, task, failure_text(result), is_unreachable=False))
        elif kind == "runner_on_unreachable":
            self._outcome.failures.append(Failure(host, task, failure_text(result), is_unreachable=True))
        elif kind == "playbook_on_stats":
            self._outcome.num_changed.update(data.get("changed") or {})
        return False  # it needs no file of its own

    def _tell(self, text: str) -> None:
        if self._say is not None and text:
            self._say(text)


def failure_text(result: Mapping[str, Any]) -> str:
    """The end of what a task said, stderr before all else."""
    failed_items = [item for item in result.get("results") or [] if isinstance(item, Mapping) and item.get("failed")]
    if failed_items:
        return failure_text(failed_items[0])
    output = [str(result.get(key) or "") for key in ("stderr", "module_stderr", "stdout", "module_stdout")]
    said = next((text for text in output if text.strip()), "")
    message = str(result.get("msg") or "")
    return _last_lines("\n".join(part for part in (message, said) if part.strip() and part != "non-zero return code"))


def _last_lines(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-_LAST_LINES:])


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())


def reports(outcome: Outcome) -> list[dict[str, Any]]:
    """What hosts said of their parts, after a run with the tag `report`."""
    return [json.loads(text) for (_, task), text in outcome.outputs.items() if task.startswith("report ") and text]

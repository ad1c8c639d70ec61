"""`omni_cli doctor`: what this machine has for serving, or for one deployment, and how to mend what it lacks."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Final

import typer
from rich.table import Table
from rich.text import Text

from omni.cli.clear_errors import clear_errors
from omni.cli.plain_console import plain_console
from omni.deployment.doctor.examine import examine_deployment, examine_machine
from omni.deployment.doctor.finding import Finding, Level
from omni.deployment.errors import DeploymentError

console = plain_console()

_STYLES: Final[dict[Level, str]] = {"ok": "green", "warning": "yellow", "problem": "red"}


@clear_errors
def doctor(
    config: Annotated[
        Path | None, typer.Argument(help="deployment file; without it the machine alone is looked at")
    ] = None,
    on: Annotated[
        str | None, typer.Option("--on", metavar="HOST", help="the file's address of this machine: look at its part")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Check host, driver, network, memory, disk, model and versions. Exit code 1 when something must be mended.

    Nothing is changed or started. Of a deployment on other hosts, the machine it is started from is looked at;
    run there with --on, one of its hosts.
    """
    if config is None and on is not None:
        raise DeploymentError("--on: goes with a deployment file, which has the hosts")
    findings = list(examine_machine() if config is None else examine_deployment(config, on))
    if as_json:
        print(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        console.print(_table(findings))
        console.print(_summary(findings))
    if any(finding.level == "problem" for finding in findings):
        raise typer.Exit(1)


def _table(findings: Sequence[Finding]) -> Table:
    table = Table()
    for column in ("", "area", "looked at", "found, and → what to do"):
        table.add_column(column, overflow="fold", no_wrap=column in ("", "area"))
    for finding in findings:
        found = Text(finding.found)
        if finding.mend:
            found.append(f"\n→ {finding.mend}", style="bold")
        table.add_row(Text(finding.level, style=_STYLES[finding.level]), finding.area, Text(finding.subject), found)
    return table


def _summary(findings: Sequence[Finding]) -> str:
    counts = {level: sum(finding.level == level for finding in findings) for level in ("problem", "warning")}
    words = [f"{number} {level}{'s' if number > 1 else ''}" for level, number in counts.items() if number]
    return ", ".join(words) if words else "nothing to mend"

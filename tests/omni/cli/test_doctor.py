"""The command: a table or JSON, and exit codes."""

import json
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner, Result

from omni.cli import doctor as command
from omni.deployment.doctor.finding import Finding, ok, problem, warning

WELL = ok("host", "processor [a]", "2 cores [fast]")
WORRY = warning("memory", "memory", "3 GiB", "end other programs")
BAD = problem("key", "private_key /k", "mode 644", "chmod 600 /k")


def doctor(*arguments: str) -> Result:
    app = typer.Typer()
    app.command()(command.doctor)
    return CliRunner().invoke(app, arguments)


def finds(monkeypatch: pytest.MonkeyPatch, *findings: Finding) -> None:
    monkeypatch.setattr(command, "examine_machine", lambda: iter(findings))


@pytest.mark.parametrize(
    ("findings", "code", "last"),
    [
        ((WELL,), 0, "nothing to mend"),
        ((WELL, WORRY), 0, "1 warning"),
        ((WELL, WORRY, BAD, BAD), 1, "2 problems, 1 warning"),
    ],
)
def test_table(findings: tuple[Finding, ...], code: int, last: str, monkeypatch: pytest.MonkeyPatch) -> None:
    finds(monkeypatch, *findings)
    done = doctor()
    assert (done.exit_code, done.stdout.splitlines()[-1]) == (code, last)
    assert "processor [a]" in done.stdout
    assert "2 cores [fast]" in done.stdout
    assert ("→ chmod 600 /k" in done.stdout) == bool(code)


def test_json(monkeypatch: pytest.MonkeyPatch) -> None:
    finds(monkeypatch, WELL, BAD)
    done = doctor("--json")
    assert done.exit_code == 1
    first, second = json.loads(done.stdout)
    assert first == {"area": "host", "subject": "processor [a]", "found": "2 cores [fast]", "level": "ok", "mend": ""}
    assert (second["level"], second["mend"]) == ("problem", "chmod 600 /k")


def test_a_file_and_a_host(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[Path, str | None]] = []
    monkeypatch.setattr(command, "examine_deployment", lambda config, on: asked.append((config, on)) or [WELL])
    assert doctor("x.yaml").exit_code == doctor("x.yaml", "--on", "10.0.0.1").exit_code == 0
    assert asked == [(Path("x.yaml"), None), (Path("x.yaml"), "10.0.0.1")]


def test_bad_input(tmp_path: Path) -> None:
    for arguments in (("--on", "10.0.0.1"), (str(tmp_path / "missing.yaml"),)):
        done = doctor(*arguments)
        assert (done.exit_code, done.stdout) == (2, "")
        assert len(done.stderr.splitlines()) == 1


def test_this_machine_in_earnest() -> None:
    """Whatever it lacks: every finding is whole, and the code tells whether there is a problem."""
    done = doctor("--json")
    findings = [Finding(**finding) for finding in json.loads(done.stdout)]
    assert {"processor", "memory", "python", "addresses"} <= {finding.subject for finding in findings}
    assert done.exit_code == any(finding.level == "problem" for finding in findings)


def test_help() -> None:
    done = doctor("--help")
    assert done.exit_code == 0
    assert "--json" in done.stdout


def test_a_finding_that_is_not_well_has_a_mend() -> None:
    with pytest.raises(AssertionError, match="a mend for what is not well"):
        warning("host", "x", "y", "")
    with pytest.raises(AssertionError, match="and for nothing else"):
        Finding(area="host", subject="x", found="y", mend="z")

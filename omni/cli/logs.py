"""`omni_cli logs`: what the processes of a running deployment have printed."""

import tempfile
from pathlib import Path
from typing import Annotated

import typer

from omni.cli import running
from omni.cli.clear_errors import clear_errors
from omni.deployment.backends import remote_backend
from omni.deployment.errors import DeploymentError
from omni.deployment.run_state import DeploymentState


@clear_errors
def logs(
    process: Annotated[str | None, typer.Argument(help="for example decode.group1.rank0; all when left out")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="go on as lines are added")] = False,
    num_lines: Annotated[int, typer.Option("-n", "--lines", min=0, help="how many of the last lines")] = 20,
    deployment_name: Annotated[str | None, typer.Option("--deployment")] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="other backends: keep the logs here")] = None,
) -> None:
    """Show the logs of a running deployment; those on other hosts are fetched first."""
    deployment = running.find(deployment_name)
    if deployment.backend != "local":
        _show_fetched(deployment, process, num_lines, output, follow=follow)
        return
    names = [process] if process is not None else list(deployment.process_names)
    paths = {name: running.log_file(deployment, name) for name in names}
    try:
        running.follow(paths, num_lines=num_lines, forever=follow)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


def _show_fetched(
    deployment: DeploymentState, process: str | None, num_lines: int, output: Path | None, *, follow: bool
) -> None:
    if follow:
        text = "backends other than local fetch logs as they are now; on the host itself `omni_cli logs -f` follows"
        raise DeploymentError(f"--follow: {text}")
    with tempfile.TemporaryDirectory(prefix="omni-logs-") as temporary:
        folder = output or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        remote_backend(deployment.backend).fetch_logs(deployment, folder)
        names = [process] if process is not None else list(deployment.process_names)
        paths = {name: folder / f"{name}.log" for name in names if (folder / f"{name}.log").is_file()}
        if not paths:
            known = sorted(path.stem for path in folder.glob("*.log"))
            raise DeploymentError(f"{process or deployment.name!r} has no log; there are {known}")
        running.follow(paths, num_lines=num_lines, forever=False)

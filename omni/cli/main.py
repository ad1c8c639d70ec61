"""`omni_cli`: start, watch and stop deployments. Each command is a few lines over `omni.deployment`."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from omni.cli import detached, running, scale
from omni.cli.clear_errors import clear_errors
from omni.cli.demo import run_demo
from omni.cli.progress import StartProgress
from omni.deployment.backends import local
from omni.deployment.checks import check_machine
from omni.deployment.load import load_plan
from omni.deployment.plan_types import LaunchPlan
from omni.deployment.render import plan_as_dict, plan_table
from omni.deployment.run_state import RunFolder

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
app.add_typer(scale.app, name="scale")
console = Console()

Config = Annotated[Path, typer.Argument(help="deployment file, for example configs/demo.yaml")]
Name = Annotated[str | None, typer.Argument(help="deployment name; not needed while only one runs")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@app.command()
@clear_errors
def plan(config: Config, as_json: AsJson = False) -> None:
    """Show what a deployment file would start, and start nothing."""
    launch_plan = load_plan(config)
    if as_json:
        print(json.dumps(plan_as_dict(launch_plan), indent=2))
    else:
        console.print(plan_table(launch_plan))


@app.command()
@clear_errors
def serve(
    config: Config,
    detach: Annotated[bool, typer.Option("--detach", help="return once it is ready; `omni_cli stop` ends it")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress bars")] = False,
) -> None:
    """Start a deployment. Ctrl-C stops all of it."""
    launch_plan = load_plan(config)
    check_machine(launch_plan)
    if detach:
        detached.start(launch_plan, console)
        return
    folder = RunFolder.of(launch_plan.name)
    if quiet:
        raise typer.Exit(local.serve(launch_plan))
    with StartProgress(folder, tuple(p.name for p in launch_plan.processes), console) as progress:

        def draw() -> bool:
            starting = progress.update()
            if not starting:
                progress.close()
                _print_ready(launch_plan)
            return starting

        code = local.serve(launch_plan, on_tick=draw)
    raise typer.Exit(code)


@app.command()
@clear_errors
def status(name: Name = None, as_json: AsJson = False) -> None:
    """Show the processes of a running deployment. Exit code 1 while any of them is not ready."""
    deployment = running.find(name)
    states = running.process_states(deployment)
    if as_json:
        print(json.dumps({"deployment": asdict(deployment), "processes": [asdict(s) for s in states]}, indent=2))
    else:
        table = Table(title=f"{deployment.name}: {deployment.proxy_url} serves {deployment.served_model_name}")
        for column in ("process", "state", "pid", "restarts", ""):
            table.add_column(column)
        for state in states:
            note = state.message or (state.stage if state.state == "starting" else "")
            table.add_row(state.name, state.state, str(state.pid or ""), str(state.restarts), note)
        console.print(table)
    if any(state.state != "ready" for state in states):
        raise typer.Exit(1)


@app.command()
@clear_errors
def stop(name: Name = None) -> None:
    """Stop a running deployment; returns once all its processes have ended."""
    deployment = running.find(name)
    running.stop(deployment)
    console.print(f"{deployment.name} stopped")


@app.command()
@clear_errors
def logs(
    process: Annotated[str | None, typer.Argument(help="for example decode.group1.rank0; all when left out")] = None,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="go on as lines are added")] = False,
    num_lines: Annotated[int, typer.Option("-n", "--lines", help="how many of the last lines")] = 20,
    deployment_name: Annotated[str | None, typer.Option("--deployment")] = None,
) -> None:
    """Show the logs of a running deployment."""
    deployment = running.find(deployment_name)
    names = [process] if process is not None else list(deployment.process_names)
    paths = {name: running.log_file(deployment, name) for name in names}
    try:
        running.follow(paths, num_lines=num_lines, forever=follow)
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


@app.command()
@clear_errors
def demo(config: Config = Path("configs/demo.yaml")) -> None:
    """Start a deployment, stream one completion through it with its speed, stop it."""
    launch_plan = load_plan(config)
    check_machine(launch_plan)
    detached.start(launch_plan, console)
    try:
        run_demo(launch_plan, console)
    finally:
        running.stop_all(launch_plan.name)
    console.print("stopped")


def _print_ready(launch_plan: LaunchPlan) -> None:
    console.print(
        f"ready: {launch_plan.served_model_name} ({launch_plan.dtype}) at {launch_plan.proxy.url}; Ctrl-C stops"
    )


if __name__ == "__main__":
    sys.exit(app())

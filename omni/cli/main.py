"""`omni_cli`: start, watch and stop deployments. Each command is a few lines over `omni.deployment`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from omni.cli import bench, curl, detached, doctor, init, logs, restart, running, scale, serve, status
from omni.cli.clear_errors import clear_errors
from omni.cli.demo import run_demo
from omni.cli.plain_console import plain_console
from omni.deployment.backends import remote_backend
from omni.deployment.checks import check_machine
from omni.deployment.errors import raise_any
from omni.deployment.line_numbers import naming_lines
from omni.deployment.load import load_plan
from omni.deployment.render import plan_as_dict, plan_table

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help=__doc__)
console = plain_console()

Config = Annotated[Path, typer.Argument(help="deployment file, for example configs/demo.yaml")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON")]


@clear_errors
def plan(config: Config, as_json: AsJson = False) -> None:
    """Show what a deployment file would start, and start nothing."""
    launch_plan = load_plan(config)
    backend = launch_plan.deployment.backend
    if backend != "local":
        with naming_lines(config):
            raise_any(remote_backend(backend).problems(launch_plan))
    if as_json:
        print(json.dumps(plan_as_dict(launch_plan), indent=2))
    else:
        console.print(plan_table(launch_plan))


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


app.command()(init.init)
app.command()(plan)
app.command()(doctor.doctor)
app.command()(serve.serve)
app.command()(status.status)
app.command()(serve.stop)
app.command()(restart.restart)
app.command()(logs.logs)
app.command()(curl.curl)
app.command()(bench.bench)
app.command()(serve.render)
app.command()(demo)
app.add_typer(scale.app, name="scale")


if __name__ == "__main__":
    sys.exit(app())
